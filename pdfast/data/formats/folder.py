"""Image files in a folder, whose subfolders or `labels.csv` are their classes."""

import csv
from pathlib import Path

from pdfast.data.encoded import FILES, EncodedImages
from pdfast.data.pictures import SUFFIXES
from pdfast.errors import UsageError

LABEL_FILE = "labels.csv"


def from_folder(folder: Path) -> EncodedImages:
    """Where the files lie in subfolders these are the classes, numbered in the order of their names; deeper folders and
    hidden files are passed over."""
    top = _image_files(folder)
    subfolders = sorted(child for child in folder.iterdir() if child.is_dir() and child.name[0] != ".")
    classes = [files for child in subfolders if (files := _image_files(child))]
    label_of = _label_file(folder / LABEL_FILE)
    if top and classes:
        raise UsageError(f"{folder} has images both at its top and in subfolders: put all into class folders, or none")
    if not top and not classes:
        suffixes = ", ".join(sorted(SUFFIXES))
        raise UsageError(f"{folder} holds no image files, directly or one folder down: give one that does ({suffixes})")
    found = EncodedImages(FILES)
    for label, files in enumerate(classes) if classes else [(-1, top)]:
        for file in files:
            name = str(file.relative_to(folder))
            if label_of is not None:
                label = label_of.get(name, -1)
            found.files.append(file)
            found.add(name, label, 0, file.stat().st_size)
    return found.done()


def _image_files(folder: Path) -> list[Path]:
    # macOS leaves a hidden ._NAME.png beside NAME.png on foreign disks, which is no image.
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and f.name[0] != "." and f.is_file())


def _label_file(path: Path) -> dict[str, int] | None:
    if not path.exists():
        return None
    with open(path, newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    if rows and len(rows[0]) == 2 and not rows[0][1].strip().lstrip("-").isdigit():
        rows = rows[1:]  # a header
    for number, row in enumerate(rows, 1):
        if len(row) != 2 or not row[1].strip().lstrip("-").isdigit():
            raise UsageError(f"{path}, row {number}: {','.join(row)!r} is not NAME,LABEL with a label from 0")
    return {name: int(label) for name, label in rows}
