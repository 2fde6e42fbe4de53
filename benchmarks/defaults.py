"""Which prediction type and schedule shift suit colour photographs of low resolution? Two recipes side by side, fixed beforehand.

    pip install scikit-image scikit-learn
    python benchmarks/defaults.py runs/defaults            # about an hour on two idle cores; the same command continues

Trains "epsilon, shift 1" (the neutral defaults) and "v, matched shift" (v_prediction, schedule_shift (64 / resolution)^2) on 2000 crops of
eight photographs (tools/make_crops.py): at 32 pixels with three seeds, at 64 pixels with one, where the matched shift is 1. All else is
equal. Figures of 1000 samples (unipc, 20 steps) against 1000 other crops of the same photographs:

- sliced Wasserstein distance of 7x7 patches of a Laplacian pyramid (arXiv 1710.10196, section 5), times 1000, the mean over its levels: the
  figure that decides. Patches are divided by the standard deviation of the reference's channels, and not each set by its own, which would
  hide a colour cast.
- bias of the mean colour: the largest of the three channels, in grey levels of 255.

Writes OUT/defaults.md and, of each run, OUT/RUN/samples/.../preview/grid.png.
"""

import argparse
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).parent.parent
SAMPLES = 1000
PATCHES, PATCH, PROJECTIONS = 64, 7, 256  # patches per image and level, their side, directions


@dataclass(frozen=True)
class Size:
    """What is trained at a resolution."""

    resolution: int
    seeds: int
    flags: dict[str, object]


SIZES = (
    Size(32, 3, {"channel_mult": (1, 2, 4), "attention_resolutions": (8,), "batch_size": 32}),
    Size(64, 1, {"channel_mult": (1, 1, 2, 4), "attention_resolutions": (8,), "batch_size": 16, "max_steps": 500}),
)
RECIPES = {"epsilon, shift 1": ("epsilon", False), "v, matched shift": ("v_prediction", True)}
COMMON = {
    "model_channels": 16,
    "layers_per_block": 1,
    "attention_head_dim": 32,
    "weighting": "debiased",
    "timestep_sampler": "stratified",
    "max_steps": 1000,
    "learning_rate": 1e-3,
    "lr_schedule": "cosine",
    "warmup_steps": 100,
    "max_grad_norm": 1,
    "ema_decay": 0.995,
    "sample_every": 0,
    "checkpoint_every": 500,
    "num_workers": 0,
}


def run(*words: object) -> None:
    """A command on one thread, so that several run side by side."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise SystemExit(f"{' '.join(command)}: {said[-1]}")


def train(folder: Path, data: Path, size: Size, recipe: str, seed: int) -> Path:
    """Trains a run and samples from it; returns the folder of its images."""
    prediction_type, matched = RECIPES[recipe]
    flags = COMMON | size.flags | {
        "dataset": data,
        "resolution": size.resolution,
        "output_dir": folder,
        "prediction_type": prediction_type,
        "schedule_shift": (64 / size.resolution) ** 2 if matched else 1,
        "seed": seed,
        "num_threads": 1,
    }  # fmt: skip
    words = (word for name, value in flags.items() for word in (f"--{name}", *(value if isinstance(value, tuple) else (value,))))
    run(ROOT / "train.py", *words)
    images = folder / "images"
    solver = ("--scheduler", "unipc", "--steps", 20, "--num_images", SAMPLES)
    run(ROOT / "sample.py", folder, *solver, "--output_dir", images, "--num_threads", 1)
    return images


def read(folder: Path, resolution: int) -> Tensor:
    """(N, 3, R, R) in [0, 1], of all images below a folder."""
    paths = [path for path in sorted(folder.rglob("*.png")) if path.parent.name != "preview"]
    pixels = [np.asarray(Image.open(path).convert("RGB").resize((resolution, resolution), Image.Resampling.BICUBIC)) for path in paths]
    return torch.tensor(np.stack(pixels)).permute(0, 3, 1, 2) / 255


def laplacian_pyramid(images: Tensor) -> list[Tensor]:
    """Differences of each level to the next, down to 8 pixels, whose level is the images themselves."""
    levels = []
    while images.shape[-1] > 8:
        smaller = F.avg_pool2d(images, 2)
        levels.append(images - F.interpolate(smaller, scale_factor=2, mode="bilinear"))
        images = smaller
    return [*levels, images]


def patches_of(level: Tensor) -> Tensor:
    """(N * PATCHES, 3 * PATCH^2), at random places that depend on the image's index."""
    rng = np.random.default_rng(0)
    places = rng.integers(level.shape[-1] - PATCH + 1, size=(len(level), PATCHES, 2))
    return torch.stack([image[:, y : y + PATCH, x : x + PATCH].flatten() for image, at in zip(level, places) for y, x in at])


