"""UNet2DModel from a few numbers in the paper's terms, or from a configuration file."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel

from ..config.schema.network import ModelConfig
from ..errors import InputError
from ..utils.files import read_json_object


def unet_config(config: ModelConfig, resolution: int, channels: int, num_labels: int, learn_sigma: bool = False) -> dict[str, Any]:
    """Arguments of UNet2DModel.

    Args:
        config: either numbers in the paper's terms, or `model_config`, a file.
        resolution: pixels a side.
        channels: of the images.
        num_labels: classes, and one more where labels are dropped in training; 0 without labels.
        learn_sigma: twice the output channels, the second half for the variance of a sampling step.

    Raises:
        InputError: the file cannot be read, has unknown keys, or contradicts the data.
    """
    fixed = {
        "sample_size": resolution,
        "in_channels": channels,
        "out_channels": 2 * channels if learn_sigma else channels,
        "num_class_embeds": num_labels or None,
    }
    if config.model_config:
        arguments = _from_file(config.model_config, fixed)
        _try_out(arguments, config.model_config)
        return arguments
    widths = [config.model_channels * mult for mult in config.channel_mult]
    attends = [resolution // 2**level in config.attention_resolutions for level in range(len(widths))]
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if config.resblock_updown else ("DownBlock2D", "UpBlock2D")
    resize = "resnet" if config.resblock_updown else "conv"
    groups = math.gcd(32, *widths)  # 32 as in the paper's networks, fewer where a width is no multiple of it
    return fixed | {
        "block_out_channels": widths,
        "down_block_types": ["AttnDownBlock2D" if attention else plain[0] for attention in attends],
        "up_block_types": ["AttnUpBlock2D" if attention else plain[1] for attention in reversed(attends)],
        "layers_per_block": config.layers_per_block,
        "downsample_type": resize,
        "upsample_type": resize,
        "attention_head_dim": config.attention_head_dim,
        "norm_num_groups": groups,
        "attn_norm_num_groups": groups,  # left out, the middle attention has no norm under scale_shift
        "resnet_time_scale_shift": config.resnet_time_scale_shift,
        "dropout": config.dropout,
    }


def _from_file(path: str, fixed: dict[str, Any]) -> dict[str, Any]:
    values = {name: value for name, value in read_json_object("model_config", Path(path)).items() if not name.startswith("_")}
    known = inspect.signature(UNet2DModel.__init__).parameters
    if unknown := sorted(set(values) - set(known)):
        raise InputError(f"model_config {path} has keys that UNet2DModel does not know: {', '.join(unknown)}")
    for name, value in fixed.items():
        if name in values and values[name] != value:
            raise InputError(f"model_config {path} has {name} {values[name]}, but this run asks for {value}; leave it out")
    return values | fixed


def differing_fields(one: Mapping[str, Any], other: Mapping[str, Any], free: Collection[str] = ()) -> list[str]:
    """Names of the fields in which two configurations of UNet2DModel differ, but for those in `free`. `one` has all fields."""

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value  # which of the two depends on where it was read from

    return [name for name in one if not name.startswith("_") and name not in free and plain(one[name]) != plain(other.get(name))]


def build_unet(arguments: dict[str, Any]) -> UNet2DModel:
    """A network with fresh weights from torch's global generator."""
    return UNet2DModel(**arguments)


def _try_out(arguments: dict[str, Any], path: str) -> None:
    """Builds the network of a file and calls it once, without memory or computing (device "meta").

    Raises:
        InputError: UNet2DModel refuses the arguments, or they do not fit the images.
    """
    side, channels = arguments["sample_size"], arguments["in_channels"]
    try:
        with torch.device("meta"):
            labels = torch.zeros(1, dtype=torch.long) if arguments["num_class_embeds"] else None
            shape = build_unet(arguments)(torch.zeros(1, channels, side, side), torch.zeros(1), labels).sample.shape
    except (ValueError, TypeError, ArithmeticError, RuntimeError, LookupError, AttributeError) as error:
        raise InputError(f"model_config {path} gives no network for {side}x{side} images: {' '.join(str(error).split())}") from error
    if shape[2:] != (side, side):
        raise InputError(f"model_config {path} gives a network from {side}x{side} images to {tuple(shape[2:])}; take other levels")
