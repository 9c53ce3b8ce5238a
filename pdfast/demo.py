"""Try a run's students in a browser, beside their teacher from the same noise (pip install 'pdfast[demo]'):

    python -m pdfast.demo runs/digits

The student's picture at N steps and seed S is that of `python -m pdfast.sample runs/digits --steps N --seed S --count 16`.
Nothing is asked of other machines.
"""

import base64
import functools
import io
import os
import queue
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch

import pdfast.sample as sample
from pdfast import own_code
from pdfast.cli import parse, run_command
from pdfast.config import DistillConfig
from pdfast.engine import parallelize
from pdfast.engine.device import open_device
from pdfast.flags import OptionalString, Positional
from pdfast.io.bounds import STEPS, require, whole
from pdfast.io.errors import UsageError
from pdfast.io.grids import write_png
from pdfast.io.names import printable
from pdfast.io.plain import fields_of
from pdfast.io.reading import load_yaml
from pdfast.io.run_folder import RunFolder
from pdfast.io.text import count_steps
from pdfast.pretrained.model_folder import SavedModel, load_model
from pdfast.rounds import STEP_FACTOR

ALL_CLASSES = "all, in turn"
LARGEST_SEED = 2**53 - 1  # that a browser's numbers hold
CSS = """
#draw { align-self: center; }
#pictures .html-container { padding: 0; }
#pictures .prose { display: flex; flex-wrap: wrap; gap: 1.5rem; }
#pictures figure { margin: 0; }
#pictures figcaption { margin-bottom: .5rem; }
#pictures b { font-weight: 600; }
#pictures figcaption span { display: block; opacity: .7; font-variant-numeric: tabular-nums; }
#pictures img, #pictures .waiting { display: block; margin: 0; max-width: 100%; image-rendering: pixelated; }
#pictures .waiting { width: 16rem; aspect-ratio: 1; background: var(--background-fill-secondary); }
"""


