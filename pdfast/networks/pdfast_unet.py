"""A U-Net of diffusers whose output is, at each time, a fixed combination of its input and of what it puts out.

    output = of_input[t] sample + sum_p of_outputs[t, p] unet(input_scale[t] sample, t)[p]

This file lies beside the weights of a pipeline that pdfast exported; diffusers imports it from there when it is told
`trust_remote_code=True`. It needs diffusers and nothing else.
"""

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor


class PdfastUNet(ModelMixin, ConfigMixin):
    core: Any
    input_scale: Tensor
    of_input: Tensor
    of_outputs: Tensor

    @register_to_config
    def __init__(
        self,
        unet: dict[str, Any],
        outputs: int,
        num_train_timesteps: int,
        sample_size: int,
        in_channels: int,
        num_class_embeds: int | None = None,
    ) -> None:
        """unet: the arguments of the U-Net inside, which has outputs * in_channels channels out."""
        super().__init__()
        self.core = self.inside(unet, num_train_timesteps)
        self.register_buffer("input_scale", torch.ones(num_train_timesteps))
        self.register_buffer("of_input", torch.zeros(num_train_timesteps))
        self.register_buffer("of_outputs", torch.ones(num_train_timesteps, outputs))

    def inside(self, unet: dict[str, Any], times: int) -> Any:
        return UNet2DModel(**unet)

    def output(self, sample: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        """Of the U-Net inside, at times t [N]."""
        return self.core(sample, t, class_labels=class_labels, return_dict=False)[0]

    def forward(
        self, sample: Tensor, timestep: Tensor | int, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> UNet2DOutput | tuple[Tensor]:
        t = torch.as_tensor(timestep, device=sample.device).long().expand(len(sample))
        column = (-1, 1, 1, 1)
        raw = self.output(self.input_scale[t].view(column) * sample, t, class_labels)
        result = self.of_input[t].view(column) * sample
        for p, output in enumerate(raw.chunk(self.of_outputs.shape[1], dim=1)):
            result = result + self.of_outputs[t, p].view(column) * output
        return UNet2DOutput(sample=result) if return_dict else (result,)
