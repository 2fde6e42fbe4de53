"""The rules of a sampling command."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

from ..prompts import broken_text
from ..ranges import range_problems
from ..registry import SOLVERS, parameters_of
from ..schema.sampling import SampleConfig
from ..schema.types import Task
from .network_weights import network_weights_problems


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
    found += network_weights_problems(config.weights)
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
