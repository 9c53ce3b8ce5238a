"""The configuration of a run: typed, checked, and the same in a preset, on the command line and in `config.yaml`."""

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import torch
import yaml

from pdfast import diffusion
from pdfast.bounds import MOST_STEPS
from pdfast.data import LoaderName
from pdfast.diffusion import Weighting
from pdfast.errors import UsageError
from pdfast.flags import Suppress, arg
from pdfast.networks import NetworkConfig
from pdfast.reading import read_array, shown

OptionalInt = Annotated[int | None, arg(metavar="INT")]
OptionalString = Annotated[str | None, arg(metavar="STR")]
OptionalPath = Annotated[Path | None, arg(metavar="PATH")]

MOST_ALPHA_BARS = 1 << 16


@dataclass(frozen=True)
class ScheduleConfig:
    """How noise grows with the diffusion time u, from data at 0 to noise at 1."""

    name: Literal["cosine", "clipped_cosine", "linear_beta", "alpha_bars", "diffusers"] = "cosine"
    """cosine; clipped_cosine (log-SNR within bounds, as in the paper's code); linear_beta (VP-SDE); alpha_bars (a table);
    diffusers (that of a teacher from there)."""
    u_start: float = 1.0
    """Diffusion time at which sampling starts; below 1 for networks that predict eps."""
    logsnr_min: float = -20.0
    """clipped_cosine: log-SNR at u = 1."""
    logsnr_max: float = 20.0
    """clipped_cosine: log-SNR at u = 0."""
    beta_min: float = 0.1
    """linear_beta: rate at u = 0."""
    beta_max: float = 20.0
    """linear_beta: rate at u = 1."""
    alpha_bars: OptionalPath = None
    """alpha_bars: a .npy file of strictly decreasing values in [0, 1), entry i at u = (i + 1) / T."""
    diffusers: Annotated[dict[str, Any] | None, Suppress] = None
    """diffusers: of a scheduler_config.json, what its table is made from."""
    table: Annotated[tuple[float, ...] | None, Suppress] = None
    """alpha_bars: the values of that file, which stand in its place once it was read (see `with_table`)."""

    def with_table(self) -> "ScheduleConfig":
        """Return the schedule with the values of the file `alpha_bars` in the place of its path: a model is whole without it.
        UsageError for a file that cannot be read, and for one that another schedule does not need."""
        if self.alpha_bars is None:
            return self if self.name == "alpha_bars" else dataclasses.replace(self, table=None)
        if self.name != "alpha_bars":
            raise UsageError(
                f"--schedule.alpha-bars is for --schedule.name alpha_bars, not {self.name}: add that, or leave it out"
            )
        values = read_array(self.alpha_bars)
        if values.ndim != 1 or len(values) > MOST_ALPHA_BARS:
            raise UsageError(f"{self.alpha_bars} has shape {values.shape}: need [T] with T up to {MOST_ALPHA_BARS}")
        return dataclasses.replace(self, alpha_bars=None, table=tuple(values.astype(np.float64).tolist()))

    def build(self) -> diffusion.Schedule:
        """The schedule. UsageError for bad values or an unreadable table."""
        try:
            match self.name:
                case "cosine":
                    schedule: diffusion.Schedule = diffusion.Cosine()
                case "clipped_cosine":
                    schedule = diffusion.ClippedCosine(self.logsnr_min, self.logsnr_max)
                case "linear_beta":
                    schedule = diffusion.LinearBeta(self.beta_min, self.beta_max)
                case "alpha_bars":
                    table = self.with_table().table
                    if table is None:
                        raise UsageError("--schedule.name alpha_bars needs --schedule.alpha-bars FILE.npy")
                    schedule = diffusion.AlphaBars(torch.tensor(table, dtype=torch.float64))
                case "diffusers":
                    from pdfast.teachers.schedulers import alpha_bars

                    if self.diffusers is None:
                        raise UsageError("--schedule.name diffusers comes with a teacher of diffusers: say --teacher")
                    schedule = diffusion.AlphaBars(alpha_bars(self.diffusers))
            return diffusion.StartingAt(schedule, self.u_start) if self.u_start != 1 else schedule
        except (ValueError, OSError) as error:
            raise UsageError(f"schedule: {error}") from None


@dataclass(frozen=True)
class TeacherConfig:
    """Training of the teacher (Algorithm 1), used where none is given."""

    updates: int
    """Parameter updates."""
    batch_size: int
    """Images an update."""
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
    clip: float = 1.0
    """Largest global gradient norm."""
    weighting: Weighting = "truncated_snr"
    """Weight of the loss over noise levels."""


Reference = Literal["half", "all"]


