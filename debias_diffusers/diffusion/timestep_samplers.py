"""How t is drawn: the data give each sample its u(seed, position) in [0, 1), which is mapped to a noise level here.

A sampler may draw some levels more often than others. Either each loss is corrected for that, by 1 / (T p(t)), so that only
the variance of its estimate changes; or, for `log_normal` and `logit_normal`, it is not, and the objective is the weighting
times the density of these levels.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..config.schema import ObjectiveConfig
from .noise_schedule import Schedule

UNIFORM_SHARE = 0.1  # of the draws of a corrected density: no correction is then above 10
HISTORY = 10  # losses of each level that loss_second_moment remembers
LEAST_SHARE = 0.001  # of the draws of loss_second_moment that stay uniform


class TimestepSampler:
    """Draws t with fixed probabilities.

    Args:
        probabilities: (T,) float64, of each level.
        corrected: whether losses are corrected, so that the objective is that of uniform t.
        strata: equal parts of [0, 1), one for each sample of a step; 1 draws all samples from the whole.
    """

    learns = False  # whether it wants to be told the losses

    def __init__(self, probabilities: Tensor, corrected: bool = True, strata: int = 1) -> None:
        self.probabilities, self.corrected, self.strata = probabilities, corrected, strata

    def draw(self, u: Tensor, positions: range) -> Tensor:
        """(B,) int64 t, from `u` (B,) float64 in [0, 1) of the samples at these positions of the run."""
        place = torch.arange(positions.start, positions.stop) % self.strata
        cumulative = self.probabilities.cumsum(0)
        # The last sum may be rounded to less than a u.
        return torch.searchsorted(cumulative, (place + u) / self.strata, right=True).clamp(max=len(cumulative) - 1)

    @property
    def corrections(self) -> Tensor:
        """(T,) factor on the loss of a level."""
        T = len(self.probabilities)
        return 1 / (T * self.probabilities) if self.corrected else torch.ones(T, dtype=torch.float64)

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Told the levels (N,) and uncorrected losses (N,) of a whole step, in the order of its positions."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold: nothing, where nothing is learned."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Puts back a `state`."""


class LossSecondMoment(TimestepSampler):
    """p(t) proportional to the root of the mean square of the level's last losses (Improved DDPM, arXiv 2102.09672, section 3.3).

    This is the density with the least variance of the corrected loss. Uniform until every level has been drawn often enough.
    Its draws follow from all losses before, so they are the same for another number of processes only as far as the losses are.
    """

    learns = True

    def __init__(self, T: int) -> None:
        super().__init__(_uniform(T))
        self.losses = np.zeros((T, HISTORY))
        self.counts = np.zeros(T, dtype=np.int64)

    def update(self, t: Tensor, losses: Tensor) -> None:
        for level, loss in zip(t.tolist(), losses.tolist()):
            self.losses[level, self.counts[level] % HISTORY] = loss
            self.counts[level] += 1
        self._weigh()

    def _weigh(self) -> None:
        moments = np.sqrt(np.square(self.losses).mean(1))
        if self.counts.min() >= HISTORY and moments.sum() > 0:
            self.probabilities = _mixed(torch.from_numpy(moments / moments.sum()), LEAST_SHARE)

    def state(self) -> dict[str, Tensor]:
        return {"losses": torch.from_numpy(self.losses.copy()), "counts": torch.from_numpy(self.counts.copy())}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.losses, self.counts = state["losses"].numpy().copy(), state["counts"].numpy().copy()
        self._weigh()


def make_timestep_sampler(config: ObjectiveConfig, schedule: Schedule, batch_size: int = 1) -> TimestepSampler:
    """The sampler of a configuration; `batch_size` counts the samples of a step in all processes."""
    T, name = len(schedule), config.timestep_sampler
    if name == "loss_second_moment":
        return LossSecondMoment(T)
    if name in ("uniform", "stratified"):
        return TimestepSampler(_uniform(T), strata=batch_size if name == "stratified" else 1)
    edges = _log_noise_edges(schedule) if name.startswith("log_normal") else _logit_edges(T)
    probabilities = torch.special.ndtr((edges - config.timestep_mean) / config.timestep_std).diff()
    if name.endswith("_corrected"):
        return TimestepSampler(_mixed(probabilities, UNIFORM_SHARE))
    return TimestepSampler(probabilities, corrected=False)


def _uniform(T: int) -> Tensor:
    return torch.full((T,), 1 / T, dtype=torch.float64)


def _mixed(probabilities: Tensor, share: float) -> Tensor:
    """A share of the draws uniform: no level is never drawn, and no correction exceeds 1 / share."""
    return (1 - share) * probabilities + share / len(probabilities)


def _logit_edges(T: int) -> Tensor:
    """(T + 1,) borders of the levels in ln(t / (1 - t)), t in [0, 1] (logit-normal: arXiv 2403.03206, section 3.1)."""
    return torch.linspace(0, 1, T + 1, dtype=torch.float64).logit()


def _log_noise_edges(schedule: Schedule) -> Tensor:
    """(T + 1,) borders of the levels in ln(s / a), half-way between neighbours (log-normal: EDM, arXiv 2206.00364, table 1)."""
    levels = -schedule.snr.log() / 2
    end = levels.new_full((1,), torch.inf)
    return torch.cat([-end, (levels[1:] + levels[:-1]) / 2, end])
