"""Images per second that the loader gives when nobody else computes, by number of workers, and with its images kept decoded.

    python benchmarks/loading.py [--resolutions 32 256] [--workers 0 1 2 4] [--seconds 4] [--json FILE]

Made-up pictures: PNG at 32 pixels, JPEG at 256. "first" is the first epoch, in which every image is decoded; "kept" the epochs
after it, where all of them fit into `--cache_images_mb`; "decoded each time" is with that off. All have their noise drawn. The
machine's cores do nothing else meanwhile, so on a CPU that also trains a loader gives less.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from training import make_images

from debias_diffusers.config.schema import DataConfig
from debias_diffusers.data.dataset import PositionBatches, TrainingData, micro_batches
from debias_diffusers.data.sources import open_source

BATCH = 16


def rate(config: DataConfig, seconds: float, skip_epochs: int) -> float:
    """Images per second from the loader, after some epochs."""
    data = TrainingData(open_source(config), config, seed=0)
    skipped = skip_epochs * len(data.source) // BATCH + 2 * config.num_workers + 2
    loader = micro_batches(data, PositionBatches(BATCH, BATCH, 0, 1, range(10**7)), pin_memory=False)
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


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolutions", type=int, nargs="+", choices=(32, 256), default=[32, 256])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--json", help="write all figures to this file")
    options = parser.parse_args()
    rows = []
    print("| resolution | workers | first | kept | decoded each time |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder))
        for resolution in options.resolutions:
            for workers in options.workers:
                row = rates(folder, resolution, workers, options.seconds)
                rows.append({"resolution": resolution, "workers": workers, **row})
                print(f"| {resolution} | {workers} | {' | '.join(f'{value:.0f}' for value in row.values())} |", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
