"""Writes debias_diffusers/data/emoji.parquet: 1906 emoji in colour, 16x16, with their names as captions and 9 categories as labels.

    npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz && python tools/make_emoji.py package

Reads emoji.json and img/google/64 of that package: the images of Noto Emoji (Apache-2.0; the flags are in the public domain), with
names and categories of emoji-data (MIT). They are blended with white, and made smaller with a Lanczos filter.
"""

import argparse
import json
from pathlib import Path

import datasets
from PIL import Image

SIDE = 16
PARTS = "Component"  # a category of skin tones and hair, which are no emoji of their own
TARGET = Path(__file__).parent.parent / "debias_diffusers" / "data" / "emoji.parquet"


def small(path: Path) -> Image.Image:
    """An image on white, SIDE x SIDE."""
    image = Image.open(path).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def main() -> None:
    """Reads the unpacked package and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="the unpacked folder")
    package = parser.parse_args().package
    listed = json.loads((package / "emoji.json").read_text())
    emoji = [each for each in listed if each["has_img_google"] and each["category"] != PARTS]
    categories = sorted({each["category"] for each in emoji})
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=categories), "caption": datasets.Value("string")}
    )
    columns = {
        "image": [small(package / "img" / "google" / "64" / each["image"]) for each in emoji],
        "label": [each["category"] for each in emoji],
        "caption": [each["name"].lower() for each in emoji],
    }
    datasets.Dataset.from_dict(columns, features=features).to_parquet(TARGET)
    print(f"{len(emoji)} emoji of {len(categories)} categories, {TARGET.stat().st_size / 1e6:.2f} MB: {TARGET}")


if __name__ == "__main__":
    main()
