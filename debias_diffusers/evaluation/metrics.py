"""Metrics: how far one set of images is from another, by their features. Most are torch-fidelity's formulas."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from ..config import registry
from ..config.registry import FIGURES, METRICS
from ..errors import InputError, reason
from ..utils import seeding

COLOUR = "colour"
PROJECTIONS = 128  # random directions of swd


@cache
def _directions(size: int) -> Tensor:
    """(size, PROJECTIONS) float32, normal with a standard deviation of 1/sqrt(size): the same in every process."""
    return torch.randn(size, PROJECTIONS, generator=seeding.generator(0, "projections", size)) / math.sqrt(size)


# Layers that need no extractor: images (B, 3, H, W) uint8 to features (B, D).
PIXEL_LAYERS: dict[str, Callable[[Tensor], Tensor]] = {
    COLOUR: lambda images: images.float().mean((2, 3)),  # of each channel
    "projections": lambda images: images.float().flatten(1) @ _directions(images[0].numel()).to(images.device),
}
assert PIXEL_LAYERS.keys() == set(registry.PIXEL_LAYERS)
KID_SUBSET, KID_SUBSETS = 1000, 100
KID_SUBSETS_REDRAWN = 10  # of each redrawn set: there are many of those
NEIGHBOURS = 3  # of precision and recall (arXiv 1904.06991)
DENSITY_NEIGHBOURS = 5  # of density and coverage (arXiv 2002.09797)
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # of the Gaussian kernel, and what its distance is multiplied by (arXiv 2401.09603)
ROWS_AT_ONCE = 1024  # of a matrix of distances
SPLITS = 10  # of the Inception score

Statistics = dict[str, np.ndarray]  # mu (D,) and sigma (D, D)


@dataclass(frozen=True)
class Sample:
    """A set of images by its features, or only by mean and covariance of these, by layer."""

    features: Mapping[str, Tensor]  # (N, D) float32; empty where there are statistics only
    statistics: dict[str, Statistics]  # those given, and those computed, since a reference is compared with more than once
    count: int | None  # of images; None if unknown
    rows: dict[str, np.ndarray] = field(default_factory=dict)  # (N, D) with rows^T rows = sigma, of statistics computed from N < D images

    @staticmethod
    def of(features: Mapping[str, Tensor]) -> Sample:
        """Of features (N, D) by layer."""
        return Sample(features, {}, len(next(iter(features.values()))))

    @staticmethod
    def joined(parts: Sequence[Mapping[str, Tensor]]) -> Sample:
        """Of batches of features, each (B, D) by layer."""
        return Sample.of({layer: torch.cat([part[layer] for part in parts]) for layer in parts[0]})

    def moments(self, layer: str) -> Statistics:
        """Mean (D,) and covariance (D, D) of a layer, in float64.

        Raises:
            InputError: a reference of statistics has no such layer, or a single image has no covariance.
        """
        if layer in self.features and layer not in self.statistics:
            if (images := len(self.features[layer])) < 2:
                raise InputError(f"mean and covariance need at least 2 images, but there is {images}; take more")
            features = self.features[layer].double()
            self.statistics[layer] = fid_features_to_statistics(features)
            if images < features.shape[1]:
                self.rows[layer] = (features - features.mean(0)).numpy() / math.sqrt(images - 1)
        if layer not in self.statistics:
            raise InputError(
                f"the reference has statistics of {', '.join(self.statistics)}, but not of {layer}; take images, or other metrics"
            )
        return self.statistics[layer]

    def width(self, layer: str) -> int:
        """D, the number of features of a layer."""
        return self.features[layer].shape[1] if layer in self.features else len(self.moments(layer)["mu"])


def frechet(one: Statistics, other: Statistics, rows: np.ndarray | None = None) -> float:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2), the distance of two Gaussians (arXiv 1706.08500, equation 6).

    Args:
        one: mean and covariance.
        other: those it is compared with.
        rows: (N, D) float64 with rows^T rows = S1, where N < D: the trace of the root is then computed from an N x N matrix.

    Raises:
        InputError: they are of different extractors, or not finite.
    """
    if one["mu"].shape != other["mu"].shape:
        sizes = f"{len(one['mu'])} and {len(other['mu'])} features"
        raise InputError(f"target and reference have {sizes}, so of different extractors; compare features of the same one")
    try:
        if rows is not None:
            return _frechet_of_few(one, other, rows)
        return float(fid_statistics_to_metric(one, other, verbose=False)["frechet_inception_distance"])
    except np.linalg.LinAlgError as error:
        raise InputError(f"the Frechet distance of these features cannot be computed: {reason(error)}; take other images") from error


def _frechet_of_few(one: Statistics, other: Statistics, rows: np.ndarray) -> float:
    """With S1 = A^T A, the eigenvalues of S1 S2 that are not 0 are those of A S2 A^T, which is symmetric, N x N and positive."""
    product = rows @ other["sigma"] @ rows.T
    if not np.isfinite(product).all():  # which eigvalsh does not check
        raise np.linalg.LinAlgError("Array must not contain infs or NaNs")
    squares = np.linalg.eigvalsh(product)
    apart = one["mu"] - other["mu"]
    trace = np.trace(one["sigma"]) + np.trace(other["sigma"]) - 2 * np.sqrt(squares.clip(0)).sum()
    return float(apart @ apart + trace)


