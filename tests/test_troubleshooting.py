"""docs/troubleshooting.md has a row for each error and warning of pdfast, and no row for what is not in the code."""

import ast
import re

import pytest

from tests.commands import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
RAISED = {"UsageError", "RunError", "warn"}


def template(node: ast.AST) -> str:
    """A string as the page writes it, with ... for what varies; nothing for other expressions."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(template(part) if isinstance(part, ast.Constant) else "..." for part in parts)
    return ""


def strings_of(package: str) -> tuple[dict[str, str], set[str]]:
    """The messages of errors and warnings, each with its place, and all strings. A message that is made of others alone, which
    are found where they are, is left out."""
    messages, strings = {}, set()
    for file in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            strings.add(" ".join(template(node).split()))
            if isinstance(node, ast.Call) and node.args:
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                message = " ".join(template(node.args[0]).split())
                if name in RAISED and re.search("[a-z]", message):
                    messages[message] = f"{file.relative_to(ROOT)}, line {node.lineno}"
    return messages, strings


def rows(text: str) -> list[str]:
    """What stands in backquotes in the first column of the tables."""
    cells = re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE)
    return [row for cell in cells for row in re.findall("`(.*?)`", cell)]


@pytest.fixture(scope="module")
def said():
    return rows(PAGE.read_text())


def test_each_message_has_a_row(said):
    messages, _ = strings_of("pdfast")
    assert len(messages) > 100
    missing = [f"{place}: {message!r}" for message, place in messages.items() if not any(map(message.startswith, said))]
    assert not missing, "add rows to docs/troubleshooting.md, with ... for what varies, for\n" + "\n".join(missing)


def test_each_row_is_in_the_code(said):
    strings = strings_of("pdfast")[1] | strings_of("kernels")[1]
    shell = (ROOT / ".ci" / "environment").read_text()
    stale = [row for row in said if row not in shell and not any(text.startswith(row) for text in strings)]
    assert not stale, "docs/troubleshooting.md has rows for what no code says:\n" + "\n".join(stale)


def test_a_row_says_more_than_that_something_varies(said):
    assert len(set(said)) == len(said)
    assert all(len(re.sub(r"\.\.\.|\W", "", row)) > 4 for row in said), min(said, key=len)
