"""Does a model keep its teacher's seeds? Images compared one by one with the teacher's from the same noise, and as a set.

People report of distilled models the same picture for every seed, pictures that are no longer the teacher's, oversaturated and washed-out
ones. Each is a number here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SHIFTS = (1, 2, 3, 5, 8)  # an image is compared with those so many places further on, which come from other noise
LUMINANCE = (0.2126, 0.7152, 0.0722)  # of linear RGB, Rec. 709; here of the values as they are
PART = 256  # images at once

Measures = dict[str, float | None]
NAMES = (
    "feature_distance",
    "diversity",
    "diversity_ratio",
    "contrast",
    "contrast_ratio",
    "saturation",
    "saturation_ratio",
)
"""Of what `measures` returns."""


@dataclass(frozen=True)
class Reference:
    """What the first teacher draws: uint8 images [n, C, H, W] and their features, float32 [n, d]."""

    images: Tensor
    features: Tensor


def diversity(features: Tensor) -> float:
    """Return the mean Euclidean distance between features, float [n, d], of images from different noise; n at least 2."""
    features = features.double()
    shifts = [shift for shift in SHIFTS if shift % len(features)]  # around to itself, an image is no other one
    return float(torch.stack([(features - features.roll(-shift, 0)).norm(dim=1).mean() for shift in shifts]).mean())


def contrast(images: Tensor) -> float:
    """Return the standard deviation of luminance within an image, in [0, 1], the mean over uint8 images [n, C, H, W]."""
    weights = torch.tensor(LUMINANCE if images.shape[1] == 3 else [1 / images.shape[1]] * images.shape[1])
    total = sum(
        float((part.double() * weights.double()[:, None, None]).sum(1).flatten(1).std(1, correction=0).sum())
        for part in images.split(PART)
    )
    return total / len(images) / 255


def saturation(images: Tensor) -> float | None:
    """Return the mean chroma, the largest less the smallest of a pixel's three channels, in [0, 1], of uint8 images [n, 3, H, W]; None
    for images of other channels."""
    if images.shape[1] != 3:
        return None
    total = sum(int((part.amax(1).int() - part.amin(1).int()).sum()) for part in images.split(PART))
    return total / images[:, 0].numel() / 255


def measures(images: Tensor, features: Tensor, reference: Reference | None) -> Measures:
    """Return diversity, contrast and saturation of images, uint8 [n, C, H, W] with features float32 [n, d], their ratios to those of
    the reference, and `feature_distance`: how far each is from the reference's image of the same noise, in units of how far the
    reference's images of different noise are from each other. 0 is the same image, about 1 any other. None for what is not defined."""
    own: Measures = {"diversity": diversity(features), "contrast": contrast(images), "saturation": saturation(images)}
    theirs: Measures = dict.fromkeys(own)
    distance = None
    if reference is not None:
        theirs = {
            "diversity": diversity(reference.features),
            "contrast": contrast(reference.images),
            "saturation": saturation(reference.images),
        }
        apart = (features.double() - reference.features.double()).norm(dim=1).mean()
        distance = float(apart) / theirs["diversity"] if theirs["diversity"] else None
    ratios = {f"{name}_ratio": _ratio(value, theirs[name]) for name, value in own.items()}
    return {"feature_distance": distance} | own | ratios


def _ratio(value: float | None, to: float | None) -> float | None:
    return None if value is None or not to else value / to
