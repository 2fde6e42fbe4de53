"""`--validation_split`: images that are held out of training, and the loss of the EMA weights on them."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY, metrics, same
from diffusers import DDPMPipeline
from here import tiny, trained_here

from debias_diffusers.cli import train_config
from debias_diffusers.config.loading import layered
from debias_diffusers.config.schema.data import DataConfig
from debias_diffusers.config.validation.training import train_problems
from debias_diffusers.data.sources.opening import open_source
from debias_diffusers.data.validation_split import split_source
from debias_diffusers.errors import InputError
from debias_diffusers.tasks.pixels import PixelTask
from debias_diffusers.training import hooks
from debias_diffusers.training.hooks import ValidationLoss

FLAGS = ["--validation_split", 0.02, "--validation_every", 2, "--lr_schedule", "constant", "--warmup_steps", 0, "--checkpoint_every", 3]
DIGITS = open_source(DataConfig(dataset="digits", resolution=8))


def validation_of(trainer):
    (found,) = (hook for hook in trainer.hooks if isinstance(hook, ValidationLoss))
    return found


@pytest.fixture(scope="module")
def validated(tmp_path_factory):
    """A run of six steps, in two starts, and the trainer of the second."""
    folder = tmp_path_factory.mktemp("runs") / "resumed"
    for steps in (3, 6):
        trainer = trained_here(tiny(folder, *FLAGS, "--max_steps", steps))
    return folder, trainer


def test_held_out_images_are_never_trained_and_a_resume_keeps_them(validated, tmp_path):
    folder, trainer = validated
    task = trainer.task
    trained, held = task.data.source, task.held_out.source
    assert len(held) == round(0.02 * 1797) and sorted([*trained.indices, *held.indices]) == list(range(1797))
    assert {task.held_out.index(position) for position in range(len(held))} == set(range(len(held)))
    whole = tmp_path / "whole"
    trained_here(tiny(whole, *FLAGS, "--max_steps", 6))
    same(whole, folder, 6)
    assert [line["step"] for line in metrics(folder) if "validation_loss" in line] == [2, 4, 6]
    state = json.loads((folder / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert state["data"] == trained.fingerprint() and state["position"] == 6 * 8
    with pytest.raises(InputError, match=r"validation_split: the run has 0.02, this command says 0.1"):
        trained_here(tiny(whole, *FLAGS[2:], "--validation_split", 0.1, "--max_steps", 8))


def test_the_validation_loss_is_that_of_the_exported_network_by_hand(validated):
    folder, trainer = validated
    data, unet = trainer.task.held_out, DDPMPipeline.from_pretrained(folder).unet
    assert data.noise.input_perturbation == 0 and not data.config.random_flip
    samples = [data[k] for k in range(36)]
    x_0, noise = torch.stack([s["image"] for s in samples]) / 127.5 - 1, torch.stack([s["noise"] for s in samples])
    t = torch.tensor([int((k + sample["u"]) / 36 * 1000) for k, sample in enumerate(samples)])
    plain = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    snr = trainer.config.objective.schedule_shift * plain / (1 - plain)
    abar = torch.tensor(snr / (1 + snr), dtype=torch.float32)[t].view(-1, 1, 1, 1)
    with torch.no_grad():
        predicted = unet(abar.sqrt() * x_0 + (1 - abar).sqrt() * noise, t).sample
    squares = (predicted - noise).square().mean((1, 2, 3))
    line = [line for line in metrics(folder) if "validation_loss" in line][-1]
    assert line["validation_mse"] == pytest.approx(squares.mean().item(), rel=1e-4)
    weights = ((1 - abar) / abar).sqrt().flatten()
    assert line["validation_loss"] == pytest.approx((weights * squares).mean().item(), rel=1e-4)


def test_processes_that_share_the_images_measure_the_same(validated, monkeypatch):
    _, trainer = validated
    alone, parts = validation_of(trainer), []
    expected = alone.measure()

    class Process:
        device, num_processes = torch.device("cpu"), 2

        def __init__(self, rank):
            self.process_index = rank

    monkeypatch.setattr(hooks, "gather_from_all", lambda work, processes: parts.extend(work()) or parts)
    for rank in range(2):
        monkeypatch.setattr(alone, "accelerator", Process(rank))
        before = len(parts)
        found = alone.measure()
        assert 0 < len(parts) - before < 36
    assert len(parts) == 36 and found == pytest.approx(expected, rel=1e-6)


def test_the_loss_is_that_of_the_objective_where_its_timesteps_are_not_uniform(tmp_path):
    """Drawn equally often here, each is multiplied by its density."""
    flags = ["--timestep_sampler", "log_normal", "--timestep_bias_strategy", "later", "--timestep_bias_multiplier", 2]
    hook = validation_of(trained_here(tiny(tmp_path / "run", *FLAGS, *flags, "--max_steps", 1)))
    assert hook.density.mean().item() == pytest.approx(1) and hook.density.max() > 2 * hook.density.median()
    torch.testing.assert_close(hook.density, 1000 * hook_sampler(flags).probabilities)


def hook_sampler(flags):
    from debias_diffusers.diffusion.noise_schedule import make_schedule
    from debias_diffusers.diffusion.timestep_samplers import make_timestep_sampler

    objective = tiny("x", *flags).objective
    return make_timestep_sampler(objective, make_schedule(objective))


def test_labels_of_held_out_images_are_not_dropped():
    data = {"dataset": "digits", "resolution": 8, "class_conditional": True, "label_dropout": 0.9, "num_workers": 0}
    config = layered({**data, "channel_mult": (1, 2), "attention_resolutions": (4,), "model_channels": 64})
    trained, held = split_source(open_source(config.data), 0.1, 0)
    task = PixelTask(config, trained, None, held)
    assert 10 in {int(task.data[k]["label"]) for k in range(20)}
    assert 10 not in {int(task.held_out[k]["label"]) for k in range(len(held))}


def test_another_seed_holds_out_other_images_and_a_share_of_none_is_refused():
    one, same_again, other = (split_source(DIGITS, 0.1, seed)[1].indices for seed in (0, 0, 1))
    assert one == same_again and one != other and len(set(one) & set(other)) < 60
    assert split_source(DIGITS, 0, 0) == (DIGITS, None)
    with pytest.raises(InputError, match=r"validation_split is 0.0001, which holds out 0 of 1797 images"):
        split_source(DIGITS, 1e-4, 0)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--validation_every", "5"], "validation_split is 0; add --validation_split 0.1"),
        (["--validation_split", "0.1", "--validation_every", "0"], "images are held out for nothing"),
        (["--validation_split", "1"], "validation_split is 1.0, but must be at least 0 and below 1"),
    ],
)
def test_a_validation_without_images_or_for_nothing_is_refused(flags, said):
    (problem,) = train_problems(train_config(["--config", str(TINY), "--output_dir", "x", *flags], None))
    assert said in problem


def test_a_text_to_image_model_is_measured_on_held_out_captions(tmp_path):
    pytest.importorskip("transformers", reason="an extra")
    flags = ["--config", "digits_text", "--output_dir", tmp_path / "run", "--batch_size", 8, "--max_steps", 2, "--warmup_steps", 0]
    flags += ["--validation_split", 0.005, "--validation_every", 2, "--sample_every", 0, "--caption_dropout", 0.9, "--num_threads", 1]
    task = trained_here(train_config([str(flag) for flag in flags], None)).task
    held = [task.held_out[k] for k in range(9)]
    assert len(task.held_out.source) == 9 and len(task.data.source) == 1788
    assert not any(sample["dropped"] for sample in held) and all(sample["caption"] for sample in held)
    (line,) = (line for line in metrics(tmp_path / "run") if "validation_loss" in line)
    assert 0 < line["validation_loss"] < line["validation_mse"]  # debiased on v is at most a half
