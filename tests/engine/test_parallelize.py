"""What is done to a network from outside changes nothing but rounding."""

import pytest
import torch

from pdfast.data import ResidentImages
from pdfast.diffusion import Cosine, build_step_table
from pdfast.engine import parallelize
from pdfast.engine.batch import TrainingBatch
from pdfast.engine.world import World
from pdfast.methods import Denoise, Progressive, RoundTable
from pdfast.networks import NetworkConfig, UNet

ALONE = World(torch.device("cpu"))
CONFIG = NetworkConfig(
    image_size=8,
    image_channels=3,
    channels=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    head_dim=16,
    emb_channels=32,
    num_groups=4,
    prediction="v",
    num_classes=3,
)


def network(seed=0):
    """With no weight at zero, as after some training."""
    torch.manual_seed(seed)
    model = UNet(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def loaded(batch_size=8):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20, 8, 8, 3), dtype=torch.uint8, generator=generator)
    source = ResidentImages("noise", images, torch.arange(20) % 3)
    batch = TrainingBatch(source, ALONE, CONFIG, seed=1, batch_size=batch_size, flip=True)
    batch.load(1, 5)
    return batch


def gradients(model, micro_batches=1):
    teacher = network(1).eval().requires_grad_(False)
    table = RoundTable(build_step_table(Cosine(), 4, "v", "truncated_snr"))
    losses, targets = Progressive(model, teacher, table).gradient(loaded(), micro_batches)
    return losses, targets.row, {name: p.grad for name, p in model.named_parameters()}


def test_the_names_of_parameters_stay():
    model, plain = network(), network()
    parallelize.checkpoint_activations(model)
    parallelize.compile_network(model)
    assert list(model.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("change", ["recompute", "micro_batches"])
def test_memory_for_work_with_equal_gradients(change):
    losses, k, expected = gradients(network())
    model = network()
    if change == "recompute":
        parallelize.checkpoint_activations(model)
    ours, ours_k, found = gradients(model, 4 if change == "micro_batches" else 1)
    assert torch.equal(k, ours_k)
    torch.testing.assert_close(ours, losses, rtol=1e-5, atol=1e-7)
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * scale, msg=name)


def test_recompute_keeps_less():
    def kept(model):
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        inputs = torch.randn(8, 3, 8, 8), torch.rand(8), torch.zeros(8, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(*inputs)
        return sum(sizes.values())

    plain, recomputed = network(), network()
    parallelize.checkpoint_activations(recomputed)
    assert kept(recomputed) < 0.6 * kept(plain)


def test_bf16_is_near_and_the_teachers_copy_equal():
    z, phi, cond = torch.randn(8, 3, 8, 8), torch.rand(8), torch.arange(8) % 3
    plain, student, teacher = network().eval(), network().eval(), network().eval()
    exact = plain(z, phi, cond)
    student.dtype = teacher.dtype = torch.bfloat16
    parallelize.cast_blocks(teacher, torch.bfloat16)
    halved = {name for name, p in teacher.named_parameters() if p.dtype == torch.bfloat16}
    assert {"conv_in.weight", "conv_out.weight", "time_mlp.0.weight", "norm_out.weight"}.isdisjoint(halved)
    assert {"mid_block1.conv1.weight", "mid_block1.norm1.weight", "mid_attention.qkv.weight"} <= halved
    with torch.no_grad():
        ours, theirs = student(z, phi, cond), teacher(z, phi, cond)
    assert torch.equal(ours, theirs) and ours.dtype == torch.float32
    assert 0 < (ours - exact).abs().max() < 0.03 * exact.abs().max()


def test_the_gradients_of_the_norms_are_not_rounded():
    """Their values are rounded to bf16, as the teacher's copy has them; the sums over images are float32."""
    model = network().train()
    model.dtype = torch.bfloat16
    for p in model.parameters():
        p.data += 0.01 * torch.randn_like(p)
    model(torch.randn(8, 3, 8, 8), torch.rand(8), torch.arange(8) % 3).square().mean().backward()
    for name in (
        "mid_block1.norm1.weight",
        "mid_block1.norm2.bias",
        "mid_attention.norm.weight",
        "mid_attention.norm.bias",
    ):
        gradient = model.get_parameter(name).grad
        assert gradient.dtype == torch.float32
        assert not torch.equal(gradient, gradient.bfloat16().float()), name


def test_a_small_angle_keeps_its_noise_in_bf16():
    """z enters the network in float32: bf16's rounding of it would be larger than the noise at the smallest angles."""
    x, eps = torch.rand(1, 3, 8, 8), torch.randn(1, 3, 8, 8)
    model = network().eval()
    model.dtype = torch.bfloat16
    seen = []
    model.conv_in.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    model(x + 1e-4 * eps, torch.tensor([1e-4]), torch.tensor([0]))
    torch.testing.assert_close((seen[0] - x) / 1e-4, eps, rtol=0, atol=2e-3)


def test_weights_are_written_where_they_are():
    source, target = network(), network(1)
    addresses = [p.data_ptr() for p in target.parameters()]
    parallelize.set_weights(target, source.state_dict(), ALONE)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
    assert addresses == [p.data_ptr() for p in target.parameters()]
    with pytest.raises(ValueError, match="conv_in.bias has shape"):
        parallelize.set_weights(target, source.state_dict() | {"conv_in.bias": torch.zeros(3)}, ALONE)


def test_a_smaller_table_in_the_place_of_a_larger():
    """A round's rows in the tensors of the first round's give the same update as a table of their own."""
    table = RoundTable(build_step_table(Cosine(), 8, "v", "snr"))
    table.set(build_step_table(Cosine(), 2, "v", "snr"))
    own = RoundTable(build_step_table(Cosine(), 2, "v", "snr"))
    student, teacher = network(), network(1).requires_grad_(False)
    results = [Progressive(student, teacher, t).gradient(loaded()) for t in (table, own)]
    assert torch.equal(results[0][0], results[1][0]) and set(results[0][1].row.tolist()) == {1, 2}


def test_the_teachers_micro_batches():
    whole, parts = network(), network()
    losses = [Denoise(m, Cosine(), "truncated_snr").gradient(loaded(), n)[0] for m, n in ((whole, 1), (parts, 2))]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-7)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
