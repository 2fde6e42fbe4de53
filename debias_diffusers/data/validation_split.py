"""Images that are held out of training, to measure the validation loss on them."""

from __future__ import annotations

import hashlib
from typing import Any

from ..errors import InputError
from ..utils import seeding
from .sources.base import Source
from .sources.subset import SourceSubset

HELD_OUT = "held_out"  # in the fingerprint of the images that are trained: which ones are not


class TrainingImages(SourceSubset):
    """A source without the images that are held out."""

    def fingerprint(self) -> dict[str, Any]:
        return self.source.fingerprint() | {HELD_OUT: hashlib.sha256(repr(self.skipped).encode()).hexdigest()}


def split_source(source: Source, share: float, seed: int) -> tuple[Source, Source | None]:
    """The images that are trained, and those that are held out, a random share of all; (source, None) at the share 0.

    Raises:
        InputError: the share is no image, or every image.
    """
    if not share:
        return source, None
    count = held_out_images(share, len(source))
    if not 0 < count < len(source):
        raise InputError(
            f"validation_split is {share}, which holds out {count} of {len(source)} images; some must be held out, and some trained"
        )
    held = seeding.subset(validation_seed(seed), len(source), count)
    chosen = set(held)
    return TrainingImages(source, held), SourceSubset(source, [index for index in range(len(source)) if index not in chosen])


def held_out_images(share: float, images: int) -> int:
    """How many of so many images are held out."""
    return round(share * images)


def validation_seed(seed: int) -> int:
    """The seed of what concerns images that are held out, in a run of this seed."""
    return seeding.derive_seed(seed, "validation", 0)
