"""Small diffusers pipelines, with random weights that matter."""

import torch
from diffusers import DDPMPipeline, UNet2DModel


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
