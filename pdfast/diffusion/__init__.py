"""The mathematics of diffusion and of Progressive Distillation: pure functions of tensors."""

from pdfast.diffusion.parameterization import (
    PREDICTIONS,
    WEIGHTINGS,
    Prediction,
    Weighting,
    check_prediction,
    check_start,
    natural_angle,
    natural_weight,
    output_coefficient,
    outputs_per_channel,
    to_v,
    to_x,
)
from pdfast.diffusion.samplers import Model, ancestral, check_cond, ddim, prediction_of, sample
from pdfast.diffusion.schedules import AlphaBars, ClippedCosine, Cosine, LinearBeta, Schedule, StartingAt, logsnr
from pdfast.diffusion.step_table import StepTable, angles, build_step_table, ddim_coefficients

__all__ = [
    "PREDICTIONS",
    "WEIGHTINGS",
    "AlphaBars",
    "ClippedCosine",
    "Cosine",
    "LinearBeta",
    "Model",
    "Prediction",
    "Schedule",
    "StartingAt",
    "StepTable",
    "Weighting",
    "ancestral",
    "angles",
    "build_step_table",
    "check_cond",
    "check_prediction",
    "check_start",
    "ddim",
    "ddim_coefficients",
    "logsnr",
    "natural_angle",
    "natural_weight",
    "output_coefficient",
    "outputs_per_channel",
    "prediction_of",
    "sample",
    "to_v",
    "to_x",
]
