"""What mkdocs makes of links that leave docs/: their targets become pages and files of the site. README.md is its first page."""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?!\w+:)[^)\s#]+")
PAGES = {"README.md": "index.md"}
"""Of files in the repository, the names that they have in the site where these are others."""


def in_site(path):
    return PAGES.get(path, path.removeprefix("docs/"))


def linked(path):
    """The paths in the repository that a page links to."""
    return {
        posixpath.normpath(posixpath.join(posixpath.dirname(path), to))
        for to in LINK.findall((ROOT / path).read_text())
    }


def on_files(files, config):
    waiting = ["README.md", *(f"docs/{file.src_uri}" for file in files if file.src_uri.endswith(".md"))]
    done = {f"docs/{file.src_uri}" for file in files}
    while waiting:
        path = waiting.pop()
        if path not in done:
            done.add(path)
            content = (ROOT / path).read_bytes()
            files.append(File.generated(config, in_site(path), content=content))
        if path.endswith(".md"):
            waiting += linked(path) - done
    return files


def on_page_markdown(markdown, page, **_):
    here = {name: path for path, name in PAGES.items()}.get(page.file.src_uri, page.file.src_uri)
    folder = posixpath.dirname(here if (ROOT / here).exists() else f"docs/{here}")

    def relative(match):
        target = in_site(posixpath.normpath(posixpath.join(folder, match[0])))
        return posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(relative, markdown)
