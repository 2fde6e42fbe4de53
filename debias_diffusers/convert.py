"""Checkpoints of guided-diffusion (the paper's code, ADM, P2, Min-SNR) to pipelines, and back.

Its state dicts name blocks by their place, `input_blocks.K`, `middle_block.K`, `output_blocks.K`. The weights tell channels, levels,
blocks, attention, classes, learned variance, updown and scale-shift; flags are needed for what they do not: the size of
an attention head, the order of its weights, the size of images, schedule and target.
"""

from __future__ import annotations

import dataclasses
import difflib
import io
import json
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DiffusionPipeline, UNet2DModel
from torch import Tensor

from .config import CHANNEL_MULT, ModelConfig, ObjectiveConfig, PredictionType
from .errors import InputError, raise_all
from .files import DRAFT, said_if_not_writable, write_file
from .model import build_unet, differing_fields, unet_config
from .pipeline import PixelPipeline, load_pipeline
from .rules import objective_problems, range_problems
from .run import say
from .schedule import is_flow, make_schedule, schedule_of_scheduler
from .schedulers import exported_scheduler

State = dict[str, Tensor]

# The reference's defaults of the flags that decide what its weights mean. All others are about training or sampling.
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

# Flags of the reference that look like the above, but are others.
_OTHER_FLAGS = {"classifier_resblock_updown", "classifier_use_scale_shift_norm", "classifier_attention_resolutions"}

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What decides the names of a network's weights."""

    widths: tuple[int, ...]  # channels of each level
    blocks: int  # residual blocks of each level on the way down; one more on the way up
    attends: tuple[bool, ...]  # which levels have attention
    updown: bool  # residual blocks resize, instead of plain convolutions


