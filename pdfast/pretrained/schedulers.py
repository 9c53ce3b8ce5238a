"""What a scheduler of diffusers says of a network: its noise schedule, its times or noise levels, its prediction."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pdfast.diffusers_tables import (
    DISCRETE,
    EDM,
    OfTheTable,
    alpha_bars,
    arguments_of,
    settings_of,
    with_reason,
)
from pdfast.diffusion import Prediction
from pdfast.io.errors import UsageError
from pdfast.io.plain import fields_of
from pdfast.io.reading import shown
from pdfast.pretrained.sigmas import check_sigmas, sigma_schedule
from pdfast.schedule_config import ScheduleConfig

DIFFUSERS_PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "sample": "x", "v_prediction": "v"}


@dataclass(frozen=True)
class _OfEDM:
    sigma_min: float
    sigma_max: float
    sigma_data: float
    prediction_type: Literal["epsilon", "v_prediction"]


def check_written_for(scheduler: Mapping[str, Any], name: Any, where: str) -> None:
    """Raise a UsageError where a configuration, in its `_class_name`, is that of a scheduler of another kind than the class
    `name`, for which it is to be read: diffusers would leave out what that does not take."""
    own = scheduler.get("_class_name")
    if own is not None and not any(own in kind and name in kind for kind in (DISCRETE, EDM)):
        raise UsageError(
            f"{where} is a {shown(name)}, its scheduler_config.json is of {with_reason(own)}: give the scheduler that the network "
            "was trained with"
        )


def read_scheduler(scheduler: Mapping[str, Any], where: str) -> tuple[ScheduleConfig, dict[str, Any], Prediction]:
    """Read a scheduler's configuration, whose `_class_name` is the class that it is for: the schedule; the settings that the
    network needs; and what the adapted network predicts. UsageError for what is not read."""
    name = scheduler.get("_class_name")
    if name in EDM:
        kept = read_edm_scheduler(scheduler, where)
        return sigma_schedule(kept["sigma_min"], kept["sigma_max"]), kept, "v"
    if name not in DISCRETE:
        raise UsageError(f"{where} is a {with_reason(name)}: choose one of {', '.join((*DISCRETE, *EDM))}")
    said = scheduler.get("prediction_type", "epsilon")
    if not isinstance(said, str) or said not in DIFFUSERS_PREDICTIONS:
        raise UsageError(f"{where} has prediction_type {shown(said)}: need one of {', '.join(DIFFUSERS_PREDICTIONS)}")
    if scheduler.get("use_flow_sigmas") and "use_flow_sigmas" in arguments_of(name):
        raise UsageError(f"{where} has use_flow_sigmas: only variance-preserving schedules are read")
    alpha_bars(scheduler, where)
    kept = {"_class_name": name} | settings_of(OfTheTable, scheduler, where)
    return ScheduleConfig(name="diffusers", diffusers=kept), kept, DIFFUSERS_PREDICTIONS[said]


def read_edm_scheduler(scheduler: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the settings of a scheduler of EDM that the network needs. UsageError where they make no sense."""
    name = scheduler["_class_name"]
    own = {key: parameter.default for key, parameter in arguments_of(name).items()}  # for what is not said
    given = {key: scheduler.get(key, own[key]) for key in _OfEDM.__annotations__}
    kept = fields_of(_OfEDM, given, given, where)
    try:
        check_sigmas(kept["sigma_min"], kept["sigma_max"], kept["sigma_data"])
    except ValueError as error:
        raise UsageError(f"{where} has no schedule that can be read: {error}") from None
    return {"_class_name": name} | kept