def as_loss(name: str, value: float) -> float:
    """A figure as a number that is the smaller, the better it is."""
    better = FIGURES[name]
    return abs(value) if better == "near 0" else -value if better == "higher" else value


def require_images(reference: Sample, layers: Mapping[str, str]) -> None:
    """Raises InputError where a metric needs images of the reference, and there are statistics only."""
    for metric, layer in layers.items():
        if METRICS[metric].reference == "images" and layer not in reference.features:
            raise InputError(f"metric {metric} compares images, but the reference is statistics; take images, or leave {metric} out")


def figures(target: Sample, reference: Sample, layers: Mapping[str, str], seed: int = 0, subsets: int = KID_SUBSETS) -> dict[str, float]:
    """All figures of a target against a reference.

    Args:
        target: features of the images.
        reference: features or statistics of those they are compared with.
        layers: the layer that each metric compares, by metric.
        seed: of the subsets of KID and the order for the Inception score.
        subsets: how many KID takes.

    Raises:
        InputError: a metric needs images of the reference, and there are statistics only.
    """
    require_images(reference, layers)
    functions = METRIC_FUNCTIONS | {"kid": partial(_kid, subsets=subsets), "kid_rbf": partial(_kid, subsets=subsets, rbf=True)}
    found: dict[str, float] = {}
    for metric, layer in layers.items():
        found |= (its := functions[metric](target, reference, layer, seed))
        assert its.keys() <= METRICS[metric].figures.keys(), f"registry.METRICS[{metric!r}] has not all of {', '.join(its)}"
    return found


def _distance(target: Sample, reference: Sample, layer: str, seed: int, name: str = "fid") -> dict[str, float]:
    # The distance is symmetric: the smaller set comes first, whose matrix is the smaller one.
    one, other = sorted((target, reference), key=lambda sample: len(sample.rows.get(layer, sample.moments(layer)["sigma"])))
    return {name: frechet(one.moments(layer), other.moments(layer), one.rows.get(layer))}


def _inception_score(target: Sample, reference: Sample, layer: str, seed: int) -> dict[str, float]:
    found = isc_features_to_metric(target.features[layer], splits=SPLITS, shuffle=True, rng_seed=seed)
    return {"is": found["inception_score_mean"], "is_std": found["inception_score_std"]}


def _kid(target: Sample, reference: Sample, layer: str, seed: int, subsets: int = KID_SUBSETS, rbf: bool = False) -> dict[str, float]:
    """`rbf`: with the Gaussian kernel of torch-fidelity, exp(-|x - y|^2 / 200), in place of the cubic polynomial."""
    one, other = target.features[layer], reference.features[layer]
    size = min(KID_SUBSET, len(one), len(other))
    subsets = 1 if size == len(one) == len(other) else subsets  # each would be all images, and their spread rounding
    found = kid_features_to_metric(
        one, other, kid_subsets=subsets, kid_subset_size=size, kid_kernel="rbf" if rbf else "poly", rng_seed=seed, verbose=False
    )
    name = "kid_rbf" if rbf else "kid"
    spread = {f"{name}_std": found["kernel_inception_distance_std"]} if subsets > 1 else {}
    return {name: found["kernel_inception_distance_mean"], **spread, **({} if rbf else {"kid_subset": size})}


def _cmmd(target: Sample, reference: Sample, layer: str, seed: int) -> dict[str, float]:
    """Of embeddings of length 1: the mean of the kernel within each set, minus twice that between them (arXiv 2401.09603)."""
    one, other = (torch.nn.functional.normalize(sample.features[layer].double(), dim=1) for sample in (target, reference))

    def mean_kernel(a: Tensor, b: Tensor) -> float:
        sums = [torch.exp(-torch.cdist(part, b).square() / (2 * CMMD_SIGMA**2)).sum() for part in a.split(ROWS_AT_ONCE)]
        return float(torch.stack(sums).sum()) / (len(a) * len(b))

    return {"cmmd": CMMD_SCALE * (mean_kernel(one, one) + mean_kernel(other, other) - 2 * mean_kernel(one, other))}


def _density_coverage(target: Sample, reference: Sample, layer: str, seed: int) -> dict[str, float]:
    """Each reference image has a ball that reaches to its fifth neighbour (arXiv 2002.09797, equations 4 and 5).

    Density is the mean number of balls that hold an image of the target, over five; coverage the share of balls that hold some.
    """
    one, other = target.features[layer], reference.features[layer]
    inside, covered = 0.0, 0
    for part in other.split(ROWS_AT_ONCE):
        radius = torch.cdist(part, other).kthvalue(DENSITY_NEIGHBOURS + 1, dim=1).values  # the first is the image itself
        within = torch.cdist(part, one) < radius[:, None]
        inside, covered = inside + within.sum().item(), covered + int(within.any(1).sum())
    return {"density": inside / (DENSITY_NEIGHBOURS * len(one)), "coverage": covered / len(other)}


