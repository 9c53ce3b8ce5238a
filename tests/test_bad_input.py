"""A person's mistake is one line that says what and what to do, exit code 2 (1 for a failure in the middle), nothing lost."""

import fcntl
import functools
import json
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pdfast.engine.checkpoint import Checkpoints
from pdfast.engine.world import World
from pdfast.io.errors import UsageError
from pdfast.io.files import sha256
from pdfast.methods import Progressive
from pdfast.rounds import parse_updates, resolve_steps
from tests.commands import (
    TINY_DISTILL,
    TINY_GIVEN,
    TINY_ROUNDS,
    TINY_RUN,
    call,
    environment,
    one_line,
    rewrite_config,
    spawn,
)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--data", "nowhere.npz"], ["nowhere.npz"]),
        (["--preset", "cifar11"], ["unknown preset 'cifar11'", "cifar10-fast"]),
        (["--rounds", "3", "--start-steps", "12"], ["rounds = 3 does not lead from 12"]),
        (["--rounds", "3", "--start-steps", "16", "--end-steps", "4"], ["rounds = 3 does not lead from 16 to 4"]),
        (["--start-steps", "24", "--end-steps", "1"], ["does not lead from 24"]),
        (["--rounds", "0"], ["--rounds must be at least 1"]),
        (["--rounds", "1", "--start-steps", "3"], ["rounds = 1 does not lead from 3 to 1"]),
        (["--updates", "many"], ["'many'", "50000,2:100000"]),
        (["--rounds", "2", "--updates", "10,1:5,1:6"], ["--updates names 1 steps twice"]),
        (["--rounds", "2", "--updates", "6,7:3"], ["a round to 7 steps", "lead to 2, 1"]),
        (["--learning-rate", "-1"], ["--learning-rate must be above 0"]),
        (["--ema", "1"], ["--ema must be in [0, 1)"]),
        (["--seed", "-1"], ["--seed must be in"]),
        (["--network.prediction", "eps"], ["eps-prediction is singular", "u-start"]),
        (["--network.num-groups", "3"], ["num_groups = 3"]),
        (["--network.image-size", "9", "--network.channel-mult", "1", "1"], ["image_size 9"]),
        (["--network.image-size", "16"], ["digits", "(8, 8, 1)", "(16, 16, 1)"]),
        (["--network.num-classes", "4"], ["4 classes", "--network.num-classes 10"]),
        (["--evaluation.num-samples", "2000"], ["--evaluation.num-samples", "898"]),
        (["--evaluation.features", "vgg"], ["vgg", "mobilenet"]),
        (["--schedule.name", "alpha_bars"], ["--schedule.alpha-bars FILE.npy"]),
        (["--schedule.u-start", "2"], ["--schedule.u-start must be in (0, 1]"]),
        (["--device", "tpu9"], ["unknown device 'tpu9'"]),
        (["--device", "cuda:77"], ["GPUs"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
    ],
)
def test_flags(flags, words, tmp_path, capsys):
    arguments = [*TINY_RUN, "--updates", "2", "--batch-size", "4", "--run", str(tmp_path / "run")]
    one_line(capsys, call("distill", *arguments, *flags), 2, *words)


@pytest.mark.parametrize(
    "command, flags, words",
    [
        ("distill", ["--roundz", "3"], ["Unrecognized options: --roundz", "--rounds", "--help"]),
        ("distill", ["--rounds", "three"], ["--rounds", "three"]),
        ("train", ["--network.prediction", "y"], ["--network.prediction", "'y'", "both"]),
        ("train", ["--evaluation-steps", "16", "4", "16"], ["--evaluation-steps names 16 steps twice"]),
        ("evaluate", ["nowhere", "--steps", "4", "2", "4"], ["--steps names 4 steps twice"]),
        ("sample", [], ["PATH"]),
    ],
)
def test_flags_that_do_not_parse(command, flags, words, capsys):
    one_line(capsys, call(command, *flags), 2, *words)


