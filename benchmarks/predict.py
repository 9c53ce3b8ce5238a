"""`python -m benchmarks.predict`: how long an update would take on a GPU, predicted without one, beside what such a GPU has measured.

A row is a kind of work, as in `benchmarks.first`, with the float32 ends of the network by themselves. The floor is the time of five
forwards (two of the teacher, three for the student's forward and backward) at the peak that the maker states, and MFU its share.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import ROOT, Parser, Report, Row, count, header
from benchmarks.first import kind_of
from pdfast.engine.cost import parameters_and_flops
from pdfast.plan.cost import Job
from pdfast.plan.gpu import FITTED, GPUS, seconds_of_update
from pdfast.recipes import PRESETS
from pdfast.report.plots import STUDENT, TEACHER, svg

ENDS = "f32f32_f32f32|sgemm|float_nhwc|<float, float, |winograd|wgrad_alg1|ReduceOp<float|elementwise_kernel<128, 2, "
"""What the name of a kernel of the float32 ends has in it."""
CHANGED = ("ends", "group_norm", "attention", "compiled by Inductor", "copies", "in all")
"""Kinds whose code is another than that of results whose names end in `before`."""


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("benchmarks.predict", description="An update's time on a GPU by kind of work, predicted.")
    parser.add_argument("--preset", choices=PRESETS, default="cifar10")
    parser.add_argument("--batch", type=count, default=128, metavar="N", help="images an update")
    parser.add_argument("--gpu", choices=GPUS, default="h200")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the kinds as an SVG")
    parser.add_json()
    options = parser.parse(arguments)
    gpu, network = GPUS[options.gpu], PRESETS[options.preset].network
    seconds = seconds_of_update(gpu, Job(network, torch.bfloat16, options.batch))
    total, flops = sum(seconds.values()), 5 * options.batch * parameters_and_flops(network)[1]
    file, seen = measured(options.gpu, options.preset, options.batch)
    before = file is not None and file.stem.endswith("before")
    said = {"preset": options.preset, "batch": options.batch, "predicted for": gpu.title, "fitted to": FITTED}
    said |= {"measured": str(file.relative_to(ROOT))} if file else {}
    numbers = "{predicted_ms:9.2f} ms predicted" + "{measured_ms:9.2f} measured {ratio:6.2f} of it {note}" * bool(seen)
    report = Report(options.json, said | header(), "{kind:<22}", numbers)
    for kind, of_kind in (seconds | {"in all": total}).items():
        row: Row = {"kind": kind, "predicted_ms": 1e3 * of_kind, "note": "*" if before and kind in CHANGED else ""}
        report.add(row | ({"measured_ms": seen[kind], "ratio": row["predicted_ms"] / seen[kind]} if seen else {}))
    if before:
        print("* measured before these kernels were changed: a prediction is of the present code")
    rates = {"tflop_s": flops / total / 1e12, "mfu": flops / gpu.flops / total, "floor_ms": 1e3 * flops / gpu.flops}
    print("{tflop_s:.0f} TFLOP/s, MFU {mfu:.1%}; floor, 5 forwards at the peak: {floor_ms:.2f} ms".format(**rates))
    report.write(**rates)
    if options.plot:
        title = f"{options.preset}, {options.batch} images, {gpu.title}"
        options.plot.write_text(svg(lambda axes: draw(axes, report.rows, title)))
    return 0


def measured(gpu: str, preset: str, batch: int) -> tuple[Path | None, dict[str, float]]:
    """The newest result of such an update, and its milliseconds by kind; no file and nothing where there is none."""
    folder = ROOT / "benchmarks" / "results" / gpu
    found = {file: json.loads(file.read_text()) for file in folder.glob("*.json")}
    of = {"preset": preset, "batch": batch}.items()
    if not (fitting := [file for file in found if of <= found[file].get("update", {}).items()]):
        return None, {}
    file = max(fitting, key=lambda file: found[file]["header"]["date"])
    update = found[file]["update"]
    seen = {"ends": 0.0, **update["kinds"], "in all": update["median_ms"]}
    seen["between kernels"] = update["median_ms"] - update["kernels_ms"]
    for kernel in update["kernels"]:
        if re.search(ENDS, kernel["name"], re.IGNORECASE):
            seen["ends"] += kernel["ms"]
            seen[kind_of(kernel["name"])] -= kernel["ms"]
    return file, seen


def draw(axes: Any, rows: list[Row], title: str) -> None:
    """A bar a kind, and below it what was measured, where something was."""
    for key, up, colour in (("predicted_ms", 0.2, STUDENT), ("measured_ms", -0.2, TEACHER)):
        if key in rows[0]:
            places = [up - place for place in range(len(rows))]
            axes.barh(places, [row[key] for row in rows], 0.4, color=colour, label=key.removesuffix("_ms"))
    axes.set_yticks([-place for place in range(len(rows))], [row["kind"] for row in rows])
    axes.set_xlabel(f"ms an update: {title}")
    axes.legend(frameon=False)


if __name__ == "__main__":
    sys.exit(main())
