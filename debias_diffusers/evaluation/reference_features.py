"""The features or statistics of a reference, which the targets of `eval.py score` are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..config.registry import METRICS
from ..data.sources.opening import open_source
from ..errors import InputError
from . import metrics
from .feature_extractors import INCEPTION
from .image_sets import holds_images, npz_shape
from .measure import Measure
from .metrics import Sample
from .reference import open_reference, reference_data, require_npz_side
from .statistics import npz_statistics, read_statistics


class NoReference:
    """What stands for the reference where no metric compares with one."""

    known: Mapping[int | None, Sample]

    def __init__(self) -> None:
        self.known = {}

    def sample(self, side: int | None) -> Sample:
        """Nothing."""
        return Sample({}, {}, None)

    def require(self, side: int | None) -> None:
        """Anything goes."""

    def count(self) -> int | None:
        """Unknown."""
        return None


class ReferenceFeatures:
    """The reference, at each resolution of the targets."""

    def __init__(self, name: str, measure: Measure, allow_few_images: bool) -> None:
        self.name, self.measure, self.allow_few_images = name, measure, allow_few_images
        self.known: dict[int | None, Sample] = {}
        self.path, self.npz = Path(name), Path(name).suffix == ".npz"
        self.statistics = self.path.suffix == ".safetensors" or (self.npz and not holds_images(self.path))
        self.side = npz_shape(self.path)[1] if self.npz and not self.statistics else None  # None: of its targets
        # ADM's files have statistics of a whole data set and 10,000 of its images; its evaluator uses the statistics.
        of_inception = measure.extractor is not None and measure.extractor.name == INCEPTION
        self.has_statistics = self.statistics or (self.npz and of_inception)

    def sample(self, side: int | None) -> Sample:
        """Features or statistics of the reference for targets of `side` pixels; None for its own resolution."""
        side = self.measure.config.resolution or side or self.side
        if side not in self.known:
            found = self._statistics(side) if self.statistics else self._images(side)
            metrics.require_images(found, self.measure.layers)
            # The Inception score needs no reference, and the statistics in a file may be of more images than the file has.
            given = found.statistics if found.features else {}
            own = {
                m: layer
                for m, layer in self.measure.layers.items()
                if METRICS[m].reference != "nothing" and not (METRICS[m].reference == "statistics" and layer in given)
            }
            require_enough(self.name, found.count, own, found, self.allow_few_images)
            self.known[side] = found
        return self.known[side]

    def require(self, side: int | None) -> None:
        """Raises InputError where a reference in one file is not of the resolution of targets of `side` pixels; computes no features."""
        side = self.measure.config.resolution or side or self.side
        if self.statistics:
            self._statistics(side)
        elif self.npz:
            require_npz_side(self.name, side)

    def _images(self, side: int | None) -> Sample:
        sample = self.measure.sample(open_reference(self.name, self.measure.config, side))
        if self.has_statistics:
            sample.statistics.update(npz_statistics(self.path))
        return sample

    def count(self) -> int | None:
        """The number of reference images, if known; computes no features."""
        if self.statistics:
            return self._statistics(None).count
        return npz_shape(self.path)[0] if self.npz else len(open_source(reference_data(self.measure.config, self.name)))

    def _statistics(self, side: int | None) -> Sample:
        return Sample({}, npz_statistics(self.path), None) if self.npz else read_statistics(self.path, self.measure, side)


def require_enough(name: str, count: int | None, layers: Mapping[str, str], like: Sample, few: bool) -> None:
    """Raises InputError for too few images, before any is sampled or read. An unknown count (None) passes."""
    lacking = {metric: least for metric, least in metrics.least_images(layers, like, few).items() if count is not None and count < least}
    if lacking:
        would_do = count is not None and count >= max(METRICS[metric].min_images for metric in lacking)
        raise InputError(
            f"{name} has {count} images, but metrics {','.join(lacking)} of these features need {max(lacking.values())}; take more, or "
            + ("add --allow_few_images" if would_do else "other metrics")
        )
