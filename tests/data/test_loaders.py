"""Loaders: the same samples in the same order from every one of them, after every stop, whatever is bad among them."""

import sys
import threading

import numpy as np
import pytest
import torch

from pdfast.data import dali, load_source, loaders
from pdfast.data.source import home_of, order_of
from pdfast.engine.log import read_log
from pdfast.evaluation.metrics import split_real
from pdfast.io import interrupt
from tests.commands import TINY_RUN, call
from tests.data.archives import write_tar
from tests.data.errors import refusal
from tests.data.files import encoded, write_tfrecord
from tests.engine import processes

LOADERS = [
    "resident",
    "portable",
    pytest.param("dali", marks=pytest.mark.skipif(dali.missing() is not None, reason=str(dali.missing()))),
]
RNG = np.random.default_rng(0)
N = 11
PIXELS = RNG.integers(0, 256, (N, 8, 8, 3), dtype=np.uint8)
OF_CLASS = [0, 2, 1, 1, 0, 2, 2, 0, 1, 0, 2]


@pytest.fixture
def folder(tmp_path):
    """Lossless files, of the size wanted, with a file of labels."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i, pixels in enumerate(PIXELS):
        (folder / f"{i:02}.png").write_bytes(encoded(pixels))
    (folder / "labels.csv").write_text("".join(f"{i:02}.png,{label}\n" for i, label in enumerate(OF_CLASS)))
    return folder


def opened(path, loader="auto", size=8, **options):
    return load_source(str(path), image_size=size, channels=3, loader=loader, **options)


def batches(source, count=5, *, update=0, part=None, size=4, seed=9):
    stream = source.stream(torch.arange(size) if part is None else part, size, update, seed)
    drawn = [next(stream) for _ in range(count)]
    return torch.cat([b.x for b in drawn]), None if drawn[0].cond is None else torch.cat([b.cond for b in drawn])


def assert_equal(ours, theirs):
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("loader", LOADERS)
def test_an_array_a_folder_tars_and_tfrecords_give_the_same_batches(folder, tmp_path, loader):
    np.savez(tmp_path / "array.npz", images=PIXELS, labels=np.array(OF_CLASS))
    (tmp_path / "tars").mkdir()
    members = [{f"{i:02}.png": encoded(PIXELS[i]), f"{i:02}.cls": str(OF_CLASS[i]).encode()} for i in range(N)]
    write_tar(tmp_path / "tars/0.tar", {k: v for m in members[:7] for k, v in m.items()}, "w")
    write_tar(tmp_path / "tars/1.tar", {k: v for m in members[7:] for k, v in m.items()}, "w")
    records = [(encoded(p), label) for p, label in zip(PIXELS, OF_CLASS, strict=True)]
    write_tfrecord(tmp_path / "all.tfrecord", records)
    expected = batches(opened(tmp_path / "array.npz"))
    for path in (folder, tmp_path / "tars", tmp_path / "all.tfrecord"):
        source = opened(path, loader)
        assert source.num_images == N and source.num_classes == 3
        found = {"images": "11 image files", "tars": "11 images in 2 tar shards"}
        assert found.get(path.name, "11 images in 1 TFRecord files") in source.description
        assert_equal(batches(source), expected)
        assert_equal(
            [source.take(torch.tensor([3, 0])).x, source.take(torch.tensor([3, 0])).cond],
            [torch.from_numpy(PIXELS[[3, 0]]), torch.tensor([1, 0])],
        )


@pytest.mark.parametrize("loader", LOADERS)
def test_any_update_and_any_number_of_processes(folder, loader):
    """From each update on, and by each of two processes: what one that never stopped has there."""
    source = opened(folder, loader)
    images, labels = batches(source, 6)
    for update in (1, 4):
        assert_equal(batches(source, 6 - update, update=update), (images[4 * update :], labels[4 * update :]))
    halves = [batches(source, 6, part=torch.arange(2) + first)[0].view(6, 2, 8, 8, 3) for first in (0, 2)]
    assert torch.equal(torch.cat(halves, dim=1).flatten(0, 1), images)


@pytest.mark.parametrize("loader", LOADERS)
def test_photographs_are_near_those_of_pillow(tmp_path, loader):
    """JPEG, WebP, palettes, transparency, orientation; larger and smaller: within 8 of 255, on average 0.5."""
    for i, (width, height) in enumerate([(70, 50), (51, 97), (20, 31), (64, 64), (33, 40), (90, 31)]):
        pixels = np.kron(RNG.integers(0, 256, (height // 9 + 1, width // 9 + 1, 3)), np.ones((9, 9, 1)))[
            :height, :width
        ]
        pixels = np.clip(pixels + RNG.normal(0, 8, pixels.shape), 0, 255).astype(np.uint8)
        (tmp_path / f"{i}.jpg").write_bytes(
            encoded(
                pixels,
                "JPEG",
                quality=92,
                exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0",
            )
        )
        (tmp_path / f"{i}.webp").write_bytes(encoded(pixels, "WEBP", quality=92))
        (tmp_path / f"{i}.png").write_bytes(encoded(np.dstack([pixels, pixels[..., :1]])))
    theirs = batches(opened(tmp_path, "resident", size=32))[0].int()
    difference = (batches(opened(tmp_path, loader, size=32))[0].int() - theirs).abs()
    assert difference.max() <= 8 and difference.float().mean() < 0.5


@pytest.mark.parametrize("loader", LOADERS)
def test_what_is_bad_is_replaced_by_the_next_and_named_once(folder, loader):
    good = batches(opened(folder, "resident"), 9)
    (folder / "03.png").write_bytes(b"")
    (folder / "04.png").write_bytes(encoded(PIXELS[4])[:-60])  # its header is good
    (folder / "10.png").write_text("<html>404</html>")
    source, seen = opened(folder, loader, max_bad=0.3), []
    reasons = source.bad.reasons
    before = dict(reasons)
    source.bad.on_new = lambda name, reason: seen.append(name)
    images, labels = batches(source, 9)
    assert set(reasons) == {"03.png", "04.png", "10.png"} and sorted([*before, *seen]) == sorted(reasons)
    assert reasons["03.png"] == "empty" and reasons["10.png"] == "not an image" and reasons["04.png"]
    replacement = {3: 5, 4: 5, 10: 0}
    numbers = [int((torch.from_numpy(PIXELS) == image).flatten(1).all(1).nonzero()) for image in good[0]]
    expected = [replacement.get(i, i) for i in numbers]
    assert torch.equal(images, torch.from_numpy(PIXELS[expected]))
    assert labels.tolist() == [OF_CLASS[i] for i in expected]
    message = refusal(lambda: batches(opened(folder, loader, max_bad=0.2), 9), names="images")
    assert "3 of 11 images of images cannot be used, more than --max-bad 0.2 allows; the first: " in message


@pytest.mark.parametrize("loader", LOADERS)
def test_labels_that_the_network_has_not(folder, loader):
    message = refusal(opened, folder, loader, num_classes=2, max_bad=1.0, names=folder)
    assert "has the label 2, the network is conditioned on 2 classes, 0 to 1" in message
    assert opened(folder, loader, num_classes=4).num_classes == 3
    (folder / "labels.csv").write_text("00.png,1\n01.png,0\n")
    source = opened(folder, loader, num_classes=2, max_bad=1.0)
    assert set(batches(source, 9)[1].tolist()) == {0, 1} and len(source.bad.reasons) == 9
    (folder / "labels.csv").unlink()
    assert "has no labels" in refusal(opened, folder, loader, num_classes=2, names=folder)


@pytest.mark.parametrize("loader", LOADERS)
def test_nothing_at_all_can_be_used(folder, loader):
    for file in folder.glob("*.png"):
        file.write_bytes(b"")
    message = refusal(lambda: batches(opened(folder, loader, max_bad=1.0)), names="11")
    assert message == "none of 11 images can be used: the first is empty"


def test_the_loader_is_chosen_by_what_fits_and_what_is_there(folder, monkeypatch, tmp_path):
    assert (
        opened(folder).description
        == "images: 11 image files, 3 classes, as images of (8, 8, 3), loader resident (0 MiB), in memory"
    )
    monkeypatch.setattr(loaders, "MOST_RESIDENT", 0)
    monkeypatch.setattr(dali, "missing", lambda: "NVIDIA DALI is not installed")
    with pytest.warns(UserWarning, match="decoded by Pillow, which is slower: NVIDIA DALI is not installed"):
        assert "loader portable" in opened(folder).description
    assert "--loader dali: NVIDIA DALI is not installed" in refusal(opened, folder, "dali", names="dali")
    monkeypatch.setattr(dali, "missing", lambda: None)
    assert "loader dali" in opened(folder).description
    np.save(tmp_path / "a.npy", PIXELS)
    assert "always resident: leave out --loader dali" in refusal(opened, tmp_path / "a.npy", "dali", names="a.npy")


@pytest.mark.filterwarnings("ignore:4 images are too few")
@pytest.mark.parametrize("loader", LOADERS)
def test_a_run_from_files_goes_on_bit_for_bit(folder, tmp_path, loader, monkeypatch, capsys):
    """Stopped in the middle of an epoch; the names of what was bad are in its log."""
    (folder / "05.png").write_bytes(b"")
    flags = [*TINY_RUN, "--data", str(folder), "--max-bad", "0.1", "--loader", loader]
    flags += ["--evaluation.num-samples", "4"]
    weights = []
    for name, stopped in (("whole", False), ("stopped", True)):
        run = tmp_path / name
        if stopped:
            asked = iter([False] * 5 + [True] * 100)
            with monkeypatch.context() as patch:
                patch.setattr(interrupt, "requested", asked.__next__)
                assert call("train", *flags, "--run", str(run)) == 130
            assert not (run / "teacher").exists()
        assert call("train", *flags, "--run", str(run)) == 0
        weights.append((run / "teacher/teacher.safetensors").read_bytes())
        entries = [entry for _, entry in read_log(run / "log.jsonl")]
        assert {"event": "bad image", "name": "05.png", "reason": "empty"} in entries
    assert weights[0] == weights[1]
    said = capsys.readouterr().out
    assert "images: 11 image files" in said and "1 of 11 images could not be used, and the next were instead" in said


def test_what_another_process_could_not_use_is_in_the_log(tmp_path):
    """Of two processes the second alone meets a bad image."""
    count, size, updates = 64, 8, 3
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:02}.png").write_bytes(encoded(np.full((8, 8), 2 * i, dtype=np.uint8)))
    order = order_of(torch.arange(size * updates), count, 0).view(updates, 2, size // 2)
    evaluated = torch.cat(split_real(count, 8, seed=0))
    its_own = set(order[:, 1].flatten().tolist()) - set(order[:, 0].flatten().tolist()) - set(evaluated.tolist())
    name = f"{min(its_own):02}.png"
    (folder / name).write_bytes(b"")
    flags = [
        *TINY_RUN,
        "--data",
        str(folder),
        "--loader",
        "portable",
        "--max-bad",
        "0.02",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    flags += f"--train.updates {updates} --train.batch-size {size} --evaluation.num-samples 8".split()
    processes.run(2, "-m", "pdfast.train", *flags)
    entries = [entry for _, entry in read_log(tmp_path / "run/log.jsonl")]
    assert [e for e in entries if e.get("event") == "bad image"] == [
        {"event": "bad image", "name": name, "reason": "empty"}
    ]


def test_what_decodes_ahead_may_be_dropped_in_its_own_thread():
    """As where the garbage of a cycle is collected there: a thread cannot wait for itself."""
    kept, dropped = [], []
    begun, done = threading.Event(), threading.Event()

    def items():
        begun.wait(10)
        unraisable, sys.unraisablehook = sys.unraisablehook, dropped.append
        kept.clear()
        sys.unraisablehook = unraisable
        done.set()
        yield None

    kept.append(dali._Ahead(items()))
    begun.set()
    assert done.wait(10) and not dropped


def test_images_lie_where_there_is_room(monkeypatch):
    gpu = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8000, 80000))
    assert [home_of(n, gpu).type for n in (2000, 2001)] == ["cuda", "cpu"]
    assert home_of(1 << 60, torch.device("cpu")).type == "cpu"
