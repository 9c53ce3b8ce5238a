"""Networks made by a function of the user's own: distilled as any other, run only where the command line names them."""

import itertools
import json
import runpy

import pytest
import torch
from torch import nn

from pdfast import Flow, own_code, sample
from pdfast.diffusion import Cosine
from pdfast.engine.cost import parameters_and_flops
from pdfast.io.errors import UsageError
from pdfast.own_code import OwnCode, Teacher
from pdfast.plan.cost import activation_bytes, parameters
from pdfast.pretrained.model_folder import fill_model_folder, load_model
from pdfast.pretrained.module import check_network, config_of
from tests.commands import ROOT, TINY_GIVEN, call

CPU = torch.device("cpu")
EXAMPLE = ROOT / "examples/flow_teacher.py"
ROUNDS = "--rounds 2 --updates 3 --batch-size 16 --method progressive".split()
names = (f"own_code_{i}" for i in itertools.count())

GOOD = """
import torch
import pdfast
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, z, phi, cond):
        return self.conv(z)

def teacher(**more):
    torch.manual_seed(3)
    made = dict(network=Net(), prediction="v", schedule=pdfast.Cosine(), image_shape=(1, 8, 8)) | more
    return pdfast.Teacher(**made)
"""


@pytest.fixture(autouse=True)
def nothing_is_allowed_afterwards():
    yield
    own_code.allow(None)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a module with that text; returns the name of its function."""
    monkeypatch.syspath_prepend(tmp_path / "code")
    (tmp_path / "code").mkdir()

    def write(text, function="teacher"):
        name = next(names)
        (tmp_path / "code" / f"{name}.py").write_text(text)
        return f"{name}:{function}"

    return write


def last_line(capsys):
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and error.startswith("pdfast: error: ")
    return error


@pytest.mark.filterwarnings("ignore:64 images are too few")
def test_the_example_is_distilled(tmp_path, monkeypatch, capsys):
    """A flow network: sampled by Euler's method for its own equation, which is DDIM; the run goes on from its folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    example = runpy.run_path(str(EXAMPLE))
    assert len(example["train"]("flow-digits.pt", updates=3)) == 3
    command = ["distill", *TINY_GIVEN, "--teacher", "flow_teacher:teacher", *ROUNDS, "--run", "run"]
    assert call(*command) == 0
    capsys.readouterr()

    asks = "say --network-from flow_teacher:teacher"
    for other in (["sample"], ["evaluate", "--device", "cpu"], ["export", "out"], ["demo"]):
        assert call(other[0], "run", *other[1:]) == 2
        assert asks in last_line(capsys)
    assert call("distill", "--config", "run/config.yaml", "--run", "again", "--dry-run") == 2
    assert "say --teacher flow_teacher:teacher" in last_line(capsys)
    with pytest.raises(UsageError, match=asks):
        load_model(tmp_path / "run/teacher", CPU)

    flag = ["--network-from", "flow_teacher:teacher"]
    assert call("sample", "run", "--count", "4", *flag) == 0
    assert call("evaluate", "run", "--device", "cpu", *flag) == 0
    assert call("export", "run", "out", *flag) == 2
    assert "has no class in diffusers" in capsys.readouterr().err
    assert call("export", "run", "out", "--format", "safetensors", *flag) == 0
    assert call("sample", "out", "--count", "4", *flag) == 0
    further = [
        "distill",
        *TINY_GIVEN,
        "--teacher",
        "run/students/0002",
        *"--rounds 1 --start-steps 2 --dry-run".split(),
    ]
    assert call(*further) == 2 and asks in last_line(capsys)
    assert call(*further, *flag) == 0

    own_code.allow("flow_teacher:teacher")
    saved = load_model(tmp_path / "run/teacher", CPU)
    student = load_model(tmp_path / "run/students/0001", CPU).network.state_dict()
    assert all(not torch.equal(weight, student[key]) for key, weight in saved.network.state_dict().items())
    flow = example["FlowNet"]()
    flow.load_state_dict(torch.load("flow-digits.pt", weights_only=True))
    noise = torch.randn(3, 1, 8, 8)
    y, times = noise.double(), torch.linspace(1, 0, 6)
    with torch.no_grad():
        for t, following in itertools.pairwise(times):
            y = y + (following - t) * flow(y.float(), t.expand(3)).double()
    torch.testing.assert_close(
        sample(saved.network, noise, saved.schedule.build(), 5).double(), y, atol=1e-4, rtol=1e-4
    )

    assert call(*command) == 0  # finished already
    example["train"]("flow-digits.pt", updates=2)
    capsys.readouterr()
    assert call(*command) == 2
    assert "another teacher than flow_teacher:teacher" in capsys.readouterr().err


