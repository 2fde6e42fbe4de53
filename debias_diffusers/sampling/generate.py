"""Samples images into a folder. Image k of seed s has its own generator, seeded with (s * 2654435761 + k) mod 2^32."""

from __future__ import annotations

import contextlib
import hashlib
import json
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
from ..data.labels import ambiguous_labels, label_indices, nonempty_classes, proportional_labels, shortened_list
from ..diffusion.noise_schedule import schedule_of_scheduler, terminal_snr_problem
from ..errors import InputError, raise_all
from ..hub import client
from ..hub.model_card import step_of_card, variant
from ..pipelines.pixel_pipeline import PixelPipeline, check_labels, load_pipeline
from ..pipelines.solvers import default_scheduler, make_scheduler, section_timesteps, set_timesteps, strided_timesteps
from ..runs import checkpoints
from ..runs.run_directory import CHECKPOINTS, SAMPLES, sampling_problems
from ..utils.console import say
from ..utils.distributed import broadcast_from_first, inference_accelerator
from ..utils.files import acquire_lock, write_file
from ..utils.launcher import is_first_process
from ..utils.seeding import uniform
from ..utils.torch_errors import explain_error
from .image_writer import ImageWriter, SampleFolder, require_sample_folder

DEFAULT_STEPS = 20
TRAJECTORY_IMAGES, TRAJECTORY_STEPS = 6, 10
SEED_FACTOR = 2654435761  # 2^32 over the golden ratio: its multiples mod 2^32 lie far apart
LONGEST_NAME = 100  # characters of a folder's name; the system's limit is 255 bytes


def image_seeds(seed: int, indices: Sequence[int]) -> list[int]:
    """The seed (32 bits, as a torch CPU generator takes) of each image. Images of different small seeds share no generator seed."""
    return [(seed * SEED_FACTOR + k) % 2**32 for k in indices]


def draw(pipeline: PixelPipeline, indices: Sequence[int], seed: int, labels: Sequence[int] | None = None, **options: Any) -> Tensor:
    """Samples the images of some indices in one batch, (B, C, H, W) uint8, each from its own CPU generator.

    So the noise of an image depends neither on its batch nor on the device. `labels` has B labels; `options` go to the pipeline.
    """
    generators = [torch.Generator().manual_seed(own) for own in image_seeds(seed, indices)]
    output: Any = pipeline(batch_size=len(indices), class_labels=labels, generator=generators, output_type="pt", **options)
    drawn: Tensor = (output.images * 255).round().to(torch.uint8)
    return drawn


def sample(config: SampleConfig) -> Path:
    """Samples the images of a command into its folder, distributed over all processes, and returns the folder.

    Images that the folder already has are not sampled again.

    Raises:
        InputError: the model, its labels, or the folder do not fit the command.
        RunInUseError: another command writes into the folder.
    """
    raise_all(sampling_problems(config.model, config.output_dir))
    accelerator = inference_accelerator(config.num_threads)
    config = replace(config, model=pinned_model(config.model, accelerator))
    job = make_job(config, accelerator.device)
    if config.class_labels == "data" and job.config.class_labels != "data":
        raise InputError(
            "class_labels is data, but the model does not say how many images of which classes it was trained on; leave it out"
        )
    if accelerator.is_main_process:
        _say_labels(config, job.pipeline)
    folder = Path(config.output_dir) if config.output_dir else broadcast_from_first(lambda: default_folder(job), accelerator)
    if accelerator.is_main_process:
        require_sample_folder(folder)
    try:
        _draw_into(SampleFolder(folder, config.format, config.num_images), job, accelerator)
    except RuntimeError as error:
        if sentence := explain_error(error, "--batch_size", config.batch_size):
            raise sentence from error
        raise
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


