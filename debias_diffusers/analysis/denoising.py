"""Errors of a network by timestep: of its prediction, and of the one-step estimate of x_0 that follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config.registry import WEIGHTINGS
from ..config.schema.objective import ObjectiveConfig
from ..config.schema.types import PredictionType
from ..diffusion.loss import weight_table
from ..diffusion.noise_schedule import Schedule, predicted_x_0, prediction_type_of, schedule_of_scheduler
from ..diffusion.timestep_samplers import objective_density
from ..utils import seeding

NORMAL_95 = 1.96  # standard errors on either side of a mean that an interval of 95% has


@dataclass(frozen=True)
class Denoiser:
    """A network, its noise schedule, and what it predicts."""

    network: Any  # module: x_t (B, C, H, W), timestep, labels (B,) or None, return_dict=False -> (prediction (B, C or 2 C, H, W),)
    schedule: Schedule
    prediction_type: PredictionType

    @classmethod
    def of(cls, pipeline: Any) -> Denoiser:
        """The network of a pixel pipeline. Raises InputError if its scheduler has no schedule that is known here."""
        own = pipeline.scheduler
        return cls(pipeline.unet, schedule_of_scheduler(own), prediction_type_of(own))

    def noised(self, x_0: Tensor, noise: Tensor, t: int) -> Tensor:
        """x_t of images and noise (B, C, H, W)."""
        return self.schedule.add_noise(x_0, noise, torch.full((len(x_0),), t))

    def prediction(self, x_t: Tensor, t: int, labels: Tensor | None) -> Tensor:
        """What the network predicts (B, C, H, W), without the channels of a learned variance."""
        output: Tensor = self.network(x_t, self.schedule.timesteps[t].to(x_t.device), labels, return_dict=False)[0]
        return output[:, : x_t.shape[1]]

    @torch.no_grad()
    def estimate(self, x_0: Tensor, noise: Tensor, t: int, labels: Tensor | None) -> Tensor:
        """The one-step estimate of x_0 (B, C, H, W) from x_t."""
        x_t = self.noised(x_0, noise, t)
        a, s = self.schedule.a[t], self.schedule.s[t]
        return predicted_x_0(self.prediction_type, self.prediction(x_t, t, labels), x_t, a, s)


@dataclass(frozen=True)
class MeanColours:
    """The mean colours of the images to which a VAE decodes latents."""

    decoded: Callable[[Tensor], Tensor]  # latents (B, C, h, w) -> mean colours (B, 3)
    of_x_0: Tensor  # (N, 3)

    def moved(self, estimates: Tensor, batch: Tensor) -> Tensor:
        """(B, 3) what the mean colours of estimates of x_0 are more than those of x_0, of the images of these numbers."""
        return self.decoded(estimates) - self.of_x_0[batch]


@dataclass(frozen=True)
class Errors:
    """What a network errs by on N images at K timesteps. All tensors float64 on the CPU."""

    timesteps: list[int]
    mse: Tensor  # (K, N) mean square of prediction - target
    x_0_mse: Tensor  # (K, N) mean square of the estimate of x_0 - x_0
    x_0_bias: Tensor  # (K, N, C) signed mean over the pixels of the estimate of x_0 - x_0
    # (K, N, 3) where x_0 is latents: signed mean over the pixels of the decoded estimate of x_0 - the decoded x_0; else (K, N, 0)
    decoded_bias: Tensor
    gradient_norm: Tensor  # (K,) norm of the gradient of the mean of mse over the images with respect to the parameters

    @classmethod
    def joined(cls, parts: Sequence[Errors]) -> Errors:
        """The errors at the timesteps of all parts, in their order."""
        first, *others = zip(*(vars(each).values() for each in parts))
        return cls([t for timesteps in first for t in timesteps], *map(torch.cat, others))


def spread_timesteps(T: int, count: int) -> list[int]:
    """At most `count` different timesteps, equally spaced from 0 to T - 1."""
    return sorted({round(t) for t in np.linspace(0, T - 1, count)})


def fixed_noise(shape: Sequence[int], seed: int, indices: Sequence[int]) -> Tensor:
    """The noise (B, C, H, W) of images of these indices: a function of (seed, index), the same at every timestep and for every run."""
    return seeding.normal(shape, seed, "bias", indices)


def measure_errors(
    denoiser: Denoiser,
    x_0: Tensor,
    noise: Tensor,
    labels: Tensor | None,
    timesteps: Sequence[int],
    batch_size: int = 64,
    progress: Callable[[], Any] = lambda: None,
    colours: MeanColours | None = None,
) -> Errors:
    """Errors at each timestep, for the same images and noise.

    The error of x_0 is that of the prediction times `Schedule.x_0_per_prediction`, which loses no digits where the SNR is large.

    Args:
        denoiser: its network is in evaluation mode.
        x_0: (N, C, H, W) images in [-1, 1], or latents, on the device of the network.
        noise: (N, C, H, W) standard normal.
        labels: (N,) of a conditional network.
        timesteps: K timesteps.
        batch_size: images per call of the network.
        progress: called after each timestep.
        colours: of the images to which the VAE decodes latents; None of pixels.
    """
    factors = denoiser.schedule.x_0_per_prediction(denoiser.prediction_type)
    parameters = [parameter for parameter in denoiser.network.parameters() if parameter.requires_grad]
    found, norms = [], []
    for t in timesteps:
        parts = []
        for batch in torch.arange(len(x_0)).split(batch_size):
            error = _error(denoiser, x_0[batch], noise[batch], None if labels is None else labels[batch], t)
            mse = error.square().flatten(1).mean(1)
            (mse.sum() / len(x_0)).backward()
            error = error.detach()
            moved = colours.moved(x_0[batch] + factors[t].item() * error, batch) if colours else error.new_empty(len(batch), 0)
            parts.append([each.detach().double().cpu() for each in (mse, error.mean((2, 3)), moved)])
        norms.append(_gradient_norm(parameters))
        denoiser.network.zero_grad()
        found.append([torch.cat(each) for each in zip(*parts)])
        progress()
    k = factors[list(timesteps)]
    mse, means, moved = (torch.stack(each) for each in zip(*found))
    return Errors(list(timesteps), mse, k.square()[:, None] * mse, k[:, None, None] * means, moved, torch.tensor(norms).double())


def _error(denoiser: Denoiser, x_0: Tensor, noise: Tensor, labels: Tensor | None, t: int) -> Tensor:
    """prediction - target (B, C, H, W), which can be differentiated."""
    target = denoiser.schedule.target(denoiser.prediction_type, x_0, noise, torch.full((len(x_0),), t))
    return denoiser.prediction(denoiser.noised(x_0, noise, t), t, labels) - target


def _gradient_norm(parameters: Sequence[Tensor]) -> float:
    """Euclidean norm of the gradients of all parameters together."""
    squares = [parameter.grad.double().square().sum() for parameter in parameters if parameter.grad is not None]
    return math.sqrt(sum(square.item() for square in squares))


def weights_of_timesteps(objective: ObjectiveConfig, schedule: Schedule, prediction_type: PredictionType) -> Tensor | None:
    """(T,) loss weight of each timestep times its density in the objective, of a run in phases in the last one.

    None of the variational bound, which has no weights, of a learned uncertainty, which a model is saved without, and of a weighting that
    is not registered in this process.
    """
    if objective.weighting == "variational" or objective.weighting not in WEIGHTINGS or objective.learned_uncertainty:
        return None
    return weight_table(objective, schedule, prediction_type) * objective_density(objective, schedule)


def shares(timesteps: Sequence[int], values: Tensor, weights: Tensor) -> Tensor:
    """(K,) the part of sum_t weights(t) values(t) that each of K equal parts of the T timesteps has.

    Args:
        timesteps: K measured timesteps, as of `spread_timesteps`, which has one in each part.
        values: (K,) measured; between them they are interpolated linearly.
        weights: (T,).
    """
    K, T = len(timesteps), len(weights)
    terms = weights * torch.from_numpy(np.interp(np.arange(T), timesteps, values))
    sums = torch.zeros(K, dtype=torch.float64).index_add(0, torch.arange(T) * K // T, terms)
    return sums / sums.sum()


def mean_and_interval(values: Tensor) -> tuple[float, float, float]:
    """The mean of values (N,), and the ends of its 95% interval (normal approximation); NaN for the ends of a single value."""
    mean = values.double().mean().item()
    half = NORMAL_95 * values.double().std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return mean, mean - half, mean + half
