"""Text-to-image models, which are stock pipelines of Stable Diffusion and Stable Diffusion XL: loading, text embeddings, images."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import logging
from torch import Tensor, nn

from ..errors import NotFiniteError
from ..hub import client
from ..runs.model_folder import TEXT_PIPELINES, model_index, require_text_model
from .loading import class_of_part, explained_errors, folder_of_model, load_part, require_variant

ENCODED_AT_ONCE = 64  # prompts


# ---- loading ---------------------------------------------------------------------------------------------------------


def load_text_pipeline(model: str, variant: str | None = None) -> Any:
    """Loads a StableDiffusionPipeline or StableDiffusionXLPipeline in float32, without safety checker, image encoder and watermark.

    Args:
        model: a run directory, a pipeline folder or a Hub id (user/name, user/name@revision).
        variant: of the UNet's weights, such as ema_0_999; None for the default weights.

    Raises:
        InputError: there is no such model, it lacks a part or a tensor, or a file is damaged; names it.
        HubError: the Hub cannot be reached or rejects the request.
    """
    folder = folder_of_model(model, variant)
    require_text_model(folder, model)
    _require_safetensors(folder, model)
    require_variant(folder, model, variant)
    name = model_index(folder)["_class_name"]
    xl = name == "StableDiffusionXLPipeline"
    left_out = {"add_watermarker": False} if xl else {"safety_checker": None, "requires_safety_checker": False}
    with explained_errors(f"model {model}"), quiet():
        parts = {
            part: load_part(class_of_part(folder, part), folder / part, model, variant if part == "unet" else None)
            for part in TEXT_PIPELINES[name]
            if not part.startswith("tokenizer")
        }
        pipeline = getattr(diffusers, name).from_pretrained(
            folder, local_files_only=True, feature_extractor=None, image_encoder=None, **parts, **left_out
        )
    for each in parts.values():
        each.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and notes of loading; errors are raised anyhow."""
    from transformers.utils import logging as of_transformers

    before = logging.get_verbosity(), of_transformers.get_verbosity()
    for each in (logging, of_transformers):
        each.disable_progress_bar()
        each.set_verbosity(each.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before[0])
        of_transformers.set_verbosity(before[1])


def _require_safetensors(folder: Path, model: str) -> None:
    """Raises InputError for a part with weights in another format only, which can contain code."""
    for part, stem in (("unet", client.WEIGHTS), ("vae", client.WEIGHTS), ("text_encoder", "*model"), ("text_encoder_2", "*model")):
        others = sorted((folder / part).glob(f"{stem}*.bin"))
        if others and not any((folder / part).glob("*.safetensors")):
            raise client.text_bin_refused(model, str(others[0].relative_to(folder)))


