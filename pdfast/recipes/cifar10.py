"""The paper's CIFAR-10: 60,004,099 parameters, as the authors' network. FID of the paper: 2.57, 3.00, 4.51, 9.12 at 8, 4, 2, 1
steps; ours: not yet run.

    python -m pdfast.distill --preset cifar10 --data cifar10.npz
"""

from pathlib import Path

from pdfast.config import DistillConfig, EvaluationConfig, TeacherConfig
from pdfast.networks import NetworkConfig

CIFAR10 = DistillConfig(
    preset="cifar10",
    data="cifar10.npz",
    run=Path("runs/cifar10"),
    flip=True,
    rounds=13,
    updates="50000,2:100000,1:100000",
    batch_size=128,
    learning_rate=5e-5,
    network=NetworkConfig(
        image_size=32,
        image_channels=3,
        channels=256,
        channel_mult=(1, 1, 1),
        num_res_blocks=3,
        attention_resolutions=(16, 8),
        head_dim=256,
        emb_channels=1024,
        num_groups=32,
        prediction="x",
    ),
    train=TeacherConfig(
        updates=800000, batch_size=128, learning_rate=2e-4, warmup=1000, weight_decay=1e-3, dropout=0.2
    ),
    evaluation=EvaluationConfig(clip=True),
)
