"""The pages' code runs: every block of README.md, docs/ and kernels/README.md, those of a page in their order in one folder, on
networks and data that are tiny.

`Reader` has a rule for each language and command; a page that shows another needs another. Samples of output are indented, or
blocks of `text`. `distill` and `train` are also run where that is on the built-in digits in one process, else with --dry-run.
"""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

import numpy as np
import pytest
from diffusers import DDIMScheduler
from torch.distributed.run import get_args_parser

from benchmarks import tables
from pdfast.data.split import Split
from pdfast.engine.cost import parameters_and_flops
from pdfast.recipes import PRESETS
from tests.commands import ROOT, TINY_NETWORK, call
from tests.data.files import solid
from tests.pretrained.pipelines import save
from tests.pretrained.test_edm import write_pickle

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "kernels" / "README.md",
]

NOT_RUN = {
    "benchmarks/gpu.sh": "needs a GPU",
    "export": "sets a variable of the reader's own shell",
    "git": "fetches from another machine",
    "pip": "installs packages",
}
"""Commands that a page may show and no test runs, by their first word, and why."""

TINY_TEACHER = ["--train.updates", "2", "--train.batch-size", "16", "--train.warmup", "1", *TINY_NETWORK]
SMALL = {
    "benchmarks.kernels": "--device cpu --seconds 0.001 --samples 1 --providers pdfast --mode fwd",
    "benchmarks.loader": "--device cpu --image-size 4 --batch 1 --seconds 0.05 --workers 0 --loaders portable",
    "benchmarks.predict": "",
    "benchmarks.recipes": "--list",
    "benchmarks.static": "--quick --op ddim_step",
    "benchmarks.busy": "--list",
    "benchmarks.step": "--list",
    "benchmarks.tune": "--list",
    "pdfast.data.prepare": "",
    "pdfast.demo": "--device cpu",
    "pdfast.distill": "--device cpu --evaluation.num-samples 64 --rounds 3 --updates 2 --batch-size 16 --kept.count 64",
    "pdfast.evaluate": "--device cpu --num-samples 64",
    "pdfast.export": "--device cpu",
    "pdfast.sample": "--device cpu --count 4",
    "pdfast.train": "--device cpu --evaluation.num-samples 64 --evaluation-steps 4",
}
"""What makes a command one of seconds, after the page's own flags."""

GIVEN = {
    "docs/diffusers.md": """
        import torch
        from pdfast.recipes import PRESETS
        student, teacher = (PRESETS["digits"].network.build() for _ in range(2))
        x = torch.rand(4, 1, 8, 8)
    """,
    "docs/your-model.md": """
        import pdfast
        import torch
        from torch import nn
    """,
    "docs/drop-in.md": """
        from torch import nn
        model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.GroupNorm(32, 32), nn.SiLU())
    """,
    "kernels/README.md": """
        import torch
        from torch import nn
        model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.GroupNorm(32, 32), nn.SiLU())
        x, weight, bias = torch.randn(2, 32, 8, 8), torch.ones(32), torch.zeros(32)
    """,
}
"""What the reader of a page has when its Python begins."""


class Block(NamedTuple):
    place: str
    language: str
    text: str

    def commands(self) -> Iterator[list[str]]:
        """The words of each line; one that ends in a backslash goes on."""
        for line in self.text.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for match in re.finditer(r"^ *```(.*)\n((?:.*\n)*?) *```$", text, re.MULTILINE):
        line = text.count("\n", 0, match.start()) + 1
        yield Block(f"{name_of(page)}, line {line}", match[1].strip(), match[2])


