"""The models of the playground, loaded once, and the drawing of requests through the jobs of `sampling`, one at a time."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import hub_names
from ..config.registry import SOLVERS
from ..config.schema.sampling import PlayConfig, SampleConfig
from ..data import images
from ..data.image_folders import GRID
from ..diffusion.noise_schedule import is_flow
from ..errors import DebiasError, InputError
from ..hub import client
from ..pipelines.solvers import default_scheduler
from ..runs.model_folder import is_lora, task_of
from ..sampling.generate import load_model, make_job
from ..sampling.image_writer import SampleFolder
from ..sampling.job import Job, LoadedModel, batches, image_seeds, to_bytes
from ..utils.distributed import inference_accelerator
from ..utils.torch_errors import explained_torch_errors
from .request import OTHER_TASKS, PlayedModel, Request, command_line, commands, weights_of

STAGE_IMAGES, STAGES = 8, 25  # of how many images x_t and x_0 are kept, and after how many calls of the network
SMALL, SMALL_IMAGES, FEW_IMAGES = 64, 50, 4  # pixels a side of small images, with how many of which the page begins, and of others

Progress = Callable[[float, str], None]  # share that is done, and what is being done


class CancelledError(DebiasError):
    """The request was cancelled while it was drawn."""


@dataclass(frozen=True)
class Stage:
    """x_t and the predicted x_0 of the first images after a call of the network, as one picture with a row of each."""

    name: str
    picture: Any  # PIL


@dataclass(frozen=True)
class Drawn:
    """What one model has drawn."""

    grid: Path  # picture of the first images
    archive: Path  # .zip of all images, with metadata.jsonl
    command: str
    notes: tuple[str, ...]
    stages: tuple[Stage, ...]


class Engine:
    """Draws the requests of a playground.

    Raises:
        InputError: a model cannot be loaded, or the two do not go together.
        HubError: the Hub cannot be reached or rejects the request.
    """

    def __init__(self, config: PlayConfig) -> None:
        self.config = config
        self._device = inference_accelerator(config.num_threads).device
        self._loaded: OrderedDict[tuple[str, str], LoadedModel] = OrderedDict()
        self._lock = threading.Lock()
        self._running: dict[str, threading.Event] = {}
        self.models = [self._describe(model) for model in config.models]
        if len({model.task for model in self.models}) > 1:
            raise InputError(OTHER_TASKS)
        if not set.intersection(*({*model.schedulers} for model in self.models)):
            raise InputError("only one of the models is a rectified flow, so that no scheduler is for both; start two playgrounds")

    def draw(self, request: Request, session: str, folder: Path, progress: Progress) -> list[Drawn]:
        """Draws a request with each model, into `1.png` and `1.zip`, and 2; waits while another request is drawn.

        Raises:
            InputError: the request does not fit the models, or is beyond the limits.
            CancelledError: `cancel` was called for the session.
        """
        asked = commands(request, self.models, self.config)
        with self._lock, self._cancellable(session) as cancelled:
            drawn = []
            for number, config in enumerate(asked):
                of = f" with model {number + 1}" if len(asked) > 1 else ""

                def report(share: float, done: str, number: int = number, of: str = of) -> None:
                    if cancelled.is_set():
                        raise CancelledError("cancelled")
                    progress((number + share) / len(asked), f"{done}{of}")

                report(0, "loading")
                drawn.append(self._drawn(config, folder / str(number + 1), bool(request.stages), report))
            return drawn

    def cancel(self, session: str) -> None:
        """Stops what is being drawn for a session, after the call of the network at hand."""
        if event := self._running.get(session):
            event.set()

    @contextlib.contextmanager
    def _cancellable(self, session: str) -> Iterator[threading.Event]:
        self._running[session] = threading.Event()
        try:
            yield self._running[session]
        finally:
            del self._running[session]

    def _drawn(self, config: SampleConfig, folder: Path, stages: bool, report: Progress) -> Drawn:
        job = self._job(config)
        samples = SampleFolder(folder, config.format, config.num_images)
        samples.begin(job.settings)
        with explained_torch_errors("--batch_size", job.batch_size):
            kept = _draw_into(samples, job, stages, report)
        archive = shutil.make_archive(str(folder), "zip", folder)
        grid = (folder / GRID).replace(folder.with_suffix(".png"))
        shutil.rmtree(folder)  # the page shows the picture and offers the archive, and removes these two when they are old
        return Drawn(grid, Path(archive), command_line(config, job.name), tuple(job.notes()), tuple(kept))

    def _job(self, config: SampleConfig) -> Job:
        """The job of a command, of the model that is loaded already, or else loaded in the place of the one that waited longest."""
        key = config.model, config.weights
        if key not in self._loaded:
            while len(self._loaded) >= len(self.config.models):
                self._loaded.popitem(last=False)
            self._loaded[key] = load_model(config, self._device)
        self._loaded.move_to_end(key)
        return make_job(config, self._device, loaded=self._loaded[key])

    def _describe(self, name: str) -> PlayedModel:
        """Loads a model with its exported weights, and says what the page offers of it."""
        name = client.pinned(name) if hub_names.is_model_id(name) else name
        folder = client.configurations(name)
        task, lora = task_of(folder), is_lora(folder)
        config = SampleConfig(
            model=name,
            prompt=("",) if task == "text_to_image" else (),
            base_model=self.config.base_model if lora else None,
            dtype=self.config.dtype,
        )
        job = self._job(config)
        own = self._loaded[name, config.weights].scheduler
        pipeline = job.pipeline
        classes: tuple[str, ...] = ()
        if task == "pixels":
            classes = _class_names(pipeline.class_names, pipeline.num_classes)
        return PlayedModel(
            name=name,
            task=task,
            is_lora=lora,
            classes=classes,
            has_guidance=task == "text_to_image" or pipeline.config.null_label is not None,
            guidance_scale=float(job.config.guidance_scale or 1),
            schedulers=tuple(solver for solver, spec in SOLVERS.items() if spec.flow == is_flow(own)),
            scheduler=default_scheduler(own),
            weights=weights_of(folder),
            num_images=SMALL_IMAGES if task == "pixels" and max(job.size) <= SMALL else FEW_IMAGES,
        )


def _class_names(names: Sequence[str] | None, count: int) -> tuple[str, ...]:
    """What `--class_labels` takes for each class: its name, or its number where names are missing or not unique."""
    return tuple(names) if names and len(set(names)) == count else tuple(map(str, range(count)))


def _draw_into(samples: SampleFolder, job: Job, stages: bool, report: Progress) -> list[Stage]:
    """Draws all images of a job into a folder, in the batches of sample.py; returns the stages of the first images."""
    config, calls = job.config, job.network_evaluations
    timesteps = [float(t) for t in job.pipeline.scheduler.timesteps]
    chosen = sorted({round(k * (calls - 1) / max(1, min(calls, STAGES) - 1)) for k in range(min(calls, STAGES))})
    parts = batches(config.num_images, job.batch_size)
    kept: list[Stage] = []
    for number, indices in enumerate(parts):

        def on_call(call: int, number: int = number) -> None:
            report((number * calls + call + 1) / (len(parts) * calls), f"{call + 1} of {calls} evaluations of the network")

        drawn, seen = job.watch(indices, chosen if stages and not number else [], on_call, STAGE_IMAGES)
        for k, array in zip(indices, drawn.cpu().numpy()):
            samples.write(k, array)
        kept += [Stage(f"t = {timesteps[call]:g}, evaluation {call + 1} of {calls}", _picture(*pair)) for call, pair in zip(chosen, seen)]
    shown, every = job.conditions(range(config.num_images)), range(config.num_images)
    samples.finish(shown.labels, image_seeds(config.seed, every), shown.class_names, shown.prompts)
    return kept


def _picture(x_t: Tensor, x_0: Tensor) -> Any:
    """A row of x_t and a row of the predicted x_0, which are (B, C, H, W) in about [-1, 1]."""
    pixels = to_bytes(torch.cat([x_t.float(), x_0.float()])).numpy()
    return images.grid([images.from_array(array) for array in pixels], columns=len(x_t))
