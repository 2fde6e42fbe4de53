"""`eval.py bias`: what the loss weight of runs changes: errors by timestep, estimates of x_0, images over steps, and a page of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..config.schema.data import DataConfig
from ..config.schema.evaluation import BiasConfig
from ..data.dataset import TrainingData
from ..data.sources.base import Source
from ..data.sources.subset import SourceSubset
from ..data.validation_split import split_source
from ..evaluation.reference import data_of_model, reference_data
from ..utils import seeding
from ..utils.console import say
from ..utils.distributed import inference_accelerator, shared_out
from .bias_report import PAGE, BiasReport, require_output
from .denoising import Errors, fixed_noise, measure_errors, spread_timesteps
from .models import Model, open_model_of, require_same_images, scheduler_of, steps_of
from .sampled import Drawn, job_of, make_bias_measure, swapped_jobs, thresholds
from .swap import require_swappable

ESTIMATED_IMAGES = 3


def measure_bias(config: BiasConfig) -> Path:
    """Measures all runs of a command, writes tables (.csv), figures (.png) and a page with both, and returns the page's path.

    Of several processes each measures whole timesteps and whole numbers of steps, so that the figures are those of one process.

    Raises:
        InputError: models or images cannot be read, or do not fit together.
        CannotWriteError: the output directory cannot be written to.
    """
    folder = Path(config.output_dir)
    require_output(folder)
    accelerator = inference_accelerator(config.num_threads)
    models = [open_model_of(run, config, accelerator) for run in config.runs]
    require_same_images(models)
    steps = steps_of(config, models)
    if config.swap:
        require_swappable(models[0].denoiser, models[1].denoiser, scheduler_of(config, models[0]))
    chosen = reference_data(config, config.reference, config.runs)
    data, candidates, indices = _images(config, chosen, models)
    measure, reference = make_bias_measure(config, chosen, models[0], accelerator.device)
    report = BiasReport(config, models, folder) if accelerator.is_main_process else None
    if report:
        extractor = measure.extractor.name if measure.extractor else None
        report.about(chosen.dataset, len(indices), candidates, len(data.source), extractor)
    x_0, labels = _decoded(data, indices)
    noise = fixed_noise(x_0.shape[1:], config.seed, indices)
    errors = {model.label: _errors(model, x_0, noise, labels, config, accelerator) for model in models}
    if report:
        report.timesteps(errors)
        report.estimates(x_0[:ESTIMATED_IMAGES], noise[:ESTIMATED_IMAGES], None if labels is None else labels[:ESTIMATED_IMAGES])
    every = [(model, count) for model in models for count in steps[model.label]]
    found = shared_out(lambda each: Drawn.of(job_of(each[0], config, each[1], accelerator.device), measure, reference), every, accelerator)
    drawn: dict[str, dict[int, Drawn]] = {model.label: {} for model in models}
    for (model, count), images in zip(every, found):
        drawn[model.label][count] = images
    if report:
        report.steps(drawn)
    if config.swap:
        places, swapped = thresholds(models[0]), swapped_jobs(config, models, accelerator.device)
        found = shared_out(lambda t: Drawn.of(swapped(t), measure, reference), places, accelerator)
        if report:
            report.swap(dict(zip(places, found)))
    if report:
        report.finish()
        say(f"report of {len(models)} runs in {folder / PAGE}, with its tables (.csv) and figures (.png) beside it")
    return folder / PAGE


def _images(config: BiasConfig, chosen: DataConfig, models: Sequence[Model]) -> tuple[TrainingData, int, list[int]]:
    """The data, the number of images that may be taken, and the indices of those on which errors are measured."""
    data = data_of_model(config, chosen, models[0].pipeline, "the runs have")
    candidates = held_out(data.source, [model.values for model in models]) if config.reference is None else range(len(data.source))
    return data, len(candidates), [candidates[k] for k in seeding.subset(config.seed, len(candidates), config.num_images)]


def held_out(source: Source, runs: Sequence[Mapping[str, Any]]) -> Sequence[int]:
    """The indices of the images of a source that all runs held out of training; all indices where there are none.

    `runs` are configurations by flat names, of which `validation_split` and `seed` decide.
    """
    common = set(range(len(source)))
    for values in runs:
        held = split_source(source, values.get("validation_split") or 0.0, values.get("seed") or 0)[1]
        common &= set(held.indices) if isinstance(held, SourceSubset) else set()
    return sorted(common) or range(len(source))


def _decoded(data: TrainingData, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Images (N, C, H, W) in [-1, 1], and labels (N,) of a class-conditional model."""
    images, labels = zip(*(data.decoded(k) for k in indices))
    return torch.stack(images).float() / 127.5 - 1, torch.tensor(labels) if data.num_classes else None


def _errors(model: Model, x_0: Tensor, noise: Tensor, labels: Tensor | None, config: BiasConfig, accelerator: Any) -> Errors:
    device, timesteps = model.pipeline.device, spread_timesteps(len(model.denoiser.schedule), config.num_timesteps)
    given = None if labels is None else labels.to(device)
    x_0, noise = x_0.to(device), noise.to(device)
    total = -(-len(timesteps) // accelerator.num_processes)
    with tqdm(total=total, desc=model.label, unit="timestep", leave=False, disable=not accelerator.is_main_process) as progress:

        def measured(t: int) -> Errors:
            return measure_errors(model.denoiser, x_0, noise, given, [t], config.batch_size, progress.update)

        return Errors.joined(shared_out(measured, timesteps, accelerator))
