"""A training that is fast is the same training: what is done beside it, kept, laid out or recomputed changes no result."""

import time

import pytest
import torch
from conftest import same, tensors
from here import tiny, trained_here
from safetensors.torch import load

from debias_diffusers import checkpoint, machine, training
from debias_diffusers.background import Background


class Slow:
    """Holds each write of a checkpoint up until the training has gone on, for half a second at most, and notes whether it had."""

    def __init__(self, patch):
        self.gone_on, self.trainer = [], None
        write, launch = checkpoint.write, training.Trainer._launch

        def slow(folder, step, *args):
            end = time.monotonic() + 0.5
            while self.trainer.step == step and time.monotonic() < end:
                time.sleep(0.001)
            self.gone_on.append(self.trainer.step > step)
            return write(folder, step, *args)

        def seen(trainer, *args):
            self.trainer = trainer
            return launch(trainer, *args)

        patch.setattr(checkpoint, "write", slow)
        patch.setattr(training.Trainer, "_launch", seen)


def test_a_save_beside_the_training_has_the_tensors_of_its_step(trained, tmp_path, monkeypatch):
    slow = Slow(monkeypatch)
    trained_here(tiny(tmp_path / "run", "--keep_checkpoints", 4))
    assert slow.gone_on == [True, True, True, False]  # the last is waited for
    for step in (18, 24):
        assert tensors(tmp_path / "run", step) == tensors(trained, step)
    same(trained, tmp_path / "run", 24)


def test_without_memory_for_a_copy_the_training_waits_for_the_save(trained, tmp_path, monkeypatch):
    slow = Slow(monkeypatch)
    monkeypatch.setattr(machine, "free_memory", lambda: 1)
    trained_here(tiny(tmp_path / "run", "--max_steps", 12, "--lr_schedule", "constant"))
    assert slow.gone_on == [False, False]


def test_what_goes_wrong_beside_is_raised_where_the_result_is_asked_for():
    background = Background()
    assert background.result() is None
    for beside in (True, False):
        background.start(lambda: 1 / 0, beside)
        background.wait()
        with pytest.raises(ZeroDivisionError):
            background.result()
        assert background.result() is None


def test_free_memory_is_no_more_than_the_machine_has():
    assert 2**20 < machine.free_memory() <= machine.psutil.virtual_memory().total


def test_a_resumed_run_lays_its_moments_as_its_weights(trained, tmp_path):
    """Channels last on a CPU in float32; the files have the usual layout."""
    trained_here(tiny(tmp_path / "run", "--max_steps", 12, "--lr_schedule", "constant"))
    trainer = trained_here(tiny(tmp_path / "run", "--max_steps", 13, "--lr_schedule", "constant"))
    convolutions = [p for p in trainer.parameters if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert convolutions and all(p.is_contiguous(memory_format=torch.channels_last) for p in convolutions)
    for parameter, moments in trainer.adamw.state.items():
        assert moments["exp_avg"].stride() == moments["exp_avg_sq"].stride() == parameter.stride()
    kept = load(tensors(tmp_path / "run", 13)["model.safetensors"])
    for name, weight in trainer.model.named_parameters():
        assert torch.equal(kept[name], weight) and kept[name].is_contiguous()
