"""How OpenMP's threads wait: a command says so before torch is loaded, a library and a user's own choice are left alone."""

import os
import subprocess
import sys

import pytest

from pdfast.io.process import WAITING, WAITING_POLICIES, let_threads_sleep
from tests.commands import environment


def without_policy():
    return {name: value for name, value in environment().items() if name not in WAITING_POLICIES}


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP is what says what it read")
def test_a_command_tells_openmp_before_it_is_loaded():
    asked = without_policy() | {"OMP_DISPLAY_ENV": "verbose"}
    done = subprocess.run([sys.executable, "-m", "pdfast.sample", "--help"], env=asked, capture_output=True, text=True)
    assert done.returncode == 0
    read = {line.split("=")[-1].strip() for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line}
    assert read == {f"'{WAITING['GOMP_SPINCOUNT']}'"}


@pytest.mark.parametrize(
    "name, value", [("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "7"), ("KMP_BLOCKTIME", "1")]
)
def test_what_the_user_has_set_stays(name, value, monkeypatch):
    for policy in WAITING_POLICIES:
        monkeypatch.delenv(policy, raising=False)
    monkeypatch.setenv(name, value)
    let_threads_sleep()
    assert {policy: os.environ[policy] for policy in WAITING_POLICIES if policy in os.environ} == {name: value}


def test_a_library_changes_nothing():
    code = "import os, pdfast; print({'GOMP_SPINCOUNT', 'OMP_WAIT_POLICY', 'KMP_BLOCKTIME'} & os.environ.keys())"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, env=without_policy(), capture_output=True, text=True).stdout == "set()\n"
