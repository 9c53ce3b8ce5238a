"""Whatever is in the files of a model's folder: it is loaded, or one UsageError says what is wrong, soon and in little memory."""

import copy
import json
import resource
import time

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdfast import Flow, Teacher, own_code
from pdfast.io.errors import UsageError
from pdfast.pretrained.model_folder import SavedModel, fill_model_folder, load_model
from tests.pretrained.pipelines import save, unet
from tests.pretrained.test_edm import write as write_edm
from tests.pretrained.test_weights import made

CPU = torch.device("cpu")
EXAMPLES = settings(
    max_examples=25, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 3, 7, 65536, 10**7, 2**31, 2**63, 2**90, 10**400, -(2**63)]),
    st.sampled_from([0.0, -0.5, 1e-320, 1e308, float("nan"), float("inf"), -float("inf")]),
    st.sampled_from(
        ["", "x", "../../x", "linear", "kind\x00", "\ud800", "1000", "teacher", "diffusers", "edm", "DDPMScheduler"]
    ),
    st.text(max_size=5),
    st.recursive(
        st.integers(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner)
    ),
    st.sampled_from([[], {}, [[]], [1], ["diffusers"], ["diffusers", None], [0.5] * 1000, {"kind": "converted"}]),
)


FUNCTION = f"{__name__}:teacher"


class Convolution(torch.nn.Conv2d):
    def forward(self, z, phi, cond):
        return super().forward(z)


def teacher():
    """What the folder `module` is of."""
    return Teacher(Convolution(1, 1, 3, padding=1), "flow", Flow(), (1, 8, 8))


def places(value, path=()):
    """Of every value in a JSON document, the whole among them."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def altered(document, path, value, how):
    """With another value at a place, without it, with it twice, or with more beside it."""
    if not path:
        return value
    document = copy.deepcopy(document)
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    if how == "drop":
        del inner[path[-1]]
    elif how == "wrap":
        inner[path[-1]] = [inner[path[-1]]]
    elif how == "add" and isinstance(inner, dict):
        inner["more"] = value
    else:
        inner[path[-1]] = value
    return document


def loads_or_says(folder):
    """In seconds of this process, and with a GiB."""
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        loaded = load_model(folder, CPU)
        assert isinstance(loaded, SavedModel)
        loaded.schedule.build()
    except UsageError as error:
        assert "\n" not in str(error) and len(str(error)) < 5000
    assert time.process_time() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


@pytest.fixture(
    scope="module",
    params=[
        "ours",
        "converted",
        "diffusers in ours",
        "edm",
        "edm in ours",
        "pipeline",
        "edm pipeline",
        "shards",
        "module",
    ],
)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any") / "model"
    match request.param:
        case "pipeline":
            save(folder, DDIMScheduler(100, trained_betas=[0.1] * 5, prediction_type="v_prediction"), unet(classes=2))
        case "edm pipeline":
            save(folder, EDMEulerScheduler())
        case "shards":
            save(folder, DDIMScheduler(100, prediction_type="v_prediction")).save_pretrained(
                folder / "unet", max_shard_size="60KB"
            )
            (folder / "unet/diffusion_pytorch_model.safetensors").unlink(missing_ok=True)
        case "edm":
            write_edm(folder)
        case "module":
            own_code.allow(FUNCTION)
            saved = load_model(FUNCTION, CPU)
            folder.mkdir()
            fill_model_folder(folder, saved.network.state_dict(), saved.config, saved.schedule, None)
        case kind:
            made(kind, folder)
    load_model(folder, CPU)
    yield folder
    own_code.allow(None)


@EXAMPLES
@given(data=st.data())
def test_any_json(folder, data):
    file = data.draw(st.sampled_from(sorted(folder.rglob("*.json"))))
    whole = file.read_bytes()
    document = json.loads(whole)
    document.pop("checksum", None)  # as of an earlier version: what is behind it is read
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(list(places(document)))) if isinstance(document, dict | list) else ()
        document = altered(
            document, path, data.draw(ODD), data.draw(st.sampled_from(["set", "set", "drop", "wrap", "add"]))
        )
    try:
        file.write_text(json.dumps(document))
        loads_or_says(folder)
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize("folder", ["ours", "diffusers in ours"], indirect=True)
def test_a_changed_config_is_noticed(folder):
    """Whichever of its values it is, the names of the fields and the checksum among them."""
    file = folder / "config.json"
    whole = file.read_bytes()
    document = json.loads(whole)
    try:
        for path in places(document):
            for value, how in ((0.125, "set"), (None, "drop"), (0.125, "add")):
                if path and path != ("checksum",) or how == "set":
                    file.write_text(json.dumps(altered(document, path, value, how)))
                    with pytest.raises(UsageError):
                        load_model(folder, CPU)
        del document["checksum"]
        file.write_text(json.dumps(document))
        load_model(folder, CPU)
    finally:
        file.write_bytes(whole)


@EXAMPLES
@given(data=st.data())
def test_any_bytes(folder, data):
    """Of the weights and of the JSON: cut, with bytes in the place of others, and with none of their own."""
    files = [file for file in sorted(folder.rglob("*")) if file.suffix in (".json", ".safetensors")]
    file = data.draw(st.sampled_from(files))
    whole = bytearray(file.read_bytes())
    content = bytearray(whole)
    match data.draw(st.sampled_from(["cut", "header", "any", "own"])):
        case "cut":
            del content[data.draw(st.integers(0, len(content) - 1)) :]
        case "header":
            for _ in range(data.draw(st.integers(1, 4))):
                content[data.draw(st.integers(0, min(400, len(content) - 1)))] = data.draw(st.integers(0, 255))
        case "any":
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        case "own":
            content = bytearray(data.draw(st.binary(max_size=64)))
    try:
        file.write_bytes(content)
        loads_or_says(folder)
    finally:
        file.write_bytes(whole)
