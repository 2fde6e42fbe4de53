"""Writes debias_diffusers/data/text_base: a tiny Stable Diffusion XL of diffusers' and transformers' own classes, for the captioned digits.

    pip install transformers && python tools/make_text_base.py       # about five minutes on a CPU core

A pipeline folder of at most 1.5 MB whose UNet is untrained: `train.py --config digits_text` trains it. The VAE (8x8x3 to 4x4x4) is trained
here on the digits; the two text encoders keep random weights, which are drawn larger than transformers does so that captions differ; the
tokenizer knows the bytes and the words of the captions. Files are in the layout of transformers 4, which version 5 reads, too.
"""

import json
import shutil
from pathlib import Path

import safetensors.torch
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from debias_diffusers.config.schema.data import DataConfig
from debias_diffusers.data.dataset import TrainingData
from debias_diffusers.data.sources.opening import open_source
from debias_diffusers.evaluation.feature_extractors import FeatureExtractorDigits

OUT = Path(__file__).parent.parent / "debias_diffusers" / "data" / "text_base"
WORDS = (
    "a", "handwritten", "digit", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "the", "number", "of",
)  # fmt: skip
LENGTH = 16  # tokens of a caption
HIDDEN, LAYERS, PROJECTION = 32, 2, 32  # of both text encoders
VAE_STEPS = 2500


# ---- tokenizer -------------------------------------------------------------------------------------------------------


def byte_symbols() -> list[str]:
    """The 256 symbols in which CLIP's vocabulary writes bytes: printable ones as they are, the others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + place) for place in range(len(others))]


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token numbers, and merges that join each word of the captions from the left."""
    symbols, merges = byte_symbols(), []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        left = parts[0]
        for right in parts[1:]:
            if (left, right) not in merges:
                merges.append((left, right))
            left += right
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}, merges


def write_tokenizer(folder: Path, pad: str) -> int:
    """Writes the files of a CLIPTokenizer; returns the size of its vocabulary."""
    vocab, merges = vocabulary()
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": pad}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    config = {**special, "model_max_length": LENGTH, "tokenizer_class": "CLIPTokenizer", "add_prefix_space": False, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return len(vocab)


# ---- text encoders ---------------------------------------------------------------------------------------------------


def write_encoder(folder: Path, kind: type[CLIPTextModel] | type[CLIPTextModelWithProjection], size: int) -> None:
    """Writes a text encoder with random weights, under the names of transformers 4."""
    config = CLIPTextConfig(
        vocab_size=size, hidden_size=HIDDEN, intermediate_size=4 * HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=2,
        max_position_embeddings=LENGTH, projection_dim=PROJECTION, bos_token_id=size - 2, eos_token_id=size - 1, hidden_act="gelu",
        initializer_factor=2.0,
    )  # fmt: skip
    weights = {}
    for name, tensor in kind(config).state_dict().items():
        own = name.startswith(("text_model.", "text_projection."))
        weights[name if own else f"text_model.{name}"] = tensor.contiguous()
    folder.mkdir(parents=True)
    values = {**config.to_diff_dict(), "architectures": [kind.__name__]}
    values.pop("transformers_version", None)
    (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})


# ---- VAE -------------------------------------------------------------------------------------------------------------


def digits() -> tuple[Tensor, Tensor]:
    """(N, 3, 8, 8) in [-1, 1], and the digit (N,) that each shows."""
    config = DataConfig(dataset="digits", resolution=8, class_conditional=True)
    source = open_source(config)
    data = TrainingData(source, config, 0)
    pixels, labels = zip(*(data.decoded(index) for index in range(len(source))))
    return (torch.stack(pixels).float() / 127.5 - 1).expand(-1, 3, -1, -1), torch.tensor(labels)


def recognised(images: Tensor, labels: Tensor) -> float:
    """The share of images (N, 3, 8, 8) in [-1, 1] in which the packaged classifier sees the digit."""
    extractor = FeatureExtractorDigits("digits", ["logits"])
    with torch.no_grad():
        logits = extractor(((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))[0]
    return (logits.argmax(1) == labels).float().mean().item()


def train_vae() -> AutoencoderKL:
    """Trains the VAE; its scaling factor makes the latents of unit variance."""
    images, labels = digits()
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, block_out_channels=[16, 32],
        layers_per_block=1, latent_channels=4, norm_num_groups=8, sample_size=8, mid_block_add_attention=False, force_upcast=False,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(vae.parameters(), 3e-3, weight_decay=0)
    for step in range(VAE_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 100) * (1 - step / VAE_STEPS)
        batch = images[torch.randint(len(images), (64,))]
        posterior = vae.encode(batch).latent_dist
        loss = (vae.decode(posterior.sample()).sample - batch).square().mean() + 1e-4 * posterior.kl().mean() / 64
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1)
        optimizer.step()
    vae.eval()
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        latents = posterior.sample()
        decoded = vae.decode(latents).sample
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    print(f"VAE: mean square error {(decoded - images).square().mean():.4f}, digits recognised {recognised(decoded, labels):.3f}")
    return vae


# ---- pipeline --------------------------------------------------------------------------------------------------------


def untrained_unet() -> UNet2DConditionModel:
    """The UNet that `digits_text` trains."""
    return UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, block_out_channels=[32, 64], layers_per_block=1,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"], up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
        mid_block_type="UNetMidBlock2DCrossAttn", transformer_layers_per_block=[1, 1], cross_attention_dim=2 * HIDDEN,
        attention_head_dim=[2, 2], use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=PROJECTION + 6 * 8, norm_num_groups=16,
    )  # fmt: skip


def main() -> None:
    """Writes the folder anew."""
    torch.manual_seed(0)
    shutil.rmtree(OUT, ignore_errors=True)
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        size = write_tokenizer(OUT / name, pad)
    write_encoder(OUT / "text_encoder", CLIPTextModel, size)
    write_encoder(OUT / "text_encoder_2", CLIPTextModelWithProjection, size)
    train_vae().save_pretrained(OUT / "vae")
    # The network's weights are drawn when a training begins, so its configuration alone is packaged.
    untrained_unet().save_config(OUT / "unet")
    EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading",
        interpolation_type="linear",
    ).save_config(OUT / "scheduler")  # fmt: skip
    parts = {
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True, **parts}
    (OUT / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    print(f"{sum(path.stat().st_size for path in OUT.rglob('*') if path.is_file()) / 1e6:.2f} MB in {OUT}")


if __name__ == "__main__":
    main()