class Reader:
    """Does what a page says, in the current folder."""

    def __init__(self, page: str, finished_run: Path, patch: pytest.MonkeyPatch) -> None:
        self.finished_run, self.patch = finished_run, patch
        self.names: dict[str, object] = {}
        exec(dedent(GIVEN.get(page, "")), self.names)

    def do(self, block: Block) -> None:
        match block.language:
            case "sh":
                for words in block.commands():
                    with self.patch.context() as patch:
                        self.command(words, patch)
            case "python":
                if "from kernels import" in block.text:
                    pytest.importorskip("kernels.load", reason="Hugging Face's `kernels` is not installed")
                exec(compile(block.text, block.place, "exec"), self.names)
            case "diff":  # between which files is for a test of its page
                examples = "".join(file.read_text() for file in (ROOT / "examples").glob("*.py"))
                for line in block.text.splitlines():
                    assert line[1:] in examples, f"no file of examples has the line {line!r}"
            case "text":
                pass
            case other:
                raise AssertionError(f"no rule runs a block of {other or 'no language'}: add one here")

    def command(self, words: list[str], patch: pytest.MonkeyPatch) -> None:
        while re.match(r"[A-Z_]+=", words[0]):
            patch.setenv(*words.pop(0).split("=", 1))
        if words[0] in NOT_RUN:
            return
        if words[0] == "make":
            subprocess.run([*words, "--dry-run"], cwd=ROOT, check=True, capture_output=True)
            return
        if words[0] == "python" and words[1].endswith(".py"):
            for word in words[2:]:
                if word.endswith(".pkl"):
                    self.provide(Path(word))
            patch.setattr(sys, "argv", words[1:])
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
            return
        module, *arguments = module_of([f".{word}" if word.startswith("/") else word for word in words], patch)
        assert module in SMALL, f"no rule runs {module}: add it to SMALL"
        if "flow_teacher:teacher" in arguments:
            self.provide_flow_teacher(patch)
        small = SMALL[module].split()
        if module.startswith("benchmarks."):
            if module == "benchmarks.kernels" and "--shapes" not in arguments:
                small.append("--quick")
            if module == "benchmarks.loader":
                self.provide(Path(arguments[arguments.index("--data") + 1]))
            patch.setattr("benchmarks.static.INTERPRETED", False)  # nothing is compiled:
            patch.setattr("benchmarks.static.read", lambda *_: [])
            patch.setattr("benchmarks.static.traffic.count", lambda *_: [])
            assert import_module(module).main([*arguments, *small]) == 0
            return
        name = module.removeprefix("pdfast.")
        if name in ("distill", "train"):
            if "flow_teacher:teacher" in arguments:
                pass
            elif "--teacher" in arguments:
                self.provide(Path(arguments[arguments.index("--teacher") + 1]))
            else:
                small += TINY_TEACHER
            patch.setattr("pdfast.plan.dry_run.seconds_a_forward", lambda *_: 1.0)
            assert call(name, *arguments, "--device", "cpu", "--dry-run") == 0
            if "--data" in arguments or "WORLD_SIZE" in os.environ:
                return
        elif name in ("sample", "evaluate", "export", "demo"):
            self.provide(Path(arguments[0]))
            patch.setattr("pdfast.demo.build_page", lambda *_: sys.exit(0))  # it would wait for a browser
        elif name == "data.prepare":
            self.provide(Path(arguments[1]))
            split = Split(np.zeros((20, 4, 4, 3), np.uint8), np.arange(20) % 10)
            patch.setattr("pdfast.data.prepare.load_cifar10", lambda _: (split, split))
            patch.setattr("pdfast.data.prepare.load_fashion_mnist", lambda _: (split, split))
        assert call(name, *arguments, *small) == 0

    def provide(self, path: Path) -> None:
        """Make what a command reads, unless one before has written it."""
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.parts[0] == "runs":
            path.symlink_to(self.finished_run.joinpath(*path.parts[2:]))
        elif path.name.endswith("-pipeline"):
            save(path, DDIMScheduler(prediction_type="epsilon" if "eps" in path.name else "v_prediction"))
        elif path.suffix == ".pkl":
            write_pickle(path)
        elif not path.suffix:
            for label in ("cat", "dog"):
                solid(path / label / "1.png", (90, 120, 150))

    def provide_flow_teacher(self, patch: pytest.MonkeyPatch) -> None:
        """What the example's function needs: its module, as PYTHONPATH gives it to a new process, and its weights."""
        examples = ROOT / "examples"
        patch.syspath_prepend(examples)
        if not Path("flow-digits.pt").exists():
            runpy.run_path(str(examples / "flow_teacher.py"))["train"]("flow-digits.pt", updates=1)


