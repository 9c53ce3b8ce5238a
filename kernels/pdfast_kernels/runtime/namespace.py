"""The namespace in `torch.ops` of this copy of the package.

Of two operations of one name torch keeps the later, without a word. A copy that is loaded beside an installed package, as from a
kernel repository, has another namespace here (kernels/assemble.py).
"""

NAMESPACE = "pdfast_kernels"


def in_namespace(op: str) -> str:
    """Return the name that an operation is registered by, such as `pdfast_kernels::ddim_step`."""
    return f"{NAMESPACE}::{op}"
