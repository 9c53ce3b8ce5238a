"""The order in which a source gives its images, its fingerprint, the built-in digits, and what load_source accepts."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from pdfast.data import Batch, ResidentImages, load_source
from pdfast.diffusion.noise import permutation
from tests.commands import environment
from tests.data.errors import refusal

N = 10


def numbered(count: int = N) -> ResidentImages:
    """Image i has all pixels i, and label 2 i."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(count, 4, 4, 3)
    return ResidentImages("numbered", images, 2 * torch.arange(count))


def shown(batch: Batch) -> list[int]:
    """Which images of `numbered` a batch holds; their labels must belong to them."""
    assert batch.x.dtype == torch.uint8 and batch.x.shape[1:] == (4, 4, 3)
    assert (batch.x == batch.x[:, :1, :1, :1]).all()
    numbers = batch.x[:, 0, 0, 0].long()
    assert batch.cond.dtype == torch.int64 and torch.equal(batch.cond, 2 * numbers)
    return numbers.tolist()


def test_each_epoch_visits_each_image_once_in_an_order_of_its_own():
    source = numbered()
    epochs = [shown(source.batch(torch.arange(e * N, (e + 1) * N), seed=3)) for e in range(4)]
    assert all(sorted(epoch) == list(range(N)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert shown(source.batch(torch.arange(N), seed=4)) != epochs[0]


@pytest.mark.parametrize("size", [1, 3, 7, 23])
def test_batches_do_not_depend_on_their_boundaries_and_may_span_epochs(size: int):
    source = numbered()
    whole = shown(source.batch(torch.arange(3 * N), seed=5))
    assert sum((shown(source.batch(part, seed=5)) for part in torch.arange(3 * N).split(size)), []) == whole
    assert whole == [permutation(5, i // N, N)[i % N].item() for i in range(3 * N)]


def test_a_rank_may_ask_for_any_samples_in_any_order():
    source = numbered()
    samples = torch.tensor([27, 3, 14, 3])
    whole = shown(source.batch(torch.arange(3 * N), seed=6))
    assert shown(source.batch(samples, seed=6)) == [whole[i] for i in samples]


def test_the_largest_seed_and_far_samples():
    far = 2**31 * N + torch.arange(N)
    assert sorted(shown(numbered().batch(far, seed=2**64 - 1))) == list(range(N))


def test_take_is_in_the_order_of_the_data_set():
    assert shown(numbered().take(torch.tensor([4, 0, 9, 4]))) == [4, 0, 9, 4]


def test_without_labels():
    source = ResidentImages("plain", torch.zeros(3, 2, 2, 1, dtype=torch.uint8))
    assert source.num_classes == 0
    assert source.take(torch.tensor([1])).cond is None
    assert source.batch(torch.tensor([1]), seed=0).cond is None


def test_attributes():
    source = numbered()
    assert (source.name, source.num_images, source.shape, source.num_classes) == ("numbered", N, (4, 4, 3), 19)


def fingerprint(images: Tensor, labels: Tensor | None = None, name: str = "a") -> str:
    return ResidentImages(name, images, labels).identity.hashes.everything


def test_the_fingerprint_is_of_the_content_only():
    images, labels = torch.arange(48, dtype=torch.uint8).view(3, 2, 4, 2), torch.tensor([0, 1, 1])
    own = fingerprint(images, labels)
    assert len(own) == 64 and int(own, 16) >= 0
    assert fingerprint(images.clone(), labels.clone(), name="b") == own
    assert fingerprint(images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), labels) == own
    other = images.clone()
    other[2, 1, 3, 1] += 1
    variants = [
        fingerprint(other, labels),
        fingerprint(images, torch.tensor([0, 1, 2])),
        fingerprint(images),
        fingerprint(images.flip(0), labels),
        fingerprint(images.reshape(3, 4, 2, 2), labels),
    ]
    assert len({own, *variants}) == 6


def test_digits():
    source = load_source("digits", image_size=8, channels=1)
    assert (source.name, source.num_images, source.shape, source.num_classes) == ("digits", 1797, (8, 8, 1), 10)
    every = source.take(torch.arange(1797))
    assert torch.bincount(every.cond).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert every.cond[:10].tolist() == list(range(10))
    # The first rows of the first digit are 0 0 5 13 9 1 0 0 and 0 0 13 15 10 15 5 0 of 16.
    assert every.x[0, 0, :, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]
    assert every.x[0, 1, :, 0].tolist() == [0, 0, 207, 239, 159, 239, 80, 0]
    assert every.x.max() == 255


def test_digits_at_another_size_is_refused():
    message = refusal(load_source, "digits", image_size=32, channels=3, names="digits")
    assert "(8, 8, 1)" in message and "(32, 32, 3)" in message and "--network.image-size" in message


def test_a_file_is_a_source_of_its_name(tmp_path):
    images, labels = np.arange(5 * 16, dtype=np.uint8).reshape(5, 4, 4), np.array([0, 1, 2, 1, 0])
    np.savez(tmp_path / "mine.npz", images=images, labels=labels)
    source = load_source(str(tmp_path / "mine.npz"), image_size=4, channels=1)
    assert (source.name, source.num_images, source.shape, source.num_classes) == ("mine.npz", 5, (4, 4, 1), 3)
    every = source.take(torch.arange(5))
    assert np.array_equal(every.x[..., 0].numpy(), images) and np.array_equal(every.cond.numpy(), labels)


@pytest.mark.parametrize("shape", [(5, 4, 4, 1), (5, 8, 4, 3), (5, 4, 8, 3), (5, 3, 4, 4), (5, 1, 9, 9), (5, 3, 4, 3)])
def test_images_of_another_shape_are_refused(tmp_path, shape):
    np.save(tmp_path / "mine.npy", np.zeros(shape, dtype=np.uint8))
    message = refusal(load_source, str(tmp_path / "mine.npy"), image_size=4, channels=3, names=tmp_path / "mine.npy")
    assert str(shape[1:]) in message and "(4, 4, 3)" in message
    channels_first = shape in ((5, 3, 4, 4), (5, 1, 9, 9))  # of an image 3 pixels high nothing is guessed
    assert ("channels first, so save them as [N, H, W, C], by images.transpose" in message) == channels_first


def test_what_is_not_there_is_refused(tmp_path):
    for name in ("none.npz", "none.npy", "folder"):
        message = refusal(load_source, str(tmp_path / name), image_size=4, channels=3, names=tmp_path / name)
        assert "there are no data" in message and "give `digits`" in message


def test_another_sort_of_file_is_refused(tmp_path):
    path = tmp_path / "images.zip"
    path.write_bytes(b"")
    message = refusal(load_source, str(path), image_size=4, channels=3, names=path)
    assert "not data that pdfast reads" in message and ".npz" in message


def test_import_is_light():
    script = "import sys, pdfast.data; print({'PIL', 'tyro', 'sklearn', 'matplotlib'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True)
    assert result.stdout == "set()\n", result.stderr
