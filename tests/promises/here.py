"""A training within the process of the test, so that the test can reach into it."""

from types import SimpleNamespace

from accelerate.state import AcceleratorState
from conftest import TINY

from debias_diffusers.cli import train_config
from debias_diffusers.runs.run_directory import open_run
from debias_diffusers.training import device
from debias_diffusers.training.setup.build import make_trainer


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
