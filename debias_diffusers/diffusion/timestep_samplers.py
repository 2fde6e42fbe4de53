"""How timesteps are drawn: each sample of the data has a u(seed, position) in [0, 1), which is mapped to a timestep here.

A sampler may draw some timesteps more often than others. Either each loss is corrected for that, by 1 / (T p(t)), so that only
the variance of its estimate changes; or, for `log_normal` and `logit_normal`, it is not, and the objective is the weighting
times the density of these timesteps. A bias multiplies the density of any sampler and is never corrected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..config.registry import TIMESTEP_BIASES, TIMESTEP_SAMPLERS
from ..config.schema import ObjectiveConfig
from .noise_schedule import Schedule

UNIFORM_SHARE = 0.1  # of the draws of a corrected density: no correction is then above 10
HISTORY = 10  # losses of each timestep that loss_second_moment remembers
MIN_UNIFORM_SHARE = 0.001  # of the draws of loss_second_moment


class TimestepSampler:
    """Draws t with fixed probabilities.

    Args:
        probabilities: (T,) float64, of each timestep.
        corrected: whether losses are corrected, so that the objective is that of uniform t.
        strata: equal parts of [0, 1), one for each sample of a step; 1 draws all samples from the whole.
    """

    learns = False  # whether `update` needs the losses

    probabilities: Tensor  # (T,) float64, with the bias
    corrections: Tensor  # (T,) float64 factors on the losses
    bias: Tensor | None = None  # (T,) float64 factors on the probabilities, which are not corrected; None where all are 1

    def __init__(self, probabilities: Tensor, corrected: bool = True, strata: int = 1) -> None:
        self.corrected, self.strata = corrected, strata
        self.set_probabilities(probabilities)

    def set_probabilities(self, probabilities: Tensor) -> None:
        """Draws with these (T,), times the bias, from now on."""
        self.probabilities = probabilities if self.bias is None else _normalized(probabilities * self.bias)
        self.corrections, self._cumulative = self._corrections(), self.probabilities.cumsum(0)

    def draw(self, u: Tensor, positions: Sequence[int]) -> Tensor:
        """(B,) int64 t, from `u` (B,) float64 in [0, 1) of the samples at these positions; a step begins at a multiple of its size."""
        place = torch.tensor(positions) % self.strata
        # The last sum may be rounded to less than a u.
        return torch.searchsorted(self._cumulative, (place + u) / self.strata, right=True).clamp(max=len(self.probabilities) - 1)

    def _corrections(self) -> Tensor:
        """(T,) factor on the loss of each timestep: 1 / (T p(t)), or 1. With a bias: that density of the objective / p(t), or 1."""
        T = len(self.probabilities)
        if not self.corrected:
            return torch.ones(T, dtype=torch.float64)
        return 1 / (T * self.probabilities) if self.bias is None else _normalized(self.bias) / self.probabilities

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Takes the timesteps (N,) and uncorrected losses (N,) of a whole optimizer step, in the order of its positions."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: nothing, where nothing is learned."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Puts back a `state`."""


class LossSecondMoment(TimestepSampler):
    """p(t) proportional to the root of the mean square of the timestep's last losses (Improved DDPM, arXiv 2102.09672, section 3.3).

    This is the density with the least variance of the corrected loss. Uniform until every timestep has been drawn often enough.
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
            self.set_probabilities(_mixed(torch.from_numpy(moments / moments.sum()), MIN_UNIFORM_SHARE))

    def state(self) -> dict[str, Tensor]:
        return {"losses": torch.from_numpy(self.losses.copy()), "counts": torch.from_numpy(self.counts.copy())}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.losses, self.counts = state["losses"].numpy().copy(), state["counts"].numpy().copy()
        self._weigh()


def make_timestep_sampler(config: ObjectiveConfig, schedule: Schedule, batch_size: int = 1) -> TimestepSampler:
    """The sampler of a configuration; `batch_size` counts the samples of an optimizer step in all processes."""
    sampler = _SAMPLERS[config.timestep_sampler](config, schedule, batch_size)
    sampler.bias = timestep_bias(config, len(schedule))
    sampler.set_probabilities(sampler.probabilities)
    return sampler


def timestep_bias(config: ObjectiveConfig, T: int) -> Tensor | None:
    """(T,) float64 factors on the density of the timesteps, as diffusers' example scripts have them; None without a bias."""
    count = round(config.timestep_bias_portion * T)
    biased = {
        "none": None,
        "earlier": slice(0, count),
        "later": slice(T - count, T),
        "range": slice(config.timestep_bias_begin, config.timestep_bias_end),
    }
    assert biased.keys() == TIMESTEP_BIASES.keys()
    if (part := biased[config.timestep_bias_strategy]) is None:
        return None
    factors = torch.ones(T, dtype=torch.float64)
    factors[part] = config.timestep_bias_multiplier
    return factors


# By the names of `registry.TIMESTEP_SAMPLERS`; the number is the batch size.
_SAMPLERS: dict[str, Callable[[ObjectiveConfig, Schedule, int], TimestepSampler]] = {
    "uniform": lambda _, schedule, __: TimestepSampler(_uniform(len(schedule))),
    "stratified": lambda _, schedule, batch_size: TimestepSampler(_uniform(len(schedule)), strata=batch_size),
    "log_normal": lambda config, schedule, _: TimestepSampler(_log_normal(config, schedule), corrected=False),
    "logit_normal": lambda config, schedule, _: TimestepSampler(_logit_normal(config, schedule), corrected=False),
    "log_normal_corrected": lambda config, schedule, _: TimestepSampler(_mixed(_log_normal(config, schedule), UNIFORM_SHARE)),
    "logit_normal_corrected": lambda config, schedule, _: TimestepSampler(_mixed(_logit_normal(config, schedule), UNIFORM_SHARE)),
    "loss_second_moment": lambda _, schedule, __: LossSecondMoment(len(schedule)),
}
assert _SAMPLERS.keys() == TIMESTEP_SAMPLERS.keys(), _SAMPLERS.keys() ^ TIMESTEP_SAMPLERS.keys()


def _uniform(T: int) -> Tensor:
    return torch.full((T,), 1 / T, dtype=torch.float64)


def _normalized(factors: Tensor) -> Tensor:
    return factors / factors.sum()


def _mixed(probabilities: Tensor, share: float) -> Tensor:
    """A share of the draws uniform: every timestep is drawn, and no correction exceeds 1 / share."""
    return (1 - share) * probabilities + share / len(probabilities)


def _logit_normal(config: ObjectiveConfig, schedule: Schedule) -> Tensor:
    """(T,) probabilities of ln(t / (1 - t)) from a normal, t in [0, 1] (logit-normal: arXiv 2403.03206, section 3.1)."""
    return _normal_between(torch.linspace(0, 1, len(schedule) + 1, dtype=torch.float64).logit(), config)


def _log_normal(config: ObjectiveConfig, schedule: Schedule) -> Tensor:
    """(T,) probabilities of ln(s / a) from a normal (log-normal: EDM, arXiv 2206.00364, table 1).

    Timesteps are bounded half-way between neighbours.
    """
    log_noise = -schedule.snr.log() / 2
    end = log_noise.new_full((1,), torch.inf)
    return _normal_between(torch.cat([-end, (log_noise[1:] + log_noise[:-1]) / 2, end]), config)


def _normal_between(edges: Tensor, config: ObjectiveConfig) -> Tensor:
    """(T,) probabilities of a normal between neighbours of `edges` (T + 1,)."""
    probabilities: Tensor = torch.special.ndtr((edges - config.timestep_mean) / config.timestep_std).diff()
    return probabilities
