"""Noise levels of EDM (Karras et al. 2022), phi = atan(sigma)."""

import math

from pdfast.schedule_config import ScheduleConfig


def sigma_schedule(sigma_min: float, sigma_max: float) -> ScheduleConfig:
    """From sigma_max to sigma_min."""
    return ScheduleConfig(
        name="clipped_cosine", logsnr_min=-2 * math.log(sigma_max), logsnr_max=-2 * math.log(sigma_min)
    )


SIGMAS = 1e-6, 1e6
"""The least and the most sigma: no model has others, and float32 does not tell their angles from 0 and pi/2."""


def check_sigmas(sigma_min: float, sigma_max: float, sigma_data: float) -> None:
    """Raise a ValueError where these are no noise levels and no standard deviation of data; NaN is none."""
    least, most = SIGMAS
    if not least <= sigma_min < sigma_max <= most:
        raise ValueError(
            f"need {least:g} <= sigma_min < sigma_max <= {most:g}, got sigma_min = {sigma_min} and sigma_max = {sigma_max}"
        )
    if not least <= sigma_data <= most:
        raise ValueError(f"sigma_data must be in [{least:g}, {most:g}], got {sigma_data}")
