"""Small diffusers pipelines, with random weights that matter; and what any teacher goes through."""

import json

import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel

from tests.commands import TINY_GIVEN, call
from tests.engine import processes


def unet(*, size=8, channels=1, classes=None, out_channels=None, seed=0, **options) -> UNet2DModel:
    torch.manual_seed(seed)
    shape = {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "sample_size": size,
        "in_channels": channels,
        "out_channels": out_channels or channels,
        "num_class_embeds": classes,
    }
    return UNet2DModel(**shape | options).eval()


def save(folder, scheduler, network=None) -> UNet2DModel:
    """Write the folder of a pipeline; returns its network."""
    network = network or unet()
    DDPMPipeline(network, scheduler).save_pretrained(folder)
    return network


def losses_in_one_process_and_in_two(tmp_path, teacher, *flags) -> list[list[float]]:
    """Of a round's updates; in two each block is divided, and laid out as `flags` say."""
    command = [*TINY_GIVEN, "--teacher", str(teacher)]
    command += "--rounds 1 --method progressive --updates 4 --batch-size 16 --log-every 1".split()
    losses = []
    one, two = tmp_path / "one", tmp_path / "two"
    assert call("distill", *command, "--run", str(one)) == 0
    sharded = "--engine.shard", "2", *flags
    processes.run(2, "-m", "pdfast.distill", *command, *sharded, "--run-dir", str(two), timeout=900)
    for run in (one, two):
        entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        losses.append([entry["loss"] for entry in entries if entry.get("phase") == "distill"])
    return losses


@torch.no_grad()
def drawn_by_diffusers(theirs, scheduler, noise, steps):
    """The images of diffusers' DDIM, with the times and the end that ours has."""
    options = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
    scheduler, x = DDIMScheduler.from_config(scheduler.config, **options), noise
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(theirs(x, t).sample, t, x).prev_sample
    return x
