"""Images per second from shards on this disk, and from the same shards on a server: fetched, and as the cache then has them.

    python benchmarks/remote_shards.py [--shards 16] [--images 64] [--window 4] [--workers 2] [--rounds 5] [--json FILE]

Made-up JPEGs of 256 pixels in .tar files, of which one epoch is loaded in windows, each image decoded and with its noise drawn. The
server is that of Python's standard library on the loopback, in a process of its own, so that the connection costs no time but the copying
does. Each round measures all three, one after the other; the table has the medians, and the median ratio to the local files.
"""

import argparse
import io
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from debias_diffusers.config.schema.data import DataConfig
from debias_diffusers.data.dataset import PositionBatchSampler, TrainingData, micro_batches
from debias_diffusers.data.sources.opening import open_source

BATCH, SIDE = 16, 256


def make_shards(folder: Path, shards: int, images: int) -> None:
    """Tar files of JPEGs with noise, so that they have about the bytes of photographs."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:04d}.tar", "w") as archive:
            for number in range(images):
                small = Image.fromarray(generator.integers(0, 256, (SIDE // 8, SIDE // 8, 3), dtype=np.uint8))
                smooth = np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=float)
                file = io.BytesIO()
                noisy = (smooth + generator.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)
                Image.fromarray(noisy).save(file, "JPEG", quality=90)
                member = tarfile.TarInfo(f"{number:04d}.jpg")
                member.size = file.tell()
                archive.addfile(member, io.BytesIO(file.getvalue()))


def rate(dataset: str, options: argparse.Namespace) -> float:
    """Images per second of the first epoch, from the start of the workers on."""
    usual: dict[str, Any] = {"resolution": SIDE, "num_workers": options.workers, "cache_images_mb": 0, "channels": 3}
    config = DataConfig(dataset=dataset, shuffle_window=options.window, **usual)
    data = TrainingData(open_source(config), config, seed=0)
    steps = len(data.source) // BATCH
    began = time.perf_counter()
    for _ in micro_batches(data, PositionBatchSampler(BATCH, BATCH, 0, 1, range(steps)), pin_memory=False):
        pass
    return steps * BATCH / (time.perf_counter() - began)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("shards", 16), ("images", 64), ("window", 4), ("workers", 2), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", help="write all figures to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as free:
        os.environ["HOME"] = str(Path(folder) / "home")  # whose cache is empty
        make_shards(Path(folder) / "shards", options.shards, options.images)
        port = free.getsockname()[1]
        free.close()
        command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", f"{folder}/shards"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
            try:
                pattern = f"{{0000..{options.shards - 1:04d}}}.tar"
                local, remote = f"{folder}/shards/{pattern}", f"http://127.0.0.1:{port}/{pattern}"
                rounds = []
                for number in range(-1, options.rounds):  # the first builds the indices
                    for path in Path(folder).glob("home/.cache/debias_diffusers/shards/*.shard"):
                        path.unlink()
                    row = [rate(local, options), rate(remote, options), rate(remote, options)]
                    rounds += [row] if number >= 0 else []
            finally:
                server.terminate()
        shutil.rmtree(Path(folder) / "home")
    medians = [statistics.median(column) for column in zip(*rounds)]
    ratios = [statistics.median(row[place] / row[0] for row in rounds) for place in range(3)]
    print("| shards | images/s | ratio |\n|---|---|---|")
    for name, value, ratio in zip(("on this disk", "fetched from a server", "of a server, in the cache"), medians, ratios):
        print(f"| {name} | {value:.0f} | {ratio:.2f} |")
    if options.json:
        Path(options.json).write_text(json.dumps({"options": vars(options), "rounds": rounds}, indent=2) + "\n")


if __name__ == "__main__":
    main()
