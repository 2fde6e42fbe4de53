"""The model of a training: the network of a pixel model, or the base model and adapters of a text-to-image model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection

from ..loading import MODEL_NUMBERS, TEXT_FIELDS, fields_of_other_tasks, flatten
from ..prompts import broken_text
from ..schema.data import DIGITS
from ..schema.network import ModelConfig, channel_mult
from ..schema.training import TrainConfig


def pixel_problems(config: TrainConfig) -> list[str]:
    """The network of a pixel model, and fields of text-to-image models."""
    values, adapters = flatten(config), dataclasses.asdict(config.lora)
    return _model_problems(config) + [
        f"{name} is {values[name]}, but a pixel model has no {'adapters' if name in adapters else 'captions'}; leave it out, or name a "
        f"text-to-image model with --base_model"
        for name in _others(config, TEXT_FIELDS - {"task"})
    ]


def _model_problems(config: TrainConfig) -> list[str]:
    model, resolution = config.model, config.data.resolution
    if model.model_config:
        given = [name for name in MODEL_NUMBERS if getattr(model, name) != getattr(ModelConfig(), name)]
        numbers = ", ".join(f"{name} is {getattr(model, name)}" for name in given)
        return [f"{numbers}, but model_config {model.model_config} already describes the network; give one of the two"] if given else []
    if resolution is None or resolution < 1:
        return []  # said elsewhere; the rules below need it
    fits = "1 2 2" if resolution % 4 == 0 else "1 2" if resolution % 2 == 0 else "1"  # each level but the first halves the resolution
    if not model.channel_mult:
        usual = " ".join(map(str, channel_mult(resolution)))
        advice = f"take {usual}" if usual else f"it cannot be halved; take --resolution {resolution + 1}"
        return [f"channel_mult is missing: for resolution {resolution} {advice}"]
    if min(model.channel_mult) < 1:
        return [f"channel_mult is {list(model.channel_mult)}, but each must be at least 1, such as {fits}"]
    return _level_problems(model, resolution)


def _level_problems(model: ModelConfig, resolution: int) -> list[str]:
    found, levels = [], len(model.channel_mult)
    if resolution % 2 ** (levels - 1):
        fits = 2 ** (levels - 1) * max(1, round(resolution / 2 ** (levels - 1)))
        found.append(f"resolution is {resolution}, but channel_mult has {levels} levels, which halve it {levels - 1} times; take {fits}")
    sides = [resolution // 2**level for level in range(levels)]
    found += [
        f"attention_resolutions names {side}, but the levels of resolution {resolution} with channel_mult "
        f"{list(model.channel_mult)} are {sides}; name some of them"
        for side in model.attention_resolutions
        if side not in sides
    ]
    attending = {model.channel_mult[sides.index(side)] for side in model.attention_resolutions if side in sides}
    attending.add(model.channel_mult[-1])  # the middle block always attends
    if model.attention_head_dim >= 1:
        widths = sorted(mult * model.model_channels for mult in attending if model.model_channels > 0)
        found += [
            f"attention_head_dim is {model.attention_head_dim}, but must divide the {width} channels of a level that attends; "
            f"{math.gcd(model.attention_head_dim, *widths)} does"
            for width in widths
            if width % model.attention_head_dim
        ]
    return found


def text_problems(config: TrainConfig) -> list[str]:
    """A text-to-image training: fields of pixel models, objectives without a meaning here, and what would be ignored."""
    text, values, found = config.text, flatten(config), []
    if not text.base_model:
        found.append("task is text_to_image, but base_model is missing; name a pipeline folder or a Hub id, or digits, the packaged one")
    if config.data.task == "pixels":
        found.append(f"task is pixels, but base_model is {text.base_model}, a text-to-image model; leave one of the two out")
    found += [
        f"{name} is {values[name]}, but is for pixel models, and base_model {text.base_model} is a text-to-image model; leave it out"
        for name in _others(config, fields_of_other_tasks(config) - {"init"})
    ]
    found += _lora_problems(config)
    if (mode := config.optimization.compile_mode) != "default" and config.optimization.gradient_checkpointing:
        found.append(  # a pixel model is compiled as one, and what is recomputed with it; here each block is
            f"compile_mode is {mode}, but with gradient_checkpointing its CUDA graphs would write the blocks that are recomputed over the "
            f"gradients of those before; leave one of the two out"
        )
    if config.objective.weighting == "variational":
        found.append("weighting variational needs a learned variance, which text-to-image models do not have; take --weighting debiased")
    if config.objective.prediction_type in ("flow", "sample"):
        predicted = config.objective.prediction_type
        found.append(f"prediction_type is {predicted}, but pipelines of Stable Diffusion know epsilon and v_prediction; leave it out")
    if (broken := broken_text(text.sample_prompts)) is not None:
        found.append(f"sample_prompts has {broken!r}, which is not Unicode; write it anew")
    if text.keep_tokens and not text.shuffle_caption:
        found.append(f"keep_tokens is {text.keep_tokens}, but shuffle_caption is off; add --shuffle_caption or leave keep_tokens out")
    if text.crop_per_image and text.crop != "random":
        found.append("crop_per_image is on, but crop is center, which is the same for every image; add --crop random or leave it out")
    if text.base_model == DIGITS and not text.caption_dropout and text.sample_guidance_scale > 1:
        found.append(
            f"sample_guidance_scale is {text.sample_guidance_scale:g}, but with caption_dropout 0 the UNet of base_model digits, which has "
            f"no weights, learns no image without a caption; take --sample_guidance_scale 1"
        )
    if text.aspect_ratio_buckets and "batch_size" in config.run.allow_change:
        found.append("allow_change names batch_size, but with aspect_ratio_buckets it decides which images a step has; leave it out")
    if text.precompute_dir == "":
        found.append("precompute_dir is an empty name; name a folder, or leave it out")
    anew = [name for name, on in (("shuffle_caption", text.shuffle_caption), ("lora_text_encoders", config.lora.lora_text_encoders)) if on]
    if text.precompute_dir and anew and text.crop == "random" and not text.crop_per_image:
        found.append(
            f"precompute_dir is {text.precompute_dir}, but with {anew[0]} and crop random neither embeddings nor latents are known "
            f"beforehand; leave one of the three out, or add --crop_per_image"
        )
    return found


def _lora_problems(config: TrainConfig) -> list[str]:
    """Fields of LoRA without a rank, weights to start from without LoRA, and a base model whose UNet is not trained."""
    lora, init = config.lora, config.optimization.init
    if lora.lora_rank is None:
        given = [f"{name} is {flatten(config)[name]}, but lora_rank is left out" for name in _others(config, dataclasses.asdict(lora))]
        found = [f"{problem}; add --lora_rank 16, or leave it out" for problem in given]
        if init:
            found.append(
                f"init is {init}, but the whole UNet of base_model {config.text.base_model} is trained, which has the weights to start "
                f"from; name the model with these weights as --base_model, or a LoRA with --lora_rank"
            )
        return found
    found = []
    if config.text.base_model == DIGITS:
        found.append(f"lora_rank is {lora.lora_rank}, but the UNet of base_model digits has no weights; train it first, and name that run")
    if not all(lora.lora_targets) or not lora.lora_targets:
        found.append("lora_targets is empty, or has an empty name; name modules, such as to_q to_k to_v to_out.0")
    return found


def _others(config: TrainConfig, names: Collection[str]) -> list[str]:
    """Those of the fields that do not have their default."""
    values, defaults = flatten(config), flatten(TrainConfig())
    return [name for name in defaults if name in names and values[name] != defaults[name]]
