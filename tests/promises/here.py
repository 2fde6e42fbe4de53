"""A training within the process of the test, so that the test can reach into it."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import TINY

from debias_diffusers.cli import train_config
from debias_diffusers.runs.run_directory import open_run
from debias_diffusers.training import device
from debias_diffusers.training import trainer as training_loop
from debias_diffusers.training.setup.build import make_trainer
from debias_diffusers.training.trainer import Trainer


def tiny(folder, *flags):
    """The configuration of the tiny run with some flags."""
    return train_config([str(flag) for flag in ("--config", TINY, "--output_dir", folder, *flags)], None)


def trained_here(config, scaler=None):
    """Trains; returns the trainer as it ended. `scaler` is fp16's, which a CPU is otherwise refused."""
    AcceleratorState._reset_state(True)  # which remembers the precision of the first run of a process
    accelerator = device.start_accelerator(config)
    accelerator.scaler = scaler or accelerator.scaler
    run = open_run(config)
    try:
        trainer, _ = make_trainer(config, run, accelerator)
        if scaler:
            accelerator.unscale_gradients = lambda: scaler.unscale_(trainer.state.optimizer_step.optimizer)
        trainer.train(SimpleNamespace(signum=0))
    finally:
        accelerator.end_training()
        run._lock.close()
        AcceleratorState._reset_state(True)
    return trainer


def as_one_of_two(monkeypatch):
    """The training loop takes its process for one of two, of which the other does and says the same."""
    train = Trainer.train

    def with_another(trainer, stop):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Accelerator, "num_processes", 2)
            patch.setattr(Accelerator, "gather", lambda _, tensor: torch.cat([tensor, tensor]))
            patch.setattr(training_loop, "gather_from_all", lambda work, _: work())
            return train(trainer, stop)

    monkeypatch.setattr(Trainer, "train", with_another)
