"""Text-to-image models: prompts to embeddings as in the stock pipelines, loading, drawing."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from text_models import LONG, in_fp16_alone, random_unet

pytest.importorskip("transformers")

from debias_diffusers.errors import InputError, NotFiniteError
from debias_diffusers.hub import client
from debias_diffusers.pipelines import text_pipeline
from debias_diffusers.pipelines.pixel_pipeline import load_pipeline
from debias_diffusers.pipelines.solvers import make_scheduler
from debias_diffusers.pipelines.text_pipeline import load_text_pipeline
from debias_diffusers.runs import model_folder, part_files
from debias_diffusers.utils import text_libraries

PROMPTS = ["a handwritten seven", "", "the digit 3 — “nine”,\nzero", LONG]


def stock(folder):
    """The pipeline as a user of diffusers loads it."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def xl(text_models):
    return stock(text_models["xl"])


@pytest.fixture(scope="module")
def sd(text_models):
    return stock(text_models["sd"])


def test_prompts_are_encoded_as_by_stock_sdxl_bit_for_bit(xl):
    text, null, pooled, null_pooled = xl.encode_prompt(PROMPTS, device="cpu")
    ours = text_pipeline.encode_prompts(xl, PROMPTS)
    assert torch.equal(ours.text, text) and torch.equal(ours.pooled, pooled)
    zeros = text_pipeline.null_embeddings(xl, text_pipeline.null_is_zeros(xl))
    assert torch.equal(zeros.text, null[:1]) and torch.equal(zeros.pooled, null_pooled[:1]) and not zeros.text.any()
    _, empty, _, empty_pooled = xl.encode_prompt("a", device="cpu", negative_prompt="")
    ours = text_pipeline.null_embeddings(xl, zeros=False)
    assert torch.equal(ours.text, empty) and torch.equal(ours.pooled, empty_pooled) and ours.text.any()


def test_prompts_are_encoded_as_by_stock_sd_bit_for_bit(sd):
    text, null = sd.encode_prompt(PROMPTS, "cpu", 1, True)
    ours = text_pipeline.encode_prompts(sd, PROMPTS)
    assert torch.equal(ours.text, text) and ours.pooled is None
    assert not text_pipeline.null_is_zeros(sd)
    alone = sd.encode_prompt("a", "cpu", 1, True)[1]
    assert torch.equal(text_pipeline.null_embeddings(sd, zeros=False).text, alone)
    assert torch.allclose(null, alone)


@pytest.mark.parametrize("model", ["xl", "sd"])
def test_long_prompts_are_encoded_in_chunks(model, request):
    pipeline = request.getfixturevalue(model)
    assert text_pipeline.tokens_read(pipeline) == 14 and text_pipeline.tokens_read(pipeline, 2) == 28
    long = "a handwritten seven of the digit nine the number of a handwritten four the digit two"
    words = long.split()
    assert text_pipeline.count_tokens(pipeline, [long, "a", ""]) == [16, 1, 0]
    ours = text_pipeline.encode_prompts(pipeline, [long, "a"], chunks=2)
    halves = [text_pipeline.encode_prompts(pipeline, [text, "a"]) for text in (" ".join(words[:14]), " ".join(words[14:]))]
    assert torch.allclose(ours.text[0], torch.cat([half.text[0] for half in halves]), atol=1e-6)
    assert ours.text.shape == (2, 32, halves[0].text.shape[-1])
    empty = text_pipeline.encode_prompts(pipeline, [""])
    assert torch.allclose(ours.text[1, 16:], empty.text[0], atol=1e-6)
    if model == "xl":
        assert torch.allclose(ours.pooled, halves[0].pooled, atol=1e-6)
    assert text_pipeline.null_embeddings(pipeline, zeros=True, chunks=2).text.shape == (1, 32, ours.text.shape[-1])


def test_an_embedding_is_close_to_that_of_any_other_batch(xl):
    many = text_pipeline.encode_prompts(xl, ["a"] * 65 + ["the digit nine"])
    assert many.text.shape[0] == 66
    assert torch.allclose(many.text[65:], text_pipeline.encode_prompts(xl, ["the digit nine"]).text, atol=1e-6)


# ---- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["xl", "sd", "v"])
def test_a_model_is_loaded_in_float32_without_safety_checker(text_models, name):
    pipeline = load_text_pipeline(str(text_models[name]))
    assert {parameter.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder) for parameter in part.parameters()} == {
        torch.float32
    }
    assert text_pipeline.is_xl(pipeline) == (name == "xl")
    assert pipeline.components.get("safety_checker") is None and pipeline.components.get("image_encoder") is None
    assert model_folder.task_of(text_models[name]) == "text_to_image"


