"""As `pdfast_unet`, which lies beside it, with a U-Net of EDM inside (`edm_unet`), told the noise level of each time."""

from typing import Any

import torch
from torch import Tensor

from .edm_unet import EDMUNet, EDMUNetConfig
from .pdfast_unet import PdfastUNet


class PdfastEDMUNet(PdfastUNet):
    noise: Tensor

    def inside(self, unet: dict[str, Any], times: int) -> Any:
        """unet: the fields of EDMUNetConfig."""
        self.register_buffer("noise", torch.zeros(times))
        return EDMUNet(EDMUNetConfig(**unet))

    def output(self, sample: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        return self.core(sample, self.noise[t], None if class_labels is None else class_labels.long())
