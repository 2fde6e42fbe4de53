"""The noise of samples, of any shape: standard normal, or changed by the options of `NoiseConfig`.

Every part has a purpose of its own in `seeding`, so that switching one on does not change what the others draw.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config.schema.objective import NoiseConfig
from ..utils import seeding


def draw_noise(shape: Sequence[int], config: NoiseConfig, seed: int, positions: Sequence[int]) -> dict[str, Tensor]:
    """The noise of B positions, of each a function of (seed, position).

    Args:
        shape: (C, H, W) of x_0.
        config: of the run.
        seed: of the run.
        positions: of the samples.

    Returns:
        `noise` (B, C, H, W) float32, of which targets are made; with input perturbation also `input_noise`, of which x_t is made.
    """
    noise = seeding.normal(shape, seed, "noise", positions)
    if config.pyramid_noise_discount:
        noise = torch.stack([_pyramid(each, config, seed, position) for each, position in zip(noise, positions)])
    if config.noise_offset:  # (https://www.crosslabs.org/blog/diffusion-with-offset-noise)
        noise = noise + config.noise_offset * seeding.normal((shape[0], *[1] * (len(shape) - 1)), seed, "noise offset", positions)
    if not config.input_perturbation:
        return {"noise": noise}
    # (arXiv 2301.11706, algorithm 1)
    return {"noise": noise, "input_noise": noise + config.input_perturbation * seeding.normal(shape, seed, "input perturbation", positions)}


def _pyramid(noise: Tensor, config: NoiseConfig, seed: int, position: int) -> Tensor:
    """`noise` (C, H, W) plus noise of ever lower resolutions, with a variance of 1 in the mean over pixels and draws.

    (Multi-resolution noise: https://wandb.ai/johnowhitaker/multires_noise.) Level k is `discount`^k times normal noise, resized
    bilinearly from the resolution of the level before divided by a number that is drawn from [2, 4). The variance is known for the
    resolutions that are drawn, so a sample is not divided by its own standard deviation, which would take its brightness away.
    """
    generator = seeding.generator(seed, "pyramid noise", position)
    channels, *full = noise.shape
    side, variance = full, 1.0
    for level in range(1, config.pyramid_noise_iterations + 1):
        ratio = 2 + 2 * torch.rand((), generator=generator).item()
        side, weight = [max(1, int(length / ratio)) for length in side], config.pyramid_noise_discount**level
        coarse = torch.randn(1, channels, *side, generator=generator)
        noise = noise + weight * F.interpolate(coarse, size=full, mode="bilinear")[0]
        variance += weight**2 * _resized_variance(side[0], full[0]) * _resized_variance(side[1], full[1])
        if max(side) == 1:
            break
    scaled: Tensor = noise / variance**0.5
    return scaled


def _resized_variance(length: int, to: int) -> float:
    """The mean variance of `length` independent values of variance 1 that are resized linearly to `to` values."""
    weights = F.interpolate(torch.eye(length)[None], size=to, mode="linear")[0]
    return weights.square().sum(0).mean().item()
