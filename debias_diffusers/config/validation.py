"""What a configuration must satisfy: ranges of single fields and rules between fields.

All problems are found before anything is reported, in sentences that name the field, its value, and a value that works.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Container, Mapping
from itertools import pairwise
from pathlib import PurePath
from typing import Any, get_args

from .loading import MODEL_NUMBERS, flatten, update
from .schema import (
    BETA_ENDS,
    CHANNEL_MULT,
    WEIGHTING_PARAMETERS,
    BitsConfig,
    DataConfig,
    MeasureConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizationConfig,
    PredictionType,
    RunConfig,
    SampleConfig,
    SchedulerName,
    ScoreConfig,
    StatsConfig,
    TrainConfig,
    WeightsConfig,
    noise_schedule,
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
    "cache_images_mb": (_at_least(0), "0 (off) or more, such as 1024"),
    "model_channels": (_at_least(1), "at least 1, such as 128"),
    "layers_per_block": (_at_least(1), "at least 1, such as 2"),
    "attention_head_dim": (_at_least(1), "at least 1, such as 64"),
    "dropout": (_share, "at least 0 and below 1, such as 0.1"),
    "snr_gamma": (_above(0), "above 0, such as 5"),
    "p2_k": (_above(0), "above 0, such as 1"),
    "p2_gamma": (_at_least(0), "0 or more, such as 1"),
    "sigma_data": (_above(0), "above 0, such as 0.5"),
    "snr_floor": (_at_least(0), "0 or more, such as 1e-3"),
    "snr_ceiling": (_at_least(0), "0 (off) or more, such as 1000"),
    "terminal_weight_floor": (_at_least(0), "0 (off) or more, such as 0.5"),
    "timestep_mean": (math.isfinite, "a finite number, such as 0"),
    "timestep_std": (_above(0), "above 0, such as 1"),
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
    "eval_every": (_at_least(0), "0 (off) or more, such as 5000"),
    "eval_images": (_at_least(1), "at least 1, such as 1000"),
    "ddp_timeout": (lambda value: 1 <= value <= 10**8, "at least 1 (and at most 3 years), such as 1800"),
    "hub_every": (_at_least(0), "0 (at the end only) or more, such as 10000"),
    "log_every": (_at_least(0), "0 (off) or more, such as 10"),
    "steps": (_at_least(1), "at least 1, such as 20"),
    "num_images": (lambda value: 1 <= value <= 10_000_000, "from 1 to 10 million, such as 64"),
    "guidance_scale": (_at_least(0), "0 or more, such as 1 (off) or 3"),
    "bootstrap": (lambda value: value == 0 or value >= 20, "0 (off) or at least 20, such as 200"),
    "eta": (lambda value: 0 <= value <= 1, "from 0 (off) to 1"),
    "clipping_quantile": (lambda value: 0 < value <= 1, "above 0 and at most 1, such as 0.995"),
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
    found += objective_problems(config.objective)
    found += _optimization_problems(config.optimization, num_processes)
    found += _evaluation_problems(config.run)
    found += _hub_problems(config)
    if config.run.output_dir is None:
        found.append("output_dir is missing: name the run directory, such as --output_dir runs/first")
    return found


# Values of a preset (--config, or the digits' own) that give way to a flag which they do not go with. Not what defines the objective.
YIELDING = (
    "warmup_steps", "label_dropout", "label_column", "attention_resolutions", "attention_head_dim", "channel_mult",
    "snr_gamma", "p2_k", "p2_gamma", "sigma_data", "snr_floor", "snr_ceiling", "terminal_weight_floor", "normalize_weights",
    "timestep_mean", "timestep_std", "noise_schedule", "learn_sigma", "variance_type", "micro_batch_size", "compile_mode",
    "keep_best", "eval_metrics", "eval_images", "feature_extractor", "feature_extractor_weights",
    "hub_model_id", "hub_private", "hub_every", "hub_tags", "hub_license",
)  # fmt: skip


def yielded(
    config: TrainConfig, preset: TrainConfig, typed: Container[str], resolve: Callable[[TrainConfig], TrainConfig]
) -> tuple[TrainConfig, list[str]]:
    """A configuration whose values of the preset go with the flags that were typed, and a sentence for each value that gave way.

    Args:
        config: the preset, changed by flags.
        preset: what it was without them; what is wrong with it alone stays wrong.
        typed: names of the flags.
        resolve: fills in what was left out.
    """
    wrong_alone, before, defaults = set(train_problems(resolve(preset))), flatten(preset), flatten(TrainConfig())
    defaults["warmup_steps"] = config.optimization.max_steps // 10
    said = []
    for name in YIELDING:
        problems = set(train_problems(resolve(config))) - wrong_alone
        if not problems or name in typed or before[name] == defaults[name]:
            continue
        other = update(config, {name: defaults[name]})
        if (left := set(train_problems(resolve(other))) - wrong_alone) < problems:
            config = other
            said.append(f"{name} is {defaults[name]}, and not as configured: {min(problems - left)}")
    return config, said


def _evaluation_problems(run: RunConfig) -> list[str]:
    """Measuring while training: what would be ignored, or cannot be kept."""
    if not run.eval_every:
        names = ("eval_metrics", "eval_images", "feature_extractor", "feature_extractor_weights", "cache_dir", "keep_best")
        older = {"eval_images": 1000}  # its default in the config.json of older runs
        given = [name for name in names if getattr(run, name) not in (getattr(RunConfig(), name), older.get(name))]
        return [f"{name} is {getattr(run, name)}, but eval_every is 0; add --eval_every 5000 or leave {name} out" for name in given]
    found = metrics_problems("eval_metrics", run.eval_metrics)
    if run.keep_best and (not run.checkpoint_every or run.eval_every % run.checkpoint_every):
        found.append(
            f"keep_best is on, but eval_every {run.eval_every} is no multiple of checkpoint_every {run.checkpoint_every}, so that what is "
            f"measured is not kept; take --eval_every {max(1, run.checkpoint_every)}"
        )
    return found


def _hub_problems(config: TrainConfig) -> list[str]:
    """Pushing: nowhere, when nothing is saved, or what would be ignored. Whether the name will do, the Hub is asked."""
    hub, every = config.hub, config.run.checkpoint_every
    if not hub.push_to_hub:
        given = {f.name: getattr(hub, f.name) for f in dataclasses.fields(hub) if getattr(hub, f.name) != f.default}
        return [f"{name} is {value}, but push_to_hub is off; add --push_to_hub or leave {name} out" for name, value in given.items()]
    found = []
    if not hub.hub_model_id:
        found.append("push_to_hub is on, but hub_model_id is missing; name a repository, such as --hub_model_id user/digits")
    if hub.hub_every and (not every or hub.hub_every % every):
        found.append(
            f"hub_every is {hub.hub_every}, but checkpoint_every is {every}, and only checkpoints are pushed; "
            f"take --hub_every {every or 0}, or leave it out"
        )
    if hub.hub_license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", hub.hub_license):
        found.append(f"hub_license is {hub.hub_license!r}, but must be an identifier of the Hub, such as apache-2.0 or other")
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


# The spaces that the repeated code knows; our own weightings have a meaning in all.
SPACES_OF_OTHERS: dict[str, tuple[PredictionType, ...]] = {
    "debiased_as_is": ("epsilon", "sample", "v_prediction"),
    "debiased_diffengine": ("epsilon", "v_prediction"),
    "debiased_kohya": ("epsilon", "v_prediction"),
}

# Weights of the noise error that grow without bound as the SNR falls to 0.
UNBOUNDED = {"debiased", "inverse_snr", "truncated_snr", "edm", *SPACES_OF_OTHERS}
LEAST_FLOOR = 1e-4  # of the SNR, to be a bound worth its name: the debiased weights of the cosine schedule are then up to 100


def objective_problems(objective: ObjectiveConfig) -> list[str]:
    """Everything that is wrong with an objective: combinations without a meaning, and values that would be ignored."""
    if unknown := _unknown_weighting(objective.weighting):
        found = [unknown]
    else:
        found = [*_unused(objective).values(), *_weighting_problems(objective)]
    return found + bound_problems(dataclasses.asdict(objective)) + _schedule_problems(objective) + _variance_problems(objective)


def bound_problems(values: Mapping[str, Any]) -> list[str]:
    """A floor of the SNR above its ceiling."""
    floor, ceiling = values.get("snr_floor", 0.0), values.get("snr_ceiling", 0.0)
    if 0 < ceiling < floor:
        return [f"snr_ceiling is {ceiling}, but snr_floor is {floor}; take a ceiling above the floor"]
    return []


def _unknown_weighting(name: str) -> str | None:
    if name in WEIGHTING_PARAMETERS:
        return None
    near = difflib.get_close_matches(name, WEIGHTING_PARAMETERS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"take one of: {', '.join(WEIGHTING_PARAMETERS)}"
    return f"weighting is {name}, which is not known; {hint}"


def _unused(objective: ObjectiveConfig) -> dict[str, str]:
    """Fields that the rest of the objective leaves no use for, and a sentence for each."""
    weighting, sampler = objective.weighting, objective.timestep_sampler
    mine = WEIGHTING_PARAMETERS[weighting]
    found = {}
    for name in dict.fromkeys(name for names in WEIGHTING_PARAMETERS.values() for name in names):
        if name not in mine:
            owners = " or ".join(other for other, names in WEIGHTING_PARAMETERS.items() if name in names)
            found[name] = f"weighting is {weighting}, which does not have it; take --weighting {owners} or leave {name} out"
    # Of these weightings the value at the bound is the value at any SNR beyond it.
    flat = weighting in ("constant", "variational")
    without_use = {
        "snr_floor": flat or (weighting == "min_snr" and objective.snr_floor <= objective.snr_gamma),
        "snr_ceiling": flat or (weighting == "truncated_snr" and objective.snr_ceiling >= 1),
        "normalize_weights": weighting == "variational",
        "terminal_weight_floor": weighting == "variational",
    }
    for name, useless in without_use.items():
        if useless:
            found[name] = f"changes nothing in weighting {weighting}; leave it out or take --weighting debiased"
    if not sampler.startswith(("log_normal", "logit_normal")):
        for name in ("timestep_mean", "timestep_std"):
            found[name] = f"timestep_sampler is {sampler}; take --timestep_sampler logit_normal or leave it out"
    if sampler == "log_normal":
        found["terminal_weight_floor"] = (
            "timestep_sampler log_normal never draws the last level; take --timestep_sampler log_normal_corrected or leave it out"
        )
    return {name: f"{name} is {getattr(objective, name)}, but {reason}" for name, reason in found.items() if _changed(objective, name)}


def _changed(objective: ObjectiveConfig, name: str) -> bool:
    changed: bool = getattr(objective, name) != getattr(ObjectiveConfig(), name)
    return changed


def _weighting_problems(objective: ObjectiveConfig) -> list[str]:
    """Weights without bound, or without a meaning in the space of the prediction."""
    weighting, space, found = objective.weighting, objective.prediction_type, []
    if space not in SPACES_OF_OTHERS.get(weighting, (space,)):
        found.append(
            f"weighting {weighting} repeats code that knows {', '.join(SPACES_OF_OTHERS[weighting])} only, but prediction_type is "
            f"{space}; take --weighting debiased"
        )
    # The paper's code has the noise's weight in all spaces.
    unbounded = weighting in UNBOUNDED and (space == "epsilon" or weighting == "debiased_as_is") and objective.snr_floor < LEAST_FLOOR
    # The last SNR of the cosine schedule is 2.4e-9: the debiased weights then have an effective sample size of 0.0015.
    if unbounded and objective.noise_schedule == "cosine":
        found.append(
            f"weighting {weighting} with noise_schedule cosine and prediction_type {space} lets a few noise levels carry "
            f"nearly the whole loss; add --snr_floor 1e-3, or take --weighting debiased --prediction_type v_prediction"
        )
    elif unbounded and objective.rescale_betas_zero_snr and space != "epsilon":
        found.append(f"weighting {weighting} is infinite where the SNR is 0; add --snr_floor 1e-3, or take --weighting debiased")
    return found


def _schedule_problems(objective: ObjectiveConfig) -> list[str]:
    space, T, found = objective.prediction_type, objective.num_train_timesteps, []
    _, beta_end = BETA_ENDS.get(objective.noise_schedule or "", (0.0, 0.0))
    if T >= 2 and beta_end * 1000 / T >= 1:
        found.append(
            f"num_train_timesteps is {T}, but the betas of noise_schedule {objective.noise_schedule} "
            f"scale by 1000/T and must stay below 1; take at least {int(beta_end * 1000) + 1}, or --noise_schedule cosine"
        )
    if space == "flow" and objective.noise_schedule is not None:
        found.append(
            f"noise_schedule is {objective.noise_schedule}, but prediction_type flow has its own, a = 1 - t and s = t; "
            f"take --noise_schedule None"
        )
    if space == "flow" and objective.rescale_betas_zero_snr:
        found.append("rescale_betas_zero_snr is on, but prediction_type flow ends at zero SNR as it is; leave it out")
    if space == "epsilon" and objective.rescale_betas_zero_snr:
        found.append(
            "rescale_betas_zero_snr is on, but prediction_type is epsilon, and where the SNR is 0 the noise is all there is to see: "
            "nothing of the image can be predicted by it; take --prediction_type v_prediction"
        )
    if objective.terminal_weight_floor > 0 and space != "flow" and not objective.rescale_betas_zero_snr:
        found.append(
            f"terminal_weight_floor is {objective.terminal_weight_floor}, but the last SNR of this schedule is not 0; "
            f"add --rescale_betas_zero_snr --prediction_type v_prediction, or take --prediction_type flow"
        )
    return found


def _variance_problems(objective: ObjectiveConfig) -> list[str]:
    space, found = objective.prediction_type, []
    if objective.weighting == "variational" and not objective.learn_sigma:
        other = " --prediction_type v_prediction" if space == "flow" else ""
        found.append(f"weighting variational is the bound with a learned variance, but learn_sigma is off; add --learn_sigma{other}")
    if space == "flow":
        found += [
            f"{name} is {getattr(objective, name)}, but prediction_type flow is sampled without random steps, which have no variance; "
            f"leave it out or take --prediction_type v_prediction"
            for name in ("learn_sigma", "variance_type")
            if _changed(objective, name)
        ]
    elif objective.learn_sigma and objective.variance_type:
        found.append(f"variance_type is {objective.variance_type}, but learn_sigma makes the network predict it; give one of the two")
    return found


def _optimization_problems(optimization: OptimizationConfig, num_processes: int) -> list[str]:
    found = []
    if optimization.init == "":
        found.append("init is an empty name; name a run directory, a pipeline folder or a Hub id, or leave it out")
    if optimization.allow_pickle_import and not optimization.init:
        found.append("allow_pickle_import is on, but init is left out; name a model with --init, or leave allow_pickle_import out")
    if optimization.batch_size % num_processes:
        fits = num_processes * max(1, round(optimization.batch_size / num_processes))
        found.append(f"batch_size is {optimization.batch_size}, but must be a multiple of the {num_processes} processes; take {fits}")
    if optimization.compile_mode != "default" and not optimization.compile:
        found.append(f"compile_mode is {optimization.compile_mode}, but compile is off; add --compile or leave compile_mode out")
    share, piece = optimization.batch_size // num_processes, optimization.micro_batch_size
    if optimization.compile_mode != "default" and piece and 1 <= piece < share:
        found.append(
            f"micro_batch_size is {piece}, but the CUDA graphs of compile_mode {optimization.compile_mode} would "
            f"write a micro-batch's gradients over those of the one before; leave one of the two out"
        )
    rates = optimization.ema_decay
    if not rates or not all(0 <= rate < 1 for rate in rates) or len(set(rates)) < len(rates):
        found.append(f"ema_decay is {list(rates)}, but must be one or more different rates, each at least 0 and below 1, such as 0.9999")
    if optimization.warmup_steps > optimization.max_steps:
        found.append(
            f"warmup_steps is {optimization.warmup_steps}, but max_steps is only {optimization.max_steps}; "
            f"take --warmup_steps {optimization.max_steps // 10}"
        )
    return found


def weights_problems(config: WeightsConfig) -> list[str]:
    """Everything that is wrong with a command that draws weights. Objectives that nobody should train are no problem here."""
    names, objective = (config.objective.weighting, *config.against), config.objective
    if unknown := [problem for name in names if (problem := _unknown_weighting(name))]:
        return unknown
    found = range_problems(dataclasses.asdict(objective))
    if "variational" in names:
        found.append("weighting variational is no function of the SNR, so it has no weights to draw; leave it out")
    unused = set.intersection(*(set(_unused(dataclasses.replace(objective, weighting=name))) for name in names))
    unused |= {"learn_sigma", "variance_type"}
    if not objective.normalize_weights:
        unused |= {"timestep_sampler", "timestep_mean", "timestep_std"}
    found += [
        f"{name} is {getattr(objective, name)}, but changes no weight of {', '.join(names)}; leave it out"
        for name in sorted(unused)
        if _changed(objective, name)
    ]
    found += bound_problems(dataclasses.asdict(objective))
    # Of the prediction type only the path matters: all spaces are drawn.
    path = objective if objective.prediction_type == "flow" else dataclasses.replace(objective, prediction_type="v_prediction")
    path = dataclasses.replace(path, noise_schedule=noise_schedule(path))
    return found + _schedule_problems(path)


def sample_problems(config: SampleConfig) -> list[str]:
    """Everything that is wrong with a sampling command, before the model is looked at."""
    found = range_problems(dataclasses.asdict(config))
    if config.batch_size < 1:
        found.append(f"batch_size is {config.batch_size}, but must be at least 1, such as 64")
    found += _seed_problems(config.seed) + _timestep_problems(config)
    if config.eta and config.scheduler != "ddim":
        found.append(f"eta is {config.eta}, but scheduler is {config.scheduler or 'left out'}, which has none; take --scheduler ddim")
    if config.clipping != "dynamic" and config.clipping_quantile != 0.995:
        found.append(f"clipping_quantile is {config.clipping_quantile}, but clipping is not dynamic; add --clipping dynamic")
    if config.guidance_interval is not None:
        low, high = config.guidance_interval
        if config.guidance_scale == 1:
            found.append(f"guidance_interval is {low} {high}, but guidance_scale is 1, which is off; take --guidance_scale 2")
        if not 0 <= low <= high:
            found.append(f"guidance_interval is {low} {high}, but must be a least and a greatest timestep, such as 200 800")
    if config.class_labels == ():
        found.append("class_labels has no value; give one or more labels, balanced, drawn or data")
    found += _choice_problems(config.weights)
    return found


def _seed_problems(seed: int) -> list[str]:
    """A seed of more than the 32 bits that generators of images, and those of numpy, take."""
    return [f"seed is {seed}, but must be at least 0 and below 2^32, such as 0"] if seed >= 2**32 else []


def score_problems(config: ScoreConfig) -> list[str]:
    """Everything that is wrong with a scoring command, before anything is looked at."""
    found = range_problems({name: value for name, value in dataclasses.asdict(config).items() if name != "steps"})
    found += measure_problems(config.measure) + _seed_problems(config.seed) + _file_problems("output", config.output)
    if not config.targets:
        found.append("targets are missing; name a run, a pipeline folder, a folder of images or an .npz file")
    for name in config.schedulers.split(","):
        if name and name not in get_args(SchedulerName):
            found.append(f"schedulers has {name}, which is not known; take some of {', '.join(get_args(SchedulerName))}")
    if not all(part.isdecimal() and int(part) for part in config.steps.split(",")):
        found.append(f"steps is {config.steps}, but must be whole numbers above 0 apart by commas, such as 10,20,50")
    if config.checkpoints not in ("", "all") and not all(part.isdecimal() for part in config.checkpoints.split(",")):
        found.append(f"checkpoints is {config.checkpoints}, but must be all, or steps apart by commas, such as 1000,2000")
    found += _choice_problems(config.weights)
    return found


def stats_problems(config: StatsConfig) -> list[str]:
    """Everything that is wrong with a command that writes statistics, before anything is looked at."""
    return measure_problems(config.measure) + _file_problems("out", config.out)


def _file_problems(field: str, path: str | None) -> list[str]:
    """A path that ends in no name, which is a folder at best."""
    if path is None or PurePath(path).name not in ("", ".."):
        return []
    return [f"{field} is {path!r}, but must name a file, such as {field}.{'safetensors' if field == 'out' else 'json'}"]


METRICS = ("fid", "sfid", "is", "kid", "prc", "colour")


def measure_problems(config: MeasureConfig) -> list[str]:
    """Everything that is wrong with how images are compared."""
    found = range_problems(dataclasses.asdict(config))
    return found + metrics_problems("metrics", config.metrics)


def metrics_problems(field: str, metrics: str) -> list[str]:
    """Unknown or repeated names in a list apart by commas."""
    wanted, found = metrics.split(","), []
    if unknown := [name for name in wanted if name not in METRICS]:
        found.append(f"{field} has {unknown[0] or 'an empty name'}, which is not known; take some of {','.join(METRICS)}")
    if len(set(wanted)) < len(wanted):
        found.append(f"{field} is {metrics}, but each can be named once")
    return found


def _timestep_problems(config: SampleConfig) -> list[str]:
    """The steps are named once, as a number, as sections, or one by one."""
    given = {name: getattr(config, name) for name in ("timesteps", "sections") if getattr(config, name)}
    found = []
    if given and config.steps is not None:
        given["steps"] = config.steps
    if given and config.spacing != "linspace":
        given["spacing"] = config.spacing
    if len(given) > 1:
        found.append(
            " and ".join(f"{name} is {value}" for name, value in given.items()) + ", but only one can decide; leave the others out"
        )
    if config.timesteps and (
        config.timesteps[-1] < 0 or config.timesteps[0] < 1 or any(t <= after for t, after in pairwise(config.timesteps))
    ):
        found.append(f"timesteps is {list(config.timesteps)}, but must fall from above 0, never below 0, such as 900 600 300 0")
    if config.sections and min(config.sections) < 1:
        found.append(f"sections is {list(config.sections)}, but each must be at least 1, such as 10 20 40")
    return found


def bits_problems(config: BitsConfig) -> list[str]:
    """Everything that is wrong with a command that bounds bits per dimension, before the model is looked at."""
    return range_problems(dataclasses.asdict(config)) + _choice_problems(config.weights) + _file_problems("output", config.output)


def _choice_problems(weights: str) -> list[str]:
    if weights in ("ema", "raw") or _is_rate(weights):
        return []
    return [f"weights is {weights!r}, but must be ema, raw, or an EMA rate such as 0.999"]


def _is_rate(text: str) -> bool:
    try:
        return 0 <= float(text) < 1
    except ValueError:
        return False
