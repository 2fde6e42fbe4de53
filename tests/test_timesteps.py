"""How t is drawn: the densities, what the correction keeps, what stratification saves, and what is learned."""

import math

import numpy as np
import pytest
import torch
from conftest import same
from here import tiny, trained_here

from debias_diffusers.config.loading import layered
from debias_diffusers.config.registry import TIMESTEP_SAMPLERS
from debias_diffusers.config.schema.objective import ObjectiveConfig
from debias_diffusers.config.validation.objective import objective_problems
from debias_diffusers.diffusion.noise_schedule import make_schedule
from debias_diffusers.diffusion.timestep_samplers import HISTORY, LossSecondMoment, TimestepSampler, make_timestep_sampler
from debias_diffusers.hub.model_card import model_card
from debias_diffusers.utils import seeding

CORRECTED = tuple(name for name, spec in TIMESTEP_SAMPLERS.items() if spec.corrected)


def sampler_of(name, batch_size=16, **options):
    config = ObjectiveConfig(timestep_sampler=name, **options)
    return make_timestep_sampler(config, make_schedule(config), batch_size)


def uniforms(n):
    return torch.tensor([seeding.uniform(0, "timestep", p) for p in range(n)], dtype=torch.float64)


def test_every_timestep_is_drawn_equally_often():
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    uniform = sampler_of("uniform")
    assert torch.bincount(uniform.draw(u, range(10_000))).tolist() == [10] * 1000
    assert uniform.draw(torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), range(2)).tolist() == [0, 999]
    assert torch.equal(uniform.corrections, torch.ones(1000, dtype=torch.float64))


@pytest.mark.parametrize("name", TIMESTEP_SAMPLERS)
def test_levels_are_drawn_with_their_probabilities(name):
    sampler = sampler_of(name, batch_size=100, num_train_timesteps=50, timestep_std=0.8, noise_schedule="cosine")
    t = sampler.draw(uniforms(100_000), range(100_000))
    assert sampler.probabilities.sum().item() == pytest.approx(1)
    frequencies = torch.bincount(t, minlength=50) / 100_000
    assert (frequencies - sampler.probabilities).abs().max() < 0.004


@pytest.mark.parametrize("name", CORRECTED)
def test_a_corrected_sampler_keeps_the_objective(name):
    """The mean of any corrected loss is that of uniform t."""
    sampler = sampler_of(name, num_train_timesteps=60, timestep_mean=0.5, laplace_scale=2.0, noise_schedule="cosine")
    if sampler.learns:
        levels = torch.arange(60).repeat(HISTORY)
        sampler.update(levels, torch.rand(len(levels), generator=torch.Generator().manual_seed(0)) * levels)
        assert sampler.probabilities.max() > 2 * sampler.probabilities.min()
    losses = torch.linspace(0, 3, 60, dtype=torch.float64) ** 2
    assert (sampler.probabilities * sampler.corrections * losses).sum().item() == pytest.approx(losses.mean().item())
    assert sampler.corrections.max() <= 1000.0
    t = sampler.draw(uniforms(160_000), range(160_000))
    assert (sampler.corrections[t] * losses[t]).mean().item() == pytest.approx(losses.mean().item(), rel=0.02)


@pytest.mark.parametrize("name", ("log_normal", "logit_normal"))
def test_what_changes_the_objective_says_so_by_its_density(name):
    sampler, corrected = sampler_of(name), sampler_of(f"{name}_corrected")
    assert not sampler.corrected and torch.equal(sampler.corrections, torch.ones(1000, dtype=torch.float64))
    assert corrected.corrections.max() <= 10
    torch.testing.assert_close(corrected.probabilities, 0.9 * sampler.probabilities + 1e-4)


def test_logit_normal_is_the_logistic_of_a_normal():
    sampler = sampler_of("logit_normal", timestep_mean=-0.4, timestep_std=1.3, prediction_type="flow")
    normal = torch.randn(400_000, generator=torch.Generator().manual_seed(0)) * 1.3 - 0.4
    share = torch.histc(torch.sigmoid(normal), bins=20, min=0, max=1) / 400_000
    torch.testing.assert_close(sampler.probabilities.view(20, 50).sum(1).float(), share, rtol=0, atol=2e-3)


def test_logit_normal_is_in_t_before_the_shift():
    """As Stable Diffusion 3 draws it: the shift moves the levels, not how often each is drawn."""
    plain, shifted = (sampler_of("logit_normal", prediction_type="flow", schedule_shift=k).probabilities for k in (1.0, 1 / 9))
    assert torch.equal(plain, shifted)


