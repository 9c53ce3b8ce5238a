"""An index out of range: an error on a CPU, NaN from the kernels; never another row."""

import pytest
import torch

from pdfast.diffusion import Cosine, build_step_table
from pdfast.loss import distillation_loss
from pdfast_kernels import (
    ddim_step,
    ddim_step_weighted_loss,
    ddim_step_weighted_loss_and_grad,
    diffuse,
    noise_key,
    reference,
    use,
)
from pdfast_kernels.runtime import index as module
from tests.kernels.compare import channels_last

OPS = torch.ops.pdfast_kernels
WRONG = [-1, 5, -(2**40), 2**40]


def step(index, draw):
    z = channels_last(draw(3, 2, 4, 4)).requires_grad_()
    return ddim_step(z, z.detach(), draw(5), draw(5, 1), index)


def loss(index, draw):
    z = channels_last(draw(3, 2, 4, 4))
    columns = draw(5), draw(5, 1), draw(5, 1), draw(5, 1), draw(5)
    return ddim_step_weighted_loss(z.clone().requires_grad_(), z, z, z, *columns, index)


def loss_and_grad(index, draw):
    z = channels_last(draw(3, 2, 4, 4))
    columns = draw(5), draw(5, 1), draw(5, 1), draw(5, 1), draw(5)
    return ddim_step_weighted_loss_and_grad(z, z, z, z, *columns, index, grad_scale=1.0)


def noised(index, draw):
    return diffuse(torch.zeros(3, 4, 4, 1, dtype=torch.uint8), draw(3), noise_key(0), index)


OPERATIONS = {
    "ddim_step": (step, 0, 4, WRONG),
    "ddim_step_weighted_loss": (loss, 0, 4, WRONG),
    "ddim_step_weighted_loss_and_grad": (loss_and_grad, 0, 4, WRONG),
    "diffuse": (noised, 0, 2**32 - 1, [-1, 2**32, -(2**40)]),
}


@pytest.mark.parametrize("mode", ["triton", "reference"])
@pytest.mark.parametrize("op", OPERATIONS)
def test_an_index_out_of_range_is_refused(triton_kernels, draw, op, mode):
    function, first, last, wrong = OPERATIONS[op]
    with use(mode):
        for value in wrong:
            with pytest.raises(ValueError) as error:
                function(torch.tensor([0, value, value]), draw)
            assert str(error.value) == f"{op}: index[1] is {value}, expected {first} to {last}"
        function(torch.tensor([0, 4, 1]), draw)


@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_in_compiled_code_too(triton_kernels, draw, mode):
    z, a, b = draw(2, 3, 4, 4), draw(4), draw(4, 1)
    with use(mode):
        torch.compiler.reset()
        compiled = torch.compile(ddim_step, fullgraph=True, backend="aot_eager")
        good, bad = torch.tensor([3, 0]), torch.tensor([3, -1])
        assert torch.equal(compiled(z, z, a, b, good), ddim_step(z, z, a, b, good))
        with pytest.raises(ValueError, match=r"ddim_step: index\[1\] is -1, expected 0 to 3"):
            compiled(z, z, a, b, bad)


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("parts", [1, 2])
def test_the_kernels_write_nan_for_that_sample_alone(triton_kernels, draw, monkeypatch, value, parts):
    """As on a GPU, where nobody asks the values: the same of plain PyTorch."""
    monkeypatch.setattr(module, "asked", lambda index: False)
    good, bad = torch.tensor([4, 0, 2]), torch.tensor([4, value, 2])
    z, output = draw(3, 2, 4, 4).requires_grad_(), draw(3, 2 * parts, 4, 4).requires_grad_()
    columns = draw(5), draw(5, parts), draw(5, parts), draw(5, parts), draw(5)

    def results(index):
        stepped = ddim_step(z, output, *columns[:2], index)
        losses = ddim_step_weighted_loss(output, z.detach(), *2 * (output.detach(),), *columns, index)
        gradients = torch.autograd.grad(stepped.sum() + losses.sum(), (z, output))
        arguments = output.detach(), z.detach(), *2 * (output.detach(),), *columns, index
        return stepped, losses, *gradients, *ddim_step_weighted_loss_and_grad(*arguments, grad_scale=0.5)

    for mode in ("triton", "reference"):
        with use(mode):
            for ours, right in zip(results(bad), results(good), strict=True):
                assert ours[1].isnan().all()
                assert torch.equal(ours[::2], right[::2])


