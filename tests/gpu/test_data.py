"""Images on their way to a GPU: from the host's memory, and decoded on the GPU."""

import numpy as np
import pytest
import torch

from pdfast.data import ResidentImages, dali, load_source, source
from tests.data.files import encoded

pytestmark = pytest.mark.gpu


def test_from_the_hosts_memory(monkeypatch):
    """Where the GPU has no room the batches are those that it would have kept."""
    images = torch.randint(0, 256, (100, 8, 8, 3), dtype=torch.uint8)
    labels = torch.arange(100)
    on_gpu = ResidentImages("set", images, labels, "cuda")
    monkeypatch.setattr(source, "SHARE_OF_GPU", 0.0)
    on_host = ResidentImages("set", images, labels, "cuda")
    assert "host" in on_host.description and "host" not in on_gpu.description
    theirs, ours = (s.stream(torch.arange(32), 32, 0, 5) for s in (on_gpu, on_host))
    for _ in range(20):
        a, b = next(theirs), next(ours)
        assert b.x.is_cuda and torch.equal(a.x, b.x) and torch.equal(a.cond, b.cond)


@pytest.mark.skipif(dali.missing() is not None, reason=str(dali.missing()))
def test_decoded_by_dali_on_the_gpu(tmp_path):
    """Within a few levels of Pillow, and one bad image does not end it."""
    rng = np.random.default_rng(0)
    for i in range(16):
        small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        (tmp_path / f"{i:02}.jpg").write_bytes(encoded(small.repeat(16, 0).repeat(16, 1), "JPEG"))
    (tmp_path / "07.jpg").write_bytes((tmp_path / "08.jpg").read_bytes()[:-200])
    batches = []
    for loader in ("portable", "dali"):
        opened = load_source(str(tmp_path), image_size=32, channels=3, device="cuda", loader=loader, max_bad=0.1)
        stream = opened.stream(torch.arange(8), 8, 0, 0)
        batches.append(torch.cat([next(stream).x for _ in range(4)]).int())
    difference = (batches[0] - batches[1]).abs().float()
    assert (
        difference.mean() < 1 and difference.max() <= 24
    )  # the GPU's decoder has another inverse transform and upsampling
