"""The demo: what it refuses, what it draws, and the page in a real browser."""

import base64
import importlib.util
import io
import re
import signal
import sys
import time
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image

from pdfast import demo
from tests.browser import Tab, needs_browser
from tests.commands import TINY_DISTILL, call, one_line, spawn

COUNT = 4
PICTURES = """[...document.querySelectorAll("#pictures img")].filter(image => image.complete && image.naturalWidth).map(image => {
    const canvas = Object.assign(document.createElement("canvas"), {width: image.naturalWidth, height: image.naturalHeight})
    canvas.getContext("2d").drawImage(image, 0, 0)
    return [image.alt, canvas.toDataURL()]
})"""


@pytest.fixture(scope="session")
def conditional_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("conditional") / "run"
    assert call("distill", *TINY_DISTILL, "--network.num-classes", "10", "--run", str(run)) == 0
    return run


def sampled(run, tmp_path, *flags):
    """Pixels of the picture that pdfast.sample writes."""
    out = tmp_path / "sampled.png"
    assert call("sample", str(run), *flags, "--count", str(COUNT), "--out", str(out), "--device", "cpu") == 0
    return np.asarray(Image.open(out))


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_it_draws_what_sample_draws(conditional_run, tmp_path):
    models = demo.Models(conditional_run, COUNT, torch.device("cpu"))
    assert sorted(models.students) == [1, 2] and models.start == 4
    for saved, folder in ((models.students[2], "students/0002"), (models.teacher, "teacher")):
        for classes in ((), (7,)):
            png, seconds = models.draw(saved, 2, 5, classes)
            flags = ["--classes", *map(str, classes)] if classes else []
            expected = sampled(conditional_run / folder, tmp_path, "--steps", "2", "--seed", "5", *flags)
            assert np.array_equal(pixels(png), expected) and 0 < seconds < 10
    assert len({models.draw(models.teacher, 2, seed, c)[0] for seed in (5, 6) for c in ((), (7,), (8,))}) == 6


def test_the_first_use_is_not_timed(conditional_run, monkeypatch):
    """A slow first forward, as one that compiles, is not in the time."""
    models, forwards = demo.Models(conditional_run, COUNT, torch.device("cpu")), []

    def slow_at_first(*_):
        forwards.append(time.sleep(0 if forwards else 1))

    models.teacher.network.register_forward_pre_hook(slow_at_first)
    assert models.draw(models.teacher, 3, 0, ())[1] < 1 / COUNT and len(forwards) == 4


@pytest.mark.parametrize(
    "run, flags, words",
    [
        ("nowhere", [], ["no students in", "nowhere"]),
        ("teacher", [], ["no students in", "pdfast.distill"]),
        (".", ["--count", "0"], ["--count must be from 1 to"]),
        (".", ["--device", "tpu9"], ["unknown device"]),
    ],
)
def test_bad_input(run, flags, words, finished_run, capsys):
    one_line(capsys, call("demo", str(finished_run / run), *flags), 2, *words)


def test_without_gradio(finished_run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    one_line(capsys, call("demo", str(finished_run), "--device", "cpu"), 2, "pip install 'pdfast[demo]'")


@pytest.fixture(scope="module")
def served(conditional_run):
    """The address of the demo of a run, in a process of its own, which Ctrl-C then ends."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("no gradio: pip install 'pdfast[demo]'")
    with spawn("demo", str(conditional_run), *f"--device cpu --port 0 --count {COUNT}".split()) as process:
        said = process.stdout.readline()
        yield (re.search(r"http://127\.0\.0\.1:\d+", said) or pytest.fail(process.communicate()[1]))[0]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0 and process.stderr.read() == ""


def test_an_address_that_is_taken(served, conditional_run):
    flags = [str(conditional_run), "--device", "cpu", "--port", served.rpartition(":")[2]]
    with spawn("demo", *flags) as process:
        _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and re.fullmatch(r"pdfast: error: cannot listen at .*--port\n", error)


@needs_browser
def test_in_a_browser(served, conditional_run, tmp_path):
    """Steps, seed and class are chosen with the mouse and the keyboard; no other machine is asked for anything."""

    def look(steps, n, *flags):
        """The page comes to show, and its pictures are, what sample draws."""
        shown = tab.wait_for(f"(p => p.length == 3 && p[0][0] == 'Student, {steps}' && p)({PICTURES})")
        titles = f"Student, {steps}; Teacher in as few steps (DDIM), {steps}; Teacher, 4 steps"
        assert "; ".join(title for title, _ in shown) == titles
        models = [(f"students/000{n}", n), ("teacher", n), ("teacher", "4")]
        for (_, url), (folder, count) in zip(shown, models, strict=True):
            seen = pixels(base64.b64decode(url.partition(",")[2]))
            assert np.array_equal(seen, sampled(conditional_run / folder, tmp_path, "--steps", count, *flags))

    with Tab(tmp_path / "profile", served, "--window-size=1280,900") as tab:
        look("1 step", "1")
        assert tab.value("[...document.querySelectorAll('#steps input')].map(i => i.value).join()") == "1,2"
        tab.click("document.querySelector('#steps input[value=\"2\"]')")
        tab.type_over("document.querySelector('#seed input')", "5")
        tab.click("document.querySelector('#draw')")
        look("2 steps", "2", "--seed", "5")
        tab.click("document.querySelector('#steps input[value=\"1\"]')")
        tab.click("document.querySelector('#class input')")
        tab.click("[...document.querySelectorAll('[role=option]')].find(o => o.textContent.includes('7'))")
        tab.click("document.querySelector('#draw')")
        look("1 step", "1", "--seed", "5", "--classes", "7")
        assert len(re.findall(r"[\d.]+ m?s an image", tab.value("document.body.innerText"))) == 3
        assert tab.value("getComputedStyle(document.querySelector('#pictures img')).imageRendering") == "pixelated"
        assert tab.value("gradio_config.analytics_enabled") is False
        hosts = {urlsplit(url).netloc for url in tab.requests if urlsplit(url).scheme not in ("data", "blob")}
        assert hosts == {urlsplit(served).netloc} and tab.complaints == []
