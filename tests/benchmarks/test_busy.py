"""`python -m benchmarks.busy`: the processes of its cases really start, take turns and end."""

import json

import pytest

from benchmarks import busy


@pytest.mark.slow
def test_a_row_for_each_case(tmp_path, capsys):
    file = tmp_path / "busy.json"
    flags = ["--busy", "1", "--turns", "2", "--updates", "1", "--json", str(file)]
    assert busy.main(["--cases", "passive", "a process a core", *flags]) == 0
    written = json.loads(file.read_text())
    assert [row["case"] for row in written["rows"]] == ["passive", "a process a core"]
    assert all(0 < row["least_ms"] <= row["ms"] and row["on_cores_ms"] > 0 for row in written["rows"])
    assert capsys.readouterr().out.count("1 busy, load") == 2 and written["header"]["commit"]
