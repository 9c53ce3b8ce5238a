"""The rows that benchmarks.tune tries in place of a table's own (pdfast_kernels.configs)."""

from collections.abc import Iterator
from itertools import product
from typing import Any

from pdfast_kernels import _attention_kernels as attention
from pdfast_kernels.configs import Lookup, Row
from pdfast_kernels.launch import next_power_of_2

Grid = dict[str, tuple[Any, ...]]

MOST_RESIDENT = 512  # positions

BLOCKS: Grid = {"block": (512, 1024, 2048, 4096, 8192), "num_warps": (2, 4, 8, 16)}
GROUP_NORM: tuple[Grid, ...] = (
    {"resident": (1024, 2048, 4096, 8192), "most": (8192, 16384), "per_warp": (512, 1024, 2048)},
    {"most": (0,), "stream": (2048, 4096, 8192), "tiles": (2, 4, 8), "stream_warps": (4, 8)},
)
GRIDS: dict[str, tuple[Grid, ...]] = {
    "diffuse": ({"block": (512, 1024, 2048), "tiles": (1, 2, 4), "num_warps": (2, 4, 8)},),
    "ddim_step": (BLOCKS,),
    "ddim_step_weighted_loss": (BLOCKS,),
    "adam_ema": (BLOCKS,),
    "group_norm forward": GROUP_NORM,
    "group_norm backward": GROUP_NORM,
}


def candidates(lookup: Lookup) -> list[Row]:
    """The shipped row first. All are for launches of at most the lookup's sizes."""
    sizes = dict(zip(lookup.row._fields, lookup.sizes, strict=False))
    grids = GRIDS.get(lookup.table.name) or tuple(_attention(lookup))
    rows = [lookup.row._replace(**sizes)]
    for grid in grids:
        rows += [rows[0]._replace(**dict(zip(grid, values, strict=True))) for values in product(*grid.values())]
    return list(dict.fromkeys(rows))


def _attention(lookup: Lookup) -> Iterator[Grid]:
    """Where all positions fit on chip also the kernels that hold them."""
    fp32 = lookup.table.name.endswith("fp32")
    backward, rows = "backward" in lookup.table.name, max(next_power_of_2(lookup.sizes[0]), 16)
    blocks, steps = ((16, 32, 64), (16, 32)) if fp32 else ((64, 128), (32, 64, 128))
    common = {"num_warps": (4, 8), "num_stages": (1,) if fp32 else (2, 3)}
    stream = attention.backward_stream if backward else attention.forward_stream
    yield {"kernel": (stream,), "block": blocks, "step": steps, **common}
    if rows > MOST_RESIDENT:
        return
    if not backward:
        yield {"kernel": (attention.forward_resident,), "block": blocks, "step": (rows,), **common}
        return
    one = {"num_warps": (4, 8), "num_stages": (1,)}
    yield {"kernel": (attention.backward_tile,), "block": (rows,), "step": (rows,), **one}
    yield {"kernel": (attention.backward_resident,), "block": (rows,), "step": steps, **common}
