"""Feature spaces that are trained here: the last hidden layer of a small classifier, of the built-in digits or of the run's own data.

A seed and the data fix the weights, up to the kind of processor; their hash says which they are.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor, nn

from pdfast.data import PIXELS, ImageSource, load_source
from pdfast.diffusion.noise import permutation
from pdfast.engine.world import World
from pdfast.evaluation.cache import cache_folder, keep
from pdfast.evaluation.metrics import fixed_seed
from pdfast.io.errors import UsageError

SEED = 0
BATCH_SIZE = 128
LEARNING_RATE = 1.5e-3
NUM_TRAINED = 1437  # digits that their classifier is trained on; the others test it
UPDATES = 300
EPOCHS, LEAST_UPDATES = 3, 300  # of the classifier of any data
HELD_OUT = 1 / 6  # of any data, which test the classifier
FORMAT = 1  # of the file; another one where network or training change


def check_digits(shape: tuple[int, ...]) -> None:
    """Raise a UsageError for images of another shape (C, H, W) than the digits'."""
    if shape != (1, 8, 8):
        raise UsageError(
            "the feature space digits takes images of (channels, height, width) (1, 8, 8), "
            f"not {shape}: set --evaluation.features to mobilenet"
        )


class ClassifierFeatures(nn.Module):
    """The last hidden layer of a classifier."""

    natural = False

    def __init__(self, name: str, hidden: nn.Sequential, num_features: int, classes: int) -> None:
        """hidden: images float [n, C, H, W] in [-1, 1] -> [n, num_features]."""
        super().__init__()
        self.name, self.num_features, self.hidden = name, num_features, hidden
        self.classify = nn.Linear(num_features, classes)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return float32 [n, num_features] of uint8 [n, C, H, W]."""
        return self.hidden(images.float() / 127.5 - 1)

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """Return logits float32 [n, classes] of features float32 [n, num_features]."""
        return self.classify(features)

    @property
    def sha256(self) -> str:
        """Of the weights, which another kind of processor may train to other bits."""
        digest = hashlib.sha256()
        for tensor in self.state_dict().values():
            digest.update(tensor.cpu().numpy())
        return digest.hexdigest()


class DigitsFeatures(ClassifierFeatures):
    """FD-digits: of the built-in 8x8 digits, 32 features."""

    def __init__(self) -> None:
        hidden = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.SiLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(1024, 32),
            nn.SiLU(),
        )
        super().__init__("FD-digits", hidden, 32, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return float32 [n, 32] of uint8 [n, 1, 8, 8]. UsageError for images of another shape."""
        check_digits(tuple(images.shape[1:]))
        return super().forward(images)


def of_any_images(channels: int, classes: int) -> ClassifierFeatures:
    """Return the untrained network for images of any size: FD-classifier, 64 features."""
    hidden = nn.Sequential(
        nn.Conv2d(channels, 32, 5, stride=2, padding=2),
        nn.SiLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(64, 64, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(1024, 64),
        nn.SiLU(),
    )
    return ClassifierFeatures("FD-classifier", hidden, 64, classes)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# One thread: a network this small gains nothing from more, on a busy machine they took 65 s in place of 3 waiting for
# each other, and the space does not depend on their number.
@_one_thread()
@torch.enable_grad()
def _train(
    build: Callable[[], ClassifierFeatures], source: ImageSource, trained: Tensor, updates: int
) -> ClassifierFeatures:
    """Train a network on those images of the source, indices int64 [n]; the same on every call, global generators left alone."""
    with fixed_seed(SEED):
        network = build()
    optimizer = torch.optim.Adam(network.parameters())
    for update in range(updates):
        samples = torch.arange(update * BATCH_SIZE, (update + 1) * BATCH_SIZE)
        order = permutation(SEED, 1 + update * BATCH_SIZE // len(trained), len(trained))
        batch = source.take(trained[order[samples % len(trained)]])
        loss = F.cross_entropy(network.classify(network.hidden(PIXELS.encode(batch.x.cpu()))), batch.cond.cpu())
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - update / updates)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval().requires_grad_(False)


def train_digits_features() -> ClassifierFeatures:
    """Return the digits' feature space, in a few seconds on a CPU."""
    source = load_source("digits", image_size=8, channels=1)
    return _train(DigitsFeatures, source, permutation(SEED, 0, source.num_images)[:NUM_TRAINED], UPDATES)


def train_classifier_features(source: ImageSource) -> tuple[ClassifierFeatures, float]:
    """Return the feature space of labelled images, in a minute or two on a CPU, and its classifier's accuracy on a sixth of them, which it
    was not trained on."""
    order = permutation(SEED, 0, source.num_images)
    held_out = order[: max(1, round(HELD_OUT * source.num_images))]
    trained = order[len(held_out) :]
    updates = max(LEAST_UPDATES, EPOCHS * len(trained) // BATCH_SIZE)
    network = _train(lambda: of_any_images(source.shape[2], source.num_classes), source, trained, updates)
    right = 0
    for part in held_out.split(BATCH_SIZE):
        batch = source.take(part)
        said = network.logits(network(batch.x.permute(0, 3, 1, 2).cpu())).argmax(1)
        right += int((said == batch.cond.cpu()).sum())
    return network, right / len(held_out)


def classifier_features(source: ImageSource, world: World) -> ClassifierFeatures:
    """Return the feature space of the run's labelled images: trained by rank 0 and kept in the cache, by their contents; the same weights
    in all processes, which all must call it. UsageError where the images have no labels."""
    check_labels(source)
    state = world.run_on_rank0(lambda: _kept_or_trained(source))
    network = of_any_images(source.shape[2], source.num_classes).eval().requires_grad_(False)
    network.load_state_dict(load(state))
    return network


def check_labels(source: ImageSource) -> None:
    """Raise a UsageError for images without labels, or of one class."""
    if source.num_classes < 2:
        raise UsageError(
            f"--evaluation.features classifier is trained on the labels of {source.name}, which has "
            f"{'none' if source.num_classes == 0 else 'one class'}: label the images, or choose mobilenet"
        )


def _file(source: ImageSource) -> Path:
    key = f"{FORMAT} {source.identity.hashes.everything}"
    return cache_folder() / f"classifier-{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"


def _kept_or_trained(source: ImageSource) -> bytes:
    file = _file(source)
    expected = of_any_images(source.shape[2], source.num_classes).state_dict()
    if file.exists():
        try:
            kept = file.read_bytes()
            state = load(kept)
            if {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in expected.items()}:
                return kept
        except Exception:  # the reader raises many kinds
            pass
        warnings.warn(f"{file} is damaged or not readable: its classifier is trained again", stacklevel=2)
    print(f"pdfast: training the classifier of {source.name} whose features images are compared in, once", flush=True)
    network, accuracy = train_classifier_features(source)
    print(f"pdfast: the classifier is right on {accuracy:.1%} of the images that it was not trained on", flush=True)
    made = save({k: v.contiguous() for k, v in network.state_dict().items()}, {"accuracy": f"{accuracy:.4f}"})
    keep(file, made, "the classifier of the images")
    return made
