"""Solvers against distributions known in closed form, against the paper's code, and against diffusers' own."""

import inspect
import itertools
import json

import diffusers
import numpy as np
import pytest
import solvers
import torch
from conftest import GOLDEN
from safetensors.torch import load_file

from debias_diffusers.config.schema.objective import ObjectiveConfig
from debias_diffusers.convert.guided_diffusion import guided
from debias_diffusers.diffusion.noise_schedule import make_schedule, predicted_x_0, prediction_of_x_0
from debias_diffusers.errors import InputError
from debias_diffusers.pipelines.pixel_pipeline import PixelPipeline, load_pipeline
from debias_diffusers.pipelines.solvers import (
    FLOW,
    SCHEDULERS,
    default_scheduler,
    exported_scheduler,
    make_scheduler,
    section_timesteps,
    strided_timesteps,
)

MEAN, STD = 0.3, 0.2


def sample_gaussian(objective, scheduler, count=6_000, values=None):
    """Draws with the exact network of N(MEAN, STD^2): its best prediction of x_0 has a closed form."""
    schedule = make_schedule(objective)
    x_t = torch.randn(count, 1, generator=torch.Generator().manual_seed(0))
    stochastic = "generator" in inspect.signature(scheduler.step).parameters and objective.prediction_type != "flow"
    chance = {"generator": torch.Generator().manual_seed(1)} if stochastic else {}
    visited = []
    for t in scheduler.timesteps:
        if objective.prediction_type == "flow":
            s = t.item() / objective.num_train_timesteps
            a = 1 - s
        else:
            a, s = schedule.a[int(t)].item(), schedule.s[int(t)].item()
        x_0 = MEAN + a * STD**2 / (a**2 * STD**2 + s**2) * (x_t - a * MEAN)
        noise = (x_t - a * x_0) / s
        prediction = {"epsilon": noise, "sample": x_0, "v_prediction": a * noise - s * x_0, "flow": noise - x_0}[objective.prediction_type]
        if values is not None:
            prediction = torch.cat([prediction, torch.full_like(prediction, values)], dim=1)
        x_t = scheduler.step(prediction, t, x_t, **chance).prev_sample
        visited.append(float(t))
    return x_t, visited


def unclipped(objective):
    own = exported_scheduler(objective)
    own.register_to_config(clip_sample=False)
    return own


BETAS = [name for name in SCHEDULERS if name not in FLOW]  # solvers of schedules with betas


def latin(*axes):
    """All cases; ordinary are those in which each value of an axis meets each value of another, and the others are nightly."""
    cases = itertools.product(*(enumerate(axis) for axis in axes))
    fewest = min(map(len, axes))
    placed = [tuple(zip(*case)) for case in cases]
    return [pytest.param(*values, marks=() if sum(places) % fewest == 0 else pytest.mark.nightly) for places, values in placed]


@pytest.mark.parametrize(
    "name, space, schedule", latin(BETAS, ("epsilon", "sample", "v_prediction"), (("linear", 64.0), ("linear", 1.0), ("cosine", 1.0)))
)
def test_every_solver_draws_the_right_distribution_for_every_target(name, space, schedule):
    schedule, shift = schedule
    objective = ObjectiveConfig(prediction_type=space, noise_schedule=schedule, schedule_shift=shift)
    drawn, _ = sample_gaussian(objective, make_scheduler(name, unclipped(objective), "linspace", 100))
    # 100 steps leave an error of discretisation of up to a tenth of the standard deviation (DDIM, ancestral steps), which
    # halves with twice the steps; a wrong target or schedule is off by a factor of two and more.
    assert abs(drawn.mean() - MEAN) < 0.01
    assert abs(drawn.std() / STD - 1) < 0.14


@pytest.mark.parametrize("name, space, shift", latin(BETAS, ("sample", "v_prediction"), (1.0, 64.0)))
def test_every_solver_starts_from_pure_noise(name, space, shift):
    objective = ObjectiveConfig(prediction_type=space, rescale_betas_zero_snr=True, schedule_shift=shift)
    scheduler = make_scheduler(name, unclipped(objective), "linspace", 100)
    assert scheduler.timesteps[0] == 999
    drawn, _ = sample_gaussian(objective, scheduler)
    assert abs(drawn.mean() - MEAN) < 0.01
    assert abs(drawn.std() / STD - 1) < 0.14


