"""A sampling command with its model: what pixel models and text-to-image models have in common."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..config import hub_names
from ..config.schema.sampling import SampleConfig
from ..config.validation.network_weights import sigma_rel_of
from ..diffusion.noise_schedule import schedule_of_scheduler, terminal_snr_problem
from ..errors import InputError
from ..hub.model_card import step_of_card, variant
from ..pipelines import lora
from ..pipelines.compiled import compile_channels_last
from ..pipelines.solvers import default_scheduler, make_scheduler, section_timesteps, set_timesteps, strided_timesteps
from ..runs import checkpoints
from ..runs.model_folder import is_lora
from ..runs.run_directory import CHECKPOINTS
from ..utils.console import say
from ..utils.launcher import is_first_process
from .post_hoc_ema import reconstructed

DEFAULT_STEPS = 20
SEED_FACTOR = 2654435761  # 2^32 over the golden ratio: its multiples mod 2^32 lie far apart
MAX_BATCH, MAX_BATCH_PIXELS = 64, 64 * 256 * 256
LONGEST_NAME = 100  # characters of a folder's name; the system's limit is 255 bytes


def image_seeds(seed: int, indices: Sequence[int]) -> list[int]:
    """The seed (32 bits, as a torch CPU generator takes) of each image. Images of different small seeds share no generator seed."""
    return [(seed * SEED_FACTOR + k) % 2**32 for k in indices]


def image_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """The CPU generator of each image: so its noise depends neither on its batch nor on the device."""
    return [torch.Generator().manual_seed(own) for own in image_seeds(seed, indices)]


def to_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1], of any shape, as uint8; what is beyond is clamped."""
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def batch_size_of(asked: int | None, count: int, height: int, width: int) -> int:
    """Of `count` images those that are drawn at a time: as many as are asked for, or else 64, with the pixels of 64 of 256x256 at most."""
    return min(asked or max(1, min(MAX_BATCH, MAX_BATCH_PIXELS // (height * width))), count)


def batches(count: int, batch_size: int) -> list[range]:
    """The images 0 .. count - 1 in batches of consecutive indices."""
    return [range(first, min(first + batch_size, count)) for first in range(0, count, batch_size)]


@dataclass(frozen=True)
class Conditions:
    """What images show, by index: a label each, or a prompt each; nothing of an unconditional model."""

    labels: Sequence[int] | None = None
    class_names: Sequence[str] | None = None  # by label; None if unknown
    prompts: Sequence[str] | None = None


@dataclass(frozen=True)
class LoadedModel:
    """A model with its weights on its device, of which several commands may make their jobs, one after the other."""

    pipeline: Any
    scheduler: Any  # that it was saved with; a job puts its solver in the place of the pipeline's
    step: int | None  # of the weights; None if unknown
    fingerprint: str  # hash of weights and scheduler


def no_stop(call: int) -> None:
    """What `Job.watch` calls after each call of the network if nothing else is given."""


@dataclass(frozen=True)
class Job(ABC):
    """A sampling command with its model, and the settings that follow from both."""

    config: SampleConfig
    pipeline: Any
    name: str  # of its folder in a run, such as unipc-20-seed-1
    settings: dict[str, Any]  # everything on which image k depends
    options: dict[str, Any]  # arguments of the pipeline's call

    @abstractmethod
    def draw(self, indices: Sequence[int]) -> Tensor:
        """Samples the images of these indices, (B, C, H, W) uint8."""

    @abstractmethod
    def watch(
        self, indices: Sequence[int], calls: Sequence[int], on_call: Callable[[int], None] = no_stop, first: int | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """What `draw` returns, and the stages: x_t and the predicted x_0, (B, C, H, W) in about [-1, 1].

        Args:
            indices: of the images.
            calls: of the network, counted from 0, after which a stage is kept.
            on_call: is given the number of each call when its step is made, and may raise to stop.
            first: only so many images of each stage are kept; all if None.
        """

    @abstractmethod
    def conditions(self, indices: Sequence[int]) -> Conditions:
        """What these images show."""

    @abstractmethod
    def notes(self) -> list[str]:
        """What the user should know of the command before images are drawn."""

    @property
    @abstractmethod
    def size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""

    @property
    def batch_size(self) -> int:
        """Images that are drawn at a time."""
        return batch_size_of(self.config.batch_size, self.config.num_images, *self.size)

    @property
    def network_evaluations(self) -> int:
        """Calls of the network for one batch."""
        scheduler = self.pipeline.scheduler
        set_timesteps(scheduler, self.options.get("num_inference_steps", 1), self.options.get("timesteps"))
        return len(scheduler.timesteps)


@dataclass(frozen=True)
class Solver:
    """A model's solver, and how many steps it makes."""

    name: str
    scheduler: Any
    steps: int
    timesteps: list[int] | None  # in place of the steps

    def settings(self) -> dict[str, Any]:
        """What `.sampling.json` says of it."""
        return {"scheduler": self.name, "steps": self.steps, "timesteps": self.timesteps}


def make_solver(config: SampleConfig, own: Any, clipping: Any) -> Solver:
    """The solver of a command for a model with the scheduler `own`; raises InputError if it does not fit the model."""
    _warn_of_terminal_snr(config.model, own)
    name = config.scheduler or default_scheduler(own)
    timesteps = _timesteps(config, own.config.num_train_timesteps)
    steps = len(timesteps) if timesteps else config.steps or DEFAULT_STEPS
    spacing = "linspace" if config.spacing == "stride" else config.spacing
    return Solver(name, make_scheduler(name, own, spacing, steps, timesteps, clipping), steps, timesteps)


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


def settings_of(config: SampleConfig, own: Mapping[str, Any], fields: Sequence[str], loaded: LoadedModel) -> dict[str, Any]:
    """What `.sampling.json` says of a command: on this, image k depends.

    Args:
        config: the command.
        own: what the kind of model adds.
        fields: of the command.
        loaded: the model.
    """
    settings = {
        **own,
        **{field: getattr(config, field) for field in fields},
        "model_sha256": loaded.fingerprint,
        "model_step": loaded.step,  # this and the next are for the user: the hash is compared
        "weights": config.weights,
    }
    if hub_names.is_model_id(config.model):
        settings["model"] = config.model  # with its commit. Not for a folder, which may be moved.
    if config.seed:  # the first version seeded image k with seed + k, which is the same for seed 0
        settings["seed_factor"] = SEED_FACTOR
    # As JSON gives them back (lists instead of tuples), so that they can be compared with a file.
    found: dict[str, Any] = json.loads(json.dumps(settings))
    return found


def folder_name(config: SampleConfig, start: str, fields: Sequence[str], neutral: SampleConfig) -> str:
    """`start` with all other settings that are not left out: unipc-20-seed-1-weights-raw. Of a long name a hash is the end.

    `neutral` is the command of which everything is left out.
    """
    fields = ["weights", "timesteps", "sections", *fields, *(["num_images"] if config.format == "npz" else [])]
    values = {name: getattr(config, name) for name in fields if getattr(config, name) != getattr(neutral, name)}
    texts = {name: ",".join(map(str, value)) if isinstance(value, tuple) else value for name, value in values.items()}
    name = "-".join([start, *(f"{name}-{text}" for name, text in texts.items())])
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


# ---- weights ---------------------------------------------------------------------------------------------------------


def open_weights(load: Callable[[str | None], Any], model: str, weights: str, step: int | None) -> tuple[Any, int | None]:
    """A pipeline with the wanted weights, and the training step of these; None if it is unknown.

    Args:
        load: loads the pipeline with a variant of its weights; None for the exported ones.
        model: path or Hub id.
        weights: "ema", "raw", an EMA rate, or sigma_rel=0.08; for a model that is not a run directory, a rate names a variant of its
            weights.
        step: of the run's checkpoint; if None, the exported weights or the newest checkpoint.

    Raises:
        InputError: the model does not have these weights.
    """
    run = Path(model)
    if weights == "ema" and step is None:
        return load(None), step_of_card(run / "README.md")
    if (run / CHECKPOINTS).is_dir():
        pipeline = load(None)
        return pipeline, _load_weights(pipeline, run, weights, step)
    if weights in ("ema", "raw") or sigma_rel_of(weights) is not None:
        raise InputError(f"weights is {weights}, but {run} has no checkpoints; take --weights ema")
    return load(variant(float(weights))), None


def _load_weights(pipeline: Any, run: Path, weights: str, step: int | None = None) -> int:
    """Loads the raw or averaged weights of a run's checkpoint (the newest if step is None) into the pipeline; returns its step."""
    if (sigma_rel := sigma_rel_of(weights)) is not None:
        values, step = reconstructed(run, sigma_rel, step)
        pipeline.unet.load_state_dict(values)
        return step
    found, values = checkpoints.read_beside_training(run / CHECKPOINTS, lambda: _read_weights(run, weights, step))
    if is_lora(run):
        lora.set_weights(pipeline, values, str(run))
    else:
        pipeline.unet.load_state_dict(values)
    return found.step


def _read_weights(run: Path, weights: str, step: int | None) -> tuple[checkpoints.Checkpoint, dict[str, torch.Tensor]]:
    """The checkpoint of a run, and its raw or averaged weights; arguments as of `_load_weights`."""
    found = checkpoints.latest_valid(run / CHECKPOINTS)[0] if step is None else _checkpoint_at(run, step)
    if found is None:
        raise InputError(f"weights is {weights}, but {run} has no checkpoints; take --weights ema")
    rates = found.state["config"]["ema_decay"]
    name = checkpoints.MODEL if weights == "raw" else checkpoints.weights_file(rates[0] if weights == "ema" else float(weights))
    values = _weights_of(found, name)
    if not values:
        raise InputError(f"weights is {weights}, but the run averages at {rates} only; take one of these, ema or raw")
    return found, values


def _weights_of(found: checkpoints.Checkpoint, name: str) -> dict[str, torch.Tensor]:
    """The weights of a file of a checkpoint, or of the part of its shards with that name; {} if there are none."""
    if found.shards:
        from ..utils.sharding import read_shards  # with what torch has for processes, which few commands need

        for shard in found.shards:
            found.verified(shard)
        return read_shards(found.path, Path(name).stem)
    return safetensors.torch.load_file(found.verified(name)) if (found.path / name).is_file() else {}


def _checkpoint_at(run: Path, step: int) -> checkpoints.Checkpoint:
    try:
        return checkpoints.verify(run / CHECKPOINTS / checkpoints.folder_name(step))
    except checkpoints.DamagedError as error:
        raise InputError(f"{run} has no usable checkpoint at step {step}: {error}") from error


def require_dtype(config: SampleConfig, device: Any) -> None:
    """Raises InputError for a dtype that a device is no good for."""
    if config.dtype == "float16" and torch.device(device).type == "cpu":
        raise InputError("dtype is float16, which is slow and inexact on a CPU; take bfloat16 or float32")


def make_ready(pipeline: Any, config: SampleConfig, device: Any) -> None:
    """Moves a pipeline to a device; its network gets dtype and memory format, and is compiled."""
    pipeline.to(device)
    if config.dtype != "float32":  # not by .to(), for which diffusers prints a warning
        pipeline.unet.bfloat16() if config.dtype == "bfloat16" else pipeline.unet.half()
    cuda = pipeline.unet.device.type == "cuda"
    if cuda:  # faster on tensor cores; on a CPU no gain was measured
        pipeline.unet.to(memory_format=torch.channels_last)
    if config.compile:
        compile_channels_last(pipeline.unet) if cuda else pipeline.unet.compile()
