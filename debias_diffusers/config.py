"""What a run is: frozen dataclasses with a comment per field, the rules between fields, YAML and JSON in and out.

A configuration is written flat (one name, one value) and held in sections, one for each room that uses it. Nothing here
imports torch, so that `--help` and every complaint about a configuration come at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from .errors import InputError

Weighting = Literal["constant", "debiased", "inverse_snr", "p2", "min_snr"]
PredictionType = Literal["epsilon", "sample", "v_prediction"]
NoiseSchedule = Literal["linear", "cosine", "scaled_linear"]
SchedulerName = Literal["ddpm", "ddim", "dpmsolver", "dpmsolver++", "unipc"]
Spacing = Literal["linspace", "leading", "trailing"]
Precision = Literal["no", "fp16", "bf16"]

# The parameters that a weighting has beside the SNR; every other weighting has none.
WEIGHTING_PARAMETERS: dict[str, tuple[str, ...]] = {"p2": ("p2_k", "p2_gamma"), "min_snr": ("snr_gamma",)}

# Channel multipliers of the paper's networks by resolution, taken when `channel_mult` is left out.
CHANNEL_MULT = {256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4), 32: (1, 2, 2, 2)}

DIGITS = "digits"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images the model learns."""

    dataset: str | None = None  # digits, a folder of images, a .parquet file, a saved dataset, or a Hub id
    split: str = "train"  # split of a parquet, saved or Hub dataset
    image_column: str | None = None  # column of the images; found by its type if left out
    label_column: str | None = None  # column of the class labels; found by its type if left out
    resolution: int | None = None  # pixels a side: the shorter side is resized to it, then the centre is cut out
    channels: int | None = None  # 1 grey, 3 colour; that of the first image if left out
    class_conditional: bool = False  # train with class labels
    label_dropout: float = 0.1  # share of labels replaced by "none", which guidance needs
    random_flip: bool = False  # mirror half of the images
    num_workers: int = 2  # processes that read images, per training process; 0 reads in the loop


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The UNet that is built: either these numbers, or a UNet2DModel configuration file."""

    model_channels: int = 128  # channels of the first level
    channel_mult: tuple[int, ...] = ()  # channels of each level as multiples; by resolution if left out
    layers_per_block: int = 2  # residual blocks in each level
    attention_resolutions: tuple[int, ...] = (16, 8)  # levels with attention, by their resolution
    attention_head_dim: int = 64  # channels of one attention head
    resblock_updown: bool = False  # residual blocks resize, instead of plain convolutions
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"  # how the time enters a block
    dropout: float = 0.0  # share of activations dropped in residual blocks
    model_config: str | None = None  # FILE.json of a UNet2DModel, in place of the numbers above


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the network predicts, under which noise, and how much each noise level counts."""

    prediction_type: PredictionType = "epsilon"  # what the network predicts: noise, clean image, or velocity
    weighting: Weighting = "debiased"  # weight of a noise level: one objective, whatever the prediction type
    snr_gamma: float = 5.0  # threshold of min_snr
    p2_k: float = 1.0  # k of p2
    p2_gamma: float = 1.0  # gamma of p2
    snr_floor: float = 0.0  # weights are taken at an SNR of at least this
    noise_schedule: NoiseSchedule = "linear"  # how the noise grows with t
    num_train_timesteps: int = 1000  # number of noise levels T
    schedule_shift: float = 1.0  # factor on the SNR of every noise level; above 1 for images that drown in less noise


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """How the weights are found."""

    batch_size: int = 64  # images per optimizer step, over all processes
    micro_batch_size: int | None = None  # images per forward and process; smaller takes less memory
    max_steps: int = 100_000  # optimizer steps of the whole run
    max_hours: float = 0.0  # stop and save after so many hours of this start; 0 is off
    learning_rate: float = 1e-4  # peak learning rate of AdamW
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"  # after the warm-up: stay, or fall to 0
    warmup_steps: int = 0  # steps over which the learning rate rises from 0
    weight_decay: float = 0.0  # decoupled weight decay of AdamW
    max_grad_norm: float = 0.0  # gradients longer than this are shortened; 0 is off
    ema_decay: tuple[float, ...] = (0.9999,)  # rates of the averaged weights; the first is exported
    mixed_precision: Precision | None = None  # as the launcher says if left out, else no
    num_threads: int | None = None  # CPU threads of a process; all cores, shared by the machine's processes, if left out
    seed: int = 0  # with the position of a sample, decides all of its chance


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run is kept and what it tells."""

    output_dir: str | None = None  # the run directory; typing the same command again resumes it
    checkpoint_every: int = 1000  # steps between checkpoints; 0 saves at the end only
    keep_checkpoints: int = 2  # how many checkpoints are kept
    sample_every: int = 1000  # steps between sample grids; 0 is off
    log_every: int = 10  # steps between lines of metrics.jsonl; 0 is off
    report_to: Literal["none", "tensorboard", "wandb"] = "none"  # tracker, through accelerate
    accept_changed_data: bool = False  # resume although the data set is not the one the run began with
    dry_run: bool = False  # show what would be trained, then stop


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a diffusion model with the debiased loss (arXiv 2310.08442)."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    run: RunConfig = field(default_factory=RunConfig)


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Draw images with a trained model."""

    model: str  # a run directory, a pipeline folder, or a Hub id
    scheduler: SchedulerName = "unipc"  # the solver
    steps: int = 20  # calls of the network per image
    spacing: Spacing = "linspace"  # how the steps are spread over the noise levels
    num_images: int = 64  # how many images
    batch_size: int = 64  # images drawn together
    seed: int = 0  # image k is drawn from seed + k
    class_labels: tuple[int, ...] = ()  # labels, repeated over the images; all classes in turn if left out
    guidance_scale: float = 1.0  # strength of classifier-free guidance; 1 is off
    weights: str = "ema"  # ema (as exported), raw, or an EMA rate of the run such as 0.999
    output_dir: str | None = None  # MODEL/samples/SCHEDULER-STEPS for a run if left out


