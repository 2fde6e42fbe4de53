"""Seeds to images to files. Image k of seed s is drawn from its own generator, seeded with (s + k) mod 2^32."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from PIL import Image
from tqdm import tqdm

from . import checkpoint, images, snapshot
from .config import SampleConfig
from .errors import InputError
from .files import read_file, remove_drafts, said_if_not_writable, write_file
from .pipeline import PixelPipeline, check_labels, load_pipeline
from .run import CHECKPOINTS, SAMPLES, say
from .schedulers import default_scheduler, make_scheduler

SETTINGS = ".sampling.json"  # what the images of a folder were drawn with
GRID = "preview/grid.png"
METADATA = "metadata.jsonl"
GRID_IMAGES = 100


def generators(seed: int, indices: range) -> list[torch.Generator]:
    """One CPU generator for each image, so that an image does not depend on its batch or its device."""
    return [torch.Generator().manual_seed((seed + k) % 2**32) for k in indices]


def draw(
    pipeline: PixelPipeline, indices: range, seed: int, steps: int, labels: list[int] | None = None, guidance_scale: float = 1.0
) -> list[Image.Image]:
    """The images of some indices, in one batch. `labels` are repeated over all indices."""
    own = [labels[k % len(labels)] for k in indices] if labels else None
    output: Any = pipeline(
        batch_size=len(indices),
        class_labels=own,
        guidance_scale=guidance_scale,
        num_inference_steps=steps,
        generator=generators(seed, indices),
    )
    drawn: list[Image.Image] = output.images
    return drawn


def sample(config: SampleConfig) -> Path:
    """Draws the images of a sampling command into its folder and returns the folder.

    A folder that already holds some of them is completed.

    Raises:
        InputError: the model, its labels, or the folder do not fit the command.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("sample.py draws in one process; start it with python, not with a launcher of several")
    _require_place(config)
    pipeline = load_pipeline(config.model)
    scheduler = config.scheduler or default_scheduler(pipeline.scheduler)
    config = dataclasses.replace(config, scheduler=scheduler)
    if config.weights != "ema":
        _load_weights(pipeline, Path(config.model), config.weights)
    pipeline.scheduler = make_scheduler(scheduler, pipeline.scheduler, config.spacing, config.steps)
    labels = list(config.class_labels) or list(range(pipeline.num_classes)) or None
    check_labels(pipeline, labels, config.guidance_scale)
    folder = Path(config.output_dir or Path(config.model) / SAMPLES / f"{scheduler}-{config.steps}")
    missing = _prepare(folder, config, pipeline)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    with tqdm(total=config.num_images, initial=config.num_images - len(missing), unit="image") as progress:
        for indices in _batches(missing, config):
            drawn = draw(pipeline, indices, config.seed, config.steps, labels, config.guidance_scale)
            for k, image in zip(indices, drawn):
                write_file(folder / _name(k), images.png(image))
            progress.update(len(indices))
    _finish(folder, config, labels)
    return folder


def _require_place(config: SampleConfig) -> None:
    if not config.output_dir and not (Path(config.model) / CHECKPOINTS).is_dir():
        raise InputError(f"output_dir is missing: {config.model} is no run directory; add --output_dir, such as samples")


def _load_weights(pipeline: PixelPipeline, run: Path, weights: str) -> None:
    """Puts the raw or another averaged set of weights of a run's newest checkpoint into the pipeline."""
    found, _ = checkpoint.latest_valid(run / CHECKPOINTS)
    if found is None:
        raise InputError(f"weights is {weights}, but {run} has no checkpoints; take --weights ema")
    name = snapshot.MODEL if weights == "raw" else snapshot.ema_file(float(weights))
    if not (found.path / name).is_file():
        raise InputError(
            f"weights is {weights}, but the run averages at {found.state['config']['ema_decay']} only; take one of these, ema or raw"
        )
    pipeline.unet.load_state_dict(safetensors.torch.load(found.read(name)))


def _batches(missing: list[int], config: SampleConfig) -> Iterator[range]:
    """Whole batches of consecutive indices in which something is missing: the same batches whatever was there before."""
    wanted = set(missing)
    for first in range(0, config.num_images, config.batch_size):
        indices = range(first, min(first + config.batch_size, config.num_images))
        if not wanted.isdisjoint(indices):
            yield indices


def _name(k: int) -> str:
    return f"{k:06d}.png"


def _prepare(folder: Path, config: SampleConfig, pipeline: PixelPipeline) -> list[int]:
    """Makes the folder this command's own and returns the indices that have no image yet."""
    settings = _settings(config, pipeline)
    with said_if_not_writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
    remove_drafts(folder)
    there = sorted(p.name for p in folder.iterdir())
    if SETTINGS in there:
        before = _read_settings(folder / SETTINGS)
        changed = [f"{name} was {before.get(name)}, now {value}" for name, value in settings.items() if before.get(name) != value]
        if changed:
            raise InputError(f"output_dir {folder} holds images of other settings ({'; '.join(changed)}); name another --output_dir")
    elif there:
        raise InputError(f"output_dir {folder} holds other files, such as {there[0]}; name a new or empty folder")
    else:
        write_file(folder / SETTINGS, (json.dumps(settings, indent=2) + "\n").encode())
    beyond = [name for name in there if name.endswith(".png") and name not in {_name(k) for k in range(config.num_images)}]
    if beyond:
        raise InputError(f"output_dir {folder} holds more than {config.num_images} images, such as {beyond[0]}; name another --output_dir")
    return [k for k in range(config.num_images) if _name(k) not in there]


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = dict(json.loads(path.read_text()))
    except ValueError as error:
        raise InputError(f"{path} is damaged; remove its folder, or name another --output_dir") from error
    return settings


def _settings(config: SampleConfig, pipeline: PixelPipeline) -> dict[str, Any]:
    """Everything that decides what image k looks like."""
    digest = hashlib.sha256(safetensors.torch.save(pipeline.unet.state_dict()))
    names = ("scheduler", "steps", "spacing", "seed", "guidance_scale")
    chosen = {name: value for name, value in dataclasses.asdict(config).items() if name in names}
    return {**chosen, "class_labels": list(config.class_labels), "model_sha256": digest.hexdigest()}


def _finish(folder: Path, config: SampleConfig, labels: list[int] | None) -> None:
    """Metadata, which makes the folder a data set, and a picture of the first images."""
    rows = [
        {"file_name": _name(k), **({"label": labels[k % len(labels)]} if labels else {}), "seed": (config.seed + k) % 2**32}
        for k in range(config.num_images)
    ]
    write_file(folder / METADATA, "".join(json.dumps(row) + "\n" for row in rows).encode())
    paths = [folder / _name(k) for k in range(min(config.num_images, GRID_IMAGES))]
    first = [images.decode(read_file(path), str(path)) for path in paths]
    write_file(folder / GRID, images.png(images.grid(first)))
    say(f"{config.num_images} images in {folder}, a picture of them in {folder / GRID}")
