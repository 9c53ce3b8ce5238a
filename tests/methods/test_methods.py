"""Every method of distillation: its targets against float64 from its paper, and runs that are killed, spread and exported."""

import collections
import json
import math
import random
import signal
import subprocess
import time
from dataclasses import replace

import pytest
import torch

from pdfast.arguments import distill_arguments
from pdfast.config import KeptConfig, TractConfig
from pdfast.data import load_source
from pdfast.diffusion import (
    PREDICTIONS,
    Cosine,
    build_landing_table,
    ddim,
    noise,
    outputs_per_channel,
    sample,
    trajectory,
)
from pdfast.diffusion.noise import Stream
from pdfast.engine.batch import TrainingBatch
from pdfast.engine.log import RunLog
from pdfast.engine.loop import Stage
from pdfast.engine.machine import open_machine
from pdfast.methods import KeptProgressive, Pairs, Progressive, Tract
from pdfast.recipes import preset
from tests.commands import TINY_RUN, call, one_line, spawn
from tests.engine.processes import run as run_processes

BATCH = 8
STUDENTS = ("0008", "0004", "0002", "0001")
MIXED = (
    "--learning-rate 5e-4 --huber 0.05 --plan 16,8,4,2,1 --method tract,4:progressive,2:pairs,1:pairs --kept.reuse 1 --kept.count 48 --updates 14 --batch-size 16 "
    "--ema 0.9"
).split()
KEPT = "--plan 16,4,1 --method progressive --learning-rate 5e-4 --kept.reuse 3 --kept.count 40 --updates 20 --batch-size 16".split()


def point(prediction, output, phi):
    """The network's point of the circle, float64, from its outputs: both says (x, eps), of which v = cos eps - sin x."""
    if prediction == "both":
        x, eps = output.chunk(2, dim=1)
        return math.cos(phi) * eps - math.sin(phi) * x
    return output * (math.sqrt(0.5) if prediction == "flow" else 1)


def says(prediction, x, eps, phi):
    """What a network says that knows x and eps."""
    v = math.cos(phi) * eps - math.sin(phi) * x
    return {"x": x, "eps": eps, "v": v, "both": torch.cat([x, eps], 1), "flow": eps - x}[prediction]


@pytest.mark.parametrize("prediction", [p for p in PREDICTIONS if p != "eps"])  # which says nothing of x at the start
@pytest.mark.parametrize("steps", [1, 4])
def test_the_output_that_lands(prediction, steps):
    """Of any two points, from the x and eps of the circle through both: what the network has to say at the first."""
    table = build_landing_table(Cosine(), steps, prediction, "truncated_snr", dtype=torch.float64)
    assert (len(table), table.parts, table.steps) == (steps, 1, steps)
    for k in range(1, steps + 1):
        phi, psi = (0.5 * math.pi * i / steps for i in (k, k - 1))
        x, eps = torch.randn(2, 1, 1, 3, dtype=torch.float64)
        z, z_end = (math.cos(a) * x + math.sin(a) * eps for a in (phi, psi))
        made = table.target_z[k - 1] * z + table.target_output[0][k - 1, 0] * z_end
        torch.testing.assert_close(made, point(prediction, says(prediction, x, eps, phi), phi), atol=1e-13, rtol=0)
        assert table.output.shape[1] == outputs_per_channel(prediction)


@pytest.fixture(scope="module")
def digits():
    return load_source("digits", image_size=8, channels=1, device="cpu")


def setting(**fields):
    """A configuration of tiny rounds from 8 steps, by the plan's own words."""
    base = preset("digits")
    network = replace(base.network, channels=8, channel_mult=(1,), num_groups=4, head_dim=8, emb_channels=16)
    fields = {"plan": "8,4,2,1", "rounds": 3, "start_steps": 8, "end_steps": 1, "batch_size": BATCH} | fields
    return replace(base, network=network, device="cpu", seed=3, **fields)


def opened(kind, config, machine, digits, steps, before):
    """The method at the beginning of the round to so many steps; before: weights of all models."""
    method = kind.open(config, machine, table=kind.step_table(config, steps))
    batch = TrainingBatch(digits, machine.world, config.network, seed=config.seed, batch_size=BATCH, flip=False)
    method.start_from(steps, kind.step_table(config, steps), before, batch)
    return method, batch


def weights(seed):
    """Of a tiny network, none of them zero."""
    torch.manual_seed(seed)
    return {name: torch.randn_like(value) * 0.2 for name, value in setting().network.build().state_dict().items()}


class Silent(RunLog):
    def __init__(self):
        pass

    def say(self, text):
        pass