@dataclass(frozen=True)
class Job:
    """A sampling command with its model, and the settings that follow from both."""

    config: SampleConfig
    pipeline: PixelPipeline
    name: str  # of its folder in a run, such as unipc-20-seed-1
    settings: dict[str, Any]  # everything on which image k depends
    options: dict[str, Any]  # arguments of the pipeline's call

    def draw(self, indices: Sequence[int], **more: Any) -> Tensor:
        """Samples the images of these indices, (B, C, H, W) uint8."""
        labels = self.labels(indices)
        return draw(self.pipeline, indices, self.config.seed, labels, **self.options, **more)

    @property
    def network_evaluations(self) -> int:
        """Calls of the network for one batch."""
        scheduler = self.pipeline.scheduler
        set_timesteps(scheduler, self.options["num_inference_steps"], self.options["timesteps"])
        return len(scheduler.timesteps)

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


def make_job(config: SampleConfig, device: Any, step: int | None = None) -> Job:
    """Loads the model of a command, sets its solver and moves it to a device.

    Args:
        config: the command.
        device: of the network.
        step: load the weights of the run's checkpoint at this step; if None, the exported weights or the newest checkpoint.

    Raises:
        InputError: there is no such model, or it does not fit the command.
    """
    if config.dtype == "float16" and torch.device(device).type == "cpu":
        raise InputError("dtype is float16, which is slow and inexact on a CPU; take bfloat16 or float32")
    pipeline, step = _open(config.model, config.weights, config.allow_pickle_import, step)
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
        "model_step": step,  # this and the next are for the user: the hash is compared
        "weights": config.weights,
    }
    if hub_names.is_model_id(config.model):
        settings["model"] = config.model  # with its commit. Not for a folder, which may be moved.
    if config.seed:  # the first version seeded image k with seed + k, which is the same for seed 0
        settings["seed_factor"] = SEED_FACTOR
    _make_ready(pipeline, config, device)
    options = {field: getattr(config, field) for field in _OPTIONS} | {"num_inference_steps": steps, "timesteps": timesteps}
    # As JSON gives them back (lists instead of tuples), so that they can be compared with a file.
    return Job(config, pipeline, _folder_name(config, f"{name}-{steps}"), json.loads(json.dumps(settings)), options)


_OPTIONS = ("guidance_scale", "guidance_interval", "eta", "clipping", "clipping_quantile")
_SETTINGS = (*_OPTIONS, "spacing", "seed", "class_labels", "dtype", "format")


def _folder_name(config: SampleConfig, start: str) -> str:
    """`start` with all other settings that are not left out: unipc-20-seed-1-weights-raw. Of a long name a hash is the end."""
    fields = ["weights", "timesteps", "sections", *_SETTINGS, *(["num_images"] if config.format == "npz" else [])]
    values = {name: getattr(config, name) for name in fields if getattr(config, name) != getattr(SampleConfig(model=""), name)}
    texts = {name: ",".join(map(str, value)) if isinstance(value, tuple) else value for name, value in values.items()}
    name = "-".join([start, *(f"{name}-{text}" for name, text in texts.items())])
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


_warned = set[str]()  # models, because one command may make several jobs of a model


def _warn_of_terminal_snr(model: str, own: Any) -> None:
    """Warns once, in the first process, if a model's schedule does not have zero terminal SNR."""
    try:
        problem = terminal_snr_problem(schedule_of_scheduler(own))
    except InputError:  # the schedule of this scheduler is unknown
        return
    if problem and model not in _warned and is_first_process():
        say(f"warning: {model}: {problem}")
        _warned.add(model)


def _timesteps(config: SampleConfig, T: int) -> list[int] | None:
    if config.timesteps:
        return list(config.timesteps)
    if config.sections:
        return section_timesteps(T, config.sections)
    return strided_timesteps(T, config.steps or DEFAULT_STEPS) if config.spacing == "stride" else None


