"""A model is whole in its folder: a table of alpha-bars is kept with it, whatever becomes of the file that it was read from."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml

from pdfast.diffusion import AlphaBars
from pdfast.io.errors import UsageError
from pdfast.pretrained.model_folder import load_model
from pdfast.schedule_config import ScheduleConfig
from tests.commands import TINY_DISTILL, TINY_GIVEN, TINY_ROUNDS, call

CPU = torch.device("cpu")
U = torch.linspace(0, 1, 33, dtype=torch.float64)
TABLE = np.cos(np.linspace(0.02, 1.5, 64)) ** 2
OTHER = TABLE * 0.99
pytestmark = pytest.mark.filterwarnings("ignore:64 images are too few")


def angles_of(folder):
    return load_model(folder, CPU).schedule.build().phi(U)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run whose schedule is read from table/ab.npy, seen from its folder, and the flags; not to be changed."""
    place = tmp_path_factory.mktemp("place")
    (place / "table").mkdir()
    np.save(place / "table/ab.npy", TABLE)
    flags = ["--schedule.name", "alpha_bars", "--schedule.alpha-bars", "table/ab.npy"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert call("distill", *TINY_DISTILL, *flags, "--run", "run") == 0
    return place, flags


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """A copy of its own, as the current folder."""
    shutil.copytree(made[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_nothing_depends_on_the_file_any_more(place):
    """Exactly the same angles, pictures, exports and students, from a folder that was moved too."""
    expected = AlphaBars(torch.from_numpy(TABLE)).phi(U)
    sampled = ["--count", "4", "--device", "cpu", "--out"]
    assert call("sample", "run/students/0001", *sampled, "before.npz") == 0
    np.save("table/ab.npy", OTHER)
    assert torch.equal(angles_of(place / "run/students/0001"), expected)
    shutil.rmtree("table")
    shutil.move("run", "moved")
    for folder in ("moved/teacher", "moved/students/0002", "moved/students/0001"):
        assert torch.equal(angles_of(place / folder), expected)
    assert call("sample", "moved/students/0001", *sampled, "after.npz") == 0
    with np.load("before.npz") as before, np.load("after.npz") as after:
        assert np.array_equal(before["images"], after["images"])
    assert call("evaluate", "moved", "--steps", "1", "--device", "cpu", "--json", "figures.json") == 0
    assert call("export", "moved", "plain", "--steps", "1", "--format", "safetensors") == 0
    assert torch.equal(angles_of(place / "plain"), expected)
    assert call("export", "moved", "pipeline", "--steps", "1", "--device", "cpu") == 0
    given = [*TINY_GIVEN, *TINY_ROUNDS, "--updates", "2", "--teacher", "moved/teacher"]
    assert call("distill", *given, "--run", "next") == 0
    assert torch.equal(angles_of(place / "next/students/0001"), expected)
    assert call("distill", *given, "--run", "next") == 0  # finished
    assert call("distill", "--config", "moved/config.yaml", "--run", "moved") == 0  # its own, from the values


def test_a_run_compares_the_values_and_not_the_path(made, place, capsys):
    command = [*TINY_DISTILL, "--schedule.name", "alpha_bars", "--run", "run", "--schedule.alpha-bars"]
    shutil.copy("table/ab.npy", "elsewhere.npy")
    assert call("distill", *command, "elsewhere.npy") == 0
    np.save("table/ab.npy", OTHER)
    capsys.readouterr()
    assert call("distill", *command, "table/ab.npy") == 2
    error = capsys.readouterr().err.strip()
    assert "was begun with schedule.table" in error and "\n" not in error and len(error) < 600
    assert call("distill", *command, "nowhere.npy") == 2
    assert "nowhere.npy" in capsys.readouterr().err


def as_before(place):
    """As a version wrote it that kept the path alone, and no checksum."""
    for file in place.rglob("config.json"):
        meta = json.loads(file.read_text())
        meta["schedule"] |= {"alpha_bars": "table/ab.npy"}
        meta["schedule"].pop("table", None)
        meta.pop("checksum", None)
        file.write_text(json.dumps(meta))
    config = yaml.safe_load((place / "run/config.yaml").read_text())
    config["schedule"] |= {"alpha_bars": "table/ab.npy"}
    del config["schedule"]["table"]
    (place / "run/config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def test_folders_of_earlier_versions(made, place, capsys):
    expected, flags = angles_of(place / "run/teacher"), made[1]
    as_before(place)
    assert torch.equal(angles_of(place / "run/teacher"), expected)
    assert call("distill", *TINY_DISTILL, *flags, "--run", "run") == 0
    assert yaml.safe_load((place / "run/config.yaml").read_text())["schedule"]["table"] == TABLE.tolist()
    as_before(place)
    assert call("export", "run", "whole", "--steps", "1", "--format", "safetensors") == 0
    shutil.move("table", "away")
    assert torch.equal(angles_of(place / "whole"), expected)
    capsys.readouterr()
    for command in (
        ["sample", "run", "--device", "cpu"],
        ["distill", *TINY_GIVEN, *TINY_ROUNDS, "--teacher", "run/teacher", "--run", "next"],
        ["distill", *TINY_DISTILL, *flags[:3], "away/ab.npy", "--run", "run"],
        ["distill", "--config", "run/config.yaml", "--run", "run"],
    ):
        assert call(*command) == 2, command
        error = capsys.readouterr().err.strip()
        assert "table/ab.npy" in error and "\n" not in error


def test_a_table_beside_another_schedule_is_refused(tmp_path, capsys):
    np.save(tmp_path / "ab.npy", TABLE)
    assert call("distill", *TINY_DISTILL, "--schedule.alpha-bars", str(tmp_path / "ab.npy")) == 2
    assert "--schedule.name alpha_bars" in capsys.readouterr().err


@pytest.mark.parametrize("table", [TABLE.reshape(8, 8), np.array(0.5), np.linspace(0.99, 0.01, 70_000)])
def test_what_is_no_table(table, tmp_path):
    np.save(tmp_path / "ab.npy", table)
    with pytest.raises(UsageError, match="shape"):
        ScheduleConfig("alpha_bars", alpha_bars=tmp_path / "ab.npy").with_table()


def test_trained_betas_are_kept_with_the_model(tmp_path):
    """Of a pipeline that is gone afterwards."""
    from diffusers import DDIMScheduler

    from pdfast.pretrained.model_folder import fill_model_folder
    from tests.pretrained.pipelines import save

    betas = (0.01 + 0.002 * np.arange(50)).tolist()
    save(tmp_path / "given", DDIMScheduler(50, trained_betas=betas, prediction_type="v_prediction"))
    saved = load_model(tmp_path / "given", CPU)
    (tmp_path / "kept").mkdir()
    fill_model_folder(tmp_path / "kept", saved.network.state_dict(), saved.config, saved.schedule, None)
    expected = angles_of(tmp_path / "given")
    shutil.rmtree(tmp_path / "given")
    assert torch.equal(angles_of(tmp_path / "kept"), expected)
    alpha_bar = torch.cos(expected[-1]) ** 2
    assert float(alpha_bar) == pytest.approx(np.prod(1 - np.array(betas)), rel=1e-4)
