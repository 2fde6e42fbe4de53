"""Sampling with pixel models: class labels, guidance by dropped labels, clipping."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..config.schema.sampling import SampleConfig
from ..data.labels import ambiguous_labels, label_indices, nonempty_classes, proportional_labels, shortened_list
from ..errors import InputError
from ..hub import client
from ..pipelines.pixel_pipeline import PixelPipeline, check_labels, load_pipeline
from ..pipelines.solvers import set_timesteps
from ..runs.model_folder import check_sampling
from ..utils.seeding import uniform
from .job import (
    Conditions,
    Job,
    LoadedModel,
    Solver,
    folder_name,
    image_generators,
    image_seeds,
    make_ready,
    make_solver,
    no_stop,
    open_weights,
    require_dtype,
    settings_of,
)

_OPTIONS = ("guidance_scale", "guidance_interval", "eta", "clipping", "clipping_quantile")
_SETTINGS = (*_OPTIONS, "spacing", "seed", "class_labels", "dtype", "format")


def draw(pipeline: PixelPipeline, indices: Sequence[int], seed: int, labels: Sequence[int] | None = None, **options: Any) -> Tensor:
    """Samples the images of some indices in one batch, (B, C, H, W) uint8, each from its own CPU generator.

    So the noise of an image depends neither on its batch nor on the device. `labels` has B labels; `options` go to the pipeline.
    """
    output: Any = pipeline(
        batch_size=len(indices), class_labels=labels, generator=image_generators(seed, indices), output_type="pt", **options
    )
    drawn: Tensor = (output.images * 255).round().to(torch.uint8)
    return drawn


@dataclass(frozen=True)
class PixelJob(Job):
    """A sampling command with a pixel model."""

    asked: Any  # the class labels of the command, before those that the model does not know were replaced

    def draw(self, indices: Sequence[int], **more: Any) -> Tensor:
        """Samples the images of these indices, (B, C, H, W) uint8."""
        return draw(self.pipeline, indices, self.config.seed, self.labels(indices), **self.options, **more)

    def watch(
        self, indices: Sequence[int], calls: Sequence[int], on_call: Callable[[int], None] = no_stop, first: int | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        seen: list[tuple[Tensor, Tensor]] = []

        def record(_: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> None:
            if step in calls:
                seen.append((tensors["x_t"][:first].cpu(), tensors["x_0"][:first].cpu()))
            on_call(step)

        asked = ("x_t", "x_0") if calls else ()  # not every scheduler can say x_0
        return self.draw(indices, callback_on_step_end=record, callback_on_step_end_tensor_inputs=asked), seen

    def conditions(self, indices: Sequence[int]) -> Conditions:
        return Conditions(self.labels(indices), self.pipeline.class_names)

    def notes(self) -> list[str]:
        """Warnings about labels that are ambiguous or that the model was not trained on."""
        if not isinstance(self.asked, tuple):
            return []
        names, counts = self.pipeline.class_names, self.pipeline.class_counts
        found = list(ambiguous_labels(self.asked, names))
        if counts and (untrained := sorted({k for k in label_indices(self.asked, names) if not counts[k]})):
            classes = shortened_list(names[k] if names else k for k in untrained)
            found.append(f"warning: the model was trained on no images of class {classes}")
        return found

    @property
    def size(self) -> tuple[int, int]:
        size = self.pipeline.unet.config.sample_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def labels(self, indices: Sequence[int]) -> list[int] | None:
        """The label of each image; None for an unconditional model."""
        cycle = self._label_cycle
        if not cycle:
            return None
        if self.config.class_labels == "drawn":
            return [cycle[int(uniform(0, "class label", seed) * len(cycle))] for seed in image_seeds(self.config.seed, indices)]
        return [cycle[k % len(cycle)] for k in indices]

    @cached_property
    def _label_cycle(self) -> list[int]:
        """The labels that images get in turn, repeated."""
        wanted, pipeline = self.config.class_labels, self.pipeline
        if isinstance(wanted, tuple):
            return label_indices(wanted, None)
        if wanted == "data":
            return proportional_labels(pipeline.class_counts or [], self.config.num_images)
        return trained_labels(pipeline)


def load_pixel_model(config: SampleConfig, device: Any, step: int | None = None) -> LoadedModel:
    """As `generate.load_model`, for a pixel model."""
    require_dtype(config, device)
    pipeline, step = open_weights(_loader(config.model, config.allow_pickle_import), config.model, config.weights, step)
    loaded = LoadedModel(pipeline, pipeline.scheduler, step, fingerprint(pipeline))
    make_ready(pipeline, config, device)
    return loaded


def make_pixel_job(config: SampleConfig, device: Any, step: int | None = None, loaded: LoadedModel | None = None) -> PixelJob:
    """As `generate.make_job`, for a pixel model."""
    check_sampling(config, client.configurations(config.model))
    config = replace(config, guidance_scale=1.0 if config.guidance_scale is None else config.guidance_scale)
    loaded = loaded or load_pixel_model(config, device, step)
    pipeline = loaded.pipeline
    solver = make_solver(config, loaded.scheduler, config.clipping)
    pipeline.scheduler = solver.scheduler
    _require_guided_steps(config, solver)
    asked = config.class_labels
    config = replace(config, class_labels=_class_labels(config, pipeline))
    settings = settings_of(config, solver.settings(), _SETTINGS, loaded)
    options = {field: getattr(config, field) for field in _OPTIONS}
    options |= {"num_inference_steps": solver.steps, "timesteps": solver.timesteps}
    name = folder_name(config, f"{solver.name}-{solver.steps}", _SETTINGS, SampleConfig(model="", guidance_scale=1.0))
    return PixelJob(config, pipeline, name, settings, options, asked)


def _require_guided_steps(config: SampleConfig, solver: Solver) -> None:
    """Raises InputError for an interval of guidance that no step of the solver falls into."""
    if config.guidance_interval is None:
        return
    set_timesteps(solver.scheduler, solver.steps, solver.timesteps)
    (low, high), timesteps = config.guidance_interval, solver.scheduler.timesteps
    if not ((timesteps >= low) & (timesteps <= high)).any():
        there = shortened_list(f"{t:g}" for t in timesteps.tolist())
        raise InputError(f"guidance_interval is {low} {high}, but no step is there, but at {there}; take another, or leave it out")


def _loader(model: str, allow_pickle: bool) -> Any:
    return lambda variant: load_pipeline(model, allow_pickle, variant)


def _class_labels(config: SampleConfig, pipeline: PixelPipeline) -> Any:
    """The class_labels of a command with names as label indices, and "balanced" instead of "data" if class counts are unknown."""
    wanted, guidance_scale = config.class_labels, config.guidance_scale or 0.0
    if wanted == "drawn" and not pipeline.num_classes:
        raise InputError("class_labels is drawn, but the model is unconditional; leave it out")
    if isinstance(wanted, tuple):
        wanted = tuple(label_indices(wanted, pipeline.class_names)) if pipeline.num_classes else wanted
        check_labels(pipeline, wanted, guidance_scale)
    else:
        check_labels(pipeline, trained_labels(pipeline) or None, guidance_scale)
    return "balanced" if wanted == "data" and not any(pipeline.class_counts or ()) else wanted


def trained_labels(pipeline: PixelPipeline) -> list[int]:
    """The labels of classes that the model was trained on; all labels if the model does not say."""
    return nonempty_classes(pipeline.class_counts or ()) or list(range(pipeline.num_classes))


def open_model(model: str, weights: str = "ema", allow_pickle: bool = False) -> PixelPipeline:
    """Loads a model with the wanted weights, from a run, a pipeline folder or a Hub id.

    Args:
        model: path or Hub id.
        weights: "ema", "raw", or an EMA rate; for a model that is not a run directory, a rate names a variant of its weights.
        allow_pickle: as in `load_pipeline`.

    Raises:
        InputError, HubError: as `load_pipeline`; or the model does not have these weights.
    """
    pipeline: PixelPipeline = open_weights(_loader(model, allow_pickle), model, weights, step=None)[0]
    return pipeline


def fingerprint(pipeline: PixelPipeline) -> str:
    """A hash of the weights and of the model's own scheduler."""
    digest = hashlib.sha256(safetensors.torch.save(pipeline.unet.state_dict()))
    digest.update(pipeline.scheduler.to_json_string().encode())
    return digest.hexdigest()
