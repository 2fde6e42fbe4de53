"""A data set of a million images in shards: seconds to its first batch and step, memory of a worker, and images read per second.

    python benchmarks/shards.py [--images 1000000] [--rounds 5] [--json FILE]

The index of the million is made up: all of its images are one picture, in shards of 2500 that take no room on the disk. Each start is a
process of its own, whose files the system has in memory. Memory of a worker is what it does not share with other processes (USS) after
some batches. A text-to-image run of a tiny base model is timed from `train.py`'s arguments to the end of its first step, by parts, without
the imports; its captions are shuffled and its crops random, so that neither embeddings nor latents are computed before. Images per second
are those of one thread, of its CPU seconds, so that other work on the machine matters less: JPEG files of 256 pixels in a folder and in
shards, which are read only, and also decoded; both in turn, and the figures are medians, also of the ratios.
"""

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
import unittest.mock
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import psutil
import pyarrow
import text_to_image
from PIL import Image
from training import make_images

from debias_diffusers.config.schema.data import DataConfig, ShardsMakeConfig, TextConfig
from debias_diffusers.data.buckets import Buckets
from debias_diffusers.data.captions import CaptionedSource
from debias_diffusers.data.dataset import PositionBatchSampler, PositionedData, TrainingData, micro_batches
from debias_diffusers.data.shards import commands, index
from debias_diffusers.data.shards.files import Unit
from debias_diffusers.data.shards.rows import SCHEMA, Part
from debias_diffusers.data.sources.base import Source
from debias_diffusers.data.sources.opening import open_source
from debias_diffusers.data.text_dataset import TextData
from debias_diffusers.tasks import precompute

PER_SHARD, WINDOW, BATCH = 2500, 8, 32
KINDS = ("pixels", "pixels, all shuffled together", "captions and buckets")


def picture() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((256, 256), 30).convert("RGB").save(file, "JPEG")
    return file.getvalue()


def made_up(content: bytes, _files: Any, _key: Any, names: Sequence[str], _total: int) -> list[Part]:
    """The rows of shards whose images are all one picture at the beginning of the file."""
    sides = np.random.default_rng(0).integers(200, 400, (len(names) * PER_SHARD, 2))
    parts = []
    for number, name in enumerate(names):
        own = range(number * PER_SHARD, (number + 1) * PER_SHARD)
        same = {"offset": 0, "size": len(content), "crc32": zlib.crc32(content)}
        columns = {
            "key": [f"{k:09d}" for k in own],
            **{column: np.full(PER_SHARD, value) for column, value in same.items()},
            "height": sides[own.start : own.stop, 0],
            "width": sides[own.start : own.stop, 1],
            "label": [str(k % 1000) for k in own],
            "captions": [[f"a photograph, the {k}th of a large collection, of something that is told in some words"] for k in own],
        }
        parts.append(Part(pyarrow.table(columns).cast(SCHEMA), [Unit(name, -1, PER_SHARD)], 0))
    return parts


