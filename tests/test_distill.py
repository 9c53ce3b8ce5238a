"""The main job as a user meets it, on a tiny network: what it leaves behind, and that this is what the paper says."""

import json
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pdfast.config import DistillConfig
from pdfast.engine import parallelize
from pdfast.io import interrupt
from pdfast.io.plain import structure
from pdfast.io.reading import load_yaml
from pdfast.methods import Progressive
from pdfast.pretrained.model_folder import load_model
from tests.commands import TINY_DISTILL, TINY_GIVEN, TINY_RUN, call, environment, rewrite_config, spawn
from tests.engine.processes import TORCHRUN, run


def test_what_a_run_leaves(finished_run):
    names = {p.relative_to(finished_run).as_posix() for p in finished_run.rglob("*") if p.is_file()}
    for folder, kind in [("teacher", "teacher"), ("students/0002", "student"), ("students/0001", "student")]:
        for file in (f"{kind}.safetensors", "config.json", "metrics.json", "grid.png", "samples.npy"):
            assert f"{folder}/{file}" in names
    assert {"config.yaml", "log.jsonl", "report.html"} <= names
    assert not [n for n in names if "checkpoints/" in n or n.endswith(".tmp")]
    assert any(n.startswith("tb/events") for n in names)


def test_metrics(finished_run):
    teacher = json.loads((finished_run / "teacher/metrics.json").read_text())
    assert [row["steps"] for row in teacher["evaluation"]] == [4, 2, 1]
    assert teacher["evaluation"][0]["mse"] == 0 and teacher["evaluation"][0]["psnr"] is None
    student = json.loads((finished_run / "students/0001/metrics.json").read_text())
    (row,) = student["evaluation"]
    assert row["steps"] == 1 and row["fd"] > 0 and row["mse"] > 0
    assert math.isclose(row["psnr"], 10 * math.log10(4 / row["mse"]), rel_tol=1e-9)
    assert student["training"]["updates"] == 12 and student["training"]["network_evaluations"] == 3 * 12 * 16


def test_log_has_a_line_for_every_logged_update(finished_run):
    entries = [json.loads(line) for line in (finished_run / "log.jsonl").read_text().splitlines()]
    seen = {(e["steps"], e["update"]) for e in entries if "update" in e}
    assert seen == {(s, u) for s, n in [(None, 12), (2, 10), (1, 12)] for u in range(2, n + 1, 2)}


def test_the_saved_configuration_gives_the_same_run(finished_run, tmp_path):
    plain = load_yaml(finished_run / "config.yaml")
    assert (
        "--rounds 2" in plain.pop("command")
        and len(plain.pop("images_sha256")) == len(plain.pop("images_alone_sha256")) == 64
    )
    config = structure(DistillConfig, plain, "config.yaml")
    assert (config.rounds, config.start_steps, config.end_steps) == (2, 4, 1)
    again = tmp_path / "again"
    assert call("distill", "--config", str(finished_run / "config.yaml"), "--run", str(again)) == 0
    for name in ("teacher/teacher.safetensors", "students/0001/student.safetensors"):
        assert (again / name).read_bytes() == (finished_run / name).read_bytes()


def test_students_load_without_pickle_and_are_float32(finished_run):
    weights = load_file(finished_run / "students/0001/student.safetensors")
    saved = load_model(finished_run / "students/0001", torch.device("cpu"))
    assert saved.steps == 1 and all(w.dtype == torch.float32 for w in weights.values())
    assert set(weights) == set(saved.network.state_dict())


def test_run_again_it_says_that_it_is_finished(finished_run, capsys):
    before = (finished_run / "students/0001/student.safetensors").stat().st_mtime_ns
    assert call("distill", *TINY_DISTILL, "--run", str(finished_run)) == 0
    assert "finished" in capsys.readouterr().out
    assert (finished_run / "students/0001/student.safetensors").stat().st_mtime_ns == before