def modules(shape: Shape) -> Iterator[tuple[str, str]]:
    """(name in UNet2DModel, name in guided-diffusion) of every layer with weights, but for the parts of attention.

    An attention layer itself is yielded as (its name, its name); its weights differ in more than their names.
    """
    yield from _ENDS.items()
    levels = len(shape.widths)

    def resnet(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
        yield from ((f"{ours}.{part}", f"{theirs}.{name}") for part, name in _RESNET.items())

    def resize(ours: str, theirs: str, convolution: str) -> Iterator[tuple[str, str]]:
        if shape.updown:
            yield from resnet(ours, theirs)
        else:
            yield f"{ours}.conv", f"{theirs}.{convolution}"

    place = 1
    for level in range(levels):
        ours = f"down_blocks.{level}"
        for block in range(shape.blocks):
            yield from resnet(f"{ours}.resnets.{block}", f"input_blocks.{place}.0")
            if shape.attends[level]:
                yield f"{ours}.attentions.{block}", f"input_blocks.{place}.1"
            place += 1
        if level < levels - 1:
            yield from resize(f"{ours}.downsamplers.0", f"input_blocks.{place}.0", "op")
            place += 1

    yield from resnet("mid_block.resnets.0", "middle_block.0")
    yield "mid_block.attentions.0", "middle_block.1"
    yield from resnet("mid_block.resnets.1", "middle_block.2")

    place = 0
    for block_up, level in enumerate(reversed(range(levels))):
        ours = f"up_blocks.{block_up}"
        for block in range(shape.blocks + 1):
            yield from resnet(f"{ours}.resnets.{block}", f"output_blocks.{place}.0")
            if shape.attends[level]:
                yield f"{ours}.attentions.{block}", f"output_blocks.{place}.1"
            if block == shape.blocks and level > 0:
                yield from resize(f"{ours}.upsamplers.0", f"output_blocks.{place}.{1 + shape.attends[level]}", "conv")
            place += 1


def is_attention(name: str) -> bool:
    """Whether a layer of UNet2DModel is an attention layer."""
    return name.rsplit(".", 1)[0].endswith("attentions")


# ---- weights ---------------------------------------------------------------------------------------------------------


def split_qkv(qkv: Tensor, heads: int, new_order: bool) -> list[Tensor]:
    """Query, key and value (C, ...) from their joint weight (3 C, ...): three chunks, or interleaved head by head."""
    if new_order:
        return list(qkv.chunk(3))
    return [part.reshape(-1, *qkv.shape[1:]) for part in qkv.view(heads, 3, -1, *qkv.shape[1:]).unbind(1)]


def join_qkv(parts: list[Tensor], heads: int) -> Tensor:
    """The joint weight (3 C, ...) in the reference's default order, head by head."""
    return torch.stack([part.view(heads, -1, *part.shape[1:]) for part in parts], dim=1).reshape(-1, *parts[0].shape[1:])


def from_guided(state: Mapping[str, Tensor], shape: Shape, head_dim: int, new_order: bool) -> State:
    """A state dict of guided-diffusion under the names of UNet2DModel. What has no name there is left under its own."""
    rest = {name: value.float() for name, value in state.items()}
    result: State = {}
    for ours, theirs in modules(shape):
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
                if f"{theirs}.{kind}" in rest:  # labels have no bias, and only some blocks a skip connection
                    result[f"{ours}.{kind}"] = rest.pop(f"{theirs}.{kind}")
    return result | rest


def to_guided(state: Mapping[str, Tensor], shape: Shape, head_dim: int) -> State:
    """A state dict of UNet2DModel under the names of guided-diffusion, in its default order of attention."""
    result: State = {}
    for ours, theirs in modules(shape):
        if is_attention(ours):
            for kind in ("weight", "bias"):
                parts = [state[f"{ours}.to_{letter}.{kind}"] for letter in "qkv"]
                qkv, out = join_qkv(parts, len(parts[0]) // head_dim), state[f"{ours}.to_out.0.{kind}"]
                result[f"{theirs}.norm.{kind}"] = state[f"{ours}.group_norm.{kind}"]
                result[f"{theirs}.qkv.{kind}"] = qkv[..., None] if kind == "weight" else qkv  # a convolution over places
                result[f"{theirs}.proj_out.{kind}"] = out[..., None] if kind == "weight" else out
        else:
            result |= {f"{theirs}.{kind}": state[f"{ours}.{kind}"] for kind in ("weight", "bias") if f"{ours}.{kind}" in state}
    return result


def shape_of(state: Mapping[str, Tensor]) -> Shape:
    """What the weights tell.

    Raises:
        InputError: they are not of a UNet of guided-diffusion.
    """
    places = sorted({int(name.split(".")[1]) for name in state if name.startswith("output_blocks.")})
    try:
        # The last block of every level but the finest makes images larger, in a part of its own.
        attention = {place: f"output_blocks.{place}.1.qkv.weight" in state for place in places}
        ends = [place for place in places if _resizes(state, place, attention[place])]
        blocks = (ends[0] if ends else places[-1]) + 1
        levels = len(ends) + 1
        firsts = [1 + level * blocks for level in range(levels)]  # blocks - 1 of them and one that resizes, on the way down
        widths = tuple(len(state[f"input_blocks.{place}.0.out_layers.3.bias"]) for place in firsts)
        updown = bool(ends) and f"output_blocks.{ends[0]}.{1 + attention[ends[0]]}.in_layers.0.weight" in state
        attends = tuple(attention[blocks * (levels - 1 - level)] for level in range(levels))
    except (KeyError, IndexError, TypeError) as error:
        raise InputError(f"these are not the weights of a UNet of guided-diffusion: {error} is missing") from error
    return Shape(widths=widths, blocks=blocks - 1, attends=attends, updown=updown)


def _attending_sides(shape: Shape, image_size: int) -> tuple[int, ...]:
    """The sides of the images in levels with attention."""
    return tuple(image_size // 2**level for level, attends in enumerate(shape.attends) if attends)


def _resizes(state: Mapping[str, Tensor], place: int, attends: bool) -> bool:
    last = f"output_blocks.{place}.{1 + attends}"
    return f"{last}.conv.weight" in state or f"{last}.in_layers.0.weight" in state


# ---- files -----------------------------------------------------------------------------------------------------------


def read_flags(text: str) -> dict[str, Any]:
    """The reference's flags, from a JSON file or as they were typed: `--image_size 256 --learn_sigma True`.

    Raises:
        InputError: not readable, a value of the wrong kind, or a name that looks like a misspelt one.
    """
    given = _flags_of_file(text) if text.lower().endswith(".json") else _typed_flags(text)
    for name in given:
        near = difflib.get_close_matches(name, DEFAULT_FLAGS, n=1, cutoff=0.85)
        if near and name not in DEFAULT_FLAGS and name not in _OTHER_FLAGS:
            raise InputError(f"flag {name} is not known; did you mean {near[0]}?")
    return {name: _as(type(default), name, given[name]) for name, default in DEFAULT_FLAGS.items() if name in given}


def _flags_of_file(path: str) -> dict[str, Any]:
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"flags {path} cannot be read: {error}") from error
    if not isinstance(given, dict):
        raise InputError(f"flags {path} holds no JSON object (names and values)")
    return given


def _typed_flags(text: str) -> dict[str, Any]:
    try:
        words = [part for word in shlex.split(text) for part in (word.split("=", 1) if word.startswith("--") else [word])]
    except ValueError as error:
        raise InputError(f"flags {text!r} cannot be read: {error}") from error
    if len(words) % 2 or not all(name.startswith("--") for name in words[::2]):
        raise InputError(f"flags {text!r} must be a .json file, or pairs such as '--image_size 256 --learn_sigma True'")
    return {name.lstrip("-").replace("-", "_"): value for name, value in zip(words[::2], words[1::2])}


def _as(kind: type, name: str, value: Any) -> Any:
    if kind is str:
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)
    text = str(value).strip().lower()
    if kind is bool and text in ("true", "false", "1", "0", "yes", "no"):
        return text in ("true", "1", "yes")
    if kind is int and text.lstrip("-").isdecimal():
        return int(text)
    raise InputError(f"flag {name} is {value!r}, but must be {'True or False' if kind is bool else 'a whole number'}")


def read_state(path: str) -> State:
    """The state dict of a `.pt` file, read without running anything that is in it.

    Raises:
        InputError: the file is missing, damaged, or holds anything but tensors.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file may provoke any
        raise InputError(f"{path} cannot be read as a file of weights: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()) or not state:
        raise InputError(f"{path} holds no state dict (names and tensors); take the reference's model*.pt or ema*.pt")
    return state


def told_by(state: Mapping[str, Tensor], shape: Shape, image_size: int) -> dict[str, Any]:
    """The flags that the weights tell, for images of a size."""
    base, classes = shape.widths[0], state.get("label_emb.weight")
    return {
        "num_channels": base,
        "channel_mult": ",".join(f"{width / base:g}" for width in shape.widths),
        "num_res_blocks": shape.blocks,
        # Without any, a side that no level has: the reference cannot read an empty list.
        "attention_resolutions": ",".join(map(str, _attending_sides(shape, image_size) or (2 * image_size,))),
        "class_cond": classes is not None,
        "num_classes": DEFAULT_FLAGS["num_classes"] if classes is None else len(classes),
        "use_scale_shift_norm": len(state["input_blocks.1.0.emb_layers.1.bias"]) == 2 * base,
        "resblock_updown": shape.updown,
        "learn_sigma": len(state["out.2.bias"]) == 2 * state["input_blocks.0.0.weight"].shape[1],
    }


def _numbers(text: str) -> list[float]:
    """Of a list such as "1, 2,2"."""
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise InputError(f"flag with the value {text!r} must be numbers with commas, such as 1,2,2 ({error})") from error


def _contradictions(given: Mapping[str, Any], told: Mapping[str, Any], shape: Shape) -> list[str]:
    """Flags that say something else than the weights."""
    said, meant = dict(given), dict(told)
    size = said["image_size"]
    # Empty multipliers are chosen by the size of the images; sides that no level has are ignored.
    usual = list(CHANNEL_MULT.get(size, ()))
    said["channel_mult"], meant["channel_mult"] = _numbers(said.get("channel_mult", "")) or usual, _numbers(told["channel_mult"])
    if "attention_resolutions" in said:
        sides = [size // 2**level for level in range(len(shape.widths))]
        said["attention_resolutions"] = [side for side in sides if side in _numbers(said["attention_resolutions"])]
        meant["attention_resolutions"] = list(_attending_sides(shape, size))
    if not told["class_cond"]:
        said.pop("num_classes", None)
    return [
        f"{name} is {said[name]} at image_size {size}, but the weights tell {value}; correct one of the flags"
        for name, value in meant.items()
        if name in said and said[name] != value
    ]


def _inexpressible(flags: Mapping[str, Any], state: Mapping[str, Tensor], shape: Shape) -> list[str]:
    """Why UNet2DModel cannot be this network, though the reference can."""
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
    if flags["num_head_channels"] == -1 and (len(_attending(shape)) > 1 or up not in (-1, down)):
        found.append(
            f"it has {down} heads (on the way up {down if up == -1 else up}) in attention layers of {sorted(_attending(shape))} channels, "
            f"so heads differ in width; UNet2DModel has one width for all"
        )
    if flags["rescale_timesteps"] and flags["diffusion_steps"] != 1000:
        found.append(
            f"rescale_timesteps with {flags['diffusion_steps']} diffusion_steps tells the network 1000 t / T, which no scheduler here does"
        )
    return found


def _attending(shape: Shape) -> set[int]:
    """The widths of levels with attention; the middle, as wide as the last, always attends."""
    return {width for width, attends in zip(shape.widths, shape.attends) if attends} | {shape.widths[-1]}


def _head_dim(flags: Mapping[str, Any], shape: Shape) -> int:
    """Channels of one head.

    Raises:
        InputError: they do not divide the channels of a layer.
    """
    asked = flags["num_head_channels"]
    head_dim: int = shape.widths[-1] // flags["num_heads"] if asked == -1 else asked
    if head_dim < 1 or any(width % head_dim for width in _attending(shape)):
        name = "num_heads" if asked == -1 else "num_head_channels"
        raise InputError(f"{name} is {flags[name]}, but attention has {sorted(_attending(shape))} channels; correct it")
    return head_dim


def guided(model: str, flags: str, out: str) -> None:
    """Writes a pipeline folder from a checkpoint of guided-diffusion.

    Args:
        model: the `.pt` file.
        flags: the flags that it was trained with, a .json file or as typed; those left out have the reference's defaults.
        out: a new or empty folder.

    Raises:
        InputError: a file cannot be read, weights and flags contradict each other, or UNet2DModel cannot express the network.
    """
    given, folder = read_flags(flags), _new_folder(out)
    raise_all(_missing(given), "flags")
    values = {**DEFAULT_FLAGS, **given}
    try:
        unet = _network(model, given, values)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:  # of weights in odd shapes
        raise InputError(f"{model} holds no UNet of guided-diffusion as its flags say: {' '.join(str(error).split())[:200]}") from error
    scheduler = exported_scheduler(_objective(values, unet.config.out_channels > unet.config.in_channels))
    pipeline = PixelPipeline(unet, scheduler) if unet.config.num_class_embeds else DDPMPipeline(unet, scheduler)
    _save(pipeline, folder)
    names = ("use_new_attention_order", "noise_schedule", "diffusion_steps", "predict_xstart", "predict_v")
    if assumed := [f"{name} {values[name]}" for name in names if name not in given]:
        say(f"assumed, as the reference does where flags are left out: {', '.join(assumed)}")
    say(f"{out}: {sum(p.numel() for p in unet.parameters())} parameters, images of {values['image_size']} pixels; sample.py draws with it")


def _missing(given: Mapping[str, Any]) -> list[str]:
    """Flags that neither the weights tell nor the reference's defaults are safe for."""
    found = []
    if given.get("image_size", 0) < 1:
        found.append("image_size is missing, and the weights do not tell it; add it, such as --image_size 256")
    if not any(given.get(name, 0) >= 1 for name in ("num_head_channels", "num_heads")):
        found.append("num_head_channels (or num_heads) is missing, and the weights do not tell it; the paper's runs have 64")
    return found


def _network(model: str, given: Mapping[str, Any], values: Mapping[str, Any]) -> UNet2DModel:
    """The network of a checkpoint, checked against the flags that were given; `values` are these over the reference's defaults."""
    state = read_state(model)
    shape = shape_of(state)
    told = told_by(state, shape, values["image_size"])
    raise_all(_inexpressible(values, state, shape), f"{model} cannot be converted")
    raise_all(_contradictions(given, told, shape), f"{model} and its flags differ")
    head_dim = _head_dim(values, shape)
    unet = _unet(shape, told, values["image_size"], head_dim, channels=state["input_blocks.0.0.weight"].shape[1])
    _load(unet, from_guided(state, shape, head_dim, values["use_new_attention_order"]), model)
    return unet


def _new_folder(out: str) -> Path:
    folder = Path(out).resolve()
    if not out or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))):
        raise InputError(f"{out} is there already; name a new or empty folder")
    return folder


