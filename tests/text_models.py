"""Tiny text-to-image models of stock classes, with the tokenizers, text encoders and VAE of the packaged base and random UNets."""

import json
import shutil
from pathlib import Path

import torch

import debias_diffusers

BASE = Path(debias_diffusers.__file__).parent / "data" / "text_base"
LONG = "a handwritten seven of the digit nine, the number of a handwritten four, the digit two of a number"  # more than 14 tokens


def unet_config(**changes):
    config = json.loads((BASE / "unet" / "config.json").read_text())
    return {name: value for name, value in config.items() if not name.startswith("_")} | changes


def random_unet(seed=0, **changes):
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DConditionModel(**unet_config(**changes))


def parts(*names):
    """Parts of the packaged base by name."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    classes = {
        "tokenizer": CLIPTokenizer,
        "tokenizer_2": CLIPTokenizer,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
        "vae": AutoencoderKL,
        "scheduler": EulerDiscreteScheduler,
    }
    return {name: classes[name].from_pretrained(BASE, subfolder=name) for name in names}


def save_xl(folder, **unet_changes):
    """A Stable Diffusion XL whose frozen parts are the packaged files."""
    shutil.copytree(BASE, folder)
    random_unet(**unet_changes).save_pretrained(folder / "unet")
    return folder


def save_sd(folder, prediction_type="epsilon", rescale_betas_zero_snr=False):
    """A Stable Diffusion 1.x, with the scheduler that its repository has (PNDM), or DDIM with zero terminal SNR."""
    from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    common = {"set_alpha_to_one": False, "steps_offset": 1, "prediction_type": prediction_type, **betas}
    scheduler = (
        DDIMScheduler(clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing", **common)
        if rescale_betas_zero_snr
        else PNDMScheduler(skip_prk_steps=True, **common)
    )
    unet = random_unet(
        seed=1, addition_embed_type=None, addition_time_embed_dim=None, projection_class_embeddings_input_dim=None, cross_attention_dim=32
    )
    StableDiffusionPipeline(
        **parts("tokenizer", "text_encoder", "vae"),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def in_fp16_alone(model, folder):
    """A copy of a model as its authors save it with `variant="fp16"`: no part has other weights."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    for path in folder.glob("*/*model.safetensors"):
        halves = {name: value.half() if value.is_floating_point() else value for name, value in load_file(path).items()}
        save_file(halves, path.with_suffix(".fp16.safetensors"), {"format": "pt"})
        path.unlink()
    return folder


# ---- trainings -------------------------------------------------------------------------------------------------------


def make_base(folder, xl=True, seed=0, layers_per_block=1, **scheduler):
    """A base model whose smaller UNet has random weights; `scheduler` changes the configuration of its scheduler.

    Another seed than 0 is also another VAE.
    """
    from safetensors.torch import load_file, save_file

    small = {"block_out_channels": [8, 16], "norm_num_groups": 4, "attention_head_dim": [1, 2], "layers_per_block": layers_per_block}
    if xl:
        save_xl(folder, seed=seed, **small)
    else:
        shutil.copytree(BASE, folder)
        index = json.loads((folder / "model_index.json").read_text())
        for name in ("text_encoder_2", "tokenizer_2"):
            shutil.rmtree(folder / name)
            del index[name]
        del index["force_zeros_for_empty_prompt"]
        (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionPipeline"}))
        without = dict.fromkeys(("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim"))
        random_unet(cross_attention_dim=32, **without, **small).save_pretrained(folder / "unet")
    if seed:
        weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
        save_file({name: 1.1 * tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | scheduler))
    return folder


def text_args(base, output_dir, *flags):
    """A training of 12 steps of 8 captioned digits."""
    usual = {
        "base_model": base, "dataset": "digits", "resolution": 8, "output_dir": output_dir, "num_workers": 0, "batch_size": 8,
        "max_steps": 12, "learning_rate": 1e-3, "ema_decay": 0.9, "num_threads": 1,
        "checkpoint_every": 4, "sample_every": 0, "log_every": 1,
    }  # fmt: skip
    named = {flag.removeprefix("--") for flag in map(str, flags) if flag.startswith("--")}
    return ["train.py", *(word for name, value in usual.items() if name not in named for word in (f"--{name}", value)), *flags]
