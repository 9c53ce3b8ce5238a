"""Names that are not UTF-8, of images, classes, tar members, folders and files, in every command."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pdfast import demo
from pdfast.data import load_source
from pdfast.io.reading import load_yaml
from tests.commands import TINY_GIVEN, TINY_NETWORK, call
from tests.data.archives import write_tar
from tests.data.files import encoded

N = 130
PIXELS = np.random.default_rng(0).integers(0, 256, (N, 8, 8), dtype=np.uint8)
NAME = os.fsdecode(b"\xff\xe9")
BAD = f"class{NAME}/{NAME}007.png"
ROUNDS = f"--rounds 1 --updates 1 --batch-size 8 --method progressive --max-bad 0.02 --data images{NAME}".split(" ")


def write_images(folder):
    folder.mkdir()
    for c, name in enumerate(["a", f"class{NAME}"]):
        (folder / name).mkdir()
        for i in range(c, N, 2):
            Image.fromarray(PIXELS[i]).save(folder / name / f"{NAME}{i:03}.png")
    (folder / BAD).write_bytes(b"no image")


@pytest.fixture(scope="module")
def place(finished_run, tmp_path_factory):
    """Where a run has begun, and everything has such a name."""
    place = tmp_path_factory.mktemp(f"place{NAME}")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("PDFAST_CACHE", str(place / f"cache{NAME}"))
        os.symlink(finished_run / "teacher", f"teacher{NAME}")
        write_images(place / f"images{NAME}")
        assert call("distill", *TINY_GIVEN, *ROUNDS, "--teacher", f"teacher{NAME}", "--run", f"run{NAME}") == 0
        yield place


def test_a_run_and_its_resuming(place, capsys):
    run = place / f"run{NAME}"
    assert call("distill", *TINY_GIVEN, *ROUNDS, "--teacher", f"./teacher{NAME}", "--run", f"run{NAME}") == 0
    assert "of training; open run\\udcff\\udce9/report.html\n" in capsys.readouterr().out
    assert load_yaml(run / "config.yaml")["data"] == f"images{NAME}"
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [entry["name"] for entry in entries if entry.get("event") == "bad image"] == [BAD]
    report = (run / "report.html").read_text(encoding="utf-8")
    assert "images\\xff\\xe9" in report
    assert (
        call("distill", *TINY_GIVEN, *ROUNDS, "--teacher", f"teacher{NAME}", "--run", f"run{NAME}", "--seed", "1") == 2
    )
    assert "run\\udcff\\udce9 was begun with seed = 0" in capsys.readouterr().err


def test_training(place, capsys):
    run = place / f"taught{NAME}"
    command = ["--train.updates", "1", "--train.warmup", "0", "--evaluation-steps", "1", *TINY_NETWORK, *ROUNDS[8:]]
    assert call("train", *TINY_GIVEN, *command, "--run", str(run)) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {last.partition(' with: ')[2]}"], capture_output=True).stdout
    assert os.fsencode(f"images{NAME}") in words.split(b"\n") and os.fsencode(run / "teacher") in words.split(b"\n")


def test_what_reads_a_run(place, capsys):
    run = f"run{NAME}"
    assert call("evaluate", run, "--steps", "1", "--device", "cpu", "--json", f"out{NAME}.json") == 0
    assert json.loads((place / f"out{NAME}.json").read_text())["data"]["name"] == f"images{NAME}"
    for out in ("png", "npz"):
        assert call("sample", run, "--count", "2", "--device", "cpu", "--out", f"out{NAME}.{out}") == 0
        assert (place / f"out{NAME}.{out}").exists()
    for kind in ("diffusers", "safetensors"):
        assert call("export", run, f"out-{kind}{NAME}", "--format", kind, "--device", "cpu") == 0
    assert "- data: images\\xff\\xe9, 130 images" in (place / f"out-diffusers{NAME}/README.md").read_text(
        encoding="utf-8"
    )
    assert call("distill", *TINY_GIVEN, *ROUNDS, "--teacher", f"out-safetensors{NAME}", "--dry-run") == 2
    assert "distill it from there" in capsys.readouterr().err


def test_the_demo(place):
    models = demo.Models(place / f"run{NAME}", 1, demo.open_device("cpu"))
    assert models.draw(models.teacher, 1, 0, ())[0].startswith(b"\x89PNG")
    gradio = pytest.importorskip("gradio")
    page = demo.build_page(models, models.draw)
    assert isinstance(page, gradio.Blocks) and page.title == "pdfast: run\\xff\\xe9"
    json.dumps(page.get_config_file(), ensure_ascii=False).encode()


@pytest.mark.parametrize("out", ["new.npz", "new"])
def test_preparing(place, capsys, out):
    out = f"{NAME}{out}"
    command = f"images{NAME}", out, "--size", "8", "--channels", "1", "--jobs", "1"
    assert call("data.prepare", "images", *command) == 2
    assert "the first: class\\udcff\\udce9/\\udcff\\udce9007.png (not an image)" in capsys.readouterr().err
    assert call("data.prepare", "images", *command, "--max-bad", "0.02") == 0
    printed = capsys.readouterr().out.splitlines()
    assert "left out      class\\udcff\\udce9/\\udcff\\udce9007.png: not an image" in printed
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {printed[-1]}"], capture_output=True).stdout
    assert words.split(b"\n")[-2] == os.fsencode(out)
    assert load_source(out, image_size=8, channels=1).num_images == N - 1


def test_tar_members(place):
    members = {f"{NAME}/{NAME}{i}.png": encoded(PIXELS[i]) for i in range(4)}
    path = write_tar(place / f"{NAME}.tar", members, "w")
    source = load_source(str(path), image_size=8, channels=1)
    assert source.num_images == 4 and len(source.identity.hashes.everything) == len(source.identity.earlier) == 64


def test_a_console_that_has_no_such_letters(place, monkeypatch):
    """Nor the figures' own ±."""
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    assert call("evaluate", f"run{NAME}", "--steps", "1", "--device", "cpu") == 0
    assert b"\\xb1" in console.buffer.getvalue()
