"""A training step of DDPM (Ho et al. 2020) as in diffusers, on random images, with the kernels of pdfast."""

import torch
from diffusers import DDPMScheduler, UNet2DModel

from pdfast_kernels import accelerate


def train(steps: int = 2) -> list[float]:
    """The losses of the steps."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
    ).to(device, memory_format=torch.channels_last)
    print(accelerate(model))
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    losses = []
    for _ in range(steps):
        images = torch.rand(8, 3, 16, 16, device=device) * 2 - 1
        noise = torch.randn_like(images)
        timesteps = torch.randint(1000, (len(images),), device=device)
        predicted = model(scheduler.add_noise(images, noise, timesteps), timesteps).sample
        loss = torch.nn.functional.mse_loss(predicted, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(*train())
