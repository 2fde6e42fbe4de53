"""The likelihood by the probability-flow ODE: exact for Gaussians, for every prediction type; the solver; the command."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from here import tiny, trained_here

from debias_diffusers import cli
from debias_diffusers.config.schema.evaluation import BitsConfig
from debias_diffusers.config.schema.objective import ObjectiveConfig
from debias_diffusers.config.validation.evaluation import bits_problems
from debias_diffusers.diffusion.noise_schedule import make_schedule, prediction_of_x_0
from debias_diffusers.diffusion.ode_likelihood import Path, _integrate, log_density, negative_log_likelihood
from debias_diffusers.errors import NotFiniteError
from debias_diffusers.evaluation.likelihood import OdeLikelihood
from debias_diffusers.pipelines.solvers import exported_scheduler

MEAN, STD = 0.1, 0.2
OBJECTIVES = {
    "epsilon": {"noise_schedule": "linear"},
    "sample": {"noise_schedule": "cosine"},
    "v_prediction": {"rescale_betas_zero_snr": True},
    "flow": {"schedule_shift": 4.0},
    "x_0 on the straight path": {"prediction_type": "sample", "noise_schedule": "rectified_flow"},
    "learned": {"prediction_type": "epsilon", "learn_sigma": True},
}


def exact(name, weight=None):
    """A pipeline with the best network for pixels of N(MEAN, STD^2), times a `weight` where it is wrong."""
    objective = ObjectiveConfig(**{"prediction_type": name, **OBJECTIVES[name]})
    schedule, kind = make_schedule(objective), objective.prediction_type
    straight = kind == "flow" or objective.noise_schedule == "rectified_flow"
    times = (schedule.s if straight else torch.atan2(schedule.s, schedule.a)).numpy()

    def unet(x_t, timestep, labels, return_dict):
        time = torch.tensor(np.interp(timestep.item(), schedule.timesteps.numpy(), times))
        a, s = (1 - time, time) if straight else (time.cos(), time.sin())
        x_0 = MEAN + a * STD**2 / (a**2 * STD**2 + s**2) * (x_t - a * MEAN)
        prediction = prediction_of_x_0(kind, x_0, x_t, a, s)
        return (torch.cat([prediction, prediction], 1) if objective.learn_sigma else prediction,)

    unet.dtype = torch.float64
    pipeline = SimpleNamespace(scheduler=exported_scheduler(objective), unet=unet, device=torch.device("cpu"))
    return pipeline, schedule, straight


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_density_of_a_gaussian_is_exact_for_every_prediction_type(name):
    pipeline, schedule, straight = exact(name)
    path, a, s = Path(schedule, straight), schedule.a[0].item(), schedule.s[0].item()
    ode = OdeLikelihood(pipeline, 1, 1e-7)
    x = torch.linspace(-0.6, 0.8, 12, dtype=torch.float64).view(3, 4)

    def velocity(flat, time):
        output = pipeline.unet(flat.view(3, 1, 2, 2), torch.tensor(path.timestep(time)), None, False)[0][:, :1]
        return path.velocity(ode.kind, output, flat.view(3, 1, 2, 2), time).flatten(1)

    probes = torch.ones(1, 3, 4, dtype=torch.float64)  # of a Jacobian that is diagonal, p . J p is the trace
    found, calls = log_density(velocity, x, probes, path.times[0].item(), path.times[-1].item(), 1e-7)
    # At the end the ODE gives the marginal of these data, which is standard normal up to what is left of them.
    last_a, last_s = schedule.a[-1].item(), schedule.s[-1].item()
    width = math.sqrt(a**2 * STD**2 + s**2)
    end_width = math.sqrt(last_a**2 * STD**2 + last_s**2)
    z = (x - a * MEAN) / width
    at_end = torch.distributions.Normal(0.0, 1.0).log_prob(last_a * MEAN + end_width * z)
    expected = (at_end + math.log(end_width / width)).sum(1)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    torch.testing.assert_close(found, torch.distributions.Normal(a * MEAN, width).log_prob(x).sum(1), rtol=0, atol=0.05)
    assert 20 < calls < 2000


def test_the_bits_of_a_gaussian_are_its_entropy():
    """On the grid of pixel values; the mean over images is a bound from above, tight where the grid is as fine as the noise."""
    x_0 = MEAN + STD * torch.randn(6, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    x_0 = ((x_0 / 2 + 0.5) * 255).round().clamp(0, 255) / 127.5 - 1
    own = (x_0.double() - MEAN).square().mean() / STD**2 / 2 + math.log(STD * math.sqrt(2 * math.pi)) - math.log(2 / 255)
    for name in ("epsilon", "flow"):
        ode = OdeLikelihood(exact(name)[0], 2, 1e-5)
        bits, _ = ode.bits(x_0, None, 0, range(6))
        assert bits.mean().item() == pytest.approx(own.item() / math.log(2), abs=0.02)
        parts = torch.cat([ode.bits(x_0[k : k + 2], None, 0, range(k, k + 2))[0] for k in (0, 2, 4)])
        torch.testing.assert_close(parts, bits, rtol=0, atol=1e-3)
        assert ode.result(bits, 7)["standard_error"] == pytest.approx(bits.std().item() / math.sqrt(6))


def test_the_trace_estimator_is_exact_in_the_mean():
    """A linear field: the divergence is the trace of its matrix."""
    matrix = torch.tensor([[0.5, 2.0, -1.0], [1.0, -0.25, 0.5], [0.0, 1.0, 0.75]], dtype=torch.float64)
    x, probes = (
        torch.zeros(1, 3, dtype=torch.float64),
        torch.tensor([[[a, b, c]] for a in (-1.0, 1.0) for b in (-1.0, 1.0) for c in (-1.0, 1.0)], dtype=torch.float64),
    )
    found, _ = log_density(lambda x, time: x @ matrix.T, x, probes, 0.0, 1.0, 1e-8)
    assert found.item() == pytest.approx(1.0 - 1.5 * math.log(2 * math.pi), abs=1e-9)


def test_the_solver_keeps_its_tolerance():
    """A rotation whose speed grows, by its closed form."""
    start = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)

    def f(y, time):
        return torch.stack([-2 * time * y[:, 1], 2 * time * y[:, 0], torch.zeros(1, dtype=torch.float64)], dim=1)

    for tolerance in (1e-4, 1e-7):
        end = _integrate(f, start, 0.0, 4.0, tolerance)[0]
        assert torch.dist(end[:2], torch.tensor([math.cos(16), math.sin(16)], dtype=torch.float64)) < 100 * tolerance
    with pytest.raises(NotFiniteError, match="cannot be solved"):
        _integrate(lambda y, time: y * math.nan, start, 0.0, 1.0, 1e-5)


def test_dequantization_loses_nothing_where_the_noise_is_small():
    """One value of 256 alone: its probability is the integral of the density around it."""
    x_0, s = torch.full((2000, 1), 2 * 100 / 255 - 1, dtype=torch.float64), 1e-4
    x = x_0 + s * torch.randn(2000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    density = torch.distributions.Normal(x_0, s).log_prob(x).sum(1)  # the data are this value only
    assert negative_log_likelihood(density, x, x_0, 1.0, s).mean().item() == pytest.approx(0, abs=0.05)


def test_the_command_says_both(tmp_path, capsys):
    trained_here(tiny(tmp_path / "run", "--num_train_timesteps", 30, "--max_steps", 1, "--warmup_steps", 0))
    flags = ["--method", "ode", "--num_images", 2, "--tolerance", 0.1, "--output", tmp_path / "out.json"]
    assert cli.evaluate(["bpd", *map(str, (tmp_path / "run", *flags))]) == 0
    said, found = capsys.readouterr().err, json.loads((tmp_path / "out.json").read_text())
    assert "bits per dimension by the variational bound" in said and "bits per dimension by the probability-flow ODE" in said
    assert found["ode"]["total"] > 0 and found["total"] > 0 and found["ode"]["network_evaluations"] > 6
    assert bits_problems(BitsConfig(model="x", probes=2)) == ["probes is 2, but method is bound; add --method ode or leave probes out"]


@pytest.mark.nightly
def test_a_flow_has_a_likelihood_and_no_bound(tmp_path, capsys):
    trained_here(tiny(tmp_path / "run", "--prediction_type", "flow", "--class_conditional", "--max_steps", 2, "--warmup_steps", 0))
    flags = ["--method", "ode", "--num_images", 2, "--tolerance", 0.01, "--output", tmp_path / "out.json"]
    assert cli.evaluate(["bpd", *map(str, (tmp_path / "run", *flags))]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    said = capsys.readouterr().err
    assert found["total"] is None and found["ode"]["total"] > 0 and "variational bound" not in said
    assert "| 1/1 [" in said  # the progress bar
