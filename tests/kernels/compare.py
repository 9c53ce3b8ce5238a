"""How near a kernel must come to a float64 reference."""

import torch
from torch import Tensor

# Of the largest value, for results kept in each dtype: float32 is the accuracy of the kernels, float16 its own rounding.
RELATIVE = {torch.float32: 1e-5, torch.float16: 1e-3}


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def assert_relative(ours: Tensor, expected: Tensor, relative: float = RELATIVE[torch.float32]) -> None:
    """The largest difference, as a fraction of the largest expected value; NaN fails."""
    assert ours.shape == expected.shape
    if ours.numel():
        difference = (ours.double() - expected.double()).abs().max()
        assert difference <= relative * expected.double().abs().max(), (
            f"relative error {difference / expected.abs().max():.2e}"
        )
