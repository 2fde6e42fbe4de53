"""Schedule, weighting and loss against the reference implementation, diffusers, and closed forms."""

import math

import pytest
import torch
from conftest import GOLDEN
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, IPNDMScheduler
from safetensors.torch import load_file

from debias_diffusers import loss_weight
from debias_diffusers.config import ObjectiveConfig
from debias_diffusers.errors import InputError
from debias_diffusers.loss import make_objective
from debias_diffusers.schedule import betas_of_snr, make_schedule, snr_of_betas, snr_of_scheduler
from debias_diffusers.schedulers import exported_scheduler
from debias_diffusers.timesteps import uniform
from debias_diffusers.weighting import WEIGHTINGS, weight

NAMES = {"constant": "constant", "p2": "p2", "min_snr": "min_snr", "inverse_snr": "snr", "debiased": "debias"}
SPACES = ("epsilon", "sample", "v_prediction")
SCHEDULES = ("linear", "cosine", "scaled_linear")


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "losses.safetensors")


def test_every_weighting_has_a_row_here():
    assert set(NAMES) == set(WEIGHTINGS)


@pytest.mark.parametrize("weighting", NAMES)
def test_weights_equal_the_reference_at_every_timestep(golden, weighting):
    table = make_objective(ObjectiveConfig(weighting=weighting)).weights
    expected = golden[f"linear/weights/{NAMES[weighting]}"]
    assert table.dtype == torch.float64 and table.shape == (1000,)
    assert ((table - expected) / expected).abs().max() < 1e-6


@pytest.mark.parametrize("weighting", NAMES)
def test_weighted_terms_equal_the_reference(golden, weighting):
    objective = make_objective(ObjectiveConfig(weighting=weighting))
    prediction = golden["model_output"][:, :3]
    terms = objective.terms(prediction, golden["x0"], golden["noise"], golden["t"])
    torch.testing.assert_close(terms, golden[f"linear/epsilon/{NAMES[weighting]}"], rtol=1e-5, atol=0)


