"""Progressive Distillation of diffusion models.

Beside the commands (`python -m pdfast.distill` and the rest), what another training loop needs:

    table = pdfast.build_step_table(pdfast.Cosine(), steps=4, prediction="v", weighting="truncated_snr")
    loss = pdfast.distillation_loss(student, teacher, x, table).mean()

`pdfast.adapt(unet, scheduler)` gives a UNet2DModel of diffusers the call that is asked for, `pdfast.sample(model, noise, schedule, steps)`
draws; angles come from sigma, log-SNR, discrete times and flow matching's by `pdfast.phi_from_...`. docs/diffusers.md lists all names.
"""

import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdfast.cli import stop_while_importing
from pdfast.io.errors import UsageError
from pdfast.io.installation import check_owner_of_kernels
from pdfast.io.process import let_threads_sleep
from pdfast.io.version import __version__ as __version__

if TYPE_CHECKING:
    from pdfast.diffusion import (
        AlphaBars,
        ClippedCosine,
        Cosine,
        Flow,
        Karras,
        LinearBeta,
        StartingAt,
        StepTable,
        alpha_bar_from_phi,
        ancestral,
        angles,
        build_closure_table,
        build_step_table,
        ddim,
        flow_time_from_phi,
        logsnr,
        phi_from_alpha_bar,
        phi_from_flow_time,
        phi_from_logsnr,
        phi_from_sigma,
        phi_from_time,
        sample,
        sigma_from_phi,
        time_from_phi,
        to_v,
        to_x,
    )
    from pdfast.loss import distillation_loss
    from pdfast.own_code import Teacher
    from pdfast.pretrained import adapt

__all__ = [
    "AlphaBars",
    "ClippedCosine",
    "Cosine",
    "Flow",
    "Karras",
    "LinearBeta",
    "StartingAt",
    "StepTable",
    "Teacher",
    "adapt",
    "alpha_bar_from_phi",
    "ancestral",
    "angles",
    "build_closure_table",
    "build_step_table",
    "ddim",
    "distillation_loss",
    "flow_time_from_phi",
    "logsnr",
    "phi_from_alpha_bar",
    "phi_from_flow_time",
    "phi_from_logsnr",
    "phi_from_sigma",
    "phi_from_time",
    "sample",
    "sigma_from_phi",
    "time_from_phi",
    "to_v",
    "to_x",
]

# Imported when they are used: `import pdfast` alone costs nothing.
_HOMES = dict.fromkeys(__all__, "pdfast.diffusion") | {
    "adapt": "pdfast.pretrained",
    "Teacher": "pdfast.own_code",
    "distillation_loss": "pdfast.loss",
}

# Python says "-m" here while it looks for the module that it was started with.
_is_command = sys.argv[:1] == ["-m"] and any(a == "-m" and b.startswith("pdfast.") for a, b in pairwise(sys.orig_argv))
try:
    check_owner_of_kernels(Path(__file__).parents[1])
except UsageError as error:
    if not _is_command:
        raise ImportError(str(error)) from None
    print(f"pdfast: error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
if _is_command:
    stop_while_importing()
    let_threads_sleep()


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
