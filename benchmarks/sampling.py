"""Images a second and the share of time spent in the network, for each solver and number of steps.

    python benchmarks/sampling.py [MODEL] [--dtype bfloat16] [--compile] [--guidance_scale 2]

Without MODEL the digits' network is built with random weights, whose time is the same. Images are encoded and written beside
the drawing, as sample.py does it; the time until the last is on the disk counts. Prints a table in Markdown: medians over
rounds in which all rows take turns, so that what else the machine does falls on all alike.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from debias_diffusers.cli import train_config
from debias_diffusers.config.schema.sampling import SampleConfig
from debias_diffusers.pipelines.pixel_pipeline import PixelPipeline
from debias_diffusers.pipelines.solvers import exported_scheduler
from debias_diffusers.sampling.generate import Job, make_job
from debias_diffusers.sampling.image_writer import ImageWriter, SampleFolder
from debias_diffusers.tasks.unet import build_unet, unet_config

ROWS = [("ddpm", 50), ("ddim", 20), ("ddim", 50), ("dpmsolver++", 20), ("dpmsolver++sde", 20), ("unipc", 10), ("unipc", 20), ("heun", 20)]


class Clock:
    """Time spent in a pipeline's network, the device's work included."""

    def __init__(self, pipeline: PixelPipeline) -> None:
        self.seconds = 0.0
        self._call = pipeline._call
        pipeline._call = self._counted  # not a hook of the network, which would be compiled with it

    def _counted(self, *args: torch.Tensor | None) -> torch.Tensor:
        synchronize()
        begun = time.perf_counter()
        output = self._call(*args)
        synchronize()
        self.seconds += time.perf_counter() - begun
        return output


def synchronize() -> None:
    """Waits for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def digits(folder: Path) -> Path:
    """A pipeline of the digits' network with random weights."""
    config = train_config([], None)
    torch.manual_seed(0)
    unet = build_unet(unet_config(config.model, 8, 1, 0))
    PixelPipeline(unet, exported_scheduler(config.objective)).save_pretrained(folder)
    return folder


def round_of(job: Job, clock: Clock, batches: int) -> tuple[float, float]:
    """(images a second, share of the time in the network) of some batches, drawn and written."""
    size = job.batch_size
    with tempfile.TemporaryDirectory() as folder:
        samples = SampleFolder(Path(folder), "png", batches * size)
        clock.seconds = 0.0
        begun = time.perf_counter()
        with ImageWriter(samples) as writer:
            for first in range(0, batches * size, size):
                indices = range(first, first + size)
                writer.put(indices, job.draw(indices))
        seconds = time.perf_counter() - begun
    return batches * size / seconds, clock.seconds / seconds


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", nargs="+", default=[f"{name}:{steps}" for name, steps in ROWS], metavar="SOLVER:STEPS")
    options = parser.parse_args()
    rows = [(name, int(steps)) for name, steps in (row.split(":") for row in options.rows)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or str(digits(Path(folder)))
        given = {"dtype": options.dtype, "compile": options.compile, "guidance_scale": options.guidance_scale}
        given |= {"batch_size": options.batch_size, "num_images": options.batches * options.batch_size}
        jobs = []
        for name, steps in rows:
            config = SampleConfig(model=model, scheduler=name, steps=steps, output_dir="", **given)
            jobs.append(make_job(config, device))
    clocks = [Clock(job.pipeline) for job in jobs]
    for job, clock in zip(jobs, clocks):
        round_of(job, clock, 1)  # compiles, and finds the fastest kernels
    measured = [[round_of(job, clock, options.batches) for job, clock in zip(jobs, clocks)] for _ in range(options.rounds)]
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{where}, torch {torch.__version__}, {options.dtype}, batches of {options.batch_size}, compile {options.compile}\n")
    print("| solver | steps | images/s | in the network |\n|---|---|---|---|")
    for k, (name, steps) in enumerate(rows):
        speed, share = (statistics.median(values) for values in zip(*(turn[k] for turn in measured)))
        print(f"| {name} | {steps} | {speed:.0f} | {share:.1%} |")


if __name__ == "__main__":
    main()
