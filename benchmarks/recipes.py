"""What should a budget be spent on? Ways to distill the digits at the same cost, from the same teachers, by seed.

    python -m benchmarks.recipes --seeds 0 1 2 --runs runs/recipes --json recipes.json
    python -m benchmarks.recipes --seeds 3 4 5 --variants halving pairs --cost 0.25 1 4 --runs runs/recipes --json recipes.json

The teacher of a seed is trained once. A run that is finished is read, one that was stopped goes on. The cost of a variant is that
of its rounds in thousand F, forwards of one image (3 with the backward), what it draws before included; --cost multiplies updates and
kept targets. Rows are by variant, cost, seed and step count; --plot draws the mean distance against the cost.
"""

import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import Parser, Report, Row, header
from pdfast.config import DistillConfig
from pdfast.evaluation.stored import read_metrics
from pdfast.io.plain import structure
from pdfast.io.reading import load_yaml
from pdfast.io.text import count_steps
from pdfast.methods import method_of_round
from pdfast.report.plots import logarithmic, svg

FOR_HALVING = (
    "--plan 256,128,64,32,16,8,4,2,1 --batch-size 128 --method progressive --learning-rate 5e-4 "
    "--updates 50,16:75,8:100,4:150,2:300,1:600"
)
SMALLER = "--batch-size 64 --learning-rate 2.5e-4 --learning-rate-at 8:2e-3,4:2e-3,2:2e-3,1:2e-3"
PAIRS = (
    f"--plan 256,128,64,32,16,8,4,2,1 {SMALLER} --method progressive,8:pairs,4:pairs,2:pairs,1:pairs --kept.pair-steps 8 "
    "--kept.count 32768 --updates 50,8:398,4:563,2:797,1:1127"
)
AT_HALF_RATE = f"{PAIRS} --learning-rate-at 8:1e-3,4:1e-3,2:1e-3,1:1e-3"
SQUARED = f"{AT_HALF_RATE} --kept.huber 0 --kept.pair-steps 16 --kept.count 16384 --updates 50,8:350,4:500,2:725,1:1310"
VARIANTS = {
    "halving": FOR_HALVING,
    "halving, three times the rate": f"{FOR_HALVING} --learning-rate 1.5e-3",
    "halving, batches of 64": f"{FOR_HALVING} --batch-size 64 --learning-rate 2.5e-4 --updates 100,16:150,8:200,4:300,2:600,1:1200",
    "factor 4": f"{FOR_HALVING} --plan 256,64,16,4,1 --updates 50,16:80,4:250,1:600",
    "closure": f"{FOR_HALVING} --plan 256,16,1 --method tract --ema 0.99 --updates 225,1:1150",
    "closure from 8": f"{FOR_HALVING} --method progressive,4:tract,2:tract,1:tract --ema 0.9",
    "consistency distillation": f"{FOR_HALVING} --plan 256,1 --method tract --tract.grids 64 --tract.ema 0.95 --ema 0.99 --updates 1375",
    "kept targets, 4 times": f"{FOR_HALVING} --kept.reuse 4 --kept.count 4096 --updates 64,16:96,8:144,4:215,2:430,1:860",
    "pairs": PAIRS,
    "pairs, squared": SQUARED,
    "pairs, squared, twice the rate": f"{SQUARED} --learning-rate-at 8:2e-3,4:2e-3,2:2e-3,1:2e-3",
    "pairs, squared, twice as many": f"{SQUARED} --kept.pair-steps 8 --kept.count 32768",
    "pairs, squared, updates as 1 / steps": f"{SQUARED} --updates 50,8:190,4:385,2:770,1:1540",
    "pairs, squared, equal updates": f"{SQUARED} --updates 50,8:721,4:721,2:721,1:721",
    "pairs of the 8-step student": f"{FOR_HALVING} --method progressive,4:pairs,2:pairs,1:pairs --kept.pair-steps None --kept.count 16384 {SMALLER} "
    "--updates 100,16:150,8:200,4:400,2:800,1:1600",
    "pairs, half of them": f"{PAIRS} --kept.count 16384 --updates 50,8:481,4:681,2:963,1:1362",
    "pairs, three halves of them, half the rate": f"{AT_HALF_RATE} --kept.count 49152 --updates 50,8:270,4:385,2:555,1:1000",
    "pairs, half the rate": AT_HALF_RATE,
    "pairs from 4 down": f"{PAIRS} --method progressive,4:pairs,2:pairs,1:pairs --learning-rate-at 4:2e-3,2:2e-3,1:2e-3 --updates 50,8:200,4:583,2:817,1:1150",
    "pairs alone": f"{PAIRS} --plan 256,8,4,2,1 --method pairs --updates 444,4:628,2:889,1:1257",
    "pairs, EMA": f"{PAIRS} --ema 0.99",
    "pairs, error of v": f"{PAIRS} --weighting snr_plus_one",
    "pairs, truncated SNR": f"{PAIRS} --weighting truncated_snr",
    "halving, pseudo-Huber": f"{FOR_HALVING} --huber 0.01",
    "closure from 8, pseudo-Huber": f"{FOR_HALVING} --method progressive,4:tract,2:tract,1:tract --ema 0.9 --huber 0.01",
    "x": f"{PAIRS} --network.prediction x",
    "eps, from u = 0.95": f"{PAIRS} --network.prediction eps --schedule.u-start 0.95",
    "both": f"{PAIRS} --network.prediction both",
    "flow": f"{PAIRS} --network.prediction flow",
    "v, teacher's truncated SNR": f"{PAIRS} --train.weighting truncated_snr",
    "v, teacher's error of x": f"{PAIRS} --train.weighting x_mse",
}
"""Flags of pdfast.distill at the cost of the halving, 880 thousand F; of a flag that is given twice the last counts. Those of the
teacher's network or training give a variant a teacher of its own."""
COMMANDS = {"consistency distillation": "benchmarks.consistency"}
"""Of variants that are not pdfast.distill's."""


