"""What tests share: one thread (bit-exact wherever they run), and one finished tiny run."""

import functools
import os
import signal

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before pdfast_kernels is imported: see tests/kernels

from pdfast.evaluation import trained
from pdfast.io import interrupt
from tests.commands import TINY_DISTILL, call

torch.set_num_threads(1)
# The digits' feature space is the same on every call; commands called in this process need not train it each time.
trained.train_digits_features = functools.cache(trained.train_digits_features)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Statistics of real images are not kept among the user's."""
    os.environ["PDFAST_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def own_signals():
    """Commands called in this process install handlers; give the test runner its own back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    interrupt._stop_requested = False
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A finished tiny run: teacher, students of 2 steps and 1, report. Not to be changed."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert call("distill", *TINY_DISTILL, "--run", str(run)) == 0
    return run
