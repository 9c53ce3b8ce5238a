"""The real images that generated ones are compared with, as a feature space sees them; kept on disk, to be computed once."""

import functools
import hashlib
import json
import warnings
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from pdfast.config import Reference
from pdfast.data import ImageSource
from pdfast.data.source import of_tensors
from pdfast.engine.world import World
from pdfast.evaluation.cache import cache_folder, keep
from pdfast.evaluation.metrics import Comparison, Figures, channel_statistics, features_of, split_real
from pdfast.io.names import utf8_path

FORMAT = 3  # of what is kept; another one where features, figures or the split come to mean something else
ENOUGH = 10000  # natural images; what fewer give depends on n more than on the model


class RealImages:
    """Images of a data set that others are compared with: n, or all, as `reference` says; their features and colours, and how
    n others compare with them.

    They are kept in `cache_folder` for the pixels of these images, feature space and sort of device, and read again from there
    instead of being computed. A damaged file there is replaced, with a warning.
    """

    def __init__(
        self,
        source: ImageSource,
        space: Any,
        n: int,
        world: World,
        batch_size: int = 256,
        reference: Reference = "half",
    ) -> None:
        """n: how many images there are to be compared. All processes must call it. UsageError where there are fewer than 2 n
        images to halve, or n is below 4. Warns, in the first process, where n is small for the space."""
        self.indices, held_out = split_real(source.num_images, n, seed=0, reference=reference)
        """Which they are, int64."""
        self._space, self._world, self._batch_size = space, world, batch_size
        if world.is_rank0:
            _warn_of_few(n, space)
        parts = [part for part in (self.indices, held_out) if len(part)]
        images = functools.cache(lambda: [source.take(part).x for part in parts])

        kept: Any = None  # in the first process alone

        def read() -> str | None:
            nonlocal kept
            kept = _Kept(
                {
                    "format": FORMAT,
                    "images": [of_tensors(part).everything for part in images()],
                    "reference": reference,
                    "space": space.name,
                    "weights": space.sha256,
                    "device": world.device.type,
                }
            )
            return kept.read()

        text: Any = world.run_on_rank0(read)
        if known := text is not None:
            features: Any = kept and kept.features
        else:
            real = [part.permute(0, 3, 1, 2) for part in images()]
            features = features_of(space, real[0], world, batch_size)
            mean, std = channel_statistics(real[0])
        # The first process alone compares, and tells the others.
        self._comparison: Any = Comparison(space, features, world.device) if world.is_rank0 else None
        if not known:
            against_real = self.figures(self.features(real[1])) if len(held_out) else None
            text = json.dumps({"against_real": against_real, "channel_mean": mean, "channel_std": std})
            if world.is_rank0:
                kept.write(features, text)
        facts = json.loads(text)
        self.against_real: Figures | None = facts["against_real"]
        """The figures of n other real images; None where all are compared with."""
        self.channel_mean: list[float] = facts["channel_mean"]
        self.channel_std: list[float] = facts["channel_std"]

    def features(self, images: Tensor) -> Tensor:
        """Return features, float32 [m, d] on the CPU, of uint8 images [m, C, H, W], the same in all processes, which all must call it
        and all have the result."""
        return features_of(self._space, images, self._world, self._batch_size)

    def figures(self, features: Tensor) -> Figures:
        """Return the figures of images with such features; all processes must call it and all have the result."""
        return json.loads(self._world.run_on_rank0(lambda: json.dumps(self._comparison.figures(features))))


def _warn_of_few(n: int, space: Any) -> None:
    if n <= space.num_features:
        warnings.warn(
            f"{n} images are too few for the {space.num_features} features of {space.name}: their covariance is singular, "
            "take the distance as a trend",
            stacklevel=3,
        )
    elif space.natural and n < ENOUGH:
        warnings.warn(
            f"{n} images are few for {space.name}: below {ENOUGH} a small number alone makes the distance larger, so compare it "
            "with those of as many images only",
            stacklevel=3,
        )


class _Kept:
    """A file with the features of real images and a line of facts about them, for one `key`."""

    def __init__(self, key: dict[str, Any]) -> None:
        self._key = json.dumps(key)
        self.features: Tensor | None = None
        """float32 [n, num_features], once they are read."""
        name = hashlib.sha256(self._key.encode()).hexdigest()[:24]
        self._path = cache_folder() / f"real-{name}.safetensors"

    def _checksum(self, features: Tensor, facts: str) -> str:
        digest = hashlib.sha256(f"{self._key}\n{facts}\n".encode())
        digest.update(features.contiguous().numpy().data)
        return digest.hexdigest()

    def read(self) -> str | None:
        """Return the facts, None where there is no such file or it is damaged; then a warning says so."""
        try:
            if not self._path.exists():
                return None
            with utf8_path(self._path) as named, safe_open(named, framework="pt") as file:
                features, metadata = file.get_tensor("features"), file.metadata()
            whole = metadata["sha256"] == self._checksum(features, metadata["facts"])
        except Exception:  # the reader raises many kinds
            whole = False
        if not whole:
            warnings.warn(f"{self._path} is damaged or not readable: its features are computed again", stacklevel=2)
            return None
        self.features = features
        return metadata["facts"]

    def write(self, features: Tensor, facts: str) -> None:
        """Where that fails a warning says so: nothing is lost but time."""
        metadata = {"key": self._key, "facts": facts, "sha256": self._checksum(features, facts)}
        content = save({"features": features.contiguous()}, metadata)
        keep(self._path, content, "statistics of the real images")
