"""The configuration of a noise schedule: that of our own networks, or what a teacher brought."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch

from pdfast import diffusion, own_code
from pdfast.diffusers_tables import alpha_bars
from pdfast.flags import OptionalPath, Suppress
from pdfast.io.errors import UsageError
from pdfast.io.reading import read_array

MOST_ALPHA_BARS = 1 << 16


@dataclass(frozen=True)
class ScheduleConfig:
    """How noise grows with the diffusion time u, from data at 0 to noise at 1."""

    name: Literal["cosine", "clipped_cosine", "linear_beta", "alpha_bars", "diffusers", "module"] = "cosine"
    """cosine; clipped_cosine (log-SNR within bounds, as in the paper's code); linear_beta (VP-SDE); alpha_bars (a table);
    diffusers (that of a teacher from there); module (that of a teacher made by code of your own)."""
    u_start: float = 1.0
    """Diffusion time at which sampling starts; below 1 for networks that predict eps."""
    logsnr_min: float = -20.0
    """clipped_cosine: log-SNR at u = 1."""
    logsnr_max: float = 20.0
    """clipped_cosine: log-SNR at u = 0."""
    beta_min: float = 0.1
    """linear_beta: rate at u = 0."""
    beta_max: float = 20.0
    """linear_beta: rate at u = 1."""
    alpha_bars: OptionalPath = None
    """alpha_bars: a .npy file of strictly decreasing values in [0, 1), entry i at u = (i + 1) / T."""
    diffusers: Annotated[dict[str, Any] | None, Suppress] = None
    """diffusers: of a scheduler_config.json, what its table is made from."""
    module: Annotated[str | None, Suppress] = None
    """module: package.module:function, whose schedule it is."""
    angles: Annotated[tuple[float, ...] | None, Suppress] = None
    """module: that schedule's angles at u = 0, 1/8, ..., 1, by which it is known again."""
    table: Annotated[tuple[float, ...] | None, Suppress] = None
    """alpha_bars: the values of that file, which stand in its place once it was read (see `with_table`)."""

    def with_table(self) -> "ScheduleConfig":
        """Return the schedule with the values of the file `alpha_bars` in the place of its path: a model is whole without it.
        UsageError for a file that cannot be read, and for one that another schedule does not need."""
        if self.alpha_bars is None:
            return self if self.name == "alpha_bars" else dataclasses.replace(self, table=None)
        if self.name != "alpha_bars":
            raise UsageError(
                f"--schedule.alpha-bars is for --schedule.name alpha_bars, not {self.name}: add that, or leave it out"
            )
        values = read_array(self.alpha_bars)
        if values.ndim != 1 or len(values) > MOST_ALPHA_BARS:
            raise UsageError(f"{self.alpha_bars} has shape {values.shape}: need [T] with T up to {MOST_ALPHA_BARS}")
        return dataclasses.replace(self, alpha_bars=None, table=tuple(values.astype(np.float64).tolist()))

    def build(self) -> diffusion.Schedule:
        """Return the schedule. UsageError for bad values or an unreadable table."""
        try:
            match self.name:
                case "cosine":
                    schedule: diffusion.Schedule = diffusion.Cosine()
                case "clipped_cosine":
                    schedule = diffusion.ClippedCosine(self.logsnr_min, self.logsnr_max)
                case "linear_beta":
                    schedule = diffusion.LinearBeta(self.beta_min, self.beta_max)
                case "alpha_bars":
                    table = self.with_table().table
                    if table is None:
                        raise UsageError("--schedule.name alpha_bars needs --schedule.alpha-bars FILE.npy")
                    schedule = diffusion.AlphaBars(torch.tensor(table, dtype=torch.float64))
                case "diffusers":
                    if self.diffusers is None:
                        raise UsageError("--schedule.name diffusers comes with a teacher of diffusers: say --teacher")
                    schedule = diffusion.AlphaBars(alpha_bars(self.diffusers))
                case "module":
                    if self.module is None or self.angles is None:
                        raise UsageError("--schedule.name module comes with a teacher of your own code: say --teacher")
                    schedule = own_code.schedule(self.module, self.angles)
            return diffusion.StartingAt(schedule, self.u_start) if self.u_start != 1 else schedule
        except (ValueError, OSError) as error:
            raise UsageError(f"schedule: {error}") from None
