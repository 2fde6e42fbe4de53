"""What a step leaves behind, written by the first process, beside the training where memory allows: pipeline, checkpoint, push."""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config.loading import CHANGES
from ..config.schema.training import TrainConfig
from ..diffusion.uncertainty import NAME as UNCERTAINTY_MODULE
from ..errors import CannotWriteError
from ..hub.client import WEIGHTS
from ..hub.model_card import changes_section
from ..hub.publish import Publisher
from ..runs import checkpoints, ema_snapshots
from ..runs.run_directory import Run
from ..tasks.base import Task
from ..utils import memory
from ..utils.background import BackgroundTask
from ..utils.console import say
from ..utils.files import link_or_copy, move_file, temporary_folder, translate_write_errors, write_file
from . import state_dicts
from .logger import due

Tensors = Mapping[str, Mapping[str, Tensor]]  # by file and name, as `state_dicts.gather` gives them


class Saver(BackgroundTask[str | None]):
    """Saves one step after the other; the result of a save is what went wrong with it, or None."""

    def __init__(
        self, run: Run, config: TrainConfig, task: Task, network: nn.Module, device: torch.device, publisher: Publisher | None
    ) -> None:
        """`network` is the one that is trained on `device`; its modules are exported with the averaged weights."""
        super().__init__()
        self.run, self.config, self.task, self.network, self.device, self.publisher = run, config, task, network, device, publisher
        self._has_frozen_files = False  # in the run directory, as they are compared once
        begin = run.resume.step if run.resume else 0
        self._damaged = {step for step in map(checkpoints.step_of_folder, checkpoints.list_checkpoints(run.checkpoints)) if step > begin}

    def save(self, tensors: Tensors, state: dict[str, Any], final: bool, shards: Path | None = None) -> None:
        """Begins; the final save is done when this returns.

        Args:
            tensors: as of `state_dicts.gather`, or of `exported` with `shards`; the training may go on and change them.
            state: of state.json.
            final: the last one, on whose result the run's exit code depends, so that who waits for it says what went wrong.
            shards: the folder with the files of all processes, which become the checkpoint's.
        """
        beside = not final and memory.free_memory() > 2 * state_dicts.size(tensors)
        if beside:
            tensors = state_dicts.copied(tensors, self.device)
        self.start(partial(self._save, tensors, state, final, shards), beside)

    def _save(self, tensors: Tensors, state: dict[str, Any], final: bool, shards: Path | None) -> str | None:
        """Writes, and hands over what is to be pushed; says at once what went wrong, if something did, unless it will end the run."""
        problem = self._write(tensors, state, shards)
        if problem is None and self.publisher:
            self._publish(self.publisher, state["step"], final)
        if problem and not final:
            say(f"step {state['step']} was not saved: {problem}; training goes on")
        return problem

    def _publish(self, publisher: Publisher, step: int, final: bool) -> None:
        """Hands what was just saved over to be pushed, or has what was handed over before tried again."""
        every = self.config.hub.hub_every
        if final or every is None or due(step, every):
            publisher.offer(step)
        else:
            publisher.resume()

    def _write(self, tensors: Tensors, state: dict[str, Any], shards: Path | None) -> str | None:
        """Export and checkpoint; what went wrong, if something did."""
        try:
            self.run.metrics.sync()
            self._export(self.run.folder, tensors, state)
            keep = self.config.run.keep_checkpoints
            best = int(state["best"]["step"]) if state["best"] and self.config.run.keep_best else None
            files = _writers(tensors, shards)
            written = checkpoints.write(self.run.checkpoints, state["step"], files, state, keep, best, self._damaged)
            self._damaged.discard(state["step"])
        except CannotWriteError as error:
            return f"{error}; a save needs about {state_dicts.size(tensors) / 1e6:.1f} MB"
        finally:
            if shards:
                shutil.rmtree(shards, ignore_errors=True)
        if self.config.optimization.post_hoc_ema:
            self._add_snapshot(written)
        return None

    def _add_snapshot(self, checkpoint: Path) -> None:
        """Where the disk has no room for it, the step is saved nevertheless: averages are made of the other snapshots."""
        try:
            ema_snapshots.add(self.run.folder, checkpoint, self.config.optimization.post_hoc_ema)
        except CannotWriteError as error:
            say(f"no EMA snapshot at step {checkpoints.step_of_folder(checkpoint)}: {error}")

    def _export(self, folder: Path, tensors: Tensors, state: dict[str, Any]) -> None:
        """Makes the run directory a pipeline folder, with the averaged weights of the first rate."""
        weights = tensors[checkpoints.weights_file(self.config.optimization.ema_decay[0])]
        network = state_dicts.with_weights(self.network, {name: value.detach().contiguous() for name, value in weights.items()})
        if hasattr(network, UNCERTAINTY_MODULE):
            delattr(network, UNCERTAINTY_MODULE)  # of this copy: stock pipelines do not know it
        if not self._has_frozen_files:
            self._place_frozen_files(folder)
        # The error names the free space after the temporary folder is removed.
        with translate_write_errors(folder), temporary_folder(folder / "export") as export:
            self.task.export(network, export)
            # File by file, each atomically; only the weights differ from one export to the next.
            for path in sorted(p for p in export.rglob("*") if p.is_file()):
                move_file(path, folder / path.relative_to(export))
        # Of an older version, which wrote shards from 10 GB on: they would be loaded in place of the file; first by their index.
        for shards in (f"{WEIGHTS}.safetensors.index.json", f"{WEIGHTS}-*-of-*.safetensors"):
            for path in (folder / "unet").glob(shards):
                path.unlink()
        card = self.task.model_card(self.config, state["step"], state["measured"]) + changes_section(state.get(CHANGES, ()))
        write_file(folder / "README.md", card.encode())

    def _place_frozen_files(self, folder: Path) -> None:
        """Links or copies the files that no training changes, unless they are there, and not those of another start's base model."""
        for name, path in self.task.frozen_files().items():
            there = folder / name
            if not (there.is_file() and (there.samefile(path) or filecmp.cmp(there, path, shallow=False))):
                link_or_copy(path, there)
        self._has_frozen_files = True


def _writers(tensors: Tensors, shards: Path | None) -> Iterator[tuple[str, checkpoints.Writer]]:
    """The files of a checkpoint: the tensors, or files that the processes have written, and what is in none of them."""
    if shards is None:
        yield from state_dicts.writers(tensors)
        return
    yield from ((path.name, partial(os.replace, path)) for path in sorted(shards.iterdir()))
    yield from state_dicts.writers({name: values for name, values in tensors.items() if name == checkpoints.SAMPLER})
