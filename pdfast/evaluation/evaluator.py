"""Evaluation of a model at a step count: images generated from fixed noise, against real images and against the first teacher's.

All processes generate and measure, and all have the result. Every model starts from the same noise and the same labels, at every
step count, so that numbers and pictures are comparable.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pdfast.config import EvaluationConfig
from pdfast.data import ImageSource, codec_of
from pdfast.diffusion import Prediction, Schedule, noise, sample
from pdfast.diffusion.noise import Stream
from pdfast.engine.device import commit, describe
from pdfast.engine.world import World
from pdfast.evaluation import seeds
from pdfast.evaluation.features import load_feature_space
from pdfast.evaluation.metrics import channel_statistics, mean_squared_distance, names_in, psnr
from pdfast.evaluation.real import RealImages
from pdfast.io.errors import RunError
from pdfast.io.text import count_steps
from pdfast.io.version import __version__
from pdfast.networks import Network

SHOWN = 16  # images kept for sample grids


def check_finite(finite: bool, steps: int) -> None:
    """Raise a RunError unless the images that were generated in that many steps are finite: as uint8, NaN is a colour like
    others."""
    if not finite:
        raise RunError(
            f"images generated in {count_steps(steps)} are not finite (NaN or infinite): the network overflows or its training "
            "diverged; nothing of them is shown or measured; try fp32 for its dtype, or another model"
        )


@dataclass(frozen=True)
class _Watched:
    """A model before each call of which something else is called."""

    model: Network
    before: Callable[[], None]

    @property
    def prediction(self) -> Prediction:
        return self.model.prediction

    def __call__(self, z: Tensor, phi: Tensor, cond: Any = None) -> Tensor:
        self.before()
        return self.model(z, phi, cond)


def draw(
    model: Network,
    schedule: Schedule,
    steps: int,
    count: int,
    world: World,
    *,
    seed: int,
    batch_size: int = 256,
    clip: bool = False,
    between: Callable[[], None] = lambda: None,
) -> Tensor:
    """`count` images by DDIM in `steps` steps: uint8 [count, C, H, W] on the CPU, the same in all processes, of which each
    draws a part. Image i depends on (seed, i) alone.

    between: called before each step. All batches are of one size, since compiled code is for one: what is too many is dropped.
    """
    images, config = [], model.config
    finite = torch.ones((), dtype=torch.bool, device=world.device)
    watched = _Watched(model, between)
    part = world.part(count).to(world.device)
    batch_size = -(-len(part) // -(-len(part) // batch_size))
    for start in range(0, len(part), batch_size):
        index = part[0] + start + torch.arange(batch_size, device=world.device)
        z = noise.normal(noise.key(seed, Stream.SAMPLE), index, config.image_shape)
        z = sample(watched, z, schedule, steps, cond=config.draw_condition(seed, index), clip=clip)
        finite &= torch.isfinite(z).all()
        images.append(codec_of(config).decode(z).cpu())
    check_finite(not world.any(not bool(finite))[0], steps)
    return world.gather(torch.cat(images)[: len(part)])[:count]


class Evaluator:
    """Generates images with models and measures them, always as many and from the same noise."""

    def __init__(
        self,
        config: EvaluationConfig,
        source: ImageSource,
        schedule: Schedule,
        *,
        seed: int,
        world: World,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        self._config, self._source, self._schedule = config, source, schedule
        self.seed, self._world, self._between = seed, world, between
        self._space = load_feature_space(config.features, source=source, world=world)
        self.names = names_in(self._space.name)
        """What `fd`, `kd` and `cs` of a row are called."""
        self._real = RealImages(source, self._space, config.num_samples, world, config.batch_size, config.reference)
        self._reference: seeds.Reference | None = None

    @property
    def feature_space(self) -> str:
        """Its name, which is that of the Frechet distance in it."""
        return self._space.name

    def real_samples(self) -> np.ndarray:
        """Return the first real images for a grid: uint8 [k, H, W, C]."""
        return self._source.take(self._real.indices[:SHOWN]).x.cpu().numpy()

    def set_reference(self, images: Tensor) -> None:
        """Set the first teacher's images, uint8 [n, C, H, W], which every model's are compared with. All processes must call it."""
        self._reference = seeds.Reference(images, self._real.features(images))

    def draw(self, model: Network, steps: int) -> tuple[Tensor, float]:
        """Return the evaluation's images, uint8 [n, C, H, W] on the CPU, and the seconds per image."""
        began = time.perf_counter()
        images = draw(
            model,
            self._schedule,
            steps,
            self._config.num_samples,
            self._world,
            seed=self.seed,
            batch_size=self._config.batch_size,
            clip=self._config.clip,
            between=self._between,
        )
        return images, (time.perf_counter() - began) / len(images)

    def measure(self, images: Tensor, steps: int, seconds: float) -> dict[str, Any]:
        """Return one row of metrics.json for images generated in that many steps. All processes must call it."""
        mean, std = channel_statistics(images)
        features = self._real.features(images)
        row = {
            "steps": steps,
            **self._real.figures(features),
            "mse": None,
            "psnr": None,
            "channel_mean": mean,
            "channel_std": std,
            **seeds.measures(images, features, self._reference),
            "seconds_per_sample": seconds,
        }
        if self._reference is not None:
            ratio = psnr(images, self._reference.images)
            row["mse"] = mean_squared_distance(images, self._reference.images)
            row["psnr"] = ratio if np.isfinite(ratio) else None
        return row

    def metrics(self, rows: list[dict[str, Any]], training: dict[str, Any] | None) -> dict[str, Any]:
        """Return the whole of a metrics.json."""
        return {
            "feature_space": self.feature_space,
            "feature_sha256": self._space.sha256,
            "names": self.names,
            "num_samples": self._config.num_samples,
            "num_real": len(self._real.indices),
            "floor": None if self._real.against_real is None else self._real.against_real["fd"],
            "real_against_real": self._real.against_real,
            "sampler": "ddim",
            "clip": self._config.clip,
            "device": describe(self._world.device),
            "processes": self._world.size,
            "versions": {"pdfast": __version__, "torch": torch.__version__},
            "commit": commit(),
            "data": {
                "name": self._source.name,
                "num_images": self._source.num_images,
                "shape": list(self._source.shape),
            },
            "real": {"channel_mean": self._real.channel_mean, "channel_std": self._real.channel_std},
            "training": training,
            "evaluation": rows,
        }


def shown(images: Tensor) -> np.ndarray:
    """Return the first images for a grid: uint8 [k, H, W, C]."""
    return images[:SHOWN].permute(0, 2, 3, 1).contiguous().numpy()
