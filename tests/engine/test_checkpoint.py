"""Checkpoints in parts: written by some number of processes, read by another; what fails while they are written."""

import errno
from dataclasses import dataclass

import pytest
import torch

from pdfast.engine import checkpoint
from pdfast.engine.checkpoint import Checkpoints
from pdfast.engine.layout import rows
from pdfast.engine.world import World


@dataclass(frozen=True)
class Part(World):
    """One of several processes that divide the parameters, all played by this one, the first last."""

    shards: int = 1
    shard: int = 0

    def on_first(self, function):
        return function() if self.shard == 0 else True


def parts(count):
    return [Part(torch.device("cpu"), shards=count, shard=i) for i in range(count)]


WHOLE = {
    "weight": torch.arange(35.0).view(7, 5),
    "bias": torch.arange(3.0),
    "one": torch.tensor([4.0]),
}
COMMON = {"steps": torch.tensor(7), "skipped": torch.tensor([2, 0])}


def own(tensor, world):
    first, end = rows(len(tensor), world.shards, world.shard)
    return tensor[first:end]


def write(run, count, update, values=WHOLE):
    """As `count` processes do: all begin, the first makes it appear when all have written."""
    writers = [Checkpoints(run, "student-0004", world) for world in parts(count)]
    for writer, world in zip(writers, parts(count), strict=True):
        divided = {name: own(tensor, world) for name, tensor in values.items()}
        writer.save(update, divided, COMMON, {"seconds": 1.5})
    for writer in reversed(writers):
        writer.finish()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_rows_are_those_of_chunk(size, count):
    chunks = [c.tolist() for c in torch.arange(size).chunk(count)]
    ours = [torch.arange(size)[slice(*rows(size, count, part))].tolist() for part in range(count)]
    assert ours == chunks + [[]] * (count - len(chunks))


@pytest.mark.parametrize("writing, reading", [(1, 1), (4, 4), (4, 2), (4, 1), (1, 4), (2, 3), (3, 2), (8, 5)])
def test_written_by_some_and_read_by_others(tmp_path, writing, reading):
    write(tmp_path, writing, 12)
    for world in parts(reading):
        reader = Checkpoints(tmp_path, "student-0004", world)
        loaded = reader._load(reader._path(12))
        assert loaded.update == 12 and loaded.extra == {"seconds": 1.5}
        for name, tensor in WHOLE.items():
            assert torch.equal(loaded.tensors[name], own(tensor, world)), name
        assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in COMMON.items())


def test_the_last_two_are_kept_and_the_newest_is_read(tmp_path):
    for update in (3, 6, 9):
        write(tmp_path, 2, update, {name: tensor + update for name, tensor in WHOLE.items()})
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "student-0004-0000000006",
        "student-0004-0000000009",
    ]
    alone = Checkpoints(tmp_path, "student-0004", World(torch.device("cpu")))
    assert torch.equal(alone.latest().tensors["weight"], WHOLE["weight"] + 9)
    (tmp_path / "checkpoints/student-0004-0000000009/rank-0001.safetensors").unlink()
    assert torch.equal(alone.latest().tensors["weight"], WHOLE["weight"] + 6)
    alone.clear()
    assert alone.latest() is None and not list((tmp_path / "checkpoints").iterdir())


def test_what_is_saved_is_the_state_at_the_call(tmp_path):
    saving = Checkpoints(tmp_path, "teacher", World(torch.device("cpu")))
    weight = torch.ones(1000)
    saving.save(1, {"weight": weight}, {}, {})
    weight.zero_()  # the next update
    saving.finish()
    assert bool((saving.latest().tensors["weight"] == 1).all())


def test_a_full_disk_is_said_and_the_next_tried(tmp_path, monkeypatch, capsys):
    saving = Checkpoints(tmp_path, "teacher", World(torch.device("cpu")))
    saving.save(1, {"weight": torch.ones(4)}, {}, {})
    saving.finish()
    with monkeypatch.context() as patch:

        def full(*arguments):
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(checkpoint, "save_file", full)
        saving.save(2, {"weight": torch.full((4,), 2.0)}, {}, {})
        saving.finish()
    said = capsys.readouterr().err
    assert "checkpoint at update 2 not written: the disk is full" in said and "training goes on" in said
    assert saving.latest().update == 1 and len(list((tmp_path / "checkpoints").iterdir())) == 1
    saving.save(3, {"weight": torch.full((4,), 3.0)}, {}, {})
    saving.finish()
    assert saving.latest().update == 3


def test_a_folder_that_is_gone_is_made_again(tmp_path, capsys):
    run = tmp_path / "run"
    saving = Checkpoints(run, "teacher", World(torch.device("cpu")))
    saving.save(1, {"weight": torch.ones(4)}, {}, {})
    saving.finish()
    run.rename(tmp_path / "elsewhere")
    saving.save(2, {"weight": torch.ones(4)}, {}, {})
    saving.finish()
    assert saving.latest().update == 2


def test_nothing_needs_pickle(tmp_path):
    write(tmp_path, 2, 1)
    files = [p for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".json", ".safetensors"}
