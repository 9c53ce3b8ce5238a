"""A distillation update on a GPU: as one CUDA graph, in bf16, compiled; the same as without."""

import pytest
import torch

from benchmarks.updates import open_setting
from pdfast.config import EngineConfig
from pdfast.data import ResidentImages
from pdfast.diffusion import Cosine, build_step_table
from pdfast.engine import parallelize
from pdfast.engine.batch import TrainingBatch
from pdfast.engine.graph import CUDAGraphed
from pdfast.engine.optimizer import Optimizer
from pdfast.engine.world import World
from pdfast.loss import identity
from pdfast.methods import Progressive, RoundTable
from pdfast.networks import UNet
from pdfast.recipes import PRESETS
from pdfast_kernels import use
from tests.benchmarks.test_step import error, of_ours
from tests.commands import TINY_DISTILL, call
from tests.engine.test_parallelize import CONFIG

pytestmark = pytest.mark.gpu
ALONE = World(torch.device("cuda"))


def table(steps):
    return build_step_table(Cosine(), steps, "v", "truncated_snr", device="cuda")


def course(graph, dtype=torch.float32, compiled=False, optimizer="pdfast", updates=8, config=CONFIG):
    """The weights and the losses of a few updates, in rounds of 8 and of 2 steps."""
    torch.manual_seed(0)
    student, teacher = (config.build().cuda() for _ in range(2))
    for network in (student, teacher):
        network.dtype = dtype
        if compiled:
            parallelize.compile_network(network)
    parallelize.set_weights(teacher, student.state_dict(), ALONE)
    parallelize.cast_blocks(teacher.requires_grad_(False), dtype)
    images = torch.randint(0, 256, (64, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    source = ResidentImages("noise", images, torch.arange(64) % 3, "cuda")
    batch = TrainingBatch(source, ALONE, config, seed=0, batch_size=16, flip=True)
    fast = config.build().cuda()
    adam = Optimizer(student, ALONE, clip=1.0, ema=0.9, fast_ema=0.5, fast=fast, backend=optimizer)
    rows, losses = RoundTable(table(8)), torch.zeros(16, device="cuda")
    method = Progressive(student, teacher, rows, parallelize.compile_function if compiled else identity)

    def update():
        values, _ = method.gradient(batch, micro_batches=2)
        losses.copy_(values)
        adam.step(values.mean())

    run, seen = CUDAGraphed(update, ALONE, graph), []
    for steps in (8, 2):
        rows.set(table(steps))
        for i in range(updates):
            batch.load(1, i)
            adam.set(i, 1e-3)
            run()
            seen.append(losses.clone())
    if graph:
        assert run._graph is not None
    return torch.stack(seen), [p.detach().clone() for network in (student, fast) for p in network.parameters()]


@pytest.mark.parametrize("optimizer", ["pdfast", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_does_what_its_function_does_over_two_rounds(dtype, optimizer):
    torch.backends.cudnn.deterministic = True
    (losses, weights), (expected, others) = (course(graph, dtype, optimizer=optimizer) for graph in (True, False))
    assert torch.equal(losses, expected)
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compiled", [False, True])
def test_the_host_never_waits_for_an_update(monkeypatch, compiled):
    """Nor do two compiled updates differ in a bit, upsampling and all."""
    torch.backends.cudnn.deterministic = True
    load, step, calls = TrainingBatch.load, Optimizer.step, []

    def watched_load(*arguments):
        calls.append(arguments)
        torch.cuda.set_sync_debug_mode("error" if len(calls) > 2 else "default")  # the first ones compile
        load(*arguments)

    def watched_step(*arguments):
        step(*arguments)
        torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(TrainingBatch, "load", watched_load)
    monkeypatch.setattr(Optimizer, "step", watched_step)
    try:
        first = course(False, torch.bfloat16, compiled=compiled)
        calls.clear()
        second = course(False, torch.bfloat16, compiled=compiled)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first[0], second[0]) and all(map(torch.equal, first[1], second[1]))


def test_a_recording_that_fails_is_survived():
    count = torch.zeros(1000, device="cuda")

    def update():
        count.add_(1)
        if torch.cuda.is_current_stream_capturing():
            count.sum().item()

    run, stream = CUDAGraphed(update, ALONE), torch.cuda.current_stream()
    for _ in range(2):
        run()
    with pytest.warns(UserWarning, match="without a CUDA graph: it cannot be recorded"):
        run()
    run()
    assert count.tolist() == [4.0] * 1000 and torch.cuda.current_stream() == stream
    torch.randn(10, device="cuda")
    another = CUDAGraphed(lambda: count.add_(1), ALONE)
    for _ in range(4):
        another()
    assert another._graph is not None and float(count[0]) == 8


def test_optimizers_are_equal_in_results():
    (losses, _), (expected, _) = (course(False, optimizer=name) for name in ("pdfast", "torch"))
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_compiled_bf16_is_near_float32():
    losses, _ = course(True, torch.bfloat16, compiled=True)
    expected, _ = course(False)
    torch.testing.assert_close(losses.mean(1), expected.mean(1), rtol=0.1, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_network_of_diffusers(tmp_path, compiled):
    """In bf16, as a graph as without one."""
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers, which only the extra of the tests brings")
    from pdfast.pretrained import load_pipeline
    from tests.pretrained.pipelines import save, unet

    save(tmp_path, diffusers.DDPMScheduler(prediction_type="v_prediction"), unet(channels=3, classes=3))
    config = load_pipeline(tmp_path)[0].config
    torch.backends.cudnn.deterministic = True
    (losses, weights), (expected, others) = (
        course(graph, torch.bfloat16, compiled=compiled, config=config) for graph in (True, False)
    )
    assert torch.equal(losses, expected) and bool(torch.isfinite(losses).all())
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


@pytest.mark.filterwarnings("ignore")
def test_the_command(tmp_path):
    """Compiled, in bf16, as one CUDA graph: what a GPU runs unless said."""
    pytest.importorskip("tyro", reason="needs tyro, which reads command lines")
    flags = [*TINY_DISTILL[2:], "--device", "cuda", "--run", str(tmp_path / "run")]
    assert EngineConfig().graph and call("distill", *flags) == 0
    assert (tmp_path / "run/report.html").exists()


def test_the_weights_are_bit_equal_after_a_stop(tmp_path):
    """Checkpoints of a GPU's state: what was written is what is read."""
    from pdfast.engine.checkpoint import Checkpoints

    torch.manual_seed(0)
    model = UNet(CONFIG).cuda()
    optimizer = Optimizer(model, ALONE, clip=1.0, ema=0.9)
    saving = Checkpoints(tmp_path, "teacher", ALONE)
    saving.save(1, optimizer.state(), optimizer.counters(), {})
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    saving.finish()
    optimizer.load_state(saving.latest().tensors)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_reference_path_runs_too():
    with use("reference"):
        course(False, updates=2)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_benchmarks_update_is_the_published_one(dtype):
    with open_setting(PRESETS["digits"], torch.device("cuda"), 16, EngineConfig(dtype=dtype)) as setting:
        assert error(*of_ours(setting), setting) < {"fp32": 1e-3, "bf16": 0.1}[dtype]
