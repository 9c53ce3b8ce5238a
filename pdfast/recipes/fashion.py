"""Fashion-MNIST whole, 28 x 28, on a laptop: two hours on one core of 80 GFLOP/s; docs/recipes.md has what it reaches.

python -m pdfast.data.prepare fashion-mnist /usr/share/datasets/fashion-mnist fashion-mnist.npz
python -m pdfast.distill --preset fashion

A forward of an image is 0.142 GFLOP. The teacher takes 3500 updates of 128 images at 3 forwards, 1.34 million; the rounds take 1.31
million, of which the pairs are 0.33; together 377 TFLOP. Measuring takes 0.63 million more, 90 TFLOP.
"""

from pathlib import Path

from pdfast.config import DistillConfig, EvaluationConfig, KeptConfig, TeacherConfig
from pdfast.networks import NetworkConfig

FASHION = DistillConfig(
    preset="fashion",
    data="fashion-mnist.npz",
    run=Path("runs/fashion"),
    checkpoint_every=250,
    plan="128,32,8,4,2,1",
    method="progressive,8:pairs,4:pairs,2:pairs,1:pairs",
    updates="150,8:600,4:900,2:1250,1:2000",
    batch_size=64,
    learning_rate=2.5e-4,
    learning_rate_at="8:1e-3,4:1e-3,2:1e-3,1:1e-3",
    kept=KeptConfig(count=20480, pair_steps=16),
    weighting="x_mse",
    huber=0.01,
    network=NetworkConfig(
        image_size=28,
        image_channels=1,
        channels=16,
        channel_mult=(1, 2, 3),
        num_res_blocks=1,
        attention_resolutions=(7,),
        head_dim=16,
        emb_channels=64,
        num_groups=2,
        prediction="v",
    ),
    train=TeacherConfig(
        updates=3500, batch_size=128, learning_rate=2e-3, warmup=200, decay=0.5, ema=0.998, weighting="snr_plus_one"
    ),
    evaluation=EvaluationConfig(features="classifier", num_samples=4000, max_steps=16),
)
