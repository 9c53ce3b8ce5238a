"""What a run's folder may hold besides what a run wrote, and what the files that it wrote are."""

import os
import shutil

import pytest

from tests.commands import TINY_DISTILL, call


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
