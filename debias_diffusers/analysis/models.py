"""The models of an analysis: loaded, of the same images, with what they were trained with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.loading import layered
from ..config.schema.evaluation import BiasConfig
from ..config.schema.objective import ObjectiveConfig
from ..config.schema.types import SchedulerName
from ..errors import InputError
from ..hub import client
from ..hub.model_card import step_of_card
from ..pipelines.pixel_pipeline import PixelPipeline
from ..pipelines.solvers import make_scheduler
from ..runs.run_directory import run_values
from ..sampling.generate import open_model, pinned_model
from .denoising import Denoiser

STEPS = (2, 3, 4, 5, 10, 20, 50, 100, 250, 1000)


@dataclass(frozen=True)
class Model:
    """A run that is measured."""

    name: str  # as in the command, with the commit of a Hub id
    label: str  # in figures
    pipeline: PixelPipeline
    denoiser: Denoiser
    values: dict[str, Any]  # its configuration by flat names; empty if it is no run
    step: int | None  # the training step of its weights, where it is known

    @property
    def objective(self) -> ObjectiveConfig | None:
        """What it was trained with; None if it is no run."""
        return layered(self.values).objective if self.values else None


def open_model_of(run: str, config: BiasConfig, accelerator: Any) -> Model:
    """Loads a run of a command. Raises InputError as `open_model`."""
    name = pinned_model(run, accelerator)
    pipeline = open_model(name, config.weights, config.allow_pickle_import)
    pipeline.to(accelerator.device)
    folder = client.configurations(name)
    label = Path(run).name if len({Path(other).name for other in config.runs}) == len(config.runs) else run
    return Model(name, label, pipeline, Denoiser.of(pipeline), run_values(folder) or {}, step_of_card(folder / "README.md"))


def require_same_images(models: Sequence[Model]) -> None:
    """Raises InputError unless all models are of images of one size, with the same channels and classes."""
    kinds = [(m.pipeline.unet.config.sample_size, m.pipeline.unet.config.in_channels, m.pipeline.num_classes) for m in models]
    for model, kind in zip(models, kinds):
        if kind != kinds[0]:
            one, other = (f"{side} pixels, {channels} channels and {classes} classes" for side, channels, classes in (kinds[0], kind))
            raise InputError(f"{models[0].name} has {one}, but {model.name} has {other}; name runs of the same images")


def steps_of(config: BiasConfig, models: Sequence[Model]) -> dict[str, list[int]]:
    """The numbers of inference steps by label. Raises InputError if the scheduler of a model cannot make one of them."""
    found = {}
    for model in models:
        own, T = model.pipeline.scheduler, len(model.denoiser.schedule)
        found[model.label] = sorted(config.steps or (count for count in STEPS if count <= T))
        for count in {*found[model.label], *((config.swap_steps,) if config.swap else ())}:
            make_scheduler(scheduler_of(config, model), own, "linspace", count)
    return found


def scheduler_of(config: BiasConfig, model: Model) -> SchedulerName:
    """The solver of a model: the same kind for all, Euler's method, which is the one of the paper (ddim) where there are betas."""
    return config.scheduler or ("flow_euler" if model.denoiser.prediction_type == "flow" else "ddim")
