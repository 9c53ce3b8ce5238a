"""The numbers that settings may be. Upper bounds are generous: beyond them a run would only hang, or fill the memory."""

from collections.abc import Mapping
from dataclasses import dataclass

from pdfast.io.errors import UsageError


@dataclass(frozen=True)
class Bounds:
    """An interval from `low` to `high`, with or without each of them; NaN is in none."""

    low: float
    high: float
    text: str
    """As a message says it: "must be ..."."""
    without_low: bool = False
    without_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = self.low < value if self.without_low else self.low <= value
        below = value < self.high if self.without_high else value <= self.high
        return above and below


def require(flag: str, value: float | None, bounds: Bounds) -> None:
    """Raise a UsageError where the value of a flag (None: it was not given) is out of its bounds."""
    if value is not None and value not in bounds:
        raise UsageError(f"--{flag} must be {bounds.text}, got {value}")


def whole(low: int, high: int) -> Bounds:
    return Bounds(low, high, f"from {low} to {high}")


def positive(high: float) -> Bounds:
    return Bounds(0, high, f"above 0 and at most {high:g}", without_low=True)


def between(low: float, high: float) -> Bounds:
    return Bounds(low, high, f"in [{low:g}, {high:g}]")


FRACTION = Bounds(0, 1, "in [0, 1)", without_high=True)
SEED = Bounds(0, 1 << 64, "in [0, 2^64)", without_high=True)
MOST_STEPS = 1 << 20
STEPS = whole(1, MOST_STEPS)
MOST_GUIDANCE = 1000.0
GUIDANCE = between(0, MOST_GUIDANCE)
UPDATES = whole(1, 10**9)
BATCH = whole(1, 10**6)
SAMPLES = Bounds(
    4,
    10**7,
    "at least 4 and at most 10000000 (precision and recall look for the third nearest other image, and no other metric asks "
    "for more)",
)
LEARNING_RATE = positive(1000)
CLIP = positive(1e9)
HUBER = Bounds(0, 1e6, "from 0 to 1e6")

SETTINGS: Mapping[str, Bounds] = {
    "schedule.u_start": Bounds(0, 1, "in (0, 1]", without_low=True),
    "schedule.logsnr_min": between(-100, 100),
    "schedule.logsnr_max": between(-100, 100),
    "schedule.beta_min": between(0, 1000),
    "schedule.beta_max": positive(1000),
    "train.updates": UPDATES,
    "train.batch_size": BATCH,
    "train.learning_rate": LEARNING_RATE,
    "train.warmup": whole(0, 10**9),
    "train.decay": between(0, 1),
    "train.ema": FRACTION,
    "train.weight_decay": between(0, 1000),
    "train.dropout": FRACTION,
    "train.label_dropout": FRACTION,
    "train.clip": CLIP,
    "evaluation.num_samples": SAMPLES,
    "evaluation.max_steps": whole(0, MOST_STEPS),
    "evaluation.batch_size": BATCH,
    "engine.micro_batches": BATCH,
    "engine.shard": whole(1, 10**6),
    "engine.patience": positive(1e7),
    "engine.non_finite_limit": UPDATES,
    "guard.ratio": positive(1e9),
    "guard.colour": between(0, 1),
    "guard.seeds": positive(1e9),
    "guard.diversity": between(0, 1),
    "guard.contrast": positive(1e9),
    "guard.saturation": positive(1e9),
    "max_bad": between(0, 1),
    "seed": Bounds(0, 1 << 32, "in [0, 2^32)", without_high=True),
    "checkpoint_every": UPDATES,
    "log_every": UPDATES,
    "evaluation_steps": STEPS,
    "convert_updates": UPDATES,
    "rounds": whole(1, 20),
    "start_steps": STEPS,
    "end_steps": STEPS,
    "factor": whole(2, MOST_STEPS),
    "minutes": positive(1e7),
    "tract.ema": FRACTION,
    "tract.grids": STEPS,
    "kept.count": UPDATES,
    "kept.reuse": UPDATES,
    "kept.pair_steps": STEPS,
    "kept.huber": HUBER,
    "batch_size": BATCH,
    "learning_rate": LEARNING_RATE,
    "clip": CLIP,
    "huber": HUBER,
    "ema": FRACTION,
}
"""Bounds of a run's settings, by their place in its configuration; NETWORK has those of our U-Net."""
NETWORK: Mapping[str, Bounds] = {
    "image_size": whole(1, 4096),
    "image_width": whole(1, 4096),
    "image_channels": whole(1, 1024),
    "channels": whole(4, 65536),
    "channel_mult": whole(1, 1024),
    "num_res_blocks": whole(0, 100),
    "attention_resolutions": whole(1, 4096),
    "head_dim": whole(1, 65536),
    "emb_channels": whole(1, 65536),
    "num_groups": whole(1, 65536),
    "num_classes": whole(0, 10**6),
}
"""Bounds of the fields of our U-Net's configuration."""
MOST_PARAMETERS = 10**11
