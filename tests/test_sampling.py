"""Solvers against a distribution known in closed form; image k is image k; folders are completed, never mixed."""

import json

import datasets
import numpy as np
import pytest
import torch
from conftest import run
from PIL import Image
from safetensors.torch import load_file, save_file

from debias_diffusers import PixelPipeline
from debias_diffusers.config import ObjectiveConfig, SampleConfig
from debias_diffusers.errors import InputError, NotFiniteError
from debias_diffusers.model import build_unet
from debias_diffusers.pipeline import load_pipeline
from debias_diffusers.sampling import draw, sample
from debias_diffusers.schedule import make_schedule
from debias_diffusers.schedulers import FLOW, SCHEDULERS, default_scheduler, exported_scheduler, make_scheduler

MEAN, STD = 0.3, 0.2


def sample_gaussian(objective, scheduler, count=20_000, values=None):
    """Draws with the exact network of N(MEAN, STD^2): its best prediction of x_0 has a closed form."""
    schedule = make_schedule(objective)
    x_t = torch.randn(count, 1, generator=torch.Generator().manual_seed(0))
    stochastic = "generator" in scheduler.step.__code__.co_varnames and objective.prediction_type != "flow"
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


@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize("space", ("epsilon", "sample", "v_prediction"))
@pytest.mark.parametrize("schedule, shift", [("linear", 64.0), ("linear", 1.0), ("cosine", 1.0)])
def test_every_solver_draws_the_right_distribution_for_every_target(name, space, schedule, shift):
    objective = ObjectiveConfig(prediction_type=space, noise_schedule=schedule, schedule_shift=shift)
    drawn, _ = sample_gaussian(objective, make_scheduler(name, unclipped(objective), "linspace", 100))
    # 100 steps leave an error of discretisation of up to a tenth of the standard deviation (DDIM, DPM-Solver), which
    # halves with twice the steps; a wrong target or schedule is off by a factor of two and more.
    assert abs(drawn.mean() - MEAN) < 0.01
    assert abs(drawn.std() / STD - 1) < 0.13


@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize("space", ("sample", "v_prediction"))
@pytest.mark.parametrize("shift", (1.0, 64.0))
def test_every_solver_starts_from_pure_noise(name, space, shift):
    objective = ObjectiveConfig(prediction_type=space, rescale_betas_zero_snr=True, schedule_shift=shift)
    scheduler = make_scheduler(name, unclipped(objective), "linspace", 100)
    assert scheduler.timesteps[0] == 999
    drawn, _ = sample_gaussian(objective, scheduler)
    assert abs(drawn.mean() - MEAN) < 0.01
    assert abs(drawn.std() / STD - 1) < 0.13


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


@pytest.mark.parametrize("name", ("ddim", "dpmsolver++", "unipc"))
def test_more_steps_come_closer(name):
    objective = ObjectiveConfig(noise_schedule="cosine")
    errors = [
        abs(sample_gaussian(objective, make_scheduler(name, unclipped(objective), "linspace", steps))[0].std() / STD - 1)
        for steps in (10, 50)
    ]
    assert errors[1] < errors[0] / 2


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


@pytest.mark.parametrize("name, steps, named", [("unipc", 1001, "at most 1000"), ("ddim", 1, "2 steps")])
def test_impossible_steps_are_refused(name, steps, named):
    with pytest.raises(InputError, match=named):
        make_scheduler(name, exported_scheduler(ObjectiveConfig()), "linspace", steps)


# ---- a small random model --------------------------------------------------------------------------------------------


