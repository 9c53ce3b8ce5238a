"""`python -m pdfast.data.prepare`, from the command line to the file, and its exit codes."""

import os
import resource
import shlex
import shutil
import sys

import numpy as np
import pytest

from pdfast.arguments import distill_arguments
from pdfast.data import cifar10, load_source
from pdfast.data.cifar10 import load_cifar10
from pdfast.data.convert import write_npz
from pdfast.io.errors import UsageError
from tests.commands import call, spawn
from tests.data.archives import PARTS, npm_members, write_fashion, write_tar
from tests.data.errors import refusal


@pytest.fixture(scope="module")
def fashion(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fashion")
    yield write_fashion(folder, 60000, 10000)
    shutil.rmtree(folder)


@pytest.fixture
def tmp_path(tmp_path):
    """Whole data sets are too large to leave them behind, as pytest does."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def prepare(*arguments: object, **options: object) -> tuple[int, str, str]:
    """The exit code, the output and the errors of the command in a process of its own."""
    process = spawn("data.prepare", *map(str, arguments), **options)
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def test_fashion_mnist_from_the_command_line(tmp_path, fashion):
    out = tmp_path / "new folder" / "fashion.npz"
    code, output, errors = prepare("fashion-mnist", fashion, out)
    assert (code, errors) == (0, "")
    *figures, following = output.splitlines()
    assert figures == [
        "images        60000 of 28x28x1, and 10000 test images",
        "classes       10",
        "channel mean  0.2863",
        "channel std   0.0000",
        f"written       {out}",
    ]
    assert following.startswith("next          python -m pdfast.distill ") and following.endswith(f" --data '{out}'")
    assert os.listdir(out.parent) == ["fashion.npz"]
    with np.load(out, allow_pickle=False) as arrays:
        assert {name: arrays[name].shape for name in arrays} == {
            "images": (60000, 28, 28, 1),
            "labels": (60000,),
            "test_images": (10000, 28, 28, 1),
            "test_labels": (10000,),
        }
        assert arrays["labels"][:3].tolist() == [0, 1, 2] and (arrays["images"] == 73).all()
    source = load_source(str(out), image_size=28, channels=1)
    assert (source.num_images, source.num_classes) == (60000, 10)


def test_a_whole_cifar10_in_this_process(tmp_path, capsys, monkeypatch):
    """Plain images of nearly the true means: all that is checked of an archive without the known hash."""
    planes = np.repeat(np.array([125, 123, 114], dtype=np.uint8), 1024)
    records = np.empty((10000, 3073), dtype=np.uint8)
    records[:, 0], records[:, 1:] = np.arange(10000) % 10, planes
    archive = write_tar(tmp_path / "a.tar", {f"{name}.bin": records.tobytes() for name in PARTS}, "w")
    assert call("data.prepare", "cifar10", str(archive), str(tmp_path / "a b.npz")) == 0
    output = capsys.readouterr().out
    assert "50000 of 32x32x3, and 10000 test images" in output
    assert "channel mean  0.4902 0.4824 0.4471\n" in output
    assert f"--preset cifar10-fast --data '{tmp_path / 'a b.npz'}'\n" in output
    with np.load(tmp_path / "a b.npz", allow_pickle=False) as arrays:
        assert arrays["images"].shape == (50000, 32, 32, 3) and arrays["test_images"].shape == (10000, 32, 32, 3)
        assert (arrays["images"][::1000] == (125, 123, 114)).all()
        assert np.bincount(arrays["test_labels"]).tolist() == [1000] * 10
    monkeypatch.setattr(cifar10, "MEAN", (0.4935, 0.4822, 0.4465))
    message = refusal(load_cifar10, archive, names=archive)
    assert "(training part) has channel means [0.4902, 0.4824, 0.4471], expected [0.4935, 0.4822, 0.4465]" in message


def test_handwritten_digits_are_not_fashion(tmp_path, capsys):
    write_fashion(tmp_path / "mnist", 60000, 10000, grey=33)
    assert call("data.prepare", "fashion-mnist", str(tmp_path / "mnist"), str(tmp_path / "a.npz")) == 2
    assert "(training part) has channel means [0.1294], expected [0.286]" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["mnist"]


def test_other_data_end_with_2_and_one_line(tmp_path, capsys):
    archive = write_tar(tmp_path / "a.tgz", npm_members(1))
    assert call("data.prepare", "cifar10", str(archive), str(tmp_path / "a.npz")) == 2
    output, errors = capsys.readouterr()
    assert output == "" and errors.count("\n") == 1
    assert errors.startswith(f"pdfast: error: {archive} (training part) has 5 images")
    assert os.listdir(tmp_path) == ["a.tgz"]


def test_a_full_disk_ends_with_1_and_one_line_and_leaves_nothing(tmp_path, fashion):
    out = tmp_path / "a.npz"
    small = (1 << 20, 1 << 20)
    code, output, errors = prepare(
        "fashion-mnist", fashion, out, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, small)
    )
    assert (code, output) == (1, "")
    assert errors.startswith(f"pdfast: error: the disk is full: could not write {out}") and errors.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "name, reason",
    [
        ("a.zip", "name a file that ends in .npz"),
        ("a", "name a file that ends in .npz"),
        ("file/a.npz", "(Not a directory); choose another OUT"),
    ],
)
def test_a_bad_out_is_refused_before_the_work(tmp_path, capsys, name, reason):
    (tmp_path / "file").write_text("")
    assert call("data.prepare", "cifar10", str(tmp_path / "none.tgz"), str(tmp_path / name)) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"pdfast: error: cannot write {tmp_path / name}") and reason in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize("command", [["cifar10", "none.tgz"], ["images", "photographs", "--size", "8"]])
def test_nothing_is_overwritten(tmp_path, capsys, command):
    out = tmp_path / "a.npz"
    out.write_text("mine")
    assert call("data.prepare", *command[:2], str(out), *command[2:]) == 2
    assert "a.npz is there already" in capsys.readouterr().err and out.read_text() == "mine"
    out.rename(tmp_path / "a.png")
    if command[0] == "images":  # whose contact sheet it would be
        assert call("data.prepare", *command[:2], str(out), *command[2:]) == 2
        assert "a.png is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ([], "Expected one of {cifar10, fashion-mnist, images}"),
        (["cifar10", "a"], "OUT"),
        (["images", "a", "b.npz", "--size", "x"], "invalid literal for int"),
    ],
)
def test_arguments_that_do_not_parse_are_one_line(arguments, reason, capsys):
    assert call("data.prepare", *arguments) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("pdfast: error: ") and errors.count("\n") == 1 and reason in errors


def test_a_folder_as_out_is_refused(tmp_path, capsys):
    (tmp_path / "a.npz").mkdir()
    assert call("data.prepare", "fashion-mnist", str(tmp_path), str(tmp_path / "a.npz")) == 2
    assert "name a file" in capsys.readouterr().err


def test_a_forbidden_folder_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UsageError, match=r"cannot write .*a\.npz \(Permission denied\); choose another OUT"):
        write_npz(tmp_path / "a.npz", images=np.zeros(3, dtype=np.uint8))
    assert os.listdir(tmp_path) == []


def test_the_command_that_is_printed_next_is_one(tmp_path, capsys, monkeypatch, fashion):
    assert call("data.prepare", "fashion-mnist", str(fashion), str(tmp_path / "a.npz")) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("next"))
    assert command[:3] == ["python", "-m", "pdfast.distill"]
    monkeypatch.setattr(sys, "argv", command[2:])
    config, _ = distill_arguments()
    shape = config.network.image_size, config.network.image_size, config.network.image_channels
    assert load_source(config.data, image_size=shape[0], channels=shape[2]).shape == shape
    assert not config.flip