@pytest.mark.parametrize("options", [{"noise_schedule": "cosine"}, {"prediction_type": "flow"}, {"schedule_shift": 16.0}])
def test_log_normal_is_normal_in_the_log_of_the_noise(options):
    sampler = sampler_of("log_normal", timestep_mean=-1.2, timestep_std=1.2, **options)
    log_noise = -make_schedule(ObjectiveConfig(**options)).snr.log() / 2
    for z in (-1.0, 0.0, 1.0):
        below = sampler.probabilities[log_noise < -1.2 + 1.2 * z].sum().item()
        assert below == pytest.approx((1 + math.erf(z / math.sqrt(2))) / 2, abs=0.02)


@pytest.mark.parametrize("options", [{"noise_schedule": "cosine"}, {"prediction_type": "flow"}, {"schedule_shift": 16.0}])
def test_laplace_is_that_of_the_log_of_the_snr(options):
    sampler = sampler_of("laplace", laplace_mean=0.4, laplace_scale=0.8, **options)
    log_snr = make_schedule(ObjectiveConfig(**options)).snr.log()
    drawn = log_snr[sampler.draw(uniforms(20_000), range(20_000))].sort().values
    expected = np.sort(np.random.default_rng(0).laplace(0.4, 0.8, 400_000))[::20]
    assert drawn.median() == pytest.approx(0.4, abs=0.02) and np.abs(drawn.numpy() - expected)[500:-500].max() < 0.12
    for z in (-2.0, -1.0, 0.0, 1.5):
        share = sampler.probabilities[log_snr < 0.4 + 0.8 * z].sum().item()
        assert share == pytest.approx(0.5 + math.copysign(1 - math.exp(-abs(z)), z) / 2, abs=0.02)
    corrected = sampler_of("laplace_corrected", laplace_mean=0.4, laplace_scale=0.8, **options)
    torch.testing.assert_close(corrected.probabilities, 0.9 * sampler.probabilities + 1e-4)


@pytest.mark.parametrize("scale", (-1.0, 0.0, 0.81, 1.29, 1.75))
def test_mode_is_the_function_of_a_uniform_number_in_stable_diffusion_3(scale):
    sampler = sampler_of("mode", mode_scale=scale, prediction_type="flow")
    u = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    t = 1 - u - scale * ((math.pi / 2 * u).cos() ** 2 - 1 + u)
    share = torch.histc(t.float(), bins=50, min=0, max=1) / 1_000_000
    torch.testing.assert_close(sampler.probabilities.view(50, 20).sum(1).float(), share, rtol=0, atol=2e-5)
    if scale == 0:
        torch.testing.assert_close(sampler.probabilities, torch.full((1000,), 1e-3, dtype=torch.float64))


def test_speed_draws_and_weighs_as_in_its_paper():
    sampler = sampler_of("speed")
    tau, k, T = 700, 5.0, 1000
    expected = torch.full((T,), 1 / (T + tau * (k - 1)), dtype=torch.float64)
    expected[:tau] *= k
    torch.testing.assert_close(sampler.probabilities, expected)
    growth = np.gradient(1 - make_schedule(ObjectiveConfig()).alphas_cumprod.numpy())
    weights = np.interp(growth, [growth.min(), growth.max()], [0.4, 0.6])
    torch.testing.assert_close(sampler.corrections, torch.from_numpy(weights / (weights * expected.numpy()).sum()))
    torch.testing.assert_close(sampler_of("speed", speed_lambda=0.5).corrections, torch.ones(1000, dtype=torch.float64))


def test_log_normal_and_logit_normal_are_one_on_the_straight_path():
    """ln(s / a) = ln(t / (1 - t)) there, as long as it is not shifted."""
    one, other = (sampler_of(name, prediction_type="flow").probabilities.cumsum(0) for name in ("log_normal", "logit_normal"))
    assert (one - other).abs().max() < 1e-3