def test_no_folder_runs_code(write, tmp_path, capsys):
    """Neither its config.json nor a configuration: the module is not imported unless the command line names it."""
    marker = tmp_path / "ran"
    name = write(f"from pathlib import Path\nPath({str(marker)!r}).touch()\n" + GOOD)
    command = ["distill", *TINY_GIVEN, "--teacher", name, *ROUNDS]
    assert call(*command, "--dry-run") == 0 and marker.exists()
    marker.unlink()
    folder = tmp_path / "model"
    own_code.allow(name)
    saved = load_model(name, CPU)
    own_code.allow(None)
    folder.mkdir()
    fill_model_folder(folder, saved.network.state_dict(), saved.config, saved.schedule, None)
    (tmp_path / "config.yaml").write_text(json.dumps({"preset": "digits", "teacher": name}))
    for arguments in (["sample", str(folder)], ["distill", "--teacher", str(folder)]):
        assert call(*arguments) == 2
        assert f"say --network-from {name}" in last_line(capsys)
    assert call("distill", "--config", str(tmp_path / "config.yaml")) == 2
    assert f"say --teacher {name}" in last_line(capsys) and not marker.exists()


@pytest.mark.parametrize(
    "text, words",
    [
        ("def teacher():\n    raise KeyError('weights')", "KeyError: 'weights' ({file}, line 2, in teacher)"),
        ("def teacher():\n    exit(3)", "SystemExit: 3 ({file}, line 2, in teacher)"),
        ("import json\ndef teacher():\n    json.loads('{')", "line 3, in teacher; raised in "),
        ("def teacher(:", "SyntaxError: invalid syntax ({file}, line 1)"),
        ("import nothing_of_that_name", "No module named 'nothing_of_that_name' ({file}, line 1, in <module>)"),
        ("def other(): pass", "{file} has no function teacher, but other"),
        ("def teacher(): return 1, 2, 3", "returned a tuple: let it return pdfast.Teacher("),
    ],
)
def test_what_fails_is_one_line_with_its_place(text, words, write, tmp_path, capsys):
    name = write(text)
    assert call("distill", "--teacher", name) == 2
    line = last_line(capsys)
    assert name in line and words.format(file=tmp_path / "code" / f"{name.partition(':')[0]}.py") in line


@pytest.mark.parametrize(
    "changed, words",
    [
        ("network='unet'", "its network is a str"),
        ("network=nn.Linear(2, 2)", "takes 2 positional arguments but 4 were given"),
        ("prediction='score'", "its prediction is 'score': choose from x, eps, v, both, flow"),
        ("prediction='both'", "returned shape (2, 1, 8, 8)"),
        ("schedule=pdfast.Cosine", "give an instance"),
        ("schedule=1", "schedule is a int"),
        ("image_shape=(8, 8, 1)", "expected input[2, 8, 8, 1] to have 1 channels"),
        ("image_shape=(8, 8)", "need (C, H, W)"),
        ("image_shape=(3, 8, 8)", "expected input[2, 3, 8, 8] to have 1 channels"),
        ("num_classes=-1", "num_classes is -1"),
        ("network=nn.Identity()", "no parameters"),
        ("network=Net().apply(lambda m: m.register_parameter('w', nn.Parameter(torch.full((2,), torch.nan))))", "NaN"),
        ("network=Net().double()", None),
        ("network=Net().half()", None),
    ],
)
def test_what_is_no_teacher_is_refused_at_the_start(changed, words, write, capsys):
    name = write(GOOD + f"\ndef other():\n    return teacher({changed})\n", "other")
    assert call("distill", "--teacher", name, "--device", "cpu", "--dry-run") == (2 if words else 0)
    if words:
        assert words in last_line(capsys)


