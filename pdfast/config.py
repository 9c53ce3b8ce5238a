"""The configuration of a run: typed, checked, and the same in a preset, on the command line and in `config.yaml`."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from pdfast.data import LoaderName
from pdfast.diffusion import Weighting
from pdfast.flags import OptionalFloat, OptionalInt, OptionalPath, OptionalString, arg, leave_out
from pdfast.io.plain import unstructure
from pdfast.io.run_folder import RunFolder
from pdfast.networks import ModelConfig, NetworkConfig
from pdfast.networks.guided import GuidedConfig
from pdfast.rounds import (
    STEP_FACTOR,
    MethodName,
    parse_guidance,
    parse_learning_rates,
    parse_methods,
    parse_plan,
    parse_updates,
)
from pdfast.schedule_config import ScheduleConfig

leave_out(NetworkConfig, "null_label", "guidance")  # which --train.label-dropout and --guidance say


@dataclass(frozen=True)
class TeacherConfig:
    """Training of the teacher (Algorithm 1), used where none is given."""

    updates: int
    """Parameter updates."""
    batch_size: int
    """Images per update (global batch size)."""
    learning_rate: float
    """Peak learning rate of Adam."""
    warmup: int
    """Updates over which the learning rate rises from 0."""
    decay: float = 0.0
    """Fraction of the updates, at the end, over which the learning rate falls linearly to 0."""
    ema: float = 0.9999
    """Decay of the exponential moving average of the weights, which is the teacher."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    dropout: float = 0.0
    """Dropout while training the teacher; there is none in distillation."""
    label_dropout: float = 0.0
    """Fraction of the images whose class the teacher is not told while it is trained, so that it can be guided; 0.1 is usual."""
    clip: float = 1.0
    """Largest global gradient norm."""
    weighting: Weighting = "truncated_snr"
    """Weight of the loss over noise levels."""


Reference = Literal["half", "all"]


@dataclass(frozen=True)
class EvaluationConfig:
    """How teacher and students are evaluated."""

    features: str = "mobilenet"
    """Feature space of distances and scores: digits, mobilenet, classifier (of the data's own labels, trained once), or a path to
    Inception weights (then they are FID, KID, IS)."""
    num_samples: int = 10000
    """Generated images; the same number everywhere, so that distances are comparable."""
    reference: Reference = "half"
    """Real images to compare with. half: as many as are generated, and as many others to compare real with real; all: every one, as
    for the FIDs that papers report, without real against real."""
    max_steps: int = 1024
    """The teacher is not evaluated at step counts above this, except the one that distillation starts from."""
    batch_size: int = 256
    """Images sampled at once."""
    clip: bool = False
    """Clip each x-prediction to [-1, 1] while sampling, as the authors did in evaluation."""


OptimizerName = Literal["pdfast", "torch", "apex"]


@dataclass(frozen=True)
class EngineConfig:
    """Performance settings; results are equal up to rounding."""

    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Mixed precision: dtype of activations and of the teacher's weights; auto is bf16 on a GPU, fp32 on a CPU. Weights, sums and
    optimizer states are fp32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile each block of the networks (the whole network in one process on a CPU) and the functions around them; auto is on
    for a GPU, off for a CPU."""
    graph: bool = True
    """On a GPU, run an update as one CUDA graph where that is possible."""
    deterministic: bool = True
    """On a GPU, use only algorithms that give the same bits in every run."""
    optimizer: OptimizerName = "pdfast"
    """Which Adam implementation: pdfast (one pass with the EMA), torch (fused), apex (where installed); equal results."""
    micro_batches: int = 1
    """Gradient accumulation: micro-batches of an update; less memory, the same gradient."""
    recompute: bool = False
    """Activation checkpointing: keep only each block's input and recompute the block in the backward; less memory, a third more work."""
    shard: int = 1
    """Shard-group size of parameters, gradients and optimizer state: 1 replicates, the world size is FSDP, between is HSDP."""
    teacher_shard: Literal["auto", "on", "off"] = "auto"
    """With shard above 1, shard the teacher too; auto does where a copy would take an eighth of a GPU's memory."""
    patience: float = 600.0
    """Seconds without an update after which a run of several processes ends and names the one that hangs; the first update,
    which compiles, may take ten times as long."""
    non_finite_limit: int = 10
    """Updates in a row with a loss or gradient that is not finite after which the run stops; none of them changes weights."""


@dataclass(frozen=True)
class GuardConfig:
    """When a round gets a warning in log and report."""

    ratio: float = 1.5
    """A student's Frechet distance as a multiple of that of the round before (of the teacher, in the first)."""
    colour: float = 0.02
    """A student's channel means away from those of the first teacher's images, of the range 0 to 1."""
    seeds: float = 0.5
    """Distance of a student's image from the teacher's of the same noise, as a fraction of that between images of different noise. The
    students of the built-in job have 0.01 at 128 steps and 0.11 at one."""
    diversity: float = 0.8
    """Least distance between images of different noise, as a fraction of the teacher's; those students have 0.98 and more."""
    contrast: float = 0.1
    """Contrast within an image, this fraction off the teacher's; those students are at most 0.01 off."""
    saturation: float = 0.2
    """Chroma, this fraction off the teacher's. Twice the bound of contrast for want of a measurement: the built-in job
    is grey, and has no chroma."""