@pytest.mark.parametrize("value", [-1, 2**32])
def test_no_noise_of_another_sample(triton_kernels, draw, monkeypatch, value):
    monkeypatch.setattr(module, "asked", lambda index: False)
    images, phi = torch.zeros(2, 4, 4, 3, dtype=torch.uint8), draw(2)
    for mode in ("triton", "reference"):
        with use(mode):
            z, right = (diffuse(images, phi, noise_key(1), torch.tensor([i, 7])) for i in (value, 3))
        assert z[0].isnan().all() and torch.equal(z[1], right[1]) and not right.isnan().any()


def test_an_empty_table(draw):
    z = draw(1, 2, 3)
    with pytest.raises(ValueError, match=r"ddim_step: index\[0\] is 0, expected no value, of an empty table"):
        ddim_step(z, z, draw(0), draw(0, 1), torch.tensor([0]))
    assert ddim_step(z[:0], z[:0], draw(0), draw(0, 1), torch.tensor([], dtype=torch.int64)).shape == (0, 2, 3)


def test_rows_that_nobody_asks_for_are_nan(draw, monkeypatch):
    monkeypatch.setattr(module, "asked", lambda index: False)
    rows = module.rows_of(draw(3, 2), torch.tensor([2, -1, 3, 0]))
    assert rows.isnan().all(1).tolist() == [False, True, True, False]
    assert module.rows_of(draw(0, 2), torch.tensor([0])).isnan().all()


def test_vmap_does_not_ask(draw):
    """There is no value to ask; what is in range is as without it."""
    z, a, b = draw(2, 2, 3), draw(4), draw(4, 1)
    index = torch.tensor([[0, 3], [1, 2]])
    mapped = torch.vmap(lambda index: reference.ddim_step(z, z, a, b, index))(index)
    assert torch.equal(mapped, torch.stack([ddim_step(z, z, a, b, i) for i in index]))
    assert torch.equal(torch.vmap(lambda index: ddim_step(z, z, a, b, index))(index), mapped)


def network(z, phi, cond):
    return phi.view(-1, 1, 1, 1) * z


def test_k_of_the_distillation_loss(draw):
    table, x = build_step_table(Cosine(), 4, "v", "truncated_snr"), draw(2, 1, 4, 4)
    for k in (0, 5, -3):
        with pytest.raises(ValueError, match=rf"distillation_loss: k\[1\] is {k}, expected 1 to 4"):
            distillation_loss(network, network, x, table, k=torch.tensor([1, k]))
        with pytest.raises(ValueError, match=rf"StepTable.rows: k\[0\] is {k}, expected 1 to 4"):
            table.rows(torch.tensor([k]))


def test_k_of_the_distillation_loss_where_nobody_asks(draw, monkeypatch):
    monkeypatch.setattr(module, "asked", lambda index: False)
    table, x, eps = build_step_table(Cosine(), 4, "v", "truncated_snr"), draw(3, 1, 4, 4), draw(3, 1, 4, 4)
    losses = distillation_loss(network, network, x, table, k=torch.tensor([4, 0, 5]), eps=eps)
    right = distillation_loss(network, network, x, table, k=torch.tensor([4, 1, 1]), eps=eps)
    assert losses.isnan().tolist() == [False, True, True] and losses[0] == right[0]


def test_the_debug_switch_asks_on_a_gpu_too(monkeypatch):
    """By a stand-in: what is asked of a tensor is its device, then its values."""

    class OnGpu:
        device, is_cuda = torch.device("cuda"), True
        numel = staticmethod(lambda: 1)

    assert not module.asked(OnGpu())
    monkeypatch.setattr(module, "DEBUG", True)
    monkeypatch.setattr(torch._C._functorch, "is_functorch_wrapped_tensor", lambda tensor: False)
    monkeypatch.setattr(module, "Tensor", OnGpu)
    assert module.asked(OnGpu())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.raises(TypeError):  # it is no tensor
        module._raise_outside(OnGpu(), "index", 0, 1)
    # Compiled code asks too, and may be captured later.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    module._raise_outside(OnGpu(), "index", 0, 1)