def _class_labels(config: SampleConfig, pipeline: PixelPipeline) -> Any:
    """The class_labels of a command with names as label indices, and "balanced" instead of "data" if class counts are unknown."""
    wanted = config.class_labels
    if wanted == "drawn" and not pipeline.num_classes:
        raise InputError("class_labels is drawn, but the model is unconditional; leave it out")
    if isinstance(wanted, tuple):
        wanted = tuple(label_indices(wanted, pipeline.class_names)) if pipeline.num_classes else wanted
        check_labels(pipeline, wanted, config.guidance_scale)
    else:
        check_labels(pipeline, trained_labels(pipeline) or None, config.guidance_scale)
    return "balanced" if wanted == "data" and not any(pipeline.class_counts or ()) else wanted


def trained_labels(pipeline: PixelPipeline) -> list[int]:
    """The labels of classes that the model was trained on; all labels if the model does not say."""
    return nonempty_classes(pipeline.class_counts or ()) or list(range(pipeline.num_classes))


def _say_labels(config: SampleConfig, pipeline: PixelPipeline) -> None:
    """Prints warnings about labels that are ambiguous or that the model was not trained on."""
    if not isinstance(config.class_labels, tuple):
        return
    names, counts = pipeline.class_names, pipeline.class_counts
    for sentence in ambiguous_labels(config.class_labels, names):
        say(sentence)
    if counts and (untrained := sorted({k for k in label_indices(config.class_labels, names) if not counts[k]})):
        say(f"warning: the model was trained on no images of class {shortened_list(names[k] if names else k for k in untrained)}")


def open_model(model: str, weights: str = "ema", allow_pickle: bool = False, step: int | None = None) -> PixelPipeline:
    """Loads a model with the wanted weights, from a run, a pipeline folder or a Hub id.

    Args:
        model: path or Hub id.
        weights: "ema", "raw", or an EMA rate; for a model that is not a run directory, a rate names a variant of its weights.
        allow_pickle: as in `load_pipeline`.
        step: load the run's checkpoint at this step; if None, the exported weights or the newest checkpoint.

    Raises:
        InputError, HubError: as `load_pipeline`; or the model does not have these weights.
    """
    return _open(model, weights, allow_pickle, step)[0]


def _open(model: str, weights: str, allow_pickle: bool, step: int | None) -> tuple[PixelPipeline, int | None]:
    """`open_model`, and the training step of these weights; None if it is unknown."""
    run = Path(model)
    if weights == "ema" and step is None:
        return load_pipeline(model, allow_pickle), step_of_card(run / "README.md")
    if (run / CHECKPOINTS).is_dir():
        pipeline = load_pipeline(model, allow_pickle)
        return pipeline, _load_weights(pipeline, run, weights, step)
    if weights in ("ema", "raw"):
        raise InputError(f"weights is {weights}, but {run} has no checkpoints; take --weights ema")
    return load_pipeline(model, allow_pickle, variant(float(weights))), None


def _load_weights(pipeline: PixelPipeline, run: Path, weights: str, step: int | None = None) -> int:
    """Loads the raw or averaged weights of a run's checkpoint (the newest if step is None) into the pipeline; returns its step."""
    found = checkpoints.latest_valid(run / CHECKPOINTS)[0] if step is None else _checkpoint_at(run, step)
    if found is None:
        raise InputError(f"weights is {weights}, but {run} has no checkpoints; take --weights ema")
    rates = found.state["config"]["ema_decay"]
    name = checkpoints.MODEL if weights == "raw" else checkpoints.ema_file(rates[0] if weights == "ema" else float(weights))
    if not (found.path / name).is_file():
        raise InputError(f"weights is {weights}, but the run averages at {rates} only; take one of these, ema or raw")
    pipeline.unet.load_state_dict(safetensors.torch.load_file(found.verified(name)))
    return found.step


def _checkpoint_at(run: Path, step: int) -> checkpoints.Checkpoint:
    try:
        return checkpoints.verify(run / CHECKPOINTS / checkpoints.folder_name(step))
    except checkpoints.DamagedError as error:
        raise InputError(f"{run} has no usable checkpoint at step {step}: {error}") from error


