"""Progressive Distillation of diffusion models.

Beside the commands (`python -m pdfast.distill` and the rest), what another training loop needs:

    table = pdfast.build_step_table(pdfast.Cosine(), steps=4, prediction="v", weighting="truncated_snr")
    loss = pdfast.distillation_loss(student, teacher, x, table).mean()

`pdfast.adapt(unet, scheduler)` gives a UNet2DModel of diffusers the call that is asked for, `pdfast.sample` draws.
"""

import sys
from importlib import import_module
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from pdfast.cli import let_threads_sleep, stop_while_importing

if TYPE_CHECKING:
    from pdfast.diffusion import AlphaBars, ClippedCosine, Cosine, LinearBeta, StartingAt, StepTable, build_step_table
    from pdfast.loss import distillation_loss
    from pdfast.teachers import adapt

__version__ = "0.1.0"

# Imported when they are used: `import pdfast` alone costs nothing.
_HOMES = {
    "AlphaBars": "pdfast.diffusion",
    "ClippedCosine": "pdfast.diffusion",
    "Cosine": "pdfast.diffusion",
    "LinearBeta": "pdfast.diffusion",
    "StartingAt": "pdfast.diffusion",
    "StepTable": "pdfast.diffusion",
    "adapt": "pdfast.teachers",
    "build_step_table": "pdfast.diffusion",
    "distillation_loss": "pdfast.loss",
}

__all__ = [
    "AlphaBars",
    "ClippedCosine",
    "Cosine",
    "LinearBeta",
    "StartingAt",
    "StepTable",
    "adapt",
    "build_step_table",
    "distillation_loss",
]

# Python says "-m" here while it looks for the module that it was started with.
if sys.argv[:1] == ["-m"] and any(a == "-m" and b.startswith("pdfast.") for a, b in pairwise(sys.orig_argv)):
    stop_while_importing()
    let_threads_sleep()


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
