"""Converts state dicts between guided-diffusion and UNet2DModel: names, shapes and weights. Reads no files.

"The reference" is guided-diffusion. Its state dicts number the blocks: `input_blocks.K`, `middle_block.K`, `output_blocks.K`. The weights
determine channels, levels, blocks, attention, classes, learned variance, updown and scale-shift. Flags are needed for the rest: the width
of an attention head, the order of its weights, the image size, the noise schedule and the prediction type.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..config.schema.network import CHANNEL_MULT, ModelConfig
from ..errors import InputError
from ..tasks.unet import unet_config
from .unet_names import Shape, module_names

State = dict[str, Tensor]

# Default values of the flags that describe the network, its schedule and its prediction type. Other flags are for training or sampling.
DEFAULT_FLAGS: dict[str, Any] = {
    "image_size": 64,
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 4,
    "num_heads_upsample": -1,
    "num_head_channels": -1,
    "attention_resolutions": "16,8",
    "channel_mult": "",
    "class_cond": False,
    "num_classes": 1000,
    "use_scale_shift_norm": True,
    "resblock_updown": False,
    "use_new_attention_order": False,
    "learn_sigma": False,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "rescale_timesteps": False,
    "predict_xstart": False,
    "predict_v": False,
}

_FIRST = "input_blocks.0.0.weight"


def is_attention(name: str) -> bool:
    """Whether a layer of UNet2DModel is an attention layer."""
    return name.rsplit(".", 1)[0].endswith("attentions")


# ---- weights ---------------------------------------------------------------------------------------------------------


def split_qkv(qkv: Tensor, heads: int, new_order: bool) -> list[Tensor]:
    """Splits a joint weight (3 C, ...) into query, key and value (C, ...): three chunks (`new_order`), or interleaved by head."""
    if new_order:
        return list(qkv.chunk(3))
    return [part.reshape(-1, *qkv.shape[1:]) for part in qkv.view(heads, 3, -1, *qkv.shape[1:]).unbind(1)]


def join_qkv(parts: list[Tensor], heads: int) -> Tensor:
    """Joins query, key and value (C, ...) to a weight (3 C, ...), interleaved by head, the reference's default order."""
    return torch.stack([part.view(heads, -1, *part.shape[1:]) for part in parts], dim=1).reshape(-1, *parts[0].shape[1:])