@pytest.mark.parametrize(
    "text, words",
    [
        ("preset: digits\nlerning_rate: 1.0\n", ["unknown field 'lerning_rate'"]),
        ("preset: digits\nbatch_size: lots\n", ["batch_size", "'lots'"]),
        ("preset: digits\nnetwork: {image_size: 8}\n", ["network", "'image_channels' is missing"]),
        ("just text", ["not a configuration"]),
        ("a: [", ["cannot read the configuration"]),
    ],
)
def test_a_bad_configuration_file(text, words, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(text)
    one_line(capsys, call("distill", "--config", str(tmp_path / "c.yaml"), "--run", str(tmp_path / "run")), 2, *words)


@pytest.mark.parametrize(
    "flags, field",
    [
        (["--seed", "5"], "seed"),
        (["--learning-rate", "0.1"], "learning_rate"),
        (["--train.updates", "13"], "train.updates"),
    ],
)
def test_a_changed_configuration_is_refused(flags, field, finished_run, capsys):
    code = call("distill", *TINY_DISTILL, "--run", str(finished_run), *flags)
    one_line(capsys, code, 2, f"was begun with {field} =", "--run")


def test_a_teacher_of_another_shape(finished_run, tmp_path, capsys):
    np.save(tmp_path / "rgb.npy", np.zeros((200, 8, 8, 3), np.uint8))
    flags = ["--data", str(tmp_path / "rgb.npy"), "--run", str(tmp_path / "run")]
    code = call("distill", *TINY_GIVEN, *TINY_ROUNDS, "--teacher", str(finished_run / "teacher"), *flags)
    one_line(capsys, code, 2, "(8, 8, 3)", "(8, 8, 1)", "or train a network of theirs")


def test_a_student_as_teacher_starts_at_its_own_steps(finished_run, tmp_path, capsys):
    code = call(
        "distill",
        *TINY_GIVEN,
        *TINY_ROUNDS,
        "--teacher",
        str(finished_run / "students/0002"),
        "--run",
        str(tmp_path / "run"),
    )
    one_line(capsys, code, 2, "--start-steps 2")


@pytest.mark.parametrize("damage", ["truncated", "tampered", "missing", "foreign"])
def test_a_damaged_teacher(damage, finished_run, tmp_path, capsys):
    teacher = tmp_path / "teacher"
    shutil.copytree(finished_run / "teacher", teacher)
    weights = teacher / "teacher.safetensors"
    content = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(content[:100])
    elif damage == "tampered":
        weights.write_bytes(content[:-1] + b"\x00" if content[-1] else content[:-1] + b"\x01")
    elif damage == "missing":
        weights.unlink()
    else:
        (teacher / "config.json").write_text('{"format": "pdfast-0"}')
    code = call("distill", *TINY_GIVEN, *TINY_ROUNDS, "--teacher", str(teacher), "--run", str(tmp_path / "run"))
    one_line(capsys, code, 2, str(teacher))


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("nowhere", None, ["there is no folder"]),
        ("images/0.png", "", ["is a file: give the folder"]),
        ("images", "0.png", ["holds no model", "students/0004"]),
        ("unet", "config.json", ["a part of a diffusers pipeline", "give the folder above"]),
    ],
)
def test_what_is_no_teacher(name, content, words, tmp_path, capsys):
    folder = tmp_path / name
    if content == "":
        folder.parent.mkdir()
        folder.touch()
    elif content:
        folder.mkdir()
        (folder / content).write_text('{"_class_name": "UNet2DModel"}')
    one_line(capsys, call("distill", *TINY_GIVEN, "--teacher", str(folder)), 2, str(folder), *words)


@pytest.mark.parametrize("flag", ["--network.channels", "--network.num_classes", "--schedule.name", "--train.updates"])
def test_flags_that_would_do_nothing_beside_a_teacher(flag, finished_run, tmp_path, capsys):
    value = "linear_beta" if flag == "--schedule.name" else "16"
    given = ["--teacher", str(finished_run / "teacher"), f"{flag}={value}", "--run", str(tmp_path / "run")]
    one_line(capsys, call("distill", *TINY_GIVEN, *TINY_ROUNDS, *given), 2, flag.replace("_", "-"), "leave it out")


