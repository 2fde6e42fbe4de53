"""Images a second of a whole evaluation, beside what its feature extractor does alone on images that lie in memory.

    python benchmarks/evaluation.py [--images 64] [--side 256]

Each row takes the features for fid, sfid, is, kid and prc in one pass, as `eval.py score` does, from a folder of PNG or an
`.npz`, which are first hashed for the cache. Inception-v3 has random weights, whose time is the same; the digits' classifier
is so small that decoding is all there is to do. Rounds alternate with the extractor's own; prints medians as a table in Markdown.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from debias_diffusers.config.schema.data import DIGITS, DataConfig
from debias_diffusers.config.schema.evaluation import MeasureConfig
from debias_diffusers.data.sources.folder import ImageFolder
from debias_diffusers.data.sources.opening import open_source
from debias_diffusers.evaluation.feature_extractors import INCEPTION
from debias_diffusers.evaluation.image_sets import images_of_folder, images_of_npz
from debias_diffusers.evaluation.measure import Measure
from debias_diffusers.sampling.job import MAX_BATCH


def measures(device: str) -> dict[str, Measure]:
    """By extractor, without a cache."""
    fetch = "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url"
    with patch(fetch, lambda *_, **__: {}), patch.object(FeatureExtractorInceptionV3, "load_state_dict"):
        inception = Measure(MeasureConfig(metrics="fid,sfid,is,kid,prc", cache_dir=""), INCEPTION, device)
    return {INCEPTION: inception, DIGITS: Measure(MeasureConfig(metrics="fid,is,kid,prc", cache_dir=""), DIGITS, device)}


def images(count: int, side: int) -> np.ndarray:
    """(N, H, W, 3) uint8: smooth fields with some noise, which PNG packs about as it packs photographs."""
    draw = np.random.default_rng(0)
    coarse = draw.integers(0, 255, (count, side // 8, side // 8, 3)).astype(np.uint8)
    large = np.stack([np.asarray(Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC)) for one in coarse])
    noisy = large.astype(np.int16) + draw.integers(-4, 5, large.shape)
    return noisy.clip(0, 255).astype(np.uint8)


def seconds(work: Callable[[], object]) -> float:
    """Of one call, the device's work included."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def alone(measure: Measure, batches: list[Tensor]) -> None:
    """The extractor on images in memory."""
    for batch in batches:
        measure.features(batch)


def from_folder(measure: Measure, folder: Path) -> None:
    """As `score` takes a folder."""
    source = open_source(DataConfig(dataset=str(folder)))
    assert isinstance(source, ImageFolder)
    measure.sample(images_of_folder(source, str(folder)))


def from_npz(measure: Measure, path: Path) -> None:
    """As `score` takes an `.npz`."""
    measure.sample(images_of_npz(path))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{where}, torch {torch.__version__}, {options.images} images of {options.side} pixels a side\n")
    print("| extractor | alone, images/s | folder of PNG | `.npz` |\n|---|---|---|---|")
    array = images(options.images, options.side)
    with tempfile.TemporaryDirectory() as place:
        folder, packed = Path(place) / "images", Path(place) / "images.npz"
        folder.mkdir()
        for k, one in enumerate(array):
            Image.fromarray(one).save(folder / f"{k:06d}.png")
        np.savez(packed, arr_0=array)
        for name, measure in measures(device).items():
            batches = list(torch.from_numpy(array).permute(0, 3, 1, 2).contiguous().split(MAX_BATCH))
            works = (partial(alone, measure, batches), partial(from_folder, measure, folder), partial(from_npz, measure, packed))
            for work in works:
                work()
            rounds = [[options.images / seconds(work) for work in works] for _ in range(options.rounds)]
            rates = [statistics.median(rates) for rates in zip(*rounds)]
            shares = (f"{rate:.1f} ({statistics.median(turn[k] / turn[0] for turn in rounds):.0%})" for k, rate in enumerate(rates) if k)
            print(f"| {name} | {rates[0]:.1f} | {' | '.join(shares)} |")


if __name__ == "__main__":
    main()
