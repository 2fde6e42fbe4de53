"""Noise that is not standard normal: offset, pyramid, input perturbation."""

import pytest
import torch
from conftest import TINY
from here import tiny, trained_here

from debias_diffusers.cli import train_config
from debias_diffusers.config.schema.objective import NoiseConfig, ObjectiveConfig
from debias_diffusers.config.validation.training import train_problems
from debias_diffusers.data.noise import draw_noise
from debias_diffusers.diffusion.loss import Objective, make_objective
from debias_diffusers.hub.model_card import model_card

SHAPE = (3, 12, 20)


def drawn(count=1, shape=SHAPE, name="noise", **options):
    """(count, C, H, W) noise of positions 0, 1, ..."""
    return draw_noise(shape, NoiseConfig(**options), 5, range(count))[name]


def test_every_option_leaves_what_the_others_draw():
    plain = drawn(3)
    offset = drawn(3, noise_offset=0.3) - plain
    assert (offset - offset[..., :1, :1]).abs().max() < 1e-6  # a number for each sample and channel
    assert len({f"{value:.3f}" for value in offset[..., 0, 0].flatten().tolist()}) == 9
    torch.testing.assert_close(drawn(3, noise_offset=0.6) - plain, 2 * offset, atol=1e-6, rtol=0)
    pyramid = drawn(3, pyramid_noise_discount=0.5)
    torch.testing.assert_close(drawn(3, pyramid_noise_discount=0.5, noise_offset=0.3) - pyramid, offset, atol=1e-6, rtol=0)
    assert torch.equal(drawn(3, input_perturbation=0.2), plain)  # of targets
    more = [(drawn(3, name="input_noise", input_perturbation=g) - plain) / g for g in (0.1, 0.2)]
    torch.testing.assert_close(*more, atol=1e-5, rtol=0)
    assert draw_noise(SHAPE, NoiseConfig(), 5, [0]).keys() == {"noise"}


def test_offset_and_perturbation_have_their_variance():
    channels = drawn(4000, (2, 2, 2), noise_offset=0.5).mean((2, 3))
    assert channels.var().item() == pytest.approx(0.25 + 1 / 4, rel=0.05)
    perturbed = drawn(2000, (2, 4, 4), "input_noise", input_perturbation=0.5)
    assert perturbed.var().item() == pytest.approx(1.25, rel=0.02)


@pytest.mark.parametrize("shape", [(4, 16, 16), (1, 6, 21), (3, 1, 1)])
@pytest.mark.parametrize("discount, iterations", [(0.3, 6), (0.9, 6), (0.9, 1)])
def test_pyramid_noise_has_a_variance_of_one_and_is_correlated_over_pixels(shape, discount, iterations):
    noise = drawn(1500, shape, pyramid_noise_discount=discount, pyramid_noise_iterations=iterations)
    assert noise.square().mean().item() == pytest.approx(1, rel=0.08) and noise.mean().abs() < 0.05
    if shape[-1] > 1:
        assert (noise[..., 1:] * noise[..., :-1]).mean() > discount**2 * 0.15
    assert torch.equal(noise[7], drawn(8, shape, pyramid_noise_discount=discount, pyramid_noise_iterations=iterations)[7])


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "flow"])
def test_input_perturbation_changes_x_t_and_not_the_target(prediction_type):
    objective = make_objective(ObjectiveConfig(prediction_type=prediction_type, weighting="constant"))
    x_0, noise, other = torch.randn(3, 2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    t, seen = torch.tensor([100, 700]), []

    def network(x_t, timesteps):
        seen.append(x_t)
        return torch.zeros_like(x_t)

    terms = objective(network, x_0, noise, t, noise + 0.1 * other)
    torch.testing.assert_close(seen[0], objective.schedule.add_noise(x_0, noise + 0.1 * other, t))
    target = objective.schedule.target(prediction_type, x_0, noise, t)
    torch.testing.assert_close(terms.mse, target.square().mean((1, 2, 3)))


def test_a_training_takes_the_noise_of_its_positions(tmp_path, monkeypatch):
    seen, call = [], Objective.__call__
    monkeypatch.setattr(Objective, "__call__", lambda self, *args: seen.append(args[2:]) or call(self, *args))
    options = {"noise_offset": 0.1, "pyramid_noise_discount": 0.4, "input_perturbation": 0.2}
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    trainer = trained_here(tiny(tmp_path / "run", *flags, "--max_steps", 1, "--warmup_steps", 0))
    ((noise, _, input_noise),) = seen
    expected = [draw_noise((1, 8, 8), NoiseConfig(**options), 0, [position]) for position in range(8)]
    assert torch.equal(noise, torch.cat([each["noise"] for each in expected]))
    assert torch.equal(input_noise, torch.cat([each["input_noise"] for each in expected]))
    assert "not standard normal: `noise_offset` 0.1, `pyramid_noise_discount` 0.4, `input_perturbation` 0.2." in model_card(
        trainer.config, 1, 0
    )


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--pyramid_noise_iterations", "3"], "pyramid_noise_discount is 0, which is off"),
        (["--pyramid_noise_discount", "1"], "pyramid_noise_discount is 1.0, but must be at least 0 and below 1"),
        (["--input_perturbation", "0.1", "--learn_sigma"], "learn_sigma is on, and the variational bound is that of standard normal noise"),
    ],
)
def test_noise_that_would_be_ignored_or_makes_no_sense_is_refused(flags, said):
    (problem,) = train_problems(train_config(["--config", str(TINY), "--output_dir", "x", *flags], None))
    assert said in problem