def make_index(folder: Path, images: int) -> float:
    """Writes shards and their index; returns the size of that in MB."""
    content = picture()
    for number in range(-(-images // PER_SHARD)):
        with open(folder / f"{number:05d}.tar", "wb") as file:
            file.write(content)
    with unittest.mock.patch.object(index, "_read_all", partial(made_up, content)):
        open_source(DataConfig(dataset=f"{folder}/{{00000..{number:05d}}}.tar"))
    return sum(path.stat().st_size for path in folder.glob("index-*")) / 1e6


def data_of(kind: str, dataset: str) -> PositionedData:
    """What a training makes of the data before its first batch."""
    window = None if kind.endswith("together") else WINDOW
    config = DataConfig(
        dataset=dataset, resolution=64, num_workers=2, shuffle_window=window, class_conditional=kind.startswith("pixels"), channels=3
    )
    source: Source = open_source(config)
    if kind.startswith("pixels"):
        return TrainingData(source, config, seed=0)
    source = CaptionedSource(source, None)
    buckets = Buckets(precompute.image_sizes(source, None), 64, 8)  # type: ignore[arg-type]
    return TextData(source, config, TextConfig(aspect_ratio_buckets=True), 0, (4, 8, 8), buckets=buckets, batch_size=BATCH)


def start(kind: str, dataset: str) -> None:
    """Prints the seconds to the first batch, and the MB of the training process and of its workers."""
    begun = time.perf_counter()
    data = data_of(kind, dataset)
    loader = micro_batches(data, PositionBatchSampler(BATCH, BATCH, 0, 1, range(10**6)), pin_memory=False)
    next(loader)
    seconds, cpu = time.perf_counter() - begun, time.process_time()
    for _ in range(100):
        next(loader)
    workers = [child.memory_full_info().uss / 1e6 for child in psutil.Process().children()]
    memory = {"MB of a worker": max(workers), "MB of the process": psutil.Process().memory_info().rss / 1e6}
    print(json.dumps({"seconds": seconds, "CPU seconds, with imports": cpu, **memory}))
    loader.close()


def whole_run(base: str, dataset: str) -> None:
    """Prints the wall and CPU seconds of the parts of a text-to-image run until the end of its first step, and its memory in MB."""
    from debias_diffusers import cli
    from debias_diffusers.tasks.text_to_image import TextToImageTask
    from debias_diffusers.training.setup import plan
    from debias_diffusers.training.trainer import Trainer

    for name in ("StableDiffusionXLPipeline", "UNet2DConditionModel", "AutoencoderKL"):
        getattr(diffusers, name)  # imports it
    begun, before = (time.perf_counter(), time.process_time()), psutil.Process().memory_info().rss
    spent: dict[str, tuple[float, float]] = {}

    def timed(owner: Any, name: str, part: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            wall, cpu = time.perf_counter(), time.process_time()
            found = real(*args, **kwargs)
            spent.setdefault(part, (time.perf_counter() - wall, time.process_time() - cpu))
            spent.setdefault("until then", (time.perf_counter() - begun[0], time.process_time() - begun[1])) if owner is Trainer else None
            return found

        setattr(owner, name, call)

    parts = {"base_of_run": "base model", "open_data": "index", "captioned": "check of images"}
    for name, part in parts.items():
        timed(plan, name, part)
    tasks = {"__init__": "buckets, order, text encoders and VAE", "say_data": "captions are counted", "prepare": "what is kept"}
    for name, part in tasks.items():
        timed(TextToImageTask, name, part)
    timed(Trainer, "_launch", "first step")
    with tempfile.TemporaryDirectory() as folder:
        flags = {"base_model": base, "dataset": dataset, "output_dir": f"{folder}/run", "resolution": 32, "batch_size": 8, "max_steps": 1}
        more = {"shuffle_window": WINDOW, "num_workers": 2, "crop": "random", "sample_every": 0, "checkpoint_every": 0}
        words = [str(word) for name, value in (flags | more).items() for word in (f"--{name}", value)]
        if cli.train([*words, "--aspect_ratio_buckets", "--shuffle_caption"]):
            raise SystemExit("the run failed")
    whole = spent.pop("until then")
    rest = tuple(all_of_it - sum(column) for all_of_it, column in zip(whole, zip(*spent.values())))
    memory = (psutil.Process().memory_info().rss - before) / 1e6
    print(json.dumps({**spent, "the rest": rest, "all": whole, "MB": memory}))


def started(*arguments: str) -> dict[str, Any]:
    """What this file prints with some arguments in a process of its own."""
    output = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def rate(source: Source, order: Sequence[int], decode: bool) -> float:
    """Images per CPU second."""
    data = TrainingData(source, DataConfig(resolution=64, cache_images_mb=0, channels=3), seed=0)
    begun = time.process_time()
    for number in order:
        data.decoded(number) if decode else source.read(number)
    return len(order) / (time.process_time() - begun)


def reading(folder: Path, rounds: int) -> dict[str, float]:
    """Images per CPU second of a folder and of shards made of it."""
    make_images(folder)
    commands.make(ShardsMakeConfig(data=str(folder / "256"), out=str(folder / "shards"), shard_mb=1))
    sources = {name: open_source(DataConfig(dataset=str(folder / path))) for name, path in (("folder", "256"), ("shards", "shards"))}
    found: dict[str, float] = {}
    for decode, what in ((False, "read"), (True, "read and decoded")):
        rows = []
        for turn in range(rounds + 1):  # the first does not count
            order = np.random.default_rng(turn).permutation(len(sources["folder"])).tolist() * (1 if decode else 20)
            rows.append({name: rate(source, order, decode) for name, source in sources.items()})
        for name in sources:
            found[f"{name}, {what}"] = statistics.median(row[name] for row in rows[1:])
        found[f"ratio, {what}"] = statistics.median(row["shards"] / row["folder"] for row in rows[1:])
    return found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="write all figures to this file")
    parser.add_argument("--start", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        start(*options.start)
        return
    if options.run:
        whole_run(*options.run)
        return
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "million").mkdir()
        found["MB of the index"] = make_index(folder / "million", options.images)
        dataset = f"{folder}/million/{{00000..{-(-options.images // PER_SHARD) - 1:05d}}}.tar"
        print("| | seconds | CPU seconds, with imports | MB of a worker | MB of the process |\n|---|---|---|---|---|")
        for kind in KINDS:
            row = found[kind] = started("--start", kind, dataset)
            columns = ("seconds", "CPU seconds, with imports", "MB of a worker", "MB of the process")
            print(f"| {kind} | {' | '.join(f'{row[column]:.1f}' for column in columns)} |", flush=True)
        text_to_image.make_base("tiny", folder / "base")
        found["run"] = started("--run", str(folder / "base"), dataset)
        print("\n| text-to-image run | seconds | CPU seconds |\n|---|---|---|")
        for part, seconds in found["run"].items():
            print(f"| {part} | {' | '.join(f'{value:.1f}' for value in np.atleast_1d(seconds))} |", flush=True)
        found |= reading(folder, options.rounds)
    print(json.dumps({key: value for key, value in found.items() if key not in (*KINDS, "run")}, indent=2))
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
