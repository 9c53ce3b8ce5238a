"""Distillation of a guided teacher: its targets against float64 from the papers, and whole runs."""

import importlib.util
import io
import json
import re
import signal
import urllib.request
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pdfast import demo
from pdfast.data import load_source
from pdfast.diffusion import Cosine, build_step_table, noise, sample
from pdfast.diffusion.noise import Stream
from pdfast.engine.batch import TrainingBatch
from pdfast.engine.loop import Stage
from pdfast.engine.machine import open_machine
from pdfast.engine.world import World
from pdfast.loss import combined_target, teacher_outputs
from pdfast.methods import Denoise, Pairs, Progressive, Tract
from pdfast.networks.guided import Guided, GuidedConfig
from pdfast.pretrained.model_folder import load_model
from tests.commands import TINY_DISTILL, TINY_GIVEN, TINY_ROUNDS, TINY_RUN, call, one_line, spawn
from tests.engine.processes import run as run_processes
from tests.methods.test_methods import BATCH, Silent, killed, results, setting
from tests.networks.test_guided import CLASSES, CONFIGS, LABELS, G, N, built

CPU = torch.device("cpu")
CLASSED = ["--network.num-classes", "10", "--train.label-dropout", "0.2"]
ROUNDS = "--plan 8,4,2,1 --method tract,2:progressive,1:pairs --kept.count 32 --updates 8 --batch-size 16 --learning-rate 5e-4".split()
GUIDED = [*CLASSED, *ROUNDS, "--guidance"]
STUDENTS = ("0004", "0002", "0001")


