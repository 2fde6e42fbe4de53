"""Configurations of the commands of `debias_diffusers.convert`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .types import LoraFormat


@dataclass(frozen=True, kw_only=True)
class GuidedConfig:
    """Convert a checkpoint of guided-diffusion to a pipeline."""

    model: str  # the .pt file
    out: str  # output folder of the pipeline, which must not exist
    flags: str = ""  # flags that it was trained with: a .json file, or as typed, '--image_size 256 --num_head_channels 64'


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Convert a pipeline to a checkpoint of guided-diffusion."""

    model: str  # a run directory, a pipeline folder, or a Hub id
    out: str  # output file, .pt; its flags are written beside it
    allow_pickle_import: bool = False  # also load a model that has .bin weights only, read as tensors only


@dataclass(frozen=True, kw_only=True)
class SingleConfig:
    """Convert a single-file checkpoint of Stable Diffusion XL, 2.x or 1.x to a pipeline folder, or a pipeline to such a file."""

    model: str  # the .safetensors; or a run directory, a pipeline folder or a Hub id
    out: str  # output folder, which must not exist; or output file, .safetensors
    # of a file: a pipeline folder or Hub id with configurations and tokenizers; if left out the usual one of Stable Diffusion XL or 1.x
    config: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # precision of the weights in an output file


@dataclass(frozen=True, kw_only=True)
class LoraFormatConfig:
    """Convert a LoRA to the names of kohya's scripts (sd-scripts), which most interfaces read, or from these to those of diffusers."""

    lora: str  # a run directory, a .safetensors file or a Hub id
    out: str  # output: with format kohya a file, FILE.safetensors, with format diffusers a folder; it must not exist
    format: LoraFormat = "kohya"  # names of the tensors of the output