def module_of(words: list[str], patch: pytest.MonkeyPatch) -> list[str]:
    """The module that a command runs and its arguments, under torchrun with the number of processes in WORLD_SIZE."""
    launched = words[:3] == ["python", "-m", "pdfast.launch"]
    if words[0] == "torchrun" or launched:
        parser = get_args_parser()
        parser.allow_abbrev = not launched
        options = parser.parse_args(words[3:] if launched else words[1:])
        assert options.module, "torchrun -m MODULE"
        patch.setenv("WORLD_SIZE", str(int(options.nnodes.rpartition(":")[2]) * int(options.nproc_per_node)))
        return [options.training_script, *options.training_script_args]
    assert words[:2] == ["python", "-m"], "no rule runs this command: add one, or a reason to NOT_RUN"
    return words[2:]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_code_of_a_page(page, finished_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    reader = Reader(name_of(page), finished_run, monkeypatch)
    for block in blocks_of(page):
        try:
            reader.do(block)
        except (Exception, SystemExit) as error:
            raise AssertionError(
                f"{block.place}: {error or type(error).__name__}\n{capsys.readouterr().err}"
            ) from error


@pytest.mark.parametrize(
    "language, text, failure",
    [
        ("sh", "python -m pdfast.distill --roundz 8", AssertionError),
        ("sh", "python -m pdfast.distill --rounds eight", AssertionError),
        ("sh", "torchrun --nprocs 8 -m pdfast.distill", SystemExit),
        ("sh", "python -m pdfast.distil", AssertionError),
        ("sh", "python -m benchmarks.kernels --opp attention", SystemExit),
        ("sh", "python examples/none.py", FileNotFoundError),
        ("sh", "make distil", subprocess.CalledProcessError),
        ("sh", "curl example.org", AssertionError),
        ("python", "from pdfast import nothing", ImportError),
        ("diff", "+import nothing", AssertionError),
        ("fortran", "END", AssertionError),
        ("", "no language", AssertionError),
    ],
)
def test_code_that_does_not_run_is_found(language, text, failure, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(failure):
        Reader("", tmp_path, monkeypatch).do(Block("here", language, text))


def test_each_flag_that_a_page_names_exists(capsys):
    flags = r"(?<![\w-])--[a-z][\w.-]*\w"
    known = {"--no-deps", "--target", "--force-reinstall", "--outdir", "--wheel"}  # of pip and build
    known |= {option for action in get_args_parser()._actions for option in action.option_strings}
    for module in SMALL:
        if module.startswith("benchmarks."):
            with pytest.raises(SystemExit):
                import_module(module).main(["--help"])
        else:
            command = ["images"] if module == "pdfast.data.prepare" else []
            assert call(module.removeprefix("pdfast."), *command, "--help") == 0
        known |= set(re.findall(flags, capsys.readouterr().out))
    known |= {flag.partition(".")[0] for flag in known}  # groups, as --engine
    for page in PAGES:
        named = set(re.findall(flags, page.read_text()))
        assert named <= known, f"{name_of(page)} names {', '.join(named - known)}, which no command has"


def test_links_and_the_index():
    """Each page is named in README.md, and each link that leads to a file or a heading of this repository leads there."""
    index = (ROOT / "README.md").read_text()
    for page in PAGES[1:]:
        assert f"({name_of(page)})" in index, f"README.md does not name {name_of(page)}"
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if not target.startswith("http"):
                path, _, heading = target.partition("#")
                file = (page.parent / path).resolve() if path else page
                assert file.exists(), f"{name_of(page)}: nothing is at {target}"
                headings = re.findall("^#+ (.*)", file.read_text(), re.MULTILINE) if heading else []
                names = [re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings]
                assert not heading or heading in names, f"{name_of(page)}: {target} is no heading"


def test_results_names_each_file_with_its_commit():
    page = (ROOT / "docs" / "results.md").read_text()
    results = ROOT / "benchmarks" / "results"
    for file in results.rglob("*.json"):
        report = json.loads(file.read_text())
        commit = (report.get("header") or report["versions"])["commit"]
        assert f"(../benchmarks/results/{file.relative_to(results)})" in page
        assert commit[:7] in page or commit[:7] in (ROOT / "docs" / "data.md").read_text()


def test_results_on_a_gpu_are_those_of_the_files():
    page, folder = (ROOT / "docs" / "results.md").read_text(), ROOT / "benchmarks" / "results" / "h200"
    names = ("first-before", "first", "first-imagenet64-before", "norm-before")
    files = {name: json.loads((folder / f"{name}.json").read_text()) for name in names}
    kinds, norms = tables.tables(files)
    ends, _ = tables.tables({"first": files["first"]})
    for line in (*kinds[2:], *ends[2:], *norms[2:]):
        assert line.replace("group_norm cifar10 ", "") in page.splitlines()
    rates = [found["header"]["matmul_tflop_s"] for found in files.values()]
    reached = []
    for name, preset in (("first-before", "cifar10"), ("first", "cifar10"), ("first-imagenet64-before", "imagenet64")):
        _, flops = parameters_and_flops(PRESETS[preset].network)
        update = files[name]["update"]
        reached.append(5 * flops * update["batch"] / update["median_ms"] / 1e9)
    own = [f"{100 * rate / of:.1f}" for rate, of in zip(reached, rates, strict=False)]
    fastest = [f"{100 * rate / max(rates):.1f}" for rate in reached]
    text = " ".join(page.split())
    assert "at {:.0f} TFLOP/s before and at {:.0f} after, `imagenet64` at {:.0f}.".format(*reached) in text
    assert f"{own[0]}, {own[1]} and {own[2]} %" in text and f"{fastest[0]}, {fastest[1]} and {fastest[2]} %" in text
    assert f"{min(rates):.0f} to {max(rates):.0f} TFLOP/s" in text


def test_times_of_launch_configurations_are_those_of_the_files():
    page, folder = (ROOT / "docs" / "results.md").read_text(), ROOT / "benchmarks" / "results" / "h200"
    before, tuned = (json.loads((folder / f"{name}.json").read_text())["rows"] for name in ("norm-before", "tune"))
    shown = page[page.index("| case, 128 samples |") :].partition("\n\n")[0].splitlines()[2:]
    assert len(shown) == 6
    for line in shown:
        op, shape = re.findall(r"[\w+]+", line)[:2]
        times = [
            [f"{1e3 * row['median_ms']:.0f}" for row in rows if _is_of(row, op, shape)] for rows in (before, tuned)
        ]
        _, _, first, shipped, others, _ = (cell.strip() for cell in line.split("|"))
        assert first in ("", *times[0]) and shipped in times[1] and set(re.findall(r"\d+", others)) <= set(times[1])


def _is_of(row, op, shape):
    case = f"{row.get('op', '')} {row['case']}".strip()
    ours = row.get("provider", "pdfast") == "pdfast" and row.get("mode", "full") == "full"
    return ours and case.startswith(op) and f"x{shape} " in case


def test_results_of_an_update_are_those_of_the_file():
    page = (ROOT / "docs" / "results.md").read_text()
    for row in json.loads((ROOT / "benchmarks" / "results" / "step-cpu.json").read_text())["rows"]:
        sampled = " | ".join(f"{rate:.0f}" for rate in row["sampled_images_per_second"].values())
        numbers = f"{row['images_per_second']:.0f} | {row['median_ms']:.1f} | {row['peak_mib']:.1f} | {sampled}"
        assert f"| {row['provider']} | {row['variant']} | {numbers} |".replace("|  |", "| |") in page