def test_strata_hold_one_sample_of_each_step_and_follow_from_the_position():
    sampler = sampler_of("stratified", batch_size=20)
    u = uniforms(60)
    whole = sampler.draw(u, range(60))
    for step in range(3):
        assert (whole[20 * step : 20 * step + 20] // 50).tolist() == list(range(20))
    # Of several processes, or in pieces, each draws what one would.
    assert torch.equal(torch.cat([sampler.draw(u[a:b], range(a, b)) for a, b in ((0, 13), (13, 30), (30, 60))]), whole)


def test_stratification_lowers_the_variance_of_the_loss():
    losses = torch.linspace(-3, 3, 1000, dtype=torch.float64).exp()
    variances = {}
    for name in ("uniform", "stratified"):
        t = sampler_of(name, batch_size=64).draw(uniforms(64 * 500), range(64 * 500))
        variances[name] = losses[t].view(500, 64).mean(1).var().item()
    assert variances["stratified"] < variances["uniform"] / 50


def test_loss_second_moment_is_uniform_until_it_knows_every_level():
    sampler = LossSecondMoment(5)
    sampler.update(torch.arange(4).repeat(HISTORY), torch.ones(4 * HISTORY))
    assert sampler.probabilities.tolist() == [0.2] * 5
    sampler.update(torch.tensor([4] * HISTORY), torch.full((HISTORY,), 2.0))
    expected = torch.tensor([1, 1, 1, 1, 2], dtype=torch.float64) / 6 * 0.999 + 0.001 / 5
    torch.testing.assert_close(sampler.probabilities, expected)


def test_loss_second_moment_remembers_the_last_losses_only():
    sampler = LossSecondMoment(2)
    losses = torch.cat([torch.full((2 * HISTORY,), 100.0), torch.tensor([3.0, 4.0] * HISTORY)])
    sampler.update(torch.tensor([0, 1] * (2 * HISTORY)), losses)
    torch.testing.assert_close(sampler.probabilities, torch.tensor([3, 4], dtype=torch.float64) / 7 * 0.999 + 0.0005)


def test_loss_second_moment_has_the_least_variance():
    """With losses that are known, no other corrected sampler estimates their mean as well."""
    T = 100
    losses = torch.linspace(-4, 2, T, dtype=torch.float64).exp()
    learned = LossSecondMoment(T)
    learned.update(torch.arange(T).repeat(HISTORY), losses.repeat(HISTORY))

    def variance(sampler: TimestepSampler) -> float:
        p, c = sampler.probabilities, sampler.corrections
        return ((p * (c * losses) ** 2).sum() - (p * c * losses).sum() ** 2).item()

    others = [sampler_of(name, num_train_timesteps=T, noise_schedule="cosine") for name in CORRECTED if name != "loss_second_moment"]
    assert variance(learned) < min(map(variance, others)) / 100


def test_what_loss_second_moment_learned_comes_back():
    one, other = LossSecondMoment(3), LossSecondMoment(3)
    one.update(torch.arange(3).repeat(HISTORY + 3), torch.rand(3 * (HISTORY + 3), generator=torch.Generator().manual_seed(0)))
    other.load(one.state())
    for sampler in (one, other):
        sampler.update(torch.tensor([0, 2]), torch.tensor([5.0, 6.0]))
    assert torch.equal(one.probabilities, other.probabilities)


# ---- phases -----------------------------------------------------------------------------------------------------------


def test_each_phase_of_a_run_has_its_sampler():
    options = {"timestep_sampler_after": "uniform", "timestep_sampler_switch": 3, "timestep_mean": 1.0}
    phases, u = sampler_of("logit_normal", **options), uniforms(40)
    first, second = sampler_of("logit_normal", timestep_mean=1.0), sampler_of("uniform")
    for step, expected in ((0, first), (2, first), (3, second), (100, second), (1, first)):
        phases.begin_step(step)
        assert torch.equal(phases.draw(u, range(40)), expected.draw(u, range(40)))
        assert torch.equal(phases.corrections, expected.corrections) and torch.equal(phases.probabilities, expected.probabilities)


def test_a_phase_that_learns_knows_the_losses_of_the_phase_before():
    phases = sampler_of("uniform", timestep_sampler_after="loss_second_moment", timestep_sampler_switch=2, num_train_timesteps=50)
    levels = torch.arange(50).repeat(HISTORY)
    phases.update(levels, 1.0 + levels)
    phases.begin_step(2)
    assert phases.learns and phases.probabilities[-1] > 20 * phases.probabilities[0]
    other = sampler_of("uniform", timestep_sampler_after="loss_second_moment", timestep_sampler_switch=2, num_train_timesteps=50)
    other.load(phases.state())
    other.begin_step(2)
    assert torch.equal(other.probabilities, phases.probabilities)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"timestep_sampler_switch": 5}, "timestep_sampler_after is left out"),
        ({"timestep_sampler_after": "uniform", "timestep_sampler_switch": 5}, "as timestep_sampler is"),
        ({"timestep_sampler_after": "stratified"}, "so that timestep_sampler never draws"),
        (
            {"timestep_sampler_after": "mode", "timestep_sampler_switch": 5, "normalize_weights": True},
            "have other densities, and the weights have one mean",
        ),
        (
            {"timestep_sampler_after": "mode", "timestep_sampler_switch": 5, "schedule_free_weights": True},
            "timestep_sampler mode multiplies",
        ),
        (
            {"timestep_bias_strategy": "later", "timestep_bias_multiplier": 2.0, "schedule_free_weights": True},
            "timestep_bias_strategy later multiplies the objective",
        ),
    ],
)
def test_phases_that_change_nothing_or_cannot_be_are_refused(options, said):
    (problem,) = objective_problems(ObjectiveConfig(**options))
    assert said in problem