@pytest.mark.filterwarnings("ignore:64 images are too few")
def test_what_fails_in_the_middle_is_one_line_too(write, tmp_path, capsys):
    name = write(GOOD.replace("return self.conv(z)", "return self.conv(z) * {1: 1.0, 2: 1.0}[len(z)]"))
    run = ["--rounds", "1", "--batch-size", "8", "--method", "progressive", "--run", str(tmp_path / "run")]
    assert call("distill", *TINY_GIVEN, "--teacher", name, *run) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"pdfast: error: {name} failed: KeyError: 64 (") and "in forward)" in line


@pytest.mark.parametrize(
    "name, words", [("nowhere.to.be:found", "no module nowhere"), ("nothing", "there is no folder")]
)
def test_names_that_name_nothing(name, words, capsys):
    assert call("distill", "--teacher", name) == 2
    assert words in last_line(capsys)
    assert call("sample", "run", "--network-from", name) == 2
    assert "package.module:function" in last_line(capsys) or "no module" in words


class Odd(nn.Module):
    """What networks of others have: buffers, dropout, frozen and half weights, tensors that are not registered, and a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1).to(memory_format=torch.channels_last)
        self.dropout = nn.Dropout2d(0.5)
        self.register_buffer("scale", torch.tensor(2.0))
        self.beside = torch.ones(1)
        self.conv.bias.requires_grad_(False)

    def forward(self, z, phi, cond):
        shift = self.beside if phi.max().item() > 0 else -self.beside
        return self.dropout(self.conv(z)) * self.scale + shift


def own(network, **more):
    return OwnCode(
        "here:teacher", Teacher(network, **({"prediction": "v"} | more), schedule=Cosine(), image_shape=(1, 8, 8))
    )


def test_a_copy_to_train(monkeypatch):
    given = own(Odd())
    monkeypatch.setattr(own_code, "_allowed", given)
    check_network(given)
    network = config_of(given).build()
    assert network.state_dict().keys() == {"network.conv.weight", "network.conv.bias"}  # as trained and written
    assert all(p.requires_grad and p.is_contiguous() for p in network.parameters())
    assert not given.teacher.network.conv.bias.requires_grad and given.teacher.network.dropout.p == 0.5
    z, phi = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 1.0])
    assert torch.equal(network.train()(z, phi), given.teacher.network.eval()(z, phi, None))
    config = config_of(given)
    assert parameters_and_flops(config) == (10, 2 * 9 * 64) and parameters(config).of_blocks == 0
    assert activation_bytes(config) > 0


def test_weights_that_cannot_be_written(monkeypatch):
    tied = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    tied[1].weight = tied[0].weight
    with pytest.raises(UsageError, match=r"0\.weight and 1\.weight of its network are the same weights"):
        check_network(own(tied))
    with pytest.raises(UsageError, match="no parameters"):
        check_network(own(nn.Identity()))


def test_another_function_than_the_one_that_made_it(monkeypatch):
    config = config_of(own(Odd()))
    monkeypatch.setattr(own_code, "_allowed", own(Odd(), prediction="x"))
    with pytest.raises(UsageError, match="here: the network has prediction v, that of here:teacher has x"):
        config.checked("here")
    angles = own_code.angles_of("here", Flow())
    with pytest.raises(UsageError, match="is another than this was made with"):
        own_code.schedule("here:teacher", angles)


def test_a_schedule_whose_differences_are_not_its_own():
    class Wrong(Cosine):
        def delta(self, u, du):
            return 2 * super().delta(u, du)

    with pytest.raises(UsageError, match="is not phi"):
        own_code.angles_of("here:teacher", Wrong())
