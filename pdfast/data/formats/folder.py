"""Image files in a folder, whose subfolders or `labels.csv` are their classes."""

from pathlib import Path

from pdfast.data.encoded import FILES, EncodedImages
from pdfast.data.formats.label_file import LABEL_FILE, labels_of
from pdfast.data.formats.names import hidden, in_words, what_is
from pdfast.data.pictures import SUFFIXES
from pdfast.io.errors import UsageError


def look_into(folder: Path) -> tuple[list[Path], dict[Path, list[Path]]]:
    """Return the image files at a folder's top, and those in each of its subfolders, in the order of their names; deeper
    folders and what is hidden are passed over."""
    subfolders = sorted(child for child in folder.iterdir() if child.is_dir() and not hidden(child.name))
    return _image_files(folder), {child: _image_files(child) for child in subfolders}


def from_folder(folder: Path, top: list[Path], classes: dict[Path, list[Path]]) -> EncodedImages:
    """Of what `look_into` found. Where the files lie in subfolders, all of these are the classes, numbered in the order of
    their names."""
    inside = [file for files in classes.values() for file in files]
    if top and inside:
        raise UsageError(f"{folder} has images both at its top and in subfolders: put all into class folders, or none")
    files = top or inside
    names = [file.name for file in top]
    names += [f"{child.name}/{file.name}" for child, files_in in classes.items() for file in files_in]
    if (folder / LABEL_FILE).exists():
        labels = labels_of(folder / LABEL_FILE, names)
    elif top:
        labels = [-1] * len(files)
    else:
        _refuse_empty(classes)
        labels = [label for label, files in enumerate(classes.values()) for _ in files]
    found = EncodedImages(FILES)
    for file, name, label in zip(files, names, labels, strict=True):
        found.files.append(file)
        found.add(name, label, 0, file.stat().st_size)
    return found.done()


def _refuse_empty(classes: dict[Path, list[Path]]) -> None:
    """Left out, an empty class would give its number to the next one."""
    empty = [child for child, files in classes.items() if not files]
    if empty:
        others = f" ({len(empty) - 1} more subfolders neither)" if len(empty) > 1 else ""
        raise UsageError(
            f"{empty[0]} holds no image files, only {found_in(empty[0])}{others}, and all subfolders are classes: put its "
            "images into it, or remove it"
        )


def _image_files(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if _is_image(child))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not hidden(path.name) and path.is_file()


def found_in(folder: Path) -> str:
    """Return what there is in it, and in its subfolders, for people."""
    top = [child for child in folder.iterdir() if not hidden(child.name)]
    down = [file for child in top if child.is_dir() for file in child.iterdir() if not hidden(file.name)]
    return in_words([*map(what_is, top), *(f"deeper {what_is(f)}" if f.is_dir() else what_is(f) for f in down)])