def _unet(shape: Shape, told: Mapping[str, Any], image_size: int, head_dim: int, channels: int) -> UNet2DModel:
    """The network with fresh weights."""
    config = ModelConfig(
        model_channels=shape.widths[0],
        channel_mult=tuple(width // shape.widths[0] for width in shape.widths),
        layers_per_block=shape.blocks,
        attention_resolutions=_attending_sides(shape, image_size),
        attention_head_dim=head_dim,
        resblock_updown=shape.updown,
        resnet_time_scale_shift="scale_shift" if told["use_scale_shift_norm"] else "default",
    )
    return build_unet(unet_config(config, image_size, channels, told["num_classes"] if told["class_cond"] else 0, told["learn_sigma"]))


def _load(unet: UNet2DModel, weights: State, model: str) -> None:
    """Raises InputError where a weight is missing, unknown, of another shape, or not finite."""
    try:
        unet.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"{model} does not fit the network that it tells of: {' '.join(str(error).split())[:400]}") from error
    if spoilt := [name for name, value in weights.items() if not value.isfinite().all()]:
        raise InputError(f"{model} has weights that are not finite, such as {spoilt[0]}")


def _objective(flags: Mapping[str, Any], learn_sigma: bool) -> ObjectiveConfig:
    """What the reference trained, as far as samplers need it.

    Raises:
        InputError: a schedule that the reference does not have.
    """
    if flags["noise_schedule"] not in ("linear", "cosine"):
        raise InputError(f"flag noise_schedule is {flags['noise_schedule']!r}, but the reference has linear and cosine only")
    if flags["predict_xstart"] and flags["predict_v"]:
        raise InputError("flags predict_xstart and predict_v are both True, but a network has one target; correct them")
    prediction_type: PredictionType = "sample" if flags["predict_xstart"] else "v_prediction" if flags["predict_v"] else "epsilon"
    objective = ObjectiveConfig(
        prediction_type=prediction_type,
        weighting="constant",  # which no sampler asks for
        noise_schedule=flags["noise_schedule"],
        num_train_timesteps=flags["diffusion_steps"],
        learn_sigma=learn_sigma,
    )
    raise_all(range_problems(dataclasses.asdict(objective)) or objective_problems(objective), "flags diffusion_steps and noise_schedule")
    return objective


