"""The report's plots, as SVG text: deterministic, drawn by matplotlib, which is imported when they are."""

import io
from collections.abc import Callable
from typing import Any

STUDENT, TEACHER, FLOOR = "#0b6e4f", "#c2571a", "#7a7a7a"


def svg(draw: Callable[[Any], None]) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(
        {"svg.hashsalt": "pdfast", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}
    ):
        figure = Figure(figsize=(7, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def logarithmic(axes: Any) -> None:
    """A logarithmic y axis with plain numbers: matplotlib would set its powers as formulas, most of the time of a report."""
    from matplotlib.ticker import FuncFormatter

    def between(value: float, place: int | None) -> str:
        low, high = axes.get_ylim()
        return f"{value:g}" if high < 10 * low else ""

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(between))


def quality_plot(
    feature_space: str, student: list[tuple[int, float]], teacher: list[tuple[int, float]], floor: float | None
) -> str:
    """Frechet distance against steps, both axes logarithmic; each curve is a list of (steps, distance)."""

    def draw(axes: Any) -> None:
        for points, name, colour, marker in (
            (teacher, "teacher, DDIM", TEACHER, "s"),
            (student, "students", STUDENT, "o"),
        ):
            if points:
                axes.plot(*zip(*sorted(points), strict=True), marker=marker, color=colour, label=name)
        if floor is not None:
            axes.axhline(floor, color=FLOOR, linestyle="--", linewidth=1, label="real against real")
        axes.set_xscale("log", base=2)
        logarithmic(axes)
        ticks = sorted({steps for steps, _ in student + teacher})
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.minorticks_off()
        axes.set_xlabel("sampling steps")
        axes.set_ylabel(feature_space)
        axes.legend(frameon=False)

    return svg(draw)


def loss_plot(curves: list[tuple[str, list[int], list[float]]]) -> str:
    """Loss against updates, logarithmic; one curve a stage as (name, updates, losses)."""

    def draw(axes: Any) -> None:
        import matplotlib

        colours = matplotlib.colormaps["viridis"]
        for i, (name, updates, losses) in enumerate(curves):
            colour, marker = colours(0.9 * i / max(len(curves) - 1, 1)), "o" if len(updates) == 1 else None
            axes.plot(updates, losses, label=name, color=colour, linewidth=1.3, marker=marker, markersize=3)
        logarithmic(axes)
        axes.set_xlabel("update")
        axes.set_ylabel("loss")
        axes.legend(frameon=False, fontsize=8, ncols=2)

    return svg(draw)


def loss_by_step_plot(curves: list[tuple[str, list[tuple[float, float]]]]) -> str:
    """Loss against the step index k of N, logarithmic; one curve a round as (name, points of k / N and loss)."""

    def draw(axes: Any) -> None:
        import matplotlib

        colours = matplotlib.colormaps["viridis"]
        for i, (name, points) in enumerate(curves):
            colour = colours(0.9 * i / max(len(curves) - 1, 1))
            axes.plot(*zip(*points, strict=True), label=name, color=colour, linewidth=1.3, marker="o", markersize=3)
        axes.set_xlim(0, 1.02)
        logarithmic(axes)
        axes.set_xlabel("step index k / N (noise at 1)")
        axes.set_ylabel("loss")
        axes.legend(frameon=False, fontsize=8, ncols=2)

    return svg(draw)
