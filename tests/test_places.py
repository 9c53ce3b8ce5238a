"""Places that cannot be written, files that are none, a disk that is full: one line, and nothing lost."""

import io
import json
import os
import resource
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from tests.commands import TINY_DISTILL, TINY_RUN, call, environment, one_line


@pytest.fixture(
    params=[
        "a file",
        "a name that is too long",
        "in a file",
        "a dangling link",
        "/sys/kernel",
        "/sys/kernel/new",
        "/proc/a/b",
    ]
)
def no_place(request, tmp_path):
    """Where nobody may write, nor root, which some tests run as."""
    place = tmp_path / "there"
    match request.param:
        case "a file":
            place.write_text("")
        case "a name that is too long":
            place /= "r" * 300
        case "in a file":
            place.write_text("")
            place /= "new"
        case "a dangling link":
            place.symlink_to(tmp_path / "nowhere")
        case name:
            if not os.path.ismount("/sys"):
                pytest.skip("needs a sysfs")
            return name
    return str(place)


@pytest.mark.parametrize("command", ["distill", "train"])
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_run_folder_that_cannot_be_written(command, more, no_place, monkeypatch, capsys):
    """Said before anything is read."""
    monkeypatch.setattr(f"pdfast.{command}.open_data", None)
    code = call(command, *TINY_RUN, "--run", no_place, *more)
    one_line(capsys, code, 2, f"cannot write {no_place} (", "; choose another folder with --run")


def test_what_else_cannot_be_written(no_place, finished_run, tmp_path, monkeypatch, capsys):
    """Said with the command's own flag, before anything is drawn or read."""
    model = str(finished_run / "students/0001")
    monkeypatch.setattr("pdfast.sample.draw", None)
    monkeypatch.setattr("pdfast.export.export_pipeline", None)
    monkeypatch.setattr("pdfast.evaluate.load_source", None)
    monkeypatch.setattr("pdfast.data.prepare.load_cifar10", None)
    one_line(
        capsys, call("sample", model, "--out", f"{no_place}/a.png"), 2, f"cannot write {no_place}/a.png (", "--out"
    )
    one_line(capsys, call("evaluate", model, "--json", f"{no_place}/a"), 2, f"cannot write {no_place}/a (", "--json")
    code = call("export", model, f"{no_place}/a")
    one_line(capsys, code, 2, f"cannot write {no_place}/a (", "; choose another folder to write")
    code = call("data.prepare", "cifar10", "nowhere", f"{no_place}/a.npz")
    one_line(capsys, code, 2, f"cannot write {no_place}/a.npz (", "; choose another OUT")


@pytest.mark.parametrize("kind", ["folder", "socket"])
def test_a_file_to_write_that_is_no_file(kind, finished_run, tmp_path, capsys):
    place = tmp_path / "a.png"
    with socket.socket(socket.AF_UNIX) as opened:
        place.mkdir() if kind == "folder" else opened.bind(str(place))
        for command, flag in (("sample", "--out"), ("evaluate", "--json")):
            code = call(command, str(finished_run), flag, str(place))
            one_line(capsys, code, 2, f"cannot write {place} (it is a {kind}); choose another file with {flag}")


@pytest.mark.parametrize("name", ["a.png", "a.npz", "a.json"])
def test_a_pipe_is_written_to(name, finished_run, tmp_path):
    """Which cannot seek; and stays one."""
    os.mkfifo(tmp_path / name)
    command = ["evaluate", "--json"] if name == "a.json" else ["sample", "--count", "4", "--out"]
    with ThreadPoolExecutor() as pool:
        read = pool.submit((tmp_path / name).read_bytes)
        flags = ["--steps", "1", "--device", "cpu", command[-1], str(tmp_path / name)]
        assert call(command[0], str(finished_run), *command[1:-1], *flags) == 0
        content = io.BytesIO(read.result(timeout=10))
    assert (tmp_path / name).is_fifo()
    match name:
        case "a.npz":
            assert np.load(content)["images"].shape == (4, 8, 8, 1)
        case "a.png":
            assert Image.open(content).size == (2 * 64 + 1, 2 * 64 + 1)
        case "a.json":
            assert [row["steps"] for row in json.load(content)["evaluation"]] == [1, 1]


def test_a_full_disk_in_the_middle(tmp_path):
    """Files may grow to 40 kB and no more, as on a full disk: training goes on and its end is tried again, then one line and
    exit code 1; with space it ends well."""
    run = tmp_path / "run"
    flags = [*TINY_DISTILL, "--engine.patience", "1", "--run", str(run)]
    command = [sys.executable, "-m", "pdfast.distill", *flags]

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))

    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, preexec_fn=limit)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "checkpoint at update 3 not written: the disk is full" in done.stderr
    assert "checkpoint at update 12 not written" in done.stderr and "trying again every few seconds" in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("pdfast: error: the disk is full") and "run the same command again" in line
    assert not list(run.rglob("*.tmp"))
    assert call("distill", *flags) == 0
