"""`FusedAdamW` against torch.optim.AdamW, on the kernel (interpreted) and in PyTorch, as codebases use an optimizer."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

from pdfast_kernels import FusedAdamW, use
from pdfast_kernels.ops.adam_ema.adam_ema import AdamEma, _step
from pdfast_kernels.runtime.launch import recorded
from tests.kernels.compare import assert_relative

SIZES = [(5, 3), (7,), (2, 3, 1, 2), ()]
SETTINGS = {"lr": 2.0**-6, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.125}


@pytest.fixture(params=["triton", "reference"])
def mode(request, triton_kernels):
    with use(request.param):
        yield request.param


@pytest.fixture
def problem(draw):
    """problem(): two equal lists of parameters."""

    def make(sizes=SIZES):
        ours = [nn.Parameter(draw(*size)) for size in sizes]
        return ours, [nn.Parameter(p.detach().clone()) for p in ours]

    return make


def give(draw, ours, theirs, without=()):
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        p.grad = None if i in without else draw(*p.shape)
        q.grad = None if i in without else p.grad.clone()


def same(ours, theirs):
    for p, q in zip(ours, theirs, strict=True):
        assert_relative(p, q)


def test_the_trajectory_of_adamw(mode, draw, problem):
    ours, theirs = problem()
    one, other = FusedAdamW(ours, **SETTINGS), torch.optim.AdamW(theirs, **SETTINGS)
    for _ in range(5):
        give(draw, ours, theirs)
        one.step()
        other.step()
        same(ours, theirs)
    one.zero_grad()
    assert all(p.grad is None for p in ours)
    for p, q in zip(ours, theirs, strict=True):
        assert set(one.state[p]) == set(other.state[q])
        assert all(torch.allclose(one.state[p][key], other.state[q][key], rtol=1e-5, atol=1e-7) for key in one.state[p])


def test_groups_and_a_group_added_later(mode, draw, problem):
    ours, theirs = problem()

    def groups(parameters):
        return [
            {"params": parameters[:2], "weight_decay": 0.0, "lr": 2.0**-5},
            {"params": parameters[2:3], "betas": (0.5, 0.75), "eps": 1e-3},
        ]

    one, other = FusedAdamW(groups(ours), **SETTINGS), torch.optim.AdamW(groups(theirs), **SETTINGS)
    for update in range(4):
        if update == 2:
            one.add_param_group({"params": ours[3:], "lr": 2.0**-4})
            other.add_param_group({"params": theirs[3:], "lr": 2.0**-4})
        give(draw, ours, theirs)
        one.step()
        other.step()
    same(ours, theirs)


@pytest.mark.parametrize("schedule", ["one_cycle", "lambda"])
def test_schedules(mode, draw, problem, schedule):
    """OneCycleLR changes beta1 as well."""
    ours, theirs = problem()
    optimizers = [FusedAdamW(ours, **SETTINGS), torch.optim.AdamW(theirs, **SETTINGS)]
    make = {
        "one_cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 2.0**-4, total_steps=6),
        "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda update: 1 / (1 + update)),
    }[schedule]
    schedulers = [make(optimizer) for optimizer in optimizers]
    for _ in range(5):
        give(draw, ours, theirs)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
    same(ours, theirs)


def test_what_a_schedule_changes_compiles_nothing(triton_kernels, draw, problem):
    """Learning rate, betas, eps and weight decay are numbers for the kernel, not constants in it."""
    ours, theirs = problem([(8,)])
    optimizer = FusedAdamW(ours, **SETTINGS)
    seen = []
    for update in range(2):
        give(draw, ours, theirs)
        optimizer.param_groups[0].update(lr=0.1 / (1 + update), betas=(0.5 + update / 4, 0.9), eps=1e-6 * (1 + update))
        with recorded(90) as launches:
            optimizer.step()
        constants = {
            p.name for p in inspect.signature(_step.fn).parameters.values() if "constexpr" in str(p.annotation)
        }
        assert {"AVERAGED", "CHUNK"} <= constants
        seen.append({name: str(launches[0].arguments[name]) for name in constants})
    assert seen[0] == seen[1]


def test_parameters_without_gradients(mode, draw, problem):
    """Some in one step, others in another: each counts its own steps, as in AdamW."""
    ours, theirs = problem()
    one, other = FusedAdamW(ours, **SETTINGS), torch.optim.AdamW(theirs, **SETTINGS)
    for without in ((0,), (), (1, 2), (0, 1, 2, 3), (3,), ()):
        give(draw, ours, theirs, without)
        one.step()
        other.step()
        same(ours, theirs)
    for p, q in zip(ours, theirs, strict=True):
        assert one.state[p]["step"] == other.state[q]["step"]
    assert len({id(one.state[p]["step"]) for p in ours}) > 1


@pytest.mark.parametrize("source", ["ours", "adamw", "pickled", "adamw takes ours"])
def test_a_state_dict_into_a_fresh_one(mode, draw, problem, source):
    ours, theirs = problem()
    one, other = FusedAdamW(ours, **SETTINGS), torch.optim.AdamW(theirs, **SETTINGS)
    for without in ((1,), (), ()):
        give(draw, ours, theirs, without)
        one.step()
        other.step()
    if source == "adamw takes ours":
        fresh = torch.optim.AdamW(ours)
        fresh.load_state_dict(copy.deepcopy(one.state_dict()))
    elif source == "pickled":
        fresh = FusedAdamW(ours)
        fresh.load_state_dict(pickle.loads(pickle.dumps(one.state_dict())))
    else:
        fresh = FusedAdamW(ours)
        fresh.load_state_dict(copy.deepcopy((one if source == "ours" else other).state_dict()))
    if isinstance(fresh, FusedAdamW):
        assert len({id(fresh.state[p]["step"]) for p in ours}) == 2  # launches: of 2 steps and of 3
    for _ in range(2):
        give(draw, ours, theirs)
        fresh.step()
        other.step()
    same(ours, theirs)


def test_a_copy_and_a_pickle_of_the_optimizer(mode, draw, problem):
    ours, theirs = problem()
    one = FusedAdamW(ours, **SETTINGS, ema_decay=0.5)
    give(draw, ours, theirs)
    one.step()
    for other in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        (group,) = other.param_groups
        copies = group["params"]
        for p, q in zip(copies, ours, strict=True):
            p.grad = q.grad.clone()
        before = [p.detach().clone() for p in ours]
        other.step()
        assert all(torch.equal(p, q) for p, q in zip(ours, before, strict=True))
        assert not any(torch.equal(p, q) for p, q in zip(copies, ours, strict=True))


def test_a_state_of_another_algorithm_is_refused(problem):
    ours, theirs = problem()
    for option in ("amsgrad", "maximize"):
        state = torch.optim.AdamW(theirs, **{option: True}).state_dict()
        with pytest.raises(ValueError, match="FusedAdamW: the state was made with amsgrad or maximize"):
            FusedAdamW(ours).load_state_dict(state)


def test_the_average(mode, draw, problem):
    ours, theirs = problem()
    one, other = FusedAdamW(ours, **SETTINGS, ema_decay=0.75), torch.optim.AdamW(theirs, **SETTINGS)
    averages = [p.detach().clone() for p in theirs]
    assert all(a is p for a, p in zip(one.ema(), ours, strict=True))
    for without in ((), (1,), (), (0, 1, 2, 3)):
        give(draw, ours, theirs, without)
        one.step()
        other.step()
        averages = [0.75 * a + 0.25 * p.detach() for a, p in zip(averages, theirs, strict=True)]
    same(one.ema(), averages)
    fresh = FusedAdamW(ours, ema_decay=0.75)
    fresh.load_state_dict(one.state_dict())
    same(fresh.ema(), averages)


def test_a_grad_scaler(mode, draw, problem):
    """Scaled losses, and one that is infinite: that update changes nothing, and does not count."""
    ours, theirs = problem()
    one, other = FusedAdamW(ours, **SETTINGS, ema_decay=0.5), torch.optim.AdamW(theirs, **SETTINGS)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in range(2)]
    seen = []
    for update in range(4):
        values = [draw(*p.shape) for p in ours]
        for parameters, optimizer, scaler in ((ours, one, scalers[0]), (theirs, other, scalers[1])):
            optimizer.zero_grad()
            loss = sum((v * p).sum() for v, p in zip(values, parameters, strict=True))
            scaler.scale(loss * (torch.inf if update == 1 else 1)).backward()
            if update == 2:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(parameters, 0.5)
            scaler.step(optimizer)
            scaler.update()
        seen.append([p.detach().clone() for p in (*ours, *one.ema())])
        same(ours, theirs)
    assert all(torch.equal(p, q) for p, q in zip(seen[0], seen[1], strict=True))
    assert all(one.state[p]["step"] == 3 for p in ours)
    assert not hasattr(one, "grad_scale") and scalers[0].get_scale() == scalers[1].get_scale()


def test_a_closure(mode, draw, problem):
    (p,), (q,) = problem([(3,)])
    one, other = FusedAdamW([p], **SETTINGS), torch.optim.AdamW([q], **SETTINGS)

    def closure(parameter, optimizer):
        def loss():
            optimizer.zero_grad()
            value = parameter.square().sum()
            value.backward()
            return value

        return loss

    for _ in range(3):
        assert_relative(one.step(closure(p, one)), other.step(closure(q, other)))
    same([p], [q])


def test_a_learning_rate_that_is_a_tensor(mode, draw, problem):
    ours, theirs = problem()
    rate = torch.tensor(SETTINGS["lr"])
    one, other = FusedAdamW(ours, **SETTINGS | {"lr": rate}), torch.optim.AdamW(theirs, **SETTINGS)
    for factor in (1.0, 0.5):
        rate.fill_(SETTINGS["lr"] * factor)
        other.param_groups[0]["lr"] = SETTINGS["lr"] * factor
        give(draw, ours, theirs)
        one.step()
        other.step()
    same(ours, theirs)


def test_data_that_was_replaced_is_trained(mode, draw, problem):
    """As by Module.to, load_state_dict(assign=True) and wrappers that flatten parameters."""
    ours, theirs = problem()
    one, other = FusedAdamW(ours, **SETTINGS), torch.optim.AdamW(theirs, **SETTINGS)
    for update in range(3):
        if update:
            for p in ours:
                p.data = p.data.clone()
        give(draw, ours, theirs)
        one.step()
        other.step()
    same(ours, theirs)


def test_another_default_device_changes_nothing(mode, draw, problem):
    """As after torch.set_default_device("cuda")."""
    ours, theirs = problem()
    give(draw, ours, theirs)
    one, other = FusedAdamW(ours, **SETTINGS, ema_decay=0.5), torch.optim.AdamW(theirs, **SETTINGS)
    other.step()
    with torch.device("meta"):
        one.step()
    same(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_of_other_dtypes_run_in_pytorch(draw, dtype):
    ours = [nn.Parameter(draw(3, dtype=dtype))]
    theirs = [nn.Parameter(ours[0].detach().clone())]
    one, other = FusedAdamW(ours, **SETTINGS), torch.optim.AdamW(theirs, **SETTINGS, fused=True)
    for _ in range(3):
        ours[0].grad = draw(3, dtype=dtype)
        theirs[0].grad = ours[0].grad.clone()
        one.step()
        other.step()
    assert ours[0].dtype == dtype
    assert_relative(ours[0], theirs[0], 2.0**-7 if dtype == torch.bfloat16 else 1e-12)


def test_bad_settings_are_named(draw):
    p = [nn.Parameter(draw(3))]
    for settings, message in [
        ({"lr": -1.0}, "FusedAdamW: lr -1.0 is out of range"),
        ({"betas": (1.0, 0.9)}, "betas .* is out of range"),
        ({"eps": -1.0}, "eps -1.0 .* is out of range"),
        ({"ema_decay": 1.5}, "FusedAdamW: ema_decay 1.5 is out of range"),
    ]:
        with pytest.raises(ValueError, match=message):
            FusedAdamW(p, **settings)
    p[0].grad = torch.sparse_coo_tensor([[0]], [1.0], (3,), check_invariants=True)
    with pytest.raises(ValueError, match=r"gradients\[0\] is torch.sparse_coo"):
        FusedAdamW(p).step()


def test_accelerate_prepares_it(mode, draw):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    models = [nn.Linear(3, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    one = FusedAdamW(models[0].parameters(), **SETTINGS)
    other = torch.optim.AdamW(models[1].parameters(), **SETTINGS)
    schedule = torch.optim.lr_scheduler.StepLR(one, 100)
    model, prepared, schedule = accelerator.prepare(models[0], one, schedule)
    for _ in range(3):
        x = draw(4, 3)
        accelerator.backward(model(x).square().mean())
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        models[1](x).square().mean().backward()
        nn.utils.clip_grad_norm_(models[1].parameters(), 1.0)
        for optimizer in (prepared, other):
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
    same(models[0].parameters(), models[1].parameters())
    prepared.load_state_dict(copy.deepcopy(prepared.state_dict()))


def test_adam_ema_follows_or_refuses(mode, draw):
    """What became of its tensors since it was made."""
    scalars = torch.tensor([2.0**-6, 1.0, 1.0, 0.5, 0.0])

    def made():
        p, states = nn.Parameter(draw(4)), [torch.zeros(4) for _ in range(2)]
        return p, AdamEma([p], *([t] for t in states), [p.detach().clone()]), states

    p, adam, _ = made()
    p.data = torch.zeros(4)  # the old memory is no longer the parameter's
    adam.step([torch.ones(4)], scalars)
    assert_relative(p, torch.full((4,), -(2.0**-6)), 1e-5)
    p, adam, (m, _) = made()
    m.data = torch.full((4,), 2.0)
    adam.step([torch.ones(4)], scalars)
    assert_relative(m, torch.full((4,), 1.9))
    p, adam, _ = made()
    with pytest.raises(ValueError, match=r"adam_ema: gradients\[0\] is None: leave the parameter out"):
        adam.step([None], scalars)
    p.data = draw(5)
    with pytest.raises(ValueError, match=r"adam_ema: exp_avgs\[0\] has shape \(4,\), expected \(5,\)"):
        adam.step([draw(5)], scalars)
    p, adam, _ = made()
    # As a model moved to a GPU, which this machine may lack.
    adam._parameters[0] = adam._addressed[0] = draw(4).to("meta")
    with pytest.raises(ValueError, match=r"adam_ema: exp_avgs\[0\] is on cpu, the others are on meta"):
        adam.step([draw(4).to("meta")], scalars)
    p, adam, _ = made()
    p.data = draw(4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"exp_avgs\[0\] is torch.float32, expected that of its parameter"):
        adam.step([draw(4)], scalars)
