"""Power-function averages, and any of them from snapshots of two (post-hoc EMA: EDM2, arXiv 2312.02696, section 3).

The average of the weights theta of the steps 1 .. t with the exponent gamma gives step k the weight (k^(gamma+1) - (k-1)^(gamma+1)) /
t^(gamma+1). It is told by sigma_rel, the standard deviation of that over t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

KEPT = (0.05, 0.10)  # sigma_rel of the two averages of which snapshots are taken
MIN_SIGMA_REL, MAX_SIGMA_REL = 0.01, 0.28  # at gamma = 0 all steps count the same, and sigma_rel is 12^-1/2 = 0.289
_STEPS_AT_ONCE = 1 << 14


def exponent(sigma_rel: float) -> float:
    """gamma > 0 with sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), by bisection."""
    low, high = 0.0, 1.0 / sigma_rel  # sigma_rel is below 1 / (gamma + 2)
    for _ in range(100):
        middle = (low + high) / 2
        if (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > sigma_rel**2:
            low = middle
        else:
            high = middle
    return low


def share_of_step(gamma: float, step: int) -> float:
    """The weight of step `step` (from 1) in the average after it, 1 - (1 - 1 / step)^(gamma + 1): the first average is the weights."""
    return 1.0 if step == 1 else -math.expm1((gamma + 1) * math.log1p(-1 / step))


def weights_of_steps(gamma: Tensor, end: Tensor, steps: Tensor) -> Tensor:
    """(N, M) float64 weight of each of the steps (M,) in the averages (N,) with exponents `gamma`, taken after steps `end`."""
    g, t, k = gamma[:, None] + 1, end[:, None].double(), steps[None].double()
    share = -torch.expm1(g * torch.log1p(-1 / k))
    return torch.where(k <= t, (g * (k / t).log()).exp() * share, 0.0)


def combination(steps: Sequence[int], sigma_rel: float, end: int) -> tuple[Tensor, float]:
    """How snapshots of the two averages are added up to another average: the least squares between their weights of the steps.

    Args:
        steps: at which snapshots were taken, each of the averages `KEPT`; the last is `end` or before it.
        sigma_rel: of the wanted average.
        end: the step after which it would be taken.

    Returns:
        The coefficients (len(steps), 2) float64, whose sum is 1, and what is missing: the norm of the difference between the weights of
        the steps that they make and those of the wanted average, over the norm of the latter.
    """
    gammas = torch.tensor([exponent(sigma) for sigma in KEPT], dtype=torch.float64).repeat(len(steps))
    ends = torch.tensor(steps).repeat_interleave(len(KEPT))
    wanted = torch.tensor([exponent(sigma_rel)], dtype=torch.float64)
    # Differences from the last snapshot, so that the coefficients add up to 1 and a part that all weights share is kept as it is.
    products = torch.zeros(len(ends), len(ends), dtype=torch.float64)  # of the others, and the wanted one as the last
    norm = 0.0
    for first in range(1, end + 1, _STEPS_AT_ONCE):
        part = torch.arange(first, min(first + _STEPS_AT_ONCE, end + 1))
        found, target = weights_of_steps(gammas, ends, part), weights_of_steps(wanted, torch.tensor([end]), part)
        apart = torch.cat([found[:-1], target]) - found[-1]
        products += apart @ apart.T
        norm += target.square().sum().item()
    others = torch.linalg.lstsq(products[:-1, :-1], products[:-1, -1:], driver="gelsd").solution.squeeze(1)
    difference = products[-1, -1] - 2 * others @ products[:-1, -1] + others @ products[:-1, :-1] @ others
    coefficients = torch.cat([others, 1 - others.sum(0, keepdim=True)])
    return coefficients.view(len(steps), len(KEPT)), (difference.clamp(min=0) / norm).sqrt().item()
