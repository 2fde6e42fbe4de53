"""How timesteps are drawn: each sample of the data has a u(seed, position) in [0, 1), which is mapped to a timestep here.

A sampler may draw some timesteps more often than others. Either each loss is corrected for that, by 1 / (T p(t)), so that only
the variance of its estimate changes; or, for `log_normal`, `logit_normal`, `laplace`, `mode` and `speed`, it is not, and the objective
is the weighting times the density of these timesteps. A bias multiplies the density of any sampler and is never corrected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..config.registry import TIMESTEP_BIASES, TIMESTEP_SAMPLERS
from ..config.schema.objective import ObjectiveConfig
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

    def begin_step(self, step: int) -> None:
        """Told before the draws of an optimizer step how many were made before it."""

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


class Weighted(TimestepSampler):
    """Draws with fixed probabilities, and weighs the losses without correction: both are the density of the objective.

    Args:
        probabilities: (T,) float64, of each timestep.
        weights: (T,) float64, which are divided by their mean over the draws.
    """

    def __init__(self, probabilities: Tensor, weights: Tensor) -> None:
        self.weights = weights
        super().__init__(probabilities, corrected=False)

    def _corrections(self) -> Tensor:
        return self.weights / (self.probabilities * self.weights).sum()


class Phases(TimestepSampler):
    """One sampler in the first steps of a run, and another from the step `switch` on; a function of the step, so nothing is saved of it.

    A sampler that learns does so from the losses of all steps.
    """

    def __init__(self, first: TimestepSampler, second: TimestepSampler, switch: int) -> None:
        self.first, self.second, self.switch = first, second, switch
        self.learns = first.learns or second.learns
        self.current = first

    def begin_step(self, step: int) -> None:
        self.current = self.first if step < self.switch else self.second

    @property
    def probabilities(self) -> Tensor:  # type: ignore[override]
        return self.current.probabilities

    @property
    def corrections(self) -> Tensor:  # type: ignore[override]
        return self.current.corrections

    def draw(self, u: Tensor, positions: Sequence[int]) -> Tensor:
        return self.current.draw(u, positions)

    def update(self, t: Tensor, losses: Tensor) -> None:
        self.first.update(t, losses)
        self.second.update(t, losses)

    def state(self) -> dict[str, Tensor]:
        return self.first.state() | self.second.state()  # of which one at most learns

    def load(self, state: Mapping[str, Tensor]) -> None:
        for sampler in (self.first, self.second):
            if sampler.learns:
                sampler.load(state)


def make_timestep_sampler(config: ObjectiveConfig, schedule: Schedule, batch_size: int = 1) -> TimestepSampler:
    """The sampler of a configuration; `batch_size` counts the samples of an optimizer step in all processes."""
    first = _make(config.timestep_sampler, config, schedule, batch_size)
    if config.timestep_sampler_after is None:
        return first
    return Phases(first, _make(config.timestep_sampler_after, config, schedule, batch_size), config.timestep_sampler_switch)


def objective_density(config: ObjectiveConfig, schedule: Schedule) -> Tensor:
    """(T,) float64 density of the timesteps in the objective: how often each is drawn in the last steps of a run, with its correction."""
    sampler = _make(config.timestep_sampler_after or config.timestep_sampler, config, schedule, batch_size=1)
    return sampler.probabilities * sampler.corrections


def _make(name: str, config: ObjectiveConfig, schedule: Schedule, batch_size: int) -> TimestepSampler:
    sampler = _SAMPLERS[name](config, schedule, batch_size)
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
    "laplace": lambda config, schedule, _: TimestepSampler(_laplace(config, schedule), corrected=False),
    "laplace_corrected": lambda config, schedule, _: TimestepSampler(_mixed(_laplace(config, schedule), UNIFORM_SHARE)),
    "mode": lambda config, schedule, _: TimestepSampler(_mode(len(schedule), config.mode_scale), corrected=False),
    "speed": lambda config, schedule, _: Weighted(_speed(config, len(schedule)), _growth_of_noise(schedule, config.speed_lambda)),
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
    """(T,) probabilities of ln(s / a) from a normal (log-normal: EDM, arXiv 2206.00364, table 1)."""
    return _normal_between(-_log_snr_edges(schedule) / 2, config)


def _log_snr_edges(schedule: Schedule) -> Tensor:
    """(T + 1,) falling ln(SNR) that bound the timesteps: half-way between neighbours, and infinity at the ends."""
    log_snr = schedule.snr.log()
    end = log_snr.new_full((1,), torch.inf)
    return torch.cat([end, (log_snr[1:] + log_snr[:-1]) / 2, -end])


def _laplace(config: ObjectiveConfig, schedule: Schedule) -> Tensor:
    """(T,) probabilities of ln(SNR) from a Laplace distribution (arXiv 2407.03297, table 1)."""
    z = (_log_snr_edges(schedule) - config.laplace_mean) / config.laplace_scale
    below = torch.where(z < 0, z.exp() / 2, 1 - (-z).exp() / 2)  # the distribution function
    return -below.diff()


def _mode(T: int, scale: float) -> Tensor:
    """(T,) probabilities of t = f(u) = 1 - u - s (cos^2(pi u / 2) - 1 + u), u uniform (mode sampling: arXiv 2403.03206, section 3.1).

    f falls from 1 to 0, so the probability of t in [a, b] is the u between where f is b and where it is a. These are found by bisection.
    """
    edges = torch.linspace(0, 1, T + 1, dtype=torch.float64)
    low, high = torch.zeros_like(edges), torch.ones_like(edges)
    for _ in range(60):
        u = (low + high) / 2
        above = 1 - u - scale * ((math.pi / 2 * u).cos().square() - 1 + u) > edges
        low, high = torch.where(above, u, low), torch.where(above, high, u)
    u[0], u[-1] = 1, 0
    return -u.diff()


def _speed(config: ObjectiveConfig, T: int) -> Tensor:
    """(T,) k / (T + tau (k - 1)) up to the timestep tau, and 1 / (T + tau (k - 1)) after it (SpeeD, arXiv 2405.17403, section 2)."""
    factors = torch.ones(T, dtype=torch.float64)
    factors[: round(config.speed_portion * T)] = config.speed_k
    return _normalized(factors)


def _growth_of_noise(schedule: Schedule, most: float) -> Tensor:
    """(T,) the growth of the noise's variance s^2 at each timestep, rescaled to [1 - most, most] (SpeeD's change-aware weights)."""
    (growth,) = torch.gradient(schedule.s.square())
    return 1 - most + (2 * most - 1) * (growth - growth.min()) / (growth.max() - growth.min())


def _normal_between(edges: Tensor, config: ObjectiveConfig) -> Tensor:
    """(T,) probabilities of a normal between neighbours of `edges` (T + 1,)."""
    probabilities: Tensor = torch.special.ndtr((edges - config.timestep_mean) / config.timestep_std).diff()
    return probabilities
