"""Configurations in and out: YAML and JSON, presets, layers of values, and what a resumed run may change."""

from __future__ import annotations

import dataclasses
import json
import reprlib
import types
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from ..errors import InputError, raise_all, reason
from .aliases import suggestion, written_suggestion
from .hub_names import PINNED, at_home, was_pinned
from .ranges import field_types, range_problems
from .registry import TIMESTEP_BIASES, TIMESTEP_SAMPLERS, WEIGHTINGS, parameters_of
from .schema.data import TextConfig
from .schema.hub import HubConfig
from .schema.network import SIZE_FIELDS, LoraConfig, ModelConfig, channel_mult, network_of_size
from .schema.objective import NoiseConfig, ObjectiveConfig, noise_schedule
from .schema.training import TrainConfig

CONFIG = "config.json"  # of a run directory
CHANGES = "changes"  # there, beside the fields: what --allow_change changed, and at which step


# What a command asks for, or permits, only once.
OF_ONE_COMMAND = {"dry_run", "verbose", "allow_change", "accept_changed_data"}

# Not written to config.json: a run directory can be moved, so it does not say where it lies; and who trains with the same
# configuration must not publish over it.
# The numbers of a network stand there, not the size that stood for them, and max_steps, not num_epochs.
NOT_STORED = {"output_dir", "size", "num_epochs", *OF_ONE_COMMAND, *(f.name for f in dataclasses.fields(HubConfig))}

# A resumed run may change these, with any command.
CHANGEABLE = {
    *NOT_STORED, "max_steps", "max_hours", "checkpoint_every", "sample_every", "log_every", "validation_every",
    "keep_checkpoints", "num_workers", "num_threads", "micro_batch_size", "report_to", "eval_every", "eval_metrics", "eval_images",
    "feature_extractor", "feature_extractor_weights", "cache_dir", "keep_best", "skip_bad", "allow_pickle_import",
    "check_images", "shard_cache_gb",
    "cache_images_mb", "gradient_checkpointing", "compile", "compile_mode", "ddp_timeout", "sample_prompts", "sample_guidance_scale",
    "clip_model", "precompute_dir", "ema_on_cpu", "sharded_checkpoints", "deterministic",
}  # fmt: skip

# These only on purpose, with --allow_change, because the result is another one.
ON_PURPOSE = {
    "dataset", "label_dropout", "random_flip", "shuffle_window", "jpeg_draft", "folder_repeats", "dropout",
    "caption_dropout", "shuffle_caption", "keep_tokens", "crop", "crop_per_image",
    "weighting", *parameters_of(WEIGHTINGS), "snr_floor", "snr_ceiling", "terminal_weight_floor", "normalize_weights",
    "schedule_free_weights",
    "timestep_sampler", *parameters_of(TIMESTEP_SAMPLERS), "timestep_sampler_after", "timestep_sampler_switch",
    "timestep_bias_strategy", *parameters_of(TIMESTEP_BIASES), "variance_type",
    *(f.name for f in dataclasses.fields(NoiseConfig)),
    "batch_size", "learning_rate", "lr_schedule", "warmup_steps", "weight_decay", "max_grad_norm", "ema_decay", "ema_warmup",
    "mixed_precision", "param_dtype",
}  # fmt: skip

# What the network has learned that its input and output mean.
PARAMETERIZATION = ("prediction_type", "noise_schedule", "num_train_timesteps", "schedule_shift", "rescale_betas_zero_snr")

# These never, and why.
_NETWORK, _MEANING = "it changes the network", "the network has learned by it what its input and output mean"
_BASE, _CAPTIONS = "the network has learned the latents and embeddings of it", "the network has learned by it what captions mean"
_DATA = "it says what the images and labels of the data set are"
NEVER = {
    **{f.name: _NETWORK for f in dataclasses.fields(ModelConfig) if f.name not in ON_PURPOSE | NOT_STORED},
    **{f.name: _NETWORK for f in dataclasses.fields(LoraConfig)},
    **dict.fromkeys(("resolution", "channels", "class_conditional", "learn_sigma"), _NETWORK),
    **dict.fromkeys(PARAMETERIZATION, _MEANING),
    **dict.fromkeys(("split", "image_column", "label_column"), _DATA),
    **dict.fromkeys(("task", "base_model", "vae"), _BASE),
    **dict.fromkeys(("null_caption", "caption_chunks"), _CAPTIONS),
    "caption_column": "it says what the captions of the data set are",
    "aspect_ratio_buckets": "it decides which images a step has, and their sizes",
    "validation_split": "images that are held out must never have been trained",
    "init": "a run starts from it once",
    "learned_uncertainty": "what it has learned is in every checkpoint, or in none",
    "post_hoc_ema": "its averages begin with the first step",
    "optimizer": "the state in the checkpoints is that of one optimizer",
    "seed": "the order of the images, their noise and their timesteps follow from it",
}

# Values of runs that began before the field was there, where the default is another. They keep them, whatever a command says.
BEFORE_THE_FIELD = {"ema_warmup": False}