def scaled(flags: str, cost: float) -> list[str]:
    """Return the flags for another cost: so many times the updates and the kept targets."""

    def times(match: re.Match[str]) -> str:
        return f"{match[1]}{max(1, round(int(match[2]) * cost))}"

    flags = re.sub(r"(--kept.count )(\d+)", times, flags)
    tables = re.findall(r"--updates (\S+)", flags)
    updates = re.sub(r"(^|,|:)(\d+)(?=,|$)", times, tables[-1])
    return [*flags.split(), "--updates", updates]


def cost_of(config: DistillConfig) -> float:
    """Return what the rounds cost, in forwards of one image."""
    total = 0.0
    for steps in config.round_steps:
        method = method_of_round(config, steps)
        images = config.updates_at(steps) * config.batch_size
        total += images * method.round_cost(config, steps).flops + method.evaluations_before(config, steps)
    return total


def run(module: str, *flags: str) -> None:
    """Run a command to its end."""
    subprocess.run([sys.executable, "-m", module, *flags], check=True, stdout=subprocess.DEVNULL)


def rows_of(variant: str, cost: float, seed: int, folder: Path) -> list[Row]:
    """Return one row a step count of a finished run."""
    plain = load_yaml(folder / "config.yaml")
    names = DistillConfig.__dataclass_fields__
    config = structure(DistillConfig, {k: v for k, v in plain.items() if k in names}, str(folder))
    teacher = read_metrics(config.folder.teacher)
    first, rows = teacher["evaluation"][0], []
    for steps in config.round_steps:
        metrics = read_metrics(config.folder.student(steps))
        (measured,) = metrics["evaluation"]
        row = {"variant": variant, "cost": cost, "seed": seed, "steps": steps, "kF": round(cost_of(config) / 1e3)}
        row |= {"fd": measured["fd"], "teacher_fd": first["fd"], "real_fd": teacher["floor"]}
        row |= {
            "ratio": measured["fd"] / first["fd"],
            "seconds": metrics["training"]["seconds"],
            "commit": metrics["commit"],
        }
        rows.append(row | {name: measured.get(name) for name in KEPT})
    return rows