def test_a_teacher_that_was_changed_in_its_folder(finished_run, tmp_path, capsys):
    """Whose copy the run has begun with."""
    teacher, run = tmp_path / "teacher", tmp_path / "run"
    shutil.copytree(finished_run / "students/0002", teacher)
    command = [*TINY_GIVEN, "--teacher", str(teacher), "--start-steps", "2", "--updates", "2", "--run", str(run)]
    assert call("distill", *command) == 0
    weights = load_file(teacher / "student.safetensors")
    save_file({name: 2 * weight for name, weight in weights.items()}, teacher / "student.safetensors")
    rewrite_config(teacher, sha256=sha256(teacher / "student.safetensors"))
    capsys.readouterr()
    one_line(capsys, call("distill", *command), 2, f"was begun with another teacher than {teacher}: give")


def test_classes_of_a_given_teacher(tmp_path, capsys):
    run = tmp_path / "run"
    assert call("train", *TINY_RUN, "--network.num-classes", "10", "--evaluation-steps", "1", "--run", str(run)) == 0
    np.savez(tmp_path / "more.npz", images=np.zeros((200, 8, 8, 1), np.uint8), labels=np.arange(200) % 11)
    flags = ["--teacher", str(run / "teacher"), "--data", str(tmp_path / "more.npz"), "--run", str(tmp_path / "r")]
    capsys.readouterr()
    one_line(
        capsys, call("distill", *TINY_GIVEN, *TINY_ROUNDS, *flags), 2, "the label 10", "10 classes, 0 to 9: give images"
    )


def test_changed_data_are_refused(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (200, 8, 8), dtype=np.uint8)
    flags = [*TINY_DISTILL, "--rounds", "1", "--data", str(tmp_path / "images.npy"), "--run", str(tmp_path / "run")]
    np.save(tmp_path / "images.npy", images)
    assert call("distill", *flags) == 0
    capsys.readouterr()
    np.save(tmp_path / "images.npy", images + 1)
    one_line(capsys, call("distill", *flags), 2, "was begun with other images than those of", "images.npy: give")


def test_two_processes_in_one_run(finished_run, capsys):
    with open(finished_run / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code = call("distill", *TINY_DISTILL, "--run", str(finished_run))
    one_line(capsys, code, 2, "another process is working in")


def test_a_loss_that_is_not_finite(tmp_path, capsys, monkeypatch):
    """Ten in a row end the run; the weights never see one, and what was saved before stays."""
    original, calls = Progressive.gradient, []

    def poisoned(method, *rest):
        losses, targets = original(method, *rest)
        calls.append(targets.row)
        if len(calls) > 4:
            for parameter in method.student.parameters():
                parameter.grad.mul_(float("nan"))
            losses[3] = float("inf")
        return losses, targets

    monkeypatch.setattr(Progressive, "gradient", poisoned)
    run = tmp_path / "run"
    code = call("distill", *TINY_DISTILL, "--updates", "20", "--run", str(run), "--engine.non-finite-limit", "8")
    step = f"step index {calls[-1][3]}"
    one_line(capsys, code, 1, "the round to 2 steps", "not finite in 8 updates in a row", "up to update 11", step)
    saved = Checkpoints(run, "student-0002", World(torch.device("cpu"))).latest()
    assert saved.update == 9 and all(bool(torch.isfinite(t).all()) for t in saved.tensors.values())
    assert int(saved.tensors["steps"]) == 4 and saved.tensors["skipped"].tolist() == [5, 5]
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in logged if line.get("steps") == 2] == [0, 0, 2, 4, 6, 8]


@pytest.mark.parametrize(
    "given, expected",
    [
        ((8, None, None), (8, 256, 1)),
        ((4, None, None), (4, 16, 1)),
        ((None, 64, None), (6, 64, 1)),
        ((None, 64, 4), (4, 64, 4)),
        ((2, None, 8), (2, 32, 8)),
        ((3, 64, None), (3, 64, 8)),
        ((None, None, None), (13, 8192, 1)),
        ((None, None, 4), (13, 32768, 4)),
        ((3, 8, 1), (3, 8, 1)),
    ],
)
def test_any_two_of_rounds_start_and_end_fix_the_third(given, expected):
    assert resolve_steps(given, (13, None, None)) == expected


def test_updates_by_step_count():
    assert parse_updates("500") == (500, {})
    assert parse_updates("500,2:900,1:1000") == (500, {2: 900, 1: 1000})
    for bad in ("", "a", "500,", "2:900", "500;2:900", "-5"):
        with pytest.raises(UsageError, match=re.escape(repr(bad))):
            parse_updates(bad)


