"""`eval.py bias` with text-to-image models: latents, captions and sizes against stock diffusers, planted biases, and the command."""

import csv
import dataclasses
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import as_ranks
from PIL import Image
from test_text_to_image import stock
from text_models import make_base, text_args

pytest.importorskip("transformers")

from debias_diffusers import cli
from debias_diffusers.analysis import bias_report, sampled
from debias_diffusers.analysis.denoising import fixed_noise, measure_errors, weights_of_timesteps
from debias_diffusers.analysis.models import folders_of, open_models
from debias_diffusers.analysis.text_models import TextImages, _side, require_same_conditions
from debias_diffusers.config.schema.evaluation import BiasConfig
from debias_diffusers.errors import InputError
from debias_diffusers.evaluation.reference import reference_data
from debias_diffusers.pipelines.lora import load_text_model
from debias_diffusers.runs.lora_folder import BASE_RECORD, LORA_WEIGHTS
from debias_diffusers.runs.model_folder import require_text_model

ALONE = SimpleNamespace(device=torch.device("cpu"), process_index=0, num_processes=1)
INDICES = [0, 1, 3]  # of the fixture `pictures`
CAPTIONS = ["a handwritten one", "the digit two", None]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {"xl": make_base(folder / "xl", prediction_type="v_prediction"), "sd": make_base(folder / "sd", xl=False)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Four pictures of several sizes, the second with two captions and the last with none."""
    folder = tmp_path_factory.mktemp("pictures")
    for k, (size, captions) in enumerate((((40, 24), CAPTIONS[0]), ((24, 24), f"a two\n{CAPTIONS[1]}"), ((24, 56), "three"), ((9, 8), ""))):
        noise = torch.randint(0, 256, (3, 3, 3), generator=torch.Generator().manual_seed(k), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).resize(size, Image.Resampling.BICUBIC).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(captions)
    return folder


def opened(runs, pictures, **options):
    """The reference, the examples of `INDICES`, and the models with their conditions, of a command."""
    config = BiasConfig(runs=tuple(map(str, runs)), reference=str(pictures), num_samples=3, **options)
    models = open_models(config, folders_of(config, ALONE), ALONE.device)
    images = TextImages(config, reference_data(config, config.reference), models)
    examples = images.examples(INDICES)
    return images, examples, [images.conditioned(model, examples, "cpu") for model in models]


@pytest.fixture(scope="module")
def xl(bases, pictures):
    return opened([bases["xl"]], pictures)


@pytest.mark.parametrize("name", ["xl", "sd"])
def test_latents_embeddings_and_sizes_are_those_of_stock_diffusers(bases, pictures, xl, name):
    _, examples, (model,) = xl if name == "xl" else opened([bases[name]], pictures)
    pipeline = stock(bases[name])
    network = model.denoiser.network
    assert examples.captions == CAPTIONS
    for row, (index, caption) in enumerate(zip(INDICES, CAPTIONS)):
        picture = Image.open(pictures / f"{index}.png")
        resized = picture.resize([round(8 / min(picture.size) * side) for side in picture.size], Image.Resampling.BICUBIC)
        left, top = ((side - 8) // 2 for side in resized.size)
        assert examples.time_ids[row].tolist() == [picture.height, picture.width, top, left, 8, 8]
        pixels = pipeline.image_processor.preprocess(resized.crop((left, top, left + 8, top + 8)))
        with torch.no_grad():
            mean = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
        torch.testing.assert_close(examples.x_0[row : row + 1], mean)
        arguments = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
        prompt, null, *pooled = pipeline.encode_prompt(caption or "", **arguments)
        torch.testing.assert_close(network.embeddings.text[row : row + 1], null if caption is None else prompt)
        if name == "xl":
            torch.testing.assert_close(network.embeddings.pooled[row : row + 1], pooled[caption is None])
        else:
            assert network.embeddings.pooled is None
    x_t, t = torch.randn(2, *examples.x_0.shape[1:], generator=torch.Generator().manual_seed(0)), 300
    texts = network.embeddings.text[1:]
    added = {"text_embeds": network.embeddings.pooled[1:], "time_ids": examples.time_ids[1:]} if name == "xl" else None
    with torch.no_grad():
        expected = pipeline.unet(x_t, torch.tensor([t, t]), texts, added_cond_kwargs=added).sample
        found = model.denoiser.prediction(x_t, t, torch.tensor([1, 2]))
    torch.testing.assert_close(found, expected)
    assert model.pipeline.text_encoder is None


class IdentityVAE(torch.nn.Module):
    """Decodes the first three channels of latents as they are, of at most two images at once."""

    device = torch.device("cpu")
    config = SimpleNamespace(scaling_factor=1.0, latents_mean=None, latents_std=None)

    def decode(self, latents, return_dict):
        assert len(latents) <= 2
        return (latents[:, :3],)


def test_a_planted_bias_is_the_signed_error_in_latents_and_in_colours(xl, monkeypatch):
    """The bias of the last layer of a UNet that predicts v moves the prediction by itself, and the estimate of x_0 by -s times that."""
    images, examples, (model,) = xl
    noise, b = fixed_noise(examples.x_0.shape[1:], 0, INDICES), torch.tensor([0.02, -0.05, 0.1, 0.3])
    places, denoiser = [10, 999], model.denoiser

    def errors():
        return measure_errors(denoiser, examples.x_0, noise, examples.conditions, places, 2, colours=images.colours(examples.x_0))

    plain = errors()
    moved = torch.nn.Parameter(denoiser.network.unet.conv_out.bias.detach() + b)
    monkeypatch.setattr(denoiser.network.unet.conv_out, "bias", moved)
    planted = errors()
    expected = -denoiser.schedule.s[places][:, None] * b.double()
    torch.testing.assert_close((planted.x_0_bias - plain.x_0_bias).mean(1), expected, rtol=1e-3, atol=1e-5)
    vae, scale = images.pipeline.vae, images.pipeline.vae.config.scaling_factor
    with torch.no_grad():
        for k, t in enumerate(places):
            estimate = denoiser.estimate(examples.x_0, noise, t, examples.conditions)
            away = vae.decode(estimate / scale).sample - vae.decode(examples.x_0 / scale).sample
            torch.testing.assert_close(planted.decoded_bias[k], away.mean((2, 3)).double(), rtol=1e-3, atol=1e-4)
    monkeypatch.setattr("debias_diffusers.analysis.text_models.VAE_PIXELS", 2 * 8 * 8)
    monkeypatch.setattr(images, "pipeline", SimpleNamespace(vae=IdentityVAE()))
    torch.testing.assert_close(errors().decoded_bias, planted.x_0_bias[:, :, :3], rtol=1e-4, atol=1e-6)


def table_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def as_run(base, folder, dataset):
    """A copy of a model that looks like a run on captioned images."""
    shutil.copytree(base, folder)
    (folder / "checkpoints").mkdir()
    values = {
        "dataset": str(dataset),
        "split": "train",
        "image_column": None,
        "base_model": "digits",
        "resolution": 8,
        "weighting": "min_snr",
    }
    values |= {"prediction_type": "v_prediction", "noise_schedule": "scaled_linear", "ema_decay": [0.9], "max_steps": 12}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


SMALL = ["--num_images", 3, "--num_timesteps", 3, "--num_samples", 4, "--steps", 2, "--metrics", "colour", "--num_threads", 1]


def test_the_command_writes_tables_figures_and_a_page_of_the_data_of_the_run(bases, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(sampled, "THRESHOLDS", 2)
    monkeypatch.setattr(bias_report, "curves", lambda *args: b"drawn by the tests of pixel models")
    one = as_run(bases["xl"], tmp_path / "one", pictures)
    (tmp_path / "two").symlink_to(one)
    out, flags = tmp_path / "out", [*SMALL, "--swap", "--swap_steps", 2, "--cache_dir", "", "--guidance_scale", 2]
    assert cli.evaluate([str(word) for word in ("bias", one, tmp_path / "two", "--output_dir", out, *flags)]) == 0
    rows, steps, swap = (table_of(out / f"{name}.csv") for name in ("timesteps", "steps", "swap"))
    by_run = [[{**row, "run": ""} for row in rows if row["run"] == run] for run in ("one", "two")]
    assert by_run[0] == by_run[1]
    channels = {quantity: {row["channel"] for row in rows if row["quantity"] == quantity} for quantity in ("x_0_bias", "latent_bias")}
    assert channels == {"x_0_bias": {"red", "green", "blue"}, "latent_bias": {f"latent {c}" for c in range(4)}}
    assert sum(float(row["value"]) for row in by_run[0] if row["quantity"] == "gradient_share") == pytest.approx(1)
    assert len({row["value"] for row in steps if row["quantity"] == "colour_distance" and row["steps"] == "2"}) == 1
    assert len({row["value"] for row in swap if row["quantity"] == "colour_distance"}) == 1  # of equal networks
    page = (out / "report.html").read_text()
    assert page.count("<img") == len(list(out.glob("*.png"))) == 13 and "Guidance scale: 2 of one, 2 of two" in page


def test_flags_and_models_that_do_not_go_together_are_refused_without_torch(bases, tmp_path, capsys):
    (tmp_path / "pixels").mkdir()
    (tmp_path / "pixels" / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}))
    for flags, said in (
        ((bases["sd"], tmp_path / "pixels"), "is a text-to-image model, but .*pixels is a pixel model; name models of one kind"),
        ((bases["sd"], "--label_column", "label"), "label_column is label, but is for pixel models"),
        ((tmp_path / "pixels", "--guidance_scale", 2), "guidance_scale is 2.0, but is for text-to-image models"),
        ((bases["sd"], "--base_model", bases["sd"]), "but no run is a LoRA; leave it out"),
        ((bases["sd"], "no/such/run"), "no/such/run does not exist"),
    ):
        assert cli.evaluate(["bias", *map(str, flags)]) == 2
        assert re.search(said, capsys.readouterr().err)


@pytest.fixture(scope="module")
def trained(bases, tmp_path_factory):
    """Runs by name: two LoRAs, one of them on the text encoders, too, and a whole UNet, of another size."""
    pytest.importorskip("peft")
    folder, lora = tmp_path_factory.mktemp("runs"), ("--lora_rank", 2, "--validation_split", 0.1)
    flags = {"lora": lora, "encoders": (*lora, "--lora_text_encoders"), "large": ("--resolution", 16)}
    for name, more in flags.items():
        command = text_args(bases["xl"], folder / name, "--max_steps", 3, "--learning_rate", 0.1, *more)
        assert cli.train([str(word) for word in command[1:]]) == 0
    return {name: folder / name for name in flags}


def models_of(*runs, **options):
    config = BiasConfig(runs=tuple(map(str, runs)), num_samples=3, **options)
    models = open_models(config, folders_of(config, ALONE), ALONE.device)
    return config, models, TextImages(config, reference_data(config, None, config.runs), models)


def test_what_configuration_files_leave_out_is_told_or_not_needed(bases, pictures, tmp_path):
    run, lora = as_run(bases["xl"], tmp_path / "run", pictures), tmp_path / "lora"

    def write(path, **changes):
        values = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))

    write(run / "config.json", split=..., weighting="not_registered_here")
    write(run / "unet" / "config.json", sample_size=None)
    config, (model,), images = models_of(run)
    assert images.conditioned(model, images.examples([0]), "cpu").job.size == (8, 8)
    assert weights_of_timesteps(model.objective, model.denoiser.schedule, "v_prediction") is None
    with pytest.raises(InputError, match="run does not say which square images it draws"):
        _side([dataclasses.replace(model, values={"resolution": None})])
    write(run / "config.json", dataset=None)
    with pytest.raises(InputError, match="run is no run that knows its data"):
        reference_data(config, None, config.runs)
    lora.mkdir()
    (lora / BASE_RECORD).write_text(json.dumps({"base_model": "gone"}))
    (lora / LORA_WEIGHTS).write_bytes(b"")
    with pytest.raises(InputError, match=r"LoRA .*lora cannot be loaded"):
        load_text_model(str(lora), base_model=str(bases["xl"]))
    write(run / "scheduler" / "scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler")
    with pytest.raises(InputError, match=r"run is a rectified flow .*, which StableDiffusionXLPipeline is not"):
        require_text_model(run, "run")


@pytest.mark.nightly
def test_the_gradient_of_a_lora_is_that_of_its_adapters(bases, trained):
    _, models, images = models_of(trained["lora"], bases["xl"])
    for model, adapters in zip(models, (True, False)):
        names = [name for name, parameter in model.pipeline.unet.named_parameters() if parameter.requires_grad]
        assert names and all((".lora_" in name) == adapters for name in names)
    examples = images.examples(INDICES)
    of_lora, of_base = (images.conditioned(model, examples, "cpu") for model in models)
    require_same_conditions(of_lora, of_base)
    x_t = fixed_noise(examples.x_0.shape[1:], 0, INDICES)
    with torch.no_grad():
        assert not torch.equal(*(model.denoiser.prediction(x_t, 500, examples.conditions) for model in (of_lora, of_base)))


@pytest.mark.nightly
def test_networks_of_other_text_encoders_are_not_swapped_and_models_of_other_vaes_or_sizes_not_compared(bases, trained, tmp_path):
    _, models, images = models_of(trained["lora"], trained["encoders"])
    examples = images.examples(INDICES)
    with pytest.raises(InputError, match="the text embeddings of the two runs differ"):
        require_same_conditions(*(images.conditioned(model, examples, "cpu") for model in models))
    with pytest.raises(InputError, match=r"has images of 8 pixels, but .*large of 16"):
        models_of(trained["lora"], trained["large"])
    with pytest.raises(InputError, match="have different VAEs"):
        models_of(trained["lora"], make_base(tmp_path / "other", seed=1))


@pytest.mark.nightly
def test_two_processes_write_the_tables_and_figures_of_one(trained, tmp_path):
    for processes in (1, 2):
        command = ("bias", trained["lora"], "--output_dir", tmp_path / str(processes), *SMALL, "--cache_dir", "")
        code, said = as_ranks(processes, "eval.py", *command)
        assert code == 0, said
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("1", "2"))
    assert one == two and len(one) == 14
