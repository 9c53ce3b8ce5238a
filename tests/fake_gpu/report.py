"""Of updates and generated code, as JSON: {"waits": {case: [wait, ...]}, "atomics": {module: [in each graph, ...]}, "a wait": ...}."""

# ruff: noqa: E402, I001
from tests.fake_gpu.cuda import Waits, pretend, to_fake  # before anything else: it goes before torch

import contextlib
import importlib.util
import json
import types
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

pretend()

from pdfast.data import ResidentImages, source
from pdfast.config import KeptConfig
from pdfast.diffusion import AlphaBars, Cosine, StepTable, build_closure_table, build_landing_table, build_step_table
from pdfast.engine import optimizer as optimizer_module
from pdfast.engine.throughput import Losses
from pdfast.engine.optimizer import Optimizer
from pdfast.engine.batch import TrainingBatch
from pdfast.engine.world import World
from pdfast.engine.loop import Method, Stage
from pdfast.methods import kept
from pdfast.methods import Denoise, Distillation, KeptProgressive, Pairs, Progressive, Reparameterize, RoundTable, Tract
from pdfast.networks import UNet
from pdfast.networks.guided import Guided, GuidedConfig
from pdfast.networks.layers import ResBlock
from pdfast.networks import edm_unet
from pdfast.recipes import preset
from pdfast.pretrained.diffusers import upsample_without_atomics
from tests.engine.test_parallelize import CONFIG
from tests.fake_gpu.inductor import generated

WORLD = World(torch.device("cuda", 0))
BATCH = 8


def images(share_of_gpu: float) -> ResidentImages:
    """Of the digits' size, on the GPU or, where that share of it is not enough, in the host's memory."""
    source.SHARE_OF_GPU = share_of_gpu
    made = ResidentImages.__new__(ResidentImages)
    size = CONFIG.image_size
    made.shape, made.num_images, made._device = (size, size, CONFIG.image_channels), 64, WORLD.device
    home = source.home_of(1, WORLD.device)
    made._images = torch.zeros(64, *made.shape, dtype=torch.uint8, device=home)
    made._labels = torch.zeros(64, dtype=torch.int64, device=home)
    return made


def table(steps: int, method: type[Distillation] = Progressive) -> StepTable:
    return TABLES[method, steps].map(lambda c: torch.empty(c.shape, dtype=c.dtype, device=WORLD.device))


def waits(images: ResidentImages, method: Method, average: torch.nn.Module, losses: Losses) -> list[str]:
    """Of the second update: the first fills what is kept. average: of the student, that the optimizer keeps."""
    batch = TrainingBatch(images, WORLD, method.student.config, seed=0, batch_size=BATCH, flip=True)
    if isinstance(method, Pairs):
        method.start_from(2, table(2, Pairs), lambda steps: method.teacher.state_dict(), batch)
        method.begin(batch, STAGE, types.SimpleNamespace(say=lambda text: None))
    optimizer = Optimizer(method.student, WORLD, clip=1.0, ema=0.9, fast_ema=0.5, fast=average, backend="torch")
    with Waits() as seen:
        for i in range(2):
            seen.found.clear()
            method.load(batch, STAGE, i)
            optimizer.set(i, 1e-3)
            values, targets = method.gradient(batch, micro_batches=2)
            losses.add(values, targets.row, targets.count)
            optimizer.step(values.mean())
    return seen.found


