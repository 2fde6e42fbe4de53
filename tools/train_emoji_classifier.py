"""Trains the classifier whose features compare sets of emoji, `debias_diffusers/evaluation/emoji_classifier.safetensors`.

    python tools/train_emoji_classifier.py

Learns the nine categories of four of five of the embedded emoji, each moved by up to two pixels, mirrored, and blurred with noise;
every fifth is kept to see how many are told right. About three minutes on one core, always with the same result on the same machine.
"""

import torch
import torch.nn.functional as F
from train_digits_classifier import NOISE, train

from debias_diffusers.evaluation.feature_extractors import EmojiClassifier

MOVED = 2  # pixels


def varied(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each moved by up to two pixels on white, mirrored or not, with noise of a random strength."""
    side, places = images.shape[-1], torch.randint(0, 2 * MOVED + 1, (len(images), 2), generator=generator)
    padded = F.pad(images, (MOVED,) * 4, value=255)
    moved = torch.stack([image[:, y : y + side, x : x + side] for image, (x, y) in zip(padded, places.tolist())])
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    strength = NOISE * torch.rand(len(images), 1, 1, 1, generator=generator)
    noise = strength * torch.randn(moved.shape, generator=generator)
    return (torch.where(mirrored, moved.flip(-1), moved) + noise).clamp(0, 255)


if __name__ == "__main__":
    train("emoji", 16, EmojiClassifier, varied, weight_decay=5e-2)
