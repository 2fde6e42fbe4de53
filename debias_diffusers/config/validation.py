"""What a configuration must satisfy: the ranges that stand on its fields, and rules between fields.

All problems are found before anything is reported, in sentences that name the field, its value, and a value that works.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Collection, Container, Mapping
from itertools import pairwise
from pathlib import Path, PurePath
from typing import Any

from . import shard_names
from .aliases import value_suggestion
from .hub_names import is_model_id
from .loading import CHANGEABLE, MODEL_NUMBERS, NEVER, ON_PURPOSE, TEXT_FIELDS, fields_of_other_tasks, flatten, is_text, update
from .prompts import broken_text
from .ranges import range_problems
from .registry import METRICS, SOLVERS, TIMESTEP_BIASES, TIMESTEP_SAMPLERS, WEIGHTINGS, Parametrized, parameters_of
from .schema import (
    BETA_ENDS,
    DIGITS,
    SIGMA_REL,
    BiasConfig,
    BitsConfig,
    DataConfig,
    MeasureConfig,
    ModelConfig,
    NoiseConfig,
    ObjectiveConfig,
    OptimizationConfig,
    RunConfig,
    SampleConfig,
    ScoreConfig,
    ShardsMakeConfig,
    SingleConfig,
    StatsConfig,
    Task,
    TrainConfig,
    WeightsConfig,
    channel_mult,
    is_straight,
    noise_schedule,
)


def train_problems(config: TrainConfig, num_processes: int = 1) -> list[str]:
    """Everything that is wrong with a configuration, a sentence each, naming field, value and a value that works."""
    found = range_problems(TrainConfig, flatten(config))
    found += _data_problems(config)
    found += _text_problems(config) if is_text(config) else _pixel_problems(config)
    found += objective_problems(config.objective)
    found += _noise_problems(config)
    found += _optimization_problems(config.optimization, num_processes)
    found += _validation_problems(config)
    found += _evaluation_problems(config)
    found += _allow_change_problems(config.run.allow_change)
    found += _hub_problems(config)
    if config.run.sharded_checkpoints and config.optimization.optimizer == "adamw8bit":
        found.append("sharded_checkpoints is on, but the state of optimizer adamw8bit is saved whole only; leave sharded_checkpoints out")
    if config.optimization.post_hoc_ema:
        found += _post_hoc_ema_problems(config)
    if config.objective.learned_uncertainty:
        others = {"lora_rank": config.lora.lora_rank, "sharded_checkpoints": config.run.sharded_checkpoints}
        found += [
            f"{name} is {value}, but learned_uncertainty trains a function beside the network, which does not go with it; leave one out"
            for name, value in others.items()
            if value
        ]
    if config.run.verbose and not config.run.dry_run:
        found.append("verbose is on, but dry_run is off; add --dry_run or leave verbose out")
    if config.run.output_dir is None:
        found.append("output_dir is missing: name the run directory, such as --output_dir runs/first")
    return found


# Values of a preset (--config, or the digits' own) that give way to a flag which they do not go with. Not what defines the objective.
YIELDING = (
    "warmup_steps", "label_dropout", "label_column", "attention_resolutions", "attention_head_dim", "channel_mult",
    *parameters_of(WEIGHTINGS), "snr_floor", "snr_ceiling", "terminal_weight_floor", "normalize_weights",
    *parameters_of(TIMESTEP_SAMPLERS), *parameters_of(TIMESTEP_BIASES), "noise_schedule", "learn_sigma", "variance_type",
    "micro_batch_size", "compile_mode",
    "pyramid_noise_iterations", "validation_every",
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
    defaults["warmup_steps"] = max(0, config.optimization.max_steps // 10)
    said = []
    problems = set(train_problems(resolve(config))) - wrong_alone
    for name in YIELDING:
        if not problems or name in typed or before[name] == defaults[name]:
            continue
        other = update(config, {name: defaults[name]})
        if (left := set(train_problems(resolve(other))) - wrong_alone) < problems:
            said.append(f"{name} is {defaults[name]}, and not as configured: {min(problems - left)}")
            config, problems = other, left
    return config, said


def _validation_problems(config: TrainConfig) -> list[str]:
    """A validation loss without images, or images that are held out for nothing."""
    share, every = config.data.validation_split, config.run.validation_every
    if not share and every != RunConfig().validation_every:
        return [f"validation_every is {every}, but validation_split is 0; add --validation_split 0.1 or leave validation_every out"]
    if share and not every:
        return [
            f"validation_split is {share}, but validation_every is 0, so that images are held out for nothing; leave one of the two out"
        ]
    return []


def _post_hoc_ema_problems(config: TrainConfig) -> list[str]:
    """Snapshots of averages that are never taken, or that nothing reads."""
    found, count = [], config.optimization.post_hoc_ema
    if 0 < count < 4:
        found.append(f"post_hoc_ema is {count}, but other averages are made of several snapshots; take --post_hoc_ema 32")
    if not config.run.checkpoint_every:
        found.append(
            f"post_hoc_ema is {count}, but checkpoint_every is 0, and snapshots are taken with checkpoints; take --checkpoint_every 1000"
        )
    others = {"lora_rank": config.lora.lora_rank, "sharded_checkpoints": config.run.sharded_checkpoints}
    return found + [
        f"{name} is {value}, which does not go with post_hoc_ema; leave one of the two out" for name, value in others.items() if value
    ]


def _evaluation_problems(config: TrainConfig) -> list[str]:
    """Measuring while training: what would be ignored, or cannot be kept or measured."""
    run = config.run
    if not run.eval_every:
        values, defaults = flatten(config), flatten(TrainConfig())
        names = ("eval_metrics", "eval_images", "feature_extractor", "feature_extractor_weights", "cache_dir", "keep_best", "clip_model")
        older = {"eval_images": 1000}  # its default in the config.json of older runs
        given = [name for name in names if values[name] not in (defaults[name], older.get(name))]
        return [f"{name} is {values[name]}, but eval_every is 0; add --eval_every 5000 or leave {name} out" for name in given]
    found = metrics_problems("eval_metrics", run.eval_metrics)
    if is_text(config):
        found += _clip_problems("eval_metrics", run.eval_metrics, config.text.clip_model)
    else:
        found += _prompt_metrics_problems("eval_metrics", run.eval_metrics, "take it for a text-to-image model")
    every = run.checkpoint_every
    if run.keep_best and every >= 0 and (not every or run.eval_every % every):
        advice = f"--eval_every {every}" if every else f"--checkpoint_every {run.eval_every}"
        found.append(
            f"keep_best is on, but eval_every {run.eval_every} is no multiple of checkpoint_every {every}, so that what is "
            f"measured is not kept; take {advice}"
        )
    return found


def _allow_change_problems(names: tuple[str, ...]) -> list[str]:
    """Names of fields that never change in the middle of a run, that may change anyway, or that are none."""
    found = []
    for name in names:
        if name in NEVER:
            found.append(f"allow_change names {name}, which cannot change in the middle of a run: {NEVER[name]}; leave it out")
        elif name in CHANGEABLE:
            found.append(f"allow_change names {name}, which may change anyway; leave it out")
        elif name not in ON_PURPOSE:
            near = difflib.get_close_matches(name, ON_PURPOSE, n=1) or ["learning_rate"]
            found.append(f"allow_change names {name!r}, which is not a field; name one, such as {near[0]}")
    return found


def _hub_problems(config: TrainConfig) -> list[str]:
    """Pushing: nowhere, when nothing is saved, or what would be ignored. Whether the name will do, the Hub is asked."""
    hub, every = config.hub, config.run.checkpoint_every
    if not hub.push_to_hub:
        given = {f.name: getattr(hub, f.name) for f in dataclasses.fields(hub) if getattr(hub, f.name) != f.default}
        return [f"{name} is {value}, but push_to_hub is off; add --push_to_hub or leave {name} out" for name, value in given.items()]
    found = []
    if config.run.sharded_checkpoints:
        found.append("push_to_hub pushes files of whole weights, which sharded_checkpoints does not write; leave one of the two out")
    if not hub.hub_model_id:
        found.append("push_to_hub is on, but hub_model_id is missing; name a repository, such as --hub_model_id user/digits")
    if hub.hub_every and every >= 0 and (not every or hub.hub_every % every):
        found.append(
            f"hub_every is {hub.hub_every}, but checkpoint_every is {every}, and only checkpoints are pushed; "
            f"take --hub_every {every}, or leave it out"
        )
    if hub.hub_license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", hub.hub_license):
        found.append(f"hub_license is {hub.hub_license!r}, but must be an identifier of the Hub, such as apache-2.0 or other")
    return found


def _data_problems(config: TrainConfig) -> list[str]:
    data, found = config.data, []
    if not data.dataset:
        found.append("dataset is missing: name digits, emoji, a folder of images, .tar or .parquet files, or a Hub id")
    if data.dataset and shard_names.is_remote(data.dataset) and data.shuffle_window is None:
        found.append(f"shuffle_window is missing: dataset {data.dataset} is fetched in windows of so many shards; add --shuffle_window 8")
    if data.resolution is None:
        found.append("resolution is missing: name the pixels a side, such as --resolution 64")
    if not data.class_conditional and not is_text(config):
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
    fits = "1 2 2" if resolution % 4 == 0 else "1 2" if resolution % 2 == 0 else "1"  # each level but the first halves the resolution
    if not model.channel_mult:
        usual = " ".join(map(str, channel_mult(resolution)))
        advice = f"take {usual}" if usual else f"it cannot be halved; take --resolution {resolution + 1}"
        return [f"channel_mult is missing: for resolution {resolution} {advice}"]
    if min(model.channel_mult) < 1:
        return [f"channel_mult is {list(model.channel_mult)}, but each must be at least 1, such as {fits}"]
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
        widths = sorted(mult * model.model_channels for mult in attending if model.model_channels > 0)
        found += [
            f"attention_head_dim is {model.attention_head_dim}, but must divide the {width} channels of a level that attends; "
            f"{math.gcd(model.attention_head_dim, *widths)} does"
            for width in widths
            if width % model.attention_head_dim
        ]
    return found


def _others(config: TrainConfig, names: Collection[str]) -> list[str]:
    """Those of the fields that do not have their default."""
    values, defaults = flatten(config), flatten(TrainConfig())
    return [name for name in defaults if name in names and values[name] != defaults[name]]


def _pixel_problems(config: TrainConfig) -> list[str]:
    """The network of a pixel model, and fields of text-to-image models."""
    values, adapters = flatten(config), dataclasses.asdict(config.lora)
    return _model_problems(config) + [
        f"{name} is {values[name]}, but a pixel model has no {'adapters' if name in adapters else 'captions'}; leave it out, or name a "
        f"text-to-image model with --base_model"
        for name in _others(config, TEXT_FIELDS - {"task"})
    ]


def _text_problems(config: TrainConfig) -> list[str]:
    """A text-to-image training: fields of pixel models, objectives without a meaning here, and what would be ignored."""
    text, values, found = config.text, flatten(config), []
    if not text.base_model:
        found.append("task is text_to_image, but base_model is missing; name a pipeline folder or a Hub id, or digits, the packaged one")
    if config.data.task == "pixels":
        found.append(f"task is pixels, but base_model is {text.base_model}, a text-to-image model; leave one of the two out")
    found += [
        f"{name} is {values[name]}, but is for pixel models, and base_model {text.base_model} is a text-to-image model; leave it out"
        for name in _others(config, fields_of_other_tasks(config) - {"init"})
    ]
    found += _lora_problems(config)
    if config.objective.weighting == "variational":
        found.append("weighting variational needs a learned variance, which text-to-image models do not have; take --weighting debiased")
    if config.objective.prediction_type in ("flow", "sample"):
        predicted = config.objective.prediction_type
        found.append(f"prediction_type is {predicted}, but pipelines of Stable Diffusion know epsilon and v_prediction; leave it out")
    if (broken := broken_text(text.sample_prompts)) is not None:
        found.append(f"sample_prompts has {broken!r}, which is not Unicode; write it anew")
    if text.keep_tokens and not text.shuffle_caption:
        found.append(f"keep_tokens is {text.keep_tokens}, but shuffle_caption is off; add --shuffle_caption or leave keep_tokens out")
    if text.crop_per_image and text.crop != "random":
        found.append("crop_per_image is on, but crop is center, which is the same for every image; add --crop random or leave it out")
    if text.aspect_ratio_buckets and "batch_size" in config.run.allow_change:
        found.append("allow_change names batch_size, but with aspect_ratio_buckets it decides which images a step has; leave it out")
    if text.precompute_dir == "":
        found.append("precompute_dir is an empty name; name a folder, or leave it out")
    anew = [name for name, on in (("shuffle_caption", text.shuffle_caption), ("lora_text_encoders", config.lora.lora_text_encoders)) if on]
    if text.precompute_dir and anew and text.crop == "random" and not text.crop_per_image:
        found.append(
            f"precompute_dir is {text.precompute_dir}, but with {anew[0]} and crop random neither embeddings nor latents are known "
            f"beforehand; leave one of the three out, or add --crop_per_image"
        )
    return found


def _lora_problems(config: TrainConfig) -> list[str]:
    """Fields of LoRA without a rank, weights to start from without LoRA, and a base model whose UNet is not trained."""
    lora, init = config.lora, config.optimization.init
    if lora.lora_rank is None:
        given = [f"{name} is {flatten(config)[name]}, but lora_rank is left out" for name in _others(config, dataclasses.asdict(lora))]
        found = [f"{problem}; add --lora_rank 16, or leave it out" for problem in given]
        if init:
            found.append(
                f"init is {init}, but the whole UNet of base_model {config.text.base_model} is trained, which has the weights to start "
                f"from; name the model with these weights as --base_model, or a LoRA with --lora_rank"
            )
        return found
    found = []
    if config.text.base_model == DIGITS:
        found.append(f"lora_rank is {lora.lora_rank}, but the UNet of base_model digits has no weights; train it first, and name that run")
    if not all(lora.lora_targets) or not lora.lora_targets:
        found.append("lora_targets is empty, or has an empty name; name modules, such as to_q to_k to_v to_out.0")
    return found


MIN_SNR_FLOOR = 1e-4  # to be a bound worth its name: the debiased weights of the cosine schedule are then up to 100


def objective_problems(objective: ObjectiveConfig) -> list[str]:
    """Everything that is wrong with an objective: combinations without a meaning, and values that would be ignored."""
    if unknown := _unknown_weighting(objective.weighting):
        found = [unknown]
    else:
        found = [*_unused(objective).values(), *_weighting_problems(objective)]
    found += bound_problems(dataclasses.asdict(objective)) + _timestep_bias_problems(objective) + _phase_problems(objective)
    return found + _schedule_problems(objective) + _variance_problems(objective)


def bound_problems(values: Mapping[str, Any]) -> list[str]:
    """A floor of the SNR above its ceiling."""
    floor, ceiling = values.get("snr_floor", 0.0), values.get("snr_ceiling", 0.0)
    if 0 < ceiling < floor:
        return [f"snr_ceiling is {ceiling}, but snr_floor is {floor}; take a ceiling above the floor"]
    return []


def _unknown_weighting(name: str) -> str | None:
    if name in WEIGHTINGS:
        return None
    near = value_suggestion("weighting", name, WEIGHTINGS)
    hint = f"did you mean {near}?" if near else f"take one of: {', '.join(WEIGHTINGS)}"
    return f"weighting is {name}, which is not known; {hint}"


def _unused(objective: ObjectiveConfig) -> dict[str, str]:
    """Fields that the rest of the objective leaves no use for, and a sentence for each."""
    weighting = objective.weighting
    found = _parameters_of_others("weighting", WEIGHTINGS, weighting)
    samplers = timestep_samplers(objective)
    found |= _parameters_of_others("timestep_sampler", TIMESTEP_SAMPLERS, *samplers)
    found |= _parameters_of_others("timestep_bias_strategy", TIMESTEP_BIASES, objective.timestep_bias_strategy)
    spec, bound = WEIGHTINGS[weighting], weighting == "variational"
    constant_below = getattr(objective, spec.constant_below) if isinstance(spec.constant_below, str) else spec.constant_below
    without_use = {
        "snr_floor": objective.snr_floor <= constant_below,
        "snr_ceiling": objective.snr_ceiling >= spec.constant_above,
        "normalize_weights": bound,
        "terminal_weight_floor": bound,
        "schedule_free_weights": bound,
        "learned_uncertainty": bound,
    }
    for name, useless in without_use.items():
        if useless:
            found[name] = f"changes nothing in weighting {weighting}; leave it out or take --weighting debiased"
    if not any(TIMESTEP_SAMPLERS[name].draws_zero_snr for name in samplers):
        found["terminal_weight_floor"] = (
            f"timestep_sampler {' and '.join(samplers)} never draws the last timestep where its SNR is 0; take "
            f"--timestep_sampler log_normal_corrected or leave it out"
        )
    return {name: f"{name} is {getattr(objective, name)}, but {reason}" for name, reason in found.items() if _changed(objective, name)}


def _parameters_of_others(kind: str, table: Mapping[str, Parametrized], *chosen: str) -> dict[str, str]:
    """The parameters that the chosen entries of a table do not have, and what to do about each."""
    return {
        name: f"{kind} is {' and '.join(chosen)}, which does not have it; take --{kind} {' or '.join(owners)} or leave {name} out"
        for name, owners in parameters_of(table).items()
        if not set(chosen) & set(owners)
    }


def timestep_samplers(objective: ObjectiveConfig) -> tuple[str, ...]:
    """The names of the samplers of a run, in the order of its steps."""
    after = objective.timestep_sampler_after
    return (objective.timestep_sampler, after) if after else (objective.timestep_sampler,)


def _changed(objective: ObjectiveConfig, name: str) -> bool:
    changed: bool = getattr(objective, name) != getattr(ObjectiveConfig(), name)
    return changed


def _weighting_problems(objective: ObjectiveConfig) -> list[str]:
    """Weights without bound, or without a meaning for the prediction type."""
    weighting, predicted, found = objective.weighting, objective.prediction_type, []
    spec = WEIGHTINGS[weighting]
    if spec.repeats and predicted not in spec.repeats:
        found.append(
            f"weighting {weighting} repeats code that knows {', '.join(spec.repeats)} only, but prediction_type is "
            f"{predicted}; take --weighting debiased"
        )
    samplers = timestep_samplers(objective)
    if objective.schedule_free_weights and (changing := [name for name in samplers if not TIMESTEP_SAMPLERS[name].corrected]):
        found.append(
            f"schedule_free_weights is on, but timestep_sampler {changing[0]} multiplies the objective by its density; take "
            f"--timestep_sampler stratified, or {changing[0]}_corrected where there is one"
        )
    if objective.learned_uncertainty and "loss_second_moment" in samplers:
        found.append(
            "learned_uncertainty is on, but timestep_sampler loss_second_moment draws by the size of the losses, to which the uncertainty "
            "is added; take --timestep_sampler stratified"
        )
    unbounded = predicted in spec.unbounded and objective.snr_floor < MIN_SNR_FLOOR
    # The last SNR of the cosine schedule is 2.4e-9: the debiased weights then have an effective sample size of 0.0015.
    if unbounded and objective.noise_schedule == "cosine":
        found.append(
            f"weighting {weighting} with noise_schedule cosine and prediction_type {predicted} lets a few timesteps carry "
            f"nearly the whole loss; add --snr_floor 1e-3, or take --weighting debiased --prediction_type v_prediction"
        )
    elif unbounded and (objective.rescale_betas_zero_snr or is_straight(objective)) and predicted != "epsilon":
        found.append(f"weighting {weighting} is infinite where the SNR is 0; add --snr_floor 1e-3, or take --weighting debiased")
    return found


def _schedule_problems(objective: ObjectiveConfig) -> list[str]:
    predicted, T, found = objective.prediction_type, objective.num_train_timesteps, []
    _, beta_end = BETA_ENDS.get(objective.noise_schedule or "", (0.0, 0.0))
    if T >= 2 and beta_end * 1000 / T >= 1:
        found.append(
            f"num_train_timesteps is {T}, but the betas of noise_schedule {objective.noise_schedule} "
            f"scale by 1000/T and must stay below 1; take at least {int(beta_end * 1000) + 1}"
        )
    if predicted == "flow" and objective.noise_schedule is not None:
        found.append(
            f"noise_schedule is {objective.noise_schedule}, but prediction_type flow has its own, a = 1 - t and s = t; leave it out"
        )
    if objective.noise_schedule == "rectified_flow" and predicted in ("epsilon", "v_prediction"):
        found.append(
            f"noise_schedule is rectified_flow, but prediction_type is {predicted}; take --prediction_type sample, or --prediction_type "
            f"flow, which has it, and leave noise_schedule out"
        )
    if is_straight(objective) and objective.rescale_betas_zero_snr:
        path = "prediction_type flow" if predicted == "flow" else "noise_schedule rectified_flow"
        found.append(f"rescale_betas_zero_snr is on, but {path} ends at zero SNR as it is; leave it out")
    if predicted == "epsilon" and objective.rescale_betas_zero_snr:
        found.append(
            "rescale_betas_zero_snr is on, but prediction_type is epsilon, and where the SNR is 0 the input is the noise itself: "
            "a prediction of it says nothing about the image; take --prediction_type v_prediction"
        )
    if objective.terminal_weight_floor > 0 and not is_straight(objective) and not objective.rescale_betas_zero_snr:
        found.append(
            f"terminal_weight_floor is {objective.terminal_weight_floor}, but the terminal SNR of this schedule is not 0; "
            f"add --rescale_betas_zero_snr --prediction_type v_prediction, or take --prediction_type flow"
        )
    return found


def _phase_problems(objective: ObjectiveConfig) -> list[str]:
    """A second timestep sampler that never draws, or draws as the first, and weights that cannot be normalized for both."""
    after, switch = objective.timestep_sampler_after, objective.timestep_sampler_switch
    if after is None:
        return (
            [f"timestep_sampler_switch is {switch}, but timestep_sampler_after is left out; name it, or leave both out"] if switch else []
        )
    found = []
    if after == objective.timestep_sampler:
        found.append(f"timestep_sampler_after is {after}, as timestep_sampler is; leave it out")
    if not switch:
        found.append("timestep_sampler_switch is 0, so that timestep_sampler never draws; take --timestep_sampler_switch 10000")
    if objective.normalize_weights and not all(TIMESTEP_SAMPLERS[name].corrected for name in timestep_samplers(objective)):
        found.append(
            "normalize_weights is on, but timestep_sampler and timestep_sampler_after have other densities, and the weights have one mean; "
            "leave one of the two out"
        )
    return found


def _timestep_bias_problems(objective: ObjectiveConfig) -> list[str]:
    """A bias that changes nothing."""
    strategy, T = objective.timestep_bias_strategy, objective.num_train_timesteps
    if strategy == "none":
        return []
    found = []
    if objective.timestep_bias_multiplier == 1:
        found.append(
            f"timestep_bias_strategy is {strategy}, but timestep_bias_multiplier is 1, which changes nothing; "
            f"take --timestep_bias_multiplier 2, or --timestep_bias_strategy none"
        )
    begin, end = objective.timestep_bias_begin, T if objective.timestep_bias_end is None else objective.timestep_bias_end
    if strategy == "range" and not (0 <= begin < end <= T and end - begin < T):
        found.append(
            f"timestep_bias_strategy is range, from timestep_bias_begin {begin} to before timestep_bias_end {end}, but must be a part of "
            f"the timesteps 0 to {T - 1}; take --timestep_bias_begin {T // 2}" + (f" --timestep_bias_end {T}" if end != T else "")
        )
    portion = objective.timestep_bias_portion
    if strategy != "range" and 0 < portion < 1 and not 0 < round(portion * T) < T:
        found.append(f"timestep_bias_portion is {portion}, which is none or all of {T} timesteps; take --timestep_bias_portion 0.25")
    return found


def _variance_problems(objective: ObjectiveConfig) -> list[str]:
    found = []
    if objective.weighting == "variational" and not objective.learn_sigma:
        other = " --prediction_type v_prediction" if is_straight(objective) else ""
        found.append(f"weighting variational is the bound with a learned variance, but learn_sigma is off; add --learn_sigma{other}")
    if is_straight(objective):
        path = "prediction_type flow" if objective.prediction_type == "flow" else "noise_schedule rectified_flow"
        found += [
            f"{name} is {getattr(objective, name)}, but {path} is sampled without random steps, which have no variance; "
            f"leave it out or take --prediction_type v_prediction"
            for name in ("learn_sigma", "variance_type")
            if _changed(objective, name)
        ]
    elif objective.learn_sigma and objective.variance_type:
        found.append(f"variance_type is {objective.variance_type}, but learn_sigma makes the network predict it; give one of the two")
    return found


def _noise_problems(config: TrainConfig) -> list[str]:
    """Options of the noise that would be ignored, or that the variational bound does not know."""
    noise, found = config.noise, []
    iterations = noise.pyramid_noise_iterations
    if iterations != NoiseConfig().pyramid_noise_iterations and not noise.pyramid_noise_discount:
        found.append(
            f"pyramid_noise_iterations is {iterations}, but pyramid_noise_discount is 0, which is off; add --pyramid_noise_discount 0.3 "
            f"or leave pyramid_noise_iterations out"
        )
    if config.objective.learn_sigma:
        found += [
            f"{name} is {getattr(noise, name)}, but learn_sigma is on, and the variational bound is that of standard normal noise; "
            f"leave one of the two out"
            for name in ("noise_offset", "pyramid_noise_discount", "input_perturbation")
            if getattr(noise, name)
        ]
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
    per_process, micro_batch = optimization.batch_size // num_processes, optimization.micro_batch_size
    if optimization.compile_mode != "default" and micro_batch and 1 <= micro_batch < per_process:
        found.append(
            f"micro_batch_size is {micro_batch}, but the CUDA graphs of compile_mode {optimization.compile_mode} would "
            f"write a micro-batch's gradients over those of the one before; leave one of the two out"
        )
    if optimization.param_dtype == "bf16" and optimization.mixed_precision != "bf16":
        found.append(
            f"param_dtype is bf16, but mixed_precision is {optimization.mixed_precision or 'no'}, and weights in bf16 are computed with in "
            f"bf16; add --mixed_precision bf16 or leave param_dtype out"
        )
    rates = optimization.ema_decay
    if not rates or not all(0 <= rate < 1 for rate in rates) or len(set(rates)) < len(rates):
        found.append(f"ema_decay is {list(rates)}, but must be one or more different rates, each at least 0 and below 1, such as 0.9999")
    if optimization.ema_on_cpu and not any(rates):
        found.append("ema_on_cpu is on, but ema_decay is 0, which is off; add --ema_decay 0.9999 or leave ema_on_cpu out")
    if optimization.num_epochs is not None and optimization.max_steps != OptimizationConfig().max_steps:
        found.append(f"num_epochs is {optimization.num_epochs:g}, but max_steps is {optimization.max_steps}; give one of the two")
    if optimization.warmup_steps > optimization.max_steps >= 1:
        found.append(
            f"warmup_steps is {optimization.warmup_steps}, but max_steps is only {optimization.max_steps}; "
            f"take --warmup_steps {optimization.max_steps // 10}"
        )
    return found


def sharding_problems(optimization: OptimizationConfig, objective: ObjectiveConfig) -> list[str]:
    """What does not go with a training whose weights are sharded over processes."""
    found = []
    if objective.learned_uncertainty:
        found.append("learned_uncertainty is on, but the weights are sharded over processes (FSDP), which it does not know; leave it out")
    if optimization.optimizer == "adamw8bit":
        found.append("optimizer is adamw8bit, but bitsandbytes knows no sharded weights; take --optimizer adamw or adafactor")
    if optimization.mixed_precision == "fp16":
        found.append("mixed_precision is fp16, but which is not tested with sharded weights; take --mixed_precision bf16")
    for name in ("compile", "ema_on_cpu"):
        if getattr(optimization, name):
            found.append(f"{name} is on, but the weights are sharded over processes (FSDP), which does not go with it; leave it out")
    return found


def weights_problems(config: WeightsConfig) -> list[str]:
    """Everything that is wrong with a command that plots loss weights. Objectives that nobody should train are no problem here."""
    names, objective = (config.objective.weighting, *config.against), config.objective
    if unknown := [problem for name in names if (problem := _unknown_weighting(name))]:
        return unknown
    found = range_problems(ObjectiveConfig, dataclasses.asdict(objective))
    if "variational" in names:
        found.append("weighting variational is no function of the SNR, so it has no loss weights to draw; leave it out")
    unused = set.intersection(*(set(_unused(dataclasses.replace(objective, weighting=name))) for name in names))
    unused |= {"learn_sigma", "variance_type", "learned_uncertainty", "timestep_sampler_after", "timestep_sampler_switch"}
    if not objective.normalize_weights:
        unused |= {"timestep_sampler", *parameters_of(TIMESTEP_SAMPLERS), "timestep_bias_strategy", *parameters_of(TIMESTEP_BIASES)}
    found += [
        f"{name} is {getattr(objective, name)}, but changes no weight of {', '.join(names)}; leave it out"
        for name in sorted(unused)
        if _changed(objective, name)
    ]
    found += bound_problems(dataclasses.asdict(objective))
    # Whatever the prediction type, all are plotted: it decides only between the path of rectified flow and the others.
    path = objective if is_straight(objective) else dataclasses.replace(objective, prediction_type="v_prediction")
    path = dataclasses.replace(path, noise_schedule=noise_schedule(path))
    return found + _schedule_problems(path)


def sample_problems(config: SampleConfig) -> list[str]:
    """Everything that is wrong with a sampling command, before the model is looked at."""
    found = range_problems(SampleConfig, dataclasses.asdict(config)) + _timestep_problems(config)
    found += [
        f"{name} is {getattr(config, name)}, but scheduler is {config.scheduler or 'left out'}, which has none; "
        f"take --scheduler {' or '.join(owners)}"
        for name, owners in parameters_of(SOLVERS).items()
        if getattr(config, name) and config.scheduler not in owners
    ]
    if config.clipping != "dynamic" and config.clipping_quantile != 0.995:
        found.append(f"clipping_quantile is {config.clipping_quantile}, but clipping is not dynamic; add --clipping dynamic")
    if config.guidance_interval is not None:
        low, high = config.guidance_interval
        if config.guidance_scale in (None, 1):
            found.append(f"guidance_interval is {low} {high}, but guidance_scale is 1, which is off; take --guidance_scale 2")
        if not 0 <= low <= high:
            found.append(f"guidance_interval is {low} {high}, but must be a minimum and a maximum timestep, such as 200 800")
    if config.class_labels == ():
        found.append("class_labels has no value; give one or more labels, balanced, drawn or data")
    if config.prompt and config.prompts is not None:
        found.append("prompt and prompts are given, but only one can say what is drawn; leave one out")
    if (broken := broken_text((*config.prompt, config.negative_prompt or ""))) is not None:
        found.append(f"prompt {broken!r} is not Unicode; write it anew")
    found += _network_weights_problems(config.weights)
    return found


# Fields of SampleConfig that only one kind of model has.
OF_ONE_TASK: dict[Task, tuple[str, ...]] = {
    "pixels": ("class_labels", "guidance_interval", "clipping", "clipping_quantile", "allow_pickle_import"),
    "text_to_image": ("prompt", "prompts", "negative_prompt", "width", "height", "lora", "base_model"),
}
_KIND = {"pixels": "a pixel model", "text_to_image": "a text-to-image model"}


def model_flag_problems(config: SampleConfig, task: Task) -> list[str]:
    """The flags of a sampling command that its kind of model does not have, or lacks."""
    (other,) = OF_ONE_TASK.keys() - {task}
    found = [
        f"{name} is {' '.join(map(str, value)) if isinstance(value, tuple) else value}, but {config.model} is {_KIND[task]}, and {name} is "
        f"for the other kind; leave it out"
        for name in OF_ONE_TASK[other]
        if (value := getattr(config, name)) != getattr(SampleConfig(model=""), name)
    ]
    if task == "pixels":
        return found
    if not config.prompt and config.prompts is None:
        found.append(f"prompt is missing: {config.model} is a text-to-image model; say what to draw with --prompt, or --prompts FILE")
    scale = config.guidance_scale
    if scale is not None and 0 <= scale < 1:
        found.append(f"guidance_scale is {scale}, but text-to-image models have guidance above 1 only; take 1, which is off, or more")
    if scale is not None and scale <= 1 and config.negative_prompt is not None:
        found.append(f"negative_prompt is given, but guidance_scale is {scale}, which is off; take --guidance_scale 5, or leave it out")
    return found


def score_problems(config: ScoreConfig) -> list[str]:
    """Everything that is wrong with a scoring command, before anything is looked at."""
    found = range_problems(ScoreConfig, dataclasses.asdict(config))
    found += measure_problems(config.measure) + _file_problems("output", config.output)
    if config.prompts is not None and not Path(config.prompts).is_file():
        found.append(f"prompts {config.prompts} is no file; name one with a prompt a line")
    if config.base_model is not None and not (is_model_id(config.base_model) or Path(config.base_model).expanduser().is_dir()):
        found.append(f"base_model {config.base_model} does not exist; name a pipeline folder or a Hub id")
    if not config.targets:
        found.append("targets are missing; name a run, a pipeline folder, a folder of images or an .npz file")
    for name in config.schedulers.split(","):
        if name and name not in SOLVERS:
            near = value_suggestion("schedulers", name, SOLVERS) or f"some of {', '.join(SOLVERS)}"
            found.append(f"schedulers has {name}, which is not known; take {near}")
    if not all(part.isdecimal() and int(part) for part in config.steps.split(",")):
        found.append(f"steps is {config.steps}, but must be whole numbers above 0, separated by commas, such as 10,20,50")
    if config.checkpoints not in ("", "all") and not all(part.isdecimal() for part in config.checkpoints.split(",")):
        found.append(f"checkpoints is {config.checkpoints}, but must be all, or steps separated by commas, such as 1000,2000")
    found += _clip_problems("metrics", config.measure.metrics, config.clip_model)
    found += _network_weights_problems(config.weights)
    seeds = config.sampling_seeds.split(",") if config.sampling_seeds else []
    known = {int(part) for part in seeds if part.isdecimal() and int(part) < 2**32}
    if len(known) < len(seeds):
        found.append(
            f"sampling_seeds is {config.sampling_seeds}, but must be different seeds below 2^32, separated by commas, such as 0,1,2"
        )
    if seeds and config.ema:
        found.append("--ema sweep is a curve over sigma_rel of one sampling seed; leave sampling_seeds out")
    if config.ema and config.weights != "ema":
        found.append(f"weights is {config.weights}, but --ema sweep compares averages; leave one of the two out")
    if config.ema and ("," in config.steps or "," in config.schedulers or config.checkpoints):
        found.append("--ema sweep is a curve over sigma_rel: name one of schedulers, steps and checkpoints at most")
    return found


def _clip_problems(field: str, metrics: str, clip_model: str | None) -> list[str]:
    """`clip_score` without its model, or a model for nothing."""
    clip = "clip_score" in metrics.split(",")
    if clip and not clip_model:
        return ["clip_model is missing, which clip_score needs; name a CLIPModel of transformers, such as openai/clip-vit-large-patch14"]
    if clip_model and not clip:
        return [f"clip_model is {clip_model}, but {field} has no clip_score; add it, or leave clip_model out"]
    return []


def shards_problems(config: ShardsMakeConfig) -> list[str]:
    """Values out of range, and an output that is the input."""
    found = range_problems(ShardsMakeConfig, dataclasses.asdict(config))
    if PurePath(config.data) == PurePath(config.out):
        found.append(f"out {config.out} is the data; name another folder")
    return found


def single_problems(config: SingleConfig) -> list[str]:
    """A conversion from neither a single file nor to one, or from one to another."""
    given, made = (PurePath(path).suffix == ".safetensors" for path in (config.model, config.out))
    if given == made:
        what = "both are" if given else "none is"
        return [f"of model {config.model} and out {config.out} one must be a .safetensors file, but {what}; name a folder and a file"]
    if made and config.config:
        return [f"config is {config.config}, but {config.model} has its own; leave config out"]
    if given and config.dtype != "float32":
        return [f"dtype is {config.dtype}, but a folder keeps the precision of the file; leave dtype out"]
    return []


def stats_problems(config: StatsConfig) -> list[str]:
    """Everything that is wrong with a command that writes statistics, before anything is looked at."""
    found = measure_problems(config.measure) + _prompt_metrics_problems("metrics", config.measure.metrics, "take it in eval.py score")
    return found + _file_problems("out", config.out)


def _prompt_metrics_problems(field: str, metrics: str, advice: str) -> list[str]:
    """Metrics of images and their prompts, where images have none."""
    of_prompts = [name for name in metrics.split(",") if name in METRICS and METRICS[name].of_prompts]
    return [f"{field} has {of_prompts[0]}, which needs the prompt of each image; {advice}"] if of_prompts else []


def _file_problems(field: str, path: str | None) -> list[str]:
    """A path that ends in no name, which is a folder at best."""
    if path is None or PurePath(path).name not in ("", ".."):
        return []
    return [f"{field} is {path!r}, but must name a file, such as {field}.{'safetensors' if field == 'out' else 'json'}"]


def measure_problems(config: MeasureConfig) -> list[str]:
    """Everything that is wrong with how images are compared."""
    found = range_problems(MeasureConfig, dataclasses.asdict(config))
    return found + metrics_problems("metrics", config.metrics)


def metrics_problems(field: str, metrics: str) -> list[str]:
    """Unknown or repeated names in a list separated by commas."""
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
    found = range_problems(BitsConfig, dataclasses.asdict(config))
    if config.method != "ode":
        given = [name for name in ("probes", "tolerance") if getattr(config, name) != getattr(BitsConfig(model=""), name)]
        found += [f"{name} is {getattr(config, name)}, but method is bound; add --method ode or leave {name} out" for name in given]
    return found + _network_weights_problems(config.weights) + _file_problems("output", config.output)


def bias_problems(config: BiasConfig) -> list[str]:
    """Everything that is wrong with a command that measures the bias of runs, before they are looked at."""
    found = range_problems(BiasConfig, dataclasses.asdict(config)) + _network_weights_problems(config.weights)
    if not config.runs:
        found.append("runs are missing; name a run directory, a pipeline folder or a Hub id")
    if len(set(config.runs)) < len(config.runs):
        found.append(f"runs is {' '.join(config.runs)}, but each can be named once")
    if config.steps and (min(config.steps) < 1 or len(set(config.steps)) < len(config.steps)):
        found.append(f"steps is {' '.join(map(str, config.steps))}, but must be different numbers from 1 on, such as 5 20 100")
    if config.swap and len(config.runs) != 2:
        found.append(f"swap is on, but {len(config.runs)} runs are named; it takes two: name two, or leave it out")
    if not config.swap and config.swap_steps != BiasConfig(runs=()).swap_steps:
        found.append(f"swap_steps is {config.swap_steps}, but swap is off; add --swap or leave swap_steps out")
    if not config.output_dir:
        found.append("output_dir is empty; name a folder, such as bias")
    if config.metrics is not None:
        found += metrics_problems("metrics", config.metrics)
        found += _prompt_metrics_problems("metrics", config.metrics, "take it in eval.py score")
    return found


def _network_weights_problems(weights: str) -> list[str]:
    if weights in ("ema", "raw") or _is_rate(weights) or sigma_rel_of(weights) is not None:
        return []
    return [f"weights is {weights!r}, but must be ema, raw, an EMA decay rate such as 0.999, or sigma_rel=0.08"]


def sigma_rel_of(weights: str) -> float | None:
    """The width in `sigma_rel=0.08`; None of other weights, and of a width that no average has."""
    start, _, number = weights.partition("=")
    try:
        width = float(number)
    except ValueError:
        return None
    return width if start == "sigma_rel" and SIGMA_REL.holds(width) else None


def _is_rate(text: str) -> bool:
    try:
        return 0 <= float(text) < 1
    except ValueError:
        return False
