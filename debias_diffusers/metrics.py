"""Features to figures: how far one set of images is from another. torch-fidelity's formulas; sFID and colour are ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from .errors import InputError

COLOUR = "colour"  # the layer of means of an image's channels
KID_SUBSET = 1000
NEIGHBOURS = 3  # of precision and recall (arXiv 1904.06991)
HIGHER_IS_BETTER = {"is", "precision", "recall"}
LEAST_HALVED = 2 * (NEIGHBOURS + 1)

Statistics = dict[str, np.ndarray]  # mu (D,) and sigma (D, D)


@dataclass(frozen=True)
class Sample:
    """What is known of a set of images: features, or only their statistics, by layer."""

    features: Mapping[str, Tensor]  # (N, D) float32; empty where there are statistics only
    statistics: dict[str, Statistics]  # those given, and those worked out: a reference is compared with more than once
    count: int | None  # of images; None where nobody wrote it down

    @staticmethod
    def of(features: Mapping[str, Tensor]) -> Sample:
        """A set of images that is there."""
        return Sample(features, {}, len(next(iter(features.values()))))

    @staticmethod
    def joined(parts: Sequence[Mapping[str, Tensor]]) -> Sample:
        """A set of images whose features come in batches."""
        return Sample.of({layer: torch.cat([part[layer] for part in parts]) for layer in parts[0]})

    def moments(self, layer: str) -> Statistics:
        """Mean and covariance of a layer, in float64.

        Raises:
            InputError: a reference of statistics has no such layer.
        """
        if layer in self.features and layer not in self.statistics:
            self.statistics[layer] = fid_features_to_statistics(self.features[layer].double())
        if layer not in self.statistics:
            raise InputError(
                f"the reference has statistics of {', '.join(self.statistics)}, but not of {layer}; take images, or other metrics"
            )
        return self.statistics[layer]


def frechet(one: Statistics, other: Statistics) -> float:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2), the distance of two Gaussians (arXiv 1706.08500, equation 6)."""
    if one["mu"].shape != other["mu"].shape:
        raise InputError(f"the target has {len(one['mu'])} features, the reference {len(other['mu'])}; they are of different extractors")
    return float(fid_statistics_to_metric(one, other, verbose=False)["frechet_inception_distance"])


def figures(target: Sample, reference: Sample, layers: Mapping[str, str], seed: int = 0) -> dict[str, float]:
    """All figures of a target against a reference.

    Args:
        target: features of the images.
        reference: features or statistics of those they are compared with.
        layers: the layer that each metric compares, by metric: fid, sfid, is, kid, prc, colour.
        seed: of the subsets of KID and the order for the Inception score.

    Raises:
        InputError: a metric needs images of the reference, and there are statistics only.
    """
    found: dict[str, float] = {}
    for metric, layer in layers.items():
        if metric in ("kid", "prc") and layer not in reference.features:
            raise InputError(f"metric {metric} compares images, but the reference is statistics; take images, or leave {metric} out")
        found |= _FIGURES[metric](target, reference, layer, seed)
    return found


def _distance(name: str, target: Sample, reference: Sample, layer: str, seed: int) -> dict[str, float]:
    return {name: frechet(target.moments(layer), reference.moments(layer))}


def _inception_score(target: Sample, reference: Sample, layer: str, seed: int) -> dict[str, float]:
    found = isc_features_to_metric(target.features[layer], splits=10, shuffle=True, rng_seed=seed)
    return {"is": found["inception_score_mean"], "is_std": found["inception_score_std"]}


def _kid(target: Sample, reference: Sample, layer: str, seed: int) -> dict[str, float]:
    one, other = target.features[layer], reference.features[layer]
    size = min(KID_SUBSET, len(one), len(other))
    found = kid_features_to_metric(one, other, kid_subset_size=size, rng_seed=seed, verbose=False)
    return {"kid": found["kernel_inception_distance_mean"], "kid_std": found["kernel_inception_distance_std"], "kid_subset": size}


def _precision_recall(target: Sample, reference: Sample, layer: str, seed: int) -> dict[str, float]:
    """With balls that reach to the third neighbour, as the ADM evaluator has them, too."""
    one, other = target.features[layer], reference.features[layer]
    if min(len(one), len(other)) <= NEIGHBOURS:
        raise InputError(f"metric prc needs more than {NEIGHBOURS} images on both sides; take more, or leave prc out")
    found = prc_features_to_metric(one, other, prc_neighborhood=NEIGHBOURS, save_cpu_ram=True, verbose=False)
    return {"precision": found["precision"], "recall": found["recall"]}


def _colour(target: Sample, reference: Sample, layer: str, seed: int) -> dict[str, float]:
    """The colour shift that the paper speaks of: of the mean over all images, and of the distribution of each image's mean.

    Both in grey levels of 255; the distance is the root of Frechet's, which has that unit.
    """
    one, other = target.moments(layer), reference.moments(layer)
    return {"brightness_bias": float((one["mu"] - other["mu"]).mean()), "colour_distance": max(frechet(one, other), 0.0) ** 0.5}


_FIGURES: dict[str, Any] = {
    "fid": partial(_distance, "fid"),
    "sfid": partial(_distance, "sfid"),
    "is": _inception_score,
    "kid": _kid,
    "prc": _precision_recall,
    "colour": _colour,
}


def halves(sample: Sample, seed: int = 0) -> tuple[Sample, Sample] | None:
    """A set of images cut in two at random: how far they are apart is what a perfect model of as many images would get.

    None of statistics, and of too few images.
    """
    if not sample.features or sample.count is None or sample.count < LEAST_HALVED:
        return None
    order = torch.randperm(sample.count, generator=torch.Generator().manual_seed(seed))
    cut = sample.count // 2
    parts = [Sample.of({layer: values[part] for layer, values in sample.features.items()}) for part in (order[:cut], order[cut:])]
    return parts[0], parts[1]


def interval(
    target: Sample, reference: Sample, layers: Mapping[str, str], draws: int, seed: int = 0, level: float = 0.95
) -> dict[str, tuple[float, float]]:
    """Where each figure lies in `level` of the cases when the images of the target are drawn again from themselves (bootstrap).

    It tells of the chance in the images, not in the training; Frechet distances of redrawn images are too large by the repetitions
    among them, so the interval is moved to the middle of the figure itself.
    """
    assert target.count is not None
    found = figures(target, reference, layers, seed)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(draws):
        chosen = torch.randint(target.count, (target.count,), generator=generator)
        rows.append(figures(Sample.of({layer: values[chosen] for layer, values in target.features.items()}), reference, layers, seed))
    low, high = (1 - level) / 2, (1 + level) / 2
    ends = {name: np.quantile([row[name] for row in rows], (low, 0.5, high)) for name in found}
    return {name: (value - ends[name][1] + ends[name][0], value - ends[name][1] + ends[name][2]) for name, value in found.items()}


def least_images(layers: Mapping[str, str], target: Sample) -> int:
    """Fewer give a singular covariance, and with it a distance that means little: one more than the features have numbers."""
    widths = [target.features[layer].shape[1] for metric, layer in layers.items() if metric in ("fid", "sfid", "colour")]
    return max(widths, default=0) + 1