def test_a_round_without_updates_is_its_teacher(finished_run, tmp_path):
    """The student starts as its teacher: with no update the weights are equal, bit for bit. The size of the batches that train a
    teacher, 128, concerns no run with a given one."""
    teacher = str(finished_run / "teacher")
    flags = [
        *TINY_GIVEN,
        "--teacher",
        teacher,
        *"--rounds 1 --updates 0 --batch-size 15 --method progressive --engine.micro-batches 3".split(),
    ]
    assert call("distill", *flags, "--run", str(tmp_path / "r")) == 0
    a = load_file(finished_run / "teacher/teacher.safetensors")
    b = load_file(tmp_path / "r/students/0001/student.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_check_before_a_round_keeps_nothing_and_needs_few_images(finished_run, tmp_path, monkeypatch):
    """Beside the CUDA graph of an update there is no memory for another one."""
    seen = []

    def watched(method, *arguments):
        def note(network, inputs, output):
            seen.append((len(inputs[0]), output.requires_grad))

        hooks = [network.register_forward_hook(note) for network in (method.student, method.teacher)]
        begin(method, *arguments)
        for hook in hooks:
            hook.remove()

    begin = Progressive.begin
    monkeypatch.setattr(Progressive, "begin", watched)
    flags = [
        "--teacher",
        str(finished_run / "teacher"),
        *"--rounds 2 --updates 1 --batch-size 32 --method progressive".split(),
    ]
    assert call("distill", *TINY_GIVEN, *flags, "--run", str(tmp_path / "r")) == 0
    assert seen == [(8, False)] * 4


def test_a_student_that_is_not_its_teacher_is_a_bug(finished_run, tmp_path, monkeypatch, capsys):
    """Asserted before the first update of each round."""
    original = parallelize.set_weights

    def broken(network, weights, world):
        original(network, weights, world)
        with torch.no_grad():
            next(network.parameters()).add_(0.1 * (not network.training))

    monkeypatch.setattr(parallelize, "set_weights", broken)
    flags = [
        *TINY_GIVEN,
        "--teacher",
        str(finished_run / "teacher"),
        "--rounds",
        "1",
        "--method",
        "progressive",
        "--run",
        str(tmp_path / "r"),
    ]
    assert call("distill", *flags) == 1
    assert "before the round to 1 step the student is not its teacher" in capsys.readouterr().err


def test_a_round_that_was_begun_from_another_teacher(finished_run, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    shutil.rmtree(run / "students/0001")
    monkeypatch.setattr(interrupt, "requested", lambda: True)  # stops after the first update
    assert call("distill", *TINY_DISTILL, "--run", str(run)) == 130
    monkeypatch.undo()
    shutil.copy(run / "teacher/teacher.safetensors", run / "students/0002/student.safetensors")
    rewrite_config(run / "students/0002", sha256=json.loads((run / "teacher/config.json").read_text())["sha256"])
    assert call("distill", *TINY_DISTILL, "--run", str(run)) == 2
    assert "was begun from another teacher than there is now" in capsys.readouterr().err


@pytest.mark.parametrize("prediction", ["flow", "both", "eps"])
def test_other_predictions(prediction, tmp_path):
    start = ["--schedule.u-start", "0.95"] if prediction == "eps" else []
    run = str(tmp_path / "run")
    assert call("distill", *TINY_DISTILL, "--network.prediction", prediction, *start, "--ema", "0.9", "--run", run) == 0
    samples = np.load(tmp_path / "run/students/0001/samples.npy")
    assert samples.shape == (16, 8, 8, 1) and samples.std() > 0


def test_conditional_and_flipped(tmp_path):
    run = str(tmp_path / "run")
    assert call("distill", *TINY_DISTILL, "--network.num-classes", "10", "--flip", "--run", run) == 0
    out = tmp_path / "drawn.npz"
    assert call("sample", run, "--classes", "3", "7", "--count", "5", "--out", str(out), "--device", "cpu") == 0
    assert np.load(out)["labels"].tolist() == [3, 7, 3, 7, 3]


def test_train_then_distill(tmp_path):
    """A teacher from pdfast.train, distilled from its folder; its student distilled further."""
    run = tmp_path / "teacher-run"
    assert call("train", *TINY_RUN, "--run", str(run), "--evaluation-steps", "4") == 0
    first = tmp_path / "first"
    distill = [*TINY_GIVEN, "--updates", "2", "--kept.count", "64"]
    given = ["--teacher", str(run / "teacher")]
    assert call("distill", *distill, *given, "--start-steps", "8", "--rounds", "1", "--run", str(first)) == 0
    assert [p.name for p in (first / "students").iterdir()] == ["0004"]
    second = tmp_path / "second"
    given = ["--teacher", str(first / "students/0004")]
    assert call("distill", *distill, *given, "--start-steps", "4", "--end-steps", "2", "--run", str(second)) == 0
    assert [p.name for p in (second / "students").iterdir()] == ["0002"]


def test_sampling_from_a_run(finished_run, tmp_path):
    """A student draws the images its metrics were taken of; the grid is a PNG; ancestral sampling is seeded."""
    out = tmp_path / "a.npz"
    assert call("sample", str(finished_run), "--count", "16", "--out", str(out), "--device", "cpu") == 0
    assert np.array_equal(np.load(out)["images"], np.load(finished_run / "students/0001/samples.npy"))
    assert call("sample", str(finished_run), "--steps", "2", "--out", str(tmp_path / "b.png"), "--device", "cpu") == 0
    assert (tmp_path / "b.png").read_bytes()[:4] == b"\x89PNG"
    drawn = []
    for batch_size in ("3", "8"):
        flags = f"--sampler ancestral --steps 6 --count 8 --batch-size {batch_size} --variance 0.5".split()
        assert call("sample", str(finished_run / "teacher"), *flags, "--out", str(out), "--device", "cpu") == 0
        drawn.append(np.load(out)["images"].astype(int))
    assert np.abs(drawn[0] - drawn[1]).max() <= 1


def test_evaluating_a_run_gives_its_numbers_again(finished_run, tmp_path, capsys):
    assert call("evaluate", str(finished_run), "--json", str(tmp_path / "m.json"), "--device", "cpu") == 0
    found = json.loads((tmp_path / "m.json").read_text())
    rows = {(r["model"], r["steps"]): r for r in found["evaluation"]}
    printed = capsys.readouterr().out
    for steps in (2, 1):
        before = json.loads((finished_run / f"students/{steps:04d}/metrics.json").read_text())
        (row,) = before["evaluation"]
        for name in ("fd", "kd", "kd_std", "cs", "cs_std", "precision", "recall"):
            assert rows["student", steps][name] == row[name], name
        assert before["real_against_real"] == found["real_against_real"]
        figures = f"{row['fd']:.4f} {row['kd']:.4g} {row['cs']:.4g} ± {row['cs_std']:.2g} {row['precision']:.4g}"
        assert f"student {steps} {figures} " in re.sub(" +", " ", printed)
    assert ("teacher, DDIM", 1) in rows
    head, last = printed.splitlines()[0], printed.splitlines()[-1]
    assert head.split()[:6] == ["steps", "FD-digits", "KD-digits", "CS-digits", "precision", "recall"]
    assert last.startswith("n = 64, ")
    assert re.search(rf"^real images +{found['floor']:.4f} ", printed, re.M)


def test_judged_next_to_all_real_images(tmp_path, capsys):
    run = tmp_path / "run"
    flags = (
        "--rounds 1 --updates 2 --method progressive --evaluation.num-samples 1000 --evaluation.reference all".split()
    )
    assert call("distill", *TINY_RUN, *flags, "--run", str(run)) == 0
    metrics = json.loads((run / "students/0001/metrics.json").read_text())
    assert (metrics["num_samples"], metrics["num_real"], metrics["floor"]) == (1000, 1797, None)
    report = (run / "report.html").read_text()
    assert "real images in that feature space" in report and "the floor" not in report and "other real" not in report
    capsys.readouterr()
    assert call("evaluate", str(run), "--steps", "1", "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert f" {metrics['evaluation'][0]['fd']:.4f} " in printed
    assert "n = 1000, next to 1797 real images" in printed and not re.search("^real images", printed, re.M)
    assert call("export", str(run), str(tmp_path / "out"), "--device", "cpu") == 0
    assert "of 1000 drawn to 1797 real images." in (tmp_path / "out/README.md").read_text()


def test_dry_run(tmp_path, capsys):
    assert call("distill", *TINY_DISTILL, "--dry-run", "--run", str(tmp_path / "none")) == 0
    text = capsys.readouterr().out
    assert "2 rounds, 4 -> 1 steps" in text and re.search(r"2 steps +10 +160 +480", text)
    assert "parameters" in text and "GFLOP" in text and "memory" in text and "expected time" in text
    assert not (tmp_path / "none").exists()


def test_help_is_readable(capsys):
    for command in ("train", "distill", "sample", "evaluate", "export", "demo"):
        assert call(command, "--help") == 0
        text = capsys.readouterr().out
        assert "--device" in text and "type: ignore" not in text


def test_a_reader_that_goes_away():
    with spawn("distill", "--help") as process:
        process.stdout.close()  # as `| head` does
        assert process.stderr.read() == "" and process.wait(timeout=60) == 1


def test_import_is_light():
    code = "import sys, pdfast; sys.exit(any(m in sys.modules for m in ('torch', 'matplotlib', 'torchmetrics', 'tensorboard')))"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 0


def evaluations(folder):
    """Step count -> Frechet distance."""
    return {row["steps"]: row["fd"] for row in json.loads((folder / "metrics.json").read_text())["evaluation"]}


@pytest.mark.slow
def test_the_literal_torchrun_command(tmp_path):
    """`torchrun -m pdfast.distill --rounds 8`, with no other flag, does the built-in job, and as well as the README says."""
    process = subprocess.Popen(
        [TORCHRUN, "-m", "pdfast.distill", "--rounds", "8"],
        cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        text, _ = process.communicate(timeout=2400)
    finally:
        process.kill()
    assert process.returncode == 0, text[-2000:]
    run = tmp_path / "runs/digits"
    assert (run / "report.html").exists()
    students = {folder.name: evaluations(folder) for folder in sorted((run / "students").iterdir())}
    assert list(students) == [f"{2**r:04d}" for r in range(8)]
    ddim = evaluations(run / "teacher")
    for student in students.values():
        ((steps, fd),) = student.items()
        assert fd <= ddim[steps], f"{steps} steps"
        assert steps > 2 or 20 * fd <= ddim[steps], f"{steps} steps"
    assert students["0001"][1] <= 1.8 * ddim[256]


def test_torchrun_with_one_process(finished_run, tmp_path):
    """Says what the command alone says, and ends with the same bytes."""
    run(1, "-m", "pdfast.distill", *TINY_DISTILL, "--run-dir", str(tmp_path / "r"))
    for name in ("teacher/teacher.safetensors", "students/0001/student.safetensors"):
        assert (tmp_path / "r" / name).read_bytes() == (finished_run / name).read_bytes()
