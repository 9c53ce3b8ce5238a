"""The operations at a shape that somebody names: images N,C,H,W."""

from collections.abc import Iterator
from functools import partial
from math import gcd

from benchmarks import work
from benchmarks.cases import DTYPES, GROUPS, STEPS, Case


def cases_at(shape: tuple[int, int, int, int], head_dim: int) -> list[Case]:
    """All that there can be of images [N, C, H, W], in every dtype.

    group_norm with 32 groups, or as many as divide both 32 and C; attention over the H*W positions with C / head_dim heads,
    and without it where that is no number; the operations on states with one output a channel. adam_ema has no images.
    """
    return [case for dtype in DTYPES for case in _cases(*shape, head_dim, dtype)]


def _cases(n: int, c: int, h: int, w: int, head_dim: int, dtype: str) -> Iterator[Case]:
    def case(op: str, name: str, make, **arguments) -> Case:
        make = partial(make, **arguments, dtype=DTYPES[dtype])
        return Case(op, f"{name} {dtype}", n, make, width=0, explicit=True)

    size, image = (h, w), f"{n}x{c}x{h}x{w}"
    states = {"channels": c, "size": size, "parts": 1, "channels_last": True, "steps": STEPS}
    yield case("diffuse", image, work.diffuse_work, channels=c, size=size, flip=False)
    yield case("ddim_step", f"{image} P=1 NHWC", work.ddim_step_work, **states)
    yield case("ddim_step_weighted_loss", f"{image} P=1 NHWC", work.loss_work, **states, and_grad=False)
    yield case("ddim_step_weighted_loss_and_grad", f"{image} P=1 NHWC", work.loss_work, **states, and_grad=True)
    norm = {"channels": c, "size": size, "groups": gcd(c, GROUPS)}
    for kind in ("film+silu", "silu", "plain"):
        film, silu = kind == "film+silu", kind != "plain"
        yield case("group_norm", f"{image} {kind}", work.group_norm_work, **norm, film=film, silu=silu)
    if c % head_dim == 0:
        heads = c // head_dim
        attention = {"positions": h * w, "heads": heads, "head_dim": head_dim, "packed": True}
        yield case("attention", f"{n}x{h * w}x{heads}x{head_dim} packed", work.attention_work, **attention)
        yield case(
            "group_norm_attention", f"{image} heads={heads}", work.group_norm_attention_work, **norm, heads=heads
        )