@dataclass(frozen=True)
class TractConfig:
    """Transitive closure: rounds by the method tract."""

    ema: float = 0.5
    """Decay of the EMA of the student that takes the last part of the target. The one that is saved is set by --ema."""
    grids: tuple[int, ...] = ()
    """Numbers of the teacher's steps that a round goes through, one after the other, with equal shares of its updates (multistep
    consistency), as 64 256 1024; each a multiple of the student's. Empty: the step count before."""


@dataclass(frozen=True)
class KeptConfig:
    """Targets that are made ahead and serve several updates."""

    count: int = 16384
    """How many are kept at a time, rounded up to whole batches: pairs, or targets of the method progressive."""
    reuse: int = 1
    """Updates that a target of the method progressive serves; 1 makes new ones for every update."""
    pair_steps: OptionalInt = None
    """Steps in which the first teacher draws the pairs, by a sampler of second order. By default the model before the first round by
    pairs draws them, by DDIM in its own number of steps."""
    huber: float = 0.01
    """What --huber is for other rounds, for those by pairs."""


@dataclass(frozen=True)
class PairsOrigin:
    """Where the pairs of a round come from."""

    model: int
    """Step count, in the plan, of the model that draws them."""
    steps: int
    """Steps in which it does."""
    order: int
    """Of its sampler."""
    finest: int
    """Step count of the first of the consecutive rounds that share them: they keep the states at the ends of its student's steps."""


@dataclass(frozen=True)
class RunConfig:
    """Settings of every run."""

    network: NetworkConfig
    train: TeacherConfig
    schedule: ScheduleConfig = ScheduleConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    preset: str = "digits"
    """Starting point that every other flag overrides: digits, fashion, cifar10-fast, cifar10, imagenet64, lsun128."""
    data: str = "digits"
    """Images: digits (built in), a .npy or .npz file of uint8 images, or a folder of image files, tar shards or TFRecord."""
    loader: LoaderName = "auto"
    """Loader: resident (all in memory, decoded once), dali, or portable (Pillow); auto is resident up to 1 GiB, then dali where it is
    installed."""
    max_bad: float = 0.001
    """Fraction of the images in files that may be damaged; each is replaced by the next one."""
    run: Annotated[Path, arg(aliases=["--run-dir"])] = Path("runs/digits")
    """Folder of the run; the same command resumes what it finds there. (Under torchrun say --run-dir: it takes --run for an
    abbreviation of an option of its own.)"""
    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""
    flip: bool = False
    """Flip half of the training images left to right."""
    checkpoint_every: int = 1000
    """Updates between checkpoints."""
    log_every: int = 100
    """Updates between log lines; a short stage has at least eight lines."""
    engine: EngineConfig = EngineConfig()

    @property
    def folder(self) -> RunFolder:
        """The run's folder and the paths in it."""
        return RunFolder(self.run)


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """A teacher's run."""

    evaluation_steps: tuple[int, ...] = (256, 16)
    """Step counts of DDIM at which the trained teacher is evaluated."""