# A resumed run may change these; everything else must be as it was.
CHANGEABLE = {
    "output_dir", "dry_run", "accept_changed_data", "max_steps", "max_hours", "checkpoint_every", "sample_every", "log_every",
    "keep_checkpoints", "num_workers", "num_threads", "micro_batch_size", "report_to",
}  # fmt: skip

# Not written to config.json: a run directory can be moved, so it does not say where it lies.
NOT_STORED = {"output_dir"}

Config = TypeVar("Config", TrainConfig, SampleConfig)


def flatten(config: TrainConfig) -> dict[str, Any]:
    """All fields of all sections under their own names."""
    return {name: value for section in dataclasses.asdict(config).values() for name, value in section.items()}


def update(config: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """The configuration with some fields changed, given by their flat names."""
    sections = {}
    for section in dataclasses.fields(config):
        part = getattr(config, section.name)
        mine = {f.name: values[f.name] for f in dataclasses.fields(part) if f.name in values}
        sections[section.name] = dataclasses.replace(part, **mine)
    return TrainConfig(**sections)


def stored(config: TrainConfig) -> dict[str, Any]:
    """The flat fields as they stand in a run's config.json."""
    return {name: value for name, value in flatten(config).items() if name not in NOT_STORED}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each field that a resumed run may not change but does. Both are flat and read from JSON."""
    names = sorted((before.keys() | now.keys()) - CHANGEABLE)
    absent = "(not there)"
    return [
        f"{name}: the run has {before.get(name, absent)}, this command says {now.get(name, absent)}"
        for name in names
        if before.get(name, absent) != now.get(name, absent)
    ]


# ---- reading files ---------------------------------------------------------------------------------------------------


def packaged_configs() -> list[str]:
    """Names that `--config` takes."""
    return sorted(Path(p.name).stem for p in resources.files(__package__).joinpath("configs").iterdir() if p.name.endswith(".yaml"))


def read_config(name_or_file: str) -> dict[str, Any]:
    """Flat values of a packaged configuration (by name) or of a YAML or JSON file.

    Raises:
        InputError: no such name or file, not readable, or not a flat list of names and values.
    """
    try:
        if Path(name_or_file).suffix in {".yaml", ".yml", ".json"}:
            text = Path(name_or_file).read_text(encoding="utf-8")
        elif name_or_file in packaged_configs():
            text = resources.files(__package__).joinpath("configs", f"{name_or_file}.yaml").read_text(encoding="utf-8")
        else:
            raise InputError(
                f"config {name_or_file!r} is neither a file ending in .yaml or .json nor one of: {', '.join(packaged_configs())}"
            )
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"config {name_or_file!r} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise InputError(f"config {name_or_file!r} is not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"config {name_or_file!r} holds a {type(values).__name__}; write one 'name: value' a line")
    return checked_values(values, f"config {name_or_file!r}")


def checked_values(values: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """Values with the types of their fields.

    Raises:
        InputError: names all unknown fields and all values of a wrong type at once.
    """
    hints = {name: hint for section in get_type_hints(TrainConfig).values() for name, hint in get_type_hints(section).items()}
    result, problems = {}, []
    for name, value in values.items():
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, n=1)
            problems.append(f"{name!r} is not a field" + (f"; did you mean {near[0]}?" if near else ""))
            continue
        try:
            result[name] = _convert(value, hints[name])
        except (TypeError, ValueError):
            problems.append(f"{name} is {value!r}, but must be {_describe(hints[name])}")
    raise_all(problems, where)
    return result


def _convert(value: Any, hint: Any) -> Any:
    """`value` as the type `hint`, without guessing: raises TypeError or ValueError where it does not fit."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return None if value is None else _convert(value, next(a for a in args if a is not type(None)))
    if origin is Literal:
        if value is False and "no" in args:  # YAML reads a bare `no` as false
            value = "no"
        if value not in args:
            raise ValueError
        return value
    if origin is tuple:
        return tuple(_convert(v, args[0]) for v in (value if isinstance(value, (list, tuple)) else [value]))
    if hint is float and not isinstance(value, bool):
        return float(value)  # also of a string: YAML 1.1 reads 1e-4 as one
    if type(value) is not hint:
        raise TypeError
    return value


def _describe(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if a is type(None) else _describe(a) for a in args)
    if origin is Literal:
        return "one of " + ", ".join(args)
    if origin is tuple:
        return f"a list, each {_describe(args[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[hint]


def layered(*layers: Mapping[str, Any]) -> TrainConfig:
    """The field defaults, changed by each layer in turn. A `model_config` replaces the network's numbers of lower layers."""
    defaults = flatten(TrainConfig())
    values: dict[str, Any] = {}
    for layer in layers:
        if layer.get("model_config"):
            values |= {name: defaults[name] for name in MODEL_NUMBERS}
        values |= layer
    return update(TrainConfig(), values)


# ---- rules -----------------------------------------------------------------------------------------------------------

MODEL_NUMBERS = tuple(f.name for f in dataclasses.fields(ModelConfig) if f.name != "model_config")


def _at_least(least: float) -> Callable[[Any], bool]:
    return lambda value: math.isfinite(value) and value >= least


def _above(bound: float) -> Callable[[Any], bool]:
    return lambda value: math.isfinite(value) and value > bound


def _share(value: float) -> bool:
    return 0 <= value < 1


# field: (what must hold, how to say it with a value that works)
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "resolution": (_at_least(1), "at least 1, such as 64"),
    "channels": (lambda v: v in (1, 3), "1 (grey) or 3 (colour)"),
    "label_dropout": (_share, "at least 0 and below 1, such as 0.1"),
    "num_workers": (_at_least(0), "0 or more, such as 2"),
    "model_channels": (_at_least(1), "at least 1, such as 128"),
    "layers_per_block": (_at_least(1), "at least 1, such as 2"),
    "attention_head_dim": (_at_least(1), "at least 1, such as 64"),
    "dropout": (_share, "at least 0 and below 1, such as 0.1"),
    "snr_gamma": (_above(0), "above 0, such as 5"),
    "p2_k": (_above(0), "above 0, such as 1"),
    "p2_gamma": (_at_least(0), "0 or more, such as 1"),
    "snr_floor": (_at_least(0), "0 or more, such as 1e-3"),
    "num_train_timesteps": (_at_least(2), "at least 2, such as 1000"),
    "schedule_shift": (_above(0), "above 0, such as 1"),
    "batch_size": (_at_least(1), "at least 1, such as 64"),
    "micro_batch_size": (_at_least(1), "at least 1, such as 8"),
    "max_steps": (_at_least(1), "at least 1, such as 100000"),
    "max_hours": (_at_least(0), "0 (off) or more, such as 12"),
    "learning_rate": (_above(0), "above 0, such as 1e-4"),
    "warmup_steps": (_at_least(0), "0 or more, such as 1000"),
    "weight_decay": (_at_least(0), "0 or more, such as 0.01"),
    "max_grad_norm": (_at_least(0), "0 (off) or more, such as 1"),
    "num_threads": (_at_least(1), "at least 1, such as 2"),
    "seed": (_at_least(0), "0 or more, such as 0"),
    "checkpoint_every": (_at_least(0), "0 (at the end only) or more, such as 1000"),
    "keep_checkpoints": (_at_least(1), "at least 1, such as 2"),
    "sample_every": (_at_least(0), "0 (off) or more, such as 1000"),
    "log_every": (_at_least(0), "0 (off) or more, such as 10"),
    "steps": (_at_least(1), "at least 1, such as 20"),
    "num_images": (_at_least(1), "at least 1, such as 64"),
    "guidance_scale": (_at_least(0), "0 or more, such as 1 (off) or 3"),
}