def _save(pipeline: DiffusionPipeline, folder: Path) -> None:
    """The folder is whole or absent."""
    draft = folder.with_name(DRAFT + folder.name)
    shutil.rmtree(draft, ignore_errors=True)
    try:
        with said_if_not_writable(folder):
            pipeline.save_pretrained(draft, safe_serialization=True)
            os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


# ---- the way back ----------------------------------------------------------------------------------------------------


def export(model: str, out: str) -> None:
    """Writes the network of a pipeline as a state dict that guided-diffusion loads, and its flags beside it.

    Args:
        model: a run directory, a pipeline folder or a Hub id.
        out: the `.pt` file; `OUT.flags.json` gets the flags.

    Raises:
        InputError: guided-diffusion has no such network, target or schedule.
    """
    for path in (out, f"{out}.flags.json"):
        if not out or Path(path).exists():
            raise InputError(f"{path or 'the empty name'} is there already; name a new file, such as model.pt")
    pipeline = load_pipeline(model)
    unet, own = pipeline.unet, pipeline.scheduler
    if not (isinstance(unet, UNet2DModel) and isinstance(unet.config.sample_size, int) and unet.config.attention_head_dim):
        raise InputError(f"{model} cannot be exported: its network is no UNet2DModel with a size of images and of attention heads")
    shape = Shape(
        widths=tuple(unet.config.block_out_channels),
        blocks=unet.config.layers_per_block,
        attends=tuple("Attn" in name for name in unet.config.down_block_types),
        updown=unet.config.downsample_type == "resnet",
    )
    raise_all(_foreign(unet, own, shape), f"{model} cannot be exported")
    state = to_guided(unet.state_dict(), shape, unet.config.attention_head_dim)
    size = unet.config.sample_size
    flags = {
        **DEFAULT_FLAGS,
        **told_by(state, shape, size),
        "image_size": size,
        "num_head_channels": unet.config.attention_head_dim,
        "diffusion_steps": own.config.num_train_timesteps,
        "noise_schedule": _schedule_name(own),
        "predict_xstart": own.config.prediction_type == "sample",
        "predict_v": own.config.prediction_type == "v_prediction",
    }
    box = io.BytesIO()
    torch.save(state, box)
    write_file(Path(out), box.getvalue())
    write_file(Path(f"{out}.flags.json"), (json.dumps(flags, indent=2) + "\n").encode())
    say(f"{out}: load it with the flags in {out}.flags.json")


