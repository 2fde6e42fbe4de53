"""Configurations of the network that is trained: a UNet, by numbers or by a size, or LoRA adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ..ranges import above, at_least
from .types import Share

# Channel multipliers by resolution, those of the paper's networks from 32 pixels on.
CHANNEL_MULT = {256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4), 32: (1, 2, 2, 2), 16: (1, 2, 2), 8: (1, 2)}

Size = Literal["tiny", "small", "base", "large"]
SIZES: dict[Size, dict[str, Any]] = {
    "tiny": {"model_channels": 32, "layers_per_block": 1, "attention_head_dim": 32},
    "small": {"model_channels": 64, "layers_per_block": 2, "attention_head_dim": 64},
    "base": {"model_channels": 128, "layers_per_block": 2, "attention_head_dim": 64},
    "large": {"model_channels": 192, "layers_per_block": 3, "attention_head_dim": 64},
}
# Fields that a size decides.
SIZE_FIELDS = ("model_channels", "channel_mult", "layers_per_block", "attention_resolutions", "attention_head_dim")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The UNet that is built: these numbers, a size that stands for them, or a UNet2DModel configuration file."""

    # network size, in place of channels, multipliers, blocks, attention and head dimension: 32, 64, 128 or 192 base channels
    size: Size | None = None
    model_channels: Annotated[int, at_least(1, 128)] = 128  # base channels: those of the first level
    channel_mult: tuple[int, ...] = ()  # channel multipliers of the levels; by resolution if left out
    layers_per_block: Annotated[int, at_least(1, 2)] = 2  # residual blocks per level
    attention_resolutions: tuple[int, ...] = (16, 8)  # self-attention at the levels of these resolutions
    attention_head_dim: Annotated[int, at_least(1, 64)] = 64  # channels per attention head
    resblock_updown: bool = False  # residual blocks for up- and downsampling, instead of plain convolutions
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"  # time embedding: added, or as scale and shift (FiLM)
    dropout: Share = 0.0  # dropout rate in the residual blocks
    model_config: str | None = None  # UNet2DModel configuration, FILE.json, in place of the numbers above


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Text-to-image only: LoRA adapters, which are trained in place of the weights of the UNet."""

    # rank of LoRA adapters: they alone are trained, and the UNet stays as it is; the whole UNet is trained if left out
    lora_rank: Annotated[int | None, at_least(1, 16)] = None
    # alpha of LoRA: what an adapter adds is multiplied by alpha / rank; the rank if left out
    lora_alpha: Annotated[float | None, above(0, 16)] = None
    # modules that get an adapter: names, or their ends, as target_modules of peft
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    # adapters on the text encoders, too: on q_proj k_proj v_proj out_proj, and what else lora_targets names; embeddings are then computed
    # in every step
    lora_text_encoders: bool = False


def channel_mult(resolution: int) -> tuple[int, ...]:
    """The usual channel multipliers of a resolution, one for each time that it can be halved; () if it cannot."""
    usual = CHANNEL_MULT[max((side for side in CHANNEL_MULT if side <= resolution), default=min(CHANNEL_MULT))]
    levels = 1
    while levels < len(usual) and resolution % 2**levels == 0:
        levels += 1
    return usual[:levels] if levels > 1 else ()


def network_of_size(size: Size, resolution: int, mult: tuple[int, ...] = ()) -> dict[str, Any]:
    """The SIZE_FIELDS of a network size, with self-attention at the levels from 5 to 16 pixels (to 8 in tiny).

    `mult`: the channel multipliers, if they are not the usual ones.
    """
    mult, largest = mult or channel_mult(resolution), 8 if size == "tiny" else 16
    sides = tuple(resolution // 2**level for level in range(len(mult)))
    return SIZES[size] | {"channel_mult": mult, "attention_resolutions": tuple(side for side in sides if 4 < side <= largest)}