def sliced_wasserstein(one: Tensor, other: Tensor) -> float:
    """Mean over levels of the sliced Wasserstein distance of patches, times 1000. `other` is the reference; as many images of both."""
    generator = torch.Generator().manual_seed(0)
    distances = []
    for mine, theirs in zip(laplacian_pyramid(one), laplacian_pyramid(other)):
        scale = theirs.std((0, 2, 3), keepdim=True)
        directions = F.normalize(torch.randn(3 * PATCH**2, PROJECTIONS, generator=generator), dim=0)
        a, b = ((patches_of(level / scale) @ directions).sort(0).values for level in (mine, theirs))
        distances.append(1000 * float((a - b).abs().mean()))
    return statistics.mean(distances)


def colour_bias(one: Tensor, other: Tensor) -> float:
    """The difference of the mean colours in grey levels, of the channel where it is largest."""
    difference = 255 * (one.mean((0, 2, 3)) - other.mean((0, 2, 3)))
    return float(difference[difference.abs().argmax()])


def main() -> None:
    """Trains what is missing, measures, and writes a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, each with one thread")
    options = parser.parse_args()
    data, held = options.out / "crops", options.out / "other_crops"
    for folder, count, seed in ((data, 2000, 0), (held, SAMPLES, 1)):
        if not folder.exists():
            run(ROOT / "tools" / "make_crops.py", folder, "--count", count, "--seed", seed)
    cases = [(size, recipe, seed) for size in SIZES for seed in range(size.seeds) for recipe in RECIPES]
    found: dict[tuple[int, str], list[tuple[float, float]]] = {}
    with ThreadPoolExecutor(options.parallel) as pool:
        folders = [options.out / f"{size.resolution}-{recipe.split(',')[0]}-seed{seed}" for size, recipe, seed in cases]
        pending = [pool.submit(train, folder, data, *case) for folder, case in zip(folders, cases)]
        try:
            for done in as_completed(pending):
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    lines = ["| pixels | recipe | sliced Wasserstein distance of each seed | mean | bias of the mean colour |", "|---|---|---|---|---|"]
    for (size, recipe, _), images in zip(cases, pending):
        reference = read(held, size.resolution)
        sampled = read(images.result(), size.resolution)
        found.setdefault((size.resolution, recipe), []).append((sliced_wasserstein(sampled, reference), colour_bias(sampled, reference)))
    for size in SIZES:
        training = read(data, size.resolution)[:SAMPLES]
        floor = sliced_wasserstein(training, read(held, size.resolution))
        lines.append(f"| {size.resolution} | the training images themselves | | {floor:.1f} | |")
        for recipe in RECIPES:
            distances, biases = zip(*found[size.resolution, recipe])
            each, bias = ", ".join(f"{value:.1f}" for value in distances), ", ".join(f"{value:+.1f}" for value in biases)
            lines.append(f"| {size.resolution} | {recipe} | {each} | {statistics.mean(distances):.1f} | {bias} |")
    text = "\n".join(lines) + "\n"
    (options.out / "defaults.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
