"""`python -m benchmarks.tables FILE ...`: what `benchmarks.first`, `.step`, `.kernels` and `.tune` wrote, as the tables of a page.

first     the convolutions of the ends; and each update by kind of work, a column a file: such as one before a change and one after
step      a row a variant
kernels   a row a case and mode, a column a provider, in microseconds; of those by a CUDA graph, where there are both
tune      a row a launch configuration that was tried
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.command import Parser
from benchmarks.first import KINDS


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("benchmarks.tables", description="Results as Markdown tables.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        files = {file.stem: json.loads(file.read_text()) for file in options.files}
        print("\n\n".join("\n".join(table) for table in tables(files)))
    except (OSError, ValueError, LookupError, TypeError) as error:
        parser.error(f"no file of these commands: {error!r}"[:200])
    return 0


def tables(files: dict[str, Any]) -> Iterator[list[str]]:
    """The tables of files by name, each a list of lines."""
    if updates := {name: found["update"] for name, found in files.items() if "update" in found}:
        yield from ends(next(found["rows"] for found in files.values() if "update" in found))
        yield list(by_kind(updates))
    for found in files.values():
        rows = [row for row in found["rows"] if "unavailable" not in row]
        if "images_per_second" in rows[0]:
            yield list(steps(rows))
        elif "table" in rows[0]:
            yield list(tuned(rows))
        elif "op" in rows[0]:
            yield list(kernels(rows))


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> Iterator[str]:
    """The first column to the left, the others to the right."""
    head = list(head)
    for cells in (head, ["---", *["---:"] * (len(head) - 1)], *rows):
        yield f"| {' | '.join(map(str, cells))} |"


def ends(rows: list[dict[str, Any]]) -> Iterator[list[str]]:
    """Nothing for a file from before its rows said by what."""
    if "by" in rows[0]:
        times: dict[str, dict[str, str]] = defaultdict(dict)
        for row in rows:
            times["{network} {end}, {of}".format(**row)][row["by"]] = f"{row['ms']:.3f}"
        columns = list(next(iter(times.values())))
        yield list(table(["ms", *columns], ([what, *found.values()] for what, found in times.items())))


def by_kind(updates: dict[str, Any]) -> Iterator[str]:
    rows: list[list[Any]] = [[kind, *(f"{update['kinds'][kind]:.2f}" for update in updates.values())] for kind in KINDS]
    rows.append(["all kernels", *(f"{update['kernels_ms']:.2f}" for update in updates.values())])
    rows.append(["an update, without the profiler", *(f"{update['median_ms']:.2f}" for update in updates.values())])
    rows.append(["kernels", *(sum(kernel["calls"] for kernel in update["kernels"]) for update in updates.values())])
    return table(["ms", *updates], rows)


def tuned(rows: list[dict[str, Any]]) -> Iterator[str]:
    head = ["case, forward and backward", "table", "row", "us", "registers"]
    tried = [row for row in rows if not row["rejected"]]
    shown = "{case}|{table}|{row}|{us:.0f}|{registers}"
    return table(head, (shown.format(**row, us=1e3 * row["median_ms"]).split("|") for row in tried))


def steps(rows: list[dict[str, Any]]) -> Iterator[str]:
    head = ["preset", "images", "provider", "variant", "images/s", "ms an update", "TFLOP/s", "MFU", "MiB"]
    shown = "{preset}|{batch}|{provider}|{variant}|{images_per_second:.0f}|{median_ms:.1f}|{tflop_s:.0f}|{mfu:.1%}|{peak_mib:.0f}"
    return table(head, (shown.format(**row).split("|") for row in rows))


def kernels(rows: list[dict[str, Any]]) -> Iterator[str]:
    """With pdfast's share of the ceiling that bounds it: the copy's rate or that of products, whichever is the larger share."""
    times: dict[tuple[str, str], dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in sorted(rows, key=lambda row: row["graph"]):
        times[f"{row['op']} {row['case']}", row["mode"]][row["provider"]] = row
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    lines = []
    for (case, mode), found in times.items():
        shown = [f"{1e3 * found[p]['median_ms']:.1f}" if p in found else "" for p in providers]
        ours = found.get("pdfast")
        bound = max(("copy", "matmul"), key=lambda of: ours[f"of_{of}"]) if ours else ""
        lines.append([case, mode, *shown, f"{ours[f'of_{bound}']:.0%} of {bound}" if ours else ""])
    return table(["us", "mode", *providers, "pdfast's share"], lines)


if __name__ == "__main__":
    sys.exit(main())
