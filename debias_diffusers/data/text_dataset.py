"""The samples of a text-to-image run by position: image or latents, caption, crop, timestep and noise.

Position p is the p-th image that the run trains on, as in `dataset`. Caption, caption dropout, crop, flip and the draw from the VAE's
posterior are functions of (seed, p), too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..config.schema import DataConfig, NoiseConfig, TextConfig
from ..utils import seeding
from . import images
from .captions import Captions, captions_of
from .dataset import PositionedData
from .sources import RepeatedSource, Source


def prompts_of_data(captions: Captions) -> list[str]:
    """One caption of each image that has some, in an order that is always the same: prompts whose images are compared with the data.

    The order is shuffled, because the first images of a data set may be of one class.
    """
    found = [each[k % len(each)] for k, each in enumerate(captions) if each]
    order = torch.randperm(len(found), generator=seeding.generator(0, "captions", 0))
    return [found[k] for k in order.tolist()]


class TextData(PositionedData):
    """Images and captions, or latents in place of the images where they are kept.

    Beside `u` and `noise` a sample has:

    - `caption`, a text, and `dropped`, whether it is replaced by "no caption";
    - `time_ids` (6,) float32: original height and width, top and left of the crop, height and width of the crop (arXiv 2307.01952,
      sections 2.2 and 2.3); of a mirrored image, the corner in the mirrored image;
    - `posterior`, standard normal of the shape of the latents;
    - `image` (3, H, W) uint8.

    Where latents are kept it has `index` and `flipped` in place of `time_ids` and `image`, with which a batch takes them from `latents`.
    """

    def __init__(
        self, source: Source, data: DataConfig, text: TextConfig, seed: int, shape: tuple[int, int, int], noise: NoiseConfig | None = None
    ) -> None:
        """`source` has captions; `shape` is that of the latents."""
        super().__init__(source, data, seed, noise or NoiseConfig())
        # Each image once, and which of them a sample of an epoch is: a repeated image has one crop, and its latents are kept once.
        self.images: Source = source.source if isinstance(source, RepeatedSource) else source
        self._image_of: Sequence[int] = source.indices if isinstance(source, RepeatedSource) else range(self.count)
        self.captions, self.text, self.shape = captions_of(self.images), text, shape
        # Mean, standard deviation and time_ids of each image, as it is and mirrored: (flips, N, ...). None where they are not kept.
        self.latents: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def crops_are_fixed(self) -> bool:
        """Whether an image always has the same crop, so that its latents can be kept."""
        return self.text.crop == "center" or self.text.crop_per_image

    @property
    def captions_are_fixed(self) -> bool:
        """Whether captions are trained as they are, so that their embeddings can be kept."""
        return not self.text.shuffle_caption

    def sample(self, position: int) -> dict[str, Any]:
        index, flipped = self._image_of[self.index(position)], self.flips(position)
        caption, dropped = self._caption(index, position)
        posterior = torch.randn(self.shape, generator=seeding.generator(self.seed, "posterior", position))
        common = {"caption": caption, "dropped": dropped, **self.drawn(position), "posterior": posterior}
        if self.latents is not None:
            return {**common, "index": index, "flipped": int(flipped)}
        pixels, time_ids = self.pixels(index, flipped, position)
        return {**common, "image": pixels, "time_ids": time_ids}

    # ---- captions ----------------------------------------------------------------------------------------------------

    def _caption(self, index: int, position: int) -> tuple[str, bool]:
        """The caption of a position, and whether it is dropped. That of an image without captions always is."""
        found = self.captions[index]
        if not found:
            return "", True
        dropped = seeding.uniform(self.seed, "caption dropout", position) < self.text.caption_dropout
        caption = found[int(seeding.uniform(self.seed, "caption", position) * len(found))]
        return self._shuffled(caption, position) if self.text.shuffle_caption else caption, dropped

    def _shuffled(self, caption: str, position: int) -> str:
        """The caption with its parts between commas in another order, after the first ones that stay."""
        parts = [part.strip() for part in caption.split(",")]
        kept, others = parts[: self.text.keep_tokens], parts[self.text.keep_tokens :]
        order = torch.randperm(len(others), generator=seeding.generator(self.seed, "caption order", position))
        return ", ".join([*kept, *(others[place] for place in order)])

    def texts(self) -> Sequence[str]:
        """All different captions, sorted."""
        return sorted({caption for each in self.captions for caption in each})

    # ---- images ------------------------------------------------------------------------------------------------------

    def pixels(self, index: int, flipped: bool, position: int) -> tuple[Tensor, Tensor]:
        """The crop (3, H, W) uint8 of an image, and its time_ids (6,)."""
        content, _, where = self.images.read(index)
        image = images.decode(content, where).convert("RGB")
        resized = images.resize_shorter(image, self.resolution)
        down, right = resized.height - self.resolution, resized.width - self.resolution
        top, left = self._corner(down, right, index, position)
        pixels = images.to_array(resized.crop((left, top, left + self.resolution, top + self.resolution)))
        corner = (top, right - left if flipped else left)
        time_ids = torch.tensor([image.height, image.width, *corner, self.resolution, self.resolution], dtype=torch.float32)
        return torch.from_numpy(pixels).flip(-1) if flipped else torch.from_numpy(pixels), time_ids

    def _corner(self, down: int, right: int, index: int, position: int) -> tuple[int, int]:
        """Top and left of the crop, with so much room below and to the right."""
        if self.text.crop == "center":
            return down // 2, right // 2
        what, number = ("crop of image", index) if self.text.crop_per_image else ("crop", position)
        top, left = (
            int(seeding.uniform(self.seed, f"{what}, {side}", number) * (room + 1)) for side, room in (("top", down), ("left", right))
        )
        return top, left