def range_problems(values: Mapping[str, Any]) -> list[str]:
    """What is out of range, a sentence each."""
    return [
        f"{name} is {values[name]}, but must be {rule}"
        for name, (holds, rule) in RANGES.items()
        if values.get(name) is not None and not holds(values[name])
    ]


def train_problems(config: TrainConfig, num_processes: int = 1) -> list[str]:
    """Everything that is wrong with a configuration, a sentence each, naming field, value and a value that works."""
    found = range_problems(flatten(config))
    found += _data_problems(config)
    found += _model_problems(config)
    found += _objective_problems(config.objective)
    found += _optimization_problems(config.optimization, num_processes)
    if config.run.output_dir is None:
        found.append("output_dir is missing: name the run directory, such as --output_dir runs/first")
    return found


def _data_problems(config: TrainConfig) -> list[str]:
    data, found = config.data, []
    if data.dataset is None:
        found.append("dataset is missing: name digits, a folder of images, a .parquet file or a Hub id")
    if data.resolution is None:
        found.append("resolution is missing: name the pixels a side, such as --resolution 64")
    if not data.class_conditional:
        found += [
            f"{name} is {getattr(data, name)}, but class_conditional is off; add --class_conditional or leave {name} out"
            for name in ("label_column", "label_dropout")
            if getattr(data, name) != getattr(DataConfig(), name)
        ]
    return found


