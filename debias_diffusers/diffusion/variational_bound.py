"""The variational bound: the divergence of a sampling step from the true one, in bits per dimension.

At fixed x_t the mean of the step is an affine function of the predicted x_0, so the error of the predicted x_0 is all of the
network's mean that the bound needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..utils.tensor_memory import sent
from .noise_schedule import Schedule, at

MIN_MASS = 1e-12  # probability of a pixel value
BITS = 1 / math.log(2)
HALF_STEP = 1 / 255  # half the distance of two of the 256 values of a pixel in [-1, 1]


@dataclass(frozen=True)
class VariationalBound:
    """The terms L_0 .. L_{T-1} of the bound (DDPM, arXiv 2006.11239, equation 5) with a learned variance."""

    mean_of_x_0: Tensor  # (T,) factor of x_0 in the mean of q(x_{t-1} | x_t, x_0) (equation 7), in its standard deviations
    log_small: Tensor  # (T,) log variance of q(x_{t-1} | x_t, x_0), the lower bound
    log_range: Tensor  # (T,) from there to log beta, the upper bound

    @classmethod
    def of(cls, schedule: Schedule) -> VariationalBound:
        """The bound of a variance-preserving schedule."""
        betas, variance = schedule.betas, schedule.s.square()
        previous = torch.cat([variance.new_zeros(1), variance[:-1]])  # 1 - alphas_cumprod of t - 1
        small = betas * previous / variance
        small[0] = small[1]  # 0, whose logarithm is useless (arXiv 2102.09672 takes the next, too)
        mean_of_x_0 = (1 - previous).sqrt() * betas / variance
        return cls(mean_of_x_0 / small.sqrt(), small.log(), (betas / small).log())

    def log_variance(self, values: Tensor, t: Tensor) -> Tensor:
        """(B, C, H, W) log variance of the step, from values in about [-1, 1] (Improved DDPM, arXiv 2102.09672, equation 15)."""
        return at(self.log_small, t, values) + self._above_small(values, t)

    def _above_small(self, values: Tensor, t: Tensor) -> Tensor:
        return (values + 1) / 2 * at(self.log_range, t, values)

    def terms(self, x_0_error: Tensor, values: Tensor, x_0: Tensor, t: Tensor) -> Tensor:
        """L_t in bits per dimension.

        Args:
            x_0_error: (B, C, H, W) predicted minus true x_0.
            values: (B, C, H, W) the network's variance channels.
            x_0: (B, C, H, W) images in [-1, 1] of 256 values.
            t: (B,) int64 on the CPU.

        Returns:
            (B,): the divergence of the step from the true one, or at t = 0 the negative log-likelihood of the image.
        """
        divergence = self._divergence(x_0_error, values, t)
        likelihood = discretized_gaussian_log_likelihood(x_0, x_0 + x_0_error, self.log_variance(values, t) / 2)
        first = sent((t == 0).view(-1, *[1] * (x_0.ndim - 1)), x_0.device)
        return torch.where(first, -likelihood, divergence).flatten(1).mean(1) * BITS

    def _divergence(self, x_0_error: Tensor, values: Tensor, t: Tensor) -> Tensor:
        """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) of each dimension, in nats.

        With d = log(variance of p / variance of q) it is (d + e^-d - 1 + e^-d (difference of means)^2 / variance of q) / 2.
        """
        d = self._above_small(values, t)
        mean_error = at(self.mean_of_x_0, t, x_0_error) * x_0_error
        return (d + torch.expm1(-d) + mean_error.square() * torch.exp(-d)) / 2


def discretized_gaussian_log_likelihood(x_0: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log of a Gaussian's probability of each pixel value; the outermost values reach to infinity (arXiv 2006.11239, equation 13).

    All of shape (B, C, H, W). No probability counts as less than 1e-12, so a pixel costs at most 40 bits.
    """
    centred, std = x_0 - mean, log_std.exp()
    above = torch.where(x_0 > 1 - HALF_STEP, torch.inf, (centred + HALF_STEP) / std)
    below = torch.where(x_0 < -1 + HALF_STEP, -torch.inf, (centred - HALF_STEP) / std)
    return (_normal_cdf(above) - _normal_cdf(below)).clamp(min=MIN_MASS).log()


def _normal_cdf(z: Tensor) -> Tensor:
    """The approximation that published bits per dimension were computed with; the exact function gives 0.1% more or less at t = 0."""
    return (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2