# Fields of one task, which are no fields of the other.
TEXT_FIELDS = {"task", *(f.name for part in (TextConfig, LoraConfig) for f in dataclasses.fields(part))}
PIXEL_FIELDS = {
    *(f.name for f in dataclasses.fields(ModelConfig)), "channels", "class_conditional", "label_column", "label_dropout", "init",
    "allow_pickle_import", "cache_images_mb", "learn_sigma", "variance_type",
}  # fmt: skip

# What `model_config` replaces.
MODEL_NUMBERS = tuple(f.name for f in dataclasses.fields(ModelConfig) if f.name != "model_config")

# Fields that stand for others, which must be left out beside them.
REPLACING = {
    "model_config": MODEL_NUMBERS,
    "size": (*SIZE_FIELDS, "model_config"),
    "num_epochs": ("max_steps",),
    "max_steps": ("num_epochs",),
}


def flatten(config: TrainConfig) -> dict[str, Any]:
    """All fields of all sections under their own names."""
    return {name: value for section in vars(config).values() for name, value in vars(section).items()}


def update(config: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """The configuration with some fields changed, given by their flat names."""
    sections = {}
    for section in dataclasses.fields(config):
        part = getattr(config, section.name)
        mine = {f.name: values[f.name] for f in dataclasses.fields(part) if f.name in values}
        sections[section.name] = dataclasses.replace(part, **mine)
    return TrainConfig(**sections)


def is_text(config: TrainConfig) -> bool:
    """Whether a text-to-image model is trained."""
    return config.data.task == "text_to_image" or config.text.base_model is not None


def stored(config: TrainConfig) -> dict[str, Any]:
    """The flat fields as they stand in a run's config.json, without those of another task: lists in place of tuples."""
    left_out = NOT_STORED | fields_of_other_tasks(config)
    return as_json({name: value for name, value in flatten(config).items() if name not in left_out})


def fields_of_other_tasks(config: TrainConfig) -> set[str]:
    """The fields that have no meaning in the task of a configuration. A LoRA can start from another one."""
    if not is_text(config):
        return TEXT_FIELDS
    return PIXEL_FIELDS - {"init"} if config.lora.lora_rank and config.optimization.init else PIXEL_FIELDS


def as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON gives them back: lists in place of tuples."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


_ABSENT = "(not there)"


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names whose value differs, but for those that a resumed run may change with any command. Both as read from JSON."""
    return [
        name
        for name in sorted((before.keys() | now.keys()) - CHANGEABLE)
        if before.get(name, _ABSENT) != now.get(name, _ABSENT) and not (name in PINNED and was_pinned(before.get(name), now.get(name)))
    ]


def difference(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How a value of a run differs from that of a command, in a line."""
    return f"{name}: the run has {before.get(name, _ABSENT)}, this command says {now.get(name, _ABSENT)}"


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One `difference` for each of the names that are `differing`."""
    return [difference(name, before, now) for name in differing(before, now)]


def packaged_configs() -> list[str]:
    """Names that `--config` takes."""
    return sorted(Path(p.name).stem for p in resources.files(__package__).joinpath("presets").iterdir() if p.name.endswith(".yaml"))


def preset_changes() -> dict[str, str]:
    """By the names of packaged configurations with the same values: what they change of the field defaults, as text."""
    defaults = flatten(TrainConfig())
    found: dict[str, list[str]] = {}
    for name in packaged_configs():
        changed = {key: value for key, value in read_config(name).items() if value != defaults[key] and key != "output_dir"}
        text = ", ".join(f"{key} {' '.join(map(str, value)) if isinstance(value, tuple) else value}" for key, value in changed.items())
        found.setdefault(text, []).append(name)
    return {", ".join(names): text for text, names in found.items()}


def read_config(name_or_file: str) -> dict[str, Any]:
    """Flat values of a packaged configuration (by name) or of a YAML or JSON file.

    Raises:
        InputError: no such name or file, not readable, or not a flat list of names and values.
    """
    try:
        if Path(name_or_file).suffix in {".yaml", ".yml", ".json"}:
            text = Path(name_or_file).read_text(encoding="utf-8")
        elif name_or_file in packaged_configs():
            text = resources.files(__package__).joinpath("presets", f"{name_or_file}.yaml").read_text(encoding="utf-8")
        else:
            absent = "" if Path(name_or_file).exists() else "does not exist: it "
            raise InputError(
                f"config {name_or_file!r} {absent}is neither a file ending in .yaml or .json nor one of: {', '.join(packaged_configs())}"
            )
        values = json.loads(text) if name_or_file.endswith(".json") else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"config {name_or_file!r} cannot be read: {reason(error)}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: of JSON, and of YAML's dates that do not exist
        raise InputError(f"config {name_or_file!r} is not valid YAML or JSON: {reason(error)}") from error
    except RecursionError:
        raise InputError(f"config {name_or_file!r} is nested too deeply; write one 'name: value' a line") from None
    if values is None:
        return {}
    if isinstance(values, dict) and Path(name_or_file).name == CONFIG:
        values.pop(CHANGES, None)
    if not isinstance(values, dict):
        raise InputError(f"config {name_or_file!r} holds a {type(values).__name__}; write one 'name: value' a line")
    return checked_values(values, f"config {name_or_file!r}")


# YAML can name one list many times, and lists of such lists: written out in full, a small file would fill the memory.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring = 2, 80


def checked_values(values: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """Values with the types of their fields.

    Raises:
        InputError: names all unknown fields and all values of a wrong type at once.
    """
    hints = field_types(TrainConfig)
    result, problems = {}, []
    for name, value in values.items():
        if name not in hints:
            meant = suggestion(str(name)[:80], TrainConfig).replace("--", "")
            problems.append(f"{_SHORT.repr(name)} is not a field" + (f"; {meant}" if meant else ""))
            continue
        try:
            result[name] = _convert(value, hints[name])
        except (TypeError, ValueError, OverflowError):
            meant = written_suggestion(name, value, hints[name])
            problems.append(f"{name} is {_SHORT.repr(value)}, but must be {_describe(hints[name])}{meant}")
    raise_all(problems, where)
    return result


def checked_objective(objective: ObjectiveConfig) -> ObjectiveConfig:
    """An objective made in Python, where nothing has looked at its values, with the types of its fields.

    Raises:
        InputError: it is something else; or names all values of a wrong type or out of range at once.
    """
    if not isinstance(objective, ObjectiveConfig):
        raise InputError(f"an objective is made of an ObjectiveConfig, and not of {type(objective).__name__}; write ObjectiveConfig(...)")
    values = checked_values(vars(objective), "objective")
    raise_all(range_problems(ObjectiveConfig, values), "objective")
    return ObjectiveConfig(**values)


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
        return tuple(
            _convert(v, args[0]) for v in (value if isinstance(value, (list, tuple)) or getattr(value, "ndim", False) else [value])
        )
    if hint is str and isinstance(value, (str, Path)):
        return at_home(str(value))
    if hint is float and not isinstance(value, bool):
        return float(value)  # also of a string: YAML 1.1 reads 1e-4 as one
    if hint in (int, bool) and hasattr(value, "dtype"):  # a number of numpy or torch, as notebooks have them
        value = value.item()
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
    """The field defaults, changed by each layer in turn. What is `REPLACING` replaces values of lower layers."""
    defaults = flatten(TrainConfig())
    values: dict[str, Any] = {}
    for layer in layers:
        for name, replaced in REPLACING.items():
            if layer.get(name):
                values |= {number: defaults[number] for number in replaced}
        values |= layer
    if values.get("report_to") == ("none",):  # as runs have it that are older than several trackers
        values["report_to"] = ()
    return update(TrainConfig(), values)


def resolved(config: TrainConfig, launcher_precision: str | None) -> TrainConfig:
    """The configuration with what was left out filled in (network of a size, noise schedule, precision), and one spelling of aliases.

    Raises:
        InputError: a network size beside its numbers, or the launcher was configured with a precision that is not supported.
    """
    values: dict[str, Any] = {"task": config.data.task or ("text_to_image" if is_text(config) else "pixels")}
    if config.data.resolution and not is_text(config) and (config.model.size or not config.model.model_config):
        values |= _network(config.model, config.data.resolution)
    values["noise_schedule"] = noise_schedule(config.objective)
    values["report_to"] = () if config.run.report_to == ("none",) else config.run.report_to
    rank = config.lora.lora_rank
    if is_text(config) and rank and rank > 0 and config.lora.lora_alpha is None:
        values["lora_alpha"] = float(rank)
    for name, given in (("init", config.optimization.init), ("base_model", config.text.base_model), ("vae", config.text.vae)):
        if given:
            values[name] = given.rstrip("/") or "/"  # of a folder, with which a resume must not differ from without
    if config.run.accept_changed_data and "dataset" not in config.run.allow_change:
        values["allow_change"] = (*config.run.allow_change, "dataset")
    if config.optimization.mixed_precision is None:
        values["mixed_precision"] = checked_values({"mixed_precision": launcher_precision or "no"}, "launcher")["mixed_precision"]
    return update(config, values)


def _network(model: ModelConfig, resolution: int) -> dict[str, Any]:
    """Network numbers that were left out."""
    if model.size is None:
        return {} if model.channel_mult else {"channel_mult": channel_mult(resolution)}
    names = REPLACING["size"]
    if given := [f"{name} {getattr(model, name)}" for name in names if getattr(model, name) != getattr(ModelConfig(), name)]:
        raise InputError(f"size {model.size} decides {', '.join(names)}; leave out {', '.join(given)}, or size")
    return {"size": None, **network_of_size(model.size, resolution)}


def to_json(config: TrainConfig, changes: Sequence[Mapping[str, Any]] = ()) -> str:
    """The text of a run's config.json; `--config` reads it back, without the changes."""
    return json.dumps(stored(config) | ({CHANGES: list(changes)} if changes else {}), indent=2) + "\n"