@dataclass(frozen=True)
class EvaluationConfig:
    """How teacher and students are judged."""

    features: str = "mobilenet"
    """Feature space of distances and scores: digits, mobilenet, or a path to Inception weights (then they are FID, KID, IS)."""
    num_samples: int = 10000
    """Images drawn; the same number everywhere, so that distances compare."""
    reference: Reference = "half"
    """Which real images drawn ones are compared with. half: as many as are drawn, and as many others are compared with these for
    a floor; all: every one, as for the FIDs that papers report, without a floor."""
    max_steps: int = 1024
    """The teacher is not judged at step counts above this, but for the one that distillation starts from."""
    batch_size: int = 256
    """Images sampled at once."""
    clip: bool = False
    """Clip each x-prediction to [-1, 1] while sampling, as the authors did in evaluation."""


OptimizerName = Literal["pdfast", "torch", "apex"]


@dataclass(frozen=True)
class EngineConfig:
    """How the machine does it: nothing of this changes what is computed but for rounding."""

    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Of activations and of the teacher's weights; auto is bf16 on a GPU, fp32 on a CPU. Weights, sums and states are fp32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the networks, each block or in one process on a CPU the whole, and what is around them; auto is on for a GPU,
    off for a CPU."""
    graph: bool = True
    """On a GPU, run an update as one CUDA graph where that is possible."""
    deterministic: bool = True
    """On a GPU, use only algorithms that give the same bits in every run."""
    optimizer: OptimizerName = "pdfast"
    """Whose Adam: pdfast (one pass with the average), torch (fused), apex (where it is installed); equal in results."""
    micro_batches: int = 1
    """Parts of a batch that the student sees one after the other; less memory, the same gradient."""
    recompute: bool = False
    """Keep only each block's input for the backward and run the block again there; less memory, a third more work."""
    shard: int = 1
    """Processes over which parameters, gradients and optimizer are divided: 1 keeps a copy in each, all processes is FSDP,
    between is HSDP."""
    teacher_shard: Literal["auto", "on", "off"] = "auto"
    """With shard above 1, divide the teacher too; auto does where its copy would take an eighth of a GPU's memory."""
    patience: float = 600.0
    """Seconds without an update after which a run of several processes ends and names the one that hangs; the first update,
    which compiles, may take ten times as long."""
    non_finite_limit: int = 10
    """Updates in a row with a loss or gradient that is not finite after which the run stops; none of them changes weights."""


@dataclass(frozen=True)
class GuardConfig:
    """When a round is worth a warning in log and report."""

    ratio: float = 1.5
    """A student's Frechet distance as a multiple of that of the round before (of the teacher, in the first)."""
    colour: float = 0.02
    """A student's channel means away from those of the first teacher's images, of the range 0 to 1."""


@dataclass(frozen=True)
class RunConfig:
    """What every run has."""

    network: NetworkConfig
    train: TeacherConfig
    schedule: ScheduleConfig = ScheduleConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    preset: str = "digits"
    """Starting point that every other flag overrides: digits, cifar10-fast, cifar10, imagenet64, lsun128."""
    data: str = "digits"
    """Images: digits (built in), a .npy or .npz file of uint8 images, or a folder of image files, tar shards or TFRecord."""
    loader: LoaderName = "auto"
    """What loads them: resident (all in memory, decoded once), dali, or portable (Pillow); auto is resident up to 1 GiB, then
    dali where it is installed."""
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


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """A teacher's run."""

    evaluation_steps: tuple[int, ...] = (256, 16)
    """Step counts of DDIM at which the trained teacher is judged."""


@dataclass(frozen=True)
class DistillConfig(RunConfig):
    """A distillation run."""

    teacher: OptionalPath = None
    """Folder of a trained teacher (or student), of a diffusers pipeline, or of a network of EDM's authors; without one the
    preset's teacher is trained first."""
    convert: Annotated[Literal["v"] | None, arg(metavar="v")] = None
    """v: distil a copy of the teacher that predicts v. For one that predicts eps, which cannot be distilled to one step."""
    convert_updates: int = 2000
    """Updates that the copy is trained for, at the rounds' batch size and learning rate."""
    rounds: OptionalInt = None
    """Halvings of the number of steps. Any two of rounds, start-steps and end-steps give the third; without any, the
    preset's."""
    start_steps: OptionalInt = None
    """Steps of the teacher that is distilled first: 2^rounds * end_steps."""
    end_steps: OptionalInt = None
    """Steps of the last student; 1 unless said."""
    updates: str = "50000,2:100000,1:100000"
    """Updates a round: one number, or with exceptions by the student's step count, as 50000,2:100000,1:100000."""
    batch_size: int = 128
    """Images an update."""
    learning_rate: float = 1e-4
    """Learning rate of Adam at the start of a round, annealed linearly to 0."""
    clip: float = 1.0
    """Largest global gradient norm."""
    weighting: Weighting = "truncated_snr"
    """Weight of the distillation loss over noise levels."""
    ema: float = 0.0
    """Decay of a moving average of the student's weights, which then is the student; 0 for none, as in the paper."""
    guard: GuardConfig = GuardConfig()

    def updates_at(self, steps: int) -> int:
        """The updates of the round whose student takes `steps` steps."""
        default, exceptions = parse_updates(self.updates)
        return exceptions.get(steps, default)

    @property
    def first_steps(self) -> int:
        """start_steps, once it is known: see `resolve_steps`."""
        assert self.start_steps is not None
        return self.start_steps

    @property
    def round_steps(self) -> list[int]:
        """The students' step counts, from start_steps / 2 down to end_steps."""
        assert self.rounds is not None
        return [self.first_steps >> r for r in range(1, self.rounds + 1)]


