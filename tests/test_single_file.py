"""Single-file checkpoints: read by stock diffusers as the folder they were made of, turned back into it, and refused in a sentence."""

import json
import os
import shutil

import pytest
import sdxl
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from text_models import make_base

pytest.importorskip("transformers")

from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint, convert_open_clip_checkpoint

from debias_diffusers import cli
from debias_diffusers.convert import single_file
from debias_diffusers.convert.single_file_names import unet_name, vae_name
from debias_diffusers.errors import InputError
from debias_diffusers.utils.files import temporary_path


def with_attention(folder):
    """The VAE of a folder with random weights and the attention of Stable Diffusion's own, which the packaged one does without."""
    config = json.loads((folder / "vae" / "config.json").read_text())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderKL.from_config({**config, "mid_block_add_attention": True}).save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pipeline folders of the three layouts."""
    root = tmp_path_factory.mktemp("folders")
    found = {"xl": with_attention(make_base(root / "xl")), "v1": make_base(root / "v1", xl=False)}
    found["xl v"] = make_base(root / "xl-v", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    found["v2"] = make_base(root / "v2", xl=False, prediction_type="v_prediction")
    file = found["v2"] / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_act": "gelu"}))
    return found


def tensors(folder):
    """The tensors of all parts, by part and by the names of older versions of transformers."""
    found = {}
    for path in folder.rglob("*.safetensors"):
        part = path.parent.name
        found[part] = {single_file._with_prefix(name, part): value for name, value in load_file(path).items()}
    return found


@pytest.mark.parametrize("name", ["xl", "xl v", "v1", "v2"])
def test_stock_diffusers_reads_what_is_packed_and_it_is_unpacked_again(folders, name, tmp_path):
    folder, file = folders[name], tmp_path / "model.safetensors"
    assert cli.convert(["single", str(folder), str(file)]) == 0
    kind = StableDiffusionXLPipeline if name.startswith("xl") else StableDiffusionPipeline
    without = {} if name.startswith("xl") else {"safety_checker": None}
    stock = kind.from_single_file(file, config=str(folder), local_files_only=True, torch_dtype=torch.float32, **without)
    before = tensors(folder)
    for part, its in before.items():
        found = getattr(stock, part).state_dict()
        if part == "text_encoder_2":  # which it takes for the first one where both have the same width, as here only
            found = convert_open_clip_checkpoint(stock.text_encoder_2, load_file(file), "conditioner.embedders.1.model.")
        weights = {single_file._with_prefix(key, part): value for key, value in found.items()}
        assert weights.keys() == its.keys()
        assert all(torch.equal(weights[key], its[key]) for key in its), part
    assert cli.convert(["single", str(file), str(tmp_path / "back"), "--config", str(folder)]) == 0
    after = tensors(tmp_path / "back")
    assert all(after[part].keys() == its.keys() and all(torch.equal(after[part][k], its[k]) for k in its) for part, its in before.items())
    ours, theirs = (json.loads((each / "scheduler" / "scheduler_config.json").read_text()) for each in (tmp_path / "back", folder))
    assert ours["prediction_type"] == theirs["prediction_type"]
    assert kind.from_pretrained(tmp_path / "back").unet.config.cross_attention_dim == stock.unet.config.cross_attention_dim


def test_a_packed_file_is_for_all_whom_its_folder_is_for_and_what_a_kill_left_is_removed(folders, tmp_path):
    left = temporary_path(tmp_path / "model.safetensors")
    left.write_text("half")
    os.utime(left, (0, 0))
    (tmp_path / "usual").touch()
    single_file.pack(str(folders["v1"]), str(tmp_path / "model.safetensors"))
    assert {path.name for path in tmp_path.iterdir()} == {"usual", "model.safetensors"}
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_a_file_says_what_it_predicts(folders, tmp_path):
    """Others know v by empty tensors or metadata; read as epsilon it would draw noise."""
    file, v_file = tmp_path / "epsilon.safetensors", tmp_path / "v.safetensors"
    single_file.pack(str(folders["xl"]), str(file), "float16")
    single_file.pack(str(folders["xl v"]), str(v_file))
    with safe_open(v_file, "pt") as opened:
        assert {"v_pred", "ztsnr"} <= set(opened.keys()) and opened.metadata()["modelspec.prediction_type"] == "v"
    weights = load_file(file)
    assert {value.dtype for value in weights.values()} == {torch.float16} and "v_pred" not in weights
    for marks, metadata, expected in (
        ({}, {}, ("epsilon", None)),
        ({"v_pred": torch.zeros(0)}, {}, ("v_prediction", None)),
        ({"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, {}, ("v_prediction", True)),
        ({}, {"modelspec.prediction_type": "v"}, ("v_prediction", None)),
    ):
        save_file(weights | marks, file, metadata)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        single_file.unpack(str(file), str(tmp_path / "out"), str(folders["xl"]))
        values = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
        assert (values["prediction_type"], values.get("rescale_betas_zero_snr") or None) == expected
    assert load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"].dtype == torch.float16


@pytest.mark.parametrize(
    "scheduler, said",
    [
        ({}, None),
        ({"beta_schedule": "linear", "beta_start": 0.0001}, "says beta_schedule linear, beta_start 0.0001: set"),
        ({"rescale_betas_zero_snr": True}, "says rescale_betas_zero_snr True: set"),
    ],
)
def test_a_noise_schedule_that_no_file_says_is_warned_of(scheduler, said, folders, tmp_path, capsys):
    folder = shutil.copytree(folders["v1"], tmp_path / "folder")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | scheduler))
    single_file.pack(str(folder), str(tmp_path / "model.safetensors"))
    found = capsys.readouterr().err
    assert said in found if said else "warning" not in found


def test_zero_terminal_snr_of_a_file_needs_a_scheduler_that_knows_it(folders, tmp_path):
    file, config = tmp_path / "v.safetensors", shutil.copytree(folders["xl v"], tmp_path / "config")
    single_file.pack(str(folders["xl v"]), str(file))
    for path, change in (
        (config / "model_index.json", {"scheduler": ["diffusers", "DEISMultistepScheduler"]}),
        (config / "scheduler" / "scheduler_config.json", {"_class_name": "DEISMultistepScheduler"}),
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    single_file.unpack(str(file), str(tmp_path / "out"), str(config))
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    values = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"] and values["_class_name"] == "DDIMScheduler"
    assert values["rescale_betas_zero_snr"] and values["timestep_spacing"] == "trailing" and not values["clip_sample"]


def test_a_folder_of_a_file_is_trained(folders, tmp_path, capsys):
    file = tmp_path / "model.safetensors"
    single_file.pack(str(folders["v1"]), str(file))
    (tmp_path / "base").mkdir(mode=0o700)
    single_file.unpack(str(file), str(tmp_path / "base"), str(folders["v1"]))
    assert (tmp_path / "base").stat().st_mode & 0o777 == 0o700  # a folder that was there keeps its mode
    flags = [
        "--dataset",
        "digits",
        "--resolution",
        "8",
        "--max_steps",
        "1",
        "--batch_size",
        "2",
        "--sample_every",
        "0",
        "--num_threads",
        "1",
    ]
    assert cli.train(["--base_model", str(tmp_path / "base"), "--output_dir", str(tmp_path / "run"), *flags]) == 0
    assert cli.train(["--base_model", str(file), "--output_dir", str(tmp_path / "other"), *flags]) == 2
    assert f"python -m debias_diffusers.convert single {file} model" in capsys.readouterr().err


def test_what_cannot_be_converted_is_one_sentence(folders, tmp_path):
    file, config = tmp_path / "model.safetensors", str(folders["xl"])
    single_file.pack(config, str(file))
    good = load_file(file)

    def refused(match, config=config, out="out", **changes):
        changed = {name: value for name, value in (good | changes).items() if value is not None}
        save_file(changed, tmp_path / "changed.safetensors")
        with pytest.raises(InputError, match=match):
            single_file.unpack(str(tmp_path / "changed.safetensors"), str(tmp_path / out), config)
        assert not list(tmp_path.glob("out*"))

    conv_in, missing = "model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.mid.attn_1.q.weight"
    refused("as models of inpainting have others", **{conv_in: torch.zeros(8, 9, 3, 3)})
    refused(f"lacks {missing}", **{missing: None})
    refused("not finite", **{conv_in: torch.full((8, 4, 3, 3), torch.nan)})
    refused("is no single file", **{name: None for name in good if name.startswith("conditioner.embedders.1")})
    refused(r"has 2 text encoder\(s\), but config .* has 1", config=str(folders["v1"]))
    refused("is no pipeline of Stable Diffusion", config=str(tmp_path))
    single_file.pack(str(folders["v2"]), str(tmp_path / "v2.safetensors"))
    with pytest.raises(InputError, match="does not say whether it predicts epsilon or v"):
        single_file.unpack(str(tmp_path / "v2.safetensors"), str(tmp_path / "out"))
    (tmp_path / "broken.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(InputError, match="cannot be read"):
        single_file.unpack(str(tmp_path / "broken.safetensors"), str(tmp_path / "out"), config)
    with pytest.raises(InputError, match="already exists"):
        single_file.pack(config, str(file))
    with pytest.raises(InputError, match="is no pipeline of Stable Diffusion"):
        single_file.pack(str(pixel_model(tmp_path)), str(tmp_path / "none.safetensors"))
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "pytorch_lora_weights.safetensors").touch()
    with pytest.raises(InputError, match=r"is a LoRA, not a whole model; .*convert lora"):
        single_file.pack(str(tmp_path / "lora"), str(tmp_path / "none.safetensors"))


def pixel_model(folder):
    (folder / "pixels").mkdir()
    (folder / "pixels" / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    return folder / "pixels"


def test_wrong_commands_are_refused_without_torch(capsys):
    for words, said in (
        (["a", "b"], "none is"),
        (["a.safetensors", "b.safetensors"], "both are"),
        (["a", "b.safetensors", "--config", "c"], "leave config out"),
        (["a.safetensors", "b", "--dtype", "float16"], "leave dtype out"),
        (["a.ckpt", "b"], "none is"),
    ):
        assert cli.convert(["single", *words]) == 2
        assert said in capsys.readouterr().err


def test_every_tensor_of_stable_diffusion_xl_has_the_name_by_which_diffusers_finds_it():
    """On the meta device: 1680 tensors of the UNet, 248 of the VAE."""
    for name, kind, namer, convert, count in (
        ("unet", UNet2DConditionModel, unet_name, convert_ldm_unet_checkpoint, 1680),
        ("vae", AutoencoderKL, vae_name, convert_ldm_vae_checkpoint, 248),
    ):
        with torch.device("meta"):
            expected = {key: value.shape for key, value in kind.from_config(sdxl.PARTS[name]).state_dict().items()}
        stored = {key: namer(key, sdxl.PARTS[name]) for key in expected}
        file = {
            place.name: torch.empty((*expected[key], 1, 1) if place.is_conv else expected[key], device="meta")
            for key, place in stored.items()
        }
        assert len(file) == len(expected) == count
        found = convert(dict(file), sdxl.PARTS[name])
        assert {key: value.shape for key, value in found.items()} == expected
