"""What is asked for on the page of the playground, as commands of sample.py; its limits, and what is wrong with it. No torch."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import hub_names
from ..config.ranges import range_problems
from ..config.schema.sampling import PlayConfig, SampleConfig
from ..config.schema.types import Task
from ..config.validation.sampling import sample_problems
from ..errors import InputError, raise_all
from ..hub.client import WEIGHTS
from ..runs import checkpoints, ema_snapshots
from ..runs.model_folder import is_lora, require_model, task_of
from ..runs.run_directory import CHECKPOINTS

LOOPBACK = ("127.0.0.1", "localhost", "::1")
LONGEST_PROMPT = 4000  # characters, of all lines


@dataclass(frozen=True)
class PlayedModel:
    """What the page offers of a model."""

    name: str  # a path, or a Hub id with its commit
    task: Task
    is_lora: bool
    classes: tuple[str, ...]  # class names, or numbers; () of an unconditional model
    has_guidance: bool
    guidance_scale: float  # if left out
    schedulers: tuple[str, ...]
    scheduler: str  # if left out
    weights: tuple[str, ...]
    num_images: int  # with which the page begins


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for: the fields of SampleConfig that are on the page, in the types of their controls."""

    scheduler: Any
    steps: Any
    seed: Any
    num_images: Any
    guidance_scale: Any = None
    class_labels: Any = ()
    prompt: Any = ""  # one a line
    negative_prompt: Any = ""
    weights: Sequence[Any] = ("ema",)  # of each model
    stages: Any = True  # keep x_t and the predicted x_0


def play_problems(config: PlayConfig) -> list[str]:
    """Everything that is wrong with the command of the playground, before a library is loaded."""
    found = range_problems(PlayConfig, dataclasses.asdict(config))
    if not 1 <= len(config.models) <= 2:
        found.append(f"models are {len(config.models) or 'missing'}; name one model, or two to compare")
    found += [problem for model in config.models for problem in hub_names.model_problems("model", model)]
    if config.base_model is not None:
        found += hub_names.model_problems("base_model", config.base_model)
    if found:
        return found
    local = [Path(model) for model in config.models if not hub_names.is_model_id(model)]
    for folder in local:
        if not is_lora(folder):
            require_model(folder, str(folder))
    if len({task_of(folder) for folder in local}) > 1:
        found.append(OTHER_TASKS)
    if config.space is None and importlib.util.find_spec("gradio") is None:
        found.append('the playground needs gradio, which is not installed; run pip install "debias_diffusers[play]"')
    return found


OTHER_TASKS = "models are a pixel model and a text-to-image model, which have no settings in common; start two playgrounds"


def weights_of(folder: Path) -> tuple[str, ...]:
    """The weights that a model offers: those of a run's newest checkpoint, or the variants of a folder; the exported ones come first."""
    if (folder / CHECKPOINTS).is_dir():
        rates = checkpoints.newest_state(folder / CHECKPOINTS).get("config", {}).get("ema_decay") or []
        post_hoc = ["sigma_rel=0.05", "sigma_rel=0.1"] if (folder / ema_snapshots.FOLDER).is_dir() else []
        return ("ema", "raw", *map(str, rates[1:]), *post_hoc)
    variants = (path.name.split(".")[1] for path in folder.glob(f"unet/{WEIGHTS}.ema_*.safetensors"))
    return ("ema", *sorted({variant.removeprefix("ema_").replace("_", ".", 1) for variant in variants}))


