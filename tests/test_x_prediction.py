"""A network that predicts x_0 on the straight path: its loss on u, its solvers, and what is exported."""

import json

import pytest
import torch
from conftest import sample_config
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from here import tiny, trained_here

from debias_diffusers import PixelPipeline, loss_weight
from debias_diffusers.config.schema.objective import ObjectiveConfig
from debias_diffusers.config.validation.objective import objective_problems
from debias_diffusers.diffusion.loss import make_objective
from debias_diffusers.diffusion.noise_schedule import make_schedule
from debias_diffusers.diffusion.weighting import WEIGHTING_FUNCTIONS
from debias_diffusers.pipelines.solvers import SampleFlowMatchEuler, exported_scheduler, make_scheduler
from debias_diffusers.sampling.generate import make_job

STRAIGHT = {"prediction_type": "sample", "noise_schedule": "rectified_flow"}
ON_U = ObjectiveConfig(weighting="flow", **STRAIGHT)


def test_the_weighting_flow_on_x_0_is_the_squared_error_of_u():
    objective = make_objective(ON_U)
    x_0, noise, guess = torch.randn(3, 4, 1, 4, 4, dtype=torch.float64)
    t = torch.tensor([9, 99, 499, 899])
    terms = objective.terms(guess, x_0, noise, t)
    level = (t + 1).double().view(-1, 1, 1, 1) / 1000
    x_t = (1 - level) * x_0 + level * noise
    velocity = (x_t - guess) / level
    torch.testing.assert_close(terms.loss, (velocity - (noise - x_0)).square().mean((1, 2, 3)))


@pytest.mark.parametrize("name", WEIGHTING_FUNCTIONS)
def test_a_weighting_is_one_objective_for_x_0_and_u(name):
    """Gradients of a guess of x_0, scored as it is and as u."""
    x_0, noise, guess = torch.randn(3, 4, 1, 4, 4, dtype=torch.float64)
    t, grads = torch.tensor([9, 99, 499, 899]), []
    level = (t + 1).double().view(-1, 1, 1, 1) / 1000
    for options in (STRAIGHT, {"prediction_type": "flow"}):
        leaf = guess.clone().requires_grad_()
        objective = make_objective(ObjectiveConfig(weighting=name, **options))
        velocity = ((1 - level) * x_0 + level * noise - leaf) / level
        objective.terms(velocity if options["prediction_type"] == "flow" else leaf, x_0, noise, t).loss.sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=0)


@pytest.mark.parametrize("solver", ("flow_euler", "flow_heun"))
def test_the_solvers_step_as_those_of_the_same_network_on_u(solver):
    """x_0 of N(0.3, 0.5^2): E[x_0 | x_t] is known, and so is u."""
    drawn = []
    for options in (STRAIGHT, {"prediction_type": "flow"}):
        own = exported_scheduler(ObjectiveConfig(schedule_shift=4.0, **options))
        scheduler = make_scheduler(solver, own, "linspace", 12)
        x = torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for step in scheduler.timesteps:
            t = step.double() / 1000
            x_0 = 0.3 + (1 - t) * 0.25 / ((1 - t) ** 2 * 0.25 + t**2) * (x - (1 - t) * 0.3)
            x = scheduler.step(x_0 if options is STRAIGHT else (x - x_0) / t, step, x).prev_sample
        drawn.append(x)
    torch.testing.assert_close(*drawn, rtol=1e-5, atol=1e-5)


def test_a_trained_one_is_exported_with_its_scheduler_and_draws(tmp_path):
    flags = [
        "--prediction_type",
        "sample",
        "--noise_schedule",
        "rectified_flow",
        "--weighting",
        "flow",
        "--max_steps",
        3,
        "--warmup_steps",
        0,
    ]
    flags += ["--timestep_sampler", "logit_normal", "--timestep_mean", 0.8, "--timestep_std", 0.8]
    trained_here(tiny(tmp_path / "run", *flags))
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run")
    assert type(pipeline) is PixelPipeline and type(pipeline.scheduler) is SampleFlowMatchEuler
    job = make_job(sample_config(tmp_path / "run", tmp_path / "out", steps=4, clipping="static"), "cpu")
    assert job.settings["scheduler"] == "flow_heun" and job.draw(range(2)).shape == (2, 1, 8, 8)
    _, ((_, x_0), *_) = job.watch(range(2), [0])
    assert x_0.abs().max() <= 1
    card = (tmp_path / "run" / "README.md").read_text()
    assert "from debias_diffusers import PixelPipeline" in card and "take no x_0 on the straight path" in card
    assert json.loads((tmp_path / "run" / "model_index.json").read_text())["scheduler"][1] == "SampleFlowMatchEuler"


def test_loss_weight_knows_x_0_on_the_straight_path():
    t = torch.tensor([250.0, 500.0])
    on_x_0 = loss_weight(FlowMatchEulerDiscreteScheduler(), t, "flow", prediction_type="sample")
    torch.testing.assert_close(on_x_0, (1000 / t).square())
    assert torch.equal(loss_weight(exported_scheduler(ON_U), t, "flow"), on_x_0)
    assert make_schedule(ON_U).ends_in_noise


@pytest.mark.parametrize(
    "options, said",
    [
        ({"prediction_type": "epsilon"}, "noise_schedule is rectified_flow, but prediction_type is epsilon; take --prediction_type sample"),
        ({"rescale_betas_zero_snr": True}, "noise_schedule rectified_flow ends at zero SNR as it is"),
        ({"learn_sigma": True}, "noise_schedule rectified_flow is sampled without random steps"),
        ({"weighting": "debiased_as_is"}, "weighting debiased_as_is is infinite where the SNR is 0"),
    ],
)
def test_what_does_not_go_with_the_straight_path_is_refused(options, said):
    (problem,) = objective_problems(ObjectiveConfig(**{**STRAIGHT, **options}))
    assert said in problem