def _model_problems(config: TrainConfig) -> list[str]:
    model, resolution = config.model, config.data.resolution
    if model.model_config:
        given = [name for name in MODEL_NUMBERS if getattr(model, name) != getattr(ModelConfig(), name)]
        numbers = ", ".join(f"{name} is {getattr(model, name)}" for name in given)
        return [f"{numbers}, but model_config {model.model_config} already describes the network; give one of the two"] if given else []
    if resolution is None or resolution < 1:
        return []  # said elsewhere; the rules below need it
    if not model.channel_mult:
        known = ", ".join(map(str, sorted(CHANNEL_MULT)))
        return [f"channel_mult is missing: resolution {resolution} has no usual value (only {known} have); give one, such as 1 2 2"]
    if min(model.channel_mult) < 1:
        return [f"channel_mult is {list(model.channel_mult)}, but each must be at least 1, such as 1 2 2"]
    return _level_problems(model, resolution)


def _level_problems(model: ModelConfig, resolution: int) -> list[str]:
    found, levels = [], len(model.channel_mult)
    if resolution % 2 ** (levels - 1):
        fits = 2 ** (levels - 1) * max(1, round(resolution / 2 ** (levels - 1)))
        found.append(f"resolution is {resolution}, but channel_mult has {levels} levels, which halve it {levels - 1} times; take {fits}")
    sides = [resolution // 2**level for level in range(levels)]
    found += [
        f"attention_resolutions names {side}, but the levels of resolution {resolution} with channel_mult "
        f"{list(model.channel_mult)} are {sides}; name some of them"
        for side in model.attention_resolutions
        if side not in sides
    ]
    attending = {model.channel_mult[sides.index(side)] for side in model.attention_resolutions if side in sides}
    attending.add(model.channel_mult[-1])  # the middle block always attends
    if model.attention_head_dim >= 1:
        found += [
            f"attention_head_dim is {model.attention_head_dim}, but must divide the {width} channels of a level that attends; "
            f"{math.gcd(width, model.attention_head_dim)} does"
            for width in sorted(mult * model.model_channels for mult in attending)
            if width > 0 and width % model.attention_head_dim
        ]
    return found


def _objective_problems(objective: ObjectiveConfig) -> list[str]:
    found = []
    for weighting, names in WEIGHTING_PARAMETERS.items():
        found += [
            f"{name} is {getattr(objective, name)}, but weighting is {objective.weighting}, which does not have it; "
            f"take --weighting {weighting} or leave {name} out"
            for name in names
            if objective.weighting != weighting and getattr(objective, name) != getattr(ObjectiveConfig(), name)
        ]
    beta_end = {"linear": 0.02, "scaled_linear": 0.012}.get(objective.noise_schedule, 0.0)
    if objective.num_train_timesteps >= 2 and beta_end * 1000 / objective.num_train_timesteps >= 1:
        found.append(
            f"num_train_timesteps is {objective.num_train_timesteps}, but the betas of noise_schedule {objective.noise_schedule} "
            f"scale by 1000/T and must stay below 1; take at least {int(beta_end * 1000) + 1}, or --noise_schedule cosine"
        )
    # The last SNR of the cosine schedule is 2.4e-9: the debiased weights then have an effective sample size of 0.0015.
    unbounded = objective.weighting in ("debiased", "inverse_snr") and objective.noise_schedule == "cosine"
    if unbounded and objective.prediction_type == "epsilon" and objective.snr_floor == 0:
        found.append(
            f"weighting {objective.weighting} with noise_schedule cosine and prediction_type epsilon lets a few noise levels carry "
            f"nearly the whole loss; add --snr_floor 1e-3, or take --prediction_type v_prediction"
        )
    return found


def _optimization_problems(optimization: OptimizationConfig, num_processes: int) -> list[str]:
    found = []
    if optimization.batch_size % num_processes:
        fits = num_processes * max(1, round(optimization.batch_size / num_processes))
        found.append(f"batch_size is {optimization.batch_size}, but must be a multiple of the {num_processes} processes; take {fits}")
    rates = optimization.ema_decay
    if not rates or not all(0 <= rate < 1 for rate in rates) or len(set(rates)) < len(rates):
        found.append(f"ema_decay is {list(rates)}, but must be one or more different rates, each at least 0 and below 1, such as 0.9999")
    if optimization.warmup_steps > optimization.max_steps:
        found.append(
            f"warmup_steps is {optimization.warmup_steps}, but max_steps is only {optimization.max_steps}; "
            f"take --warmup_steps {optimization.max_steps // 10}"
        )
    return found


def sample_problems(config: SampleConfig) -> list[str]:
    """Everything that is wrong with a sampling command, before the model is looked at."""
    found = range_problems(dataclasses.asdict(config))
    if config.batch_size < 1:
        found.append(f"batch_size is {config.batch_size}, but must be at least 1, such as 64")
    if not 0 <= config.seed < 2**32:
        found.append(f"seed is {config.seed}, but must be at least 0 and below 2^32, such as 0")
    if config.weights not in ("ema", "raw") and not _is_rate(config.weights):
        found.append(f"weights is {config.weights!r}, but must be ema, raw, or an EMA rate such as 0.999")
    return found


def _is_rate(text: str) -> bool:
    try:
        return 0 <= float(text) < 1
    except ValueError:
        return False


def raise_all(problems: Iterable[str], where: str = "configuration") -> None:
    """Raises one InputError that lists all problems; does nothing where there are none."""
    problems = list(problems)
    if len(problems) == 1:
        raise InputError(f"{where}: {problems[0]}")
    if problems:
        raise InputError(f"{where}: {len(problems)} problems\n" + "\n".join(f"  - {problem}" for problem in problems))


def resolved(config: TrainConfig, launcher_precision: str | None) -> TrainConfig:
    """The configuration with what was left out filled in: channel multipliers, precision.

    Raises:
        InputError: the launcher was configured with a precision that is not supported.
    """
    values: dict[str, Any] = {}
    if not config.model.channel_mult and not config.model.model_config and config.data.resolution in CHANNEL_MULT:
        values["channel_mult"] = CHANNEL_MULT[config.data.resolution]
    if config.optimization.mixed_precision is None:
        values["mixed_precision"] = checked_values({"mixed_precision": launcher_precision or "no"}, "launcher")["mixed_precision"]
    return update(config, values)


def to_json(config: TrainConfig) -> str:
    """The text of a run's config.json; `--config` reads it back."""
    return json.dumps(stored(config), indent=2) + "\n"
