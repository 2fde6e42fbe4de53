"""The models of an analysis and the images on which they are measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config.loading import layered
from ..config.schema.evaluation import BiasConfig
from ..config.schema.objective import ObjectiveConfig
from ..config.schema.sampling import SampleConfig
from ..config.schema.types import SchedulerName, Task
from ..diffusion.noise_schedule import is_flow
from ..errors import InputError, raise_all
from ..hub import client
from ..hub.model_card import step_of_card
from ..pipelines.solvers import make_scheduler
from ..runs.model_folder import bias_model_problems, is_lora, task_of
from ..runs.run_directory import run_values
from ..sampling.generate import pinned_model
from ..sampling.job import LoadedModel
from ..sampling.pixel_job import fingerprint, open_model
from ..sampling.text_job import TextJob, load_text_to_image
from .denoising import Denoiser
from .run_files import labels_of

STEPS = (2, 3, 4, 5, 10, 20, 50, 100, 250, 1000)


@dataclass(frozen=True)
class Model:
    """A run that is measured."""

    name: str  # as in the command, with the commit of a Hub id
    label: str  # in figures
    pipeline: Any  # a PixelPipeline, or the stock pipeline of a text-to-image model
    scheduler: Any  # that it was saved with
    fingerprint: str  # hash of weights and scheduler
    denoiser: Denoiser
    values: dict[str, Any]  # its configuration by flat names; empty if it is no run
    step: int | None  # the training step of its weights, where it is known
    task: Task
    is_lora: bool
    job: TextJob | None = None  # of a text-to-image model, with its prompts; for several numbers of steps

    @property
    def objective(self) -> ObjectiveConfig | None:
        """What it was trained with; None if it is no run."""
        return layered(self.values).objective if self.values else None


@dataclass(frozen=True)
class Examples:
    """N images on which errors are measured. All tensors on the CPU."""

    indices: Sequence[int]  # in the reference
    x_0: Tensor  # (N, C, H, W) in [-1, 1], or latents
    conditions: Tensor | None  # (N,) labels of a class-conditional model; of a text-to-image model, 0 to N - 1
    time_ids: Tensor | None = None  # (N, 6) for text-to-image models
    captions: Sequence[str | None] = ()  # for text-to-image models, N; None of an image that has none


def folders_of(config: BiasConfig, accelerator: Any) -> dict[str, Path]:
    """Folders with the configuration files of the runs of a command, by their names, with the commit of a Hub id.

    Raises:
        InputError: they are of two kinds, or the command has flags for the other kind, or two are the same.
    """
    folders = {name: client.configurations(name) for name in (pinned_model(run, accelerator) for run in config.runs)}
    if len(folders) < len(config.runs):
        raise InputError(f"runs is {' '.join(config.runs)}, but each can be named once")
    raise_all(bias_model_problems(config, folders))
    return folders


def open_models(config: BiasConfig, folders: Mapping[str, Path], device: Any) -> list[Model]:
    """Loads the runs of a command, of which `folders_of` has the configuration files.

    Raises:
        InputError: one of them cannot be loaded.
    """
    named = zip(folders.items(), labels_of(config.runs))
    return [_open(name, folder, label, config, device) for (name, folder), label in named]


def _open(name: str, folder: Path, label: str, config: BiasConfig, device: Any) -> Model:
    task, lora = task_of(folder), is_lora(folder)
    if task == "text_to_image":
        loaded = _open_text_to_image(name, lora, config, device)
        pipeline, own = loaded.pipeline, loaded.fingerprint
    else:
        pipeline = open_model(name, config.weights, config.allow_pickle_import).to(device)
        own = fingerprint(pipeline)
    values, step = run_values(folder) or {}, step_of_card(folder / "README.md")
    return Model(name, label, pipeline, pipeline.scheduler, own, Denoiser.of(pipeline), values, step, task, lora)


def _open_text_to_image(name: str, lora: bool, config: BiasConfig, device: Any) -> LoadedModel:
    """A model whose UNet has gradients, of its adapters alone if it has some, and keeps few activations for them."""
    command = SampleConfig(model=name, weights=config.weights, base_model=config.base_model if lora else None)
    loaded = load_text_to_image(command, device)
    loaded.pipeline.unet.enable_gradient_checkpointing()
    for parameter_name, parameter in loaded.pipeline.unet.named_parameters():
        parameter.requires_grad_(not lora or ".lora_" in parameter_name)
    return loaded


def require_same_images(models: Sequence[Model]) -> None:
    """Raises InputError unless all pixel models are of images of one size, with the same channels and classes."""
    kinds = [(m.pipeline.unet.config.sample_size, m.pipeline.unet.config.in_channels, m.pipeline.num_classes) for m in models]
    for model, kind in zip(models, kinds):
        if kind != kinds[0]:
            one, other = (f"{side} pixels, {channels} channels and {classes} classes" for side, channels, classes in (kinds[0], kind))
            raise InputError(f"{models[0].name} has {one}, but {model.name} has {other}; name runs of the same images")


def steps_of(config: BiasConfig, models: Sequence[Model]) -> dict[str, list[int]]:
    """The numbers of inference steps by label. Raises InputError if the scheduler of a model cannot make one of them."""
    found = {}
    for model in models:
        own, T = model.scheduler, len(model.denoiser.schedule)
        found[model.label] = sorted(config.steps or (count for count in STEPS if count <= T))
        for count in {*found[model.label], *((config.swap_steps,) if config.swap else ())}:
            make_scheduler(scheduler_of(config, model), own, "linspace", count)
    return found


def scheduler_of(config: BiasConfig, model: Model) -> SchedulerName:
    """The solver of a model: the same kind for all, Euler's method, which is the one of the paper (ddim) where there are betas."""
    return config.scheduler or ("flow_euler" if is_flow(model.scheduler) else "ddim")
