"""The shapes in the annotations of pdfast.diffusion and pdfast.loss, checked at each call while other tests run."""

import subprocess
import sys

import pytest

from tests.commands import ROOT, environment

pytest.importorskip("jaxtyping")
pytest.importorskip("beartype")

# Users never import jaxtyping: what is for type checkers alone is imported here.
CHECKED = """
import sys, typing
import jaxtyping, pdfast, pdfast_kernels, tests.diffusion.typechecker, torch
typing.TYPE_CHECKING = True
with jaxtyping.install_import_hook(["pdfast.diffusion", "pdfast.loss"], "tests.diffusion.typechecker.check"):
    import pdfast.loss
typing.TYPE_CHECKING = False
"""
TESTS = "test_golden.py test_samplers.py test_schedules.py test_noise.py test_noise_levels.py".split()


def run(code):
    command = [sys.executable, "-c", CHECKED + code]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)


@pytest.mark.slow
def test_the_mathematics_keeps_its_shapes():
    files = [*(f"tests/diffusion/{name}" for name in TESTS), "tests/test_loss.py"]
    # Of a wrong argument the checker speaks before the library does.
    skipped = "not refused and not named and not TypeError and not wrong and not what_is_no and not bad_arguments"
    done = run(
        f"import pytest; sys.exit(pytest.main([*{files}, '-q', '-p', 'no:cacheprovider', '-W', 'ignore:Module already', '-k', '{skipped}']))"
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_wrong_shape_is_seen():
    done = run("""
import torch
from pdfast.diffusion.circle import ddim_coefficients
ddim_coefficients("v", torch.ones(3), torch.ones(3))
try:
    ddim_coefficients("v", torch.ones(3), torch.ones(1))
except jaxtyping.TypeCheckError:
    sys.exit(7)
""")
    assert done.returncode == 7, done.stderr[-2000:]