def changed(folder, tmp_path, change):
    """A copy of a model with a change."""
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    change(copy)
    return str(copy)


def without(part):
    return lambda folder: shutil.rmtree(folder / part)


def with_index(**parts):
    def change(folder):
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | parts))

    return change


def without_tensor(part, file, tensor):
    def change(folder):
        tensors = load_file(folder / part / file)
        del tensors[tensor]
        save_file(tensors, folder / part / file, {"format": "pt"})

    return change


def with_unet(**changes):
    return lambda folder: random_unet(**changes).save_pretrained(folder / "unet")


def as_bin(folder):
    path = folder / "text_encoder" / "model.safetensors"
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()


def with_tokenizer_length(length):
    def change(folder):
        path = folder / "tokenizer_2" / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        settings = {name: value for name, value in (settings | {"model_max_length": length}).items() if value is not None}
        path.write_text(json.dumps(settings))

    return change


UNET_FILE = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (without("tokenizer_2"), "has no tokenizer_2"),
        (with_index(text_encoder=[None, None]), "has no text_encoder"),
        (
            with_index(text_encoder=["transformers", "T5EncoderModel"]),
            "text_encoder of class T5EncoderModel, but must have a CLIPTextModel",
        ),
        (with_index(unet=["diffusers", "UNet2DModel"]), "unet of class UNet2DModel, but must have a UNet2DConditionModel"),
        (without_tensor("text_encoder_2", "model.safetensors", "text_projection.weight"), "its text_encoder_2 lacks text_projection"),
        (without_tensor("unet", UNET_FILE, "conv_in.bias"), "lacks conv_in.bias"),
        (without_tensor("vae", UNET_FILE, "decoder.conv_in.bias"), "lacks decoder.conv_in.bias"),
        (with_unet(in_channels=9), "takes 9 channels, but its vae has 4"),
        (with_unet(cross_attention_dim=48), "embeddings of width 48, but its text encoders have 64"),
        (with_tokenizer_length(None), 'tokenizer_2 of model .* has no model_max_length, .* reads 16 tokens; write "model_max_length": 16'),
        (with_tokenizer_length(17), "tokenizer_2 of model .* has model_max_length 17, but its text encoder reads 16 tokens"),
        (as_bin, "no safetensors but text_encoder/pytorch_model.bin"),
    ],
)
def test_a_model_that_cannot_be_drawn_with_is_refused_in_a_sentence(text_models, tmp_path, change, named):
    with pytest.raises(InputError, match=named):
        load_text_pipeline(changed(text_models["xl"], tmp_path, change))


def test_a_safety_checker_and_an_image_encoder_are_left_out_and_half_precision_becomes_float32(text_models, tmp_path):
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    more = with_index(
        safety_checker=checker,
        feature_extractor=["transformers", "CLIPFeatureExtractor"],
        image_encoder=["transformers", "CLIPVisionModel"],
    )

    def change(folder):
        more(folder)
        for part, file in (("unet", UNET_FILE), ("text_encoder", "model.safetensors")):
            tensors = {
                name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in load_file(folder / part / file).items()
            }
            save_file(tensors, folder / part / file, {"format": "pt"})

    pipeline = load_text_pipeline(changed(text_models["sd"], tmp_path, change))
    assert pipeline.safety_checker is None and pipeline.image_encoder is None
    assert pipeline.unet.dtype == pipeline.text_encoder.dtype == torch.float32


def test_a_missing_library_is_named_with_the_command_that_installs_it(text_models, monkeypatch):
    monkeypatch.setattr(text_libraries.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"need transformers, which is not installed; run pip install .*\[text\]"):
        load_text_pipeline(str(text_models["xl"]))


def test_a_text_model_is_no_pixel_model(text_models, monkeypatch):
    """One of the Hub neither, which is known before its weights are downloaded."""
    for model in (str(text_models["sd"]), "user/model"):
        with pytest.raises(InputError, match="is a text-to-image model, but this is for pixel models"):
            load_pipeline(model)
        monkeypatch.setattr(client, "download_files", lambda name, patterns: text_models["sd"])
        monkeypatch.setattr(client, "download_model", lambda *_: pytest.fail("downloaded"))


@pytest.mark.parametrize("name", ["xl", "sd"])
def test_a_model_in_fp16_alone_is_loaded_as_by_the_stock_pipeline_that_is_told_its_variant(text_models, tmp_path, name):
    from diffusers import DiffusionPipeline

    folder = in_fp16_alone(text_models[name], tmp_path / "model")
    theirs, ours = DiffusionPipeline.from_pretrained(folder, variant="fp16"), load_text_pipeline(str(folder))
    for part in [part for part in ("unet", "vae", "text_encoder", "text_encoder_2") if part in ours.components]:
        expected, found = getattr(theirs, part).state_dict(), getattr(ours, part).state_dict()
        assert expected.keys() == found.keys() and all(torch.equal(expected[key].float(), found[key].float()) for key in expected)
        assert getattr(ours, part).dtype == torch.float32


