"""report.html: one self-contained file about a run, written again after every stage."""

import base64
import io
import math
import statistics
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pdfast.config import DistillConfig
from pdfast.engine.log import read_log
from pdfast.evaluation.metrics import in_words
from pdfast.evaluation.stored import read_images, read_metrics
from pdfast.io.errors import UsageError
from pdfast.io.files import write_file
from pdfast.io.grids import steps_grid
from pdfast.io.names import printable
from pdfast.io.plain import fields_of
from pdfast.io.reading import load_yaml, read_text
from pdfast.io.run_folder import RunFolder
from pdfast.io.text import count_steps
from pdfast.report.plots import loss_by_step_plot, loss_plot, quality_plot


@dataclass(frozen=True)
class Stage:
    """The teacher (`steps` None) or a student (a number), as found on disk."""

    steps: Any
    metrics: dict[str, Any]
    samples: np.ndarray | None


def _read_stage(folder: Path, steps: int | None) -> Stage | None:
    """Return a stage, None where it is not finished, or, after a warning, where its figures are damaged."""
    if not folder.exists():
        return None
    try:
        return Stage(steps, read_metrics(folder), _read_images(folder / "samples.npy"))
    except UsageError as error:
        warnings.warn(f"left out of the report: {error}", stacklevel=2)
        return None


def _read_images(path: Path) -> np.ndarray | None:
    """Return images for the grid, None where there are none, or, after a warning, where they are damaged."""
    if not path.exists():
        return None
    try:
        return read_images(path)
    except UsageError as error:
        warnings.warn(f"left out of the report: {error}", stacklevel=2)
        return None


