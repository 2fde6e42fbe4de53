"""Metrics of what the EMA weights draw, while they are trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..config.schema import MeasureConfig, TrainConfig
from ..data.sources import Source, state_of_files
from ..errors import InputError
from ..utils.distributed import gathered
from . import metrics
from .feature_cache import key_of
from .image_sets import (
    coloured,
    content_hashes,
    content_key,
    of_source,
    transform,
)
from .measure import Measure, extractor_metadata, usual_extractor
from .metrics import Sample

USUALLY_DRAWN = 1000  # for a measurement while training


# ---- while training --------------------------------------------------------------------------------------------------


class Monitor:
    """Measures what a network in training draws against the images that it learns. Of several processes, each does its share."""

    def __init__(self, config: TrainConfig, source: Source, device: Any, process: int = 0, processes: int = 1) -> None:
        """Loads the extractor; reads no image.

        Raises:
            InputError: there is no such extractor, or too few images for the metrics.
        """
        assert config.run.eval_every and config.data.dataset and config.data.resolution
        chosen, data = config.run, config.data
        self.name, self.side, self.channels, wanted = str(data.dataset), int(data.resolution or 0), data.channels, chosen.eval_images
        measure = MeasureConfig(
            metrics=chosen.eval_metrics, feature_extractor_weights=chosen.feature_extractor_weights, cache_dir=chosen.cache_dir
        )
        self.measure = Measure(measure, chosen.feature_extractor or usual_extractor(self.name), device, process, processes)
        # How wide the layers are, on which it depends how many images are needed, one image tells as well.
        like = Sample.of(self.measure.features(torch.zeros(1, 3, self.side, self.side, dtype=torch.uint8)))
        least = max(metrics.least_images(self.measure.layers, like).values())
        self.count = wanted or max(USUALLY_DRAWN, least)
        if (fewest := min(self.count, len(source))) < least:
            more = "take more --eval_images" if fewest < len(source) else "the data set has no more: take other --eval_metrics"
            raise InputError(f"eval_metrics {chosen.eval_metrics} need {least} images, but there are {fewest}; {more}")
        labels = {"class_labels": "data"} if source.class_names else {}
        self.about = {"images": self.count, **extractor_metadata(self.measure), **labels}  # what figures must share to be compared

    def read(self, source: Source) -> None:
        """Computes the features of the training images, or finds them in the cache; then no image is read whose file did not change.

        Raises:
            InputError: an image cannot be read.
        """
        images = of_source(source, self.name, self.side, channels=self.channels, key=self._key(source))
        self.reference = self.measure.sample(images)

    def _key(self, source: Source) -> str:
        """The content key of the images: as written down when their files were as they are now, else by reading them."""
        processes, cache = self.measure.processes, self.measure.cache
        state = state_of_files(source) if self.measure.process == 0 and cache.folder else None
        how = transform(self.side, self.channels)
        entry = key_of("content", state, how) if state else None
        known = gathered(lambda: [cache.get_json(entry) if entry else None], processes)[0]
        if isinstance(known, str):
            return known
        indices = range(self.measure.process, len(source), processes)
        parts = gathered(lambda: [list(content_hashes(source, indices))], processes)
        key = content_key(how, (parts[k % processes][k // processes] for k in range(len(source))))
        if entry:
            cache.put_json(entry, key)
        return key

    def figures(self, drawn: Iterator[tuple[int, Tensor]]) -> dict[str, float]:
        """Of this process's batches (number, (B, C, H, W) uint8); {} in all processes but the first."""
        sample = self.measure.joined((number, coloured(batch)) for number, batch in drawn)
        return metrics.figures(sample, self.reference, self.measure.layers) if self.measure.process == 0 else {}