@dataclass(frozen=True)
class DistillConfig(RunConfig):
    """A distillation run."""

    teacher: OptionalPath = None
    """Folder of a trained teacher (or student), of a diffusers pipeline, or of a network of EDM's authors; or
    package.module:function, code of your own that returns a pdfast.Teacher; without one the preset's teacher is trained first."""
    convert: Annotated[Literal["v"] | None, arg(metavar="v")] = None
    """v: distil a copy of the teacher that predicts v. For one that predicts eps, which cannot be distilled to one step."""
    convert_updates: int = 2000
    """Updates of the copy's training, at the rounds' batch size and learning rate."""
    plan: OptionalString = None
    """Step counts from the teacher's down to the last student's, as 256,64,16,4,2,1; each divides the one before. Instead of
    rounds, start-steps and end-steps."""
    rounds: OptionalInt = None
    """Rounds, each of which divides the number of steps by the factor. Any two of rounds, start-steps and end-steps give the third;
    without any, the preset's."""
    start_steps: OptionalInt = None
    """Steps of the teacher that is distilled first: factor^rounds * end_steps."""
    end_steps: OptionalInt = None
    """Steps of the last student; 1 unless said."""
    factor: int = STEP_FACTOR
    """Steps of the teacher that one of its student's replaces, where rounds are counted: 2 halves."""
    method: str = "progressive"
    """How a round is distilled: progressive (Salimans & Ho 2022), tract (transitive closure, Berthelot et al. 2023) or pairs (noise
    and what the teacher draws from it, kept; Luhman & Luhman 2021); or with exceptions by the student's step count, as
    progressive,2:pairs,1:pairs."""
    updates: str = "50000,2:100000,1:100000"
    """Updates per round: one number, or with exceptions by the student's step count, as 50000,2:100000,1:100000."""
    minutes: OptionalFloat = None
    """Minutes of training in all, on this machine, in place of --updates, --train.updates and the --kept.count of pairs: measured and
    divided among the teacher and the rounds when the run begins, and written into its configuration."""
    batch_size: int = 128
    """Images per update (global batch size)."""
    learning_rate: float = 1e-4
    """Learning rate of Adam at the start of a round, annealed linearly to 0."""
    learning_rate_at: str = ""
    """Exceptions from it by the student's step count, as 4:1e-3,2:1e-3,1:1e-3; a preset's do not count where --learning-rate is said."""
    clip: float = 1.0
    """Largest global gradient norm."""
    weighting: Weighting = "truncated_snr"
    """Weight of the distillation loss over noise levels."""
    huber: float = 0.0
    """Weighted errors above this count linearly in that loss, those below it squared (pseudo-Huber); 0 squares all, as in the paper.
    With the weighting x_mse they are errors of x, whose range is -1 to 1. Rounds by pairs have their own, --kept.huber."""
    ema: float = 0.0
    """Decay of an EMA of the student's weights, which then is the student; 0 for none, as in the paper."""
    guidance: OptionalString = None
    """Classifier-free guidance of the teacher in its round, which the students then have inside: a number, 1 for none, or a range such as
    0..4, from which each image has its own, and which the students take as an input. For a teacher with --train.label-dropout."""
    guard: GuardConfig = GuardConfig()
    tract: TractConfig = TractConfig()
    kept: KeptConfig = KeptConfig()

    def updates_at(self, steps: int) -> int:
        """Return the updates of the round whose student takes `steps` steps."""
        default, exceptions = parse_updates(self.updates)
        return exceptions.get(steps, default)

    def learning_rate_to(self, steps: int) -> float:
        """Return the learning rate at the start of the round whose student takes `steps` steps."""
        return parse_learning_rates(self.learning_rate_at).get(steps, self.learning_rate)

    def method_at(self, steps: int) -> MethodName:
        """Return the method of the round whose student takes `steps` steps."""
        default, exceptions = parse_methods(self.method)
        return exceptions.get(steps, default)

    @property
    def guidance_range(self) -> tuple[float, ...] | None:
        """The guidance of the first teacher: g, or the least and the largest; None for none."""
        return parse_guidance(self.guidance)

    @property
    def teacher_network(self) -> ModelConfig:
        """The first teacher, guided where it is."""
        guidance = self.guidance_range
        return self.network if guidance is None else GuidedConfig(self.network, guidance)

    @property
    def asked_network(self) -> NetworkConfig:
        """What is asked for targets in a round: like `network`, with g as an input where the students have that."""
        guidance = self.guidance_range
        return self.network if guidance is None else self.network.guided(guidance)

    @property
    def student_network(self) -> NetworkConfig:
        """The students: with the guidance inside, and without the label for no class, which they are never told."""
        network = self.asked_network
        return network if network.null_label is None else network.changed(null_label=None)

    def forwards_of(self, steps: int) -> int:
        """Return the forwards of the network that the model of a step count in the plan takes for an output: two where it is guided."""
        return 2 if steps == self.first_steps and self.guidance_range is not None else 1

    @property
    def first_steps(self) -> int:
        """start_steps, once it is known: see `resolve_steps`."""
        assert self.start_steps is not None
        return self.start_steps

    @property
    def round_steps(self) -> list[int]:
        """The students' step counts, from that of the first round down to end_steps."""
        if self.plan is not None:
            return parse_plan(self.plan)[1:]
        assert self.rounds is not None
        return [self.first_steps // self.factor**r for r in range(1, self.rounds + 1)]

    def steps_before(self, steps: int) -> int:
        """Return the step count of the model that the round to `steps` begins with."""
        return next(before for before, after in pairwise([self.first_steps, *self.round_steps]) if after == steps)

    def model_folder(self, steps: int) -> Path:
        """Return the folder of the run's model of a step count in the plan: the teacher's, or a student's."""
        return self.folder.teacher if steps == self.first_steps else self.folder.student(steps)

    def pairs_at(self, steps: int) -> PairsOrigin:
        """Return where the pairs of a round come from."""
        rounds = self.round_steps
        first = rounds.index(steps)
        while first > 0 and self.method_at(rounds[first - 1]) == "pairs":
            first -= 1
        if self.kept.pair_steps is not None:
            return PairsOrigin(self.first_steps, self.kept.pair_steps, 2, rounds[first])
        before = self.steps_before(rounds[first])
        return PairsOrigin(before, before, 1, rounds[first])


SAVED_FACTS = {"command", "images_sha256", "images_alone_sha256", "teacher_sha256", "features_sha256", "data_sha256"}
"""Keys of a saved configuration beside its fields; the last was written by the version before."""


def to_yaml(config: Any) -> str:
    """Return YAML text of a configuration, fields in their order."""
    return yaml.safe_dump(unstructure(config), sort_keys=False)