def test_what_cannot_be_judged_is_refused_before_anything_is_done(tmp_path, capsys):
    """Too few images, or of another shape than the features take: no folder is left that would refuse the advice."""
    few, run = tmp_path / "few.npz", tmp_path / "run"
    np.savez(few, images=np.zeros((100, 8, 8, 1), np.uint8))
    command = [*TINY_RUN, "--data", str(few), "--run", str(run)]
    for name in ("train", "distill"):
        one_line(capsys, call(name, *command), 2, "--evaluation.num-samples to at most 50")
        assert not run.exists()
    for count, advice in (
        (7, "give more images, or do without the floor, --evaluation.reference all"),
        (3, "give more"),
    ):
        np.savez(few, images=np.zeros((count, 8, 8, 1), np.uint8))
        one_line(capsys, call("distill", *command), 2, f"{count}", f": {advice}")
    colour = tmp_path / "colour.npz"
    np.savez(colour, images=np.zeros((200, 8, 8, 3), np.uint8))
    command = [*TINY_RUN, "--data", str(colour), "--network.image-channels", "3", "--run", str(run)]
    one_line(capsys, call("distill", *command), 2, "set --evaluation.features to mobilenet")
    assert not run.exists()


def test_evaluate_names_its_own_flags_before_it_makes_features(finished_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("pdfast.evaluate.Evaluator", None)
    teacher = str(finished_run / "teacher")
    one_line(
        capsys, call("evaluate", teacher, "--num-samples", "5000"), 2, ": set --num-samples to", ", --reference all"
    )
    np.save(tmp_path / "colour.npy", np.zeros((200, 8, 8, 3), np.uint8))
    flags = ["--data", str(tmp_path / "colour.npy")]
    one_line(capsys, call("evaluate", teacher, *flags), 2, "give --data of that size, or train a network of theirs")


def test_digits_for_a_teacher_of_another_shape(tmp_path, capsys):
    """The data are wrong, and not the features; known without reading anything."""
    run = ["--network.image-size", "16", "--run", str(tmp_path / "run")]
    for more in ([], ["--dry-run"]):
        code = call("distill", *TINY_RUN, *run, *more)
        one_line(capsys, code, 2, "digits has images of", "(8, 8, 1), the network takes (16, 16, 1): give --data")


def test_a_student_that_is_not_there_is_not_replaced_by_its_teacher(finished_run, tmp_path, capsys):
    for command in (["sample", "--out", str(tmp_path / "a.png")], ["export", str(tmp_path / "out")]):
        code = call(command[0], str(finished_run), *command[1:], "--steps", "3")
        one_line(capsys, code, 2, "no student of 3 steps, but of 1, 2", "teacher")


def test_ctrl_c_is_left_to_programs_that_import_it(tmp_path):
    """Even to a package's module that is run with -m."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/__init__.py").write_text("import pdfast\n")
    (tmp_path / "theirs/main.py").write_text(
        "import signal, sys\nsys.exit(signal.getsignal(signal.SIGINT) is not signal.default_int_handler)\n"
    )
    path = {"PYTHONPATH": f"{tmp_path}:{environment()['PYTHONPATH']}"}
    heed = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    for arguments in (["-m", "theirs.main"], [str(tmp_path / "theirs/main.py")]):
        command = [sys.executable, *arguments]
        assert subprocess.run(command, env=environment() | path, check=False, preexec_fn=heed).returncode == 0


@pytest.mark.parametrize("command", ["distill", "demo", "data.prepare"])
def test_ctrl_c_while_libraries_are_imported(command, tmp_path):
    """One that swallows it, as some do: the command ends all the same, in one line."""
    (tmp_path / "numpy").mkdir()
    swallow = "import time\nprint('importing', flush=True)\nwhile True:\n    try: time.sleep(60)\n    except BaseException: pass"
    (tmp_path / "numpy/__init__.py").write_text(swallow)
    path = f"{tmp_path}:{environment()['PYTHONPATH']}"
    heed = functools.partial(
        signal.signal, signal.SIGINT, signal.default_int_handler
    )  # these tests may run in the background
    process = spawn(command, path=path, preexec_fn=heed)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "pdfast: stopped before there was anything to save\n")
    assert process.returncode == 130
