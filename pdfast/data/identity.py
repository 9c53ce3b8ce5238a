"""What encoded images are known by: SHA-256 of contents and labels in their order, wherever they lie and whatever they are called."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import torch

from pdfast.data.encoded import EncodedImages
from pdfast.data.pictures import BadImage, Size
from pdfast.data.source import Hashes
from pdfast.diffusion.noise import permutation

EVERYTHING = 1 << 31  # bytes of encoded images up to which all are read; of a larger set, a sample of as many
SEED = 0  # of the sample
CHUNK = 256  # images that a thread reads at a time


def of_files(encoded: EncodedImages, size: Size, channels: int) -> Hashes:
    """Of encoded images, as they are decoded at that size: all sizes and labels, and the bytes of all images where they are
    no more than `EVERYTHING`, else those of a sample that is spread evenly."""
    sizes = encoded.places[:, 2]
    everything, images = (
        hashlib.sha256(f"encoded {size} {channels} {labels is not None}\n".encode() + sizes.tobytes())
        for labels in (encoded.labels, None)
    )
    if encoded.labels is not None:
        everything.update(encoded.labels.tobytes())
    count, total = len(encoded), int(sizes.sum())
    if total > EVERYTHING:
        sample = permutation(SEED, 0, count)[: max(1, count * EVERYTHING // total)]
    else:
        sample = torch.arange(count)
    chunks = sample.sort().values.split(CHUNK)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for part in pool.map(lambda chunk: contents(encoded, chunk.tolist()), chunks):
            everything.update(part)
            images.update(part)
    return Hashes(everything.hexdigest(), images.hexdigest())


def contents(encoded: EncodedImages, indices: list[int]) -> bytes:
    """Return the SHA-256 of each of these images' bytes, 32 bytes an image; zeros where they cannot be read."""

    def of_one(i: int) -> bytes:
        try:
            return hashlib.sha256(encoded.read(i)).digest()
        except BadImage:
            return bytes(32)

    return b"".join(map(of_one, indices))


def of_names(encoded: EncodedImages, size: Size, channels: int) -> str:
    """As the version before computed it of encoded images: of names, places, sizes and labels."""
    digest = hashlib.sha256(f"{size} {channels}\n".encode())
    digest.update("\n".join(encoded.names).encode(errors="surrogateescape"))
    digest.update(encoded.places.data)
    if encoded.labels is not None:
        digest.update(encoded.labels.data)
    return digest.hexdigest()
