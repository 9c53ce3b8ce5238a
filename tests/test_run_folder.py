"""What a run's folder may hold besides what a run wrote, and what the files that it wrote are."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pdfast.io.files import write_json
from tests.commands import TINY_DISTILL, TINY_RUN, call, environment, one_line, spawn
from tests.data.files import encoded


@pytest.fixture
def littered(finished_run, tmp_path):
    """A finished run with what people, desktops and editors leave in it."""
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    shutil.copytree(run / "students/0002", run / "students/0002.bak")
    shutil.copytree(run / "students/0002", run / "students/0002 (copy)")
    shutil.copytree(run / "students/0002", run / "students/2")
    (run / "students/.DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (run / "students/0008").write_text("a file")
    (run / "students/00016").mkdir()
    (run / "students/٠٠٠٤").mkdir()
    (run / "checkpoints").mkdir(exist_ok=True)
    for name in ("teacher-old", "student-0001-0000000003.bak", ".DS_Store"):
        (run / "checkpoints" / name).mkdir()
    (
        run / "checkpoints/student-0002-0000000010"
    ).mkdir()  # of a finished round: the run was killed before it deleted this
    return run


def test_what_is_no_students_folder_is_passed_over(littered, tmp_path, capsys):
    assert call("sample", str(littered), "--count", "1", "--out", str(tmp_path / "a.png"), "--device", "cpu") == 0
    assert "students/0001 ->" in capsys.readouterr().out
    assert call("sample", str(littered), "--steps", "8", "--out", str(tmp_path / "a.png"), "--device", "cpu") == 2
    assert "no student of 8 steps, but of 1, 2;" in capsys.readouterr().err
    assert call("evaluate", str(littered), "--device", "cpu", "--num-samples", "64") == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:3]] == [
        ["student", "2"],
        ["student", "1"],
    ]
    assert call("distill", *TINY_DISTILL, "--run", str(littered)) == 0
    assert "finished" in capsys.readouterr().out
    left = sorted(path.name for path in (littered / "checkpoints").iterdir())
    assert left == [".DS_Store", "student-0001-0000000003.bak", "teacher-old"]


def test_everybody_may_read_what_the_umask_lets_them(finished_run):
    umask = os.umask(0)
    os.umask(umask)
    files = [path for path in finished_run.rglob("*") if path.is_file()]
    others = {str(path): oct(path.stat().st_mode) for path in files if path.stat().st_mode & 0o777 != 0o666 & ~umask}
    assert len(files) > 15 and not others


@pytest.fixture
def copied(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "run")


def test_a_student_in_the_folder_of_another_is_refused(copied, tmp_path, capsys):
    students = copied / "students"
    os.rename(students / "0001", tmp_path / "one")
    os.rename(students / "0002", students / "0001")
    os.rename(tmp_path / "one", students / "0002")
    for command, *arguments in (
        ("sample", str(copied), "--steps", "1", "--out", str(tmp_path / "x.png")),
        ("evaluate", str(copied), "--steps", "1"),
        ("export", str(copied), str(tmp_path / "out"), "--steps", "1"),
        ("distill", *TINY_DISTILL, "--run", str(copied)),
    ):
        one_line(capsys, call(command, *arguments), 2, "students/000", "holds a student of")


@pytest.mark.parametrize("place", ["teacher/teacher", "students/0002/student"])
def test_a_finished_run_whose_weights_were_changed_is_not_called_finished(copied, place, capsys):
    weights = copied / f"{place}.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    one_line(capsys, call("distill", *TINY_DISTILL, "--run", str(copied)), 2, weights.name, "changed")
    weights.unlink()
    one_line(capsys, call("distill", *TINY_DISTILL, "--run", str(copied)), 2, weights.name, "missing")


def test_models_without_their_configuration_are_not_taken_for_others(copied, capsys):
    (copied / "config.yaml").unlink()
    one_line(capsys, call("distill", *TINY_DISTILL, "--seed", "5", "--run", str(copied)), 2, "no config.yaml")
    assert not (copied / "config.yaml").exists()


@pytest.mark.parametrize("flag", ["--run", "--data"])
def test_an_empty_place_is_not_the_folder_one_is_in(flag, capsys):
    one_line(capsys, call("distill", *TINY_DISTILL, flag, ""), 2, f"{flag} is empty")


def test_what_a_link_leads_to_is_written(tmp_path):
    link, file = tmp_path / "link", tmp_path / "file.json"
    file.write_text("before")
    link.symlink_to(file)
    write_json(link, {"after": 1})
    assert link.is_symlink() and json.loads(file.read_text()) == {"after": 1}


def test_a_full_disk_behind_the_output():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "pdfast.distill", *TINY_DISTILL, "--dry-run"]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment(), check=False)
    assert ended.returncode == 1
    assert ended.stderr.splitlines() == ["pdfast: error: the output could not be written (No space left on device)"]


def test_the_lock_ends_with_a_killed_run_and_not_with_its_loaders(tmp_path):
    """What decodes in processes of its own outlives a killed run for seconds."""
    images, run = tmp_path / "images", tmp_path / "run"
    images.mkdir()
    for i in range(64):
        (images / f"{i:02}.png").write_bytes(encoded(np.full((8, 8), 2 * i, dtype=np.uint8)))
    flags = [*TINY_RUN, "--data", str(images), "--loader", "portable", "--train.updates", "100000", "--run", str(run)]
    flags += ["--evaluation.num-samples", "8"]
    process, end = spawn("train", *flags), time.monotonic() + 60
    while not list(run.glob("checkpoints/teacher-*")) and time.monotonic() < end:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    loaders = [int(pid) for pid in children(process.pid)]
    process.kill()
    process.wait()
    process.stdout.close()
    process.stderr.close()
    with open(run / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert any(os.path.exists(f"/proc/{pid}") for pid in loaders)


def children(pid):
    return "".join(file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/children")).split()
