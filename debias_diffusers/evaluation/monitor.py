"""Evaluation during training: metrics of samples of the EMA weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from ..config.loading import is_text
from ..config.schema.evaluation import MeasureConfig
from ..config.schema.training import TrainConfig
from ..data.sources.base import Source, file_state_hash
from ..data.sources.subset import RepeatedSource
from ..data.validation_split import held_out_images
from ..errors import InputError
from ..utils.distributed import gather_from_all
from . import metrics
from .feature_cache import cache_key
from .image_sets import content_hashes, content_key, images_of_source, to_rgb, transform_name
from .measure import Measure, extractor_metadata, usual_extractor

DEFAULT_EVAL_IMAGES = 1000  # of an evaluation during training


class Monitor:
    """Computes metrics of samples against the training images, distributed over all processes."""

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
        extractor = chosen.feature_extractor or usual_extractor(self.name, chosen.eval_metrics)
        self.measure = Measure(measure, extractor, device, process, processes, config.text.clip_model)
        least = max(metrics.least_images(self.measure.layers, self.measure.probe()).values())
        self.count = wanted or max(DEFAULT_EVAL_IMAGES, least)
        trained = len(source) - held_out_images(data.validation_split, len(source))  # which are what samples are compared with
        if (fewest := min(self.count, trained)) < least:
            more = "take more --eval_images" if fewest < trained else "no more are trained: take other --eval_metrics"
            raise InputError(f"eval_metrics {chosen.eval_metrics} need {least} images, but there are {fewest}; {more}")
        labels = {"class_labels": "data"} if source.class_names else {}
        # Only figures with equal values of these are comparable.
        guidance = {"guidance_scale": config.text.sample_guidance_scale} if is_text(config) else {}
        self.about = {"images": self.count, **extractor_metadata(self.measure), **labels, **guidance}

    def read(self, source: Source) -> None:
        """Computes the features of the training images or reads them from the cache. Unchanged files are not read again.

        Raises:
            InputError: an image cannot be read.
        """
        images = images_of_source(source, self.name, self.side, channels=self.channels, key=self._key(source))
        self.reference = self.measure.sample(images)

    def _key(self, source: Source) -> str:
        """The content key of the images: from the cache if their files are unchanged, else by reading them."""
        processes, cache = self.measure.processes, self.measure.cache
        state = file_state_hash(source) if self.measure.process == 0 and cache.folder else None
        how = transform_name(self.side, self.channels)
        repeated = map(str, source.indices) if isinstance(source, RepeatedSource) else ()  # of which files and fingerprint say nothing
        entry = cache_key("content", state, how, *repeated) if state else None
        known = gather_from_all(lambda: [cache.get_json(entry) if entry else None], processes)[0]
        if isinstance(known, str):
            return known
        indices = range(self.measure.process, len(source), processes)
        parts = gather_from_all(lambda: [list(content_hashes(source, indices))], processes)
        key = content_key(how, (parts[k % processes][k // processes] for k in range(len(source))))
        if entry:
            cache.put_json(entry, key)
        return key

    def check(self, prompts: Sequence[str]) -> None:
        """Raises InputError for prompts that a metric cannot judge."""
        for scorer in self.measure.of_prompts.values():
            scorer.check(prompts)

    def figures(self, drawn: Iterator[tuple[int, Tensor, Sequence[Any] | None]]) -> dict[str, float]:
        """The metrics of samples; {} in all processes but the first.

        `drawn` yields this process's batches: number, images (B, C, H, W) uint8, and their B conditions, which are prompts where a metric
        needs them.
        """
        sample = self.measure.joined((number, to_rgb(batch), conditions) for number, batch, conditions in drawn)
        return metrics.figures(sample, self.reference, self.measure.layers) if self.measure.process == 0 else {}
