"""`labels.csv`: lines of NAME,LABEL for the image files beside it."""

import codecs
import csv
import io
import unicodedata
import warnings
from collections.abc import Iterator
from pathlib import Path

from pdfast.data.encoded import label_from
from pdfast.data.source import LARGEST_LABEL, NUMBERED
from pdfast.io.errors import UsageError

LABEL_FILE = "labels.csv"
BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def labels_of(path: Path, names: list[str]) -> list[int]:
    """Return the label of each name, -1 where the file has none.

    Names are compared as their bytes are, else in Unicode's composed form, for macOS takes them apart. UsageError for a row
    of another form, a label that numbers no class, a name with two labels, or where no row is of an image; a warning where some are not.
    """
    text = _text(path)
    label_of: dict[str, int] = {}
    known = set(names)
    for row, name, label in _rows(path, text, known):
        if label > LARGEST_LABEL:
            raise UsageError(f"{path}, row {row}: {name!r} has the label {label}: {NUMBERED}")
        if label_of.setdefault(name, label) != label:
            raise UsageError(
                f"{path}, row {row}: {name!r} has the label {label} and, above, {label_of[name]}: leave one"
            )
    composed = {_composed(name): label for name, label in label_of.items()}
    known_composed = {_composed(name) for name in names}
    unknown = [name for name in label_of if name not in known and _composed(name) not in known_composed]
    if len(unknown) == len(label_of):
        such = f", but such as {unknown[0]!r}" if unknown else ""
        raise UsageError(f"{path} names none of the {len(names)} images beside it{such}: they are called {names[0]!r}")
    if unknown:
        warnings.warn(
            f"{len(unknown)} of {len(label_of)} names of {path} are of no image: {unknown[0]!r}", stacklevel=2
        )
    return [label_of.get(name, composed.get(_composed(name), -1)) for name in names]


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _text(path: Path) -> str:
    """UTF-8, or UTF-16 with its mark, as Excel writes it. Other bytes are kept as they are in names of files."""
    content = path.read_bytes()
    encoding = next((encoding for bom, encoding in BOMS.items() if content.startswith(bom)), "utf-8")
    try:
        text = content.decode(encoding, errors="strict" if encoding == "utf-16" else "surrogateescape")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UsageError(f"{path} is no text: save it as CSV in UTF-8")
    return text


def _rows(path: Path, text: str, known: set[str]) -> Iterator[tuple[int, str, int]]:
    """Yield the number of the line, from 1, name and label of each; a header, which names no image, and blank lines are
    passed over."""
    rows = csv.reader(io.StringIO(text, newline=""))
    first = True
    while True:
        try:
            fields = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise UsageError(f"{path}, row {rows.line_num}: {error}, so it is not NAME,LABEL") from None
        if not any(field.strip() for field in fields):
            continue
        label = label_from(fields[1]) if len(fields) == 2 else None
        if label is not None:
            yield rows.line_num, fields[0], label
        elif not (first and len(fields) == 2 and fields[0] not in known):
            row = ",".join(fields)
            raise UsageError(f"{path}, row {rows.line_num}: {row[:100]!r} is not NAME,LABEL with a label from 0")
        first = False