def test_pairs_are_what_the_model_draws(digits):
    """States on the way from the pool's noise, drawn independently in one go to each; each pair serves once a pass; the target
    leads from state to state."""
    config = setting(method="progressive,2:pairs,1:pairs", kept=KeptConfig(count=20, huber=0.3), huber=5.0)
    models = {8: weights(0), 4: weights(1), 2: weights(2)}
    with open_machine(config) as machine:
        method, batch = opened(Pairs, config, machine, digits, 2, models.__getitem__)
        method.begin(batch, Stage(6, 2, 2), Silent())
        network = config.network.build()
        network.load_state_dict(models[4])
        batches = 3  # 20 pairs are 24
        index = torch.arange(batches * BATCH)
        pool = noise.normal(noise.key(config.seed, Stream.PAIR), index, (1, 8, 8))
        full = Cosine().phi(torch.linspace(1, 0, 5, dtype=torch.float64))
        ends = [pool, ddim(network, pool, full[:3]), sample(network, pool, Cosine(), 4)]
        for steps in (2, 1):
            if steps == 1:
                kept = method._states
                method.start_from(1, Pairs.step_table(config, 1), models.__getitem__, batch)
                method.begin(batch, Stage(6, 1, 3), Silent())
                assert method._states is kept, "drawn once"
            seen = collections.Counter()
            for update in range(batches):
                method.load(batch, Stage(6, steps, 4 - steps), update)
                targets = method.targets(batch)
                z, phi, cond, target, coefficient, weight = targets.given
                assert cond is None and z.is_contiguous(memory_format=torch.channels_last)
                for i in range(BATCH):
                    k = int(targets.row[i])
                    states = [ends[0], ends[1], ends[2]] if steps == 2 else [ends[0], ends[2]]
                    begins = states[steps - k]
                    (pair,) = [j for j in range(len(pool)) if torch.allclose(begins[j], z[i], atol=1e-5)]
                    assert pair % BATCH == i, "a place keeps its own"
                    seen[pair] += 1
                    a, b = (0.5 * math.pi * n / steps for n in (k, k - 1))
                    lands = math.cos(a - b) * z[i] - math.sin(a - b) * target[i]  # the DDIM step of v
                    torch.testing.assert_close(lands, states[steps - k + 1][pair], atol=1e-5, rtol=0)
                squares = weight[:, None, None, None] * (method.student(z, phi, None) - target).double().square()
                robust = 2 * 0.3 * ((squares + 0.3**2).sqrt() - 0.3)
                losses = method.losses(*targets.given).double()
                torch.testing.assert_close(losses, robust.mean((1, 2, 3)), atol=0, rtol=1e-5)
            assert set(seen.values()) == {1} and len(seen) == len(pool)
        assert parameters_equal(method.student, models[2])


def test_the_first_teacher_draws_in_any_number_of_steps(digits):
    """By the sampler of second order, from its own weights."""
    config = setting(plan="8,4,2", rounds=2, end_steps=2, method="progressive,2:pairs", kept=KeptConfig(8, 1, 6))
    models = {8: weights(0), 4: weights(1)}
    with open_machine(config) as machine:
        method, batch = opened(Pairs, config, machine, digits, 2, models.__getitem__)
        method.begin(batch, Stage(6, 2, 2), Silent())
        network = config.network.build()
        network.load_state_dict(models[8])
        z = noise.normal(noise.key(config.seed, Stream.PAIR), torch.arange(8), (1, 8, 8))
        *_, end = trajectory(network, z, Cosine().phi(torch.linspace(1, 0, 7, dtype=torch.float64)), order=2)
        kept_end = method._states.read(torch.arange(2, 24, 3))
        torch.testing.assert_close(kept_end, end, atol=1e-5, rtol=0)
        assert method.evaluations_before(config, 2) == 8 * 6 and method.models(config, 2) == [4, 8]
        assert parameters_equal(method.student, models[4])


def parameters_equal(network, expected):
    return all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())


def test_kept_targets_are_those_of_the_method(digits):
    """Each is Algorithm 2's of one sample of the data, serves as often as was said, and is then made anew."""
    config = setting(kept=KeptConfig(count=16, reuse=2))
    with open_machine(config) as machine:
        method, batch = opened(KeptProgressive, config, machine, digits, 4, lambda steps: weights(1))
        plain, other = opened(Progressive, config, machine, digits, 4, lambda steps: weights(1))
        method.student.load_state_dict(weights(2))
        plain.student.load_state_dict(weights(2))
        fresh = {}
        for update in range(4):
            other.load(1, update)
            targets = plain.targets(other)
            losses = plain.losses(*targets.given).detach()
            for i in range(BATCH):
                fresh[tuple(targets.given[0][i].flatten().tolist())] = (update, i, float(losses[i]))
        served = collections.Counter()
        for update in range(8):
            method.load(batch, Stage(8, 4, 1), update)
            targets = method.targets(batch)
            losses = method.losses(*targets.given).detach()
            for i in range(BATCH):
                made, place, loss = fresh[tuple(targets.given[0][i].flatten().tolist())]
                assert place == i and made // 2 == update // 4, "two batches serve four updates"
                assert float(losses[i]) == pytest.approx(loss, rel=1e-5)
                served[made, place] += 1
        assert set(served.values()) == {2} and len(served) == 4 * BATCH
        assert method.cost.flops == 2 / 2 + 3 and Progressive.round_cost(config, 4).flops == 5


