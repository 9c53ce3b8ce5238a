"""The paper's LSUN 128x128 (bedroom, church): 139,578,502 parameters, as the authors' network. Not yet run.

python -m pdfast.distill --preset lsun128 --data lsun128.npz
"""

from pathlib import Path

from pdfast.config import DistillConfig, EvaluationConfig, TeacherConfig
from pdfast.networks import NetworkConfig

LSUN128 = DistillConfig(
    preset="lsun128",
    data="lsun128.npz",
    run=Path("runs/lsun128"),
    flip=True,
    rounds=10,
    updates="50000,2:100000,1:100000",
    batch_size=128,
    learning_rate=1e-4,
    network=NetworkConfig(
        image_size=128,
        image_channels=3,
        channels=64,
        channel_mult=(1, 2, 4, 6, 8),
        num_res_blocks=3,
        attention_resolutions=(32, 16, 8),
        head_dim=64,
        emb_channels=768,
        num_groups=32,
        prediction="both",
    ),
    train=TeacherConfig(updates=500000, batch_size=2048, learning_rate=3e-4, warmup=1000, dropout=0.1),
    evaluation=EvaluationConfig(clip=True),
)
