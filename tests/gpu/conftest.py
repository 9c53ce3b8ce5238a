"""The kernels on a GPU, compiled: pytest -m gpu tests/gpu."""

import pytest
import torch

from pdfast_kernels import use


@pytest.fixture(autouse=True)
def triton_kernels():
    """Triton or an error, never a silent PyTorch."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    with use("triton"):
        yield


@pytest.fixture
def draw():
    """draw(*shape, dtype=torch.float32): standard normals on the GPU, the same in every run."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normals(*shape, dtype=torch.float32):
        return torch.randn(*shape, device="cuda", generator=generator).to(dtype)

    return normals