def small_pipeline(classes=0, **objective):
    torch.manual_seed(0)
    unet = build_unet(
        {
            "sample_size": 8,
            "in_channels": 1,
            "out_channels": 2 if objective.get("learn_sigma") else 1,
            "block_out_channels": [8, 16],
            "norm_num_groups": 8,
            "layers_per_block": 1,
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
            "attention_head_dim": 8,
            "num_class_embeds": classes + 1 if classes else None,
        }
    )
    pipeline = PixelPipeline(unet, exported_scheduler(ObjectiveConfig(schedule_shift=64.0, **objective)), null_label=classes or None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("name", ("ddpm", "unipc"))
def test_image_k_does_not_depend_on_its_batch(name):
    pipeline = small_pipeline()
    pipeline.scheduler = make_scheduler(name, pipeline.scheduler, "linspace", 5)
    together = draw(pipeline, range(12), seed=7, steps=5)
    for indices in (range(3, 10), range(11, 12)):
        for k, image in zip(indices, draw(pipeline, indices, seed=7, steps=5)):
            assert np.abs(np.asarray(image, int) - np.asarray(together[k], int)).max() <= 1
    moved = draw(pipeline, range(2), seed=8, steps=5)
    assert np.abs(np.asarray(moved[0], int) - np.asarray(together[1], int)).max() <= 1
    assert not np.array_equal(together[0], together[1])


def test_guidance_is_the_formula_and_uses_the_dropped_label():
    pipeline = small_pipeline(classes=3)
    x_t, t = torch.randn(2, 1, 8, 8), torch.tensor(500)
    labels = torch.tensor([0, 2])
    with torch.no_grad():
        with_label = pipeline.unet(x_t, t, labels).sample
        without = pipeline.unet(x_t, t, torch.tensor([3, 3])).sample
        guided = pipeline._predict(x_t, t, labels, 3.0)
    torch.testing.assert_close(guided, without + 3 * (with_label - without), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(with_label, without)


@pytest.mark.parametrize("name", BETAS)
def test_the_channels_of_a_learned_variance_reach_ddpm_alone(name):
    pipeline = small_pipeline(classes=3, learn_sigma=True)
    pipeline.scheduler = make_scheduler(name, pipeline.scheduler, "linspace", 5)
    x_t, t, labels = torch.randn(2, 1, 8, 8), torch.tensor(500), torch.tensor([0, 2])
    with torch.no_grad():
        output, without = (pipeline.unet(x_t, t, given).sample for given in (labels, torch.tensor([3, 3])))
        guided = pipeline._predict(x_t, t, labels, 3.0)
    expected = without[:, :1] + 3 * (output[:, :1] - without[:, :1])
    torch.testing.assert_close(guided[:, :1], expected, rtol=1e-4, atol=1e-5)
    assert guided.shape[1] == (2 if name == "ddpm" else 1)
    if name == "ddpm":  # the variance is not guided
        torch.testing.assert_close(guided[:, 1:], output[:, 1:])
    assert len(draw(pipeline, range(2), seed=0, steps=5, labels=[0, 1])) == 2


def test_labels_that_the_model_does_not_have_are_refused():
    for pipeline, options, named in (
        (small_pipeline(), {"class_labels": [0]}, "unconditional"),
        (small_pipeline(), {"guidance_scale": 2.0}, "guidance_scale is 2.0"),
        (small_pipeline(classes=3), {}, "class_labels are missing"),
        (small_pipeline(classes=3), {"class_labels": [3]}, "class_labels has 3"),
        (small_pipeline(classes=3), {"class_labels": [1, 2]}, "one label for each of 1"),
    ):
        with pytest.raises(InputError, match=named):
            pipeline(**options)


def test_a_saved_class_conditional_pipeline_comes_back(tmp_path):
    pipeline = small_pipeline(classes=3)
    pipeline.save_pretrained(tmp_path)
    again = load_pipeline(str(tmp_path))
    assert again.num_classes == 3 and again.config.null_label == 3
    first, second = (p(class_labels=[1], generator=torch.Generator().manual_seed(0), output_type="pt").images for p in (pipeline, again))
    torch.testing.assert_close(first, second)


# ---- sample.py -------------------------------------------------------------------------------------------------------


def test_sample_writes_a_data_set_and_a_picture(trained):
    code, _, err = run("sample.py", trained, "--scheduler", "unipc", "--steps", 10, "--num_images", 20)
    assert code == 0, err
    folder = trained / "samples" / "unipc-10"
    assert sorted(p.name for p in folder.glob("*.png")) == [f"{k:06d}.png" for k in range(20)]
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert rows[3] == {"file_name": "000003.png", "seed": 3} and len(rows) == 20
    assert Image.open(folder / "preview" / "grid.png").size[0] > 200
    loaded = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    assert len(loaded) == 20 and loaded[3]["seed"] == 3  # the picture of all is not one of them


def config_for(model, folder, **changes):
    return SampleConfig(model=str(model), output_dir=str(folder), steps=5, **{"num_images": 10, "batch_size": 4, **changes})


def test_a_folder_is_completed_and_never_mixed(trained, tmp_path):
    folder = sample(config_for(trained, tmp_path / "out"))
    whole = {p.name: p.read_bytes() for p in folder.glob("*.png")}
    for name in ("000002.png", "000009.png"):
        (folder / name).unlink()
    untouched = (folder / "000005.png").stat().st_mtime_ns
    sample(config_for(trained, folder))
    assert {p.name: p.read_bytes() for p in folder.glob("*.png")} == whole
    assert (folder / "000005.png").stat().st_mtime_ns == untouched  # its batch was whole
    (folder / "000002.png").unlink()
    (folder / ".draft-000002.png").write_bytes(b"half")  # as a kill leaves it
    sample(config_for(trained, folder))
    assert {p.name: p.read_bytes() for p in folder.glob("*.png")} == whole and not list(folder.glob(".draft*"))
    with pytest.raises(InputError, match="seed was 0, now 1"):
        sample(config_for(trained, folder, seed=1))
    with pytest.raises(InputError, match="more than 5 images"):
        sample(config_for(trained, folder, num_images=5))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match=r"holds other files, such as letter\.txt"):
        sample(config_for(trained, tmp_path / "mine"))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_raw_and_other_averaged_weights_can_be_drawn(trained, tmp_path):
    drawn = {}
    for weights in ("ema", "raw", "0.9", "0.99"):
        folder = sample(config_for(trained, tmp_path / weights, weights=weights))
        drawn[weights] = (folder / "000000.png").read_bytes()
    assert drawn["ema"] == drawn["0.9"]  # the first rate is the exported one
    assert len({drawn["raw"], drawn["0.9"], drawn["0.99"]}) == 3
    with pytest.raises(InputError, match=r"averages at \[0\.9, 0\.99\] only"):
        sample(config_for(trained, tmp_path / "other", weights="0.5"))


def test_labels_are_written_beside_the_images(trained_by_class, tmp_path):
    folder = sample(config_for(trained_by_class, tmp_path / "a", class_labels=(3, 7), guidance_scale=2.0))
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows] == [3, 7] * 5
    folder = sample(config_for(trained_by_class, tmp_path / "b"))
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows] == list(range(10))


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--scheduler", "unipcc"], "unipc"),
        (["--steps", "0"], "steps is 0"),
        (["--seed=-1", "--num_images", "0"], "2 problems"),
        (["--weights", "best"], "weights is 'best'"),
        (["--class_labels", "3"], "unconditional"),
        (["--guidance_scale", "2"], "guidance_scale"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(trained, flags, named):
    code, _, err = run("sample.py", trained, *flags)
    assert code == 2 and "Traceback" not in err
    assert "error: " in err and named in err


def test_what_is_no_model_is_refused(trained, tmp_path):
    (tmp_path / "empty").mkdir()
    for model, named in ((tmp_path / "empty", "holds no model"), (tmp_path / "missing", "does not exist")):
        with pytest.raises(InputError, match=named):
            load_pipeline(str(model))


def test_a_broken_weight_file_is_named(tmp_path):
    small_pipeline().save_pretrained(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"diffusion_pytorch_model\.safetensors"):
        load_pipeline(str(tmp_path))


def test_a_weight_file_that_lacks_a_tensor_is_named(tmp_path):
    small_pipeline().save_pretrained(tmp_path)
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["conv_in.bias"]
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"conv_in\.bias"):
        load_pipeline(str(tmp_path))


def test_images_that_are_not_finite_are_not_written():
    pipeline = small_pipeline()
    torch.nn.init.constant_(pipeline.unet.conv_out.bias, torch.nan)
    with pytest.raises(NotFiniteError, match="not finite"):
        draw(pipeline, range(1), seed=0, steps=2)


def test_weights_are_read_from_safetensors_only(tmp_path):
    small_pipeline().save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(InputError, match="cannot be loaded"):
        load_pipeline(str(tmp_path))
