"""`python -m benchmarks.predict`: predicted beside measured, and what it writes."""

import json

import pytest

from benchmarks import predict


def predicted(tmp_path, *flags):
    file = tmp_path / "predicted.json"
    assert predict.main(["--json", str(file), *flags]) == 0
    report = json.loads(file.read_text())
    return {row.pop("kind"): row for row in report["rows"]}, report


def near(row, share):
    return row["predicted_ms"] == pytest.approx(row["measured_ms"], rel=share)


def test_cifar10_takes_what_was_measured(tmp_path, capsys):
    rows, report = predicted(tmp_path, "--plot", str(tmp_path / "kinds.svg"))
    assert report["header"]["measured"] == "benchmarks/results/h200/first.json", "the newer of two"
    whole = rows.pop("in all")
    assert near(whole, 0.1)
    assert sum(row["measured_ms"] for row in rows.values()) == pytest.approx(whole["measured_ms"])
    large = [row for row in rows.values() if row["measured_ms"] > 0.05 * whole["measured_ms"]]
    assert len(large) == 4 and all(near(row, 0.25) for row in large)
    text = capsys.readouterr().out
    assert "of it *" not in text and "floor, 5 forwards at the peak: 23.16 ms" in text
    assert report["mfu"] == pytest.approx(23.163 / whole["predicted_ms"], rel=1e-3)
    assert report["tflop_s"] == pytest.approx(989 * report["mfu"])
    assert (tmp_path / "kinds.svg").read_text().startswith("<svg")


def test_imagenet64_of_before_later_changes(tmp_path, capsys):
    """Kinds whose code is the same are near; the others, which were made faster, are marked."""
    rows, _ = predicted(tmp_path, "--preset", "imagenet64")
    marked = {kind for kind, row in rows.items() if row["note"]}
    assert marked == set(predict.CHANGED)
    same = [row for kind, row in rows.items() if kind not in marked and row["measured_ms"] > 0.05 * 367]
    assert len(same) == 2 and all(near(row, 0.1) for row in same)
    assert near(rows["in all"], 0.12) and rows["in all"]["predicted_ms"] < rows["in all"]["measured_ms"]
    assert "* measured before these kernels were changed" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--gpu", "h100"], ["--preset", "digits"]])
def test_nothing_is_measured_elsewhere(flags, tmp_path, capsys):
    rows, report = predicted(tmp_path, *flags)
    assert all(row.keys() == {"predicted_ms", "note"} for row in rows.values()) and "measured" not in report["header"]
    assert " measured" not in capsys.readouterr().out.replace("not measured", "")


def test_the_page_has_these_numbers(tmp_path):
    """Those of docs/results.md, a column an update."""
    columns, rates = [], []
    for preset in ("cifar10", "imagenet64"):
        for gpu in ("h200", "h100"):
            rows, report = predicted(tmp_path, "--preset", preset, "--gpu", gpu)
            if gpu == "h200":
                columns.append([f"{row['measured_ms']:.2f} {row['note']}".strip() for row in rows.values()])
            columns.append([f"{row['predicted_ms']:.2f}" for row in rows.values()])
            rates.append((f"{report['tflop_s']:.0f}", f"({report['mfu']:.1%})".replace("%", " %")))
    page = (predict.ROOT / "docs" / "results.md").read_text()
    for kind, *cells in zip(rows, *columns, strict=True):
        assert f"| {kind} | {' | '.join(cells)} |" in page.splitlines()
    assert all(text in page for rate in rates for text in rate)


@pytest.mark.parametrize("flags", [["--gpu", "v100"], ["--batch", "0"], ["--plot", "/nowhere/kinds.svg"]])
def test_refusals(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        predict.main(flags)
    assert capsys.readouterr().err.count("\n") == 1