def commands(request: Request, models: Sequence[PlayedModel], config: PlayConfig) -> list[SampleConfig]:
    """The commands of sample.py that a request stands for, one for each model.

    Raises:
        InputError: a value is none that sample.py takes, or the request is beyond the limits of the playground.
    """
    steps, seed, num_images = (whole(name, getattr(request, name)) for name in ("steps", "seed", "num_images"))
    found = []
    for model, weights in zip(models, request.weights, strict=True):
        text = model.task == "text_to_image"
        found.append(
            SampleConfig(
                model=model.name,
                scheduler=_known("scheduler", request.scheduler, model.schedulers, model.name),
                steps=steps,
                seed=seed,
                num_images=num_images,
                batch_size=config.batch_size,
                guidance_scale=_guidance_scale(request.guidance_scale, model),
                class_labels=_labels(request.class_labels, model),
                prompt=_prompts(request.prompt) if text else (),
                negative_prompt=_negative_prompt(request.negative_prompt) if text else None,
                base_model=config.base_model if model.is_lora else None,
                weights=str(weights or "ema"),
                dtype=config.dtype,
                num_threads=config.num_threads,
            )
        )
    raise_all(dict.fromkeys(problem for each in found for problem in sample_problems(each)), "request")
    asked = num_images * steps * len(models)
    if asked > config.max_image_steps:
        each = " x 2 models" if len(models) == 2 else ""
        raise InputError(
            f"{num_images} images x {steps} steps{each} are {asked} image steps, and this playground draws at most "
            f"{config.max_image_steps} at a time; take fewer images or steps"
        )
    return found


def command_line(config: SampleConfig, name: str) -> str:
    """The command of sample.py that draws the same images.

    Args:
        config: the command.
        name: of a folder for its images, where the model is no run directory, which has one.
    """
    neutral = SampleConfig(model="")
    words = ["debias-sample", config.model]
    for field in dataclasses.fields(SampleConfig):
        value = getattr(config, field.name)
        if field.name != "model" and value != getattr(neutral, field.name):
            words += [f"--{field.name}", *map(str, value if isinstance(value, tuple) else [value])]
    if not (Path(config.model) / CHECKPOINTS).is_dir():
        words += ["--output_dir", f"samples/{name}"]
    return shlex.join(words)


def whole(name: str, value: Any) -> int:
    """A whole number of a control; raises InputError for anything else."""
    number = _number(name, value)
    if number is None or number != int(number):
        raise InputError(f"{name} is {'empty' if value in (None, '') else value}, but must be a whole number")
    return int(number)


def _number(name: str, value: Any) -> float | None:
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{name} is {value!r:.40}, but must be a number")
    return value


def _guidance_scale(value: Any, model: PlayedModel) -> float | None:
    """The guidance scale for a model that has guidance; None where it is what sample.py takes if it is left out."""
    scale = _number("guidance_scale", value)
    return scale if model.has_guidance and scale != model.guidance_scale else None


def _known(name: str, value: Any, choices: Sequence[str], model: str) -> str:
    if value not in choices:
        raise InputError(f"{name} is {value!r:.40}, but {model} takes one of {', '.join(choices)}")
    return str(value)


def _labels(labels: Any, model: PlayedModel) -> Any:
    """The class labels for a model that has classes: names where these are unique, else numbers; "balanced" without any."""
    if not labels or not model.classes:
        return "balanced"
    return tuple(_known("class_labels", label, model.classes, model.name) for label in labels)


def _prompts(text: Any) -> tuple[str, ...]:
    prompts = tuple(line.strip() for line in str(text or "").splitlines() if line.strip())
    if not prompts:
        raise InputError("prompt is empty; write what to draw, such as: a photo of a red fox")
    if (length := sum(map(len, prompts))) > LONGEST_PROMPT:
        raise InputError(f"prompt has {length} characters, but text encoders read a few hundred; take at most {LONGEST_PROMPT}")
    for prompt in prompts:
        _require_no_flag("prompt", prompt)
    return prompts


def _negative_prompt(text: Any) -> str | None:
    prompt = str(text or "").strip()
    _require_no_flag("negative_prompt", prompt)
    return prompt or None


def _require_no_flag(name: str, prompt: str) -> None:
    if prompt.startswith("-"):
        raise InputError(f"{name} {prompt[:40]!r} begins with a dash, which the command line takes for a flag; begin with a word")
