"""A DDIM step in plain PyTorch: the path on a CPU, and what the kernels are compared with."""

from torch import Tensor

from pdfast_kernels.ops.columns import combine, like, table_rows


def ddim_step(
    z: Tensor, output: Tensor, z_coefficient: Tensor, output_coefficient: Tensor, index: Tensor | None = None
) -> Tensor:
    return step(z, output, table_rows(z_coefficient, index), table_rows(output_coefficient, index)).to(z.dtype)


def step(z: Tensor, output: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """In the dtype of the coefficients, which a z of 16 bits is not."""
    return like(a, z) * z + combine(output, b)
