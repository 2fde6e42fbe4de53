"""The rules of a training configuration. All problems are found before anything is reported."""

from __future__ import annotations

import dataclasses
import difflib
import re

from .. import shard_names
from ..loading import CHANGEABLE, NEVER, ON_PURPOSE, flatten, is_text
from ..ranges import range_problems
from ..schema.data import DataConfig
from ..schema.objective import NoiseConfig
from ..schema.training import RunConfig, TrainConfig
from .evaluation import clip_problems, metrics_problems, prompt_metrics_problems
from .models import pixel_problems, text_problems
from .objective import objective_problems
from .optimization import optimization_problems, post_hoc_ema_problems


def train_problems(config: TrainConfig, num_processes: int = 1) -> list[str]:
    """Everything that is wrong with a configuration, a sentence each, naming field, value and a value that works."""
    found = range_problems(TrainConfig, flatten(config))
    found += _data_problems(config)
    found += text_problems(config) if is_text(config) else pixel_problems(config)
    found += objective_problems(config.objective)
    found += _noise_problems(config)
    found += optimization_problems(config.optimization, num_processes)
    found += _validation_problems(config)
    found += _evaluation_problems(config)
    found += _allow_change_problems(config.run.allow_change)
    found += _hub_problems(config)
    trackers = config.run.report_to
    if len(set(trackers)) < len(trackers) or ("none" in trackers and len(trackers) > 1):
        found.append(f"report_to is {' '.join(trackers)}, but takes each tracker once, or none alone")
    if config.run.sharded_checkpoints and config.optimization.optimizer == "adamw8bit":
        found.append("sharded_checkpoints is on, but the state of optimizer adamw8bit is saved whole only; leave sharded_checkpoints out")
    if config.optimization.post_hoc_ema:
        found += post_hoc_ema_problems(config)
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
        found += clip_problems("eval_metrics", run.eval_metrics, config.text.clip_model)
    else:
        found += prompt_metrics_problems("eval_metrics", run.eval_metrics, "take it for a text-to-image model")
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