@pytest.mark.parametrize("name, steps, close", [("flow_euler", 100, 0.08), ("flow_heun", 30, 0.03)])
@pytest.mark.parametrize("shift", (1.0, 64.0, 0.1))
def test_flow_solvers_draw_the_right_distribution(name, steps, close, shift):
    objective = ObjectiveConfig(prediction_type="flow", schedule_shift=shift)
    scheduler = make_scheduler(name, exported_scheduler(objective), "linspace", steps)
    drawn, visited = sample_gaussian(objective, scheduler)
    assert visited[0] == 1000 and len(visited) == (steps if name == "flow_euler" else 2 * steps - 1)
    assert visited[-1] == pytest.approx(make_schedule(objective).timesteps[0].item(), rel=1e-5)  # shifted once, not twice
    assert abs(drawn.mean() - MEAN) < 0.01
    assert abs(drawn.std() / STD - 1) < close


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", (1, 2, 3, 30))
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_very_few_steps_and_all_steps_draw_near_the_data_whatever_is_predicted(name, steps):
    """Few steps have the right mean, if with two of flow_heun a wide spread; all have about the right spread, too."""
    drawn = []
    for space in ("flow",) if name in FLOW else ("epsilon", "sample", "v_prediction"):
        objective = ObjectiveConfig(prediction_type=space, num_train_timesteps=30)
        own = exported_scheduler(objective) if name in FLOW else unclipped(objective)
        images, visited = sample_gaussian(objective, make_scheduler(name, own, "linspace" if name in FLOW else "trailing", steps), 2000)
        assert len(visited) == (2 * steps - 1 if name.endswith("heun") else steps) and abs(images.mean() - MEAN) < 0.02
        assert abs(images.std() / STD - 1) < 0.3 if steps == 30 else images.std() < 3 * STD
        drawn.append(images)
    for other in drawn[1:]:
        torch.testing.assert_close(other, drawn[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("values", (-1.0, 0.0, 1.0))
def test_ddpm_draws_with_a_learned_variance(values):
    objective = ObjectiveConfig(learn_sigma=True, schedule_shift=64.0)
    drawn, _ = sample_gaussian(objective, make_scheduler("ddpm", unclipped(objective), "linspace", 1000), count=4000, values=values)
    assert abs(drawn.mean() - MEAN) < 0.01
    assert abs(drawn.std() / STD - 1) < 0.05


@pytest.mark.parametrize("variance_type", ("fixed_small", "fixed_large"))
def test_a_fixed_variance_is_exported_as_configured(variance_type):
    objective = ObjectiveConfig(variance_type=variance_type)
    assert exported_scheduler(objective).config.variance_type == variance_type
    assert exported_scheduler(ObjectiveConfig(learn_sigma=True)).config.variance_type == "learned_range"


def test_solvers_of_another_kind_of_model_are_refused():
    flow, plain = (exported_scheduler(ObjectiveConfig(prediction_type=space)) for space in ("flow", "v_prediction"))
    with pytest.raises(InputError, match="the model is a rectified flow; take --scheduler flow_heun"):
        make_scheduler("unipc", flow, "linspace", 10)
    with pytest.raises(InputError, match=r"it predicts v_prediction\); take --scheduler unipc"):
        make_scheduler("flow_euler", plain, "linspace", 10)
    with pytest.raises(InputError, match="spacing is trailing, but scheduler flow_heun has linspace only"):
        make_scheduler("flow_heun", flow, "trailing", 10)
    assert (default_scheduler(flow), default_scheduler(plain)) == ("flow_heun", "unipc")


# ---- the exact denoiser of a mixture of Gaussians --------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_error_of_a_solver_falls_at_its_order(name):
    objective = solvers.objective_for(name, 10_000)
    draws = name in ("ddpm", "dpmsolver++sde", "euler_ancestral")  # fresh noise: an error of chance, which more steps do not lower
    steps, count = ((10, 40), 100_000) if draws else ((20, 80), 500)
    coarse, fine = (solvers.solver_error(name, objective, n, count=count) for n in steps)
    assert np.log2(coarse / fine) / 2 > solvers.ORDERS[name] - 0.2
    assert fine < {1: 0.05, 2: 0.006, 3: 0.0001}[solvers.ORDERS[name]]


@pytest.mark.parametrize("name, space, schedule", latin(BETAS, ("sample", "v_prediction"), ("linear", "cosine")))
def test_a_solver_draws_the_mixture_whatever_the_network_predicts(name, space, schedule):
    """Two modes, none of them lost: quantiles to a tenth of the standard deviation in 50 default steps."""
    objective = ObjectiveConfig(prediction_type=space, noise_schedule=schedule)
    bound = {"heun": 0.06, "euler_ancestral": 0.08}.get(name, 0.05)  # cosine's last levels are coarse in s / a
    assert solvers.solver_error(name, objective, 50, equal=False, count=4000) < bound


# ---- the paper's code ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Converted golden networks and what the paper's code drew with them, all its random draws replaced by zero."""

    def load(name):
        folder = tmp_path_factory.mktemp("golden") / "out"
        guided(str(GOLDEN / name / "model.pt"), str(GOLDEN / name / "flags.json"), str(folder))
        return load_pipeline(str(folder)), load_file(GOLDEN / name / "samples.safetensors")

    return {name: load(name) for name in ("unet_paper_32", "unet_classcond_32")}


def without_noise(monkeypatch):
    def zeros(shape, **options):
        return torch.zeros(shape)

    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", zeros)


@pytest.mark.parametrize(
    "network, key, name, steps, spacing",
    [
        ("unet_paper_32", "ddim_10", "ddim", 10, "stride"),
        ("unet_paper_32", "ddpm_20", "ddpm", 20, "linspace"),
        ("unet_classcond_32", "ddpm_10", "ddpm", 10, "linspace"),
    ],
)
def test_a_whole_trajectory_of_the_paper_s_code_is_repeated(reference, monkeypatch, network, key, name, steps, spacing):
    pipeline, golden = reference[network]
    without_noise(monkeypatch)
    monkeypatch.setattr(pipeline, "_noise", lambda *_: golden["x_T"])
    seen = []
    timesteps = strided_timesteps(1000, steps) if spacing == "stride" else None
    own = pipeline.scheduler
    monkeypatch.setattr(pipeline, "scheduler", make_scheduler(name, own, "linspace", steps, timesteps))
    pipeline(
        batch_size=2,
        class_labels=golden.get("y"),
        num_inference_steps=steps,
        timesteps=timesteps,
        callback_on_step_end=lambda _, step, t, tensors: seen.append(tensors["x_t"]),
    )
    assert len(seen) == steps
    difference = (seen[-1] - golden[key]).abs()
    assert difference.mean() < 1e-3 and difference.max() < 5e-3


@pytest.mark.parametrize("network, steps", [("unet_paper_32", 20), ("unet_classcond_32", 10)])
def test_a_single_step_is_that_of_the_paper_s_code(reference, monkeypatch, network, steps):
    pipeline, golden = reference[network]
    without_noise(monkeypatch)
    scheduler = make_scheduler("ddpm", pipeline.scheduler, "linspace", steps)
    indices = sorted({int(key.split("/")[1][4:]) for key in golden if "/step" in key})
    assert indices[:2] == [0, 1] and len(indices) == 4
    for index in indices:
        t = scheduler.timesteps[steps - 1 - index]
        with torch.no_grad():
            output = pipeline.unet(golden["x_T"], t, golden.get("y")).sample
        mean = scheduler.step(output, t, golden["x_T"]).prev_sample
        expected = golden[f"ddpm_{steps}/step{index}/mean"]
        assert (mean - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
        if index >= 2:
            log_variance = scheduler._get_variance(t, output[:, 3:])
            assert (log_variance - golden[f"ddpm_{steps}/step{index}/log_variance"]).abs().max() < 1e-3


# ---- diffusers' own --------------------------------------------------------------------------------------------------


OTHERS = {"euler": "EulerDiscreteScheduler", "heun": "HeunDiscreteScheduler", "euler_ancestral": "EulerAncestralDiscreteScheduler"}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("space", ("epsilon", "v_prediction"))
def test_ours_steps_as_diffusers_own_does_where_that_is_right(name, space):
    """At whole timesteps, from a large s / a. Theirs moves x_t / a, and divides before it asks the network."""
    objective = ObjectiveConfig(prediction_type=space)
    schedule, own = make_schedule(objective), unclipped(objective)
    steps = 28  # 999 / 27 is whole, so that both visit the same levels
    ours = make_scheduler(name, own, "linspace", steps)
    theirs = getattr(diffusers, OTHERS[name]).from_config(own.config, timestep_spacing="linspace")
    theirs.set_timesteps(steps)
    assert torch.equal(ours.timesteps.float(), theirs.timesteps.float())
    x_t = torch.randn(50, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    states = [x_t, x_t * (theirs.init_noise_sigma**2 + 1).sqrt()]
    chances = [{"generator": torch.Generator().manual_seed(5)} if name == "euler_ancestral" else {} for _ in states]
    for ts in zip(ours.timesteps, theirs.timesteps):
        for k, (scheduler, t) in enumerate(zip((ours, theirs), ts)):
            a, s = schedule.a[int(t)], schedule.s[int(t)]
            given = scheduler.scale_model_input(states[k], t)
            prediction = prediction_of_x_0(space, solvers.expected_x_0(given[:, 0].double(), a, s)[:, None], given, a, s)
            states[k] = scheduler.step(prediction, t, states[k], **chances[k]).prev_sample
    torch.testing.assert_close(states[0].double(), states[1].double(), rtol=0, atol=2e-3)


# ---- steps -----------------------------------------------------------------------------------------------------------


def test_strided_timesteps_are_those_of_ddim_n():
    assert strided_timesteps(1000, 10) == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    assert strided_timesteps(1000, 50)[:2] == [980, 960] and len(strided_timesteps(1000, 334)) == 334
    with pytest.raises(InputError, match=r"steps is 300, but no stride gives as many of 1000 timesteps; take 334"):
        strided_timesteps(1000, 300)


def test_sections_are_equal_parts_of_the_noise_levels():
    assert section_timesteps(10, (2, 3, 1)) == [7, 6, 5, 4, 3, 0]  # levels 0 to 3, 4 to 6, 7 to 9
    # As guided-diffusion, which sums up strides of 99/14: 49.5 is then just below it, and 149 is taken, not 150.
    assert section_timesteps(300, (10, 15, 20))[::-1] == [
        *range(0, 100, 11),
        *(100 + k for k in (0, 7, 14, 21, 28, 35, 42, 49, 57, 64, 71, 78, 85, 92, 99)),
        *(200 + round(k * 99 / 19) for k in range(20)),
    ]
    assert section_timesteps(1000, (50,)) == np.linspace(0, 999, 50).round().astype(int)[::-1].tolist()
    assert 500 in section_timesteps(1000, (31,)) and 499 not in section_timesteps(1000, (31,))  # a sum just above 499.5
    with pytest.raises(InputError, match="sections has 4, but each of 3 sections has 3 of the 10 timesteps"):
        section_timesteps(10, (1, 1, 4))


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name not in FLOW])
def test_a_list_of_timesteps_is_visited_and_nothing_else(name):
    objective = ObjectiveConfig(schedule_shift=64.0)
    chosen = [999, 998, *range(970, 300, -30), *range(300, 50, -20), 33, 20, 7, 0]
    scheduler = make_scheduler(name, unclipped(objective), "linspace", len(chosen), chosen)
    drawn, visited = sample_gaussian(objective, scheduler)
    ends_there = name in ("dpmsolver", "unipc")
    expected = chosen[:-1] if ends_there else chosen
    assert visited == (expected[:1] + [t for t in expected[1:] for _ in range(2)] if name == "heun" else expected)
    assert abs(drawn.mean() - MEAN) < 0.02 and abs(drawn.std() / STD - 1) < 0.15
    with pytest.raises(InputError, match="timesteps has 1000, but the model's timesteps are 0 to 999"):
        make_scheduler(name, unclipped(objective), "linspace", 2, [1000, 500])


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name not in FLOW])
@pytest.mark.parametrize("spacing", ("linspace", "leading", "trailing"))
def test_every_solver_is_right_with_every_spacing(name, spacing):
    objective = ObjectiveConfig(schedule_shift=64.0)
    drawn, visited = sample_gaussian(objective, make_scheduler(name, unclipped(objective), spacing, 60))
    assert (visited[0] == 999) == (spacing != "leading")
    assert abs(drawn.mean() - MEAN) < 0.02 and abs(drawn.std() / STD - 1) < 0.15


