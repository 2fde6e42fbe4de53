"""Names of the modules of a UNet in guided-diffusion and latent-diffusion, which number the blocks, by those of diffusers. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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
    """The structure of a network, as far as the names of its weights depend on it."""

    widths: tuple[int, ...]  # channels of each level
    blocks: int  # residual blocks of each level on the way down; one more on the way up
    attends: tuple[bool, ...]  # which levels have attention
    updown: bool  # residual blocks resize, instead of plain convolutions


def module_names(shape: Shape) -> Iterator[tuple[str, str]]:
    """Yields (name in diffusers, name in the original code) for every module with weights.

    An attention layer is yielded as a whole, without its sub-modules, because its weights may differ in more than their names.
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