def _read_config(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the text of a run's configuration and what it says; nothing where there is none or, after a warning, a damaged
    one."""
    if not path.exists():
        return "", {}
    try:
        config = load_yaml(path)
        return read_text(path), config | fields_of(DistillConfig, config, ("rounds", "data", "guidance"), str(path))
    except UsageError as error:
        warnings.warn(f"left out of the report: {error}", stacklevel=2)
        return "", {}


def _loss_curves(log: list[dict[str, Any]], phase: str) -> list[tuple[str, list[int], list[float]]]:
    curves: dict[Any, tuple[list[int], list[float]]] = {}
    for entry in log:
        if entry.get("phase") == phase and entry.get("loss"):
            updates, losses = curves.setdefault(entry["steps"], ([], []))
            updates.append(entry["update"])
            losses.append(entry["loss"])
    return [("teacher" if steps is None else count_steps(steps), *curve) for steps, curve in curves.items()]


def _last_lines(log: list[dict[str, Any]]) -> dict[int | None, dict[str, Any]]:
    """Return the last log line of each stage, by its steps (None for the teacher's training)."""
    return {entry["steps"]: entry for entry in log if "update" in entry}


def _losses_by_step(last: dict[int | None, dict[str, Any]]) -> list[tuple[str, list[tuple[float, float]]]]:
    """Of each round the points (k / N, loss): the middle of each bucket of step indices that has a loss other than 0."""
    curves = []
    for steps, entry in last.items():
        losses = entry.get("loss_by_step")
        if steps is None or not losses:
            continue
        # Bucket b of B holds the k with (k - 1) B // N = b.
        edges = [-(-b * steps // len(losses)) for b in range(len(losses) + 1)]
        buckets = zip(edges, edges[1:], losses, strict=False)
        points = [((first + 1 + end) / 2 / steps, loss) for first, end, loss in buckets if loss]
        if points:
            curves.append((count_steps(steps), points))
    return curves


def _speeds(stages: list[Stage], log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row a stage: the medians over its log lines, of memory and of skipped updates the most; None for what a log
    of an older version does not have."""
    rows = []
    for stage in stages:
        lines = [e for e in log if "update" in e and e["steps"] == stage.steps]
        row = {
            "steps": stage.steps,
            "processes": stage.metrics.get("processes"),
            "samples_per_second": 1 / stage.metrics["evaluation"][0]["seconds_per_sample"],
        }
        for name, merge in (
            ("update_seconds", statistics.median),
            ("network_evaluations_per_second", statistics.median),
            ("model_flop_utilisation", statistics.median),
            ("data_wait", statistics.median),
            ("peak_memory_mib", max),
            ("skipped", max),
        ):
            values = [e[name] for e in lines if e.get(name) is not None]
            row[name] = merge(values) if values else None
        rows.append(row)
    return rows


def _grid(teacher: Stage | None, students: list[Stage], real: np.ndarray | None) -> bytes | None:
    """Return the sample grid as PNG: real images, the teacher, then students downwards; columns share their noise."""
    from PIL import Image

    rows = [("real", real)] if real is not None else []
    if teacher and teacher.samples is not None:
        rows.append((count_steps(teacher.metrics["evaluation"][0]["steps"]), teacher.samples))
    rows += [(count_steps(s.steps), s.samples) for s in students if s.samples is not None]
    if not rows:
        return None
    columns = min(len(images) for _, images in rows)
    scale = max(1, 40 // rows[0][1].shape[1])
    pixels = steps_grid([(label, images[: min(columns, 16)]) for label, images in rows], scale)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _rows(teacher: Stage | None, students: list[Stage]) -> list[dict[str, Any]]:
    """Return the headline table: one row a step count, from many to few."""
    if teacher is None:
        return []
    evaluation = teacher.metrics["evaluation"]
    start = evaluation[0]
    ddim = {row["steps"]: row for row in evaluation}
    by_steps = {s.steps: s for s in students}
    rows = []
    for steps in sorted(ddim.keys() | by_steps.keys(), reverse=True):
        student = by_steps.get(steps)
        measured = student.metrics["evaluation"][0] if student else None
        shown = measured or (start if steps == start["steps"] else None)
        real = teacher.metrics["real"]
        rows.append(
            {
                "steps": steps,
                "student": measured,
                "ratio": _times(measured["fd"], start["fd"]) if measured else None,
                "ddim": ddim.get(steps),
                "shift": _shift(shown, real, "channel_mean") if shown else None,
                "spread": _shift(shown, real, "channel_std") if shown else None,
            }
        )
    return rows


def _times(fd: float, start: float) -> float:
    """Return how many times a distance is another one, which is 0 where images are the very same."""
    return fd / start if start else math.inf


def _conversion(teacher: Stage | None) -> list[dict[str, Any]]:
    """Return one row a step count: the distance of the teacher as it was, of its untrained copy and of the trained one."""
    made = teacher.metrics.get("conversion") if teacher else None
    if teacher is None or not made:
        return []
    stages = [{row["steps"]: row["fd"] for row in rows} for rows in (made["original"], made["untrained"])]
    stages.append({row["steps"]: row["fd"] for row in teacher.metrics["evaluation"]})
    counts = sorted(stages[1], reverse=True)
    return [{"steps": steps, "fds": [stage.get(steps) for stage in stages]} for steps in counts]


def _shift(row: dict[str, Any], real: dict[str, Any], key: str) -> str:
    return ", ".join(f"{a - b:+.3f}" for a, b in zip(row[key], real[key], strict=True))


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _headline(teacher: Stage | None, students: list[Stage], rounds: int | None, guided: bool) -> str:
    if teacher is None:
        return "The teacher is being trained."
    start = teacher.metrics["evaluation"][0]
    space = teacher.metrics["feature_space"]
    if not students:
        return f"The teacher reaches {space} {start['fd']:.2f} in {count_steps(start['steps'])}; the first round is under way."
    last = students[-1]
    fd = last.metrics["evaluation"][0]["fd"]
    evaluations = start["steps"] * (2 if guided else 1)
    text = (
        f"In {count_steps(last.steps)} the student reaches {space} {fd:.2f}, {_times(fd, start['fd']):.2f} times its teacher's "
        f"{start['fd']:.2f} in {count_steps(start['steps'])}, with 1/{evaluations // last.steps} of the network evaluations."
    )
    ddim = next((row["fd"] for row in teacher.metrics["evaluation"] if row["steps"] == last.steps), None)
    if ddim is not None:
        text += f" The teacher's own DDIM has {ddim:.1f} there."
    if rounds and len(students) < rounds:
        text += f" {len(students)} of {rounds} rounds are done."
    return text


def build_report(run: Path) -> Path:
    """Write run/report.html, and run/grid.png, from what the run's folder holds so far; returns the report's path."""
    import jinja2

    folder = RunFolder(run)
    teacher = _read_stage(folder.teacher, None)
    students = [stage for steps, student in folder.students().items() if (stage := _read_stage(student, steps))]
    log = [entry for _, entry in read_log(folder.log)]
    config_text, config = _read_config(folder.config)

    quality = None
    if teacher:
        evaluated = [(s.steps, s.metrics["evaluation"][0]["fd"]) for s in students]
        ddim = [(row["steps"], row["fd"]) for row in teacher.metrics["evaluation"]]
        quality = quality_plot(teacher.metrics["feature_space"], evaluated, ddim, teacher.metrics["floor"])
    grid = _grid(teacher, students, _read_images(folder.teacher / "real.npy"))
    if grid:
        write_file(folder.grid, grid)
    by_step = _losses_by_step(_last_lines(log))
    stages = [s for s in (teacher, *students) if s and s.metrics["training"]]
    rounds, training = _loss_curves(log, "distill"), _loss_curves(log, "teacher")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pdfast.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html.jinja").render(
        name=config.get("data", run.name),
        headline=_headline(teacher, students, config.get("rounds"), config.get("guidance") not in (None, "1")),
        facts=teacher.metrics if teacher else None,
        rows=_rows(teacher, students),
        keeps_seeds=any(s.metrics["evaluation"][0].get("feature_distance") is not None for s in students),
        conversion=_conversion(teacher),
        quality=quality,
        round_losses=loss_plot(rounds) if rounds else None,
        teacher_loss=loss_plot(training) if training else None,
        grid="data:image/png;base64," + base64.b64encode(grid).decode() if grid else None,
        loss_by_step=loss_by_step_plot(by_step) if by_step else None,
        stages=stages,
        speeds=_speeds(stages, log) if any("update_seconds" in entry for entry in log) else [],
        warnings=[entry["message"] for entry in log if entry.get("event") == "warning"],
        config=config_text,
        command=config.get("command"),
        count_steps=count_steps,
        in_words=in_words,
        rate=_rate,
    )
    write_file(folder.report, printable(page))
    return folder.report
