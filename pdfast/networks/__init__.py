"""Networks that diffuse: plain modules that know nothing of training."""

from pdfast.networks.network import ModelConfig, Network, WrapperConfig
from pdfast.networks.unet import NetworkConfig, UNet
from pdfast.networks.wrapped import Wrapped

__all__ = ["ModelConfig", "Network", "NetworkConfig", "UNet", "Wrapped", "WrapperConfig"]
