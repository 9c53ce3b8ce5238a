"""A method of one's own trains, resumes, plans and reports as those of the package do."""

import json
import subprocess
import sys
import time

import pytest

from pdfast.engine.log import read_log
from tests.commands import ROOT, TINY_DISTILL, environment

FLAGS = [*TINY_DISTILL, "--updates", "40", "--checkpoint-every", "8", "--log-every", "4"]


def command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "tests.methods.regression", *FLAGS, *flags]


def run(*flags: str) -> str:
    done = subprocess.run(command(*flags), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own") / "run"
    run("--run", str(folder))
    return folder


def test_it_trains_and_reports(finished):
    lines = [entry for _, entry in read_log(finished / "log.jsonl") if entry.get("phase") == "distill"]
    losses = [line["loss"] for line in lines if line["steps"] == 1]
    assert losses[-1] < 0.5 * losses[0]
    training = json.loads((finished / "students/0001/metrics.json").read_text())["training"]
    assert training["network_evaluations"] == 2 * training["images"]
    assert (
        "students/0001" in (finished / "report.html").read_text() or (finished / "report.html").stat().st_size > 10_000
    )


def test_killed_it_resumes_bit_for_bit(finished, tmp_path):
    folder = tmp_path / "run"
    process = subprocess.Popen(
        command("--run", str(folder)), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    end = time.monotonic() + 120
    while not list(folder.glob("checkpoints/student-*")) and time.monotonic() < end:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    run("--run", str(folder))
    for student in ("0002", "0001"):
        of_both = [(f / f"students/{student}/student.safetensors").read_bytes() for f in (finished, folder)]
        assert of_both[0] == of_both[1]


def test_its_plan_counts_its_own_forwards():
    plan = run("--dry-run")
    (row,) = [line.split() for line in plan.splitlines() if line.startswith("1 step ")]
    updates, images, evaluations = (int(value.replace(",", "")) for value in row[2:5])
    assert (updates, evaluations) == (40, 2 * images)