@dataclass(frozen=True)
class Arguments:
    """Try a run's students in a browser, beside their teacher from the same noise."""

    run: Annotated[Path, Positional]
    """A run's folder, with students."""
    count: int = 16
    """Images in each picture."""
    host: str = "127.0.0.1"
    """Where to listen; 0.0.0.0 lets other machines in."""
    port: int = 7860
    """Where to listen; 0 for any that is free."""
    open: bool = False
    """Open the page in this machine's browser, too."""
    network_from: OptionalString = None
    """package.module:function, for a network made by code of your own, which runs only where you name it."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""


class Models:
    """A run's teacher and students, ready to draw. UsageError where there are none, or one is damaged.

    start: the step count at which the teacher is what the first student was distilled from.
    """

    def __init__(self, run: Path, count: int, device: torch.device) -> None:
        folder = RunFolder(run)
        folders = folder.students()
        if not folders:
            raise UsageError(f"there are no students in {run}: give the folder of a run of pdfast.distill")
        self.run, self.count, self.device = run, count, device
        self.students = {steps: load_model(student, device) for steps, student in folders.items()}
        self.teacher = load_model(folder.teacher, device)
        file = folder.config
        saved_start = fields_of(DistillConfig, load_yaml(file), ("start_steps",), str(file)).get("start_steps")
        if saved_start is not None and saved_start not in STEPS:
            raise UsageError(f"{file}: start_steps must be {STEPS.text}, got {saved_start}")
        self.start = saved_start or STEP_FACTOR * max(self.students)
        for saved in (self.teacher, *self.students.values()):
            parallelize.for_sampling(saved.network, device, "auto", "auto")

    @functools.lru_cache(maxsize=256)  # noqa: B019 of pictures: the teacher's stays while the student changes
    def draw(
        self, saved: SavedModel, steps: int, seed: int, classes: tuple[int, ...], guidance: float | None = None
    ) -> tuple[bytes, float]:
        """Return a PNG of the images, and the seconds an image took; a first step, which may compile, is not counted."""
        saved = saved.at_guidance(guidance)
        arguments = sample.Arguments(self.run, steps=steps, count=self.count, seed=seed, classes=classes)
        sample.draw(replace(arguments, steps=1), saved, self.device)
        began = time.perf_counter()
        images, _, _ = sample.draw(arguments, saved, self.device)
        seconds = (time.perf_counter() - began) / len(images)
        png = io.BytesIO()
        write_png(png, sample.picture(images))
        return png.getvalue(), seconds


def figure(title: str, steps: int, drawn: tuple[bytes, float] | None) -> str:
    """Return HTML of one picture under its title and its time; of an empty frame where it is not drawn yet."""
    if drawn is None:
        speed, content = "drawing …", '<div class="waiting"></div>'
    else:
        png, seconds = drawn
        speed = f"{1000 * seconds:.3g} ms an image" if seconds < 1 else f"{seconds:.3g} s an image"
        source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        content = f'<img alt="{title}, {count_steps(steps)}" src="{source}">'
    caption = f"<b>{title}</b><span>{count_steps(steps)} · {speed}</span>"
    return f"<figure><figcaption>{caption}</figcaption>{content}</figure>"


def build_page(models: Models, draw: Callable[..., tuple[bytes, float]]) -> Any:
    """Return the page (a gradio.Blocks), which calls `draw` as `Models.draw`. UsageError where gradio is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # it sends nothing to anyone
    try:
        import gradio as gr
    except ImportError:
        raise UsageError("the demo needs gradio: pip install 'pdfast[demo]'") from None
    name, num_classes = printable(models.run.resolve().name), models.teacher.network.config.num_classes
    guidance = models.teacher.config.guidance or ()

    def show(n: int, seed: int | None, label: int | str = ALL_CLASSES, g: float | None = None) -> Iterator[str]:
        """Yield the pictures, again after each that was drawn."""
        classes = () if label == ALL_CLASSES else (label,)
        shown = [
            ("Student", models.students[n], n),
            ("Teacher in as few steps (DDIM)", models.teacher, n),
            ("Teacher", models.teacher, models.start),
        ]
        figures = [figure(title, steps, None) for title, _, steps in shown]
        yield "".join(figures)
        for i, (title, saved, steps) in enumerate(shown):
            figures[i] = figure(title, steps, draw(saved, steps, seed or 0, classes, g))
            yield "".join(figures)

    counts, labels = sorted(models.students), [ALL_CLASSES, *range(num_classes)]
    with gr.Blocks(title=f"pdfast: {name}") as page:
        gr.Markdown(f"# {name}\nStudents beside their teacher, from the same noise.")
        with gr.Row():
            steps = gr.Radio(counts, value=counts[0], label="Student's steps", elem_id="steps", scale=4)
            seed = gr.Number(
                0, label="Seed", precision=0, minimum=0, maximum=LARGEST_SEED, elem_id="seed", min_width=120
            )
            controls = [steps, seed]
            if num_classes:
                controls.append(gr.Dropdown(labels, value=ALL_CLASSES, label="Class", elem_id="class", min_width=120))
            if len(guidance) == 2:
                low, high = guidance
                middle, step = (low + high) / 2, (high - low) / 40
                controls.append(
                    gr.Slider(low, high, value=middle, step=step, label="Guidance", elem_id="guidance", min_width=160)
                )
            button = gr.Button("Draw", variant="primary", elem_id="draw", min_width=120)
        pictures = gr.HTML(elem_id="pictures")
        triggers = [page.load, button.click, seed.submit]
        gr.on(triggers, show, controls, pictures, show_progress="hidden", trigger_mode="always_last", api_name="draw")
    return page


def main() -> None:
    arguments = parse(Arguments, prog="python -m pdfast.demo", description=__doc__)
    own_code.allow(arguments.network_from)
    require("count", arguments.count, whole(1, 10**4))
    models = Models(arguments.run, arguments.count, open_device(arguments.device))
    wanted: queue.SimpleQueue[tuple[Future, tuple]] = queue.SimpleQueue()

    def draw(*what: Any) -> tuple[bytes, float]:
        future: Future = Future()
        wanted.put((future, what))
        return future.result()

    page = build_page(models, draw)
    try:
        with socket.create_server((arguments.host, arguments.port)) as probe:
            port = probe.getsockname()[1]
        page.launch(
            server_name=arguments.host, server_port=port, inbrowser=arguments.open, share=False, ssr_mode=False, quiet=True,
            prevent_thread_lock=True, show_error=True, footer_links=[], css=CSS,
        )  # fmt: skip
    except (OSError, OverflowError) as error:
        address = f"{arguments.host}:{arguments.port}"
        raise UsageError(f"cannot listen at {address} ({error}): choose others with --host and --port") from None
    print(f"{arguments.run}: http://{arguments.host}:{port} (Ctrl-C ends it)", flush=True)
    try:
        while True:  # drawn in this thread, whose GPU and compiler are set up, and one at a time
            future, what = wanted.get()
            try:
                future.set_result(models.draw(*what))
            except Exception as error:
                future.set_exception(error)
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    run_command(main)
