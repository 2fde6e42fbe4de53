"""The pipeline does what it says; image k is image k; folders are completed, never mixed."""

import errno
import json
import os
import shutil
import threading
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import HANG, run, sample_config
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LDMPipeline,
    PNDMScheduler,
    ScoreSdeVeScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
    VQModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file

from debias_diffusers import PixelPipeline, cli
from debias_diffusers.config.schema.objective import ObjectiveConfig
from debias_diffusers.errors import CannotWriteError, InputError, NotFiniteError
from debias_diffusers.pipelines.pixel_pipeline import load_pipeline
from debias_diffusers.pipelines.solvers import FLOW, SCHEDULERS, exported_scheduler, make_scheduler
from debias_diffusers.runs import checkpoints
from debias_diffusers.runs.checkpoints import list_checkpoints
from debias_diffusers.sampling import generate, image_writer
from debias_diffusers.sampling.generate import sample
from debias_diffusers.sampling.image_writer import ImageWriter, SampleFolder
from debias_diffusers.sampling.job import batch_size_of
from debias_diffusers.sampling.pixel_job import draw
from debias_diffusers.tasks.unet import build_unet
from debias_diffusers.utils.files import acquire_lock, read_json, remove_folder

# ---- a small random model --------------------------------------------------------------------------------------------


