"""The tables of launch configurations, and what the launches of every operation ask them for."""

from functools import partial

import pytest

from benchmarks.cases import all_cases
from benchmarks.static import launches
from pdfast_kernels.runtime.configs import ANY, UNBOUNDED, Blocks, Table, looked_up

SMALL, LARGE, OTHER = Blocks(10, 16, 1), Blocks(UNBOUNDED, 32, 2), Blocks(UNBOUNDED, 64, 4)


def test_the_first_row_that_fits():
    table = Table("example", {ANY: (SMALL, LARGE), 90: (OTHER,)})
    assert [table.row(80, size) for size in (0, 10, 11)] == [SMALL, SMALL, LARGE]
    assert table.row(90, 1) == OTHER


def test_an_override_ends():
    table = Table("example", {ANY: (LARGE,)})
    with pytest.raises(KeyError), table.overridden(SMALL):
        assert table.row(80, 10) == SMALL and table.row(80, 11) == LARGE
        with table.overridden(OTHER):
            assert table.row(80, 10) == OTHER
        assert table.row(80, 10) == SMALL
        raise KeyError
    assert table.row(80, 10) == LARGE


@pytest.mark.parametrize("case", [case for case in all_cases() if case.quick], ids=lambda case: case.full_name)
def test_every_launch_asks_a_table(case):
    """So that each can be tuned: what is looked up decides what is launched."""
    make = partial(case.make, 1, "cpu")
    with looked_up() as asked:
        shipped = configurations(launches(make, 80))
    assert asked and {lookup.arch for lookup in asked} == {80}
    for table, _, sizes, row in asked:
        assert table.row(80, *sizes) == row
        other = (
            row._replace(num_warps=2 * row.num_warps)
            if "num_warps" in row._fields
            else row._replace(most=0, stream_warps=8)
        )
        with table.overridden(other):
            assert configurations(launches(make, 80)) != shipped


def configurations(passes):
    return [(launch.kernel, launch.grid, launch.num_warps) for listed in passes.values() for launch in listed]
