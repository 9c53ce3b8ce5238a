"""Whatever the files of a run hold, its readers say what is wrong in a line: no other exception, no other figures."""

import copy
import io
import json
import os
import shutil
import warnings

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdfast.arguments import _defaults
from pdfast.checks import check_values
from pdfast.config import DistillConfig, TrainConfig
from pdfast.engine.checkpoint import Checkpoints
from pdfast.engine.log import read_log
from pdfast.engine.world import World
from pdfast.evaluate import Arguments, evaluation_settings, run_of
from pdfast.evaluation import real
from pdfast.evaluation.stored import read_images, read_metrics, read_reference
from pdfast.io.errors import UsageError
from pdfast.io.files import sealed
from pdfast.io.plain import unstructure
from pdfast.io.reading import load_yaml, read_array, read_json
from pdfast.recipes import DIGITS
from pdfast.report import html
from tests.commands import TINY_DISTILL, call, one_line
from tests.report.test_html import metrics

some = settings(
    max_examples=25, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)  # fmt: skip
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([10**40, "abc", -1, 0]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
DEEP = b"[" * 100_000


def places(value, here=()):
    """Of every value in plain data."""
    yield here
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, below in inner:
        yield from places(below, (*here, name))


@st.composite
def changed(draw, value):
    """Plain data with one value replaced, left out, or put in."""
    value = copy.deepcopy(value)
    *above, last = draw(st.sampled_from([place for place in places(value) if place]))
    inside = value
    for name in above:
        inside = inside[name]
    what = draw(st.sampled_from(["replace", "leave out", "put in"]))
    if what == "leave out":
        del inside[last]
    elif what == "put in" and isinstance(inside, dict):
        inside[draw(st.text(max_size=5))] = draw(plain)
    else:
        inside[last] = draw(plain)
    return value


@st.composite
def damaged(draw, content):
    """Bytes: any, or those of a file cut off, or with some replaced."""
    if draw(st.booleans()):
        return draw(
            st.binary(max_size=200) | st.sampled_from([DEEP, DEEP + b"]" * 100_000, b"{}", b"[]", b"null", b"\0"])
        )
    start = draw(st.integers(0, len(content)))
    return content[:start] + draw(st.binary(max_size=3)) + content[start + draw(st.integers(0, 4)) :]


def only_usage_errors(function, *arguments):
    """What it returns, None after a UsageError in one line; others go through."""
    try:
        return function(*arguments)
    except UsageError as error:
        assert len(str(error)) < 3000
        return None


CONFIG = unstructure(DIGITS) | {"run": "r", "rounds": 2, "start_steps": 4, "end_steps": 1}
LOG = [{"phase": "distill", "steps": 1, "update": n, "loss": 0.5, "loss_by_step": [0.1, None]} for n in (1, 2)]


def read_configuration(path):
    """As all commands do."""
    for cls in (DistillConfig, TrainConfig):
        config = only_usage_errors(_defaults, cls, ["--config", str(path)])
        if config is not None:
            only_usage_errors(check_values, config)
    run = run_of(path.parent)
    return evaluation_settings(Arguments(path.parent), run)


@some
@given(st.data())
def test_configurations(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("c") / "config.yaml"
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(damaged(yaml.safe_dump(CONFIG).encode())))
    else:
        path.write_text(yaml.safe_dump(data.draw(changed(CONFIG)), allow_unicode=True), errors="replace")
    only_usage_errors(read_configuration, path)


@pytest.mark.parametrize(
    "text",
    [
        "seed: " + "[" * 5000, "seed: &a [*a]", "a: &a [x, x]\nb: &b [*a, *a]\n" + "".join(
            f"k{i}: &k{i} [*{'b' if i == 0 else f'k{i - 1}'}, *{'b' if i == 0 else f'k{i - 1}'}]\n" for i in range(40)
        ), "seed: 2001-99-99", "seed: !!int x", "seed: !!bool maybe", "? [1]\n: 2", "1: 2", "seed: .nan", "seed: 2001-01-01",
        "seed: !!binary aGVsbG8=", "data: \"a\\0b\"", "start_steps: abc", "rounds: abc", "preset: [digits]", "network: 3",
        "network: kind", "seed: " + "9" * 5000, "seed: " + "9" * 50, "evaluation: 7", "evaluation: {batch_size: 0}", "seed: -1",
    ],
)  # fmt: skip
def test_configurations_that_break_readers(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    only_usage_errors(read_configuration, tmp_path / "config.yaml")


def test_start_steps_that_are_text(finished_run, tmp_path, capsys):
    """In a run's own configuration, which the commands read."""
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    saved = (run / "config.yaml").read_text()
    for old, new, words in (
        ("seed: 0", "seed: abc", ["config.yaml, seed: 'abc' is not int"]),
        ("max_bad: 0.001", "max_bad: [1]", ["config.yaml, max_bad: [1] is not float"]),
        ("  num_samples: 64", "  num_samples: lots", ["evaluation, num_samples: 'lots' is not int"]),
    ):
        assert old in saved
        (run / "config.yaml").write_text(saved.replace(old, new))
        one_line(capsys, call("evaluate", str(run), "--device", "cpu"), 2, *words)
    (run / "config.yaml").write_text(saved)
    (run / "teacher/metrics.json").write_bytes(DEEP)
    (run / "students/0001").rename(tmp_path / "elsewhere")
    one_line(capsys, call("distill", *TINY_DISTILL, "--run", str(run)), 2, "teacher/metrics.json", "nested")


@some
@given(st.data())
def test_metrics(tmp_path_factory, data):
    """What comes back makes a report; what was sealed is what was written."""
    run = tmp_path_factory.mktemp("m")
    (run / "teacher").mkdir()
    good = json.loads(json.dumps(metrics({4: 2.0, 1: 9.0}, None)))
    file = run / "teacher/metrics.json"
    match data.draw(st.sampled_from(["bytes", "plain", "sealed"])):
        case "bytes":
            file.write_bytes(data.draw(damaged(json.dumps(good).encode())))
        case "plain":
            file.write_text(json.dumps(data.draw(changed(good))))
        case "sealed":
            file.write_bytes(data.draw(damaged(json.dumps(sealed(good)).encode())))
            found = only_usage_errors(read_metrics, run / "teacher")
            assert found in (None, good)
    only_usage_errors(read_json, file)
    found = only_usage_errors(read_metrics, run / "teacher")
    with warnings.catch_warnings(record=True), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("always")
        for name in ("quality_plot", "loss_plot", "loss_by_step_plot"):
            patch.setattr(html, name, lambda *arguments: "")
        page = html.build_report(run).read_text()
    assert ("The teacher is being trained" in page) == (found is None)


@some
@given(st.data())
def test_logs(tmp_path_factory, data):
    run = tmp_path_factory.mktemp("l")
    lines = b"".join(json.dumps(data.draw(changed(line))).encode() + b"\n" for line in LOG)
    (run / "log.jsonl").write_bytes(data.draw(damaged(lines)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        entries = [entry for _, entry in read_log(run / "log.jsonl")]
    html._loss_curves(entries, "distill")
    html._losses_by_step(html._last_lines(entries))
    stage = html.Stage(1, metrics({1: 2.0}, {}), None)
    html._speeds([stage], entries)


@some
@given(st.data())
def test_checkpoints(tmp_path_factory, data):
    """The newest that is whole, or a UsageError; never one with another state."""
    run = tmp_path_factory.mktemp("k")
    saved = Checkpoints(run, "teacher", World(torch.device("cpu")))
    saved.save(1, {"weight": torch.ones(4)}, {"steps": torch.tensor(1)}, {"seconds": 1.5})
    saved.finish()
    folder = next((run / "checkpoints").iterdir())
    file = folder / data.draw(st.sampled_from(["state.json", "rank-0000.json", "rank-0000.safetensors"]))
    if file.suffix == ".json" and data.draw(st.booleans()):
        file.write_text(json.dumps(data.draw(changed(json.loads(file.read_text())))))
    else:
        file.write_bytes(data.draw(damaged(file.read_bytes())))
    found = only_usage_errors(saved.latest)
    assert found is None or found.extra == {"seconds": 1.5} and torch.equal(found.tensors["weight"], torch.ones(4))


def npy(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


ARRAYS = [
    npy(a)
    for a in (np.zeros((2, 8, 8, 1), np.uint8), np.array(["a"]), np.array([{}]), np.zeros(3, "M8[s]"), np.zeros(0))
]


@some
@given(st.data())
def test_arrays(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("a")
    (folder / "reference.npy").write_bytes(
        data.draw(damaged(data.draw(st.sampled_from(ARRAYS))) | st.sampled_from(ARRAYS))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's, of headers
        only_usage_errors(read_array, folder / "reference.npy")
        only_usage_errors(read_images, folder / "reference.npy")
        found = only_usage_errors(read_reference, folder, (2, 8, 8, 1))
    assert found is None or found.shape == (2, 8, 8, 1)


@some
@given(st.data())
def test_kept_features(tmp_path_factory, data):
    """What was kept, or nothing and a warning."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        patch.setenv("PDFAST_CACHE", str(tmp_path_factory.mktemp("f")))
        real._Kept({"n": 3}).write(torch.ones(3, 2), "facts")
        kept = real._Kept({"n": 3})
        kept._path.write_bytes(data.draw(damaged(kept._path.read_bytes())))
        assert kept.read() in (None, "facts")


@pytest.mark.parametrize("kind", ["pipe", "folder", "dangling", "loop", "missing", "long"])
def test_what_is_no_file(tmp_path, kind):
    path = tmp_path / ("x" * 300 if kind == "long" else "f")
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "dangling":
            path.symlink_to(tmp_path / "nowhere")
        case "loop":
            path.symlink_to(path)
    said = {"pipe": "it is no regular file", "folder": "it is a folder"}.get(kind, "")
    for reader in (read_json, load_yaml, read_array):
        with pytest.raises(UsageError, match=f"{path.name[:50]}.*{said}"):
            reader(path)


@pytest.mark.parametrize(
    "name, kind",
    [
        (".lock", "pipe"),
        ("config.yaml", "folder"),
        ("report.html", "folder"),
        ("students", "file"),
        ("checkpoints", "dangling"),
    ],
)
def test_what_stands_in_the_way_of_a_run(name, kind, tmp_path, capsys):
    """Said before anything is trained."""
    path = tmp_path / "run" / name
    path.parent.mkdir()
    {
        "pipe": os.mkfifo,
        "folder": os.mkdir,
        "file": lambda p: p.write_text(""),
        "dangling": lambda p: p.symlink_to("nowhere"),
    }[kind](path)
    one_line(capsys, call("distill", *TINY_DISTILL, "--run", str(path.parent)), 2, str(path), "move it away")
    assert not (tmp_path / "run/teacher").exists()
