"""What a configuration must satisfy: ranges of single fields and rules between fields.

All problems are found before anything is reported, in sentences that name the field, its value, and a value that works.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from .config import (
    CHANNEL_MULT,
    MODEL_NUMBERS,
    WEIGHTING_PARAMETERS,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizationConfig,
    SampleConfig,
    TrainConfig,
    flatten,
)


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
    if not data.dataset:
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
    # Of these weightings the value at the floor is the value at any SNR below it.
    flat = objective.weighting == "constant" or (objective.weighting == "min_snr" and objective.snr_floor <= objective.snr_gamma)
    if objective.snr_floor > 0 and flat:
        found.append(
            f"snr_floor is {objective.snr_floor}, but changes nothing in weighting {objective.weighting}; leave it out or take "
            f"--weighting debiased"
        )
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
    if config.seed >= 2**32:
        found.append(f"seed is {config.seed}, but must be at least 0 and below 2^32, such as 0")
    if config.weights not in ("ema", "raw") and not _is_rate(config.weights):
        found.append(f"weights is {config.weights!r}, but must be ema, raw, or an EMA rate such as 0.999")
    return found


def _is_rate(text: str) -> bool:
    try:
        return 0 <= float(text) < 1
    except ValueError:
        return False
