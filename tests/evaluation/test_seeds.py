"""Whether a student keeps its teacher's seeds: each measure against NumPy, and each warning by images that deserve it."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from pdfast.config import GuardConfig
from pdfast.evaluation.guard import complaints
from pdfast.evaluation.seeds import NAMES, Reference, contrast, diversity, measures, saturation
from pdfast.io.files import SEAL, sealed
from pdfast.report.html import build_report
from tests.commands import TINY_DISTILL, call

N = 64


def pictures(seed=0, channels=3):
    """Smooth ones, away from both ends of the range: uint8 [N, C, 8, 8]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(N, channels, 2, 2, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, 8, mode="bilinear")
    return (smooth * 25 + 128).clamp(0, 255).round().to(torch.uint8)


def features(images):
    return images.flatten(1).float()


def row(images, reference=None):
    """What the guard sees, with nothing else to complain of."""
    teacher = pictures() if reference is None else reference
    made = measures(images, features(images), Reference(teacher, features(teacher)))
    return {"steps": 1, "fd": 1.0, "channel_mean": [0.5]} | made


def said(images):
    before = {"steps": 2, "fd": 1.0, "channel_mean": [0.5]}
    return complaints(row(images), before, [before], GuardConfig())


def test_against_numpy():
    images, teacher = pictures(1), pictures()
    made = row(images, teacher)
    assert set(NAMES) <= made.keys()
    a, b = (x.numpy().astype(np.float64) for x in (images, teacher))
    flat_a, flat_b = a.reshape(N, -1), b.reshape(N, -1)
    shifts = (1, 2, 3, 5, 8)

    def spread(flat):
        return np.mean([np.mean([np.sqrt(((flat[i] - flat[i - s]) ** 2).sum()) for i in range(N)]) for s in shifts])

    assert made["diversity"] == pytest.approx(spread(flat_a)) and diversity(features(teacher)) == pytest.approx(
        spread(flat_b)
    )
    apart = np.mean(np.sqrt(((flat_a - flat_b) ** 2).sum(1)))
    assert made["feature_distance"] == pytest.approx(apart / spread(flat_b))
    luminance = 0.2126 * a[:, 0] + 0.7152 * a[:, 1] + 0.0722 * a[:, 2]
    assert made["contrast"] == pytest.approx(np.mean([image.std() for image in luminance]) / 255)
    assert made["saturation"] == pytest.approx((a.max(1) - a.min(1)).mean() / 255)
    for name in ("diversity", "contrast", "saturation"):
        alone = {"diversity": lambda x: diversity(features(x)), "contrast": contrast, "saturation": saturation}[name]
        assert made[f"{name}_ratio"] == pytest.approx(made[name] / alone(teacher))


@pytest.mark.parametrize("n", [4, 5, 8, 9])
def test_few_images_are_compared_with_others_alone(n):
    """Features as far apart as any two: so is their mean, also where a shift leads around to the image itself."""
    assert diversity(torch.eye(n)) == pytest.approx(2**0.5)


def test_the_teacher_itself_and_what_is_not_defined():
    same = row(pictures())
    assert same["feature_distance"] == 0 and all(
        same[f"{n}_ratio"] == 1 for n in ("diversity", "contrast", "saturation")
    )
    grey = pictures(channels=1)
    made = measures(grey, features(grey), None)
    assert made["saturation"] is made["saturation_ratio"] is made["feature_distance"] is made["contrast_ratio"] is None
    assert made["contrast"] == pytest.approx(np.mean([i.std() for i in grey.numpy().astype(float)]) / 255)
    black = torch.zeros_like(grey)
    assert measures(grey, features(grey), Reference(black, features(black)))["feature_distance"] is None
    assert said(pictures()) == []


def changed(scale_grey=1.0, scale_colour=1.0):
    """Contrast and chroma changed apart, around each pixel's grey."""
    images = pictures().double()
    grey = images.mean(1, keepdim=True)
    return (128 + (grey - 128) * scale_grey + (images - grey) * scale_colour).clamp(0, 255).round().to(torch.uint8)