STABLE_DIFFUSION_XL = [  # files of its repository
    ".gitattributes",
    "README.md",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "sd_xl_base_1.0.safetensors",
    "sd_xl_base_1.0_0.9vae.safetensors",
    "text_encoder/config.json",
    "text_encoder/flax_model.msgpack",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/model.onnx",
    "text_encoder/model.safetensors",
    "text_encoder_2/config.json",
    "text_encoder_2/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "tokenizer_2/merges.txt",
    "tokenizer_2/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.ema_0_9.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.fp16.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "vae_1_0/diffusion_pytorch_model.safetensors",
    "vae_decoder/model.onnx",
    "safety_checker/model.safetensors",
]
WEIGHTS = ["text_encoder/model", "text_encoder_2/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"]


@pytest.mark.parametrize("variant", [None, "ema_0_9"])
def test_of_a_repository_only_what_is_loaded_is_downloaded(variant, tmp_path, monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    patterns = []
    monkeypatch.setattr(client, "pinned", lambda name: name)
    monkeypatch.setattr(client, "download_files", lambda _, wanted: patterns.extend(wanted) or tmp_path)
    monkeypatch.setattr(client, "api", lambda: SimpleNamespace(list_repo_files=lambda *_, **__: []))
    client.download_model("user/model", variant)
    found = set(filter_repo_objects(STABLE_DIFFUSION_XL, allow_patterns=patterns))
    unet = f"unet/diffusion_pytorch_model.{variant}" if variant else "unet/diffusion_pytorch_model"
    assert {name for name in found if name.endswith(".safetensors")} == {
        f"{unet if stem.startswith('unet') else stem}.safetensors" for stem in WEIGHTS
    }
    others = {name for name in STABLE_DIFFUSION_XL if name.endswith((".json", "merges.txt"))}
    assert {name for name in found if not name.endswith(".safetensors")} == others


UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("repository", "asked"),
    [
        ([UNET, "vae/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16.safetensors"], ["text_encoder", "vae"]),
        ([f"{UNET}.index.json", UNET.replace(".", "-00001-of-00001."), "vae/diffusion_pytorch_model.safetensors"], []),
        (["diffusion_pytorch_model.fp16.safetensors"], ["."]),  # a VAE of its own
    ],
)
def test_weights_in_fp16_are_downloaded_of_parts_that_have_no_others(repository, asked, tmp_path, monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    parts = {str(Path(name).parent) for name in repository}
    files = [*repository, "safety_checker/model.fp16.safetensors"]
    files += [str(Path(part, "config.json")) for part in (*parts, "safety_checker")]
    requests = []

    def download(_, patterns):
        requests.append(found := list(filter_repo_objects(files, allow_patterns=patterns)))
        for name in found:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        return tmp_path

    monkeypatch.setattr(client, "pinned", lambda name: name)
    monkeypatch.setattr(client, "download_files", download)
    client.download_model("user/model")
    assert sorted({str(Path(name).parent) for names in requests[1:] for name in names}) == asked
    assert all(part_files.has_weights(tmp_path / part) or part_files.variant_of(tmp_path / part) for part in parts)


# ---- images ----------------------------------------------------------------------------------------------------------


def generators(count):
    return [torch.Generator().manual_seed(k) for k in range(count)]


@pytest.mark.parametrize(
    ("name", "solver", "options"),
    [
        ("xl", "unipc", {}),
        ("sd", "euler_ancestral", {"negative_prompt": "zero"}),
        ("v", "dpmsolver++", {}),
        ("xl", "heun", {"guidance_scale": 1.0}),
    ],
)
def test_the_stock_pipeline_draws_the_same_images(text_models, name, solver, options):
    theirs, ours = stock(text_models[name]), load_text_pipeline(str(text_models[name]))
    for pipeline in (theirs, ours):
        pipeline.scheduler = make_scheduler(solver, pipeline.scheduler, "linspace", 4, clipping="off")
    prompts = ["a handwritten seven", "the digit nine"]
    expected = theirs(
        prompts,
        num_inference_steps=4,
        generator=generators(2),
        output_type="np",
        **{**options, "negative_prompt": [options["negative_prompt"]] * 2 if "negative_prompt" in options else None},
    ).images
    negative = options.pop("negative_prompt", None)
    null = (
        text_pipeline.encode_prompts(ours, [negative])
        if negative
        else text_pipeline.null_embeddings(ours, text_pipeline.null_is_zeros(ours))
    )
    guidance = {"guidance_scale": 5.0 if name == "xl" else 7.5, **options}
    drawn = text_pipeline.draw(ours, text_pipeline.encode_prompts(ours, prompts), null, generators(2), num_inference_steps=4, **guidance)
    away = (drawn.permute(0, 2, 3, 1).int() - torch.from_numpy((expected * 255).round()).int()).abs()
    assert away.max() <= 1 and away.float().mean() < 0.01  # on AVX-512 a value between two grey levels may be rounded to the other
    assert len({image.numpy().tobytes() for image in drawn}) == 2


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmsolver++", "unipc", "heun", "euler"])
@pytest.mark.parametrize("name", ["xl", "sd", "v"])
def test_solvers_keep_betas_and_prediction_type_of_the_model(text_models, name, solver):
    own = stock_scheduler(text_models[name])
    made = make_scheduler(solver, own, "linspace", 5, clipping="off")
    torch.testing.assert_close(made.alphas_cumprod, own.alphas_cumprod, rtol=1e-5, atol=1e-7)
    assert made.config.prediction_type == ("v_prediction" if name == "v" else "epsilon")
    assert made.alphas_cumprod[-1] < (1e-7 if name == "v" else 0.005)
    assert not made.config.get("clip_sample") and not made.config.get("thresholding")


def stock_scheduler(folder):
    import diffusers

    kind = json.loads((folder / "model_index.json").read_text())["scheduler"][1]
    return getattr(diffusers, kind).from_pretrained(folder / "scheduler")


@pytest.mark.parametrize("name", ["xl", "sd"])
def test_the_unet_computes_in_bfloat16_and_the_solver_in_float32(text_models, name):
    exact, rounded = (load_text_pipeline(str(text_models[name])) for _ in range(2))
    text_pipeline.cast_unet_inputs(rounded)
    rounded.unet.bfloat16()
    seen = []
    rounded.unet.conv_in.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    x_t = []
    options = {"num_inference_steps": 3, "callback_on_step_end": lambda _, __, ___, tensors: x_t.append(tensors["latents"]) or {}}
    for pipeline in (exact, rounded):
        pipeline.scheduler = make_scheduler("ddim", pipeline.scheduler, "linspace", 3, clipping="off")
        encoded = text_pipeline.encode_prompts(pipeline, ["a seven"])
        text_pipeline.draw(pipeline, encoded, text_pipeline.null_embeddings(pipeline, True), generators(1), **options)
    assert set(seen) == {torch.bfloat16} and {latents.dtype for latents in x_t} == {torch.float32}
    assert 0 < (x_t[2] - x_t[5]).norm() / x_t[2].norm() < 0.05


def test_images_that_are_not_finite_are_an_error(text_models):
    pipeline = load_text_pipeline(str(text_models["sd"]))
    torch.nn.init.constant_(pipeline.unet.conv_out.bias, torch.nan)
    with pytest.raises(NotFiniteError, match="not finite"):
        encoded = text_pipeline.encode_prompts(pipeline, ["a"])
        text_pipeline.draw(pipeline, encoded, encoded, generators(1), num_inference_steps=2)


@pytest.mark.parametrize("mean, std", [(None, None), ([0.5, -1.0, 2.0], [2.0, 0.5, 3.0]), ([0.5, -1.0, 2.0], None)])
def test_latents_are_decoded_with_the_scale_with_which_they_were_encoded(mean, std):
    """That of stock pipelines, which take mean and standard deviation where there are both."""
    images = torch.randn(2, 3, 4, 4)
    vae = SimpleNamespace(
        config=SimpleNamespace(scaling_factor=0.25, latents_mean=mean, latents_std=std),
        encode=lambda pixels: SimpleNamespace(latent_dist=SimpleNamespace(mean=pixels)),
        decode=lambda latents, return_dict: (latents,),
    )
    latents = text_pipeline.encode(vae, images)
    torch.testing.assert_close(text_pipeline.decode(vae, latents), images)
    shift, width = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std)) if std else (0, 1)
    torch.testing.assert_close(latents, (images - shift) / width * 0.25)


def test_half_precision_does_not_round_the_scale_of_latents():
    vae = SimpleNamespace(
        config=SimpleNamespace(scaling_factor=0.13025, latents_mean=None, latents_std=None),
        encode=lambda pixels: SimpleNamespace(latent_dist=SimpleNamespace(mean=pixels)),
        decode=lambda latents, return_dict: (latents,),
    )
    values = torch.randn(2, 3, 4, 4, dtype=torch.bfloat16)
    assert torch.equal(text_pipeline.encode(vae, values), values * 0.13025)  # as stock pipelines
    assert torch.equal(text_pipeline.decode(vae, values), values / 0.13025)
