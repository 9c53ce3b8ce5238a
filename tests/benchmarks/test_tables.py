"""`python -m benchmarks.tables`: what a page shows of results."""

import json

import pytest

from benchmarks import first, tables

KERNELS = [
    {"op": "attention", "case": "16x64", "provider": provider, "mode": "fwd", "graph": graph, "median_ms": ms}
    | {"of_copy": 0.2, "of_matmul": 0.4}
    for provider, graph, ms in (("pdfast", True, 0.0071), ("pdfast", False, 0.05), ("flash", True, 0.0112))
]
STEP = {"preset": "cifar10", "batch": 128, "provider": "pdfast", "variant": "compile auto", "images_per_second": 1924.5}
STEP |= {"median_ms": 66.51, "tflop_s": 344.43, "mfu": 0.488, "peak_mib": 6113.4}
END = {"network": "cifar10", "end": "conv_in", "of": "forward", "by": "cuDNN", "ms": 0.2541}
UPDATE = {"kinds": dict.fromkeys(first.KINDS, 1.5), "kernels_ms": 13.5, "median_ms": 14.004, "kernels": [{"calls": 7}]}


TUNED = {
    "case": "16x64",
    "table": "attention forward",
    "row": "Config(1)",
    "rejected": None,
    "median_ms": 0.25,
    "registers": 96,
}


def shown(capsys, tmp_path, **files):
    paths = [tmp_path / f"{name}.json" for name in files]
    for path, found in zip(paths, files.values(), strict=True):
        path.write_text(json.dumps(found))
    assert tables.main(list(map(str, paths))) == 0
    return capsys.readouterr().out


def test_each_command_has_its_table(capsys, tmp_path):
    printed = shown(
        capsys,
        tmp_path,
        before={"rows": [END, END | {"by": "products", "ms": 0.1}], "update": UPDATE},
        after={"rows": [END], "update": UPDATE | {"median_ms": 12.0}},
        step={"rows": [STEP, {"unavailable": "out of memory"}]},
        tune={"rows": [TUNED, TUNED | {"rejected": "spills"}]},
        kernels={"rows": [*KERNELS, {"unavailable": "has no FiLM"}]},
    )
    for line in (
        "| ms | cuDNN | products |",
        "| cifar10 conv_in, forward | 0.254 | 0.100 |",
        "| ms | before | after |",
        "| group_norm | 1.50 | 1.50 |",
        "| an update, without the profiler | 14.00 | 12.00 |",
        "| cifar10 | 128 | pdfast | compile auto | 1924 | 66.5 | 344 | 48.8% | 6113 |",
        "| us | mode | pdfast | flash | pdfast's share |",
        "| 16x64 | attention forward | Config(1) | 250 | 96 |",
        "| attention 16x64 | fwd | 7.1 | 11.2 | 40% of matmul |",
    ):
        assert line in printed.splitlines()


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": [{}], "update": {}}'])
def test_another_file_is_one_line(capsys, tmp_path, text):
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        tables.main([str(tmp_path / "file.json")])
    assert capsys.readouterr().err.count("\n") == 1
