"""`AdamEma` in Triton's interpreter against torch.optim.AdamW in float64, and a loop for the averages."""

import math

import pytest
import torch

from pdfast_kernels import use
from pdfast_kernels.ops.adam_ema.adam_ema import TABLE, AdamEma, Scalar
from pdfast_kernels.runtime.launch import recorded
from tests.kernels.compare import RELATIVE, assert_relative, channels_last

CHUNK = TABLE.row(90, 1).block
SIZES = [(0,), (1,), (7,), (4097,), (3, 5, 2), (2, CHUNK), (64,)]
WIDE_SIZES = [(4,), (2, CHUNK), (8, 3)]
BETAS, EPS, WEIGHT_DECAY = (0.9, 0.999), 1e-8, 0.125
RATES = [2.0**-7, 2.0**-6, 2.0**-8, 0.0]  # learning rates, float32 numbers
CLIPS = [1.0, 0.5, 0.25, 2.0]
DECAY, SECOND_DECAY = 0.9375, 0.5
AVERAGES = [(True, False), (False, False), (True, True), (False, True)]  # the first, the second


def scalars(step, clip=1.0, average_rate=1 - DECAY, skip=0.0, second_average_rate=1 - SECOND_DECAY):
    """Of the step, counted from 1."""
    values = {
        Scalar.LEARNING_RATE: RATES[step - 1],
        Scalar.STEP: step,
        Scalar.CLIP: clip,
        Scalar.AVERAGE_RATE: average_rate,
        Scalar.SKIP: skip,
        Scalar.SECOND_AVERAGE_RATE: second_average_rate,
    }
    return torch.tensor([values[place] for place in Scalar], dtype=torch.float32)


class Problem:
    """Parameters, state and an AdamEma of them; `expected` takes the same steps with torch.optim.AdamW in float64."""

    def __init__(self, draw, sizes=SIZES, averaged=True, dtype=torch.float32, weight_decay=WEIGHT_DECAY, twice=False):
        self.draw, self.sizes = draw, sizes
        self.parameters = [draw(*size, dtype=dtype) for size in sizes]
        self.exp_avgs = [torch.zeros_like(p) for p in self.parameters]
        self.exp_avg_sqs = [torch.zeros_like(p) for p in self.parameters]
        self.averages = [p.clone() for p in self.parameters] if averaged else None
        self.theirs = [p.double().clone().requires_grad_() for p in self.parameters]
        self.second_averages = [p.clone() for p in self.parameters] if twice else None
        self.their_averages, self.their_second_averages = ([p.detach().clone() for p in self.theirs] for _ in range(2))
        self.adamw = torch.optim.AdamW(self.theirs, lr=0.0, betas=BETAS, eps=EPS, weight_decay=weight_decay)
        self.optimize(weight_decay)

    def optimize(self, weight_decay=WEIGHT_DECAY):
        state = self.parameters, self.exp_avgs, self.exp_avg_sqs, self.averages
        settings = {"betas": BETAS, "eps": EPS, "weight_decay": weight_decay}
        self.ours = AdamEma(*state, **settings, second_averages=self.second_averages)

    def gradients(self, dtype=torch.float32):
        return [self.draw(*size, dtype=dtype) for size in self.sizes]

    def expect(self, gradients, step, clip=1.0):
        for p, gradient in zip(self.theirs, gradients, strict=True):
            p.grad = gradient.double() * clip
        self.adamw.param_groups[0]["lr"] = RATES[step - 1]
        self.adamw.step()
        for averages, decay in ((self.their_averages, DECAY), (self.their_second_averages, SECOND_DECAY)):
            for average, p in zip(averages, self.theirs, strict=True):
                average.copy_(decay * average + (1 - decay) * p.detach())

    def tensors(self):
        lists = [self.parameters, self.exp_avgs, self.exp_avg_sqs, self.averages or [], self.second_averages or []]
        return [tensor for tensors in lists for tensor in tensors]

    def compare(self, relative=RELATIVE[torch.float32]):
        for i, p in enumerate(self.theirs):
            assert_relative(self.parameters[i], p, relative)
            assert_relative(self.exp_avgs[i], self.adamw.state[p]["exp_avg"], relative)
            assert_relative(self.exp_avg_sqs[i], self.adamw.state[p]["exp_avg_sq"], relative)
            if self.averages:
                assert_relative(self.averages[i], self.their_averages[i], relative)
            if self.second_averages:
                assert_relative(self.second_averages[i], self.their_second_averages[i], relative)


