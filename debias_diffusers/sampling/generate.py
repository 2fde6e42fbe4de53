"""Seeds to images to files. Image k of seed s is drawn from its own generator, seeded with (s * 2654435761 + k) mod 2^32."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from ..config import hub_names
from ..config.schema import SampleConfig
from ..data import images
from ..data.image_folders import GRID, PACKED, TRAJECTORY
from ..data.labels import in_proportion, listed, numbers, taken_for_names, with_images
from ..diffusion.noise_schedule import schedule_of_scheduler, terminal_snr_problem
from ..errors import InputError
from ..hub import client
from ..hub.model_card import variant
from ..pipelines.pixel_pipeline import PixelPipeline, check_labels, load_pipeline
from ..pipelines.solvers import default_scheduler, in_sections, make_scheduler, strided
from ..runs import checkpoints
from ..runs.run_directory import CHECKPOINTS, SAMPLES
from ..utils.console import say
from ..utils.distributed import agreed, start_processes
from ..utils.files import take_lock, write_file
from ..utils.seeding import uniform
from ..utils.torch_errors import explained
from .image_writer import Album, Writer, require_place

DEFAULT_STEPS = 20
TRAJECTORY_IMAGES, TRAJECTORY_STAGES = 6, 10
SEED_FACTOR = 2654435761  # 2^32 over the golden ratio: its multiples mod 2^32 lie far apart


def seeds(seed: int, indices: Sequence[int]) -> list[int]:
    """The seeds of the generators of the images of these indices, of which sets of different small seeds share none.

    A torch CPU generator takes 32 bits.
    """
    return [(seed * SEED_FACTOR + k) % 2**32 for k in indices]


def draw(pipeline: PixelPipeline, indices: Sequence[int], seed: int, labels: Sequence[int] | None = None, **options: Any) -> Tensor:
    """The images of some indices in one batch, (B, C, H, W) uint8, each from a CPU generator of its own.

    So an image depends neither on its batch nor on its device. `labels` has one for each; `options` are the pipeline's.
    """
    generators = [torch.Generator().manual_seed(own) for own in seeds(seed, indices)]
    output: Any = pipeline(batch_size=len(indices), class_labels=labels, generator=generators, output_type="pt", **options)
    drawn: Tensor = (output.images * 255).round().to(torch.uint8)
    return drawn


def sample(config: SampleConfig) -> Path:
    """Draws the images of a sampling command into its folder, over all processes, and returns the folder.

    A folder that already holds some of them is completed.

    Raises:
        InputError: the model, its labels, or the folder do not fit the command.
        RunInUseError: another command draws into the folder.
    """
    if not config.output_dir and not (Path(config.model) / CHECKPOINTS).is_dir():
        raise InputError(f"output_dir is missing: {config.model} is no run directory; add --output_dir, such as samples")
    accelerator = start_processes(config.num_threads)
    config = replace(config, model=pinned_model(config.model, accelerator))
    job = make_job(config, accelerator.device)
    if config.class_labels == "data" and job.config.class_labels != "data":
        raise InputError(
            "class_labels is data, but the model does not say how many images of which classes it was trained on; leave it out"
        )
    if accelerator.is_main_process:
        _say_labels(config, job.pipeline)
    folder = Path(config.output_dir or Path(config.model) / SAMPLES / job.name)
    if accelerator.is_main_process:
        require_place(folder)
    try:
        _draw_into(Album(folder, config.format, config.num_images), job, accelerator)
    except RuntimeError as error:
        if sentence := explained(error, "--batch_size", config.batch_size):
            raise sentence from error
        raise
    return folder


def pinned_model(model: str, accelerator: Accelerator) -> str:
    """A Hub id with its commit, the same in all processes; anything else as it is."""
    return agreed(lambda: client.pinned(model), accelerator) if hub_names.is_id(model) else model


@dataclass(frozen=True)
class Job:
    """A command, its model, and everything that the two decide together."""

    config: SampleConfig
    pipeline: PixelPipeline
    name: str  # solver and steps
    settings: dict[str, Any]  # all that decides what image k looks like
    options: dict[str, Any]  # of the pipeline's call

    def draw(self, indices: Sequence[int], **more: Any) -> Tensor:
        """(B, C, H, W) uint8."""
        labels = self.labels(indices)
        return draw(self.pipeline, indices, self.config.seed, labels, **self.options, **more)

    def labels(self, indices: Sequence[int]) -> list[int] | None:
        """Of the images of these indices; None where the model has no classes."""
        every = self._in_turn
        if not every:
            return None
        if self.config.class_labels == "drawn":
            return [every[int(uniform(0, "class label", own) * len(every))] for own in seeds(self.config.seed, indices)]
        return [every[k % len(every)] for k in indices]

    @cached_property
    def _in_turn(self) -> list[int]:
        """Labels to be repeated."""
        wanted, pipeline = self.config.class_labels, self.pipeline
        if isinstance(wanted, tuple):
            return numbers(wanted, None)
        if wanted == "data":
            return in_proportion(pipeline.class_counts or [], self.config.num_images)
        return trained_labels(pipeline)


def make_job(config: SampleConfig, device: Any, step: int | None = None) -> Job:
    """Loads the model of a command, sets its solver and puts it on a device.

    Args:
        config: the command.
        device: of the network.
        step: of the run's checkpoint whose weights are taken; the exported ones, or the newest checkpoint's, if left out.

    Raises:
        InputError: there is no such model, or it does not fit the command.
    """
    if config.dtype == "float16" and torch.device(device).type == "cpu":
        raise InputError("dtype is float16, which this CPU is slow and inexact in; take bfloat16 or float32")
    pipeline = open_model(config.model, config.weights, config.allow_pickle_import, step)
    own = pipeline.scheduler
    _warn_of_terminal_snr(config.model, own)
    name = config.scheduler or default_scheduler(own)
    timesteps = _timesteps(config, own.config.num_train_timesteps)
    steps = len(timesteps) if timesteps else config.steps or DEFAULT_STEPS
    spacing = "linspace" if config.spacing == "stride" else config.spacing
    pipeline.scheduler = make_scheduler(name, own, spacing, steps, timesteps, config.clipping)
    config = replace(config, class_labels=_class_labels(config, pipeline))
    settings = {
        "scheduler": name,
        "steps": steps,
        "timesteps": timesteps,
        **{field: getattr(config, field) for field in _SETTINGS},
        "model_sha256": _fingerprint(pipeline, own),
    }
    if hub_names.is_id(config.model):
        settings["model"] = config.model  # with its commit; a folder may be moved
    if config.seed:  # the version before drew image k from seed + k, which for seed 0 is the same
        settings["seed_factor"] = SEED_FACTOR
    _make_ready(pipeline, config, device)
    options = {field: getattr(config, field) for field in _OPTIONS} | {"num_inference_steps": steps, "timesteps": timesteps}
    # As they will be read back, so that they can be compared: lists in place of tuples.
    return Job(config, pipeline, f"{name}-{steps}", json.loads(json.dumps(settings)), options)


_OPTIONS = ("guidance_scale", "guidance_interval", "eta", "clipping", "clipping_quantile")
_SETTINGS = (*_OPTIONS, "spacing", "seed", "class_labels", "dtype", "format")


_warned = set[str]()  # models, of which several jobs may be made


def _warn_of_terminal_snr(model: str, own: Any) -> None:
    """Says once that the schedule of a model does not end in noise; by the first process."""
    try:
        problem = terminal_snr_problem(schedule_of_scheduler(own))
    except InputError:  # of a scheduler that does not tell its schedule
        return
    if problem and model not in _warned and os.environ.get("RANK", "0") == "0":
        say(f"warning: {model}: {problem}")
        _warned.add(model)


def _timesteps(config: SampleConfig, T: int) -> list[int] | None:
    if config.timesteps:
        return list(config.timesteps)
    if config.sections:
        return in_sections(T, config.sections)
    return strided(T, config.steps or DEFAULT_STEPS) if config.spacing == "stride" else None


def _class_labels(config: SampleConfig, pipeline: PixelPipeline) -> Any:
    """The labels of a command: numbers in place of names, and balanced where the model cannot have them as the data."""
    wanted = config.class_labels
    if wanted == "drawn" and not pipeline.num_classes:
        raise InputError("class_labels is drawn, but the model is unconditional; leave it out")
    if isinstance(wanted, tuple):
        wanted = tuple(numbers(wanted, pipeline.class_names)) if pipeline.num_classes else wanted
        check_labels(pipeline, wanted, config.guidance_scale)
    else:
        check_labels(pipeline, trained_labels(pipeline) or None, config.guidance_scale)
    return "balanced" if wanted == "data" and not any(pipeline.class_counts or ()) else wanted


def trained_labels(pipeline: PixelPipeline) -> list[int]:
    """Labels of the classes that a model had images of; of all where it does not say."""
    return with_images(pipeline.class_counts or ()) or list(range(pipeline.num_classes))


def _say_labels(config: SampleConfig, pipeline: PixelPipeline) -> None:
    """What may be unexpected of the labels that were asked for."""
    if not isinstance(config.class_labels, tuple):
        return
    names, counts = pipeline.class_names, pipeline.class_counts
    for sentence in taken_for_names(config.class_labels, names):
        say(sentence)
    if counts and (untrained := sorted({k for k in numbers(config.class_labels, names) if not counts[k]})):
        say(f"warning: the model was trained on no images of class {listed(names[k] if names else k for k in untrained)}")


def open_model(model: str, weights: str = "ema", allow_pickle: bool = False, step: int | None = None) -> PixelPipeline:
    """A model with the weights that are asked for: of a run, of a pipeline folder, or of a Hub id.

    Args:
        model: where it is.
        weights: ema, raw, or a rate; of a model that is no run, a rate is a variant of its weights.
        allow_pickle: as of `load_pipeline`.
        step: of the run's checkpoint; the exported weights, or the newest checkpoint's, if left out.

    Raises:
        InputError, HubError: as of `load_pipeline`; or it has no such weights.
    """
    run = Path(model)
    if weights == "ema" and step is None:
        return load_pipeline(model, allow_pickle)
    if (run / CHECKPOINTS).is_dir():
        pipeline = load_pipeline(model, allow_pickle)
        _load_weights(pipeline, run, weights, step)
        return pipeline
    if weights in ("ema", "raw"):
        raise InputError(f"weights is {weights}, but {run} has no checkpoints; take --weights ema")
    return load_pipeline(model, allow_pickle, variant(float(weights)))


def _load_weights(pipeline: PixelPipeline, run: Path, weights: str, step: int | None = None) -> None:
    """Puts the raw or averaged weights of a checkpoint of a run (the newest, if no step is named) into the pipeline."""
    found = checkpoints.latest_valid(run / CHECKPOINTS)[0] if step is None else _checkpoint_at(run, step)
    if found is None:
        raise InputError(f"weights is {weights}, but {run} has no checkpoints; take --weights ema")
    rates = found.state["config"]["ema_decay"]
    name = checkpoints.MODEL if weights == "raw" else checkpoints.ema_file(rates[0] if weights == "ema" else float(weights))
    if not (found.path / name).is_file():
        raise InputError(f"weights is {weights}, but the run averages at {rates} only; take one of these, ema or raw")
    pipeline.unet.load_state_dict(safetensors.torch.load_file(found.verified(name)))


def _checkpoint_at(run: Path, step: int) -> checkpoints.Checkpoint:
    try:
        return checkpoints.verified(run / CHECKPOINTS / checkpoints.name_of(step))
    except checkpoints.DamagedError as error:
        raise InputError(f"{run} has no usable checkpoint at step {step}: {error}") from error


def _fingerprint(pipeline: PixelPipeline, own: Any) -> str:
    """Of the weights and of the schedule that they were trained for."""
    digest = hashlib.sha256(safetensors.torch.save(pipeline.unet.state_dict()))
    digest.update(own.to_json_string().encode())
    return digest.hexdigest()


def _make_ready(pipeline: PixelPipeline, config: SampleConfig, device: Any) -> None:
    pipeline.to(device)
    if config.dtype != "float32":  # not by .to(), which diffusers warns of
        pipeline.unet.bfloat16() if config.dtype == "bfloat16" else pipeline.unet.half()
    if pipeline.unet.device.type == "cuda":  # the layout of its tensor cores; on a CPU no gain was measured
        pipeline.unet.to(memory_format=torch.channels_last)
    if config.compile:
        pipeline.unet.compile()


def _draw_into(album: Album, job: Job, accelerator: Accelerator) -> None:
    """Draws what is missing: its batches are dealt to the processes in turn."""
    lock = take_lock(album.folder) if accelerator.is_main_process else None
    # The others must not look for themselves: files appear by now.
    missing = agreed(lambda: album.begin(_with_count(job.settings, album)), accelerator)
    mine = list(_batches(missing, job.config))[accelerator.process_index :: accelerator.num_processes]
    with Writer(album) as writer, tqdm(total=sum(map(len, mine)), unit="image", disable=not accelerator.is_main_process) as progress:
        for indices in mine:
            writer.put(indices, job.draw(indices))
            progress.update(len(indices))
    accelerator.wait_for_everyone()
    if lock:
        _finish(album, job)
        lock.close()
    accelerator.wait_for_everyone()  # the others end when the folder is whole


def _with_count(settings: dict[str, Any], album: Album) -> dict[str, Any]:
    """A packed file cannot grow, so its length is a setting, too."""
    return settings | ({"num_images": album.num_images} if album.kind == "npz" else {})


def _batches(missing: list[int], config: SampleConfig) -> Iterator[range]:
    """Whole batches of consecutive indices in which something is missing: the same batches whatever was there before."""
    wanted = set(missing)
    for first in range(0, config.num_images, config.batch_size):
        indices = range(first, min(first + config.batch_size, config.num_images))
        if not wanted.isdisjoint(indices):
            yield indices


def _finish(album: Album, job: Job) -> None:
    every = range(album.num_images)
    album.finish(job.labels(every), seeds(job.config.seed, every))
    if job.config.trajectory:
        write_file(album.folder / TRAJECTORY, images.png(_trajectory(job)))
    where = album.folder / PACKED if album.kind == "npz" else album.folder
    say(f"{album.num_images} images in {where}, a picture of them in {album.folder / GRID}")


def _trajectory(job: Job) -> Any:
    """For each of the first images a row of x_t and a row of the x_0 predicted from it, at up to ten stages."""
    calls = len(job.pipeline.scheduler.timesteps)
    stages = torch.linspace(0, calls - 1, min(calls, TRAJECTORY_STAGES)).round().int().tolist()
    seen: list[tuple[Tensor, Tensor]] = []

    def look(_: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> None:
        if step in stages:
            seen.append((tensors["x_t"].cpu(), tensors["x_0"].cpu()))

    indices = range(min(job.config.num_images, TRAJECTORY_IMAGES))
    job.draw(indices, callback_on_step_end=look, callback_on_step_end_tensor_inputs=("x_t", "x_0"))
    rows = [stage[kind][k] for k in indices for kind in (0, 1) for stage in seen]
    pixels = [((row / 2 + 0.5).clamp(0, 1) * 255).round().byte().numpy() for row in rows]
    return images.grid([images.from_array(array) for array in pixels], columns=len(stages))
