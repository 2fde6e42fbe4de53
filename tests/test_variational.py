"""The variational bound against the reference, against torch's divergence of Gaussians, and against a known optimum."""

import pytest
import torch
from conftest import GOLDEN
from diffusers import DDPMScheduler
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence

from debias_diffusers.config.schema.objective import ObjectiveConfig
from debias_diffusers.diffusion.loss import make_objective
from debias_diffusers.diffusion.noise_schedule import make_schedule
from debias_diffusers.diffusion.variational_bound import BITS, VariationalBound, discretized_gaussian_log_likelihood


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "losses.safetensors")


def objective(**options):
    return make_objective(ObjectiveConfig(learn_sigma=True, **options))


@pytest.mark.parametrize("space", ("epsilon", "sample", "v_prediction"))
def test_the_bound_equals_the_reference(golden, space):
    terms = objective(prediction_type=space).terms(golden["model_output"], golden["x0"], golden["noise"], golden["t"])
    # The reference sums in float32, whose rounding shows below 1e-6 bits.
    torch.testing.assert_close(terms.bound, golden[f"linear/{space}/vb"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("noise_schedule", ("linear", "cosine"))
def test_float32_loses_nothing_of_the_bound(noise_schedule):
    t = torch.arange(1, 1000, 9)
    x_0, error, output = random_batch(t)
    bound = VariationalBound.of(make_schedule(ObjectiveConfig(noise_schedule=noise_schedule)))
    exact, rounded = (bound.terms(*(x.to(kind) for x in (0.05 * error, output[:, 1:], x_0)), t) for kind in (torch.float64, torch.float32))
    torch.testing.assert_close(rounded.double(), exact, rtol=2e-5, atol=0)


def test_the_hybrid_objective_equals_the_reference(golden):
    terms = objective().terms(golden["model_output"], golden["x0"], golden["noise"], golden["t"])
    torch.testing.assert_close(terms.loss, golden["linear/epsilon/debias_total"], rtol=1e-4, atol=0)


def random_batch(t, channels=1):
    torch.manual_seed(0)
    shape = (len(t), channels, 4, 4)
    x_0 = (torch.randint(0, 256, shape) / 127.5 - 1).double()
    return x_0, torch.randn(shape, dtype=torch.float64), torch.randn(len(t), 2 * channels, 4, 4, dtype=torch.float64)


@pytest.mark.parametrize("space", ("epsilon", "sample", "v_prediction"))
@pytest.mark.parametrize("zero", (False, True))
def test_the_bound_is_the_divergence_of_two_gaussians(space, zero):
    """Written out from DDPM, equations 6, 7 and 11, on x_t and the alphas; torch has the divergence."""
    if zero and space == "epsilon":
        return
    T = 100
    ours = objective(prediction_type=space, num_train_timesteps=T, rescale_betas_zero_snr=zero)
    t = torch.tensor([1, 2, 30, 70, 98, 99])
    x_0, noise, output = random_batch(t)
    acp, before, beta = (
        table.view(-1, 1, 1, 1) for table in (ours.schedule.alphas_cumprod[t], ours.schedule.alphas_cumprod[t - 1], ours.schedule.betas[t])
    )
    x_t = acp.sqrt() * x_0 + (1 - acp).sqrt() * noise
    prediction, values = output.chunk(2, dim=1)
    guess = {
        "epsilon": (x_t - (1 - acp).sqrt() * prediction) / acp.sqrt(),
        "sample": prediction,
        "v_prediction": acp.sqrt() * x_t - (1 - acp).sqrt() * prediction,
    }[space]

    def mean(x):
        return (before.sqrt() * beta * x + (1 - beta).sqrt() * (1 - before) * x_t) / (1 - acp)

    small = (1 - before) / (1 - acp) * beta
    share = (values + 1) / 2
    variance = (share * beta.log() + (1 - share) * small.log()).exp()
    expected = kl_divergence(Normal(mean(x_0), small.sqrt()), Normal(mean(guess), variance.sqrt())).mean((1, 2, 3)) * BITS
    torch.testing.assert_close(ours.terms(output, x_0, noise, t).bound, expected, rtol=1e-8, atol=1e-12)


def test_the_least_variance_gives_half_the_fall_of_the_snr():
    """VDM, arXiv 2107.00630, equation 13: with the variance of the true step, L_t = (SNR(t-1) - SNR(t)) / 2 |d x_0|^2."""
    schedule = make_schedule(ObjectiveConfig(noise_schedule="cosine", num_train_timesteps=50))
    t = torch.arange(1, 50)
    x_0, error, _ = random_batch(t)
    terms = VariationalBound.of(schedule).terms(error, torch.full_like(error, -1), x_0, t)
    expected = (schedule.snr[t - 1] - schedule.snr[t]) / 2 * error.square().mean((1, 2, 3)) * BITS
    torch.testing.assert_close(terms, expected, rtol=1e-9, atol=0)


def test_diffusers_reads_the_variance_as_it_was_trained():
    schedule = make_schedule(ObjectiveConfig())
    t = torch.tensor([1, 2, 300, 999])
    values = torch.linspace(-1.2, 1.2, 4 * 16).view(4, 1, 4, 4).double()
    scheduler = DDPMScheduler(variance_type="learned_range")
    theirs = torch.stack([scheduler._get_variance(int(level), value) for level, value in zip(t, values)])
    torch.testing.assert_close(
        VariationalBound.of(schedule).log_variance(values, t), theirs.double(), rtol=0, atol=2e-3
    )  # theirs is float32


def test_masses_of_the_256_levels_sum_to_1():
    levels = (torch.arange(256).double() / 127.5 - 1).view(256, 1, 1, 1)
    for mean, std in ((0.0, 0.1), (0.98, 0.05), (-1.5, 0.6), (0.3, 0.002)):
        likelihood = discretized_gaussian_log_likelihood(levels, torch.tensor(mean).double(), torch.tensor(std).double().log())
        assert likelihood.exp().sum().item() == pytest.approx(1, abs=1e-9)
        exact = Normal(mean, std)
        edges = torch.tensor([-torch.inf, *((levels.flatten()[1:] + levels.flatten()[:-1]) / 2).tolist(), torch.inf]).double()
        # The approximation of the distribution function is off by up to 2e-4.
        assert (likelihood.exp().flatten() - exact.cdf(edges).diff()).abs().max() < 4e-4


def test_the_hybrid_bound_trains_the_variance_alone():
    t = torch.tensor([0, 5, 500, 999])
    x_0, noise, output = random_batch(t)
    gradients = {}
    for learn_sigma in (False, True):
        leaf = output.clone().requires_grad_()
        ours = make_objective(ObjectiveConfig(learn_sigma=learn_sigma))
        ours.terms(leaf if learn_sigma else leaf[:, :1], x_0, noise, t).loss.sum().backward()
        gradients[learn_sigma] = leaf.grad
    assert torch.equal(gradients[True][:, :1], gradients[False][:, :1])
    assert (gradients[True][:, 1:] != 0).all() and gradients[True].isfinite().all()


def test_the_variational_objective_trains_both_and_is_t_times_the_bound():
    t = torch.tensor([0, 5, 500, 999])
    x_0, noise, output = random_batch(t)
    leaf = output.clone().requires_grad_()
    terms = objective(weighting="variational").terms(leaf, x_0, noise, t)
    torch.testing.assert_close(terms.loss, 1000 * objective().terms(output, x_0, noise, t).bound)
    terms.loss.sum().backward()
    assert leaf.grad.isfinite().all() and (leaf.grad[:, :1].flatten(1).norm(dim=1) > 0).all()
    hybrid = objective(num_train_timesteps=250)
    plain = hybrid.terms(output, x_0, noise, t // 4)
    torch.testing.assert_close(plain.loss, hybrid.weights[t // 4] * plain.mse + 0.25 * plain.bound)


def test_the_learned_variance_finds_the_variance_of_the_data():
    """Of Gaussian data the best step from x_t has a variance between the two ends, known in closed form."""
    schedule = make_schedule(ObjectiveConfig(num_train_timesteps=50, noise_schedule="cosine"))
    bound, t, std = VariationalBound.of(schedule), torch.full((20_000,), 20), 0.5
    acp, s2, small = schedule.alphas_cumprod[20], schedule.s[20] ** 2, bound.log_small[20].exp()
    c = schedule.alphas_cumprod[19].sqrt() * schedule.betas[20] / s2  # DDPM, equation 7
    torch.manual_seed(0)
    posterior = 1 / (1 / std**2 + acp / s2)  # variance of x_0 given x_t
    x_0_error = posterior.sqrt() * torch.randn(20_000, 1, 1, 1, dtype=torch.float64)
    values = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([values], line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        result = bound.terms(x_0_error, values.expand(20_000, 1, 1, 1), torch.zeros_like(x_0_error), t).mean()
        result.backward()
        return result

    for _ in range(5):
        optimizer.step(loss)
    learned = bound.log_variance(values.detach().view(1, 1, 1, 1), t[:1]).exp().item()
    assert learned == pytest.approx((small + c**2 * posterior).item(), rel=0.01)
