"""Images that are sampled at different numbers of steps, or with two networks, and compared with a reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..config.registry import METRICS
from ..config.schema.data import EMBEDDED, DataConfig
from ..config.schema.evaluation import BiasConfig, MeasureConfig
from ..config.schema.sampling import SampleConfig
from ..data.sources.opening import open_readable, open_source
from ..errors import InputError
from ..evaluation import metrics
from ..evaluation.image_sets import images_of_source, process_batches, to_rgb
from ..evaluation.measure import Measure, extractor_of_metrics, usual_extractor
from ..evaluation.metrics import COLOUR, Sample
from ..sampling.generate import make_job
from ..sampling.job import Job
from ..sampling.text_job import shrunk
from .denoising import mean_and_interval
from .models import Model, scheduler_of
from .swap import SwappedUNet

SHOWN_SAMPLES = 4  # of each number of steps
THRESHOLDS = 11


def make_bias_measure(config: BiasConfig, chosen: DataConfig, values: Mapping[str, Any], device: Any) -> Measure:
    """How sampled images are compared with the reference; `values` are the configuration of the first run, if it is one.

    Without `metrics` and a named extractor only the data sets of the package are compared by features: other extractors are downloaded.

    Raises:
        InputError: too few images are sampled for the metrics, or the reference has too few.
    """
    extractor = config.feature_extractor or extractor_of_metrics(config.metrics or "colour")
    file = config.feature_extractor_weights
    if extractor is None:
        extractor, file = values.get("feature_extractor"), file or values.get("feature_extractor_weights")
    default = "fid,colour" if chosen.dataset in EMBEDDED or extractor or file else "colour"
    asked = MeasureConfig(
        metrics=config.metrics or default,
        feature_extractor_weights=file,
        batch_size=config.batch_size,
        cache_dir=config.cache_dir,
    )
    measure = Measure(asked, extractor or usual_extractor(str(chosen.dataset), asked.metrics), device)
    least = metrics.least_images(measure.layers, measure.probe())
    if config.num_samples < (most := max(least.values())):
        raise InputError(f"num_samples is {config.num_samples}, but metrics {asked.metrics} need {most}; take more, or --metrics colour")
    compared = [count for metric, count in least.items() if METRICS[metric].reference != "nothing"]
    if (there := len(open_source(chosen))) < (most := max(compared, default=0)):
        raise InputError(f"reference {chosen.dataset} has {there} images, but metrics {asked.metrics} need {most}; take others")
    return measure


def features_of_reference(measure: Measure, chosen: DataConfig, side: int, channels: int) -> Sample:
    """Of the images of the reference as the models draw them, with `side` pixels and so many channels."""
    images = images_of_source(open_readable(chosen), str(chosen.dataset), side, channels=1 if channels == 1 else None)
    return measure.sample(images)


@dataclass(frozen=True)
class Drawn:
    """Images that were sampled, compared with the reference."""

    first: Tensor  # (n, 3, H, W) uint8, of at most 256 pixels a side
    figures: dict[str, float]
    colour_bias: list[tuple[float, float, float]]  # by channel, in grey levels of 255: mean and 95% interval

    @staticmethod
    def of(job: Job, measure: Measure, reference: Sample, channels: int) -> Drawn:
        """Samples the images of a job, which have so many channels."""
        first: list[Tensor] = []

        def batches() -> Iterator[tuple[int, Tensor, None]]:
            for number, indices in process_batches(range(job.config.num_images), job.batch_size, 0, 1):
                batch = to_rgb(job.draw(indices)).cpu()
                if len(first) < SHOWN_SAMPLES:
                    first.extend(shrunk(batch[: SHOWN_SAMPLES - len(first)]))
                yield number, batch, None

        with tqdm(total=job.config.num_images, desc=job.name, unit="image", leave=False) as progress:
            sample = measure.joined(batches(), progress)
        away = sample.features[COLOUR].double() - torch.from_numpy(reference.moments(COLOUR)["mu"])
        bias = [mean_and_interval(away[:, c]) for c in range(channels)]
        return Drawn(torch.stack(first), metrics.figures(sample, reference, measure.layers, job.config.seed), bias)


def job_of(model: Model, config: BiasConfig, steps: int, device: Any) -> Job:
    """The sampling command of a model with so many steps, for the same seeds whatever the model and the steps."""
    if model.job:
        return model.job.with_steps(model.scheduler, steps)
    command = SampleConfig(
        model=model.name,
        scheduler=scheduler_of(config, model),
        steps=steps,
        num_images=config.num_samples,
        batch_size=config.batch_size,
        seed=config.seed,
        weights=config.weights,
        class_labels="data",
        allow_pickle_import=config.allow_pickle_import,
    )
    return make_job(command, device)


def thresholds(model: Model) -> list[int]:
    """The timesteps from which on the network of the first model predicts, in turn: from 0 (all) to one after the last (none)."""
    end = model.denoiser.schedule.timesteps[-1].item() + 1  # the last is T - 1, or T of a flow
    return [round(k * end / (THRESHOLDS - 1)) for k in range(THRESHOLDS)]


def swapped_jobs(config: BiasConfig, models: Sequence[Model], device: Any) -> Callable[[int], Job]:
    """A function: a threshold to a job with the network of the first model from that timestep on and of the second below it."""
    job = job_of(models[0], config, config.swap_steps, device)
    first, second = (replace(model.denoiser, network=model.pipeline.unet) for model in models)
    swapped = job.pipeline.unet = SwappedUNet(first, second, 0)

    def at_threshold(threshold: int) -> Job:
        swapped.threshold = threshold
        return job

    return at_threshold