def _foreign(unet: UNet2DModel, own: Any, shape: Shape) -> list[str]:
    """What guided-diffusion does not have."""
    found, config = [], unet.config
    told = {
        "use_scale_shift_norm": config.resnet_time_scale_shift == "scale_shift",
        "class_cond": bool(config.num_class_embeds),
        "num_classes": config.num_class_embeds,
        "learn_sigma": config.out_channels == 2 * config.in_channels,
    }
    if config.in_channels != 3:
        found.append(f"its images have {config.in_channels} channel(s), those of the reference 3")
    if any(width % 32 for width in shape.widths):
        found.append(f"its levels have {list(shape.widths)} channels, but the reference's norms have 32 groups")
    else:
        twin = _unet(shape, told, config.sample_size, config.attention_head_dim, config.in_channels).config
        found += [
            f"its {name} is {config[name]}, that of the reference {twin[name]}" for name in differing_fields(twin, config, {"dropout"})
        ]
    if is_flow(own):
        found.append("it is a rectified flow, which the reference does not know")
    elif not _schedule_name(own):
        found.append("its noise schedule is neither linear nor cosine as the reference has them (shifted, rescaled, or another)")
    return found


def _schedule_name(own: Any) -> str | None:
    """The reference's name of a scheduler's schedule, if it has one."""
    table, T = schedule_of_scheduler(own).alphas_cumprod, own.config.num_train_timesteps
    for name in ("linear", "cosine"):
        theirs = make_schedule(ObjectiveConfig(noise_schedule=name, num_train_timesteps=T)).alphas_cumprod
        if (table - theirs).abs().max() < 1e-6:
            return name
    return None


if __name__ == "__main__":
    from .cli import convert

    raise SystemExit(convert())