@pytest.mark.nightly
def test_phases_resume_with_the_same_bits_and_are_in_the_card(tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    flags = ["--timestep_sampler", "mode", "--timestep_sampler_after", "loss_second_moment", "--timestep_sampler_switch", 1]
    flags += ["--num_train_timesteps", 21, "--lr_schedule", "constant", "--warmup_steps", 0, "--checkpoint_every", 2, "--batch_size", 64]
    trained_here(tiny(whole, *flags, "--max_steps", 4))
    for steps in (2, 4):
        trained_here(tiny(resumed, *flags, "--max_steps", steps))
    same(whole, resumed, 4, more=["sampler.safetensors"])
    assert "t was drawn with the density `mode` (s 1.29) in the first 1 steps without correction" in (whole / "README.md").read_text()


# ---- bias --------------------------------------------------------------------------------------------------------------

BIASES = {  # as diffusers' example scripts weigh 200 timesteps
    "earlier": ({"timestep_bias_portion": 0.2}, range(40)),
    "later": ({"timestep_bias_portion": 0.2}, range(160, 200)),
    "range": ({"timestep_bias_begin": 50, "timestep_bias_end": 70}, range(50, 70)),
}


@pytest.mark.parametrize("strategy", BIASES)
@pytest.mark.parametrize("name", TIMESTEP_SAMPLERS)
def test_a_bias_multiplies_the_objective_of_any_sampler(name, strategy):
    options, biased = BIASES[strategy]
    shared = {"num_train_timesteps": 200, "noise_schedule": "cosine"}
    plain = sampler_of(name, **shared)
    sampler = sampler_of(name, timestep_bias_strategy=strategy, timestep_bias_multiplier=3.0, **options, **shared)
    for each in (plain, sampler):
        if each.learns:
            levels = torch.arange(200).repeat(HISTORY)
            each.update(levels, (1 + levels) / 50)
            assert each.probabilities.max() > 1.2 * each.probabilities.min()
    factors = torch.ones(200, dtype=torch.float64)
    factors[list(biased)] = 3
    for bias, of_plain in ((sampler.probabilities, plain.probabilities), (density(sampler), density(plain))):
        torch.testing.assert_close(bias, of_plain * factors / (of_plain * factors).sum(), rtol=1e-12, atol=0)
    assert sampler.probabilities.sum().item() == pytest.approx(1)


def density(sampler):
    """(T,) of the timesteps in the objective."""
    return sampler.probabilities * sampler.corrections


def test_strata_with_a_bias_have_equal_probabilities():
    """With a multiplier of 3 on half of the timesteps, three quarters of each step's samples lie there, exactly."""
    options = {"timestep_bias_strategy": "later", "timestep_bias_portion": 0.5, "timestep_bias_multiplier": 3.0}
    sampler = sampler_of("stratified", batch_size=20, **options)
    t = sampler.draw(uniforms(20 * 50), range(20 * 50)).view(50, 20)
    assert ((t >= 500).sum(1) == 15).all() and (t.diff(dim=1) >= 0).all()
    torch.testing.assert_close(sampler.corrections, torch.ones(1000, dtype=torch.float64))


BIASED = {"timestep_bias_strategy": "later", "timestep_bias_multiplier": 2.0}


@pytest.mark.parametrize(
    "options, said",
    [
        ({"timestep_bias_multiplier": 2.0}, "timestep_bias_strategy is none, which does not have it"),
        ({"timestep_bias_strategy": "later"}, "timestep_bias_multiplier is 1, which changes nothing"),
        (
            {**BIASED, "timestep_bias_begin": 5},
            "timestep_bias_strategy is later, which does not have it; take --timestep_bias_strategy range",
        ),
        ({**BIASED, "timestep_bias_portion": 1e-4}, "which is none or all of 1000 timesteps"),
        ({**BIASED, "timestep_bias_strategy": "range"}, "from timestep_bias_begin 0 to before timestep_bias_end 1000, but must be a part"),
        (
            {**BIASED, "timestep_bias_strategy": "range", "timestep_bias_end": 1001},
            "take --timestep_bias_begin 500 --timestep_bias_end 1000",
        ),
    ],
)
def test_a_bias_that_changes_nothing_is_refused(options, said):
    (problem,) = objective_problems(ObjectiveConfig(**options))
    assert said in problem


def test_a_bias_is_in_the_model_card():
    card = model_card(layered(BIASED), 1, 0)
    assert "bias `later` (timestep_bias_multiplier 2.0, timestep_bias_portion 0.25) without correction: the objective has it, too." in card
