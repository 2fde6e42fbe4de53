"""What would be trained, without training: configuration, size of the network, length of an epoch, picture of the first batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..config.loading import to_json
from ..config.schema import TrainConfig
from ..data import images
from ..data.dataset import PositionBatchSampler, micro_batches
from ..data.sources import open_source, training_summary
from ..diffusion.loss import Objective, make_objective
from ..diffusion.noise_schedule import require_noise_at_the_end
from ..diffusion.timestep_samplers import make_timestep_sampler
from ..diffusion.weighting import effective_sample_size
from ..errors import InputError
from ..tasks.pixel_data import look_alone
from ..tasks.pixels import PixelTask, network_arguments
from ..tasks.unet import build_unet
from ..utils.console import say
from ..utils.files import require_replaceable, write_file

FIRST_IMAGES = 64  # in the picture of the first batch


def dry_run(config: TrainConfig) -> None:
    """Prints what would be trained, and writes OUTPUT_DIR-first-batch.png.

    Raises:
        InputError: the configuration cannot be trained, or the network does not fit the data.
    """
    objective = make_objective(config.objective)
    require_noise_at_the_end(config.objective, objective.schedule)
    picture = Path(f"{Path(config.run.output_dir or '')}-first-batch.png")
    require_replaceable("picture of the first batch", picture, lambda path: images.software(path) == images.SOFTWARE)
    print(to_json(config), end="")
    try:
        source, channels = look_alone(config, open_source(config.data))
    except InputError as error:
        if config.data.channels and not config.data.class_conditional:
            print(f"parameters: {_count_parameters(network_arguments(config, config.data.channels, 0))}")
        print(f"what else depends on the data: unknown, because they cannot be seen ({error})")
        return
    _print_weights(config, objective)
    for sentence in training_summary(source, config.data.dataset):
        say(sentence)
    task = PixelTask(config, source, channels)
    _print_task(config, task)
    first = PositionBatchSampler(min(config.optimization.batch_size, FIRST_IMAGES), config.optimization.batch_size, 0, 1, range(1))
    (batch,) = micro_batches(task.data, first, pin_memory=False)
    write_file(picture, images.signed_png(images.grid([images.from_array(image.numpy()) for image in batch["image"]])))
    print(f"first batch: {picture}")


def _print_weights(config: TrainConfig, objective: Objective) -> None:
    if objective.weights is None:
        return
    sampler = make_timestep_sampler(config.objective, objective.schedule)
    weights, p = sampler.corrections * objective.weights, sampler.probabilities
    size = effective_sample_size(weights, p)
    print(f"weights as t is drawn: mean {(p * weights).sum():.4g}, largest {weights.max():.4g}, effective sample size {size:.2g}")


def _print_task(config: TrainConfig, task: PixelTask) -> None:
    print(f"parameters: {_count_parameters(task.arguments)}")
    if config.optimization.init:
        for sentence in task.load(task.build(), config.optimization.init):
            print(f"warning: {sentence}")
    images_of_all, data = len(task.data.source), task.data
    print(f"images: {images_of_all}, {data.channels} channel(s), {data.num_classes} classes")
    print(f"steps per epoch: {images_of_all / config.optimization.batch_size:.1f}")


def _count_parameters(arguments: dict[str, Any]) -> int:
    with torch.device("meta"):  # no memory
        return sum(p.numel() for p in build_unet(arguments).parameters())
