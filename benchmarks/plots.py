"""The rows of benchmarks.kernels as a figure. The only part that needs matplotlib."""

from pathlib import Path
from typing import Any

Row = dict[str, Any]

FORMATS = (".png", ".svg")


def write(file: Path, header: Row, rows: list[Row]) -> None:
    """A panel for each operation and mode: over its cases, the rate of each provider, with and without CUDA graph. TFLOP/s
    where there are matrix products, GB/s elsewhere; dashed, what the machine can do."""
    from matplotlib.figure import Figure

    panels: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if "unavailable" not in row:
            panels.setdefault((row["op"], row["mode"]), []).append(row)
    height = [2.5 + 0.14 * max(len(row["case"]) for row in panel) for panel in panels.values()]
    figure = Figure(figsize=(12, sum(height) or 2), layout="constrained")
    figure.suptitle(f"{header['device']}, torch {header['torch']}, triton {header['triton']}, {header['commit']}")
    for n, ((op, mode), panel) in enumerate(panels.items()):
        axes = figure.add_subplot(len(panels), 1, n + 1)
        _draw(axes, header, panel)
        axes.set_title(f"{op} {mode}", loc="left")
    figure.savefig(file)


def _draw(axes: Any, header: Row, rows: list[Row]) -> None:
    cases = list(dict.fromkeys(row["case"] for row in rows))
    key, unit, ceiling = ("gb_s", "GB/s", header["copy_gb_s"])
    if any(row["tflop_s"] for row in rows):
        key, unit, ceiling = "tflop_s", "TFLOP/s", header["matmul_tflop_s"]
    for provider, graph in dict.fromkeys((row["provider"], row["graph"]) for row in rows):
        of_it = [row for row in rows if (row["provider"], row["graph"]) == (provider, graph)]
        places, rates = [cases.index(row["case"]) for row in of_it], [row[key] for row in of_it]
        style = {"marker": "o", "linestyle": ":"} if graph else {"marker": "x", "linestyle": "-"}
        axes.plot(places, rates, label=f"{provider}{', graph' if graph else ''}", linewidth=0.8, **style)
    axes.axhline(ceiling, color="grey", linestyle="--", linewidth=0.8)
    axes.set_xticks(range(len(cases)), cases, rotation=90, fontsize=7)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(unit)
    axes.legend(fontsize=7, ncols=2)
