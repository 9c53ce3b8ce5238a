"""Named feature spaces for distances and scores.

Each is a module in eval mode: uint8 images [n, C, H, W] -> float32 [n, num_features], without gradients. `logits` goes on
from features to its classifier's logits, float32 [n, classes]. `name` is that of the Frechet distance in it, `sha256` that
of its weights, `natural` says whether it is one for natural images. Figures are only comparable within one space, and are
called FID, KID and IS in that of the published Inception weights alone.
"""

from pathlib import Path

import torch

from pdfast.data import ImageSource
from pdfast.engine.world import World
from pdfast.evaluation import trained
from pdfast.evaluation.inception import InceptionFeatures, check_weights
from pdfast.evaluation.mobilenet import MobileNetFeatures, weights_file
from pdfast.evaluation.trained import ClassifierFeatures
from pdfast.io.errors import UsageError

FeatureSpace = ClassifierFeatures | MobileNetFeatures | InceptionFeatures


def check_feature_space(spec: str, shape: tuple[int, int, int] | None = None, *, weights: bool = True) -> None:
    """Raise a UsageError where there is no such feature space, a file of weights is missing or none of it, or it takes no
    images of shape (H, W, C); with `weights` also where those that a package carries are not installed."""
    if spec == "digits":
        if shape is not None:
            trained.check_digits((shape[2], *shape[:2]))
    elif spec == "classifier":
        pass  # any shape
    elif spec == "mobilenet":
        _check_channels("mobilenet", shape)
        if weights:
            weights_file()
    elif Path(spec).suffix in (".pth", ".pt", ".safetensors"):
        _check_channels(spec, shape)
        check_weights(Path(spec))
    else:
        raise UsageError(
            f"unknown feature space {spec!r}: choose digits, mobilenet, classifier, or give a .pth or .safetensors file of "
            "Inception weights"
        )


def _check_channels(spec: str, shape: tuple[int, int, int] | None) -> None:
    if shape is not None and shape[2] not in (1, 3):
        raise UsageError(
            f"the feature space {spec} takes images of 1 or 3 channels, not {shape[2]}: images of other channels cannot be "
            "evaluated"
        )


def load_feature_space(spec: str, *, source: ImageSource | None = None, world: World | None = None) -> FeatureSpace:
    """Return `digits`, `mobilenet`, `classifier`, which is that of the source's own labels, or that of a path to Inception weights, on
    the world's device. UsageError for anything else, or where it takes no images of the source's shape. All processes must call it."""
    world = world or World(torch.device("cpu"))
    check_feature_space(spec, source.shape if source else None)
    if spec == "digits":
        return trained.train_digits_features().to(world.device)
    if spec == "mobilenet":
        return MobileNetFeatures().to(world.device)
    if spec == "classifier":
        assert source is not None
        return trained.classifier_features(source, world).to(world.device)
    return InceptionFeatures(Path(spec)).to(world.device)
