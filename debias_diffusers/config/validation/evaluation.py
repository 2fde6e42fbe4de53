"""The rules of the commands that evaluate, and of metrics."""

from __future__ import annotations

import dataclasses
from pathlib import Path, PurePath

from ..aliases import value_suggestion
from ..hub_names import is_model_id, is_reference_file
from ..ranges import range_problems
from ..registry import METRICS, SOLVERS
from ..schema.evaluation import BiasConfig, BitsConfig, MeasureConfig, ReportConfig, ScoreConfig, StatsConfig
from .network_weights import network_weights_problems


def score_problems(config: ScoreConfig) -> list[str]:
    """Everything that is wrong with a scoring command, before anything is looked at."""
    found = range_problems(ScoreConfig, dataclasses.asdict(config))
    found += measure_problems(config.measure, config.reference) + _file_problems("output", config.output)
    if config.prompts is not None and not Path(config.prompts).is_file():
        found.append(f"prompts {config.prompts} is no file; name one with a prompt a line")
    found += _base_model_problems(config.base_model)
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
    found += clip_problems("metrics", config.measure.metrics, config.clip_model)
    found += network_weights_problems(config.weights)
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


def stats_problems(config: StatsConfig) -> list[str]:
    """Everything that is wrong with a command that writes statistics, before anything is looked at."""
    found = measure_problems(config.measure, config.reference) + prompt_metrics_problems(
        "metrics", config.measure.metrics, "take it in eval.py score"
    )
    return found + _file_problems("out", config.out)


def bits_problems(config: BitsConfig) -> list[str]:
    """Everything that is wrong with a command that bounds bits per dimension, before the model is looked at."""
    found = range_problems(BitsConfig, dataclasses.asdict(config))
    if config.method != "ode":
        given = [name for name in ("probes", "tolerance") if getattr(config, name) != getattr(BitsConfig(model=""), name)]
        found += [f"{name} is {getattr(config, name)}, but method is bound; add --method ode or leave {name} out" for name in given]
    return found + network_weights_problems(config.weights) + _file_problems("output", config.output)


def bias_problems(config: BiasConfig) -> list[str]:
    """Everything that is wrong with a command that measures the bias of runs, before they are looked at."""
    found = range_problems(BiasConfig, dataclasses.asdict(config)) + network_weights_problems(config.weights)
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
    found += _base_model_problems(config.base_model)
    if not config.output_dir:
        found.append("output_dir is empty; name a folder, such as bias")
    if config.metrics is not None:
        found += metrics_problems("metrics", config.metrics)
        found += prompt_metrics_problems("metrics", config.metrics, "take it in eval.py score")
        found += _extractor_problems(config, config.metrics)
    return found


def report_problems(config: ReportConfig) -> list[str]:
    """Everything that is wrong with a command that writes a report of runs, before they are looked at."""
    found = [] if config.runs else ["runs are missing; name a run directory, the --output_dir of a training that began"]
    if len(set(config.runs)) < len(config.runs):
        found.append(f"runs is {' '.join(config.runs)}, but each can be named once")
    if Path(config.output).suffix != ".html":
        found.append(f"output is {config.output!r}, but must name an .html file, such as report.html")
    return found


def measure_problems(config: MeasureConfig, reference: str | None) -> list[str]:
    """Everything that is wrong with how images are compared."""
    found = range_problems(MeasureConfig, dataclasses.asdict(config)) + metrics_problems("metrics", config.metrics)
    found += _extractor_problems(config, config.metrics)
    if reference is None or not is_reference_file(reference):
        return found
    of_data_sets = {name: getattr(config, name) for name in ("split", "image_column", "skip_bad", "channels")}
    return found + [
        f"{name} is {value}, but reference {reference} is a file whose images are taken as they are; leave it out"
        for name, value in of_data_sets.items()
        if value
    ]


def metrics_problems(field: str, metrics: str) -> list[str]:
    """Unknown or repeated names in a list separated by commas."""
    wanted, found = metrics.split(","), []
    if unknown := [name for name in wanted if name not in METRICS]:
        found.append(f"{field} has {unknown[0] or 'an empty name'}, which is not known; take some of {','.join(METRICS)}")
    if len(set(wanted)) < len(wanted):
        found.append(f"{field} is {metrics}, but each can be named once")
    return found


def prompt_metrics_problems(field: str, metrics: str, advice: str) -> list[str]:
    """Metrics of images and their prompts, where images have none."""
    of_prompts = [name for name in metrics.split(",") if name in METRICS and METRICS[name].of_prompts]
    return [f"{field} has {of_prompts[0]}, which needs the prompt of each image; {advice}"] if of_prompts else []


def _extractor_problems(config: MeasureConfig | BiasConfig, metrics: str) -> list[str]:
    """A feature extractor beside metrics that take no features."""
    if any(name not in METRICS or METRICS[name].by_features for name in metrics.split(",")):
        return []
    return [
        f"{name} is {value}, but metrics {metrics} take no features; add another metric, such as fid, or leave {name} out"
        for name in ("feature_extractor", "feature_extractor_weights")
        if (value := getattr(config, name)) is not None
    ]


def clip_problems(field: str, metrics: str, clip_model: str | None) -> list[str]:
    """`clip_score` without its model, or a model for nothing."""
    clip = "clip_score" in metrics.split(",")
    if clip and not clip_model:
        return ["clip_model is missing, which clip_score needs; name a CLIPModel of transformers, such as openai/clip-vit-large-patch14"]
    if clip_model and not clip:
        return [f"clip_model is {clip_model}, but {field} has no clip_score; add it, or leave clip_model out"]
    return []


def _base_model_problems(name: str | None) -> list[str]:
    """A base model of LoRAs that is neither a folder nor a Hub id."""
    if name is None or is_model_id(name) or Path(name).expanduser().is_dir():
        return []
    return [f"base_model {name} does not exist; name a pipeline folder or a Hub id"]


def _file_problems(field: str, path: str | None) -> list[str]:
    """A path that ends in no name, which is a folder at best."""
    if path is None or PurePath(path).name not in ("", ".."):
        return []
    return [f"{field} is {path!r}, but must name a file, such as {field}.{'safetensors' if field == 'out' else 'json'}"]