def small_pipeline(classes=0, channels=1, **objective):
    torch.manual_seed(0)
    unet = build_unet(
        {
            "sample_size": 8,
            "in_channels": channels,
            "out_channels": 2 * channels if objective.get("learn_sigma") else channels,
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


def solved(pipeline, name="unipc", steps=5, **options):
    """The pipeline with a solver by name."""
    pipeline.scheduler = make_scheduler(name, pipeline.scheduler, "linspace", steps, **options)
    return pipeline


def pixels(images):
    return images.cpu().numpy().astype(int)


@pytest.mark.parametrize("name", ("ddpm", "unipc"))
def test_image_k_does_not_depend_on_its_batch(name):
    pipeline = solved(small_pipeline(), name)
    together = pixels(draw(pipeline, range(12), 7, num_inference_steps=5))
    for indices in (range(3, 10), range(11, 12)):
        own = pixels(draw(pipeline, indices, 7, num_inference_steps=5))
        assert np.abs(own - together[list(indices)]).max() <= 1
    other = pixels(draw(pipeline, range(12), 8, num_inference_steps=5))
    assert len({image.tobytes() for image in (*together, *other)}) == 24


def test_a_stock_pipeline_with_the_seeds_of_the_images_draws_the_same():
    ours = small_pipeline()
    theirs = DDPMPipeline(ours.unet, ours.scheduler)
    theirs.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed((5 * 2654435761 + k) % 2**32) for k in range(3)]
    stock = theirs(batch_size=3, generator=generators, num_inference_steps=6).images
    drawn = pixels(draw(small_pipeline(), range(3), 5, num_inference_steps=6))
    assert [np.asarray(image).tolist() for image in stock] == [array[0].tolist() for array in drawn]


def test_all_output_types_are_the_same_images():
    pipeline = solved(small_pipeline())
    drawn = {
        kind: pipeline(2, num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type=kind).images
        for kind in ("pil", "np", "pt")
    }
    assert drawn["pt"].shape == (2, 1, 8, 8) and drawn["np"].shape == (2, 8, 8, 1)
    np.testing.assert_array_equal(drawn["np"], drawn["pt"].permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(np.asarray(drawn["pil"][1]), (drawn["np"][1, :, :, 0] * 255).round())
    (images,) = pipeline(2, num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="pt", return_dict=False)
    assert torch.equal(images, drawn["pt"])
    with pytest.raises(InputError, match="output_type is 'jpeg'"):
        pipeline(output_type="jpeg")


@pytest.mark.parametrize("name", ("ddim", "heun", "dpmsolver++", "unipc"))
def test_a_callback_sees_each_step_and_may_change_or_end_it(name):
    pipeline, seen = solved(small_pipeline(), name), []

    def look(pipe, step, t, tensors):
        seen.append((step, float(t), tensors["x_t"].shape, tensors["x_0"].shape))
        if step == 3:
            pipe._interrupt = True
        return {"x_t": torch.zeros_like(tensors["x_t"])}

    images = pipeline(
        2, num_inference_steps=5, output_type="pt", callback_on_step_end=look, callback_on_step_end_tensor_inputs=["x_t", "x_0"]
    ).images
    assert [step for step, *_ in seen] == [0, 1, 2, 3] and pipeline.interrupt
    assert [t for _, t, *_ in seen] == pipeline.scheduler.timesteps[:4].tolist()
    assert all(shape == (2, 1, 8, 8) for *_, x_t, x_0 in seen for shape in (x_t, x_0))
    assert (images == 0.5).all()
    with pytest.raises(InputError, match="can be given x_t, x_0, class_labels, latents, but not prompt_embeds"):
        pipeline(callback_on_step_end=look, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_the_x_0_that_a_callback_sees_is_the_one_that_the_solver_moves_to():
    pipeline, seen = solved(small_pipeline(), "ddim", clipping="static"), []
    drawn = pipeline(
        2,
        num_inference_steps=5,
        clipping="static",
        output_type="pt",
        callback_on_step_end=lambda _, step, t, tensors: seen.append(tensors),
        callback_on_step_end_tensor_inputs=["x_t", "x_0"],
    ).images
    torch.testing.assert_close(seen[-1]["x_0"] / 2 + 0.5, drawn, rtol=0, atol=1e-5)  # the last step goes to the clean image
    assert max(tensors["x_0"].abs().max() for tensors in seen) <= 1 + 1e-5


# ---- clipping --------------------------------------------------------------------------------------------------------


def loud_pipeline(**objective):
    """Predictions far out of the range of images, so that clipping matters."""
    pipeline = small_pipeline(**objective)
    with torch.no_grad():
        pipeline.unet.conv_out.weight.mul_(8)
    return pipeline


@pytest.mark.parametrize("space", ("epsilon", "sample", "v_prediction"))
@pytest.mark.parametrize("name", ("ddpm", "ddim"))
def test_static_clipping_is_what_ddpm_and_ddim_do_themselves(name, space):
    native = solved(loud_pipeline(prediction_type=space), name)
    assert native.scheduler.config.clip_sample
    ours = solved(loud_pipeline(prediction_type=space), name, clipping="static")
    assert not ours.scheduler.config.clip_sample
    drawn = [
        pipeline(3, num_inference_steps=5, clipping=clipping, generator=torch.Generator().manual_seed(0), output_type="pt").images
        for pipeline, clipping in ((native, None), (ours, "static"), (ours, "off"))
    ]
    torch.testing.assert_close(drawn[0], drawn[1], rtol=0, atol=1e-3)
    assert (drawn[0] - drawn[2]).abs().max() > 0.01


@pytest.mark.parametrize("name", ("dpmsolver++", "unipc", "ddim"))
def test_dynamic_clipping_is_what_diffusers_solvers_call_thresholding(name):
    ours, theirs = solved(loud_pipeline(), name, clipping="dynamic"), solved(loud_pipeline(), name)
    theirs.scheduler.register_to_config(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1e6)
    drawn = [
        pipeline(3, num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="pt", **options).images
        for pipeline, options in ((ours, {"clipping": "dynamic", "clipping_quantile": 0.9}), (theirs, {}), (ours, {}))
    ]
    torch.testing.assert_close(drawn[0], drawn[1], rtol=0, atol=1e-3)
    assert (drawn[0] - drawn[2]).abs().max() > 0.01


@pytest.mark.parametrize("name", SCHEDULERS)
def test_clipping_keeps_what_any_solver_draws_in_range(name):
    objective = {"prediction_type": "flow"} if name in FLOW else {"learn_sigma": name == "ddpm"}
    reached = {}
    for clipping in ("off", "static", "dynamic"):
        pipeline, seen = solved(loud_pipeline(**objective), name, clipping=clipping), []
        pipeline(
            2,
            num_inference_steps=5,
            clipping=clipping,
            generator=torch.Generator().manual_seed(0),
            callback_on_step_end=lambda _, step, t, tensors, seen=seen: seen.append(tensors["x_t"].abs().max().item()),
        )
        reached[clipping] = seen[-1]  # what the solver itself came to
    assert reached["static"] < 1.15 and reached["dynamic"] < 1.15 < reached["off"]  # two of them keep the noise of t = 0


# ---- labels, guidance and variance -----------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name not in FLOW])
def test_the_channels_of_a_learned_variance_reach_ddpm_alone(name):
    pipeline = solved(small_pipeline(classes=3, learn_sigma=True), name)
    x_t, t, labels = torch.randn(2, 1, 8, 8), torch.tensor(500), torch.tensor([0, 2])
    with torch.no_grad():
        output, without = (pipeline.unet(x_t, t, given).sample for given in (labels, torch.tensor([3, 3])))
        guided = pipeline._predict(x_t, t, labels, 3.0)
    expected = without[:, :1] + 3 * (output[:, :1] - without[:, :1])
    torch.testing.assert_close(guided[:, :1], expected, rtol=1e-4, atol=1e-5)
    assert guided.shape[1] == (2 if name == "ddpm" else 1)
    if name == "ddpm":  # the variance is not guided
        torch.testing.assert_close(guided[:, 1:], output[:, 1:])
    assert len(draw(pipeline, range(2), 0, [0, 1], num_inference_steps=5)) == 2


def test_a_learned_variance_is_cut_off_for_any_number_of_channels():
    """Also with a solver that the user took from diffusers, which by itself keeps three channels."""
    pipeline = small_pipeline(learn_sigma=True, channels=5)
    for kind in (DPMSolverMultistepScheduler, UniPCMultistepScheduler, EulerDiscreteScheduler, DDPMScheduler):
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config | {"variance_type": "learned_range"})
        assert draw(pipeline, range(2), 0, num_inference_steps=4).shape == (2, 5, 8, 8)


def test_drawing_leaves_the_scheduler_s_configuration_as_it_was():
    pipeline = small_pipeline(learn_sigma=True)
    for kind in (DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler, DDPMScheduler):
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
        draw(pipeline, range(1), 0, num_inference_steps=3)
    assert pipeline.scheduler.config.variance_type == "learned_range" and pipeline._uses_variance


def test_guidance_in_an_interval_is_guidance_there_and_none_elsewhere():
    pipeline = solved(small_pipeline(classes=3), "ddim", steps=10)
    options = {"class_labels": [0, 2], "num_inference_steps": 10, "output_type": "pt"}
    asked = []
    pipeline.unet.register_forward_pre_hook(lambda _, given: asked.append((len(given[0]), int(given[1]))))

    def drawn(**more):
        return pipeline(2, generator=torch.Generator().manual_seed(0), **options, **more).images

    partly = drawn(guidance_scale=3.0, guidance_interval=(300, 700))
    assert [size for size, _ in asked] == [4 if 300 <= t <= 700 else 2 for _, t in asked] and {2, 4} == {size for size, _ in asked}
    everywhere, nowhere = drawn(guidance_scale=3.0), drawn()
    assert torch.equal(everywhere, drawn(guidance_scale=3.0, guidance_interval=(0, 999)))
    assert torch.equal(nowhere, drawn(guidance_scale=3.0, guidance_interval=(998.2, 998.8)))  # no step falls between
    assert not torch.allclose(partly, everywhere) and not torch.allclose(partly, nowhere)
    with pytest.raises(InputError, match="its first timestep must be the smaller one"):
        drawn(guidance_scale=3.0, guidance_interval=(700, 300))


def test_labels_that_the_model_does_not_have_are_refused():
    for pipeline, options, named in (
        (small_pipeline(), {"class_labels": [0]}, "unconditional"),
        (small_pipeline(), {"guidance_scale": 2.0}, "guidance_scale is 2.0"),
        (small_pipeline(classes=3), {}, "class_labels are missing"),
        (small_pipeline(classes=3), {"class_labels": [3]}, "class_labels has 3"),
        (small_pipeline(classes=3), {"class_labels": [1, 2]}, "one label for each of 1"),
        (small_pipeline(classes=3), {"class_labels": 1}, r"class_labels is 1, but must have one label for each of 1 images, as \[1\]"),
        (small_pipeline(classes=3), {"class_labels": "2"}, "class_labels is '2', but must have one label"),
        (small_pipeline(classes=3), {"class_labels": [1.5]}, r"class_labels has 1\.5, but the model's classes are 0 to 2"),
        (small_pipeline(classes=3), {"class_labels": torch.tensor([-0.5])}, r"class_labels has -0\.5"),
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


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_pipeline_saved_with_any_solver_comes_back_with_it(name, tmp_path):
    pipeline = solved(small_pipeline(classes=3, **({"prediction_type": "flow"} if name in FLOW else {})), name)
    pipeline.save_pretrained(tmp_path)
    again = PixelPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is type(pipeline.scheduler)
    assert again.scheduler.config.get("algorithm_type") == pipeline.scheduler.config.get("algorithm_type")


def test_stock_repositories_are_loaded_in_both_layouts(tmp_path):
    ours = small_pipeline()
    DDPMPipeline(ours.unet, ours.scheduler).save_pretrained(tmp_path / "new")
    (tmp_path / "old").mkdir()  # all files at the top, as the first repositories of diffusers have them
    for path in (tmp_path / "new").rglob("*.*"):
        shutil.copy(path, tmp_path / "old")
    PixelPipeline(ours.unet, PNDMScheduler(num_train_timesteps=500)).save_pretrained(tmp_path / "pndm")
    expected = pixels(draw(solved(small_pipeline()), range(2), 0, num_inference_steps=5))
    for name in ("new", "old"):
        loaded = load_pipeline(str(tmp_path / name))
        assert loaded.num_classes == 0 and np.array_equal(expected, pixels(draw(solved(loaded), range(2), 0, num_inference_steps=5)))
    assert len(draw(solved(load_pipeline(str(tmp_path / "pndm"))), range(2), 0, num_inference_steps=5)) == 2


@pytest.mark.parametrize("name", ("ddim", "dpmsolver++", "unipc", "heun"))
def test_a_schedule_that_only_the_model_s_own_scheduler_knows_by_name_is_kept(name):
    own = DDPMScheduler(beta_schedule="sigmoid", beta_start=1e-4, beta_end=0.02)
    solver = make_scheduler(name, own, "linspace", 5)
    torch.testing.assert_close(solver.alphas_cumprod, own.alphas_cumprod, rtol=0, atol=1e-6)


def test_models_of_another_kind_are_refused(tmp_path):
    ours = small_pipeline()
    latents = VQModel(block_out_channels=[8], latent_channels=1, norm_num_groups=8)
    LDMPipeline(latents, ours.unet, DDIMScheduler()).save_pretrained(tmp_path / "latent")
    with pytest.raises(InputError, match="it has a vqvae, but this is for pixel models"):
        load_pipeline(str(tmp_path / "latent"))
    PixelPipeline(ours.unet, ScoreSdeVeScheduler()).save_pretrained(tmp_path / "score")
    with pytest.raises(InputError, match="ScoreSdeVeScheduler, which has no betas of DDPM"):
        solved(load_pipeline(str(tmp_path / "score")))
    other = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    with pytest.raises(InputError, match=r"predicts something else \(flow_prediction\)"):
        make_scheduler("ddim", other, "linspace", 5)


@pytest.mark.parametrize("name", ("unipc", "dpmsolver++", "ddim"))
def test_a_spacing_of_the_model_s_own_scheduler_does_not_win_over_the_one_asked_for(name):
    own = DPMSolverMultistepScheduler(use_karras_sigmas=True)
    expected = make_scheduler(name, DDPMScheduler(), "trailing", 8).timesteps
    assert torch.equal(make_scheduler(name, own, "trailing", 8).timesteps, expected)
    assert make_scheduler(name, own, "linspace", 3, [900, 500, 100]).timesteps.tolist() == [900, 500, 100]


@pytest.mark.parametrize("name", ("ddim", "unipc", "dpmsolver++"))
def test_images_begin_as_noise(name):
    with pytest.raises(InputError, match="timesteps begin at 0, the clean end"):
        make_scheduler(name, DDPMScheduler(), "linspace", 1, [0])
    with pytest.raises(InputError, match="begins too low"):
        make_scheduler(name, DDPMScheduler(), "leading", 1)
    assert make_scheduler(name, DDPMScheduler(), "trailing", 1).timesteps.tolist() == [999]


def test_the_network_computes_in_its_own_precision_and_the_solver_in_float32():
    exact, rounded = solved(small_pipeline()), solved(small_pipeline())
    rounded.unet.bfloat16()
    seen = []
    rounded.unet.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    first, second = (
        p(4, num_inference_steps=5, generator=[torch.Generator().manual_seed(k) for k in range(4)], output_type="pt").images
        for p in (exact, rounded)
    )
    assert set(seen) == {torch.bfloat16} and second.dtype == torch.float32
    assert 0 < (first - second).abs().max() < 0.1


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


@pytest.fixture
def run_of_24_steps(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


def trained_on(run):
    """The run as after more training: other weights of a later step."""
    path = run / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value * 1.01 for name, value in load_file(path).items()}, path, {"format": "pt"})
    card = (run / "README.md").read_text()
    (run / "README.md").write_text(card.replace("Step 24 of", "Step 48 of"))


def in_the_run(run, **changes):
    """The name of the folder of samples without --output_dir."""
    return sample(sample_config(run, "", **{"num_images": 2, "steps": 2, **changes})).name


def test_without_an_output_dir_every_setting_has_a_folder_of_its_own(run_of_24_steps, trained_by_class):
    trained = run_of_24_steps
    shutil.rmtree(trained / "samples", ignore_errors=True)  # of other tests
    assert in_the_run(trained) == "unipc-2"
    assert in_the_run(trained, seed=1) == "unipc-2-seed-1"
    assert in_the_run(trained, weights="raw", scheduler="ddim", eta=0.5) == "ddim-2-weights-raw-eta-0.5"
    assert in_the_run(trained, steps=None, timesteps=(900, 0)) == "unipc-2-timesteps-900,0"
    assert in_the_run(trained, format="npz") == "unipc-2-format-npz-num_images-2"
    assert in_the_run(trained_by_class, guidance_scale=2.0, class_labels=("3", "7")) == "unipc-2-guidance_scale-2.0-class_labels-3,7"
    long = [in_the_run(trained_by_class, class_labels=tuple(k % 10 for k in range(n))) for n in (60, 61)]
    assert long[0] != long[1] and max(map(len, long)) == 100
    images = {path.parent.name: path.read_bytes() for path in trained.glob("samples/unipc-2*/000001.png")}
    assert len(set(images.values())) == len(images) == 3

    assert in_the_run(trained, num_images=4) == "unipc-2"  # completes the first
    assert in_the_run(trained, num_images=3) == "unipc-2-num_images-3"
    trained_on(trained)
    assert in_the_run(trained, num_images=4) == "unipc-2-step-00000048"
    assert in_the_run(trained, num_images=5) == "unipc-2-step-00000048"
    assert in_the_run(trained, seed=1) == "unipc-2-seed-1-step-00000048"
    assert (trained / "samples" / "unipc-2" / "000001.png").read_bytes() == images["unipc-2"]
    assert in_the_run(trained, overwrite=True) == "unipc-2"
    assert (trained / "samples" / "unipc-2" / "000001.png").read_bytes() != images["unipc-2"]
    assert sorted(path.name for path in (trained / "samples" / "unipc-2").glob("*.png")) == ["000000.png", "000001.png"]


def test_a_folder_of_other_files_is_refused_before_the_model_is_loaded(trained, tmp_path, monkeypatch):
    (tmp_path / "letter.txt").write_text("dear")
    monkeypatch.setattr(generate, "make_job", lambda *_: pytest.fail("loaded"))
    with pytest.raises(InputError, match=r"holds other files, such as letter\.txt"):
        sample(sample_config(trained, tmp_path))


def test_a_folder_with_other_settings_is_refused_in_words_and_replaced_with_overwrite(run_of_24_steps, tmp_path):
    trained = run_of_24_steps
    folder = sample(sample_config(trained, tmp_path / "out", format="npz", trajectory=True))
    (folder / "letter.txt").write_text("dear")
    whole = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(InputError) as refused:
        sample(sample_config(trained, folder, scheduler="ddim", steps=3, eta=0.5, weights="raw", num_images=3))
    assert "eta was 0.0, now 0.5; format was npz, now png; scheduler was unipc, now ddim" in str(refused.value)
    assert "steps was 5, now 3; weights was ema, now raw);" in str(refused.value)
    assert "--overwrite" in str(refused.value) and "sha256" not in str(refused.value)
    trained_on(trained)
    with pytest.raises(InputError, match=r"\(the model was at step 24, now 48\); name another --output_dir"):
        sample(sample_config(trained, folder, format="npz"))
    (trained / "README.md").unlink()
    with pytest.raises(InputError, match="the model was another, or at another step"):
        sample(sample_config(trained, folder, format="npz"))
    for name, kind in (("mine.webp", "webp"), ("mine.JPG", "png")):
        (folder / name).write_text("mine")
        with pytest.raises(InputError, match=f"holds other pictures, such as {name}"):
            sample(sample_config(trained, folder, format=kind, overwrite=True))
        (folder / name).unlink()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"} == {
        path: data for path, data in whole.items() if path.name != ".lock"
    }
    sample(sample_config(trained, folder, num_images=3, overwrite=True))
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    images = {f"00000{k}.png" for k in range(3)}
    assert left == {".lock", ".sampling.json", "letter.txt", "metadata.jsonl", "preview/grid.png"} | images
    kept = (folder / "000000.png").stat().st_mtime_ns
    sample(sample_config(trained, folder, num_images=1, overwrite=True))  # the same settings: nothing is drawn
    assert (folder / "000000.png").stat().st_mtime_ns == kept and not (folder / "000002.png").exists()
    (folder / ".sampling.json").write_text("{")
    with pytest.raises(InputError, match=r"images of unknown settings \(\.sampling\.json is damaged\)"):
        sample(sample_config(trained, folder, num_images=1))
    sample(sample_config(trained, folder, num_images=1, overwrite=True))


def test_a_kill_while_images_are_replaced_leaves_none_of_other_settings(tmp_path, monkeypatch):
    samples = SampleFolder(tmp_path, "png", 2)
    assert samples.begin({"steps": 5}) == [0, 1]
    for k in range(2):
        samples.write(k, np.zeros((1, 8, 8), np.uint8))
    samples.finish(None, range(2))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(image_writer, "write_file", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        samples.begin({"steps": 6}, overwrite=True)
    assert list(tmp_path.glob("*.png")) == []
    with pytest.raises(InputError, match="steps was 5, now 6"):
        samples.begin({"steps": 6})
    assert samples.begin({"steps": 6}, overwrite=True) == samples.begin({"steps": 6}) == [0, 1]


@pytest.mark.parametrize("command", (("sample.py",), ("eval.py", "compare"), ("eval.py", "score"), ("eval.py", "bpd")))
def test_a_path_that_does_not_exist_is_said_to_not_exist(command, tmp_path, capsys):
    programs = {"sample.py": cli.sample, "eval.py": cli.evaluate}
    assert programs[command[0]]([*command[1:], str(tmp_path / "nothing")]) == 2
    assert f"{tmp_path / 'nothing'} does not exist" in capsys.readouterr().err
    if command == ("sample.py",):  # what looks like a name on the Hub, too
        assert cli.sample(["no-such-folder/digits"]) == 2
        assert "no-such-folder/digits does not exist here; to draw with" in capsys.readouterr().err


def test_weights_that_are_not_trained_belong_to_every_average(tmp_path):
    """Those of a Fourier embedding of the time, which UNet2DModel freezes."""
    config = {"block_out_channels": [8, 16], "down_block_types": ["DownBlock2D", "DownBlock2D"], "time_embedding_type": "fourier"}
    config |= {"up_block_types": ["UpBlock2D", "UpBlock2D"], "norm_num_groups": 8, "layers_per_block": 1}
    (tmp_path / "unet.json").write_text(json.dumps(config))
    flags = [
        "--dataset",
        "digits",
        "--resolution",
        8,
        "--model_config",
        tmp_path / "unet.json",
        "--ema_decay",
        0.9,
        0.99,
        "--batch_size",
        8,
    ]
    code, _, err = run("train.py", "--output_dir", tmp_path / "run", *flags, "--max_steps", 2, "--num_threads", 1, "--warmup_steps", 0)
    assert code == 0, err
    for weights in ("0.99", "raw", "ema"):
        sample(sample_config(tmp_path / "run", tmp_path / weights, weights=weights, num_images=2))


def test_raw_and_other_averaged_weights_can_be_drawn(trained, tmp_path):
    drawn = {}
    for weights in ("ema", "raw", "0.9", "0.99"):
        folder = sample(sample_config(trained, tmp_path / weights, weights=weights))
        drawn[weights] = (folder / "000000.png").read_bytes()
    assert drawn["ema"] == drawn["0.9"]  # the first rate is the exported one
    assert len({drawn["raw"], drawn["0.9"], drawn["0.99"]}) == 3
    with pytest.raises(InputError, match=r"averages at \[0\.9, 0\.99\] only"):
        sample(sample_config(trained, tmp_path / "other", weights="0.5"))


def _pruned(run):
    """A copy of a run with its older checkpoint alone, and what a training with --keep_checkpoints 1 does to it when it saves."""
    older, newer = list_checkpoints(run / "checkpoints")
    later = newer.rename(run / newer.name)

    def save():
        if older.exists():
            later.rename(newer)
            remove_folder(older)

    return run / "checkpoints", save


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_training_may_remove_the_only_checkpoint_while_it_is_read(trained, tmp_path, monkeypatch, when):
    verify, (there, save) = checkpoints.verify, _pruned(shutil.copytree(trained, tmp_path / "run"))

    def removing(path):
        if when == "before":
            save()
        found = verify(path)
        save()
        return found

    monkeypatch.setattr(checkpoints, "verify", removing)
    folder = sample(sample_config(there.parent, tmp_path / "samples", weights="raw", num_images=1))
    assert json.loads((folder / ".sampling.json").read_text())["model_step"] == 24


def test_a_training_may_remove_the_only_checkpoint_while_its_state_is_read(trained, tmp_path, monkeypatch):
    there, save = _pruned(shutil.copytree(trained, tmp_path / "run"))

    def removing(path):
        save()
        return read_json(path)

    monkeypatch.setattr(checkpoints, "read_json", removing)
    assert checkpoints.newest_state(there)["step"] == 24


def labels_in(folder):
    return [json.loads(line)["label"] for line in (folder / "metadata.jsonl").read_text().splitlines()]


def test_labels_are_balanced_drawn_or_given_and_written_beside_the_images(trained_by_class, tmp_path):
    folder = sample(sample_config(trained_by_class, tmp_path / "given", class_labels=(3, 7), guidance_scale=2.0))
    assert labels_in(folder) == [3, 7] * 5
    assert labels_in(sample(sample_config(trained_by_class, tmp_path / "balanced"))) == list(range(10))
    drawn = labels_in(sample(sample_config(trained_by_class, tmp_path / "drawn", class_labels="drawn", num_images=40)))
    assert set(drawn) <= set(range(10)) and len(set(drawn)) > 5 and drawn[:10] != list(range(10))
    fewer = sample(sample_config(trained_by_class, tmp_path / "fewer", class_labels="drawn", num_images=20, batch_size=7))
    assert labels_in(fewer) == drawn[:20]  # the label of image k does not depend on what is drawn with it
    other = sample(sample_config(trained_by_class, tmp_path / "other", class_labels="drawn", num_images=20, batch_size=7, seed=1))
    assert labels_in(other) not in (drawn[:20], drawn[1:21])


def test_the_picture_of_a_class_conditional_model_has_a_class_a_row_with_its_name(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("debias_diffusers.data.images.named_grid", lambda *args: made.append(args) or Image.new("L", (1, 1)))
    for count, labels in ((6, [2, 0, 2, 0, 2, 0]), (7, [2, 0, 2, 0, 2, 0, 2]), (64, list(range(64)))):
        samples = SampleFolder(tmp_path / str(count), "png", count)
        for k in range(count):
            samples.write(k, np.full((1, 8, 8), k, np.uint8))
        samples.finish(labels, range(count), ["cat", "horse", "\u732b"] if count == 7 else None)
    rows = [(names, [[np.asarray(image)[0, 0] for image in row] for row in rows]) for names, rows in made]
    assert rows[0] == (["class 0", "class 2"], [[1, 3, 5], [0, 2, 4]])
    assert rows[1] == (["cat", "class 2"], [[1, 3, 5], [0, 2, 4, 6]])
    assert rows[2][1] == [[k] for k in range(20)]


def test_all_formats_hold_the_same_images(trained_by_class, tmp_path):
    folders = {kind: sample(sample_config(trained_by_class, tmp_path / kind, format=kind)) for kind in ("png", "webp", "npz")}
    expected = [np.asarray(Image.open(folders["png"] / f"{k:06d}.png")) for k in range(10)]
    for k, array in enumerate(expected):
        coloured = np.asarray(Image.open(folders["webp"] / f"{k:06d}.webp"))
        assert all(np.array_equal(coloured[..., c], array) for c in range(3))
    packed = np.load(folders["npz"] / "samples.npz", allow_pickle=False)
    assert sorted(packed) == ["arr_0", "arr_1"] and packed["arr_0"].dtype == np.uint8
    assert np.array_equal(packed["arr_0"], np.stack(expected)[..., None]) and packed["arr_1"].tolist() == list(range(10))
    assert sorted(p.name for p in folders["npz"].iterdir()) == [".lock", ".sampling.json", "preview", "samples.npz"]
    assert labels_in(folders["webp"]) == list(range(10))


def test_a_packed_file_is_finished_once_and_does_not_grow(trained, tmp_path, monkeypatch):
    def interrupted(self, labels):
        raise KeyboardInterrupt

    config = sample_config(trained, tmp_path / "out", format="npz")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SampleFolder, "_pack", interrupted)
        sample(config)
    parts = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out" / "parts").iterdir()}
    assert len(parts) == 10
    sample(config)
    packed = (tmp_path / "out" / "samples.npz").read_bytes()
    sample(config)
    assert (tmp_path / "out" / "samples.npz").read_bytes() == packed
    with pytest.raises(InputError, match="num_images was 10, now 20"):
        sample(sample_config(trained, tmp_path / "out", format="npz", num_images=20))
    with pytest.raises(InputError, match="format was npz, now png"):
        sample(sample_config(trained, tmp_path / "out"))


def test_a_trajectory_is_a_picture_of_x_t_and_x_0_over_the_steps(trained, tmp_path):
    folder = sample(sample_config(trained, tmp_path / "out", trajectory=True))
    picture = np.asarray(Image.open(folder / "preview" / "trajectory.png"))
    assert picture.shape == (6 + 12 * 54, 6 + 5 * 54)  # six images, x_t above x_0; five steps; 8 pixels enlarged six times
    last = [picture[6 + row * 54 :, 6 + 4 * 54 :][:48:6, :48:6] for row in (0, 2)]
    assert [array.tolist() for array in last] == [np.asarray(Image.open(folder / f"{k:06d}.png")).tolist() for k in (0, 1)]
    assert not np.array_equal(picture[6:54, 6:54], picture[60:108, 6:54])


def test_a_trajectory_is_drawn_in_the_batches_of_the_command(trained, tmp_path, monkeypatch):
    sizes, call = [], PixelPipeline.__call__

    def counted(pipeline, **options):
        sizes.append(options["batch_size"])
        return call(pipeline, **options)

    monkeypatch.setattr(PixelPipeline, "__call__", counted)
    folder = sample(sample_config(trained, tmp_path / "out", trajectory=True, num_images=5, batch_size=2))
    assert sizes == [2, 2, 1] * 2  # the images, and then what led to them
    assert Image.open(folder / "preview" / "trajectory.png").size == (6 + 5 * 54, 6 + 10 * 54)


def test_large_images_are_drawn_in_smaller_batches_if_the_command_does_not_say():
    sizes = {(8, 8): 64, (256, 256): 64, (512, 512): 16, (1024, 1024): 4, (832, 1216): 4, (2048, 2048): 1, (8192, 8192): 1}
    assert {size: batch_size_of(None, 100, *size) for size in sizes} == sizes
    assert batch_size_of(3, 100, 1024, 1024) == 3 and batch_size_of(None, 2, 8, 8) == batch_size_of(64, 2, 8, 8) == 2


@pytest.mark.parametrize(
    "command, flags, images",
    [
        (cli.sample, "{run} --output_dir drawn", 64),
        (cli.evaluate, "score {run} --reference digits --metrics colour --num_images 9 --cache_dir=", 9),
        (cli.evaluate, "bpd {run} --num_images 4", 4),
        (cli.evaluate, "bias {run} --num_images 4 --num_samples 4 --metrics colour --output_dir bias --cache_dir=", 4),
    ],
)
def test_too_little_memory_is_a_sentence_with_the_flag(trained, tmp_path, monkeypatch, capsys, command, flags, images):
    def too_large(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.8 GiB")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(UNet2DModel, "forward", too_large)
    assert command([*flags.format(run=trained).split(), "--num_threads", "1"]) == 2
    assert f"out of memory with {images} images per forward; add --batch_size {images // 2}" in capsys.readouterr().err


def test_a_damaged_packed_file_is_drawn_again(trained, tmp_path):
    folder = sample(sample_config(trained, tmp_path / "out", format="npz"))
    whole = np.load(folder / "samples.npz")["arr_0"]
    for data in (b"", (folder / "samples.npz").read_bytes()[:300]):
        (folder / "samples.npz").write_bytes(data)
        sample(sample_config(trained, folder, format="npz"))
        assert np.array_equal(np.load(folder / "samples.npz")["arr_0"], whole)
    (folder / "parts").mkdir()  # as a kill at the very end leaves it
    sample(sample_config(trained, folder, format="npz"))
    assert not (folder / "parts").exists()


def test_two_commands_do_not_draw_into_one_folder(trained, tmp_path):
    held = acquire_lock(tmp_path / "out")
    code, _, err = run("sample.py", trained, "--output_dir", tmp_path / "out")
    assert code == 3 and f"{tmp_path / 'out'} is in use by process {os.getpid()}" in err
    held.close()
    assert run("sample.py", trained, "--num_images", 2, "--steps", 2, "--output_dir", tmp_path / "out")[0] == 0


def test_a_disk_that_is_full_is_said_and_ends_the_command(trained, tmp_path, monkeypatch):
    def full(draft, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(CannotWriteError, match="No space left on device"):
        sample(sample_config(trained, tmp_path / "out", num_images=8))
        patch.setattr(os, "replace", full)
        sample(sample_config(trained, tmp_path / "out", num_images=40))
    assert len(list((tmp_path / "out").glob("0*.png"))) == 8 and not list((tmp_path / "out").glob(".draft*"))
    sample(sample_config(trained, tmp_path / "out", num_images=40))


def test_images_are_written_beside_the_drawing(tmp_path, monkeypatch):
    goes_on, written = threading.Event(), []
    monkeypatch.setattr(SampleFolder, "write", lambda self, k, array: written.append(k) if goes_on.wait(HANG) else None)
    samples = SampleFolder(tmp_path, "png", 8)
    with ImageWriter(samples) as writer:
        writer.put(range(4), torch.zeros(4, 1, 8, 8, dtype=torch.uint8))
        writer.put(range(4, 8), torch.zeros(4, 1, 8, 8, dtype=torch.uint8))
        assert written == []
        goes_on.set()
    assert sorted(written) == list(range(8))


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--scheduler", "unipcc"], "Expected one of ddim, ddpm, dpmsolver, dpmsolver++"),
        (["--scheduler", "flow_heun"], "the model is no rectified flow"),
        (["--steps", "0"], "steps is 0"),
        (["--steps", "1001"], "take at most 1000"),
        (["--steps", "10", "--timesteps", "500", "0"], "only one can decide"),
        (["--timesteps", "0", "500"], "must fall from above 0"),
        (["--timesteps", "1500", "0"], "timesteps are 0 to 999"),
        (["--sections", "2000"], "sections has 2000"),
        (["--steps", "300", "--spacing", "stride"], "take 334"),
        (["--eta", "1"], "eta is 1.0, but scheduler is left out"),
        (["--clipping_quantile", "0.9"], "clipping is not dynamic"),
        (["--guidance_interval", "2", "5"], "guidance_scale is 1"),
        (["--seed=-1", "--num_images", "0"], "2 problems"),
        (["--weights", "best"], "weights is 'best'"),
        (["--class_labels", "3"], "unconditional"),
        (["--class_labels", "drawn"], "the model is unconditional"),
        (["--guidance_scale", "2"], "guidance_scale"),
        (["--dtype", "float16"], "dtype is float16"),
        (["--format", "gif"], "Expected one of npz, png, webp"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(trained, flags, named):
    code, _, err = run("sample.py", trained, *flags)
    assert code == 2 and "Traceback" not in err
    assert "error: " in err and named in err


def test_an_interval_of_guidance_without_a_step_is_refused(trained_by_class, tmp_path):
    flags = ["--guidance_scale", 2, "--steps", 2, "--num_images", 2, "--output_dir", tmp_path / "drawn", "--guidance_interval"]
    code, _, err = run("sample.py", trained_by_class, *flags, 20, 30)
    assert code == 2 and "guidance_interval is 20 30, but no step is there, but at 999, " in err
    assert not (tmp_path / "drawn").exists()
    assert run("sample.py", trained_by_class, *flags, 800, 999)[0] == 0


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
        draw(pipeline, range(1), 0, num_inference_steps=2)


def test_weights_are_read_from_safetensors_unless_others_are_asked_for(tmp_path):
    pipeline = small_pipeline()
    pipeline.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(InputError, match=r"no safetensors but unet/diffusion_pytorch_model\.bin.* --allow_pickle_import"):
        load_pipeline(str(tmp_path))
    again = load_pipeline(str(tmp_path), allow_pickle=True).unet.state_dict()
    assert all(torch.equal(again[name], value) for name, value in pipeline.unet.state_dict().items())
