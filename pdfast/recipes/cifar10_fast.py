"""A 32M-parameter v-predicting network for CIFAR-10, for about half an hour on one GPU; not yet run to the end.

python -m pdfast.distill --preset cifar10-fast --data cifar10.npz
"""

from pathlib import Path

from pdfast.config import DistillConfig, TeacherConfig
from pdfast.networks import NetworkConfig

CIFAR10_FAST = DistillConfig(
    preset="cifar10-fast",
    data="cifar10.npz",
    run=Path("runs/cifar10-fast"),
    flip=True,
    rounds=8,
    updates="2000,4:4000,2:8000,1:8000",
    batch_size=512,
    learning_rate=1e-4,
    network=NetworkConfig(
        image_size=32,
        image_channels=3,
        channels=128,
        channel_mult=(1, 2, 2),
        num_res_blocks=2,
        attention_resolutions=(16, 8),
        head_dim=64,
        emb_channels=512,
        num_groups=32,
        prediction="v",
    ),
    train=TeacherConfig(
        updates=40000, batch_size=512, learning_rate=4e-4, warmup=1000, decay=0.2, ema=0.999, dropout=0.1
    ),
)