def parse_updates(text: str) -> tuple[int, dict[int, int]]:
    """`50000` or `50000,2:100000` -> (default, {steps: updates}). UsageError where it is neither."""
    if not re.fullmatch(r"\d+(,\d+:\d+)*", text):
        raise UsageError(f"updates {text!r} is not a number or a table such as 50000,2:100000,1:100000")
    default, *exceptions = text.split(",")
    return int(default), {int(steps): int(updates) for steps, updates in (entry.split(":") for entry in exceptions)}


Steps = tuple[int | None, int | None, int | None]


def resolve_steps(given: Steps, preset: Steps) -> tuple[int, int, int]:
    """(rounds, start_steps, end_steps) of which any two give the third and end_steps is 1 unless said.

    given: what the user said, None for the rest; where nothing was said, the preset's.
    """
    rounds, start, end = given
    if rounds is None and start is None:
        preset_rounds, preset_start, preset_end = preset
        rounds, end = preset_rounds, end if end is not None else preset_end
        start = preset_start if end is None else None
    for name, value in (("rounds", rounds), ("start-steps", start), ("end-steps", end)):
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1, got {value}")
    if rounds is not None and rounds > MOST_STEPS.bit_length() - 1:
        raise UsageError(f"--rounds {rounds} means more than {MOST_STEPS} steps; 13 halve 8192 steps to 1")
    if end is None:
        end = 1 if rounds is None or start is None else start >> rounds
    if start is None:
        assert rounds is not None  # a preset has one
        start = end << rounds
    if rounds is None:
        rounds = max((start // end).bit_length() - 1, 1)
    if end < 1 or start != end << rounds:
        raise UsageError(
            f"rounds = {rounds} does not lead from {start} to {max(end, 1)} steps: need start-steps = 2^rounds * end-steps "
            f"(give two of --rounds, --start-steps, --end-steps)"
        )
    return rounds, start, end


def to_plain(config: Any) -> dict[str, Any]:
    """A configuration as plain dicts, lists, numbers and strings."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, tuple):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    return plain(config)


T = TypeVar("T")
FACTS = {"command", "images_sha256", "images_alone_sha256", "teacher_sha256", "features_sha256", "data_sha256"}
"""Keys of a saved configuration beside its fields; the last was written by the version before."""


def from_plain(cls: type[T], plain: dict[str, Any], where: str) -> T:
    """The inverse of `to_plain`. UsageError that names the field for one unknown, missing or of a wrong type."""
    hints = get_type_hints(cls)
    if not isinstance(plain, dict):
        raise UsageError(f"{where}: expected fields, found {shown(plain)}")
    for name in plain:
        if name not in hints:
            raise UsageError(f"{where}: unknown field {shown(name)}; known are {', '.join(hints)}")
    values = {}
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        if f.name in plain:
            values[f.name] = _convert(hints[f.name], plain[f.name], f"{where}, {f.name}")
        elif f.default is dataclasses.MISSING:
            raise UsageError(f"{where}: field {f.name!r} is missing")
    try:
        return cls(**values)
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from None


def _convert(kind: Any, value: Any, where: str) -> Any:
    choices = get_args(kind) if type(None) in get_args(kind) else (kind,)
    if value is None and type(None) in choices:
        return None
    for choice in choices:
        origin = get_origin(choice)
        if dataclasses.is_dataclass(choice):
            return from_plain(choice, value, where)  # type: ignore[arg-type]
        if origin is tuple and isinstance(value, list | tuple):
            return tuple(_convert(get_args(choice)[0], v, where) for v in value)
        if origin is Literal and any(value == v and type(value) is type(v) for v in get_args(choice)):
            return value
        if origin is dict and isinstance(value, dict):
            return value
        if choice is Path and isinstance(value, str):
            return Path(value)
        if choice is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if isinstance(choice, type) and type(value) is choice:
            return value
    wanted = " or ".join(
        " or ".join(map(repr, get_args(c))) if get_origin(c) is Literal else getattr(c, "__name__", str(c))
        for c in choices
        if c is not type(None)
    )
    raise UsageError(f"{where}: {shown(value)} is not {wanted}")


def fields_of(cls: type, plain: dict[str, Any], names: Iterable[str], where: str) -> dict[str, Any]:
    """Convert those of the fields `names` of a configuration that `plain` has. UsageError that names one of a wrong type."""
    hints = get_type_hints(cls)
    return {name: _convert(hints[name], plain[name], f"{where}, {name}") for name in names if name in plain}


def to_yaml(config: Any) -> str:
    """YAML text of a configuration, fields in their order."""
    return yaml.safe_dump(to_plain(config), sort_keys=False)
