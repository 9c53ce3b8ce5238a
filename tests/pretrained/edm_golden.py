"""What EDM's own code computes, in a few numbers; its networks are needed only to make them:

    git clone https://github.com/NVlabs/edm && git -C edm checkout 008a4e5
    PYTHONPATH=.:kernels:edm python -m tests.pretrained.edm_golden > tests/pretrained/edm_golden.json

Weights and inputs are functions of their names and indices, so that no file of them is needed.
"""

import itertools
import json
import math
import zlib

import numpy as np
import torch

SIZE, CHANNELS, CLASSES = 8, 3, 5
SIGMAS = (0.002, 0.07, 0.5, 3.0, 80.0)
EULER = (80.0, 9.0, 2.0, 0.6, 0.1, 0.0)
SONG = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
NCSNPP = {
    "embedding_type": "fourier",
    "channel_mult_noise": 2,
    "encoder_type": "residual",
    "resample_filter": [1, 3, 3, 1],
}
SETTINGS = {
    "DDPM++": SONG | {"augment_dim": 9, "dropout": 0.13},
    "DDPM++, deeper": SONG | {"channel_mult": [2, 1, 2], "num_blocks": 2, "attn_resolutions": [8, 2]},
    "NCSN++": SONG | NCSNPP | {"channel_mult": [1, 2, 2], "augment_dim": 9},
    "NCSN++, filter of DDPM++": SONG | NCSNPP | {"resample_filter": [1, 1]},
    "ADM": {"model_channels": 32, "channel_mult": [1, 4], "num_blocks": 1, "attn_resolutions": [4]},
    "ADM, deeper": {"model_type": "DhariwalUNet", "model_channels": 32, "channel_mult": [2, 1, 2], "num_blocks": 2}
    | {"attn_resolutions": [8], "sigma_data": 0.4},
}


def numbers(name: str, *shape: int) -> torch.Tensor:
    """Of the name and the index alone, as if drawn from [-1, 1]: float32."""
    mixed = (np.arange(math.prod(shape), dtype=np.uint64) + zlib.crc32(name.encode())) * 2654435761 % 2**32
    mixed = (mixed ^ mixed >> 15) * 2246822519 % 2**32
    return torch.tensor(mixed / 2.0**31 - 1).float().reshape(shape)


def weight(name: str, *shape: int) -> torch.Tensor:
    values = numbers(name, *shape)
    if name.endswith("freqs"):
        return 16 * values
    if len(shape) == 1:
        return 0.3 * values + (1 if "norm" in name and name.endswith("weight") else 0)
    return values * math.sqrt(3 / math.prod(shape[1:]))


def given(name: str, labelled: bool) -> dict:
    """The arguments of EDMPrecond."""
    return {"img_resolution": SIZE, "img_channels": CHANNELS, "label_dim": CLASSES if labelled else 0, **SETTINGS[name]}


def noisy() -> torch.Tensor:
    """At each of SIGMAS."""
    return numbers("images", len(SIGMAS), CHANNELS, SIZE, SIZE) * torch.tensor(SIGMAS).add(1).view(-1, 1, 1, 1)


def labels() -> torch.Tensor:
    return torch.arange(len(SIGMAS)) % CLASSES


def noise() -> torch.Tensor:
    return numbers("noise", 2, CHANNELS, SIZE, SIZE)


def some(images: torch.Tensor) -> torch.Tensor:
    """A few values of each image."""
    return images.flatten(1)[:, 5::47]


@torch.no_grad()
def computed(name: str, labelled: bool) -> dict:
    from training.networks import EDMPrecond

    network = EDMPrecond(**given(name, labelled)).eval()
    for key, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if not key.endswith("resample_filter"):
            tensor.copy_(weight(key, *tensor.shape))
    one_hot = torch.eye(CLASSES)[labels()] if labelled else None
    x = noise().double() * EULER[0]
    for sigma, following in itertools.pairwise(EULER):
        denoised = network(x, torch.tensor(sigma), one_hot[:2] if labelled else None).double()
        x = x + (following - sigma) * (x - denoised) / sigma
    images = {"denoised": network(noisy(), torch.tensor(SIGMAS), one_hot), "sampled": x}
    if labelled:
        images["denoised without labels"] = network(noisy(), torch.tensor(SIGMAS))
    return {key: [[float(f"{v:.8g}") for v in row] for row in some(image).tolist()] for key, image in images.items()}


if __name__ == "__main__":
    results = {name: {key: computed(name, key == "labels") for key in ("no labels", "labels")} for name in SETTINGS}
    print("{" + ",\n".join(f"{json.dumps(name)}: {json.dumps(result)}" for name, result in results.items()) + "}")
