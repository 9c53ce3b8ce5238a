"""Checkpoints in parts: written by some number of processes, read by another; what fails while they are written."""

import errno
import json
import os
from dataclasses import dataclass

import pytest
import torch

from pdfast.engine import checkpoint
from pdfast.engine.checkpoint import Checkpoints, clear_finished
from pdfast.engine.parallelize import rows
from pdfast.engine.world import World
from pdfast.io.files import SEAL
from pdfast.io.run_folder import RunFolder


@dataclass(frozen=True)
class Part(World):
    """One of several processes that divide the parameters, all played by this one, the first last."""

    shards: int = 1
    shard: int = 0

    def run_on_rank0(self, function):
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


def flipped(content, bit):
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_a_flipped_bit_of_its_state_is_seen(tmp_path, capsys):
    """One of each byte: the state is then what it was, or the checkpoint before is used."""
    for update in (1, 2):
        write(tmp_path, 1, update)
    reader = Checkpoints(tmp_path, "student-0004", parts(1)[0])
    expected = reader.latest()
    for name in ("state.json", "rank-0000.json"):
        file = tmp_path / "checkpoints/student-0004-0000000002" / name
        content = file.read_bytes()
        noticed = 0
        for bit in range(0, 8 * len(content), 9):
            file.write_bytes(flipped(content, bit))
            found = reader.latest()
            if found.update == 2:
                assert (found.extra, found.tensors.keys()) == (expected.extra, expected.tensors.keys()), bit
            else:
                assert found.update == 1
                noticed += 1
        assert noticed > 0.9 * 8 / 9 * len(content)
        file.write_bytes(content)
    assert reader.latest().update == 2 and "student-0004-0000000002 is damaged" in capsys.readouterr().err


def without_seal(folder):
    """As the version before wrote it."""
    state = json.loads((folder / "state.json").read_text())
    del state[SEAL]
    (folder / "state.json").write_text(json.dumps(state))
    return state


def test_a_checkpoint_without_a_seal_is_read(tmp_path):
    write(tmp_path, 2, 5)
    without_seal(tmp_path / "checkpoints/student-0004-0000000005")
    loaded = Checkpoints(tmp_path, "student-0004", World(torch.device("cpu"))).latest()
    assert loaded.update == 5 and torch.equal(loaded.tensors["weight"], WHOLE["weight"])


@pytest.mark.parametrize(
    "change",
    [
        {"parts": 0}, {"parts": 1}, {"parts": -1}, {"parts": True}, {"parts": "2"}, {"parts": 1e9}, {"update": 5.0},
        {"update": None}, {"common": {}}, {"common": [1]}, {"common": ["stepz"]}, {"extra": []}, {"sealed": 1},
    ],
)  # fmt: skip
def test_what_is_no_state_is_damaged(tmp_path, change, capsys):
    for update in (4, 5):
        write(tmp_path, 2, update)
    folder = tmp_path / "checkpoints/student-0004-0000000005"
    (folder / "state.json").write_text(json.dumps(without_seal(folder) | change))
    assert Checkpoints(tmp_path, "student-0004", World(torch.device("cpu"))).latest().update == 4
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["student-0004-0000000009 (copy)", "student-0004-0000000009.bak", "student-0004-x", "student-0004-"]
)
def test_what_is_named_otherwise_is_no_checkpoint(tmp_path, name):
    write(tmp_path, 1, 3)
    others = tmp_path / "checkpoints" / name
    others.mkdir()
    (others / "mine").write_text("")
    saved = Checkpoints(tmp_path, "student-0004", World(torch.device("cpu")))
    assert saved.latest().update == 3
    saved.clear()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [name] and (others / "mine").exists()


def test_checkpoints_of_finished_stages_are_cleared(tmp_path):
    write(tmp_path, 1, 3)
    (tmp_path / "checkpoints/.student-0004-0000000006.tmp").mkdir()
    (tmp_path / "checkpoints/student-0002-0000000001").mkdir()
    (tmp_path / "checkpoints/notes").write_text("")
    clear_finished(RunFolder(tmp_path))
    assert len(list((tmp_path / "checkpoints").iterdir())) == 4
    (tmp_path / "students/0004").mkdir(parents=True)
    clear_finished(RunFolder(tmp_path))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["notes", "student-0002-0000000001"]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_permissions_are_what_the_umask_leaves(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write(tmp_path, 2, 3)
    finally:
        os.umask(before)
    files = [p for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()]
    assert len(files) == 5 and {p.stat().st_mode & 0o777 for p in files} == {mode}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_damaged(tmp_path, value, capsys):
    """The one before it is used."""
    write(tmp_path, 1, 1)
    spoilt = {name: tensor.clone() for name, tensor in WHOLE.items()}
    name = next(name for name, tensor in spoilt.items() if tensor.is_floating_point())
    spoilt[name].view(-1)[-1] = value
    write(tmp_path, 1, 2, spoilt)
    assert Checkpoints(tmp_path, "student-0004", parts(1)[0]).latest().update == 1
    assert f"{name} in rank-0000.safetensors is not finite" in capsys.readouterr().err
