"""Eight rounds, 256 steps to 1, on the 8x8 UCI digits, in minutes on a laptop; the README shows what it reaches.

torchrun --standalone -m pdfast.distill --rounds 8
"""

from pathlib import Path

from pdfast.config import DistillConfig, EvaluationConfig, TeacherConfig
from pdfast.networks import NetworkConfig

DIGITS = DistillConfig(
    preset="digits",
    data="digits",
    run=Path("runs/digits"),
    checkpoint_every=500,
    log_every=50,
    rounds=8,
    updates="50,16:75,8:100,4:150,2:300,1:600",
    batch_size=128,
    learning_rate=5e-4,
    weighting="x_mse",
    network=NetworkConfig(
        image_size=8,
        image_channels=1,
        channels=16,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(),
        head_dim=16,
        emb_channels=64,
        num_groups=2,
        prediction="v",
    ),
    train=TeacherConfig(
        updates=1750, batch_size=128, learning_rate=2e-3, warmup=100, decay=0.5, ema=0.995, weighting="snr_plus_one"
    ),
    evaluation=EvaluationConfig(features="digits", num_samples=898),
)
