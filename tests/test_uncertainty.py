"""The learned uncertainty: its loss by hand, its minimum, one objective in every space, and a training with it."""

import math

import pytest
import torch
from conftest import as_ranks, same, tensors, train_args
from diffusers import DDPMPipeline
from here import tiny, trained_here
from safetensors.torch import load

from debias_diffusers.config.schema.objective import ObjectiveConfig
from debias_diffusers.config.schema.training import OptimizationConfig
from debias_diffusers.config.validation.optimization import sharding_problems
from debias_diffusers.config.validation.training import train_problems
from debias_diffusers.diffusion.loss import make_objective
from debias_diffusers.diffusion.noise_schedule import prediction_of_x_0
from debias_diffusers.diffusion.uncertainty import Uncertainty
from debias_diffusers.sampling.pixel_job import open_model
from debias_diffusers.training.hooks import ValidationLoss

FLAGS = ["--learned_uncertainty", "--checkpoint_every", 3, "--max_grad_norm", 1]
FLAGS += ["--validation_split", 0.02, "--validation_every", 3, "--lr_schedule", "constant", "--warmup_steps", 0]


@pytest.fixture
def uncertainty():
    made = Uncertainty(1000)
    torch.nn.init.normal_(made.coefficients, std=0.02, generator=torch.Generator().manual_seed(0))
    return made


def test_u_is_a_cosine_series_that_begins_at_0(uncertainty):
    t = torch.tensor([0, 7, 999])
    assert Uncertainty(1000)(t).tolist() == [0, 0, 0]
    series = [10 * sum(c * math.cos(math.pi * k * (n + 0.5) / 1000) for k, c in enumerate(uncertainty.coefficients.tolist())) for n in t]
    assert uncertainty(t).tolist() == pytest.approx(series, rel=1e-5)


def test_the_loss_is_the_weighted_one_over_e_u_plus_u_in_every_space(uncertainty):
    x_0, noise, guess = torch.randn(3, 5, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t, grads = torch.tensor([10, 200, 500, 800, 950]), []
    for space in ("epsilon", "sample", "v_prediction"):
        objective = make_objective(ObjectiveConfig(prediction_type=space))
        schedule, leaf = objective.schedule, guess.clone().requires_grad_()
        a, s = (table[t].view(-1, 1, 1, 1) for table in (schedule.a, schedule.s))
        prediction = prediction_of_x_0(space, leaf, schedule.add_noise(x_0, noise, t), a, s)
        terms = objective.terms(prediction, x_0, noise, t, uncertainty)
        u, plain = uncertainty(t).double(), objective.terms(prediction, x_0, noise, t).loss
        torch.testing.assert_close(terms.loss, plain / u.exp() + u)
        torch.testing.assert_close(terms.precision, (-u).exp())
        uncertainty.zero_grad()
        terms.loss.sum().backward()
        grads.append((leaf.grad, uncertainty.coefficients.grad.clone()))
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], rtol=1e-5, atol=1e-10)


def test_u_learns_the_logarithm_of_the_loss():
    """L e^-u + u is least at u = ln L, where its value is 1 + ln L."""
    t, learned = torch.arange(0, 1000, 5), Uncertainty(1000)
    losses = torch.exp(-3 * t / 1000 + torch.sin(t / 200))
    optimizer = torch.optim.Adam(learned.parameters(), lr=3e-3)
    for _ in range(600):
        optimizer.zero_grad()
        u = learned(t)
        (losses * torch.exp(-u) + u).mean().backward()
        optimizer.step()
    assert (learned(t) - losses.log()).abs().mean() < 0.02


def test_a_training_with_it_resumes_with_the_same_bits_and_exports_a_stock_network(tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    trainer = trained_here(tiny(whole, *FLAGS, "--max_steps", 6))
    for steps in (3, 6):
        trained_here(tiny(resumed, *FLAGS, "--max_steps", steps))
    same(whole, resumed, 6, more=["uncertainty.safetensors"])
    found = load(tensors(whole, 6)["uncertainty.safetensors"])
    names = ("model", "ema_0.9", "ema_0.99")
    assert set(found) == {f"{name}/uncertainty.coefficients" for name in names}
    raw, first, second = (found[f"{name}/uncertainty.coefficients"] for name in names)
    assert 0 < second.norm() < first.norm() < raw.norm()  # averaged with the network
    assert "uncertainty.coefficients/exp_avg" in load(tensors(whole, 6)["optimizer.safetensors"])
    networks = [open_model(str(whole), weights).unet for weights in ("ema", "raw", "0.99")]
    for network in (DDPMPipeline.from_pretrained(whole).unet, *networks):
        assert not [name for name in network.state_dict() if "uncertainty" in name]
    (validation,) = (hook for hook in trainer.hooks if isinstance(hook, ValidationLoss))
    assert torch.equal(validation.network.uncertainty.coefficients, first)


@pytest.mark.nightly
def test_two_processes_resume_with_the_same_bits(tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for folder, steps in ((whole, 6), (resumed, 3), (resumed, 6)):
        flags = [*FLAGS, "--micro_batch_size", 2, "--max_steps", steps]
        code, err = as_ranks(2, *train_args(folder, *flags))
        assert code == 0, err
    same(whole, resumed, 6, more=["uncertainty.safetensors"])


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--timestep_sampler", "loss_second_moment"], "draws by the size of the losses"),
        (["--sharded_checkpoints"], "sharded_checkpoints is True, but learned_uncertainty"),
        (["--weighting", "variational", "--learn_sigma"], "changes nothing in weighting variational"),
    ],
)
def test_what_does_not_go_with_it_is_refused(flags, said, tmp_path):

    (problem,) = train_problems(tiny(tmp_path, "--learned_uncertainty", *flags))
    assert said in problem
    assert "learned_uncertainty" in sharding_problems(OptimizationConfig(), ObjectiveConfig(learned_uncertainty=True))[0]