@pytest.mark.parametrize("prediction", ["v", "x", "flow"])
def test_targets_are_those_of_the_guided_x(prediction):
    """Salimans & Ho's x-tilde after two DDIM steps with x = (1 + w) x_cond - w x_uncond (Ho & Salimans 2022), w = g - 1, in float64."""
    network = built(replace(CONFIGS["ours"], prediction=prediction))
    config = GuidedConfig(network.config, (0.0, 4.0))
    table, k = build_step_table(Cosine(), 4, prediction, "x_mse"), torch.tensor([1, 2, 3, 4, 2])
    z = torch.randn(N, 2, 8, 8)
    teacher = Guided(config, network)
    made = combined_target(*teacher_outputs(teacher, z, table, k - 1, config.condition(LABELS, G)), table, k - 1)

    def column(value):
        return value.double().view(-1, 1, 1, 1)

    def x_of(state, u, labels):
        a, s = torch.cos(torch.pi / 2 * u), torch.sin(torch.pi / 2 * u)
        says = network(state.float(), (torch.pi / 2 * u).float(), labels).double()
        if prediction == "v":
            return column(a) * state - column(s) * says
        return says if prediction == "x" else (state - column(s) * says) / column(a + s)

    def step(state, u, v):
        w = column(G) - 1
        x = (1 + w) * x_of(state, u, LABELS) - w * x_of(state, u, torch.full_like(LABELS, CLASSES))
        (a, s), (b, t) = ((torch.cos(torch.pi / 2 * n), torch.sin(torch.pi / 2 * n)) for n in (u, v))
        return column(b) * x + column(t / s) * (state - column(a) * x)

    u = k.double() / 4
    middle, end = u - 0.125, u - 0.25
    landed = step(step(z.double(), u, middle), middle, end)
    (a, s), (b, t) = ((torch.cos(torch.pi / 2 * n), torch.sin(torch.pi / 2 * n)) for n in (u, end))
    x = (landed - column(t / s) * z) / column(b - t / s * a)
    lands = {"v": (column(a) * z - x) / column(s), "x": x, "flow": (z - column(a + s) * x) / column(s) / 2**0.5}
    torch.testing.assert_close(made.double(), lands[prediction], atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def digits():
    return load_source("digits", image_size=8, channels=1, device="cpu", num_classes=10)


def guided_setting(guidance, **fields):
    config = setting(guidance=guidance, **fields)
    return replace(config, network=replace(config.network, num_classes=10, null_label=10))


@pytest.mark.parametrize("kind", [Progressive, Tract])
@pytest.mark.parametrize("guidance", ["2.5", "0..4"])
def test_the_first_round_alone_is_guided(kind, guidance, digits):
    """The student is told no less than its teacher, and each sample's g is a function of seed, update and place."""
    config = guided_setting(guidance)
    torch.manual_seed(0)
    weights = {name: torch.randn_like(w) * 0.2 for name, w in config.asked_network.build().state_dict().items()}
    with open_machine(config) as machine:
        method = kind.open(config, machine)
        batch = TrainingBatch(digits, machine.world, method.student.config, seed=3, batch_size=BATCH, flip=False)
        for round_index, steps in enumerate((4, 2), start=1):
            table = kind.step_table(config, steps)
            assert not method.serves(steps, table), "the teacher is to be asked otherwise"
            method.start_from(steps, table, lambda _: weights, batch)
            assert method.serves(steps, table) and isinstance(method.teacher, Guided) == (round_index == 1)
            method.begin(batch, Stage(2, steps, round_index), Silent())
            asked = []
            method._network.register_forward_hook(lambda *call, asked=asked: asked.append(call[1]))
            method.load(batch, Stage(2, steps, round_index), 0)
            _, _, cond, *_ = method.targets(batch).given
            assert method.cost.teacher_forwards == sum(len(z) for z, *_ in asked) / BATCH + (kind is Tract)
            ranged = guidance == "0..4"
            labels = cond["label"] if ranged else cond
            assert torch.equal(labels, batch._cond) and labels.max() < 10
            told = asked[0][2]["label"] if ranged else asked[0][2]
            expected = torch.cat([labels, torch.full_like(labels, 10)]) if round_index == 1 else labels
            assert torch.equal(told, expected)
            if ranged:
                g = noise.uniform(noise.key(3, Stream.GUIDANCE, round_index, 0), torch.arange(BATCH))
                torch.testing.assert_close(cond["guidance"].double(), 4 * g, atol=1e-6, rtol=0)


def test_pairs_of_a_guided_teacher(digits):
    """What the guided teacher draws, each at its own g, which the student is then told."""
    config = guided_setting("0..4", method="pairs", plan="8,2,1", rounds=2)
    torch.manual_seed(0)
    teacher = config.network.build()
    weights = {name: torch.randn_like(w) * 0.2 for name, w in config.asked_network.build().state_dict().items()}
    teacher.load_state_dict({name: w for name, w in weights.items() if not name.startswith("guidance.")})
    weights |= {name: torch.zeros_like(w) for name, w in weights.items() if name.startswith("guidance.")}
    config = replace(config, kept=replace(config.kept, count=BATCH, pair_steps=None))
    with open_machine(config) as machine:
        method = Pairs.open(config, machine)
        batch = TrainingBatch(digits, machine.world, method.student.config, seed=3, batch_size=BATCH, flip=False)
        method.start_from(2, Pairs.step_table(config, 2), lambda _: weights, batch)
        method.begin(batch, Stage(2, 2, 1), Silent())
        index = torch.arange(BATCH)
        cond = config.student_network.draw_condition(3, index)
        z = noise.normal(noise.key(3, Stream.PAIR), index, (1, 8, 8))
        whole = GuidedConfig(config.network, (0.0, 4.0))
        end = sample(Guided(whole, teacher), z, Cosine(), 8, cond=cond)
        torch.testing.assert_close(method._states.read(3 * index + 2), end, atol=1e-5, rtol=0)
        assert torch.equal(method._conditions.read(index)["guidance"], cond["guidance"])
        assert Pairs.evaluations_before(config, 2) == BATCH * 8 * 2 and Pairs.evaluations_before(config, 1) == 0
        assert method.serves(1, Pairs.step_table(config, 1)), "the pairs are drawn once"


def test_label_dropout(digits):
    """Of the teacher's samples that fraction is told no class, drawn by Philox; the loss is Algorithm 1's still."""
    config = guided_setting(None)
    network = config.network.build()
    batch = TrainingBatch(digits, World(CPU), config.network, seed=3, batch_size=512, flip=False)
    batch.load(0, 7)
    given = Denoise(network, Cosine(), "x_mse", label_dropout=0.25).targets(batch).given
    dropped = noise.uniform(noise.key(3, Stream.DROPPED, 0, 7), torch.arange(512)) < 0.25
    assert torch.equal(given[2], torch.where(dropped, 10, batch.cond)) and 0.2 < dropped.float().mean() < 0.3
    assert torch.equal(Denoise(network, Cosine(), "x_mse").targets(batch).given[2], batch.cond)


@pytest.fixture(scope="module", params=["2", "0..4"])
def guided_run(request, tmp_path_factory):
    run = tmp_path_factory.mktemp("guided") / "run"
    assert call("distill", *TINY_RUN, *GUIDED, request.param, "--run", str(run)) == 0
    return run, request.param


@pytest.mark.filterwarnings("ignore:64 images are too few")
def test_a_run_from_teacher_to_export(guided_run, tmp_path, capsys):
    run, guidance = guided_run
    ranged = guidance == "0..4"
    values = [0.0, 4.0] if ranged else [2.0]
    assert "with 1/16 of the network evaluations" in (run / "report.html").read_text(), "8 steps of two calls"
    teacher = json.loads((run / "teacher/config.json").read_text())["network"]
    student = json.loads((run / "students/0001/config.json").read_text())["network"]
    assert (teacher["kind"], teacher["guidance"], teacher["network"]["guidance"]) == ("guided", values, None)
    assert (teacher["network"]["null_label"], student["null_label"], student["guidance"]) == (10, None, values)

    def drawn(model, *flags):
        assert (
            call("sample", str(model), "--count", "20", "--out", str(tmp_path / "a.npz"), "--device", "cpu", *flags)
            == 0
        )
        return np.load(tmp_path / "a.npz")["images"]

    for model in (run, run / "teacher"):
        steps = ("--steps", "4")
        own = drawn(model, *steps)
        assert np.array_equal(own, drawn(model, *steps, "--guidance", "2")), "the middle of its range"
        if ranged:
            assert not np.array_equal(own, drawn(model, *steps, "--guidance", "4"))
        one_line(capsys, call("sample", str(model), "--guidance", "5"), 2, "--guidance 5", "has guidance of")
    for name, flags in (("own", ()), ("at", ("--guidance", "3" if ranged else "2"))):
        assert call("export", str(run), str(tmp_path / name), "--steps", "2", *flags) == 0, "and compared"
    assert f"guidance of {3 if ranged else 2} inside" in (tmp_path / "at/README.md").read_text()
    one_line(capsys, call("export", str(run / "teacher"), str(tmp_path / "t")), 2, "asked twice", "export a student")
    flags = ["--guidance", "0", "4"] if ranged else ["--guidance", "2"]
    assert (
        call("evaluate", str(run), "--steps", "2", *flags, "--json", str(tmp_path / "e.json"), "--device", "cpu") == 0
    )
    rows = json.loads((tmp_path / "e.json").read_text())["evaluation"]
    assert [row["guidance"] for row in rows] == [float(g) for g in flags[1:] for _ in range(2)]


def test_the_reference_of_an_evaluation_is_guided_as_it_is(guided_run, tmp_path):
    """At the steps that distillation starts from the teacher is its own reference, at each g."""
    run, guidance = guided_run
    flags = ["--guidance", "1", "3"] if guidance == "0..4" else ["--guidance", "2"]
    out = tmp_path / "e.json"
    assert call("evaluate", str(run), "--steps", "8", *flags, "--json", str(out), "--device", "cpu") == 0
    rows = json.loads(out.read_text())["evaluation"]
    assert len(rows) == len(flags) - 1 and all(row["mse"] == 0 and row["feature_distance"] == 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [1, 2])
def test_two_processes_take_the_same_course(shard, guided_run, tmp_path):
    run, guidance = guided_run
    flags = [*TINY_RUN, *GUIDED, guidance, "--engine.shard", str(shard)]
    run_processes(2, "-m", "pdfast.distill", *flags, "--run-dir", str(tmp_path / "two"))
    ours, theirs = (
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "two", run)
    )
    ours, theirs = ({(e["steps"], e["update"]): e["loss"] for e in log if "update" in e} for log in (ours, theirs))
    assert ours.keys() == theirs.keys() and max(abs(ours[key] - theirs[key]) for key in ours) < 1e-5