def of_updates() -> dict[str, list[str]]:
    source.order_of = lambda samples, num_images, seed: torch.zeros_like(samples)  # it is the CPU's alone
    optimizer_module.adamw = lambda *_, **__: None  # PyTorch's own kernel, which has no fake
    kept.trajectory = lambda model, z, phi, **_: (
        [z] * (len(phi) - 1)
    )  # it looks at the angles' values, before the round
    student, teacher, average = (to_fake(network) for network in NETWORKS)
    guided_student, guided_teacher, guided_average = (to_fake(network) for network in GUIDED_NETWORKS)
    losses, rows = Losses(WORLD), RoundTable(table(8))
    rows.set(table(2))

    TABULATED.knots, TABULATED._rises = (torch.zeros(t.shape) for t in (TABULATED.knots, TABULATED._rises))

    methods = {
        "a round": Progressive(student, teacher, rows),
        "kept targets": KeptProgressive(student, teacher, rows),
        "pairs": Pairs(student, teacher, RoundTable(table(2, Pairs))),
        "transitive closure": Tract(student, teacher, RoundTable(table(2, Tract))),
        "a conversion": Reparameterize(student, teacher, (0.2, 1.5), 1.55),
        "a teacher": Denoise(student, Cosine(), "snr"),
        "a teacher without classes at times": Denoise(guided_student, Cosine(), "snr", label_dropout=0.1),
        "a guided round": Progressive(guided_student, Guided(GuidedConfig(GUIDED, (0.0, 4.0)), guided_teacher), rows),
        "a teacher of a table": Denoise(student, TABULATED, "snr"),
    }
    for method in methods.values():
        if isinstance(method, Distillation):
            method.config, method.machine = CONFIGURED, ALONE
    methods["transitive closure"].average = average
    averages = {student: average, guided_student: guided_average}
    found = {name: waits(images(0.5), method, averages[method.student], losses) for name, method in methods.items()}
    return found | {"a round from the host's memory": waits(images(0.0), methods["a round"], average, losses)}


def a_wait() -> list[str]:
    """What is found in two lines that wait."""
    value = torch.zeros((), device="cuda")
    with Waits() as seen:
        with contextlib.suppress(DataDependentOutputException):
            value.item()
        torch.zeros(3).to("cuda")
    return [wait.partition(" at ")[0] for wait in seen.found]


def upsampling() -> dict[str, torch.nn.Module]:
    """What doubles the resolution in the networks, and PyTorch's own."""
    modules = {"ours": ResBlock(16, 16, 32, 4, 0.0, "up"), "EDM": edm_unet.Resample("up", (1, 1))}
    modules["PyTorch"] = torch.nn.UpsamplingNearest2d(scale_factor=2)
    if importlib.util.find_spec("diffusers"):
        from diffusers.models.upsampling import Upsample2D

        modules["diffusers"] = torch.nn.Sequential(Upsample2D(16, use_conv=True))
        upsample_without_atomics(modules["diffusers"])
    return modules


def atomics() -> dict[str, list[int]]:
    """Atomic additions in the generated code, forward and backward."""
    found = {}
    for name, module in UPSAMPLING.items():
        x = torch.empty(8, 16, 8, 8, device="cuda", memory_format=torch.channels_last).requires_grad_()
        emb = [torch.empty(8, 32, device="cuda")] if name == "ours" else []
        torch._dynamo.reset()
        found[name] = [source.count("tl.atomic_add") for source in generated(to_fake(module), x, *emb)]
    return found


UPSAMPLING = upsampling()
GUIDED = CONFIG.changed(null_label=CONFIG.num_classes, guidance=(0.0, 4.0))
NETWORKS, GUIDED_NETWORKS = (
    [UNet(config), *(UNet(config).requires_grad_(False) for _ in range(2))] for config in (CONFIG, GUIDED)
)
TABLES = {
    (Progressive, 8): build_step_table(Cosine(), 8, "v", "truncated_snr"),
    (Progressive, 2): build_step_table(Cosine(), 2, "v", "truncated_snr"),
    (Tract, 2): build_closure_table(Cosine(), 8, 2, "v", "truncated_snr"),
    (Pairs, 2): build_landing_table(Cosine(), 2, "v", "truncated_snr"),
}
STAGE = Stage(8, 2, 1)
CONFIGURED = replace(
    preset("digits"),
    network=CONFIG,
    plan="8,4,2",
    rounds=2,
    start_steps=8,
    end_steps=2,
    batch_size=BATCH,
    kept=KeptConfig(32, 2),
)
ALONE = types.SimpleNamespace(
    asked_to_stop=lambda place: False, watchdog=types.SimpleNamespace(beat=lambda place: None)
)
TABULATED = AlphaBars(torch.linspace(0.99, 0.0, 16, dtype=torch.float64))

if __name__ == "__main__":
    with FakeTensorMode(allow_non_fake_inputs=True):
        report = {"waits": of_updates(), "atomics": atomics(), "a wait": a_wait()}
    print(json.dumps(report))