def zero_snr_scheduler(values: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a scheduler with zero terminal SNR, whose steps begin at the last timestep (arXiv 2305.08891).

    Of a class that knows no zero terminal SNR, such as PNDM, and would step along other betas without a word, it becomes that of DDIM.
    """
    found = {**values, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    kind = getattr(diffusers, str(values.get("_class_name")), None)
    if kind and "rescale_betas_zero_snr" not in inspect.signature(kind.__init__).parameters:
        found |= {"_class_name": "DDIMScheduler", "clip_sample": False}
    return found


# ---- images ----------------------------------------------------------------------------------------------------------


def draw(pipeline: Any, prompts: Embeddings, null: Embeddings, generators: Sequence[torch.Generator], **options: Any) -> Tensor:
    """Draws a batch of images, (B, 3, H, W) uint8, through the stock pipeline's own call.

    Args:
        pipeline: of `load_text_pipeline`, with its solver.
        prompts: of B prompts.
        null: of what guidance leads away from (B is 1): `null_embeddings`, or a negative prompt.
        generators: B of the CPU, one for each image, so that an image does not depend on its batch.
        options: of the call, such as num_inference_steps, guidance_scale, height and width.

    Raises:
        NotFiniteError: the network, the solver or the VAE returned NaN or infinity.
    """
    count = len(prompts.text)
    given = {"prompt_embeds": prompts.text, "negative_prompt_embeds": null.text.expand(count, -1, -1)}
    if prompts.pooled is not None and null.pooled is not None:
        given |= {"pooled_prompt_embeds": prompts.pooled, "negative_pooled_prompt_embeds": null.pooled.expand(count, -1)}
    images: Tensor = pipeline(**given, generator=list(generators), output_type="pt", **options).images
    if not images.isfinite().all():
        raise NotFiniteError(f"{type(pipeline.scheduler).__name__} or the VAE drew images that are not finite")
    return (images * 255).round().to(torch.uint8)


def cast_unet_inputs(pipeline: Any) -> None:
    """Lets the UNet have weights in half precision: x_t and the solver stay float32, and so do SDXL's sizes, which bf16 rounds."""

    def cast(unet: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x_t, *rest = given
        dtype = next(unet.parameters()).dtype
        return (x_t.to(dtype), *rest), named | {"encoder_hidden_states": named["encoder_hidden_states"].to(dtype)}

    def cast_back(_: nn.Module, __: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (output[0].float(), *output[1:])

    pipeline.unet.register_forward_pre_hook(cast, with_kwargs=True)
    pipeline.unet.register_forward_hook(cast_back)


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) to images (B, 3, H, W) in about [-1, 1], as at the end of the stock pipelines' call."""
    shift, scale = (factor.to(latents.device) for factor in latent_scale(vae.config))
    images: Tensor = vae.decode((latents / scale + shift).to(latents.dtype), return_dict=False)[0]
    return images


@torch.no_grad()
def encode(vae: Any, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] to latents (B, C, h, w): the mean of the VAE's posterior, scaled as the UNet knows latents."""
    shift, scale = (factor.to(images.device) for factor in latent_scale(vae.config))
    mean: Tensor = vae.encode(images).latent_dist.mean
    return ((mean - shift) * scale).to(mean.dtype)


def latent_scale(config: Any) -> tuple[Tensor, Tensor]:
    """What is subtracted from a VAE's latents, and by what they are then multiplied: (1,), or (1, C, 1, 1).

    In float32, because bfloat16 rounds 0.13025 by 0.3%. Stock pipelines take mean and standard deviation where the configuration has both.
    """
    if config.latents_mean is None or config.latents_std is None:
        return torch.zeros(1), torch.tensor([config.scaling_factor])
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std))
    return mean, config.scaling_factor / std


# ---- text embeddings -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Embeddings:
    """Text embeddings of a batch of B prompts, float32 on the CPU."""

    text: Tensor  # (B, tokens, width): of all text encoders, side by side
    pooled: Tensor | None = None  # (B, width): of SDXL's second text encoder


def joined(parts: Sequence[Embeddings]) -> Embeddings:
    """The embeddings of several batches as one."""
    pooled = [part.pooled for part in parts if part.pooled is not None]
    return Embeddings(torch.cat([part.text for part in parts]), torch.cat(pooled) if pooled else None)


@torch.no_grad()
def encode_prompts(pipeline: Any, prompts: Sequence[str], chunks: int = 1) -> Embeddings:
    """Encodes prompts as the stock pipeline's `encode_prompt` does, and longer ones in chunks.

    Args:
        pipeline: StableDiffusionPipeline or StableDiffusionXLPipeline; its UNet and VAE may be None.
        prompts: at least one.
        chunks: K text encoder inputs per prompt, each of (model_max_length - 2) tokens between those that begin and end a text.
            Their embeddings are concatenated along the tokens; the pooled embedding is that of the first. What is longer is cut.
    """
    parts = [_encode(pipeline, prompts[first : first + ENCODED_AT_ONCE], chunks) for first in range(0, len(prompts), ENCODED_AT_ONCE)]
    texts, pooled = zip(*parts)
    return Embeddings(torch.cat(texts).float().cpu(), torch.cat(pooled).float().cpu() if is_xl(pipeline) else None)


def null_embeddings(pipeline: Any, zeros: bool, chunks: int = 1) -> Embeddings:
    """What stands for "no prompt" (B is 1): the encoding of the empty prompt, or `zeros` in its place.

    A stock pipeline without a negative prompt takes what `null_is_zeros` says.
    """
    empty = encode_prompts(pipeline, [""], chunks)
    if not zeros:
        return empty
    return Embeddings(torch.zeros_like(empty.text), None if empty.pooled is None else torch.zeros_like(empty.pooled))


