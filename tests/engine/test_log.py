"""log.jsonl and TensorBoard's events: whole lines, each once, whatever a run met before; and no traceback of a full disk."""

import errno
import json
import os

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pdfast.data import ResidentImages
from pdfast.engine import board
from pdfast.engine.board import Board
from pdfast.engine.log import RunLog, read_log
from pdfast.engine.throughput import Losses
from pdfast.engine.world import World
from pdfast.io.errors import UsageError
from tests.commands import TINY_GIVEN, TINY_ROUNDS, call

ALONE = World(torch.device("cpu"))


def test_a_line_that_was_cut_off_takes_none_with_it(tmp_path):
    whole = '{"steps": 1, "update": 2, "loss": 0.5}\n'
    (tmp_path / "log.jsonl").write_text(whole + '{"steps": 1, "upda')
    with RunLog(tmp_path, ALONE) as log:
        log.record({"steps": 1, "update": 4, "loss": 0.25})
    content = (tmp_path / "log.jsonl").read_text()
    assert content.startswith(whole) and [entry["loss"] for _, entry in read_log(tmp_path / "log.jsonl")] == [0.5, 0.25]


def test_a_bad_image_has_one_line_however_often_a_run_is_resumed(tmp_path):
    for _ in range(2):
        source = ResidentImages("images", torch.zeros(4, 8, 8, 1, dtype=torch.uint8))
        source.bad.reasons["a.png"] = "cut off"
        with RunLog(tmp_path, ALONE) as log:
            log.watch(source)
            source.bad.on_new("b.png", "empty")
            log.forget_after(None, 0)
    assert [entry["name"] for _, entry in read_log(tmp_path / "log.jsonl")] == ["a.png", "b.png"]


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe\n", b"[" * 100_000 + b"\n", b'{"steps": 1, "update": "2"}\n', b'{"steps": 1, "update": 2, "loss": NaN}\n',
        b'{"steps": 1, "update": 2, "loss_by_step": 3}\n', b'{"steps": [1], "update": 2}\n', b'{"steps": 1, "update": null}\n',
        b'{"steps": 1, "update": 2, "loss": -0.5}\n', b'{"steps": 0, "update": 2}\n', b'{"steps": 1, "update": 0}\n',
        b'{"event": "warning", "steps": 1, "messagf": "slow"}\n', b'{"event": "warning", "message": "slow", "update": 3}\n',
        b"3\n", b"[]\n", b'{"event": 7}\n', b'{"event": "warning", "steps": 1, "message": 7}\n', b'{"steps": true, "update": 1}\n',
    ],
)  # fmt: skip
def test_what_is_no_line_is_left_out(tmp_path, line):
    whole = b'{"steps": 1, "update": 2, "loss": 0.5}\n'
    (tmp_path / "log.jsonl").write_bytes(whole + line + whole + line)
    with pytest.warns(UserWarning, match="log.jsonl, line 2 is damaged and left out, as 1 more are$"):
        assert [entry for _, entry in read_log(tmp_path / "log.jsonl")] == 2 * [json.loads(whole)]


def test_a_flipped_bit_changes_no_figure(tmp_path):
    """Of each bit of a line: the line is left out, or says what it said."""
    path, said = (
        tmp_path / "log.jsonl",
        {"phase": "distill", "steps": 1, "update": 25, "loss": 0.125, "loss_by_step": [0.5, None]},
    )
    with RunLog(tmp_path, ALONE) as log:
        log.record(said)
    line = path.read_bytes()
    assert read_log(path) == [(line, said)]
    flips = [line[:i] + bytes([line[i] ^ 1 << bit]) + line[i + 1 :] for i in range(len(line) - 1) for bit in range(8)]
    path.write_bytes(
        b"".join(flip for flip in flips if flip.count(b"\n") == 1 and flip.splitlines(keepends=True) == [flip])
    )
    with pytest.warns(UserWarning, match="line 1 is damaged"):
        left = [entry for _, entry in read_log(path)]
    assert len(left) < 60 and all(said.items() <= entry.items() for entry in left)


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file(tmp_path, kind):
    path = tmp_path / "log.jsonl"
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    with pytest.raises(UsageError, match="log.jsonl is no regular file"):
        RunLog(tmp_path, ALONE)


def test_a_short_round_has_a_curve(finished_run, tmp_path):
    """Eight lines at least; of a round with fewer updates, all."""
    given = [*TINY_GIVEN, *TINY_ROUNDS, "--teacher", str(finished_run / "teacher"), "--run", str(tmp_path / "run")]
    assert call("distill", *given, "--log-every", "1000", "--updates", "40,1:3") == 0
    entries = [entry for _, entry in read_log(tmp_path / "run/log.jsonl")]
    assert [e["update"] for e in entries if e["steps"] == 2 and "update" in e] == [5, 10, 15, 20, 25, 30, 35, 40]
    assert [e["update"] for e in entries if e["steps"] == 1 and "update" in e] == [1, 2, 3]


def test_losses_go_on_after_a_resume():
    """The mean of a line is over all updates since the line before, those before the stop among them."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.tensor(4)
    batches = [(torch.rand(16, generator=generator), torch.randint(1, 5, (16,), generator=generator)) for _ in range(4)]
    undisturbed, first, resumed, old = (Losses(ALONE) for _ in range(4))
    for losses, k in batches:
        undisturbed.add(losses, k, steps)
    for losses, k in batches[:2]:
        first.add(losses, k, steps)
        old.add(losses, k, steps)
    resumed.load_state(first.state())
    old.load_state({})  # of a checkpoint that has none
    for losses, k in batches[2:]:
        resumed.add(losses, k, steps)
    assert resumed.read() == undisturbed.read()
    assert old.read() == (pytest.approx(float("nan"), nan_ok=True), 8 * [None])


def test_tensorboard_reads_the_events(tmp_path):
    written = Board(tmp_path / "tb")
    for step in (1, 2):
        written.scalar("teacher/loss", 1 / step, step)
    written.images("samples", np.full((2, 8, 8, 1), 7, np.uint8), 4)
    written.close()
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("teacher/loss")] == [(1, 1.0), (2, 0.5)]
    assert [e.step for e in events.Images("samples")] == [4]


class Full:
    """A file on a full disk."""

    def __init__(self, *arguments):
        pass

    def write(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_costs_the_events_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(board, "open", Full, raising=False)
    with pytest.warns(UserWarning, match="events cannot be written in .*No space left on device") as caught:
        written = Board(tmp_path / "tb")
        for step in range(3):
            written.scalar("loss", 1.0, step)
        written.close()
    assert len(caught) == 1


def test_a_file_in_the_place_of_the_events(tmp_path):
    (tmp_path / "tb").write_text("")
    with pytest.warns(UserWarning, match="events cannot be written"):
        Board(tmp_path / "tb").scalar("loss", 1.0, 0)