@pytest.mark.parametrize("space", ("epsilon", "sample", "v_prediction", "flow"))
def test_a_prediction_and_its_x_0_are_converted_there_and_back(space):
    x_t, prediction = torch.randn(2, 5, 3, dtype=torch.float64)
    a, s = torch.tensor([0.8, 0.2 if space == "flow" else 0.6], dtype=torch.float64)
    x_0 = predicted_x_0(space, prediction, x_t, a, s)
    torch.testing.assert_close(prediction_of_x_0(space, x_0, x_t, a, s), prediction)


@pytest.mark.parametrize("spacing", ("linspace", "leading", "trailing"))
@pytest.mark.parametrize("steps", (7, 50))
def test_ddim_steps_to_the_next_timestep_of_its_list(spacing, steps):
    objective = ObjectiveConfig()
    scheduler = make_scheduler("ddim", unclipped(objective), spacing, steps)
    alphas_cumprod = make_schedule(objective).alphas_cumprod
    x_0, noise = torch.randn(2, 1, 4, dtype=torch.float64)
    for place, t in enumerate(scheduler.timesteps):
        x_t = alphas_cumprod[t].sqrt() * x_0 + (1 - alphas_cumprod[t]).sqrt() * noise
        arrived = scheduler.step(noise, t, x_t).prev_sample
        after = alphas_cumprod[scheduler.timesteps[place + 1]] if place + 1 < steps else torch.ones(())
        # With the true noise the step is exact, so it lands on the noised image of the next timestep.
        torch.testing.assert_close(arrived, after.sqrt() * x_0 + (1 - after).sqrt() * noise, rtol=0, atol=2e-4)


