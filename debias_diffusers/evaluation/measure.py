"""Features of sets of images, and the metrics that follow from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from ..config.prompts import prompts_hash
from ..config.registry import METRICS
from ..config.schema.data import EMBEDDED
from ..config.schema.evaluation import MeasureConfig
from ..errors import InputError, reason
from ..utils.distributed import gather_from_all
from .feature_cache import cache_key, open_cache
from .feature_extractors import INCEPTION, Extractor, prompt_scorer
from .image_sets import ImageSet
from .metrics import COLOUR, PIXEL_LAYERS, Sample


class Measure:
    """An extractor with its cache, and everything that is the same for all sets of images."""

    def __init__(
        self, config: MeasureConfig, extractor: str, device: Any, process: int = 0, processes: int = 1, clip_model: str | None = None
    ) -> None:
        """Loads the extractor onto a device. Of several processes, each computes its share, and all know the result."""
        wanted = config.metrics.split(",")
        by_features = [metric for metric in wanted if METRICS[metric].by_features]
        self.of_prompts = {metric: prompt_scorer(metric, clip_model, device) for metric in wanted if METRICS[metric].of_prompts}
        self.config, self.device, self.process, self.processes = config, device, process, processes
        self.extractor = Extractor(extractor, by_features, config.feature_extractor_weights) if by_features else None
        if self.extractor:
            self.extractor.network.to(device)
        layers = self.extractor.layers if self.extractor else {}
        self.layers = {metric: layers.get(metric) or str(METRICS[metric].layer) for metric in wanted}
        # The first versions kept the colours of all images, and their features are still in caches.
        self.pixel_layers = sorted({COLOUR, *self.layers.values()} & PIXEL_LAYERS.keys())
        self.cache = open_cache(config.cache_dir)

    def probe(self) -> Sample:
        """The features of one black image: how many there are in each layer decides how many images the metrics need."""
        return Sample.of(self.features(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)))

    def sample(self, images: ImageSet) -> Sample:
        """The features of a set, computed over all processes in one pass for all metrics, or read from the cache."""
        prompts = images.prompts if self.of_prompts else None
        key = self._key(images.key, prompts) if images.key else None
        if key and (found := self._kept(key, images.count, prompts is not None)):
            return Sample.of(found)
        share = -(-images.count // self.processes)
        with tqdm(total=share, desc=images.name, unit="image", leave=False, disable=self.process > 0) as progress:
            size = self.batch_size(images)
            batches = images.batches(size, self.process, self.processes)
            sample = self.joined(_with_prompts(batches, size, prompts), progress)
        if key and self.process == 0:
            self.cache.put(key, sample.features)
        return sample

    def batch_size(self, images: ImageSet) -> int:
        """Images of a set whose features are computed at a time."""
        return min(self.config.batch_size or images.batch_size, images.count)

    def joined(self, batches: Iterator[tuple[int, Tensor, Sequence[str] | None]], progress: Any = None) -> Sample:
        """The features of all processes' batches, in the order of their numbers.

        `batches` yields the number of a batch, its images (B, 3, H, W) uint8 and, for metrics of prompts, their B prompts.

        Raises:
            Exception: what any process met, in all of them.
        """

        def share() -> Iterator[tuple[int, dict[str, Tensor]]]:
            for number, batch, prompts in batches:
                yield number, self.features(batch, prompts)
                if progress is not None:
                    progress.update(len(batch))

        return Sample.joined([part for _, part in sorted(gather_from_all(lambda: list(share()), self.processes), key=lambda pair: pair[0])])

    def features(self, batch: Tensor, prompts: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Of a batch (B, 3, H, W) uint8, and of their B prompts where there are some: (B, D) by layer."""
        found = self.extractor(batch.to(self.device)) if self.extractor else {}
        if prompts is not None:
            found |= {layer: scorer(batch.to(self.device), prompts) for layer, scorer in self.of_prompts.items()}
        return found | {layer: PIXEL_LAYERS[layer](batch).cpu() for layer in self.pixel_layers}

    def _key(self, of_images: str, prompts: Sequence[str] | None) -> str:
        """Of content and transform, layers of pixels, extractor and weights, and of prompts."""
        parts = [of_images, *(layer for layer in self.pixel_layers if layer != COLOUR)]
        if self.extractor:
            parts += [self.extractor.name, self.extractor.weights_sha256, *sorted(self.extractor.layers.values())]
        if prompts is not None:
            parts += [prompts_hash(prompts), *(f"{layer} {scorer.key}" for layer, scorer in sorted(self.of_prompts.items()))]
        return cache_key(*parts)

    def _kept(self, key: str, count: int, of_prompts: bool) -> dict[str, Tensor] | None:
        """Features of the cache, where all processes find them: if one computed alone, it would wait for ever."""
        found = self.cache.get(key)
        layers = {layer for metric, layer in self.layers.items() if of_prompts or metric not in self.of_prompts}
        there = found is not None and _are_sound(found, {COLOUR, *layers}, count)
        everywhere = all(gather_object([there])) if self.processes > 1 else there
        return found if everywhere else None


def _with_prompts(
    batches: Iterator[tuple[int, Tensor]], size: int, prompts: Sequence[str] | None
) -> Iterator[tuple[int, Tensor, Sequence[str] | None]]:
    """Batches of `size` images with their prompts."""
    for number, batch in batches:
        yield number, batch, prompts[number * size : number * size + len(batch)] if prompts else None


def _are_sound(found: Mapping[str, Tensor], layers: set[str], count: int) -> bool:
    """Whether features of a cache are those of so many images; if not, they are computed again."""
    return found.keys() == layers and all(v.ndim == 2 and len(v) == count and bool(v.isfinite().all()) for v in found.values())


def usual_extractor(reference: str, metrics: str) -> str:
    """What images are compared by where nothing is said: as a metric says, or what statistics were made with, else by the data."""
    if extractor := extractor_of_metrics(metrics):
        return extractor
    if Path(reference).suffix == ".safetensors" and (made_with := statistics_metadata(Path(reference)).get("extractor")):
        return made_with
    return reference if reference in EMBEDDED else INCEPTION


def extractor_metadata(measure: Measure) -> dict[str, str]:
    return {"extractor": measure.extractor.name, "weights_sha256": measure.extractor.weights_sha256} if measure.extractor else {}


def statistics_metadata(path: Path) -> dict[str, str]:
    """What a file of statistics says of itself."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"reference {path} cannot be read as a file of eval.py stats: {reason(error)}") from error


def extractor_of_metrics(metrics: str) -> str | None:
    """That of a metric which is named after it; None where there is none."""
    own = (METRICS[metric].extractor for metric in metrics.split(","))
    return next((extractor for extractor in own if extractor not in (None, INCEPTION)), None)


def make_measure(config: MeasureConfig, reference: str, accelerator: Accelerator, clip_model: str | None = None) -> Measure:
    extractor = config.feature_extractor or usual_extractor(reference, config.metrics)
    return Measure(config, extractor, accelerator.device, accelerator.process_index, accelerator.num_processes, clip_model)