def from_guided(state: Mapping[str, Tensor], shape: Shape, head_dim: int, new_order: bool) -> State:
    """Converts a state dict of guided-diffusion to UNet2DModel (float32). A head has `head_dim` channels.

    Raises:
        ValueError: the state dict has weights that such a network does not have.
        KeyError: a weight of an attention layer is missing.
    """
    rest = {name: value.float() for name, value in state.items()}
    result: State = {}
    for ours, theirs in module_names(shape):
        if is_attention(ours):
            for kind in ("weight", "bias"):
                qkv = rest.pop(f"{theirs}.qkv.{kind}").flatten(1) if kind == "weight" else rest.pop(f"{theirs}.qkv.{kind}")
                parts = split_qkv(qkv, len(qkv) // 3 // head_dim, new_order)
                result |= {f"{ours}.to_{letter}.{kind}": part for letter, part in zip("qkv", parts)}
                result[f"{ours}.group_norm.{kind}"] = rest.pop(f"{theirs}.norm.{kind}")
                out = rest.pop(f"{theirs}.proj_out.{kind}")
                result[f"{ours}.to_out.0.{kind}"] = out.flatten(1) if kind == "weight" else out
        else:
            for kind in ("weight", "bias"):
                if f"{theirs}.{kind}" in rest:  # the class embedding has no bias; only some blocks have a skip connection
                    result[f"{ours}.{kind}"] = rest.pop(f"{theirs}.{kind}")
    if rest:
        raise ValueError(f"{min(rest):.80} is no weight of the network that the others make")
    return result


def to_guided(state: Mapping[str, Tensor], shape: Shape, head_dim: int) -> State:
    """Converts a state dict of UNet2DModel to guided-diffusion, with its default order of attention weights."""
    result: State = {}
    for ours, theirs in module_names(shape):
        if is_attention(ours):
            for kind in ("weight", "bias"):
                parts = [state[f"{ours}.to_{letter}.{kind}"] for letter in "qkv"]
                qkv, out = join_qkv(parts, len(parts[0]) // head_dim), state[f"{ours}.to_out.0.{kind}"]
                result[f"{theirs}.norm.{kind}"] = state[f"{ours}.group_norm.{kind}"]
                result[f"{theirs}.qkv.{kind}"] = qkv[..., None] if kind == "weight" else qkv  # a 1d convolution in the reference
                result[f"{theirs}.proj_out.{kind}"] = out[..., None] if kind == "weight" else out
        else:
            result |= {f"{theirs}.{kind}": state[f"{ours}.{kind}"] for kind in ("weight", "bias") if f"{ours}.{kind}" in state}
    return result


def state_problems(state: Mapping[Any, Tensor]) -> list[str]:
    """Why this is not a state dict of a UNet of guided-diffusion, judged by names and dtypes; at most one sentence."""
    if odd := [name for name in state if not isinstance(name, str)]:
        return [f"it has {odd[0]!r:.80} in place of a name"]
    if wrapped := [name for name in state if name.endswith(f".{_FIRST}")]:
        prefix = wrapped[0].removesuffix(_FIRST)
        return [f"its names begin with {prefix:.80} as those of a wrapper (DistributedDataParallel) do; save them without"]
    places = _places(state)
    if not places:
        return [f"it has no output_blocks, but names such as {next(iter(state)):.80}"]
    if gaps := set(range(len(places))) - set(places):
        return [f"output_blocks.{min(gaps)} is missing"]
    # Integers are not weights, and float64 would lose half of its precision.
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    return [
        f"{name:.80} is {value.dtype}, but weights must be float32, float16 or bfloat16; save them so"
        for name, value in state.items()
        if value.dtype not in kinds
    ][:1]


def _places(state: Mapping[str, Tensor]) -> list[int]:
    """The sorted numbers K of `output_blocks.K`."""
    return sorted({int(found[1]) for name in state if (found := re.match(r"output_blocks\.(\d{1,4})\.", name))})


def size_problems(shape: Shape, image_size: int) -> list[str]:
    """A sentence if the levels cannot halve images of this size (pixels); the reference fails on them, too."""
    halvings = len(shape.widths) - 1
    if image_size >= 1 and image_size % 2**halvings == 0:
        return []
    fits = 2**halvings * max(1, round(image_size / 2**halvings))
    return [f"image_size is {image_size}, but its {halvings + 1} levels halve images {halvings} times; {fits} would fit"]


def infer_shape(state: Mapping[str, Tensor]) -> Shape:
    """The structure of a network from a state dict without `state_problems`.

    Raises:
        KeyError, TypeError, ValueError: it is not a UNet of guided-diffusion nevertheless.
    """
    places = _places(state)
    # The last block of every level but the finest ends with a module that doubles the resolution.
    attention = {place: f"output_blocks.{place}.1.qkv.weight" in state for place in places}
    ends = [place for place in places if _resizes(state, place, attention[place])]
    blocks = (ends[0] if ends else places[-1]) + 1
    levels = len(ends) + 1
    if len(places) != blocks * levels:
        raise ValueError(f"its {len(places)} output_blocks make no {levels} levels of {blocks}")
    firsts = [1 + level * blocks for level in range(levels)]  # on the way down: blocks - 1 residual blocks and one that resizes
    widths = tuple(len(state[f"input_blocks.{place}.0.out_layers.3.bias"]) for place in firsts)
    updown = bool(ends) and f"output_blocks.{ends[0]}.{1 + attention[ends[0]]}.in_layers.0.weight" in state
    attends = tuple(attention[blocks * (levels - 1 - level)] for level in range(levels))
    return Shape(widths=widths, blocks=blocks - 1, attends=attends, updown=updown)


def _attention_resolutions(shape: Shape, image_size: int) -> tuple[int, ...]:
    """The resolutions (pixels) of the levels with attention."""
    return tuple(image_size // 2**level for level, attends in enumerate(shape.attends) if attends)


def _resizes(state: Mapping[str, Tensor], place: int, attends: bool) -> bool:
    last = f"output_blocks.{place}.{1 + attends}"
    return f"{last}.conv.weight" in state or f"{last}.in_layers.0.weight" in state


# ---- flags from weights ---------------------------------------------------------------------------------------------


def flags_from_weights(state: Mapping[str, Tensor], shape: Shape, image_size: int) -> dict[str, Any]:
    """The flags that a state dict of the reference determines, for images of `image_size` pixels."""
    base, classes = shape.widths[0], state.get("label_emb.weight")
    return {
        "num_channels": base,
        "channel_mult": ",".join(f"{width / base:g}" for width in shape.widths),
        "num_res_blocks": shape.blocks,
        # Without attention, a resolution that no level has, because the reference cannot parse an empty list.
        "attention_resolutions": ",".join(map(str, _attention_resolutions(shape, image_size) or (2 * image_size,))),
        "class_cond": classes is not None,
        "num_classes": DEFAULT_FLAGS["num_classes"] if classes is None else len(classes),
        "use_scale_shift_norm": len(state["input_blocks.1.0.emb_layers.1.bias"]) == 2 * base,
        "resblock_updown": shape.updown,
        "learn_sigma": len(state["out.2.bias"]) == 2 * state["input_blocks.0.0.weight"].shape[1],
    }


WHOLE_NUMBER = "a whole number of at most six digits"


def whole_number(text: str) -> int:
    """Parses a flag of at most six digits; a larger value could make the network fill all memory.

    Raises:
        ValueError: not such a number.
    """
    if not re.fullmatch(r"-?\d{1,6}", text):
        raise ValueError(f"{text!r:.60} is not {WHOLE_NUMBER}")
    return int(text)


def _whole_numbers(name: str, flags: Mapping[str, Any]) -> list[int]:
    """Parses a list such as "1, 2,2"."""
    text = flags.get(name, "")
    try:
        return [whole_number(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise InputError(f"flag {name} is {text!r:.60}, but must be whole numbers with commas, such as 1,2,2") from error


def _attention_resolutions_of_flags(flags: Mapping[str, Any], levels: int) -> list[int]:
    """The resolutions of the levels with attention according to the flags, with the reference's integer division."""
    size, named = flags["image_size"], _whole_numbers("attention_resolutions", flags)
    if 0 in named:
        raise InputError(f"flag attention_resolutions is {flags['attention_resolutions']!r:.60}, but no level has 0 pixels; leave it out")
    factors = {size // side for side in named}
    return [size // 2**level for level in range(levels) if 2**level in factors]


def flag_conflicts(given: Mapping[str, Any], told: Mapping[str, Any], shape: Shape) -> list[str]:
    """One sentence for each flag that conflicts with the weights."""
    said, meant = dict(given), dict(told)
    size = said["image_size"]
    by_size = {"attention_resolutions"}
    said["channel_mult"], meant["channel_mult"] = _whole_numbers("channel_mult", said), _whole_numbers("channel_mult", told)
    if not said["channel_mult"]:  # chosen by the size of the images
        said["channel_mult"] = list(CHANNEL_MULT.get(size, ()))
        by_size.add("channel_mult")
    if "attention_resolutions" in said:
        said["attention_resolutions"] = _attention_resolutions_of_flags(said, len(shape.widths))
        meant["attention_resolutions"] = list(_attention_resolutions(shape, size))
    if not told["class_cond"]:
        said.pop("num_classes", None)
    return [
        f"{name} is {said[name]}, but the weights tell {value}; correct it"
        if name not in by_size
        else f"{name} is {said[name]} at image_size {size}, but the weights tell {value}; correct one of the two"
        for name, value in meant.items()
        if name in said and said[name] != value
    ]


def unsupported_features(flags: Mapping[str, Any], state: Mapping[str, Tensor], shape: Shape) -> list[str]:
    """Features of the network of a state dict that UNet2DModel does not have, one sentence each."""
    found, base = [], shape.widths[0]
    inputs, outputs = state["input_blocks.0.0.weight"].shape[1], len(state["out.2.bias"])
    if inputs not in (1, 3) or outputs not in (inputs, 2 * inputs):
        found.append(f"it goes from {inputs} to {outputs} channels, so it is no model of images alone (perhaps one of super-resolution)")
    if state["time_embed.0.weight"].shape[1] != base:
        found.append(
            f"its time embedding starts from {state['time_embed.0.weight'].shape[1]} channels and its first level from {base}, as in the "
            f"networks for 512 pixels; UNet2DModel starts both from the same"
        )
    elif any(width % base for width in shape.widths):
        found.append(f"its levels have {list(shape.widths)} channels, but only whole multiples of the first are known here")
    down, up = flags["num_heads"], flags["num_heads_upsample"]
    if flags["num_head_channels"] == -1 and (len(attention_widths(shape)) > 1 or up not in (-1, down)):
        found.append(
            f"it has {down} heads (on the way up {down if up == -1 else up}) in attention layers of {sorted(attention_widths(shape))} "
            f"channels, so heads differ in width; UNet2DModel has one width for all"
        )
    if flags["rescale_timesteps"] and flags["diffusion_steps"] != 1000:
        found.append(
            f"rescale_timesteps with {flags['diffusion_steps']} diffusion_steps tells the network 1000 t / T, which no scheduler here does"
        )
    return found


def attention_widths(shape: Shape) -> set[int]:
    """The channels of the attention layers. The middle block, as wide as the last level, always has attention."""
    return {width for width, attends in zip(shape.widths, shape.attends) if attends} | {shape.widths[-1]}


def resolve_head_dim(flags: Mapping[str, Any], shape: Shape) -> int:
    """The number of channels of an attention head.

    Raises:
        InputError: they do not divide the channels of a layer.
    """
    asked = flags["num_head_channels"]
    head_dim: int = shape.widths[-1] // flags["num_heads"] if asked == -1 else asked
    if head_dim < 1 or any(width % head_dim for width in attention_widths(shape)):
        name = "num_heads" if asked == -1 else "num_head_channels"
        raise InputError(f"{name} is {flags[name]}, but attention has {sorted(attention_widths(shape))} channels; correct it")
    return head_dim


def unet_arguments(shape: Shape, told: Mapping[str, Any], image_size: int, head_dim: int, channels: int) -> dict[str, Any]:
    """Arguments of UNet2DModel for the network of a checkpoint."""
    config = ModelConfig(
        model_channels=shape.widths[0],
        channel_mult=tuple(width // shape.widths[0] for width in shape.widths),
        layers_per_block=shape.blocks,
        attention_resolutions=_attention_resolutions(shape, image_size),
        attention_head_dim=head_dim,
        resblock_updown=shape.updown,
        resnet_time_scale_shift="scale_shift" if told["use_scale_shift_norm"] else "default",
    )
    return unet_config(config, image_size, channels, told["num_classes"] if told["class_cond"] else 0, told["learn_sigma"])
