"""report.html: what it says, that it stands alone, and how a real browser shows it."""

import html.parser
import json
import re
import shutil

import numpy as np
import pytest

from pdfast.io.grids import image_grid, steps_grid
from pdfast.report.html import _losses_by_step, build_report
from tests.browser import chromium, needs_browser

TEACHER_FD = {256: 4.4, 2: 185.75, 1: 1223.25}
STUDENT_FD = {2: 5.5, 1: 6.6}


def metrics(rows, training):
    return {
        "feature_space": "FD-digits",
        "num_samples": 898,
        "num_real": 899,
        "floor": 3.73,
        "sampler": "ddim",
        "clip": False,
        "device": "a <machine>",
        "processes": 4,
        "versions": {"pdfast": "0.1.0", "torch": "2.13.0"},
        "commit": "abc1234",
        "data": {"name": "digits", "num_images": 1797, "shape": [8, 8, 1]},
        "real": {"channel_mean": [0.3], "channel_std": [0.37]},
        "training": training,
        "evaluation": [
            {"steps": n, "fd": fd, "mse": 0.01, "psnr": None if n == 256 else 26.0, "channel_mean": [0.31], "channel_std": [0.36],
             "seconds_per_sample": 1e-4 * n}
            for n, fd in rows.items()
        ],
    }  # fmt: skip


def rates(n):
    """What a log line says of speed; every number another function of n."""
    return {
        "loss_by_step": [None, *(n / k for k in range(1, 8))],
        "update_seconds": 1e-4 * n,
        "network_evaluations_per_second": 1e5 / n,
        "model_flop_utilisation": n / 1000,
        "data_wait": n / 10000,
        "peak_memory_mib": 20.0 * n,
        "skipped": n // 50,
    }


