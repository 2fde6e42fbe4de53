"""Averaged weights of any sigma_rel, reconstructed from the snapshots of a run (post-hoc EMA, arXiv 2312.02696)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import safetensors.torch
from safetensors import safe_open
from torch import Tensor

from ..config.loading import CONFIG
from ..diffusion.power_ema import KEPT, combination
from ..errors import InputError
from ..hub.client import WEIGHTS
from ..runs import checkpoints, ema_snapshots
from ..runs.model_folder import MODEL_INDEX, model_index
from ..runs.run_directory import CHECKPOINTS
from ..utils.console import say
from ..utils.files import filled_folder, link_or_copy, new_folder

FAR = 0.05  # of the norm of an average's weights of the steps that the snapshots cannot make, from which on it is said


def reconstructed(run: Path, sigma_rel: float, step: int | None = None) -> tuple[dict[str, Tensor], int]:
    """The weights of a run averaged with sigma_rel up to a step (that of the newest snapshot if None), float32, and the step.

    Raises:
        InputError: there are no snapshots up to there, or one is damaged.
    """
    there = checkpoints.list_checkpoints(run / CHECKPOINTS)
    newest = checkpoints.step_of_folder(there[-1]) if there else 0  # whose snapshot a training may not have made yet

    def read() -> tuple[dict[str, Tensor], int]:
        last = newest if step is None else step
        steps = ema_snapshots.steps(run, last)
        if not steps:
            raise InputError(f"sigma_rel is {sigma_rel}, but {run} has no EMA snapshots up to step {last}; train with --post_hoc_ema 32")
        end = steps[-1] if step is None else step
        return _combined(run, steps, sigma_rel, end), end

    return checkpoints.read_beside_training(run / ema_snapshots.FOLDER, read)


def _combined(run: Path, steps: Sequence[int], sigma_rel: float, end: int) -> dict[str, Tensor]:
    """The average of sigma_rel after step `end`, from the snapshots of `steps`."""
    coefficients, missing = combination(steps, sigma_rel, end)
    if missing > FAR:
        say(f"warning: the {len(steps)} snapshots of {run} miss the average of sigma_rel {sigma_rel} at step {end} by {missing:.0%}")
    total: dict[str, Tensor] = {}
    for snapshot, row in zip(steps, coefficients.tolist()):
        for name, tensor, factor in _tensors(run / ema_snapshots.FOLDER / checkpoints.folder_name(snapshot), row):
            total[name] = total[name].add_(tensor.double(), alpha=factor) if name in total else factor * tensor.double()
    return {name: tensor.float() for name, tensor in total.items()}


def _tensors(folder: Path, factors: Sequence[float]) -> Iterator[tuple[str, Tensor, float]]:
    """Name, tensor and factor of every tensor of a snapshot, one after the other."""
    try:
        snapshot = checkpoints.verify(folder)
    except checkpoints.DamagedError as error:
        raise InputError(f"EMA snapshot {folder}: {error}; move it away, and the others are used") from error
    for sigma_rel, factor in zip(KEPT, factors):
        with safe_open(snapshot.path / ema_snapshots.power_file(sigma_rel), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                yield name, file.get_tensor(name), factor


def reconstruct(run: str, sigma_rel: float, out: str | None, step: int | None) -> None:
    """Writes a pipeline folder with the weights of a run averaged with sigma_rel; the other files are those of the run.

    Args:
        run: the run directory.
        sigma_rel: of the average.
        out: the folder, which must not exist; in the run directory if None.
        step: as of `reconstructed`.

    Raises:
        InputError: the run has no snapshots, or the folder exists.
        CannotWriteError: it cannot be written.
    """
    source = Path(run)
    folder = new_folder(out or str(source / f"sigma_rel-{sigma_rel:g}"))
    weights, step = reconstructed(source, sigma_rel, step)
    with filled_folder(folder, MODEL_INDEX) as temporary:
        link_or_copy(source / MODEL_INDEX, temporary / MODEL_INDEX)
        if (source / CONFIG).is_file():  # which says the size of the images, and how prompts are read
            link_or_copy(source / CONFIG, temporary / CONFIG)
        for part in (name for name, value in model_index(source).items() if isinstance(value, list)):
            for path in sorted((source / part).glob("[!.]*")):
                if part != "unet" or (path.suffix == ".json" and "index" not in path.name):
                    link_or_copy(path, temporary / part / path.name)
        safetensors.torch.save_file(weights, temporary / "unet" / f"{WEIGHTS}.safetensors", metadata={"format": "pt"})
    say(f"step {step} of {run} averaged with sigma_rel {sigma_rel:g} is in {folder}")
