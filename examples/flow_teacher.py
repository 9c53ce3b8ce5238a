"""A flow-matching model of somebody's own, of the built-in digits, and the function that makes it a teacher.

    python examples/flow_teacher.py flow-digits.pt
    PYTHONPATH=examples python -m pdfast.distill --teacher flow_teacher:teacher --preset digits --method progressive --rounds 4

The network and its training know nothing of pdfast; `AsPdfast` and `teacher` are what is written for it.
"""

import sys
from importlib import resources

import numpy as np
import torch
from torch import Tensor, nn

import pdfast


class FlowNet(nn.Module):
    """`network(y, t) -> velocity` at y = (1 - t) x + t noise, t in [0, 1]: noise - x."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.first, self.last = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 1, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(4))
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(4))
        self.register_buffer("frequencies", torch.exp2(torch.arange(8).float()))

    def forward(self, y: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))[:, :, None, None]
        h = self.first(y)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            h = h + layer(nn.functional.silu(norm(h) + time))
        return self.last(nn.functional.silu(h))


def train(file: str, updates: int = 2000) -> list[float]:
    """Write the weights; returns the losses."""
    torch.manual_seed(0)
    with resources.as_file(resources.files("pdfast.data") / "digits.npz") as digits:
        images = torch.tensor(np.load(digits)["images"]).float().permute(0, 3, 1, 2) / 255 * 2 - 1
    network, losses = FlowNet(), []
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, 2 * (1 - update / updates))
        x = images[torch.randint(len(images), (128,))]
        noise, t = torch.randn_like(x), torch.rand(len(x))
        y = torch.lerp(x, noise, t[:, None, None, None])
        loss = (network(y, t) - (noise - x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    torch.save(network.state_dict(), file)
    return losses


class AsPdfast(nn.Module):
    """pdfast asks at z = cos(phi) x + sin(phi) noise: y is z over (cos + sin), and tan(phi) = t / (1 - t)."""

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, z: Tensor, phi: Tensor, cond: Tensor | None) -> Tensor:
        scale = (phi.cos() + phi.sin()).view(-1, 1, 1, 1)
        return self.flow(z / scale, pdfast.flow_time_from_phi(phi).float())


def teacher() -> pdfast.Teacher:
    flow = FlowNet()
    flow.load_state_dict(torch.load("flow-digits.pt", weights_only=True))
    return pdfast.Teacher(AsPdfast(flow), prediction="flow", schedule=pdfast.Flow(), image_shape=(1, 8, 8))


if __name__ == "__main__":
    train(sys.argv[1])
