"""Snapshots of the power-function averages of a run, of which others are reconstructed after the training; no torch.

    ema_snapshots/step-00001000/{power_0.05.safetensors, power_0.1.safetensors, state.json, manifest.json}

Each has the format of a checkpoint, from whose files it is made by hard links.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ..utils.files import link_or_copy, remove_folder, translate_write_errors
from . import checkpoints

FOLDER = "ema_snapshots"  # in a run directory
_ALL = 1 << 62


def power_file(sigma_rel: float) -> str:
    """The file of a checkpoint or a snapshot with a power-function average."""
    return f"power_{sigma_rel}.safetensors"


def add(run: Path, checkpoint: Path, keep: int) -> None:
    """Makes a snapshot of a checkpoint that was written, and removes others beyond `keep`, as `thinned` chooses them.

    Raises:
        CannotWriteError: the snapshot is not there, and no other was removed.
    """
    folder, step = run / FOLDER, checkpoints.step_of_folder(checkpoint)
    files = [(path.name, partial(link_or_copy, path)) for path in sorted(checkpoint.glob("power_*.safetensors"))]
    checkpoints.write(folder, step, files, {"step": step}, keep=_ALL)
    stay = thinned(steps(run, step), keep)
    for other in steps(run, step):
        if other not in stay:
            with translate_write_errors(folder):
                remove_folder(folder / checkpoints.folder_name(other))


def steps(run: Path, last: int) -> list[int]:
    """The steps of the snapshots of a run up to the step `last`, in order. Later ones are of steps that were lost and are made anew."""
    there = (checkpoints.step_of_folder(path) for path in checkpoints.list_checkpoints(run / FOLDER))
    return [step for step in there if step <= last]


def thinned(steps: Sequence[int], keep: int) -> list[int]:
    """The snapshots that stay: while there are more than `keep`, that goes whose neighbours are nearest to each other.

    Of equals the oldest goes; the newest stays. So the snapshots stay about evenly spaced.
    """
    left = sorted(steps)
    while len(left) > keep:
        before = [0, *left]
        apart = [left[place + 1] - before[place] for place in range(len(left) - 1)]
        del left[apart.index(min(apart))]
    return left