def null_is_zeros(pipeline: Any) -> bool:
    """Whether the stock pipeline takes zeros instead of the encoding of the empty prompt where no negative prompt is given."""
    return is_xl(pipeline) and bool(pipeline.config.force_zeros_for_empty_prompt)


def count_tokens(pipeline: Any, prompts: Sequence[str]) -> list[int]:
    """The number of tokens of each prompt, without those that begin and end a text; of two tokenizers the larger number."""
    counts = [[len(tokens) for tokens in _tokens(tokenizer, prompts)] for tokenizer in _tokenizers(pipeline)]
    return [max(each) for each in zip(*counts)]


def tokens_read(pipeline: Any, chunks: int = 1) -> int:
    """The number of tokens of a prompt that the text encoders read; what is beyond is cut."""
    return int(min(chunks * (tokenizer.model_max_length - 2) for tokenizer in _tokenizers(pipeline)))


def is_xl(pipeline: Any) -> bool:
    """Whether it is a Stable Diffusion XL: with a second text encoder, pooled embeddings and size conditioning."""
    return "text_encoder_2" in pipeline.config


def _tokenizers(pipeline: Any) -> list[Any]:
    """The tokenizers, whether or not their text encoders are loaded."""
    found = [pipeline.tokenizer, pipeline.tokenizer_2] if is_xl(pipeline) else [pipeline.tokenizer]
    return [tokenizer for tokenizer in found if tokenizer is not None]


def _encoders(pipeline: Any) -> list[tuple[Any, Any]]:
    """The tokenizers with their text encoders."""
    pairs = [(pipeline.tokenizer, pipeline.text_encoder)]
    if is_xl(pipeline):
        pairs.append((pipeline.tokenizer_2, pipeline.text_encoder_2))
    return [(tokenizer, encoder) for tokenizer, encoder in pairs if encoder is not None]


def _encode(pipeline: Any, prompts: Sequence[str], chunks: int) -> tuple[Tensor, Tensor]:
    """Text embeddings (B, K tokens, width), and the first output of the last text encoder: SDXL's pooled embeddings."""
    encoders = [encoder for _, encoder in _encoders(pipeline)]
    return joined_outputs(encoded(encoders, token_ids(pipeline, prompts, chunks), is_xl(pipeline)), is_xl(pipeline), chunks)


def token_ids(pipeline: Any, prompts: Sequence[str], chunks: int) -> list[Tensor]:
    """What each text encoder of a pipeline reads of B prompts: ids (B K, model_max_length)."""
    return [_padded_ids(tokenizer, prompts, chunks) for tokenizer, _ in _encoders(pipeline)]


def encoded(encoders: Sequence[Any], ids: Sequence[Tensor], xl: bool) -> list[Any]:
    """The output of each text encoder for its ids."""
    return [encoder(each.to(encoder.device), output_hidden_states=xl) for encoder, each in zip(encoders, ids)]


def joined_outputs(outputs: Sequence[Any], xl: bool, chunks: int) -> tuple[Tensor, Tensor]:
    """The outputs of the text encoders as text embeddings (B, K tokens, width) and SDXL's pooled embeddings (B, width)."""
    texts = [output.hidden_states[-2] if xl else output[0] for output in outputs]
    parts = [text.reshape(len(text) // chunks, -1, text.shape[-1]) for text in texts]
    return torch.cat(parts, dim=-1), outputs[-1][0][::chunks]


def _padded_ids(tokenizer: Any, prompts: Sequence[str], chunks: int) -> Tensor:
    """Token ids (B K, model_max_length) of prompts in K chunks each, with the tokens that begin and end a text, and padding."""
    length = tokenizer.model_max_length
    rows = []
    for tokens in _tokens(tokenizer, prompts):
        for chunk in range(chunks):
            part = tokens[chunk * (length - 2) : (chunk + 1) * (length - 2)]
            padding = [tokenizer.pad_token_id] * (length - 2 - len(part))
            rows.append([tokenizer.bos_token_id, *part, tokenizer.eos_token_id, *padding])
    return torch.tensor(rows)


def _tokens(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """The tokens of each prompt, without those that begin and end a text."""
    found: list[list[int]] = tokenizer(list(prompts), add_special_tokens=False, verbose=False)["input_ids"]
    return found
