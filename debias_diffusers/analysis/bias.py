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
from ..data.sources.base import Source
from ..data.sources.subset import SourceSubset
from ..data.validation_split import split_source
from ..evaluation.measure import Measure
from ..evaluation.reference import data_of_model, reference_data
from ..runs.run_directory import run_values
from ..sampling.generate import require_same_weights
from ..sampling.job import Job, batch_size_of
from ..utils import seeding
from ..utils.console import say
from ..utils.distributed import inference_accelerator, shared_out, told_by_the_first
from ..utils.torch_errors import explained_torch_errors
from .bias_report import PAGE, BiasReport, require_output
from .denoising import Errors, MeanColours, fixed_noise, measure_errors, spread_timesteps
from .models import Examples, Model, folders_of, open_models, require_same_images, scheduler_of, steps_of
from .sampled import Drawn, features_of_reference, job_of, make_bias_measure, swapped_jobs, thresholds
from .swap import require_swappable
from .text_models import TextImages, require_same_conditions


@told_by_the_first()
def measure_bias(config: BiasConfig) -> Path:
    """Measures all runs of a command, writes tables (.csv), figures (.png) and a page with both, and returns the page's path.

    Of several processes each measures whole timesteps and whole numbers of steps, so that the figures are those of one process.

    Raises:
        InputError: models or images cannot be read, or do not fit together; or the device has too little memory.
        CannotWriteError: the output directory cannot be written to.
    """
    require_output(Path(config.output_dir))
    accelerator = inference_accelerator(config.num_threads)
    device = accelerator.device
    folders = folders_of(config, accelerator)
    chosen = reference_data(config, config.reference, config.runs)
    measure = make_bias_measure(config, chosen, run_values(next(iter(folders.values()))) or {}, device)  # before the models are loaded
    with explained_torch_errors("--batch_size", 1):  # no batch is too large here: networks are
        models = open_models(config, folders, device)
    for model in models:
        require_same_weights(model.fingerprint, model.name, accelerator)
    steps = steps_of(config, models)
    if config.swap:
        require_swappable(models[0].denoiser, models[1].denoiser, scheduler_of(config, models[0]))
    images = (TextImages if models[0].task == "text_to_image" else PixelImages)(config, chosen, models)
    batch_size = batch_size_of(config.batch_size, max(config.num_images, config.num_samples), images.side, images.side)
    with explained_torch_errors("--batch_size", batch_size):
        return _measured(config, chosen, models, images, steps, measure, batch_size, accelerator)


def _measured(
    config: BiasConfig,
    chosen: DataConfig,
    models: Sequence[Model],
    images: PixelImages | TextImages,
    steps: Mapping[str, Sequence[int]],
    measure: Measure,
    batch_size: int,
    accelerator: Any,
) -> Path:
    folder, device = Path(config.output_dir), accelerator.device
    runs = [model.values for model in models if model.values]  # a base model beside its LoRA is none
    candidates = held_out(images.source, runs) if config.reference is None else range(len(images.source))
    indices = [candidates[k] for k in seeding.subset(config.seed, len(candidates), config.num_images)]
    reference = features_of_reference(measure, chosen, images.side, images.channels)
    examples = images.examples(indices)
    models = [images.conditioned(model, examples, device) for model in models]
    if config.swap:
        require_same_conditions(*models)
    report = BiasReport(config, models, folder, images.channels) if accelerator.is_main_process else None
    if report:
        extractor = measure.extractor.name if measure.extractor else None
        report.about(chosen.dataset, len(indices), len(candidates), len(images.source), extractor)
    noise = fixed_noise(examples.x_0.shape[1:], config.seed, indices)
    colours = images.colours(examples.x_0)
    errors = {model.label: _errors(model, examples, noise, colours, config.num_timesteps, batch_size, accelerator) for model in models}
    if report:
        report.timesteps(errors)
        report.estimates(examples, noise, images.pictures)
    every = [(model, count) for model in models for count in steps[model.label]]

    def compared(job: Job) -> Drawn:
        return Drawn.of(job, measure, reference, images.channels)

    found = shared_out(lambda each: compared(job_of(each[0], config, each[1], device)), every, accelerator)
    drawn: dict[str, dict[int, Drawn]] = {model.label: {} for model in models}
    for (model, count), sampled in zip(every, found):
        drawn[model.label][count] = sampled
    if report:
        report.steps(drawn)
    if config.swap:
        places, swapped = thresholds(models[0]), swapped_jobs(config, models, device)
        found = shared_out(lambda t: compared(swapped(t)), places, accelerator)
        if report:
            report.swap(dict(zip(places, found)))
    if report:
        report.finish()
        say(f"report of {len(models)} runs in {folder / PAGE}, with its tables (.csv) and figures (.png) beside it")
    return folder / PAGE


class PixelImages:
    """The images of a reference, with their labels, as pixel models see them."""

    def __init__(self, config: BiasConfig, chosen: DataConfig, models: Sequence[Model]) -> None:
        """Raises InputError: the models are of different images, or the data cannot be read, or have other classes."""
        require_same_images(models)
        pipeline = models[0].pipeline
        self.side, self.channels = pipeline.unet.config.sample_size, pipeline.unet.config.in_channels
        self.data = data_of_model(config, chosen, pipeline, "the runs have")
        self.source = self.data.source

    def examples(self, indices: Sequence[int]) -> Examples:
        """The images of some indices. Raises InputError where one cannot be read."""
        images, labels = zip(*(self.data.decoded(k) for k in indices))
        return Examples(indices, torch.stack(images).float() / 127.5 - 1, torch.tensor(labels) if self.data.num_classes else None)

    def conditioned(self, model: Model, examples: Examples, device: Any) -> Model:
        """The model, whose network is given labels."""
        return model

    def colours(self, x_0: Tensor) -> None:
        """Nothing is decoded."""

    def pictures(self, x_0: Tensor) -> Tensor:
        """The images."""
        return x_0.cpu()


def held_out(source: Source, runs: Sequence[Mapping[str, Any]]) -> Sequence[int]:
    """The indices of the images of a source that all runs held out of training; all indices where there are none.

    `runs` are configurations by flat names, of which `validation_split` and `seed` decide.
    """
    common = set(range(len(source)))
    for values in runs:
        held = split_source(source, values.get("validation_split") or 0.0, values.get("seed") or 0)[1]
        common &= set(held.indices) if isinstance(held, SourceSubset) else set()
    return sorted(common) or range(len(source))


def _errors(
    model: Model, examples: Examples, noise: Tensor, colours: MeanColours | None, num_timesteps: int, batch_size: int, accelerator: Any
) -> Errors:
    device, timesteps = model.pipeline.device, spread_timesteps(len(model.denoiser.schedule), num_timesteps)
    given = None if examples.conditions is None else examples.conditions.to(device)
    x_0, noise = examples.x_0.to(device), noise.to(device)
    total = -(-len(timesteps) // accelerator.num_processes)
    with tqdm(total=total, desc=model.label, unit="timestep", leave=False, disable=not accelerator.is_main_process) as progress:

        def measured(t: int) -> Errors:
            return measure_errors(model.denoiser, x_0, noise, given, [t], batch_size, progress.update, colours)

        return Errors.joined(shared_out(measured, timesteps, accelerator))