def _precision_recall(target: Sample, reference: Sample, layer: str, seed: int) -> dict[str, float]:
    """With balls that reach to the third neighbour, as the ADM evaluator has them, too."""
    one, other = target.features[layer], reference.features[layer]
    found = prc_features_to_metric(one, other, prc_neighborhood=NEIGHBOURS, save_cpu_ram=True, verbose=False)
    return {"precision": found["precision"], "recall": found["recall"]}


def _colour(target: Sample, reference: Sample, layer: str, seed: int) -> dict[str, float]:
    """The colour shift (arXiv 2310.08442) of the mean over all images, and of the distribution of each image's mean.

    Both in grey values of 255; the distance is the square root of the Frechet distance, which has that unit.
    """
    one, other = target.moments(layer), reference.moments(layer)
    return {"brightness_bias": float((one["mu"] - other["mu"]).mean()), "colour_distance": max(frechet(one, other), 0.0) ** 0.5}


def _channel_bias(target: Sample, reference: Sample, layer: str, seed: int) -> dict[str, float]:
    """The mean of each channel over all images minus that of the reference, in grey values of 255."""
    away = target.moments(layer)["mu"] - reference.moments(layer)["mu"]
    return dict(zip(METRICS["channel_bias"].figures, map(float, away)))


def _swd(target: Sample, reference: Sample, layer: str, seed: int) -> dict[str, float]:
    """Root of the mean over random directions of the squared W2 distance of projections (Bonneel et al. 2015).

    A direction is normal with a variance of 1/D, so that images that are d brighter are at a distance of d on average.
    """
    one, other = target.features[layer].double().numpy(), reference.features[layer].double().numpy()
    count = min(len(one), len(other))
    places = (np.arange(count) + 0.5) / count  # at which the quantiles of equally many images are the sorted values
    apart = np.quantile(one, places, axis=0, method="hazen") - np.quantile(other, places, axis=0, method="hazen")
    return {"swd": float(np.sqrt(np.square(apart).mean()))}


def _mean(target: Sample, reference: Sample, layer: str, seed: int, name: str) -> dict[str, float]:
    return {name: float(target.features[layer].double().mean())}


# By the names of `registry.METRICS`: target, reference, layer and seed to figures.
METRIC_FUNCTIONS: dict[str, Callable[[Sample, Sample, str, int], dict[str, float]]] = {
    "fid": _distance,
    "sfid": partial(_distance, name="sfid"),
    "is": _inception_score,
    "kid": _kid,
    "kid_rbf": partial(_kid, rbf=True),
    "cmmd": _cmmd,
    "fd_dinov2": partial(_distance, name="fd_dinov2"),
    "prc": _precision_recall,
    "dc": _density_coverage,
    "colour": _colour,
    "channel_bias": _channel_bias,
    "swd": _swd,
    "prompt_accuracy": partial(_mean, name="prompt_accuracy"),
    "clip_score": partial(_mean, name="clip_score"),
}
assert METRIC_FUNCTIONS.keys() == METRICS.keys(), METRIC_FUNCTIONS.keys() ^ METRICS.keys()


def halves(sample: Sample, seed: int = 0) -> tuple[Sample, Sample] | None:
    """A random split of a set of images into two halves: their distance is what a perfect model gets with as many images.

    None if there are only statistics.
    """
    if not sample.features or sample.count is None:
        return None
    order = torch.randperm(sample.count, generator=torch.Generator().manual_seed(seed))
    cut = sample.count // 2
    parts = [Sample.of({layer: values[part] for layer, values in sample.features.items()}) for part in (order[:cut], order[cut:])]
    return parts[0], parts[1]


def redrawn(target: Sample, reference: Sample, layers: Mapping[str, str], seed: int, draw: int) -> dict[str, float]:
    """Figures of a bootstrap sample of the target's images, a function of (seed, draw)."""
    count = len(next(iter(target.features.values())))
    chosen = torch.randint(count, (count,), generator=seeding.generator(seed, "bootstrap", draw))
    again = Sample.of({layer: values[chosen] for layer, values in target.features.items()})
    return figures(again, reference, layers, seed, KID_SUBSETS_REDRAWN)


def intervals(found: Mapping[str, float], rows: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    """95% confidence intervals of figures, from those of bootstrap samples.

    They cover the randomness of the images, not that of the training. Frechet distances of bootstrap samples are too large, as images
    repeat, so the interval is centred on the figure itself.
    """
    ends = {name: np.quantile([row[name] for row in rows], (0.025, 0.5, 0.975)) for name in found}
    return {name: (value - ends[name][1] + ends[name][0], value - ends[name][1] + ends[name][2]) for name, value in found.items()}


def least_images(layers: Mapping[str, str], sample: Sample, few: bool = False) -> dict[str, int]:
    """The minimum number of images of each metric, on both sides; the number of features is that of `sample`.

    Without `few`, metrics of statistics need one more than there are features: fewer give a singular covariance, and with it a
    distance that means little.
    """
    return {
        metric: METRICS[metric].min_images if few or METRICS[metric].reference != "statistics" else sample.width(layer) + 1
        for metric, layer in layers.items()
    }
