"""Writes debias_diffusers/data/digits.parquet from scikit-learn's copy of the UCI handwritten digits (CC BY 4.0).

    pip install scikit-learn && python tools/make_digits.py

Brightness 0..16 becomes 0..255, ink is white on black.
"""

from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

digits = load_digits()
pixels = np.round(digits.images * 255 / 16).astype(np.uint8)  # (1797, 8, 8)
features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(k) for k in range(10)])})
table = datasets.Dataset.from_dict({"image": [Image.fromarray(p) for p in pixels], "label": digits.target.tolist()}, features=features)
table.to_parquet(Path(__file__).parent.parent / "debias_diffusers" / "data" / "digits.parquet")
