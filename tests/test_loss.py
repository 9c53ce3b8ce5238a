"""`pdfast.distillation_loss` and what goes with it, as another training loop uses them."""

import math
import re
import subprocess
import sys

import pytest
import torch

import pdfast
from pdfast.diffusion import to_x
from tests.commands import ROOT, environment
from tests.networks.test_unet import perturbed
from tests.pretrained.pipelines import save, unet

N = 16


def network(prediction, seed):
    from pdfast.networks import NetworkConfig

    return perturbed(NetworkConfig(8, 1, 8, (1,), 1, (), 8, 16, 4, prediction).build(), seed)


def paper(student, teacher, x, eps, k, steps, prediction, huber):
    """Algorithm 2 as it is published, in float64 but for the networks: the truncated-SNR weighted error of x, per image."""
    angle = (torch.pi / 2) * torch.stack([k / steps, (k - 0.5) / steps, (k - 1) / steps]).double()
    alpha, sigma = torch.cos(angle)[:, :, None, None, None], torch.sin(angle)[:, :, None, None, None]
    z = alpha[0] * x.double() + sigma[0] * eps.double()

    def predict(model, z, i):
        output = model(z.float(), angle[i].float()).double()
        return to_x(prediction, output, z, angle[i])

    first = predict(teacher, z, 0)
    z_mid = alpha[1] * first + sigma[1] / sigma[0] * (z - alpha[0] * first)
    second = predict(teacher, z_mid, 1)
    z_next = alpha[2] * second + sigma[2] / sigma[1] * (z_mid - alpha[1] * second)
    ratio = sigma[2] / sigma[0]
    target = torch.where(k[:, None, None, None] == 1, second, (z_next - ratio * z) / (alpha[2] - ratio * alpha[0]))
    snr = (alpha[0] / sigma[0]).square()
    squares = torch.maximum(snr, torch.ones_like(snr)) * (predict(student, z, 0) - target).square()
    return (2 * huber * ((squares + huber**2).sqrt() - huber) if huber else squares).mean((1, 2, 3))


@pytest.mark.parametrize("prediction", ["x", "v", "both"])
@pytest.mark.parametrize("huber", [0.0, 0.2])
def test_it_is_the_papers(prediction, huber):
    student, teacher = network(prediction, 1), network(prediction, 2)
    steps = 4
    generator = torch.Generator().manual_seed(0)
    x, eps = (torch.randn(N, 1, 8, 8, generator=generator) for _ in range(2))
    k = torch.arange(N) % steps + 1
    table = pdfast.build_step_table(pdfast.Cosine(), steps, prediction, "truncated_snr")
    losses = pdfast.distillation_loss(student, teacher, x, table, k=k, eps=eps, huber=huber)
    with torch.no_grad():
        expected = paper(student, teacher, x, eps, k, steps, prediction, huber)
    not_noise = k < steps  # where alpha is 0, an SNR is no weight: see the definition in angles
    torch.testing.assert_close(losses.double()[not_noise], expected[not_noise], rtol=2e-4, atol=1e-6)
    losses.mean().backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_what_is_not_given_is_drawn_by_the_generator():
    model, teacher = network("v", 0), network("v", 1)
    table = pdfast.build_step_table(pdfast.Cosine(), 8, "v", "snr_plus_one")
    x = torch.randn(N, 1, 8, 8)
    a, b, c = (
        pdfast.distillation_loss(model, teacher, x, table, generator=torch.Generator().manual_seed(seed))
        for seed in (3, 3, 4)
    )
    assert a.shape == (N,) and a.dtype == torch.float32
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_loop_of_ones_own_with_accelerate(tmp_path):
    """The worked example: the student's losses fall, and diffusers samples from what it wrote."""
    import runpy

    from diffusers import DDIMPipeline, DDIMScheduler

    scheduler = DDIMScheduler(1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    save(tmp_path / "teacher", scheduler, unet(channels=3))
    example = runpy.run_path(str(ROOT / "examples/accelerate_distill.py"))
    torch.manual_seed(0)
    images = torch.rand(64, 3, 8, 8) * 2 - 1
    losses = example["distill"](str(tmp_path / "teacher"), str(tmp_path / "student"), images, epochs=10)
    assert len(losses) == 2 * 10 * 4
    last_round = losses[40:]
    assert sum(last_round[-12:]) < 0.9 * sum(last_round[:12]) and math.isfinite(sum(losses))
    pipeline = DDIMPipeline.from_pretrained(tmp_path / "student")
    assert len(pipeline(batch_size=2, num_inference_steps=2).images) == 2


def test_an_import_costs_nothing():
    code = "import sys, pdfast; sys.exit('torch' in sys.modules or not hasattr(pdfast, 'Cosine'))"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pdfast.nothing
    assert all(callable(getattr(pdfast, name)) for name in pdfast.__all__)


def test_sample_is_a_function_also_beside_the_command_of_that_name():
    code = """
import sys, torch, pdfast
from pdfast import sample
z = torch.ones(2, 1, 4, 4)
arguments = lambda z, phi, cond: 0 * z, z, pdfast.Cosine(), 4
assert pdfast.sample(*arguments, prediction="x").abs().max() == 0
assert not {"tyro", "pdfast.config"} & set(sys.modules)
import pdfast.sample
assert pdfast.sample.find_model and pdfast.sample is not sample
assert pdfast.sample(*arguments, prediction="x").abs().max() == 0
"""
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)


