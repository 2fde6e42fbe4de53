"""What `eval.py score` compares with: features of a reference, or their mean and covariance in a file, which `eval.py stats` writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError

from ..config.registry import METRICS
from ..config.schema.evaluation import StatsConfig
from ..data.sources.opening import open_source
from ..errors import InputError, reason
from ..utils.console import say
from ..utils.distributed import inference_accelerator, told_by_the_first
from ..utils.files import read_file, require_replaceable, write_file
from ..utils.torch_errors import explained_torch_errors
from . import metrics
from .feature_extractors import INCEPTION, SPATIAL
from .image_sets import holds_images, npz_shape, read_npz_statistics
from .measure import Measure, extractor_metadata, make_measure, statistics_metadata
from .metrics import Sample, Statistics
from .reference import open_reference, pinned_data, print_summary, reference_data, require_npz_side

# ---- writing ---------------------------------------------------------------------------------------------------------


@told_by_the_first()
def stats(config: StatsConfig) -> None:
    """Writes mean and covariance of the features of each layer of a reference, with metadata.

    Raises:
        InputError: the reference cannot be read.
    """
    accelerator = inference_accelerator(config.measure.num_threads)
    if accelerator.is_main_process:
        require_replaceable("out", Path(config.out), _is_of_stats)
    config = dataclasses.replace(config, reference=pinned_data(config.reference, accelerator))
    measure = make_measure(config.measure, config.reference, accelerator)
    if Path(config.reference).suffix != ".npz":
        print_summary(open_source(reference_data(config.measure, config.reference)), config.reference, accelerator)
    images = open_reference(config.reference, config.measure, config.measure.resolution)
    with explained_torch_errors("--batch_size", measure.batch_size(images)):
        sample = measure.sample(images)
    if not accelerator.is_main_process:
        return
    tensors = {f"{layer}/{name}": torch.from_numpy(value) for layer in sample.features for name, value in sample.moments(layer).items()}
    about = {"reference": config.reference, "images": str(sample.count), "resolution": str(images.side), **extractor_metadata(measure)}
    write_file(Path(config.out), safetensors.torch.save(tensors, metadata=about))
    say(f"statistics of {sample.count} images of {images.side} pixels in {config.out}")


def _is_of_stats(path: Path) -> bool:
    try:
        return statistics_metadata(path).keys() >= {"reference", "images", "resolution"}
    except InputError:
        return False


def read_statistics(path: Path, measure: Measure, side: int | None) -> Sample:
    """Reads a file of `stats`. `side`: the resolution of the targets in pixels, if known.

    Raises:
        InputError: it cannot be read, or was made with another extractor or resolution.
    """
    about = statistics_metadata(path)
    try:
        tensors = safetensors.torch.load(read_file(path))
        layers = {name.rsplit("/", 1)[0] for name in tensors}
        found = {layer: {name: tensors[f"{layer}/{name}"].double().numpy() for name in ("mu", "sigma")} for layer in layers}
        images = int(about["images"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"reference {path} is not a file of eval.py stats: {reason(error)}") from error
    ours = extractor_metadata(measure) | ({"resolution": str(side)} if side else {})
    if other := [f"{name} {about.get(name)}, not {value}" for name, value in ours.items() if about.get(name) != value]:
        raise InputError(f"reference {path} was made with {'; '.join(other)}; create it again")
    return Sample({}, _sound(path, found), images)


def npz_statistics(path: Path) -> dict[str, Statistics]:
    """The statistics in an `.npz` of ADM by layer of Inception-v3: mean `mu` (D,) and covariance `sigma` (D, D)."""
    found = read_npz_statistics(path)
    pairs = {"2048": {"mu": "mu", "sigma": "sigma"}, SPATIAL: {"mu": "mu_s", "sigma": "sigma_s"}}
    given = {layer: {name: found[key] for name, key in pair.items() if key in found} for layer, pair in pairs.items()}
    return _sound(path, {layer: pair for layer, pair in given.items() if pair})


def _sound(path: Path, statistics: dict[str, Statistics]) -> dict[str, Statistics]:
    """Returns statistics after a check of their shapes.

    Raises:
        InputError: a layer lacks a finite mean (D,) or covariance (D, D).
    """
    for layer, pair in statistics.items():
        mu, sigma = pair.get("mu", np.zeros(())), pair.get("sigma", np.zeros(()))
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise InputError(
                f"reference {path} has for layer {layer} mu of {mu.shape} and sigma of {sigma.shape}, but must have finite numbers, "
                f"(D,) and (D, D); create it again"
            )
    return statistics


# ---- what targets are compared with ----------------------------------------------------------------------------------


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
