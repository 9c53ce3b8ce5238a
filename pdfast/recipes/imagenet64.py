"""The paper's class-conditional ImageNet 64x64: 295,905,222 parameters, as the authors' network. FID of the paper: 6.77, 8.95, 15.39
at 4, 2, 1 steps; ours: not yet run.

    python -m pdfast.distill --preset imagenet64 --data imagenet64.npz
"""

from pathlib import Path

from pdfast.config import DistillConfig, EvaluationConfig, TeacherConfig
from pdfast.networks import NetworkConfig

IMAGENET64 = DistillConfig(
    preset="imagenet64",
    data="imagenet64.npz",
    run=Path("runs/imagenet64"),
    flip=True,
    rounds=10,
    updates="50000,2:100000,1:100000",
    batch_size=2048,
    learning_rate=1e-4,
    network=NetworkConfig(
        image_size=64,
        image_channels=3,
        channels=192,
        channel_mult=(1, 2, 3, 4),
        num_res_blocks=3,
        attention_resolutions=(32, 16, 8),
        head_dim=64,
        emb_channels=768,
        num_groups=32,
        prediction="both",
        num_classes=1000,
    ),
    train=TeacherConfig(updates=550000, batch_size=2048, learning_rate=3e-4, warmup=1000, dropout=0.1),
    evaluation=EvaluationConfig(clip=True),
)
