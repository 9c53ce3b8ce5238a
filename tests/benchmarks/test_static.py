"""`python -m benchmarks.static` in processes of their own: in that of the tests, Triton interprets."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import static
from benchmarks.cases import NETWORKS, all_cases, sizes
from benchmarks.static.traffic import COUNTED_TOO
from benchmarks.work import QUICK
from pdfast.networks import UNet
from pdfast.networks.layers import Attention, GroupNorm
from pdfast.recipes import PRESETS
from tests.commands import ROOT, environment

OF_TRITON = "AnnAssign.__init__ missing"  # a warning of Triton's own, from Python 3.13 on; see pyproject.toml


def python(*arguments, **variables):
    clean = {name: value for name, value in environment().items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", "-W", f"ignore:{OF_TRITON}:DeprecationWarning", "-m", *arguments]
    return subprocess.run(command, env=clean | variables, cwd=ROOT, capture_output=True, text=True)


def measured(folder, *arguments):
    """The JSON of a run that passes, and what it printed."""
    files = folder / "static.json", folder / "static.md"
    done = python("benchmarks.static", "--json", str(files[0]), "--markdown", str(files[1]), *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and done.stdout.endswith("all pass\n")
    assert files[1].read_text().count("\n## ") == 2
    return json.loads(files[0].read_text()), done.stdout


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return measured(tmp_path_factory.mktemp("quick"), "--quick", "--arch", "90")


def test_the_kernels_pass_on_sm_90(quick):
    report, printed = quick
    assert report["failures"] == [] and set(report["versions"]) >= {
        "torch",
        "triton",
        "ptxas",
        "ptxas for sm_100",
        "commit",
        "date",
    }
    assert {row["op"] for row in report["kernels"]} == {case.op for case in all_cases()}
    for row in report["kernels"]:
        assert row["arch"] == 90 and row["kernel"] in printed
        assert row["instructions"] > 16 and row["registers"] >= 16
        assert sum(row["loads"].values()) and sum(row["stores"].values())
        assert row["accesses"]


def test_what_must_move_is_no_more_than_what_does(quick):
    report, printed = quick
    assert {row["op"] for row in report["traffic"]} == {case.op for case in all_cases()}
    for row in report["traffic"]:
        assert row["case"] in printed and "unavailable" not in row
        assert row["must"] <= row["ours"], row
        if row["op"] in ONE_PASS:  # the tensors, and a few coefficients a block
            assert row["ours"] < 1.01 * row["must"], row
            most = 0.9 if row["op"] == "adam_ema" else 0.6  # PyTorch has a fused Adam, without clip and average
            assert row["ours"] < most * row["eager"], row


ONE_PASS = ("diffuse", "ddim_step", "ddim_step_weighted_loss_and_grad", "adam_ema")

EXPECTED = {
    "copy": None,
    "parameter": None,
    "product": None,
    "odd copy": "narrow: 8 16-bit loads of x_ptr, 8 16-bit stores of y_ptr",
    "strided": "narrow: 8 16-bit loads of x_ptr",
    "table": "narrow: 8 16-bit loads of an address in memory",
    "double": "float64: 8 DFMA",
    "atomic": "atomics: 2 ATOMG.E.ADD",
    "spill": "spills: ",
    "small product": "tensor cores: no HGMMA but 4 HMMA",
    "large product": "shared memory: 393216 bytes a block, sm_90 has 232448",
}
ELSEWHERE = {
    80: {
        "atomic": "atomics: 8 ATOMG.E.ADD",
        "small product": None,
        "large product": "shared memory: 262144 bytes a block, sm_80 has 166912",
    },
    100: {
        "small product": r"tensor cores: no UTC\w*MMA but 4 HMMA",
        "large product": "shared memory: 393232 bytes a block, sm_100 has 232448",
    },
}


def check_reader(arch, expected):
    done = python("tests.benchmarks.throwaway", str(arch))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report) == set(expected)
    for name, reason in expected.items():
        failures = report[name]["failures"]
        if name == "small product":  # its tile is too small for wide stores as well
            failures = [line for line in failures if not line.startswith("narrow")]
        if reason is None:
            assert failures == [], name
        else:
            assert any(line.startswith(reason) for line in failures), (name, failures)
            assert name == "large product" or len(failures) == 1, (name, failures)
    return report


def test_the_reader_sees_what_a_kernel_does():
    report = check_reader(90, EXPECTED)
    assert report["copy"]["loads"] == {"LDG.128": 1} and report["copy"]["stores"] == {"STG.128": 1}
    assert report["strided"]["loads"] == {"LDG.16": 8}
    assert report["product"]["matrix"] == {"HGMMA": 4} and report["product"]["loads"] == {"LDGSTS.128": 24}
    assert report["spill"]["stack"] > 0
    assert {spill.partition(".")[0] for spill in report["spill"]["spills"]} == {"LDL", "STL"}
    main = {access["argument"]: (access["kind"], access["bits"]) for access in report["parameter"]["accesses"]}
    assert main == {"x_ptr": ("load", 128), "y_ptr": ("store", 128), "bias_ptr": ("load", 16)}


def test_a_failure_names_kernel_shape_and_reason():
    done = python("tests.benchmarks.throwaway", "gate")
    assert done.returncode == 1
    assert done.stderr == "__main__.strided sm_90, strided 65536 elements: narrow: 8 16-bit loads of x_ptr\n"
    assert done.stdout.endswith("1 launches of 1 cases: 1 FAILURES\n")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--arch", "70"], "argument --arch: invalid choice: "),
        (["--op", "convolution"], "argument --op: invalid choice: 'convolution'"),
        (["--json", "/nowhere/at/all"], "/nowhere/at/all is no file that could be written"),
    ],
)
def test_bad_arguments_are_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        static.main(arguments)
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith(f"benchmarks.static: {message}")


def test_the_interpreter_is_refused():
    done = python("benchmarks.static", "--quick", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert done.stderr.startswith("benchmarks.static: TRITON_INTERPRET=1 is set") and done.stderr.count("\n") == 1


def test_the_few_cases_are_cases():
    cases = all_cases()
    assert {*COUNTED_TOO} <= {case.full_name for case in cases}
    assert all(any(case.matches([pattern]) for case in cases) for pattern in QUICK)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name in PRESETS])
def test_the_cases_are_the_networks_layers(name):
    """Every normalisation of a preset's network is a case, and no other."""
    config = PRESETS[name].network
    seen = {GroupNorm: set(), Attention: set()}
    with torch.device("meta"):
        network = UNet(config)
        for module in network.modules():
            if type(module) in seen:
                module.register_forward_pre_hook(lambda m, args: seen[type(m)].add(tuple(args[0].shape[1:3])))
        classes = torch.zeros(1, dtype=torch.int64) if config.num_classes else None
        network(torch.empty(1, *config.image_shape), torch.empty(1), classes)
    case = NETWORKS[name]
    assert set(sizes(case.norms)) == seen[GroupNorm]
    assert set(sizes(case.attention)) == seen[Attention] and case.head_dim == config.head_dim
    assert set(case.widths) == {config.channels * m for m in config.channel_mult}
    assert list(sizes(case.image)) == [config.image_shape[:2]]
    assert case.parts == (2 if config.prediction == "both" else 1)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_all_shapes_pass(tmp_path, arch):
    report, _ = measured(tmp_path, "--arch", str(arch))
    assert {row["case"] for row in report["kernels"]} == {case.name for case in all_cases()}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ELSEWHERE)
def test_the_reader_on_other_architectures(arch):
    check_reader(arch, EXPECTED | ELSEWHERE[arch])
