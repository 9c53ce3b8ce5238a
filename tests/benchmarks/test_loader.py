"""`python -m benchmarks.loader` on a few small files."""

import json

import numpy as np

from benchmarks import loader
from tests.data.archives import write_tar
from tests.data.files import encoded


def test_rows(tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 20, 20, 3), dtype=np.uint8)
    write_tar(tmp_path / "a.tar", {f"{i}.jpg": encoded(image, "JPEG") for i, image in enumerate(pixels)}, "w")
    flags = "--image-size 8 --batch 4 --seconds 0.1 --workers 0 --device cpu".split()
    chosen = ["resident", "portable", "webdataset", "dataloader"]
    file = tmp_path / "rows.json"
    command = ["--data", str(tmp_path), *flags, "--loaders", *chosen, "--json", str(file)]
    assert loader.main(command) == 0
    report = json.loads(file.read_text())
    assert (report["header"]["images"], report["header"]["kind"]) == (8, "tar shards")
    assert [row["loader"] for row in report["rows"]] == chosen
    for row in report["rows"]:
        if "unavailable" in row:
            assert row["loader"] == "webdataset" and "not installed" in row["unavailable"]
        else:
            assert row["images_per_second"] > 0 and row["cpu_us"] > 0 and row["first_s"] > 0
            assert ("data_wait" in row) == (row["loader"] in loader.OURS)
    resident = report["rows"][0]
    assert 0 <= resident["data_wait"] < 0.5 and resident["of_no_data"] > 0.3
    assert "images/s a core" in capsys.readouterr().out