def test_ddim_with_eta_1_has_the_right_spread():
    objective = ObjectiveConfig(schedule_shift=64.0)
    scheduler = make_scheduler("ddim", unclipped(objective), "linspace", 100)
    step = scheduler.step
    generator = torch.Generator().manual_seed(3)
    scheduler.step = lambda prediction, t, x_t: step(prediction, t, x_t, eta=1.0, generator=generator)
    drawn, _ = sample_gaussian(objective, scheduler)
    assert abs(drawn.std() / STD - 1) < 0.05


def test_ddpm_adds_no_noise_after_its_last_step():
    objective = ObjectiveConfig()
    scheduler = make_scheduler("ddpm", unclipped(objective), "trailing", 10)
    last = scheduler.timesteps[-1]
    assert last > 0
    x_t, noise = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    results = [scheduler.step(noise, last, x_t, generator=torch.Generator().manual_seed(k)).prev_sample for k in range(2)]
    assert torch.equal(*results)


def test_solvers_have_the_schedule_of_the_model():
    objective = ObjectiveConfig(schedule_shift=64.0)
    expected = make_schedule(objective).alphas_cumprod
    for name in BETAS:
        scheduler = make_scheduler(name, exported_scheduler(objective), "linspace", 20)
        assert (scheduler.alphas_cumprod.double() - expected).abs().max() < 1e-6


