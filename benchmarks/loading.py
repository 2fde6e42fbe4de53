"""Images per second that the loader gives when nobody else computes, by number of workers, and with its images kept decoded.

    python benchmarks/loading.py [--resolutions 32 256 512] [--workers 0 1 2 4] [--seconds 4] [--json FILE]

Made-up pictures: PNG at 32 pixels, JPEG at 256. "first" is the first epoch, in which every image is decoded; "kept" the epochs
after it, where all of them fit into `--cache_images_mb`; "decoded each time" is with that off. All have their noise drawn. The
machine's cores do nothing else meanwhile, so on a CPU that also trains a loader gives less.

With 512 a second table follows: JPEGs of 512 pixels (quality 90, with noise as of a photograph) for a network of 128 pixels, decoded
each time as they are and with `--jpeg_draft`, one after the other in each of five rounds, of which the median ratio is given.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from training import make_images

from debias_diffusers.config.schema.data import DataConfig
from debias_diffusers.data.dataset import PositionBatchSampler, TrainingData, micro_batches
from debias_diffusers.data.sources.opening import open_source

BATCH = 16


def rate(config: DataConfig, seconds: float, skip_epochs: int) -> float:
    """Images per second from the loader, after some epochs."""
    data = TrainingData(open_source(config), config, seed=0)
    skipped = skip_epochs * len(data.source) // BATCH + 2 * config.num_workers + 2
    loader = micro_batches(data, PositionBatchSampler(BATCH, BATCH, 0, 1, range(10**7)), pin_memory=False)
    for _ in range(skipped):
        next(loader)
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds and (skip_epochs or count + skipped < len(data.source) // BATCH):
        next(loader)
        count += 1
    return BATCH * count / (time.perf_counter() - begun)


def rates(folder: str, resolution: int, workers: int, seconds: float) -> dict[str, float]:
    """The columns of one row."""
    usual: dict[str, Any] = {"dataset": f"{folder}/{resolution}", "resolution": resolution, "num_workers": workers, "random_flip": True}
    return {
        "first": rate(DataConfig(**usual), seconds, 0),
        "kept": rate(DataConfig(**usual), seconds, 1),
        "decoded each time": rate(DataConfig(**usual, cache_images_mb=0), seconds, 1),
    }


def make_photographs(folder: Path, count: int = 256, side: int = 512) -> None:
    """Made-up JPEGs, smooth but for noise, so that they have about the bytes of photographs."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(count):
        small = Image.fromarray(generator.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
        smooth = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC), dtype=float)
        noisy = (smooth + generator.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number:04d}.jpg", quality=90)


def drafted(folder: Path, workers: int, seconds: float) -> dict[str, float]:
    """Images per second without and with `--jpeg_draft`, and the median ratio."""
    usual: dict[str, Any] = {"dataset": str(folder), "resolution": 128, "num_workers": workers, "cache_images_mb": 0}
    rounds = [[rate(DataConfig(**usual, jpeg_draft=draft), seconds / 2, 1) for draft in (False, True)] for _ in range(5)]
    plain, draft = (statistics.median(column) for column in zip(*rounds))
    return {"as they are": plain, "jpeg_draft": draft, "ratio": statistics.median(fast / slow for slow, fast in rounds)}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolutions", type=int, nargs="+", choices=(32, 256, 512), default=[32, 256, 512])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--json", help="write all figures to this file")
    options = parser.parse_args()
    rows = []
    print("| resolution | workers | first | kept | decoded each time |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder))
        for resolution in (side for side in options.resolutions if side < 512):
            for workers in options.workers:
                row = rates(folder, resolution, workers, options.seconds)
                rows.append({"resolution": resolution, "workers": workers, **row})
                print(f"| {resolution} | {workers} | {' | '.join(f'{value:.0f}' for value in row.values())} |", flush=True)
        if 512 in options.resolutions:
            print("\n| JPEG to pixels | workers | as they are | jpeg_draft | ratio |\n|---|---|---|---|---|")
            make_photographs(Path(folder) / "512")
            for workers in options.workers:
                row = drafted(Path(folder) / "512", workers, options.seconds)
                rows.append({"resolution": 512, "workers": workers, **row})
                print(f"| 512 to 128 | {workers} | {row['as they are']:.0f} | {row['jpeg_draft']:.0f} | {row['ratio']:.2f} |", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