@pytest.fixture
def run(tmp_path):
    """A run's folder as two rounds leave it."""
    training = {
        "updates": 100,
        "images": 12800,
        "seconds": 12.5,
        "images_per_second": 1024.0,
        "network_evaluations": 38400,
    }
    rng = np.random.default_rng(0)
    for name, rows in [("teacher", TEACHER_FD), *((f"students/{n:04d}", {n: fd}) for n, fd in STUDENT_FD.items())]:
        folder = tmp_path / "run" / name
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(metrics(rows, training)))
        np.save(folder / "samples.npy", rng.integers(0, 256, (16, 8, 8, 1), dtype=np.uint8))
    np.save(tmp_path / "run/teacher/real.npy", rng.integers(0, 256, (16, 8, 8, 1), dtype=np.uint8))
    (tmp_path / "run/config.yaml").write_text(
        "data: <script>alert(1)</script>\nrounds: 2\ncommand: python -m pdfast.distill --rounds 2\n"
    )
    lines = [{"phase": "teacher", "steps": None, "update": u, "loss": 1 / u, **rates(u)} for u in (50, 100)]
    lines += [
        {"phase": "distill", "steps": n, "update": u, "loss": 1 / u, **rates(n * u)} for n in (2, 1) for u in (50, 100)
    ]
    lines += [{"event": "warning", "message": "a <warning>"}]
    (tmp_path / "run/log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut off')
    return tmp_path / "run"


class Page(html.parser.HTMLParser):
    """Rows of tables as text, links, and all text."""

    def __init__(self, path):
        super().__init__()
        self.rows, self.links, self.text, self.tags = [], [], "", set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        self.text += data
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


def test_the_numbers(run):
    page = Page(build_report(run))
    table = {row[0]: row for row in page.rows if row and row[0].isdigit()}
    assert [int(steps) for steps in table] == [256, 2, 1]
    assert table["1"][1:4] == ["6.600", "1.50", "1223.250"]
    assert table["2"][1:4] == ["5.500", "1.25", "185.750"]
    assert table["2"][4:9] == ["0.0100", "26.0", "+0.010", "-0.010", "0.2"]
    cost = {row[0]: row for row in page.rows if row and row[0].endswith("steps") and len(row) == 6}
    assert cost["2 steps"] == ["2 steps", "100", "12,800", "38,400", "12.5", "1,024"]
    assert "In 1 step the student reaches FD-digits 6.60, 1.50 times its teacher's 4.40 in 256 steps" in page.text
    assert "1/256 of the network evaluations" in page.text and "it is not the FID" in page.text and "3.730" in page.text
    assert (
        "python -m pdfast.distill --rounds 2" in page.text
        and "commit abc1234" in page.text
        and "a <warning>" in page.text
    )


def test_a_teacher_that_drew_the_real_images_themselves(run):
    """At a distance of 0, of which nothing is a number of times."""
    path = run / "teacher/metrics.json"
    path.write_text(path.read_text().replace("4.4,", "0.0,"))
    assert "In 1 step the student reaches FD-digits 6.60, inf times its teacher's 0.00" in Page(build_report(run)).text


def add_further_figures(run):
    """To the teacher at 256 steps, the student of 2 and the real images."""
    further = {"kd": 1.23456, "kd_std": None, "cs": 9.1234, "cs_std": 0.256, "precision": 0.9, "recall": 0.81}
    for n, name in ((256, "teacher"), (2, "students/0002")):
        path = run / name / "metrics.json"
        changed = json.loads(path.read_text())
        names = {"fd": "FD-digits", "kd": "KD-digits", "cs": "CS-digits"}
        changed |= {"names": names, "real_against_real": {"fd": 3.73, **further, "recall": 0.95}}
        row = changed["evaluation"][0]
        assert row["steps"] == n
        row |= further | {"kd": n + 0.5, "kd_std": 0.001 * n, "precision": None}
        path.write_text(json.dumps(changed))


def test_further_figures(run):
    """A second table, which what an older version wrote has none of."""
    assert "KD-digits" not in Page(build_report(run)).text
    add_further_figures(run)
    page = Page(build_report(run))
    rows = [row for row in page.rows if len(row) == 9 and row[0] in ("steps", "256", "2", "1", "real")]
    assert [row[0] for row in rows] == ["steps", "256", "2", "1", "steps", "256", "2", "1", "real"]
    headings, *table = rows[4:]
    assert headings[1:] == 2 * ["KD-digits", "CS-digits", "precision", "recall"]
    none = 4 * ["–"]
    assert table[0][1:] == [*none, "256.5 ± 0.26", "9.123 ± 0.26", "–", "0.81"]
    assert table[1][1:] == ["2.5 ± 0.002", "9.123 ± 0.26", "–", "0.81", *none]
    assert table[2][1:] == [*none, *none], "a student and rows of an older version"
    assert table[3][1:8] == [
        "1.235",
        "9.123 ± 0.26",
        "0.9",
        "0.95",
        *none[1:],
    ]  # the parser adds to the last what follows
    assert (
        "it is not the IS" in page.text
        and "subsets of 1000" in page.text
        and "The last row is of 898 other" in page.text
    )


def test_speed_is_what_the_log_says(run):
    page = Page(build_report(run))
    speed = {row[0]: row for row in page.rows if len(row) == 9 and not row[0].isdigit() and row[0] != "steps"}
    assert speed.keys() == {"stage", "teacher", "2 steps", "1 step"}
    # Medians of the lines at updates 50 and 100, the most of memory and of skipped updates.
    assert speed["teacher"] == ["teacher", "4", "7.5", "1,500", "7.5%", "0.8%", "2,000", "2", "39.1"]
    assert speed["2 steps"] == ["2 steps", "4", "15.0", "750", "15.0%", "1.5%", "4,000", "4", "5,000"]
    assert "Loss by step index" in page.text


def test_where_losses_by_step_lie():
    """As the log's buckets are made: k of N in bucket (k - 1) 8 // N."""
    for steps in (1, 2, 4, 8, 24):
        members = {b: [k for k in range(1, steps + 1) if (k - 1) * 8 // steps == b] for b in range(8)}
        losses = [float(b + 1) if ks else None for b, ks in members.items()]
        expected = [(sum(ks) / len(ks) / steps, b + 1.0) for b, ks in members.items() if ks]
        [(_, points)] = _losses_by_step({None: {"loss_by_step": losses}, steps: {"loss_by_step": losses}})
        assert points == [pytest.approx(point) for point in expected]


def test_a_log_of_an_older_version(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()[:-1]]
    old = [{k: v for k, v in line.items() if k not in rates(1)} for line in lines]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    page = Page(build_report(run))
    assert "ms an update" not in page.text and "Loss by step index" not in page.text and "1,024" in page.text


def test_it_stands_alone_and_escapes(run):
    path = build_report(run)
    page = Page(path)
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert "<script>alert(1)</script>" in page.text and "script" not in page.tags


def test_same_run_same_bytes(run):
    first = build_report(run).read_bytes()
    assert build_report(run).read_bytes() == first


@pytest.mark.parametrize(
    "missing", ["students/0001", "students", "teacher", "log.jsonl", "config.yaml", "teacher/real.npy"]
)
def test_a_run_under_way(run, missing):
    path = run / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = Page(build_report(run)).text
    if missing == "students/0001":
        assert "1 of 2 rounds are done" in text
    if missing == "students":
        assert "the first round is under way" in text
    if missing == "teacher":
        assert "The teacher is being trained" in text


def test_an_empty_folder(tmp_path):
    assert "being trained" in Page(build_report(tmp_path)).text


def test_grids():
    images = np.arange(2 * 2 * 3 * 1, dtype=np.uint8).reshape(2, 2, 3, 1)
    grid = image_grid(images, columns=2, scale=2, gap=1)
    assert grid.shape == (4, 13, 3)
    assert (
        grid[0, 0, 0] == grid[1, 1, 2] == images[0, 0, 0, 0]
        and grid[3, 12, 0] == images[1, 1, 2, 0]
        and grid[0, 6, 0] == 255
    )
    assert image_grid(np.zeros((3, 2, 2, 3), np.uint8), columns=2).shape == (5, 5, 3)
    labelled = steps_grid([("a", images), ("b", images)], scale=4)
    assert labelled.ndim == 3 and (labelled != 255).any()


@needs_browser
@pytest.mark.parametrize("width", [500, 1280])  # 500 is the narrowest window that Chromium makes
def test_in_a_browser(run, tmp_path, width):
    """Every picture is drawn, nothing runs over the side, and the browser has nothing to complain of; on a desktop every table
    has room in its frame, also of colour images and a space with a long name."""
    add_further_figures(run)
    for path in run.rglob("metrics.json"):
        changed = json.loads(path.read_text())
        changed["feature_space"] = "FD-MobileNetV2"
        if "names" in changed:
            changed["names"] = {"fd": "FD-MobileNetV2", "kd": "KD-MobileNetV2", "cs": "CS-MobileNetV2"}
        for row in (changed["real"], *changed["evaluation"]):
            row |= {name: 3 * row[name] for name in ("channel_mean", "channel_std")}
            row |= {"fd": 100 * row["fd"]} if "fd" in row else {}
        path.write_text(json.dumps(changed))
    page = build_report(run)
    probe = """<script>addEventListener("load", () => { document.body.dataset.seen = JSON.stringify({
        images: [...document.images].map(i => i.naturalWidth), plots: [...document.querySelectorAll("svg")].map(
        s => s.getBoundingClientRect().height), tables: [...document.querySelectorAll("table")].map(
        t => t.scrollWidth - t.parentElement.clientWidth), wide: document.documentElement.scrollWidth, window: innerWidth }) })</script>"""
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text().replace("</body>", probe + "</body>"))
    size = f"--window-size={width},2400"
    done = chromium(probed, tmp_path / "profile", size, "--dump-dom")
    seen = json.loads(re.search(r'data-seen="([^"]*)"', done.stdout)[1].replace("&quot;", '"'))
    assert seen["images"] and min(seen["images"]) > 100 and len(seen["plots"]) == 4 and min(seen["plots"]) > 100
    assert seen["wide"] <= seen["window"] == width
    assert len(seen["tables"]) == 4 and (width < 1280 or max(seen["tables"]) < 0), seen["tables"]
    assert "CONSOLE" not in done.stderr
    shot = tmp_path / "shot.png"
    chromium(page, tmp_path / "profile2", size, f"--screenshot={shot}")
    from PIL import Image

    with Image.open(shot) as picture:
        assert picture.width == width and len(picture.convert("L").getcolors(256)) > 50