def _fingerprint(pipeline: PixelPipeline, own: Any) -> str:
    """A hash of the weights and of the model's own scheduler."""
    digest = hashlib.sha256(safetensors.torch.save(pipeline.unet.state_dict()))
    digest.update(own.to_json_string().encode())
    return digest.hexdigest()


def _make_ready(pipeline: PixelPipeline, config: SampleConfig, device: Any) -> None:
    pipeline.to(device)
    if config.dtype != "float32":  # not by .to(), for which diffusers prints a warning
        pipeline.unet.bfloat16() if config.dtype == "bfloat16" else pipeline.unet.half()
    if pipeline.unet.device.type == "cuda":  # faster on tensor cores; on a CPU no gain was measured
        pipeline.unet.to(memory_format=torch.channels_last)
    if config.compile:
        pipeline.unet.compile()


def _draw_into(samples: SampleFolder, job: Job, accelerator: Accelerator) -> None:
    """Samples the missing images; process r of n takes every n-th batch."""
    with acquire_lock(samples.folder) if accelerator.is_main_process else contextlib.nullcontext():
        # Only the first process lists the folder: files may appear while others list it.
        missing = broadcast_from_first(lambda: samples.begin(_with_count(job.settings, samples), job.config.overwrite), accelerator)
        mine = list(_batches(missing, job.config))[accelerator.process_index :: accelerator.num_processes]
        with (
            ImageWriter(samples) as writer,
            tqdm(total=sum(map(len, mine)), unit="image", disable=not accelerator.is_main_process) as progress,
        ):
            for indices in mine:
                writer.put(indices, job.draw(indices))
                progress.update(len(indices))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _finish(samples, job)
    accelerator.wait_for_everyone()  # no process ends before the folder is complete


def _with_count(settings: dict[str, Any], samples: SampleFolder) -> dict[str, Any]:
    """Adds num_images for npz: an `.npz` file cannot grow."""
    return settings | ({"num_images": samples.num_images} if samples.kind == "npz" else {})


def _batches(missing: list[int], config: SampleConfig) -> Iterator[range]:
    """The batches of consecutive indices with a missing image. Their bounds do not depend on what is missing."""
    wanted = set(missing)
    for first in range(0, config.num_images, config.batch_size):
        indices = range(first, min(first + config.batch_size, config.num_images))
        if not wanted.isdisjoint(indices):
            yield indices


def _finish(samples: SampleFolder, job: Job) -> None:
    every = range(samples.num_images)
    samples.finish(job.labels(every), image_seeds(job.config.seed, every), job.pipeline.class_names)
    if job.config.trajectory:
        write_file(samples.folder / TRAJECTORY, images.png(_trajectory(job)))
    where = samples.folder / PACKED if samples.kind == "npz" else samples.folder
    say(f"{samples.num_images} images in {where}, a picture of them in {samples.folder / GRID}")


def _trajectory(job: Job) -> Any:
    """A grid with two rows for each of the first images: x_t, and the predicted x_0, at up to ten timesteps."""
    calls = job.network_evaluations
    stages = torch.linspace(0, calls - 1, min(calls, TRAJECTORY_STEPS)).round().int().tolist()
    seen: list[tuple[Tensor, Tensor]] = []

    def record(_: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> None:
        if step in stages:
            seen.append((tensors["x_t"].cpu(), tensors["x_0"].cpu()))

    indices = range(min(job.config.num_images, TRAJECTORY_IMAGES))
    job.draw(indices, callback_on_step_end=record, callback_on_step_end_tensor_inputs=("x_t", "x_0"))
    rows = [stage[kind][k] for k in indices for kind in (0, 1) for stage in seen]
    pixels = [((row / 2 + 0.5).clamp(0, 1) * 255).round().byte().numpy() for row in rows]
    return images.grid([images.from_array(array) for array in pixels], columns=len(stages))
