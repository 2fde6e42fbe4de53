"""`--num_epochs`: the length of a run in epochs, which becomes max_steps as soon as the number of training images is known."""

import json
import math

import pytest
from conftest import TINY, metrics
from here import tiny, trained_here

from debias_diffusers.cli import train_config
from debias_diffusers.config.choices import choose, left_out, steps_of_epochs
from debias_diffusers.config.loading import layered, resolved
from debias_diffusers.config.schema.training import OptimizationConfig
from debias_diffusers.config.validation.training import train_problems
from debias_diffusers.errors import InputError


def configured(*args):
    return train_config([str(arg) for arg in args], None)


def test_epochs_become_steps_that_a_resume_keeps(tmp_path):
    run, flags = tmp_path / "run", ["--warmup_steps", 0, "--lr_schedule", "constant", "--num_epochs"]
    trained_here(tiny(run, *flags, 0.05))
    steps = math.ceil(math.ceil(0.05 * 1797) / 8)
    assert steps == 12 and metrics(run)[-1]["step"] == steps
    written = json.loads((run / "config.json").read_text())
    assert written["max_steps"] == steps and "num_epochs" not in written
    assert configured("--resume", run).optimization.max_steps == steps
    assert trained_here(tiny(run, *flags, 0.05)).step == steps
    # More epochs, with another batch size from here on: the images of all epochs, once each.
    more = ["--num_epochs", 0.06, "--batch_size", 5, "--allow_change", "batch_size"]
    trainer = trained_here(configured("--resume", run, *more))
    assert trainer.step == trainer.config.optimization.max_steps == 12 + math.ceil((108 - 96) / 5)


def test_epochs_are_rounded_up_to_steps():
    optim = OptimizationConfig(num_epochs=3, batch_size=64)
    assert steps_of_epochs(optim, 1797) == math.ceil(3 * 1797 / 64)
    assert [steps_of_epochs(optim, images) for images in (64, 65, 1)] == [3, 4, 1]
    assert steps_of_epochs(optim, 64, step=5, position=320) == 5  # a run that has seen more is finished


def test_epochs_replace_the_steps_of_a_configuration_and_the_other_way_round(tmp_path):
    assert configured("--config", TINY, "--num_epochs", 2).optimization.max_steps == OptimizationConfig().max_steps
    (tmp_path / "epochs.yaml").write_text("num_epochs: 2\n")
    assert configured("--config", tmp_path / "epochs.yaml", "--max_steps", 7).optimization.num_epochs is None
    with pytest.raises(InputError, match="decides the length of the run; leave out"):
        configured("--config", TINY, "--num_epochs", 2, "--max_steps", 7)
    both = layered({"dataset": "digits", "resolution": 8, "output_dir": "x", "num_epochs": 2.0, "max_steps": 7})
    assert "num_epochs is 2, but max_steps is 7; give one of the two" in train_problems(resolved(both, None))


def test_a_warmup_that_is_longer_than_the_epochs_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"num_epochs 0.01 of 1797 images: warmup_steps is 4, but max_steps is only 3; take --warmup_steps 0"
    ):
        trained_here(tiny(tmp_path / "run", "--num_epochs", 0.01))


def test_a_plain_command_chooses_the_rest_for_its_epochs():
    typed = {"dataset", "resolution", "num_epochs"}
    config = resolved(layered({"dataset": "photos", "resolution": 32, "output_dir": "x", "num_epochs": 10.0}), None)
    assert "max_steps" not in left_out(typed)
    found, _ = choose(config, left_out(typed), images=6400, gpu=True)
    assert (found.optimization.num_epochs, found.optimization.warmup_steps, found.run.sample_every) == (10, 50, 100)
    assert train_problems(choose(config, left_out(typed), images=0, gpu=True)[0]) == []
