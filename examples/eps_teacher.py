"""A diffusers pipeline that predicts eps, of the built-in digits, trained as most public models were.

python eps_teacher.py FOLDER
"""

import copy
import sys
from importlib import resources

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel


def train(folder: str, updates: int = 1500) -> list[float]:
    """Write the pipeline; returns the losses."""
    torch.manual_seed(0)
    with resources.as_file(resources.files("pdfast.data") / "digits.npz") as file:
        images = torch.tensor(np.load(file)["images"]).float().permute(0, 3, 1, 2) / 255 * 2 - 1
    model = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
    )
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    averaged = copy.deepcopy(model)
    losses = []
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, update / 100) * min(1, 2 * (1 - update / updates))
        batch = images[torch.randint(len(images), (128,))]
        noise = torch.randn_like(batch)
        timesteps = torch.randint(1000, (128,))
        loss = (model(scheduler.add_noise(batch, noise, timesteps), timesteps).sample - noise).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for mean, parameter in zip(averaged.parameters(), model.parameters(), strict=True):
                mean.lerp_(parameter, 0.005 if update > 200 else 1)
        losses.append(loss.item())
    DDPMPipeline(averaged.eval(), scheduler).save_pretrained(folder)
    return losses


if __name__ == "__main__":
    train(sys.argv[1])
