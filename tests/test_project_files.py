"""What stands beside the code for those who carry it on: pages, citation, changelog, workflow."""

import ast
import re
import subprocess
import sys
import tomllib

import pytest
import yaml

import pdfast
from tests.commands import ROOT


def pages(nav):
    for entry in nav:
        if isinstance(entry, dict):
            for value in entry.values():
                yield from pages(value) if isinstance(value, list) else [value]
        else:
            yield entry


def test_every_page_is_in_the_site():
    """Those of docs/, and some that `.ci/site.py` brings: README.md as the first."""
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    in_docs = {str(f.relative_to(ROOT / "docs")) for f in (ROOT / "docs").rglob("*.md")}
    assert sorted(pages(nav)) == sorted(in_docs | {"index.md", "kernels/README.md", "CONTRIBUTING.md", "CHANGELOG.md"})


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    """A link to what is not there is one, and so is a name of the reference that does not exist."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    assert (tmp_path / "index.html").exists() and (tmp_path / "benchmarks/results/step-cpu.json").exists()


def test_the_reference_has_every_public_name():
    """Under the name that it is imported by, or in a module that is there whole."""
    for package, names in (("pdfast", pdfast.__all__), ("pdfast_kernels", __import__("pdfast_kernels").__all__)):
        text = (ROOT / f"docs/reference/{package}.md").read_text()
        listed = re.findall(r"^::: ([\w.]+)$", text, re.M)
        whole = {"noise_levels": ("phi_from", "_from_phi", "logsnr")}
        shown = {name.rpartition(".")[2] for name in listed}
        for module, words in whole.items():
            if module in shown:
                shown |= {name for name in names if any(word in name for word in words)}
        left_out = {"Report", "Scalar", "noise_key"}  # what others return and take
        assert set(names) - shown <= left_out, set(names) - shown


def test_the_workflow_runs_what_ci_does_for_each_python():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (job,) = [
        j for j in yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"].values() if "strategy" in j
    ]
    listed = {c.rpartition(" ")[2] for c in project["classifiers"] if re.search(r"Python :: 3\.\d+$", c)}
    assert set(job["strategy"]["matrix"]["python"]) == listed
    assert ".ci/run" in [step.get("run") for step in job["steps"]]


def imported(package):
    """The packages outside the standard library that its modules import, anywhere in them, as PyPI names them."""
    nodes = [node for file in (ROOT / package).rglob("*.py") for node in ast.walk(ast.parse(file.read_text()))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    packages = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
    return {{"PIL": "pillow", "yaml": "pyyaml"}.get(name, name) for name in packages}


def test_what_is_imported_is_what_is_required():
    """Others are used where they are installed, or for types alone; the kernels stand by themselves."""
    optional = {"amp_C", "apex", "diffusers", "gradio", "jaxtyping", "nvidia"}
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    required = {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}
    assert imported("pdfast") - optional - {"pdfast", "pdfast_kernels"} == required
    assert imported("kernels/pdfast_kernels") == {"pdfast_kernels", "torch", "triton"}


def test_one_version_which_the_changelog_has():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"] == ["version"]
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert changes.index("## Unreleased") < changes.index(f"## {pdfast.__version__} - ")


def test_the_citation_has_what_its_schema_asks():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["license"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]


def test_the_hooks_are_those_of_lint():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    makefile = (ROOT / "Makefile").read_text()
    assert [hook["entry"].removeprefix(".venv") in makefile.replace("$(VENV)", "") for hook in hooks] == [True] * 3
