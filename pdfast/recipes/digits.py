"""Eight rounds, 256 steps to 1, on the 8x8 UCI digits, in minutes on a laptop; the README shows what it reaches.

torchrun --standalone -m pdfast.distill --rounds 8

Halving down to 16 steps, where little is lost; then pairs, which the teacher draws once: docs/recipes.md has what else was tried at the same
cost.
"""

from pathlib import Path

from pdfast.config import DistillConfig, EvaluationConfig, KeptConfig, TeacherConfig
from pdfast.networks import NetworkConfig

DIGITS = DistillConfig(
    preset="digits",
    data="digits",
    run=Path("runs/digits"),
    checkpoint_every=500,
    log_every=50,
    rounds=8,
    method="progressive,8:pairs,4:pairs,2:pairs,1:pairs",
    updates="50,8:398,4:563,2:797,1:1127",
    batch_size=64,
    learning_rate=2.5e-4,
    learning_rate_at="8:2e-3,4:2e-3,2:2e-3,1:2e-3",
    kept=KeptConfig(count=32768, pair_steps=8),
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