@pytest.mark.parametrize("sizes", [SIZES, WIDE_SIZES])
@pytest.mark.parametrize("averaged, twice", AVERAGES)
def test_several_steps(triton_kernels, draw, sizes, averaged, twice):
    problem = Problem(draw, sizes, averaged, twice=twice)
    for step in (1, 2, 3, 4):
        gradients = problem.gradients()
        problem.ours.step(gradients, scalars(step, CLIPS[step - 1]))
        problem.expect(gradients, step, CLIPS[step - 1])
        problem.compare()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("averaged, twice", AVERAGES)
def test_the_reference(draw, dtype, averaged, twice):
    problem = Problem(draw, averaged=averaged, dtype=dtype, twice=twice)
    for step in (1, 2, 3):
        gradients = problem.gradients(torch.bfloat16)
        problem.ours.step(gradients, scalars(step, CLIPS[step - 1]))
        problem.expect(gradients, step, CLIPS[step - 1])
        problem.compare(1e-5 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_another_dtype_are_read_in_float32(triton_kernels, draw, dtype):
    problem = Problem(draw)
    for step in (1, 2):
        gradients = problem.gradients(dtype)
        problem.ours.step(gradients, scalars(step, 0.5))
        problem.expect(gradients, step, 0.5)
        problem.compare()


@pytest.mark.parametrize("step", [1, 2, 10, 300, 1000, 10**5, 10**6])
def test_bias_correction(triton_kernels, step):
    """With the state at 0 a step is learning_rate (1 - beta1) / (1 - beta1^t) / sqrt((1 - beta2) / (1 - beta2^t))."""
    p, m, v = torch.zeros(8), torch.zeros(8), torch.zeros(8)
    values = scalars(1)
    values[Scalar.STEP] = step
    AdamEma([p], [m], [v], betas=BETAS, eps=1e-30).step([torch.ones(8)], values)
    corrections = [-math.expm1(step * math.log(beta)) for beta in BETAS]
    expected = -RATES[0] * 0.1 / corrections[0] / math.sqrt(0.001 / corrections[1])
    assert_relative(p, torch.full((8,), expected), 1e-6)


def test_no_momentum(triton_kernels):
    """betas = (0, 0): sign descent."""
    p = torch.zeros(8)
    AdamEma([p], [torch.zeros(8)], [torch.zeros(8)], betas=(0, 0), eps=1e-30).step([-torch.ones(8)], scalars(1))
    assert_relative(p, torch.full((8,), RATES[0]), 1e-6)


@pytest.mark.parametrize("skip", [1.0, math.nan, math.inf])
@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_a_skipped_step_changes_nothing(triton_kernels, draw, skip, mode):
    problem = Problem(draw, twice=True)
    problem.ours.step(problem.gradients(), scalars(1))
    before = [t.clone() for t in problem.tensors()]
    gradients = [g * math.nan for g in problem.gradients()]
    with use(mode):
        problem.ours.step(gradients, scalars(2, clip=math.nan, skip=skip))
    for now, then in zip(problem.tensors(), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_a_second_average_changes_nothing_else(triton_kernels, draw, mode):
    """Bit for bit, and nor does its rate where there is none."""
    problems = [Problem(draw, twice=twice) for twice in (True, False, False)]
    for problem in problems[1:]:
        torch._foreach_copy_(problem.tensors(), problems[0].tensors()[: len(problem.tensors())])
    for step in (1, 2):
        gradients = problems[0].gradients()
        with use(mode):
            for problem, values in zip(problems, (scalars(step), scalars(step), scalars(step)[:5]), strict=True):
                problem.ours.step(gradients, values)
    for problem in problems[1:]:
        assert all(map(torch.equal, problem.tensors(), problems[0].tensors()))


def test_a_second_average_that_was_exchanged_is_followed(triton_kernels, draw):
    problem = Problem(draw, twice=True)
    for step in (1, 2):
        for average in problem.second_averages:
            average.data = average.clone()
        gradients = problem.gradients()
        problem.ours.step(gradients, scalars(step))
        problem.expect(gradients, step)
        problem.compare()


def test_the_same_bits_on_every_run(triton_kernels, draw):
    problem = Problem(draw)
    copies = [t.clone() for t in problem.tensors()]
    n, gradients = len(SIZES), problem.gradients()
    problem.ours.step(gradients, scalars(1))
    lists = [copies[i : i + n] for i in range(0, 4 * n, n)]
    AdamEma(*lists, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY).step(gradients, scalars(1))
    assert all(torch.equal(one, other) for one, other in zip(problem.tensors(), copies, strict=True))


@pytest.mark.parametrize("twice", [True, False])
def test_addresses_that_16_bytes_do_not_divide(triton_kernels, draw, twice):
    """Views that start anywhere: what lies around them stays as it was."""
    sizes = (4, 8, 4099)
    buffers = [draw(5 + size) for size in sizes for _ in range(5)]
    problem = Problem(draw, [(size,) for size in sizes], twice=twice)
    views = [b[1 : b.numel() - 4] for b in buffers]
    for i, p in enumerate(problem.parameters):
        for view, value in zip(views[5 * i : 5 * i + 5], (p, 0 * p, 0 * p, p, p), strict=True):
            view.copy_(value)
    before = [b.clone() for b in buffers]
    problem.parameters, problem.exp_avgs, problem.exp_avg_sqs, problem.averages = (views[j::5] for j in range(4))
    problem.second_averages = views[4::5] if twice else None
    problem.optimize()
    gradients = problem.gradients()
    problem.ours.step(gradients, scalars(1))
    problem.expect(gradients, 1)
    problem.compare()
    for now, then in zip(buffers, before, strict=True):
        assert now[0] == then[0] and torch.equal(now[-4:], then[-4:])


def test_all_accesses_are_wide_only_where_everything_allows_it(triton_kernels, draw):
    def all_wide(parameter, state, gradient, second=None):
        with recorded(90) as launches:
            second_averages = None if second is None else [second]
            states = [state], [draw(8)[: len(parameter)]]
            AdamEma([parameter], *states, second_averages=second_averages).step([gradient], scalars(1))
        assert len(launches) == 1
        return launches[0].arguments["ALL_WIDE"]

    aligned, shifted = draw(8), draw(9)[1:]
    assert all_wide(aligned, aligned, aligned)
    assert not all_wide(aligned[:6], aligned[:6], aligned[:6])
    assert not all_wide(shifted, aligned, aligned)
    assert not all_wide(aligned, shifted, aligned)
    assert not all_wide(aligned, aligned, shifted)
    assert all_wide(aligned, aligned, aligned, aligned)
    assert not all_wide(aligned, aligned, aligned, shifted)


@pytest.mark.parametrize("shifted", range(6))
def test_what_the_compiler_is_told_of_addresses_is_true(triton_kernels, draw, monkeypatch, shifted):
    """Of two tensors, one has one of its six addresses elsewhere than at a multiple of 16 bytes."""
    from triton.runtime.interpreter import TensorHandle

    seen, set_attr = [], TensorHandle.set_attr

    def checked(handle, name, values):
        seen.append(bool((handle.data % values[0]).any()))
        set_attr(handle, name, values)

    monkeypatch.setattr(TensorHandle, "set_attr", checked)
    tensors = [draw(8).abs() for _ in range(6)]
    others = [(draw(9)[1:] if i == shifted else draw(8)).abs_() for i in range(6)]
    parameters, exp_avgs, exp_avg_sqs, averages, second_averages, gradients = map(
        list, zip(tensors, others, strict=True)
    )
    ours = AdamEma(parameters, exp_avgs, exp_avg_sqs, averages, second_averages=second_averages)
    ours.step(gradients, scalars(1))
    assert len(seen) == 7 and not any(seen)  # six pointers and a count, in one of the two programs


def test_gradients_move_and_come_in_another_memory_order(triton_kernels, draw):
    sizes = [(4, 3, 2, 5), (3, 2)]
    problem = Problem(draw, sizes)
    fixed = problem.gradients()
    for step in (1, 2, 3, 4):
        gradients = fixed if step < 3 else problem.gradients()
        if step == 2:
            fixed[0].neg_()  # at the same address
        if step == 4:
            gradients = [channels_last(gradients[0]), draw(2, 3).t()]
        problem.ours.step(gradients, scalars(step))
        problem.expect(gradients, step)
        problem.compare()


def test_channels_last_parameters(triton_kernels, draw):
    parameter, gradient = channels_last(draw(4, 3, 2, 5)), draw(4, 3, 2, 5)
    theirs = parameter.double().requires_grad_()
    AdamEma([parameter], [torch.zeros_like(parameter)], [torch.zeros_like(parameter)]).step([gradient], scalars(1))
    theirs.grad = gradient.double()
    torch.optim.AdamW([theirs], lr=RATES[0], weight_decay=0.0).step()
    assert parameter.is_contiguous(memory_format=torch.channels_last)
    assert_relative(parameter, theirs)


def test_the_optimizer_of_a_network(triton_kernels):
    """Parameters that require gradients; autograd notices that they changed."""
    weight = torch.ones(4, requires_grad=True)
    ours = AdamEma([weight], [torch.zeros(4)], [torch.zeros(4)])
    loss = weight.square().sum()
    loss.backward()
    stale = weight.square().sum()
    ours.step([weight.grad], scalars(1))
    assert_relative(weight, torch.full((4,), 1 - RATES[0]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_no_parameters(triton_kernels, mode):
    with use(mode):
        AdamEma([], [], [], []).step([], scalars(1))


class Subclass(torch.Tensor):
    """As a DTensor: what lies at its address is not its business."""


def test_what_the_kernel_does_not_take_is_refused_and_runs_in_pytorch(triton_kernels, draw):
    problem = Problem(draw, [(4, 3)])
    mixed = Problem(draw, [(4,), (4,)])
    transposed = [draw(3, 4).t() for _ in range(3)]
    cases = [
        (Problem(draw, [(4,)], dtype=torch.float64).ours, [draw(4)], "parameters.0. is torch.float64, not float32"),
        (problem.ours, [draw(4, 3).double()], "gradients are of torch.float64"),
        (mixed.ours, [draw(4), draw(4).half()], "gradients are of torch.float16 and torch.float32"),
        (AdamEma(*([t] for t in transposed)), [draw(4, 3)], "parameters.0. is neither contiguous nor channels-last"),
        (
            AdamEma([draw(4).as_subclass(Subclass)], [draw(4)], [draw(4).abs()]),
            [draw(4)],
            "parameters.0. is a Subclass, not a plain tensor",
        ),
        (
            AdamEma([draw(4, 3)], [transposed[1]], [transposed[2]]),
            [draw(4, 3)],
            "exp_avgs.0. is neither contiguous nor channels-last, or not as its parameter",
        ),
        (
            AdamEma([draw(4, 3)], [draw(4, 3)], [draw(4, 3).abs()], second_averages=[transposed[1]]),
            [draw(4, 3)],
            "second_averages.0. is neither contiguous nor channels-last, or not as its parameter",
        ),
    ]
    for ours, gradients, message in cases:
        with pytest.raises(ValueError, match=f"adam_ema: {message}"):
            ours.step(gradients, scalars(1))
        with use("auto"):
            ours.step(gradients, scalars(1))
    gradients = [draw(4, 3).double()]
    fresh = Problem(draw, [(4, 3)])
    with use("auto"):
        fresh.ours.step(gradients, scalars(1))
    fresh.expect(gradients, 1)
    fresh.compare()


def test_what_does_not_fit_is_named(draw):
    a, b = draw(3), draw(4)
    for arguments, message in [
        (([a], [b], [a]), r"exp_avgs\[0\] has shape \(4,\), expected \(3,\)"),
        (([a, b], [a, b], [a, a]), r"exp_avg_sqs\[1\] has shape \(3,\), expected \(4,\)"),
        (([a], [a], [a], [b]), r"averages\[0\] has shape \(4,\), expected \(3,\)"),
        (([a], [a], [a], [a], [b]), r"second_averages\[0\] has shape \(4,\), expected \(3,\)"),
        (([a], [a], [a], None, [a, a]), "2 second_averages for 1 parameters"),
        (([a], [a, a], [a]), "2 exp_avgs for 1 parameters"),
        (([a], [a.int()], [a]), r"exp_avgs\[0\] is torch.int32, expected a floating-point type"),
        (([a], [a.to("meta")], [a]), r"exp_avgs\[0\] is on meta, the others are on cpu"),
    ]:
        with pytest.raises(ValueError, match=f"adam_ema: {message}"):
            AdamEma(*arguments[:4], second_averages=arguments[4] if len(arguments) > 4 else None)
    for betas, eps, weight_decay in [((1.0, 0.9), 0, 0), ((0.9, -0.1), 0, 0), ((0.9, 0.9), -1.0, 0), ((0, 0), 0, -1)]:
        with pytest.raises(ValueError, match="adam_ema: betas .* out of range"):
            AdamEma([a], [a], [a], betas=betas, eps=eps, weight_decay=weight_decay)
    with pytest.raises(ValueError, match=r"adam_ema: scalars has shape \(5,\), expected \(6,\)"):
        AdamEma([a], [a], [a], [a], second_averages=[a]).step([a], scalars(1)[:5])
    ours = AdamEma([a], [torch.zeros(3)], [torch.zeros(3)])
    for arguments, message in [
        (([], scalars(1)), "0 gradients for 1 parameters"),
        (([b], scalars(1)), r"gradients\[0\] has shape \(4,\), expected \(3,\)"),
        (([b[:1].expand(3, 3)], scalars(1)), r"gradients\[0\] has shape \(3, 3\), expected \(3,\)"),
        (([b[:1].expand(1, 3)[0, :1]], scalars(1)), r"gradients\[0\] has shape \(1,\), expected \(3,\)"),
        (([a], scalars(1)[:4]), r"scalars has shape \(4,\), expected \(5,\)"),
        (([a], scalars(1).half()), "scalars is torch.float16, expected torch.float32 or torch.float64"),
        (([a], scalars(1).to("meta")), "scalars is on meta, the others are on cpu"),
    ]:
        with pytest.raises(ValueError, match=f"adam_ema: {message}"):
            ours.step(*arguments)
        with pytest.raises(ValueError, match=f"adam_ema: {message}"), use("triton"):
            ours.step(*arguments)
