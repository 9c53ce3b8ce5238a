"""Classifier-free guidance around a network, and as an input of one."""

from dataclasses import replace

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding

from pdfast.diffusion import Cosine, noise, sample
from pdfast.diffusion.noise import Stream
from pdfast.networks import NetworkConfig
from pdfast.networks.edm_unet import EDMUNetConfig
from pdfast.networks.guided import Guided, GuidedConfig, at_guidance, start_of
from pdfast.networks.layers import guidance_embedding
from pdfast.pretrained import NETWORK_KINDS, ConvertedConfig, EDMConfig
from tests.networks.test_unet import perturbed

N, CLASSES = 5, 3
OURS = NetworkConfig(8, 2, 8, (1, 2), 1, (4,), 8, 16, 4, "v", CLASSES, null_label=CLASSES)
SONG = EDMUNetConfig("SongUNet", 8, 2, CLASSES, 8, (1, 2), 4, 1, (4,), null_label=CLASSES)
ADM = replace(SONG, model_type="DhariwalUNet")
CONFIGS = {
    "ours": OURS,
    "both": replace(OURS, prediction="both"),
    "converted": ConvertedConfig(replace(OURS, prediction="x")),
    "DDPM++": EDMConfig(SONG, 0.002, 0.5),
    "ADM": EDMConfig(ADM, 0.002, 0.5),
}
Z, PHI = torch.randn(N, 2, 8, 8, generator=torch.Generator().manual_seed(0)), torch.linspace(0.2, 1.5, N)
LABELS = torch.tensor([0, 1, 2, 1, 0])
G = torch.tensor([0.0, 1.0, 1.5, 2.5, 4.0])


def built(config):
    torch.manual_seed(1)
    return perturbed(config.build()).eval().requires_grad_(False)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_formula_of_two_calls(name):
    """o_uncond + g (o_cond - o_uncond), in float64, for one g and for one of each sample."""
    network = built(CONFIGS[name])
    said = network(Z, PHI, LABELS).double()
    unsaid = network(Z, PHI, torch.full_like(LABELS, CLASSES)).double()
    assert not torch.allclose(said, unsaid, atol=1e-2)
    for guidance, g in (((2.5,), torch.full((N,), 2.5)), ((0.0, 4.0), G)):
        config = GuidedConfig(network.config, guidance)
        expected = unsaid + g.double().view(-1, 1, 1, 1) * (said - unsaid)
        found = Guided(config, network)(Z, PHI, config.condition(LABELS, g))
        torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_has_no_class_is_told_nothing_of_one(name):
    """The weights of the classes then have no effect; a network that was never trained so takes no such label."""
    network = built(CONFIGS[name])
    null = torch.full_like(LABELS, CLASSES)
    before = network(Z, PHI, null)
    for module_name, parameter in network.named_parameters():
        if module_name.endswith(("class_embedding.weight", "map_label.weight")):
            parameter.data.add_(1.0)
            break
    else:
        raise AssertionError("no weights of classes")
    assert torch.equal(network(Z, PHI, null), before) and not torch.equal(network(Z, PHI, LABELS), before)
    never = CONFIGS[name].changed(null_label=None).build()
    with pytest.raises(RuntimeError, match="smaller than num_classes"):
        never(Z, PHI, null)


def test_dropped_conditions():
    dropped = torch.tensor([True, False, False, True, False])
    assert OURS.drop(LABELS, dropped).tolist() == [3, 1, 2, 3, 0]
    ranged = OURS.changed(guidance=(0.0, 4.0))
    found = ranged.drop(ranged.condition(LABELS, G), dropped)
    assert found["label"].tolist() == [3, 1, 2, 3, 0] and torch.equal(found["guidance"], G)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_student_begins_as_its_teacher_and_then_depends_on_g(name):
    """Guidance as an input has no weight at first."""
    teacher = built(CONFIGS[name])
    config = teacher.config.guided((0.0, 4.0))
    student = config.build().eval().requires_grad_(False)
    student.load_state_dict(start_of(config, teacher.state_dict()))
    cond = config.condition(LABELS, G)
    torch.testing.assert_close(student(Z, PHI, cond), teacher(Z, PHI, LABELS), atol=0, rtol=0)
    moved = perturbed(student)
    assert not torch.allclose(moved(Z, PHI, cond), moved(Z, PHI, config.condition(LABELS, G + 0.5)), atol=1e-3)
    assert torch.equal(moved(Z, PHI, config.condition(LABELS)), moved(Z, PHI, config.condition(LABELS, 0 * G + 2)))
    again = NETWORK_KINDS[getattr(config, "kind", None)]
    assert type(config) is again and config.guidance == (0.0, 4.0) and config.null_label == CLASSES


def test_g_is_embedded_as_diffusers_does():
    """1000 w in sines, then cosines, as its latent consistency pipelines have it (their own function needs transformers)."""
    theirs = get_timestep_embedding(1000 * (G - 1), 64, downscale_freq_shift=1)
    torch.testing.assert_close(guidance_embedding(G, 64), theirs, atol=5e-4, rtol=0)  # float32 sines of up to 3000


def test_drawn_conditions_are_functions_of_seed_and_index():
    config = GuidedConfig(OURS, (1.0, 3.0))
    index = torch.arange(4000)
    drawn = config.draw_condition(5, index)
    assert torch.equal(drawn["guidance"][7:9], config.draw_condition(5, index[7:9])["guidance"])
    assert torch.equal(drawn["label"], OURS.draw_condition(5, index)) and drawn["label"].max() == CLASSES - 1
    g = drawn["guidance"]
    assert 1 <= g.min() < 1.01 and 2.99 < g.max() <= 3 and abs(float(g.mean()) - 2) < 0.05
    expected = 1 + 2 * noise.uniform(noise.key(5, Stream.GUIDANCE), index)
    torch.testing.assert_close(g.double(), expected, atol=1e-6, rtol=0)


def test_asked_at_one_guidance():
    network, z = built(OURS), torch.randn(N, 2, 8, 8)
    guided = at_guidance(network, 2.0)
    expected = Guided(GuidedConfig(OURS, (2.0,)), network)
    assert torch.equal(*(sample(m, z, Cosine(), 3, cond=LABELS) for m in (guided, expected)))
    assert at_guidance(network, 1.0) is network
    ranged = Guided(GuidedConfig(OURS, (0.0, 4.0)), network)
    told = at_guidance(ranged, 2.0)
    cond = told.config.condition(LABELS)
    torch.testing.assert_close(sample(told, z, Cosine(), 3, cond=cond), sample(expected, z, Cosine(), 3, cond=LABELS))
    assert ranged.config.guidance == (0.0, 4.0), "it stays as it was"
    for model, g in ((ranged, 5.0), (built(OURS.changed(guidance=(2.0,), null_label=None)), 3.0)):
        with pytest.raises(ValueError, match="has guidance of"):
            at_guidance(model, g)
    with pytest.raises(ValueError, match="knows no such label"):
        at_guidance(built(OURS.changed(null_label=None)), 2.0)


@pytest.mark.parametrize("guidance", [(), (2.0, 1.0), (-1.0,), (1.0, 2.0, 3.0)])
def test_guidance_that_is_none(guidance):
    with pytest.raises(ValueError, match="guidance must be"):
        GuidedConfig(OURS, guidance)


def test_a_label_for_no_class_is_the_number_of_classes():
    for config in (OURS, SONG):
        with pytest.raises(ValueError, match="null_label is num_classes, 3"):
            replace(config, null_label=2)