def test_every_public_name_is_on_the_page():
    page = (ROOT / "docs" / "diffusers.md").read_text().partition("## The names")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]*`) \|", page, re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(\w+)", row)]
    assert sorted(names) == pdfast.__all__


class Constant(torch.nn.Module):
    """What does not say what it predicts."""

    def forward(self, z, phi, cond):
        assert phi.dtype == torch.float32
        return z


def test_networks_of_another_prediction_than_the_tables_are_refused():
    x = torch.zeros(2, 1, 8, 8)
    v, other = network("v", 0), network("x", 0)
    table = pdfast.build_step_table(pdfast.Cosine(), 4, "v", "snr")
    for student, teacher, words in ((v, other, "the teacher predicts 'x'"), (other, v, "the student predicts 'x'")):
        with pytest.raises(ValueError, match=f"{words}, but the table is for networks that predict 'v'"):
            pdfast.distillation_loss(student, teacher, x, table)
    with pytest.raises(ValueError, match="the student predicts 'v', but the table is for networks that predict 'eps'"):
        eps = pdfast.build_step_table(pdfast.StartingAt(pdfast.Cosine(), 0.9), 4, "eps", "snr")
        pdfast.distillation_loss(v, v, x, eps)
    assert torch.isfinite(pdfast.distillation_loss(v, Constant(), x, table)).all()
    assert table.rows(torch.tensor([1, 4])).prediction == table.to("cpu").prediction == "v"


def test_a_round_of_another_prediction_is_refused():
    from pdfast.methods import Progressive, RoundTable

    rows = RoundTable(pdfast.build_step_table(pdfast.Cosine(), 4, "v", "snr"))
    with pytest.raises(ValueError, match="predicts 'x' after one that predicts 'v'"):
        rows.set(pdfast.build_step_table(pdfast.Cosine(), 2, "x", "snr"))
    with pytest.raises(ValueError, match="the teacher predicts 'x'"):
        Progressive(network("v", 0), network("x", 0), rows).targets(None)


def test_arguments_that_do_not_fit_are_named():
    v, x = network("v", 0), torch.zeros(2, 1, 8, 8)
    table = pdfast.build_step_table(pdfast.Cosine(), 4, "v", "snr")
    for error, words, arguments in (
        (TypeError, "k of dtype torch.int32", {"k": torch.ones(2, dtype=torch.int32)}),
        (TypeError, "k is a int: give a tensor", {"k": 3}),
        (TypeError, "eps is a list: give a tensor", {"eps": [0.0]}),
        (TypeError, "k of dtype torch.bool", {"k": torch.ones(2, dtype=torch.bool)}),
        (ValueError, "k has shape ..: one step index for each of the 2 images", {"k": torch.tensor(1)}),
        (ValueError, "eps has shape .2, 1, 8., x has", {"eps": x[..., 0]}),
        (ValueError, "eps has shape .1, 1, 8, 8.", {"eps": x[:1]}),
        (TypeError, "eps of dtype torch.uint8", {"eps": x.byte()}),
        (ValueError, "cond has shape .3,.: there are 2 samples", {"cond": torch.zeros(3, dtype=torch.int64)}),
    ):
        with pytest.raises(error, match=words):
            pdfast.distillation_loss(v, v, x, table, **arguments)
    with pytest.raises(TypeError, match="table is a Cosine: give what build_step_table returns"):
        pdfast.distillation_loss(v, v, x, pdfast.Cosine())
    with pytest.raises(TypeError, match="x is a ndarray: give a tensor"):
        pdfast.distillation_loss(v, v, x.numpy(), table)
    with pytest.raises(ValueError, match="the table is on meta, x is on cpu: give table.to"):
        pdfast.distillation_loss(v, v, x, table.to("meta"))
    with pytest.raises(ValueError, match="would round its angles"):
        pdfast.build_step_table(pdfast.Cosine(), 4, "v", "snr", dtype=torch.bfloat16)


def test_the_loss_of_bfloat16_images_is_that_of_their_values():
    """z, the targets and the coefficients are float32 whatever images, noise and outputs are."""
    student, teacher = network("v", 1), network("v", 2)
    x, eps = (torch.randn(N, 1, 8, 8, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(2))
    k = torch.arange(N) % 4 + 1
    table = pdfast.build_step_table(pdfast.Cosine(), 4, "v", "snr")
    ours = pdfast.distillation_loss(student, teacher, x, table, k=k, eps=eps)
    assert torch.equal(ours, pdfast.distillation_loss(student, teacher, x.float(), table, k=k, eps=eps.float()))
    float64 = pdfast.build_step_table(pdfast.Cosine(), 4, "v", "snr", dtype=torch.float64)
    assert pdfast.distillation_loss(Constant(), Constant(), x, float64).dtype == torch.float64


def test_the_library_names_arguments_not_flags():
    package = ROOT / "pdfast"
    files = [
        package / "loss.py",
        *(file for part in ("diffusion", "networks", "teachers") for file in (package / part).glob("*.py")),
    ]
    assert len(files) > 15
    assert not [file.name for file in files if re.search(r"(?<!\w)--[a-z]", file.read_text())]
    with pytest.raises(ValueError, match="eps-prediction is singular.*start below, e.g. with StartingAt"):
        pdfast.build_step_table(pdfast.Cosine(), 4, "eps", "snr")


def test_what_makes_no_sense_is_refused():
    for prediction, steps, words in (
        ("w", 4, "unknown prediction 'w'"),
        ("v", 2.5, "whole number"),
        ("v", 0, "at least 1"),
        ("v", True, "whole number"),
    ):
        with pytest.raises(ValueError, match=words):
            pdfast.build_step_table(pdfast.Cosine(), steps, prediction, "snr")
    table = pdfast.build_step_table(pdfast.Cosine(), torch.tensor(4), "v", "snr")
    assert len(table) == table.steps == 4
    with pytest.raises(TypeError, match="dtype torch.uint8"):
        pdfast.distillation_loss(network("v", 0), network("v", 0), torch.zeros(2, 1, 8, 8, dtype=torch.uint8), table)
