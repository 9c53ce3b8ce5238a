"""The kernels compiled for sm_90, where a GPU's arguments are what the interpreter never sees: an int of 1 is a constant there, and
a table of channels and groups is registers."""

import itertools
import json
import subprocess
import sys

import pytest

from pdfast_kernels.ops.group_norm.group_norm import (
    BACKWARD,
    FORWARD,
    MERGED_CHANNELS,
    MOST_MEMBERS,
    _merge,
    _resident,
    _Shape,
    _stream,
)
from tests.commands import ROOT, environment

MOST_INSTRUCTIONS, MOST_REGISTERS = (
    3000,
    168,
)  # of a shape without a configuration of its own; 3 programs of 128 threads an SM
SWEEP = [
    f"{n},{channels},{size},{groups}"
    for n, channels, size, groups in itertools.product((1, 8), (40, 512, 1536, 8192), (1, 2, 3), (1, 8, 40, 512, 1536))
    if channels % groups == 0
]


def compiled(*arguments):
    clean = {name: value for name, value in environment().items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compiled", *arguments]
    done = subprocess.run(command, env=clean, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_integer_argument_may_be_one():
    """Strides, sizes and counts, one at a time and all together."""
    seen = compiled("ones")
    assert len(seen) >= 20 and "group_norm_kernels.merge_moments" in seen
    assert [f"{kernel}: {case}" for kernel, cases in seen.items() for case in cases if case.startswith("!")] == []


def check_norms(shapes):
    rows = compiled("norms", *shapes)
    assert {row["shape"] for row in rows} == set(shapes)
    for row in rows:
        assert row["stack"] == 0 and row["registers"] <= MOST_REGISTERS and row["instructions"] <= MOST_INSTRUCTIONS, (
            row
        )


def test_norms_of_many_groups_or_one_row_stay_small():
    """They were 59,328 instructions with 9,952 bytes of stack, 204 registers, and an error of the compiler."""
    check_norms(["8,1024,2,512", "8,1280,1,32", "8,4096,1,1"])


@pytest.mark.slow
def test_norms_of_any_channels_groups_and_rows_stay_small():
    check_norms(SWEEP)


@pytest.mark.parametrize("table", [FORWARD, BACKWARD], ids=["forward", "backward"])
@pytest.mark.parametrize("arch", [80, 90])
def test_what_a_program_holds_is_bounded(table, arch):
    """For every shape: the elements of its tiles and of the table of channels and groups."""
    for channels, rows in itertools.product(
        (1, 7, 40, 320, 512, 1032, 1280, 2048, 6144, 16384), (1, 2, 3, 16, 300, 4096)
    ):
        for cpg in (cpg for cpg in range(1, channels + 1) if channels % cpg == 0):
            shape = _Shape(2, rows, channels, cpg)
            tiles = table.row(arch, rows * cpg)
            resident = _resident(shape, tiles)
            if resident is None:
                chunks, _, stream = _stream(shape, tiles)
                assert stream["BLOCK_R"] * stream["BLOCK_C"] <= tiles.stream
                merge = _merge(shape, chunks)
                assert merge["BLOCK_K"] * merge["BLOCK_CPG"] <= 32 * MERGED_CHANNELS
            else:
                assert resident["BLOCK_R"] * resident["BLOCK_C"] <= tiles.most
                assert resident["BLOCK_C"] * resident["BLOCK_G"] <= MOST_MEMBERS
                assert resident["CHANNELS"] % cpg == 0 and resident["CHANNELS"] <= resident["BLOCK_C"]