@pytest.mark.parametrize(
    "images, words",
    [
        (
            pictures()[torch.randperm(N, generator=torch.Generator().manual_seed(1))],
            ["does not keep its teacher's seeds"],
        ),
        (pictures()[:1].expand(N, -1, -1, -1), ["does not keep", "draws much the same for every seed"]),
        (changed(scale_colour=1.4), ["oversaturated"]),
        (changed(scale_colour=0.7), ["faded"]),
    ],
)
def test_each_warning(images, words):
    warnings = said(images)
    for word in words:
        assert sum(word in line for line in warnings) == 1, warnings
    assert all("1 step" in line for line in warnings)


def test_contrast_warns_both_ways():
    for scale, word in ((1.4, "overdone"), (0.6, "washed out")):
        assert sum(word in line for line in said(changed(scale, scale))) == 1


def test_where_a_run_shows_them(finished_run, tmp_path, capsys):
    """In the metrics, equal to those of the evaluation again; in the report and in the card of an export."""
    teacher = json.loads((finished_run / "teacher/metrics.json").read_text())["evaluation"]
    student = json.loads((finished_run / "students/0001/metrics.json").read_text())["evaluation"][0]
    assert teacher[0]["feature_distance"] == 0 and teacher[0]["diversity_ratio"] == 1
    assert student["feature_distance"] > 0 and student["saturation"] is None
    assert "Does it keep its teacher" in (finished_run / "report.html").read_text()
    assert call("evaluate", str(finished_run), "--steps", "1", "--json", str(tmp_path / "again.json")) == 0
    again = json.loads((tmp_path / "again.json").read_text())["evaluation"][0]
    assert again["feature_distance"] == pytest.approx(student["feature_distance"], rel=1e-5)
    assert "next to the teacher's images" in capsys.readouterr().out
    assert call("export", str(finished_run), str(tmp_path / "out"), "--steps", "1") == 0
    assert "next to its teacher's images from the same noise" in (tmp_path / "out/README.md").read_text()


def without_seeds(run, tmp_path, left=()):
    """A copy of a run as an older version wrote it, without these keys but those in `left`."""
    copy = shutil.copytree(run, tmp_path / "old")
    for file in copy.rglob("metrics.json"):
        old = json.loads(file.read_text())
        del old[SEAL]
        old["evaluation"] = [{k: v for k, v in r.items() if k not in NAMES or k in left} for r in old["evaluation"]]
        file.write_text(json.dumps(sealed(old)))
    return copy


def test_what_an_older_version_wrote_is_read(finished_run, tmp_path, capsys):
    """It loads, is resumed next to new rows, shows a dash where it has nothing, and exports."""
    old = without_seeds(finished_run, tmp_path)
    assert "Does it keep its teacher" not in build_report(old).read_text()
    assert call("export", str(old), str(tmp_path / "out"), "--steps", "2") == 0
    assert "next to its teacher's images" not in (tmp_path / "out/README.md").read_text()
    shutil.rmtree(old / "students/0001")
    assert call("distill", *TINY_DISTILL, "--run", str(old)) == 0
    row = json.loads((old / "students/0001/metrics.json").read_text())["evaluation"][0]
    theirs = json.loads((finished_run / "students/0001/metrics.json").read_text())["evaluation"][0]
    assert {name: row[name] for name in NAMES} == {name: theirs[name] for name in NAMES}
    report = (old / "report.html").read_text()
    table = report[report.index("Does it keep its teacher") :]
    cells = {
        line[0]: line[1:]
        for found in re.findall("<tr>(<th scope=.row.>.*?)</tr>", table[: table.index("</table>")], re.S)
        if (line := re.findall("<t[hd][^>]*>(.*?)</t[hd]>", found))
    }
    assert set(cells["2"]) == {"&ndash;"} and f"{row['feature_distance']:.4g}" == cells["1"][1]


def test_a_row_with_some_of_the_keys(finished_run, tmp_path):
    some = without_seeds(finished_run, tmp_path, left=("feature_distance",))
    assert "Does it keep its teacher" in build_report(some).read_text()
    assert call("export", str(some), str(tmp_path / "out"), "--steps", "1") == 0
    assert "of the distance between images of different noise" in (tmp_path / "out/README.md").read_text()
