"""Samples images into a folder. Image k of seed s has its own generator, seeded with (s * 2654435761 + k) mod 2^32."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from ..config import hub_names
from ..config.schema.sampling import SampleConfig
from ..data import images
from ..data.image_folders import GRID, PACKED, TRAJECTORY
from ..errors import InputError, raise_all
from ..hub import client
from ..runs import checkpoints
from ..runs.lora_folder import with_strength
from ..runs.model_folder import task_of
from ..runs.run_directory import SAMPLES, sampling_problems
from ..utils.console import say
from ..utils.distributed import broadcast_from_first, gather_from_all, inference_accelerator, told_by_the_first
from ..utils.files import acquire_lock, write_file
from ..utils.torch_errors import explained_torch_errors
from .image_writer import ImageWriter, SampleFolder, require_sample_folder
from .job import Job, LoadedModel, batches, image_seeds, to_bytes
from .pixel_job import load_pixel_model, make_pixel_job
from .text_job import load_text_to_image, make_text_job

TRAJECTORY_IMAGES, TRAJECTORY_STEPS = 6, 10


@told_by_the_first()
def sample(config: SampleConfig) -> Path:
    """Samples the images of a command into its folder, distributed over all processes, and returns the folder.

    Images that the folder already has are not sampled again.

    Raises:
        InputError: the model, its labels, or the folder do not fit the command.
        RunInUseError: another command writes into the folder.
    """
    raise_all(sampling_problems(config.model, config.output_dir))
    accelerator = inference_accelerator(config.num_threads)
    if accelerator.is_main_process and config.output_dir:  # before the model is loaded
        require_sample_folder(Path(config.output_dir))
    loras = tuple(f"{pinned_model(name, accelerator)}:{strength}" for name, strength in map(with_strength, config.lora))
    config = replace(config, model=pinned_model(config.model, accelerator), lora=loras)
    job = make_job(config, accelerator.device)
    require_same_weights(job.settings["model_sha256"], config.model, accelerator)
    if config.class_labels == "data" and job.config.class_labels != "data":
        raise InputError(
            "class_labels is data, but the model does not say how many images of which classes it was trained on; leave it out"
        )
    for note in job.notes() if accelerator.is_main_process else ():
        say(note)
    folder = Path(config.output_dir) if config.output_dir else broadcast_from_first(lambda: default_folder(job), accelerator)
    if accelerator.is_main_process:
        require_sample_folder(folder)
    with explained_torch_errors("--batch_size", job.batch_size):
        _draw_into(SampleFolder(folder, config.format, config.num_images), job, accelerator)
    return folder


def default_folder(job: Job) -> Path:
    """The folder of a job's images in its run: samples/NAME, unless that holds images of another model, or more of them.

    Then the step of the model, or the number of images, is a part of its name, too. With `overwrite` it is always samples/NAME.
    """
    config = job.config
    samples = SampleFolder(Path(config.model) / SAMPLES / job.name, config.format, config.num_images)
    if config.overwrite:
        return samples.folder
    if (step := job.settings["model_step"]) is not None and samples.other_content(_with_count(job.settings, samples)):
        samples = samples.beside(checkpoints.folder_name(step))
    return samples.beside(f"num_images-{config.num_images}").folder if samples.beyond() else samples.folder


def pinned_model(model: str, accelerator: Accelerator) -> str:
    """Adds the current commit to a Hub id, the same in all processes; returns a path unchanged."""
    return broadcast_from_first(lambda: client.pinned(model), accelerator) if hub_names.is_model_id(model) else model


def make_job(config: SampleConfig, device: Any, step: int | None = None, loaded: LoadedModel | None = None) -> Job:
    """Loads the model of a command, sets its solver and moves it to a device.

    Args:
        config: the command.
        device: of the network.
        step: load the weights of the run's checkpoint at this step; if None, the exported weights or the newest checkpoint.
        loaded: of `load_model` for a command with the same model, weights, LoRAs and dtype, in place of loading it again. A job that was
            made of it before can no longer be drawn.

    Raises:
        InputError: there is no such model, or it does not fit the command.
    """
    make = make_text_job if task_of(client.configurations(config.model)) == "text_to_image" else make_pixel_job
    return make(config, device, step, loaded)


def load_model(config: SampleConfig, device: Any, step: int | None = None) -> LoadedModel:
    """Loads the model of a command, of which `make_job` can make several jobs; `step` as there.

    Raises:
        InputError: there is no such model, or it does not have these weights.
    """
    load = load_text_to_image if task_of(client.configurations(config.model)) == "text_to_image" else load_pixel_model
    return load(config, device, step)


def require_same_weights(own: str, model: str, accelerator: Accelerator) -> None:
    """Raises InputError, in all processes, where they have loaded other weights of a model, as of a run that has saved meanwhile.

    `own` is the fingerprint of those of this process.
    """
    if len(set(gather_from_all(lambda: [own], accelerator.num_processes))) > 1:
        raise InputError(f"{model} was saved anew while the processes loaded it; start again")


def _draw_into(samples: SampleFolder, job: Job, accelerator: Accelerator) -> None:
    """Samples the missing images; process r of n takes every n-th batch."""
    with acquire_lock(samples.folder) if accelerator.is_main_process else contextlib.nullcontext():
        # Only the first process lists the folder: files may appear while others list it.
        missing = {*broadcast_from_first(lambda: samples.begin(_with_count(job.settings, samples), job.config.overwrite), accelerator)}
        # The bounds of a batch do not depend on what is missing.
        unfinished = [indices for indices in batches(job.config.num_images, job.batch_size) if not missing.isdisjoint(indices)]
        mine = unfinished[accelerator.process_index :: accelerator.num_processes]
        with (
            ImageWriter(samples) as writer,
            tqdm(total=sum(map(len, mine)), unit="image", disable=not accelerator.is_main_process) as progress,
        ):
            for indices in mine:
                writer.put(indices, job.draw(_filled(job, indices))[: len(indices)])
                progress.update(len(indices))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _finish(samples, job)
    accelerator.wait_for_everyone()  # no process ends before the folder is complete


def _with_count(settings: dict[str, Any], samples: SampleFolder) -> dict[str, Any]:
    """Adds num_images for npz: an `.npz` file cannot grow."""
    return settings | ({"num_images": samples.num_images} if samples.kind == "npz" else {})


def _filled(job: Job, indices: Sequence[int]) -> list[int]:
    """A batch of the size that a network is compiled for: of another it would be compiled anew, for minutes."""
    missing = job.batch_size - len(indices) if job.config.compile else 0
    return [*indices, *[indices[-1]] * missing]


def _finish(samples: SampleFolder, job: Job) -> None:
    every = range(samples.num_images)
    shown = job.conditions(every)
    loras = job.settings.get("lora", ())
    samples.finish(shown.labels, image_seeds(job.config.seed, every), shown.class_names, shown.prompts, loras)
    if job.config.trajectory:
        write_file(samples.folder / TRAJECTORY, images.png(_trajectory(job)))
    where = samples.folder / PACKED if samples.kind == "npz" else samples.folder
    say(f"{samples.num_images} images in {where}, a picture of them in {samples.folder / GRID}")


def _trajectory(job: Job) -> Any:
    """A grid with two rows for each of the first images: x_t, and the predicted x_0, at up to ten timesteps."""
    calls = job.network_evaluations
    chosen = torch.linspace(0, calls - 1, min(calls, TRAJECTORY_STEPS)).round().int().tolist()
    rows = []
    for indices in batches(min(job.config.num_images, TRAJECTORY_IMAGES), job.batch_size):
        _, seen = job.watch(_filled(job, indices), chosen, first=len(indices))
        rows += [stage[kind][k] for k in range(len(indices)) for kind in (0, 1) for stage in seen]
    return images.grid([images.from_array(to_bytes(row).numpy()) for row in rows], columns=len(chosen))