@pytest.mark.parametrize("guided_run", ["0..4", pytest.param("2", marks=pytest.mark.slow)], indirect=True)
@pytest.mark.parametrize("seed", [1, *(pytest.param(s, marks=pytest.mark.slow) for s in range(2, 6))])
def test_killed_at_random_moments(seed, guided_run, tmp_path):
    run, guidance = guided_run
    assert killed(tmp_path / "killed", [*GUIDED, guidance], seed, 2, 12 + 3 * 8) > 0
    assert results(tmp_path / "killed", STUDENTS) == results(run, STUDENTS)


def test_a_guided_teacher_and_students_are_teachers_again(guided_run, tmp_path, capsys):
    """The folder of the teacher brings its guidance; that of a student has it inside, and later rounds hand it on."""
    run, guidance = guided_run
    again = [*TINY_GIVEN, "--updates", "0", "--batch-size", "16", "--method", "progressive"]
    given = [*again, "--teacher", str(run / "teacher"), "--plan", "8,4", "--run", str(tmp_path / "a")]
    assert call("distill", *given) == 0 and call("distill", *given) == 0
    teacher, student = (load_model(tmp_path / "a" / name, CPU) for name in ("teacher", "students/0004"))
    assert isinstance(teacher.network, Guided) and teacher.config.guidance == student.config.guidance
    ours, theirs = (load_file(folder / "teacher/teacher.safetensors") for folder in (tmp_path / "a", run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    weights = load_file(tmp_path / "a/students/0004/student.safetensors")
    assert all(torch.equal(weights[name], theirs[f"network.{name}"]) for name in weights if "guidance" not in name)

    given = [*again, "--teacher", str(run / "students/0002"), "--plan", "2,1", "--run", str(tmp_path / "b")]
    assert call("distill", *given) == 0
    student = load_model(tmp_path / "b/students/0001", CPU)
    assert student.config == load_model(run / "students/0002", CPU).config
    capsys.readouterr()
    one_line(capsys, call("distill", *given, "--guidance", "1.5"), 2, "--guidance 1.5", "inside", "guided twice")
    other = [
        *again,
        "--teacher",
        str(run / "teacher"),
        "--plan",
        "8,4",
        "--guidance",
        "3",
        "--run",
        str(tmp_path / "c"),
    ]
    one_line(capsys, call("distill", *other), 2, "--guidance 3", "is guided by", "already")


def test_what_cannot_be_guided(finished_run, tmp_path, capsys):
    run = ["--run", str(tmp_path / "run")]
    own = [*TINY_DISTILL, *run]
    classes = ["--network.num-classes", "10"]
    for flags, words in (
        ([*classes, "--guidance", "2"], ("--guidance 2", "--train.label-dropout")),
        (["--guidance", "2"], ("--guidance 2", "--network.num-classes")),
        (["--train.label-dropout", "0.1"], ("--train.label-dropout 0.1", "--network.num-classes")),
        ([*CLASSED, "--guidance", "4..0"], ("4..0", "rises")),
        ([*CLASSED, "--guidance", "2..2"], ("2..2", "rises")),
        ([*CLASSED, "--guidance", "-1"], ("-1",)),
        ([*CLASSED, "--guidance", "strong"], ("strong", "is not a number, or a range such as 0..4")),
        ([*CLASSED, "--train.label-dropout", "1"], ("--train.label-dropout must be in [0, 1)",)),
    ):
        one_line(capsys, call("distill", *own, *flags), 2, *words)
    given = [*TINY_GIVEN, *TINY_ROUNDS, *run, "--teacher", str(finished_run / "teacher")]
    one_line(capsys, call("distill", *given, "--guidance", "2"), 2, "--guidance 2", "cannot be guided")
    one_line(capsys, call("sample", str(finished_run), "--guidance", "2"), 2, "--guidance 2", "knows no such label")
    one_line(capsys, call("sample", str(finished_run), "--guidance", "-2"), 2, "--guidance must be in [0, 1000]")
    assert not (tmp_path / "run").exists()


def test_the_plan_counts_the_teacher_twice(tmp_path, capsys):
    """In the round that asks it, and nowhere else."""
    flags = [*TINY_DISTILL, *CLASSED, "--run", str(tmp_path / "run"), "--dry-run", "--guidance"]
    assert call("distill", *flags, "2") == 0
    lines = capsys.readouterr().out.splitlines()
    evaluations = {n: next(line.split()[4] for line in lines if line.startswith(f"{n} step")) for n in (1, 2)}
    assert evaluations == {2: f"{10 * 16 * 5}", 1: f"{12 * 16 * 3}"}


def test_the_demo_draws_at_a_guidance(guided_run, tmp_path):
    """What sample draws at it; where the students take it as an input there is a slider of it."""
    run, guidance = guided_run
    models = demo.Models(run, 4, CPU)
    flags = ["--steps", "2", "--seed", "5", "--count", "4", "--guidance", "3" if guidance == "0..4" else "2"]
    for saved, folder in ((models.students[2], run / "students/0002"), (models.teacher, run / "teacher")):
        png, _ = models.draw(saved, 2, 5, (), float(flags[-1]))
        out = tmp_path / "a.png"
        assert call("sample", str(folder), *flags, "--out", str(out), "--device", "cpu") == 0
        assert np.array_equal(*(np.asarray(Image.open(file).convert("RGB")) for file in (io.BytesIO(png), out)))
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("no gradio: pip install 'pdfast[demo]'")
    with spawn("demo", str(run), *"--device cpu --port 0 --count 4".split()) as process:
        address = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())[0]
        page = json.loads(urllib.request.urlopen(f"{address}/config").read())
        process.send_signal(signal.SIGINT)
    sliders = [part["props"] for part in page["components"] if part["type"] == "slider"]
    assert [(s["minimum"], s["maximum"], s["value"]) for s in sliders] == ([(0, 4, 2)] if guidance == "0..4" else [])
