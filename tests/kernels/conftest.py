"""Kernels in Triton's interpreter. It runs on NumPy: values are as on a GPU for fp32 and fp16, bf16 arithmetic is not."""

import pytest
import torch

from pdfast_kernels import use


@pytest.fixture
def triton_kernels():
    """The Triton path on CPU tensors, with NaN in all memory that is not written."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU, the kernels are not interpreted")
    with use("triton"), pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like"):
            patch.setattr(torch, name, _poisoned(getattr(torch, name)))
        yield


def _poisoned(allocate):
    def poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() and tensor.device.type == "cpu" else tensor

    return poisoned


@pytest.fixture
def draw():
    """draw(*shape, dtype=torch.float32): standard normals, another tensor on every call, the same in every run."""
    generator = torch.Generator().manual_seed(0)

    def normals(*shape, dtype=torch.float32):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    return normals
