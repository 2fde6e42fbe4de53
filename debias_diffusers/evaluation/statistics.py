"""`eval.py stats`: mean and covariance of the features of a reference in a file, to score against without its images."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError

from ..config.schema.evaluation import StatsConfig
from ..data.sources.opening import open_source
from ..errors import InputError, reason
from ..utils.console import say
from ..utils.distributed import inference_accelerator
from ..utils.files import read_file, require_replaceable, write_file
from .feature_extractors import SPATIAL
from .image_sets import (
    read_npz_statistics,
)
from .measure import Measure, extractor_metadata, make_measure, statistics_metadata
from .metrics import Sample, Statistics
from .reference import open_reference, pinned_data, print_summary, reference_data

# ---- writing ---------------------------------------------------------------------------------------------------------


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
