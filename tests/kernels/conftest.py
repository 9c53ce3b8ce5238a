"""Kernels in Triton's interpreter. It runs on NumPy: values are as on a GPU for fp32 and fp16, bf16 arithmetic is not."""

import pytest
import torch

from pdfast_kernels import use


@pytest.fixture
def triton_kernels():
    """The Triton path on CPU tensors, with NaN in all memory that is not written."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU, the kernels are not interpreted")
    torch.use_deterministic_algorithms(True)  # which fills new memory with NaN
    try:
        with use("triton"):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def draw():
    """draw(*shape, dtype=torch.float32): standard normals, another tensor on every call, the same in every run."""
    generator = torch.Generator().manual_seed(0)

    def normals(*shape, dtype=torch.float32):
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)

    return normals
