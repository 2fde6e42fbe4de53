"""The samples of a text-to-image run by position: image or latents, caption, crop, timestep and noise.

Position p is the p-th image that the run trains on, as in `dataset`. Caption, caption dropout, crop, flip and the draw from the VAE's
posterior are functions of (seed, p), too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config.schema.data import DataConfig, TextConfig
from ..config.schema.objective import NoiseConfig
from ..config.schema.training import OptimizationConfig
from ..utils import seeding
from . import images
from .buckets import BucketOrder, Buckets
from .captions import Captions, caption_counts, captions_of, different_captions
from .dataset import PositionedData, shard_starts
from .sources.base import Source
from .sources.subset import RepeatedSource


def prompts_of_data(captions: Captions, count: int | None = None) -> list[str]:
    """One caption of each image that has some, in an order that is always the same: prompts whose images are compared with the data.

    The order is shuffled, because the first images of a data set may be of one class. `count`: only so many, the first of all.
    """
    counts = caption_counts(captions)
    captioned = counts.nonzero()[0]
    order = torch.randperm(len(captioned), generator=seeding.generator(0, "captions", 0))[:count]
    return [captions[k][k % counts[k]] for k in captioned[order.numpy()].tolist()]


class TextData(PositionedData):
    """Images and captions, or latents in place of the images where they are kept.

    Beside `u` and `noise` a sample has:

    - `caption`, a text, and `dropped`, whether it is replaced by "no caption";
    - `time_ids` (6,) float32: original height and width, top and left of the crop, height and width of the crop (arXiv 2307.01952,
      sections 2.2 and 2.3); of a mirrored image, the corner in the mirrored image;
    - `posterior`, standard normal of the shape of the latents;
    - `image` (3, H, W) uint8.

    Where latents are kept in memory it has `index` and `flipped` in place of `time_ids` and `image`, with which a batch takes them from
    `latents`; where they are on the disk, `mean` and `std` of the posterior in place of `image`.
    """

    def __init__(
        self,
        source: Source,
        data: DataConfig,
        text: TextConfig,
        seed: int,
        shape: tuple[int, int, int],
        noise: NoiseConfig | None = None,
        buckets: Buckets | None = None,
        batch_size: int = 0,
    ) -> None:
        """The samples of a source.

        Args:
            source: has captions.
            data: of the run.
            text: of the run.
            seed: of the run.
            shape: of the latents (C, h, w) of square images.
            noise: of the run; standard normal if left out.
            buckets: the sizes of its images, each once; all are square if left out.
            batch_size: with buckets, the samples of a step, which all have one size; 0 mixes them.
        """
        super().__init__(source, data, seed, noise or NoiseConfig())
        # Each image once, and which of them a sample of an epoch is: a repeated image has one crop, and its latents are kept once.
        self.images: Source = source.source if isinstance(source, RepeatedSource) else source
        self._image_of: Sequence[int] = source.indices if isinstance(source, RepeatedSource) else range(self.count)
        self.captions, self.text, self.shape = captions_of(self.images), text, shape
        self.buckets = buckets
        sizes = [buckets.sizes[index] for index in self._image_of] if buckets else []
        self._by_step = (
            BucketOrder(sizes, batch_size, seed, shard_starts(source, data), data.shuffle_window) if buckets and batch_size else None
        )
        # Mean, standard deviation and time_ids of each image, as it is and mirrored: (flips, N, ...). None where they are not kept.
        self.latents: tuple[Tensor, Tensor, Tensor] | None = None
        # The same of one image, and whether it is mirrored, by name; in place of `latents`.
        self.stored: Mapping[tuple[int, bool], Mapping[str, Tensor]] | None = None

    @property
    def crops_are_fixed(self) -> bool:
        """Whether an image always has the same crop, so that its latents can be kept."""
        return self.text.crop == "center" or self.text.crop_per_image

    @property
    def possible_flips(self) -> tuple[bool, ...]:
        """Whether images are mirrored: never, or at some positions."""
        return (False, True) if self.config.random_flip else (False,)

    @property
    def captions_are_fixed(self) -> bool:
        """Whether captions are trained as they are, so that their embeddings can be kept."""
        return not self.text.shuffle_caption

    def index(self, position: int) -> int:
        if self._by_step:
            index = self._by_step.index(position)
            self._prefetch(self._by_step.windows, self._by_step)
            return index
        return super().index(position)

    def same_size(self, one: int, other: int) -> bool:
        return self.size(self._image_of[one]) == self.size(self._image_of[other])

    def one_shape(self, positions: Sequence[int]) -> list[Sequence[int]]:
        if not self.buckets:
            return super().one_shape(positions)
        parts = dict[tuple[int, int], list[int]]()
        for position in positions:
            parts.setdefault(self.size(self._image_of[self.index(position)]), []).append(position)
        return list(parts.values())

    def steps_of_epochs(self, optim: OptimizationConfig, step: int = 0, position: int = 0) -> int:
        if not self._by_step:
            return super().steps_of_epochs(optim, step, position)
        assert optim.num_epochs is not None
        return max(step, self._by_step.steps(optim.num_epochs))

    def sample(self, position: int) -> dict[str, Any]:
        flipped, kept = self.flips(position), self.latents is not None or self.stored is not None
        sample, read, skipped = self.read(position, lambda sample: None if kept else self.pixels(self._image_of[sample], flipped, position))
        index = self._image_of[sample]
        caption, dropped = self._caption(index, position)
        common = {"caption": caption, "dropped": dropped, **skipped}
        if self.latents is not None:
            return {**common, "index": index, "flipped": int(flipped)}
        if self.stored is not None:
            return {**common, **self.stored[index, flipped]}
        assert read is not None
        pixels, time_ids = read
        return {**common, "image": pixels, "time_ids": time_ids}

    def drawn(self, positions: Sequence[int]) -> dict[str, Tensor]:
        return {**super().drawn(positions), "posterior": seeding.normal(self.shape_at(positions), self.seed, "posterior", positions)}

    # ---- captions ----------------------------------------------------------------------------------------------------

    def _caption(self, index: int, position: int) -> tuple[str, bool]:
        """The caption of a position, and whether it is dropped. That of an image without captions always is."""
        found = self.captions[index]
        if not found:
            return "", True
        dropped = seeding.uniform(self.seed, "caption dropout", position) < self.text.caption_dropout
        caption = found[int(seeding.uniform(self.seed, "caption", position) * len(found)) if found[1:] else 0]
        return self._shuffled(caption, position) if self.text.shuffle_caption else caption, dropped

    def _shuffled(self, caption: str, position: int) -> str:
        """The caption with its parts between commas in another order, after the first ones that stay."""
        parts = [part.strip() for part in caption.split(",")]
        kept, others = parts[: self.text.keep_tokens], parts[self.text.keep_tokens :]
        order = torch.randperm(len(others), generator=seeding.generator(self.seed, "caption order", position))
        return ", ".join([*kept, *(others[place] for place in order)])

    def texts(self) -> Sequence[str]:
        """All different captions, sorted."""
        return different_captions(self.captions)

    def texts_of(self, positions: Sequence[int]) -> list[str]:
        """The different captions of some positions, but for dropped ones."""
        found = (self._caption(self._image_of[self.index(position)], position) for position in positions)
        return list(dict.fromkeys(caption for caption, dropped in found if not dropped))

    def images_of(self, positions: Sequence[int]) -> list[tuple[int, bool]]:
        """The different images of some positions, and whether each is mirrored."""
        return list(dict.fromkeys((self._image_of[self.index(position)], self.flips(position)) for position in positions))

    # ---- images ------------------------------------------------------------------------------------------------------

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of the crop of an image."""
        return self.buckets.sizes[index] if self.buckets else (self.resolution, self.resolution)

    def describe_sizes(self) -> str:
        """A line for the user on the sizes of the images; "" where all have the same."""
        return self.buckets.describe(self._image_of) if self.buckets else ""

    def shape_at(self, positions: Sequence[int]) -> Sequence[int]:
        if not self.buckets:
            return self.shape
        factor = self.resolution // self.shape[1]
        height, width = self.size(self._image_of[self.index(positions[0])])
        return self.shape[0], height // factor, width // factor

    def pixels(self, index: int, flipped: bool, position: int) -> tuple[Tensor, Tensor]:
        """The crop (3, H, W) uint8 of an image, and its time_ids (6,)."""
        content, _, where = self.images.read(index)
        height, width = self.size(index)
        image = images.decode(content, where, (height, width) if self.config.jpeg_draft else None).convert("RGB")
        original = images.size_of(content, where) if self.config.jpeg_draft else (image.height, image.width)
        size = images.covering_size(image, height, width)
        down, right = size[1] - height, size[0] - width
        top, left = self._corner(down, right, index, position)
        pixels = images.to_array(images.part_of_resized(image, size, (left, top, left + width, top + height)))
        corner = (top, right - left if flipped else left)
        time_ids = torch.tensor([*original, *corner, height, width], dtype=torch.float32)
        return torch.from_numpy(pixels).flip(-1) if flipped else torch.from_numpy(pixels), time_ids

    def _corner(self, down: int, right: int, index: int, position: int) -> tuple[int, int]:
        """Top and left of the crop, with so much room below and to the right."""
        if self.text.crop == "center":
            return down // 2, right // 2
        top, left = self._random_crop(index, position)
        return int(top * (down + 1)), int(left * (right + 1))

    def _random_crop(self, index: int, position: int) -> tuple[float, float]:
        """Top and left of a crop as shares of the room that there is."""
        what, number = ("crop of image", index) if self.text.crop_per_image else ("crop", position)
        return seeding.uniform(self.seed, f"{what}, top", number), seeding.uniform(self.seed, f"{what}, left", number)

    def fixed_crop(self, index: int) -> str | tuple[float, float]:
        """What decides the crop of an image beside its pixels, where it is the same at every position."""
        return "center" if self.text.crop == "center" else self._random_crop(index, position=0)