@pytest.mark.parametrize("name, steps, named", [("unipc", 1001, "at most 1000"), ("ddim", 1, "take 2 steps")])
def test_impossible_steps_are_refused(name, steps, named):
    with pytest.raises(InputError, match=named):
        make_scheduler(name, exported_scheduler(ObjectiveConfig()), "linspace", steps)


def test_a_pipeline_of_an_older_version_finds_its_solver(tmp_path):
    """It names `debias_diffusers.schedulers`, where the solvers were then."""
    own = exported_scheduler(ObjectiveConfig())
    unet = diffusers.UNet2DModel(
        8, 1, 1, block_out_channels=(8,), norm_num_groups=8, down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"]
    )
    for name in ("ddpm", "ddim", "euler_ancestral", "heun", "unipc"):
        PixelPipeline(unet, make_scheduler(name, own, "linspace", 10)).save_pretrained(tmp_path / name)
        index = json.loads((tmp_path / name / "model_index.json").read_text())
        module, kind = index["scheduler"]
        assert module.startswith("debias_diffusers.")
        index["scheduler"] = ["debias_diffusers.schedulers", kind]
        (tmp_path / name / "model_index.json").write_text(json.dumps(index))
        assert isinstance(load_pipeline(str(tmp_path / name)).scheduler, SCHEDULERS[name][0])