def test_tract_asks_the_average_from_where_the_teacher_ended(digits):
    """In float64 by hand (Algorithm 1 of TRACT): one DDIM step of the teacher, then the average's to the segment's end."""
    config = setting(plan="8,2", rounds=1, end_steps=2, method="tract")
    with open_machine(config) as machine:
        method, batch = opened(Tract, config, machine, digits, 2, lambda steps: weights(1))
        method.average.load_state_dict(weights(2))
        method.student.load_state_dict(weights(3))
        method.load(batch, Stage(1, 2, 1), 0)
        targets = method.targets(batch)
        z, phi, cond, *rest = targets.given
        losses = method.losses(*targets.given)
        teacher, average, student = (config.network.build().double() for _ in range(3))
        for network, seed in ((teacher, 1), (average, 2), (student, 3)):
            network.load_state_dict(weights(seed))
            network.dtype = torch.float64
        for i in range(BATCH):
            k = int(targets.row[i])
            a, b, c = (0.5 * math.pi * n / 8 for n in (k, k - 1, (k - 1) // 4 * 4))
            one = z[i : i + 1].double()

            def v_at(network, state, angle):
                with torch.no_grad():
                    return network(state.float(), torch.tensor([angle], dtype=torch.float32), None).double()

            middle = math.cos(a - b) * one - math.sin(a - b) * v_at(method.teacher, one, a)
            if b == c:
                end = middle
            else:
                end = math.cos(b - c) * middle - math.sin(b - c) * v_at(method.average, middle, b)
            target = (math.cos(a - c) * one - end) / math.sin(a - c)
            error = (v_at(method.student, one, a) - target).square().mean()
            w = math.sin(a) ** 2  # the digits' weighting is x_mse: sin^2 of an error of v
            assert float(losses[i].detach()) == pytest.approx(float(w * error), rel=1e-3, abs=1e-6)


def test_grids_share_the_updates(digits):
    config = setting(plan="8,2", rounds=1, end_steps=2, method="tract", tract=TractConfig(grids=(2, 4, 8)))
    with open_machine(config) as machine:
        method, batch = opened(Tract, config, machine, digits, 2, lambda steps: weights(1))
        rows = []
        for update in range(6):
            method.load(batch, Stage(6, 2, 1), update)
            rows.append(int(method.table.count))
            assert float(method.table.rows.phi[rows[-1] - 1]) == pytest.approx(math.pi / 2)
    assert rows == [2, 2, 4, 4, 8, 8]


def test_plans_that_cannot_be(tmp_path, capsys):
    run = ["--run", str(tmp_path / "run"), *TINY_RUN]
    for flags, words in (
        ("--plan 16,3", ("16,3", "3 cannot follow 16")),
        ("--plan 16,16", ("16 cannot follow 16",)),
        ("--plan 16", ("is not a list of step counts",)),
        ("--plan 16,4 --rounds 2", ("--plan 16,4 and --rounds", "leave --rounds out")),
        ("--factor 1 --rounds 2", ("--factor must be from 2",)),
        ("--plan 16,4 --method magic", ("magic", "progressive, tract, pairs")),
        ("--plan 16,4 --method progressive,2:pairs", ("--method", "2 steps", "4: correct")),
        ("--plan 16,4 --method tract --kept.reuse 2", ("--kept.reuse 2", "tract")),
        ("--plan 16,4,1 --method pairs --kept.pair-steps 6", ("--kept.pair-steps 6", "4 steps", "a multiple")),
        ("--plan 16,4,1 --method tract --tract.grids 8 16", ("--tract.grids", "4 steps only")),
        ("--plan 16,4 --method tract --tract.grids 10", ("--tract.grids 10", "multiple", "4")),
    ):
        one_line(capsys, call("distill", *run, *flags.split()), 2, *words)
    assert not (tmp_path / "run").exists()


def test_factor(tmp_path, capsys):
    run = ["--run", str(tmp_path / "run"), *TINY_RUN, *"--batch-size 16 --updates 4 --method progressive".split()]
    assert call("distill", *run, "--rounds", "2", "--factor", "4", "--dry-run") == 0
    plan = capsys.readouterr().out
    assert "2 rounds, 16 -> 1 steps" in plan
    (row,) = [line.split() for line in plan.splitlines() if line.startswith("4 steps")]
    assert row[4:6] == [f"{4 * 16 * 5}", f"{4 * 16 * 7}"], "m teacher steps and 3"


def results(run, students):
    return [(run / f"students/{student}/student.safetensors").read_bytes() for student in students]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A finished run whose rounds are by tract, progressive and pairs."""
    run = tmp_path_factory.mktemp("mixed") / "run"
    assert call("distill", *TINY_RUN, *MIXED, "--run", str(run)) == 0
    return run


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    run = tmp_path_factory.mktemp("kept") / "run"
    assert call("distill", *TINY_RUN, *KEPT, "--run", str(run)) == 0
    return run


def killed(run, flags, seed, kills, updates):
    """SIGKILL at random moments, then to the end; returns how often it was really killed."""
    moments, done = random.Random(seed), 0
    for _ in range(kills):
        process = spawn("distill", *TINY_RUN, *flags, "--log-every", "1", "--run", str(run))
        log = run / "log.jsonl"
        reached = (log.read_text().count("\n") if log.exists() else 0) + moments.randint(1, updates // kills)
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= reached):
            time.sleep(0.01)
        try:
            process.communicate(timeout=moments.uniform(0, 0.3))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            done += 1
    assert call("distill", *TINY_RUN, *flags, "--run", str(run)) == 0
    return done


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 5))])
def test_a_mixed_plan_resumes_bit_for_bit(seed, mixed, tmp_path):
    assert killed(tmp_path / "run", MIXED, seed, 3, 12 + 4 * 14) > 1
    assert results(tmp_path / "run", STUDENTS) == results(mixed, STUDENTS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_kept_targets_resume_bit_for_bit(seed, kept, tmp_path):
    assert killed(tmp_path / "run", KEPT, seed, 3, 12 + 2 * 20) > 1
    assert results(tmp_path / "run", ("0004", "0001")) == results(kept, ("0004", "0001"))


@pytest.mark.parametrize("shard", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_processes_take_the_same_course(shard, mixed, tmp_path):
    run = tmp_path / "run"
    run_processes(2, "-m", "pdfast.distill", *TINY_RUN, *MIXED, "--engine.shard", str(shard), "--run-dir", str(run))
    ours, theirs = (
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (run, mixed)
    )
    ours, theirs = ({(e["steps"], e["update"]): e["loss"] for e in log if "update" in e} for log in (ours, theirs))
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[key] - theirs[key]) for key in ours) < 1e-5


def test_a_learning_rate_that_is_said_counts_in_every_round(monkeypatch):
    """The preset's exceptions are to its own; what is said beside it counts."""

    def rates(*arguments):
        monkeypatch.setattr("sys.argv", ["distill", *arguments])
        config, _ = distill_arguments()
        return [config.learning_rate_to(steps) for steps in (128, 1)]

    assert rates() == [2.5e-4, 2e-3], "the preset's own"
    assert rates("--learning-rate", "2e-4") == rates("--learning-rate=2e-4") == [2e-4, 2e-4]
    assert rates("--learning-rate", "2e-4", "--learning-rate-at", "1:3e-4") == [2e-4, 3e-4]
    assert rates("--learning-rate-at", "1:3e-4") == [2.5e-4, 3e-4]


@pytest.mark.slow
def test_two_processes_keep_the_same_targets(kept, tmp_path):
    run = tmp_path / "run"
    run_processes(2, "-m", "pdfast.distill", *TINY_RUN, *KEPT, "--run-dir", str(run))
    for name in ("students/0004", "students/0001"):
        fds = [
            json.loads((folder / name / "metrics.json").read_text())["evaluation"][0]["fd"] for folder in (run, kept)
        ]
        assert fds[0] == pytest.approx(fds[1], rel=1e-2)


def test_students_of_every_method_are_exported(mixed, tmp_path):
    """The command reloads each pipeline, and compares its images, before it appears."""
    for steps in ("8", "4", "2", "1"):
        assert call("export", str(mixed), str(tmp_path / steps), "--steps", steps) == 0
        assert (tmp_path / steps / "model_index.json").exists()


def test_another_pool_is_another_run(mixed, tmp_path, capsys):
    """What the targets depend on may not change under a round."""
    code = call("distill", *TINY_RUN, *MIXED, "--kept.count", "32", "--run", str(mixed))
    one_line(capsys, code, 2, "kept.count = 48, now it is 32")
