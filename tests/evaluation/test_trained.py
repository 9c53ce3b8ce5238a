"""The feature space that is trained on the run's own labels: learned, deterministic, kept by contents, refused without labels."""

import numpy as np
import pytest
import torch

from pdfast.data import ResidentImages
from pdfast.engine.world import World
from pdfast.evaluation import trained
from pdfast.io.errors import UsageError
from tests.commands import TINY_DISTILL, call, one_line

ALONE = World(torch.device("cpu"))


def source(seed=0, labelled=True, n=600):
    """Stripes across or along, with noise: uint8 [n, 12, 12, 1]."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, n)
    stripes = 60 * (np.arange(12) % 4 < 2)
    images = np.where(labels[:, None, None] == 1, stripes[None, :, None], stripes[None, None, :])
    images = (images + generator.integers(0, 150, (n, 12, 12)))[..., None].astype(np.uint8)
    return ResidentImages("stripes", torch.from_numpy(images), torch.from_numpy(labels) if labelled else None)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PDFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(trained, "LEAST_UPDATES", 60)
    return tmp_path / "cache"


def test_it_tells_the_classes_apart_and_is_kept(cache, capsys, monkeypatch):
    space = trained.classifier_features(source(), ALONE)
    said = capsys.readouterr().out
    accuracy = float(said.split("right on ")[1].split("%")[0])
    assert accuracy > 95
    images = source(1).take(torch.arange(200))
    features = space(images.x.permute(0, 3, 1, 2))
    assert features.shape == (200, 64) and not features.requires_grad and space.name == "FD-classifier"
    assert (space.logits(features).argmax(1) == images.cond).float().mean() > 0.95

    def again(*_):
        raise AssertionError("it is kept")

    (file,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(trained, "train_classifier_features", again)
        assert trained.classifier_features(source(), ALONE).sha256 == space.sha256
        with pytest.raises(AssertionError, match="it is kept"):
            trained.classifier_features(source(2), ALONE)  # other contents, another classifier
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="is damaged or not readable: its classifier is trained again"):
        assert trained.classifier_features(source(), ALONE).sha256 == space.sha256
    assert len(list(cache.iterdir())) == 1


def test_labels_are_needed(cache, tmp_path, capsys):
    with pytest.raises(UsageError, match="trained on the labels of stripes, which has none"):
        trained.classifier_features(source(labelled=False), ALONE)
    np.savez(tmp_path / "images.npz", images=np.zeros((200, 8, 8, 1), np.uint8))
    run = ["--data", str(tmp_path / "images.npz"), "--run", str(tmp_path / "run"), *TINY_DISTILL]
    one_line(capsys, call("distill", *run, "--evaluation.features", "classifier"), 2, "classifier", "which has none")
    assert not (tmp_path / "run").exists()


def test_a_run_is_evaluated_in_it(cache, tmp_path):
    run = tmp_path / "run"
    assert (
        call(
            "distill",
            *TINY_DISTILL,
            "--evaluation.features",
            "classifier",
            "--evaluation.num-samples",
            "80",
            "--run",
            str(run),
        )
        == 0
    )
    assert "FD-classifier" in (run / "report.html").read_text()
    assert call("evaluate", str(run), "--steps", "1") == 0
