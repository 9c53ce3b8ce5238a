"""Networks that diffuse: plain modules that know nothing of training."""

from pdfast.networks.network import Network
from pdfast.networks.unet import NetworkConfig, UNet

__all__ = ["Network", "NetworkConfig", "UNet"]
