"""One preset a reproducible result. `digits` runs in minutes on a laptop; `cifar10-fast` aims at half an hour on one GPU; the
rest are the networks and settings of Salimans & Ho 2022, their parameter counts those of the authors' networks.
"""

from pathlib import Path

from pdfast.config import DistillConfig, EvaluationConfig, TeacherConfig
from pdfast.errors import UsageError
from pdfast.networks import NetworkConfig
from pdfast.reading import shown

DIGITS = DistillConfig(
    # torchrun --standalone -m pdfast.distill --rounds 8
    # Eight rounds, 256 steps to 1, on the 8x8 UCI digits; the README shows what it reaches.
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

CIFAR10_FAST = DistillConfig(
    # python -m pdfast.distill --preset cifar10-fast --data cifar10.npz
    # A 32M-parameter v-predicting network for one GPU; not yet run to the end.
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

CIFAR10 = DistillConfig(
    # python -m pdfast.distill --preset cifar10 --data cifar10.npz
    # The paper's CIFAR-10: FID 2.57, 3.00, 4.51, 9.12 at 8, 4, 2, 1 steps. 60,004,099 parameters, as the authors' network.
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

IMAGENET64 = DistillConfig(
    # python -m pdfast.distill --preset imagenet64 --data imagenet64.npz
    # The paper's ImageNet 64x64, class-conditional. 295,905,222 parameters, as the authors' network.
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

LSUN128 = DistillConfig(
    # python -m pdfast.distill --preset lsun128 --data lsun128.npz
    # The paper's LSUN 128x128 (bedroom, church). 139,578,502 parameters, as the authors' network.
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

PRESETS = {config.preset: config for config in (DIGITS, CIFAR10_FAST, CIFAR10, IMAGENET64, LSUN128)}


def preset(name: str) -> DistillConfig:
    """The preset of that name. UsageError for an unknown one."""
    if not isinstance(name, str) or name not in PRESETS:
        raise UsageError(f"unknown preset {shown(name)}; choose from {', '.join(PRESETS)}")
    return PRESETS[name]
