"""Writes square crops of the colour photographs that scikit-image, scikit-learn and matplotlib ship: pictures to try things out on.

    pip install scikit-image scikit-learn && python tools/make_crops.py photos --count 400

A folder for each photograph, so that their names are class labels. Another --seed gives other crops.
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import skimage
import sklearn
from PIL import Image

FOLDERS = {
    "astronaut.png": Path(skimage.__file__).parent / "data",
    "chelsea.png": Path(skimage.__file__).parent / "data",
    "coffee.png": Path(skimage.__file__).parent / "data",
    "motorcycle_left.png": Path(skimage.__file__).parent / "data",
    "rocket.jpg": Path(skimage.__file__).parent / "data",
    "china.jpg": Path(sklearn.__file__).parent / "datasets" / "images",
    "flower.jpg": Path(sklearn.__file__).parent / "datasets" / "images",
    "grace_hopper.jpg": Path(matplotlib.get_data_path()) / "sample_data",
}
LARGEST = 128  # pixels a side; larger crops are resized


def crop(photo: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A square of half to all of the shorter side, at a random place."""
    side = int(min(photo.size) * rng.uniform(0.5, 1.0))
    left, top = (int(rng.integers(length - side + 1)) for length in photo.size)
    size = min(side, LARGEST)
    return photo.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)


def make_crops(out: Path, count: int, seed: int) -> None:
    """Writes OUT/PHOTO/NNNN.png, the photographs in turn."""
    rng = np.random.default_rng(seed)
    photos = {Path(name).stem.split("_")[0]: Image.open(folder / name).convert("RGB") for name, folder in FOLDERS.items()}
    names = list(photos)
    for k in range(count):
        name = names[k % len(names)]
        (out / name).mkdir(parents=True, exist_ok=True)
        crop(photos[name], rng).save(out / name / f"{k:05d}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    make_crops(options.out, options.count, options.seed)