def test_noised_images_equal_the_reference(golden):
    x_t = make_schedule(ObjectiveConfig()).add_noise(golden["x0"], golden["noise"], golden["t"])
    torch.testing.assert_close(x_t, golden["linear/x_t"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "space, weighting, key",
    [
        ("sample", "inverse_snr", "linear/sample/constant"),  # 1/SNR on the noise is 1 on x_0
        ("sample", "min_snr", "linear/sample/min_snr"),
    ],
)
def test_terms_in_other_spaces_equal_the_reference_where_it_is_right(golden, space, weighting, key):
    objective = make_objective(ObjectiveConfig(weighting=weighting, prediction_type=space))
    terms = objective.terms(golden["model_output"][:, :3], golden["x0"], golden["noise"], golden["t"])
    torch.testing.assert_close(terms, golden[key], rtol=1e-5, atol=0)


def test_the_velocity_target_equals_the_reference(golden):
    schedule = make_schedule(ObjectiveConfig())
    target = schedule.target("v_prediction", golden["x0"], golden["noise"], golden["t"])
    mse = (golden["model_output"][:, :3] - target).square().mean((1, 2, 3))
    torch.testing.assert_close(mse, golden["linear/v_prediction/constant"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("weighting", NAMES)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("shift", (1.0, 64.0))
def test_one_weighting_gives_the_same_gradients_in_every_space(weighting, name, shift):
    torch.manual_seed(0)
    schedule = make_schedule(ObjectiveConfig(noise_schedule=name, schedule_shift=shift))
    x_0, noise, probe = torch.randn(3, 40, 1, 4, 4, dtype=torch.float64).unbind()
    t = torch.linspace(0, 999, 40).long()
    x_t = schedule.add_noise(x_0, noise, t)
    a, s = (table[t].view(-1, 1, 1, 1) for table in (schedule.a, schedule.s))
    gradients = []
    for space in SPACES:
        w = torch.ones_like(probe, requires_grad=True)
        guess = w * probe  # a linear model of x_0, seen in each space
        prediction = {"epsilon": (x_t - a * guess) / s, "sample": guess, "v_prediction": (a * x_t - guess) / s}[space]
        objective = make_objective(
            ObjectiveConfig(noise_schedule=name, schedule_shift=shift, weighting=weighting, prediction_type=space, snr_floor=1e-3)
        )
        objective.terms(prediction, x_0, noise, t).sum().backward()
        gradients.append(w.grad)
    for other in gradients[1:]:
        assert ((other - gradients[0]).abs() / gradients[0].abs().max()).max() < 1e-10


def test_the_debiased_weight_in_closed_form():
    schedule = make_schedule(ObjectiveConfig(noise_schedule="scaled_linear"))
    a, s = schedule.a, schedule.s
    for space, expected in {"epsilon": s / a, "sample": a / s, "v_prediction": a * s}.items():
        torch.testing.assert_close(weight(schedule.snr, "debiased", space), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("weighting", NAMES)
def test_weights_of_x0_and_v_have_their_limits_at_zero_snr(weighting):
    limit = {"inverse_snr": 1.0}.get(weighting, 0.0)
    for space in ("sample", "v_prediction"):
        assert weight(torch.zeros(1, dtype=torch.float64), weighting, space).item() == pytest.approx(limit, abs=1e-70)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("shift", (1.0, 64.0))
@pytest.mark.parametrize("T", (100, 1000))
def test_diffusers_draws_over_the_schedule_that_was_trained(name, shift, T):
    config = ObjectiveConfig(noise_schedule=name, schedule_shift=shift, num_train_timesteps=T)
    schedule = make_schedule(config)
    exported = exported_scheduler(config)
    assert (exported.alphas_cumprod.double() - schedule.alphas_cumprod).abs().max() < 1e-6
    torch.testing.assert_close(snr_of_scheduler(exported), schedule.snr, rtol=1e-8, atol=0)


def test_a_shift_multiplies_the_snr():
    plain, shifted = (make_schedule(ObjectiveConfig(schedule_shift=shift)).snr for shift in (1.0, 64.0))
    torch.testing.assert_close(shifted, 64 * plain, rtol=1e-14, atol=0)
    torch.testing.assert_close(snr_of_betas(betas_of_snr(shifted)), shifted, rtol=1e-9, atol=0)


def test_the_cosine_schedule_is_its_formula():
    alphas_cumprod = make_schedule(ObjectiveConfig(noise_schedule="cosine")).alphas_cumprod

    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = torch.tensor([f(t + 1) / f(0) for t in range(990)], dtype=torch.float64)  # the last betas are bounded
    torch.testing.assert_close(alphas_cumprod[:990], expected, rtol=1e-12, atol=0)
    assert 2e-9 < make_schedule(ObjectiveConfig(noise_schedule="cosine")).snr[-1] < 3e-9


def test_loss_weight_serves_a_loop_of_somebody_else(golden):
    t = torch.tensor([0, 500, 999])
    weights = loss_weight(DDPMScheduler(), t)
    assert weights.shape == (3,) and weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), golden["linear/weights/debias"][t], rtol=1e-6, atol=0)
    minimum = loss_weight(DDIMScheduler(), t, weighting="min_snr", snr_gamma=5)
    torch.testing.assert_close(minimum.double(), golden["linear/weights/min_snr"][t], rtol=1e-6, atol=0)
    velocity = loss_weight(DDPMScheduler(prediction_type="v_prediction"), t)
    assert velocity.max() <= 0.5


def test_loss_weight_refuses_what_has_no_finite_weight():
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True)
    with pytest.raises(InputError, match=r"not finite at timesteps \[999\]"):
        loss_weight(scheduler, torch.tensor([10, 999]))
    assert loss_weight(scheduler, torch.tensor([10, 999]), prediction_type="v_prediction")[1] == 0
    with pytest.raises(InputError, match="weighting 'debias' is not known"):
        loss_weight(scheduler, torch.tensor([10]), weighting="debias")
    t = torch.tensor([10])
    for options, named in (
        ({"weighting": "min_snr", "gamma": 3}, "parameter 'gamma' is not known"),
        ({"weighting": "debiased", "p2_k": 1}, "parameter 'p2_k' is not known here; take one of: snr_floor"),
        ({"weighting": "min_snr", "snr_gamma": -1}, "snr_gamma is -1"),
        ({"snr_floor": -1}, "snr_floor is -1"),
    ):
        with pytest.raises(InputError, match=named):
            loss_weight(scheduler, t, **options)
    for wrong in (torch.tensor([-1]), torch.tensor([1000]), torch.tensor([1.5])):
        with pytest.raises(InputError, match="whole numbers from 0 to 999"):
            loss_weight(scheduler, wrong)
    for without in (FlowMatchEulerDiscreteScheduler(), IPNDMScheduler()):
        with pytest.raises(InputError, match="has no alphas_cumprod"):
            loss_weight(without, t)


def test_loss_weight_follows_a_scheduler_that_changes_its_table_itself():
    scheduler = CogVideoXDDIMScheduler(snr_shift_scale=3.0, rescale_betas_zero_snr=False)
    t = torch.tensor([100, 500, 900])
    acp = scheduler.alphas_cumprod[t].double()
    torch.testing.assert_close(loss_weight(scheduler, t, prediction_type="epsilon").double(), ((1 - acp) / acp).sqrt(), rtol=1e-4, atol=0)


def test_every_timestep_is_drawn_equally_often():
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    assert torch.bincount(uniform(u, 1000)).tolist() == [10] * 1000
    assert uniform(torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), 1000).tolist() == [0, 999]