KEPT = ("psnr", "feature_distance", "diversity_ratio", "contrast_ratio")
"""Of a student's metrics, how near its images are to the teacher's."""


def summary(rows: list[Row], steps: tuple[int, ...] = (8, 4, 2, 1)) -> str:
    """Return a table in Markdown: the mean ratio to the teacher's distance, and its deviation over seeds, by variant and cost."""
    lines = [f"| variant | kF | seeds |{''.join(f' {n} |' for n in steps)}", "|---|---:|---:|" + "---:|" * len(steps)]
    for variant, kilo in dict.fromkeys((row["variant"], row["kF"]) for row in rows):
        here = [row for row in rows if (row["variant"], row["kF"]) == (variant, kilo)]
        cells = []
        for n in steps:
            ratios = [row["ratio"] for row in here if row["steps"] == n]
            spread = f" ± {statistics.stdev(ratios):.2f}" if len(ratios) > 1 else ""
            cells.append(f"{statistics.mean(ratios):.2f}{spread}" if ratios else "–")
        seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in here}))
        lines.append(f"| {variant} | {kilo:,} | {seeds} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: list[Row], steps: int = 1) -> str:
    """Return an SVG: the mean ratio to the teacher's distance against the cost, one curve a variant."""
    curves: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row["steps"] == steps:
            curves.setdefault(row["variant"], {}).setdefault(row["kF"], []).append(row["ratio"])

    def draw(axes: Any) -> None:
        import matplotlib.ticker

        colours = matplotlib.colormaps["tab20"]
        for i, (name, points) in enumerate(curves.items()):
            costs = sorted(points)
            axes.plot(
                costs,
                [statistics.mean(points[c]) for c in costs],
                marker="o",
                markersize=4,
                color=colours(i % 20),
                label=name,
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda value, place: f"{value:,.0f}")
        axes.xaxis.set_minor_formatter("")
        logarithmic(axes)
        axes.set_xlabel("cost of all rounds, thousand forwards of an image")
        axes.set_ylabel(f"FD at {count_steps(steps)} / the teacher's")
        axes.legend(frameon=False, fontsize=7, ncols=2)

    return svg(draw)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("benchmarks.recipes", description="Ways to distill the digits, at the same cost.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument(
        "--cost", nargs="+", type=float, default=[1.0], metavar="X", help="times that of today's halving"
    )
    parser.add_argument("--runs", type=str, default="runs/recipes", metavar="FOLDER", help="of the runs")
    parser.add_argument("--list", action="store_true", help="print the variants' flags, and run nothing")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="SVG of distance against cost")
    parser.add_json()
    options = parser.parse(arguments)
    if options.list:
        print("\n".join(f"{name}: {VARIANTS[name]}" for name in options.variants))
        return 0
    runs = Path(options.runs)
    start, numbers = (
        "{variant}, {cost:g} x, seed {seed}, {steps} steps:",
        "FD {fd:.3f}, {ratio:.2f} times the teacher's",
    )
    report = Report(options.json, header(torch.device("cpu")), start, numbers)
    for seed in options.seeds:
        teacher = runs / f"teacher-{seed}"
        job = ["--preset", "digits", "--seed", str(seed)]
        if not (teacher / "teacher").exists():
            run("pdfast.train", *job, "--run", str(teacher))
        for cost in options.cost:
            for name in options.variants:
                folder = runs / f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{cost:g}x-{seed}"
                flags = scaled(VARIANTS[name], cost)
                if not any(flag.startswith(("--network.", "--train.")) for flag in flags):
                    flags += ["--teacher", str(teacher / "teacher")]
                flags += ["--run", str(folder), "--evaluation.max-steps", "16"]  # the teacher, besides its 256
                if not (folder / "students" / "0001").exists():
                    run(COMMANDS.get(name, "pdfast.distill"), *job, *flags)
                for row in rows_of(name, cost, seed, folder):
                    report.add(row)
    report.write(summary=summary(report.rows))
    print(summary(report.rows))
    if options.plot:
        options.plot.write_text(plot(report.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
