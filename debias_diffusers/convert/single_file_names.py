"""Names of tensors in single-file checkpoints of Stable Diffusion, which are those of the original code. No torch.

Facts about the layouts: the parts of a file begin with `model.diffusion_model.` (UNet), `first_stage_model.` (VAE), and
`cond_stage_model.` or `conditioner.embedders.N.` (text encoders, as transformers or as OpenCLIP names them).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..errors import InputError
from .unet_names import Shape, module_names

UNET, VAE = "model.diffusion_model", "first_stage_model"

_VAE_RESNET = {"conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


@dataclass(frozen=True)
class Stored:
    """Where a tensor of diffusers or transformers is in a file."""

    name: str
    third: int | None = None  # it is the first, second or third part of the rows: query, key and value of OpenCLIP are one tensor
    transposed: bool = False
    is_conv: bool = False  # the matrix of a linear layer is that of a 1x1 convolution there


def unet_name(key: str, config: Mapping[str, Any]) -> Stored:
    """Where a tensor of a UNet2DConditionModel is.

    Args:
        key: its name in the state dict of the UNet.
        config: of the UNet.
    """
    attends = tuple("CrossAttn" in kind for kind in config["down_block_types"])
    return Stored(f"{UNET}.{renamed(key, unet_modules(blocks_per_level(config['layers_per_block']), attends))}")


def vae_name(key: str, config: Mapping[str, Any]) -> Stored:
    """Where a tensor of an AutoencoderKL is; arguments as of `unet_name`."""
    kinds = {"resnets": _VAE_RESNET, "attentions": _VAE_ATTENTION}
    is_conv = ".attentions." in key and ".group_norm." not in key and key.endswith(".weight")
    return Stored(f"{VAE}.{renamed(key, _vae_modules(config), kinds)}", is_conv=is_conv)


def text_encoder_name(key: str) -> str:
    """The whole name of a tensor or module of a text encoder, whose beginning newer versions of transformers leave out."""
    return key if key.startswith(("text_model.", "text_projection")) else f"text_model.{key}"


def clip_name(key: str, prefix: str) -> Stored:
    """Where a tensor of a text encoder is (key with `text_model.`) that the file names as transformers does."""
    return Stored(f"{prefix}.{key}")


def open_clip_name(key: str, prefix: str) -> Stored:
    """Where a tensor of a text encoder is (key with `text_model.`, or `text_projection.weight`) that the file names as OpenCLIP does."""
    fixed = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
        "text_projection.weight": "text_projection",
    }
    if key in fixed:
        return Stored(f"{prefix}.{fixed[key]}", transposed=key == "text_projection.weight")
    number, _, inner = key.removeprefix("text_model.encoder.layers.").partition(".")
    module, _, kind = inner.rpartition(".")
    layer = f"{prefix}.transformer.resblocks.{number}"
    for third, name in enumerate(("q_proj", "k_proj", "v_proj")):
        if module == f"self_attn.{name}":
            return Stored(f"{layer}.attn.in_proj_{kind}", third)
    return Stored(f"{layer}.{_OPEN_CLIP_LAYER[module]}.{kind}")


def renamed(key: str, modules: Mapping[str, str], inner: Mapping[str, Mapping[str, str]] | None = None) -> str:
    """A name whose beginning is that of one of `modules`, the longest, with the name of this one; others stay.

    `inner` renames the layers within a module, too, by its kind (`resnets`, ...).
    """
    parts = key.split(".")
    cut = next((cut for cut in range(len(parts), 0, -1) if ".".join(parts[:cut]) in modules), 0)
    if not cut:
        return key
    rest, kind = ".".join(parts[cut:]), parts[cut - 2] if cut > 1 else ""
    for ours, theirs in (inner or {}).get(kind, {}).items():
        if rest == ours or rest.startswith(f"{ours}."):
            rest = theirs + rest[len(ours) :]
            break
    return ".".join(filter(None, (modules[".".join(parts[:cut])], rest)))


def blocks_per_level(layers: int | Sequence[int]) -> int:
    """`layers_per_block` of a configuration, which may be a list with a number for each level.

    Raises:
        InputError: the numbers differ, for which there are no names.
    """
    if isinstance(layers, int):
        return layers
    if len(set(layers)) != 1:
        raise InputError(f"the UNet has {list(layers)} residual blocks in its levels, but the original code has one number for all")
    return layers[0]


@cache
def unet_modules(layers: int, attends: tuple[bool, ...]) -> dict[str, str]:
    """The names of the modules of a UNet2DConditionModel in the original code, by those of diffusers.

    Args:
        layers: residual blocks of each level on the way down.
        attends: which levels have transformers.
    """
    named = module_names(Shape(widths=(1,) * len(attends), blocks=layers, attends=attends, updown=False))
    return {**dict(named), "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}


def _vae_modules(config: Mapping[str, Any]) -> dict[str, str]:
    layers, levels = config["layers_per_block"], len(config["block_out_channels"])
    found = {}
    for side in ("encoder", "decoder"):
        found[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        found |= {f"{side}.mid_block.resnets.{k}": f"{side}.mid.block_{k + 1}" for k in range(2)}
        found[f"{side}.mid_block.attentions.0"] = f"{side}.mid.attn_1"
    for level in range(levels):
        ours, theirs = f"decoder.up_blocks.{level}", f"decoder.up.{levels - 1 - level}"
        found |= {f"encoder.down_blocks.{level}.resnets.{k}": f"encoder.down.{level}.block.{k}" for k in range(layers)}
        found[f"encoder.down_blocks.{level}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
        found |= {f"{ours}.resnets.{k}": f"{theirs}.block.{k}" for k in range(layers + 1)}
        found[f"{ours}.upsamplers.0.conv"] = f"{theirs}.upsample.conv"
    return found
