"""The likelihood of images by the probability-flow ODE: the density of slightly noisy images, and what the values of pixels add to it.

Along the ODE dx/dt = f(x, t) the log density of x falls by the divergence of f (instantaneous change of variables, arXiv 1810.01367);
the divergence is estimated by Hutchinson's trace estimator (Score SDE, arXiv 2011.13456, appendix D.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.schema.types import PredictionType
from ..errors import NotFiniteError
from .noise_schedule import Schedule, predicted_x_0, prediction_of_x_0

LEVELS = 256  # values of a pixel, equally spaced in [-1, 1]
MAX_STEPS = 10_000  # of the solver

# The pair of Dormand and Prince of orders 5 and 4 (J. Comput. Appl. Math. 6, 1980): places, weights of the stages, and the difference
# between the weights of the two solutions.
_PLACES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)

Velocity = Callable[[Tensor, float], Tensor]  # x (B, D), time -> dx/dtime (B, D)


@dataclass(frozen=True)
class Path:
    """The path of a schedule in continuous time: the angle whose cosine is a and whose sine is s, or t of the straight path.

    So that the ODE is dx/dtime = v, or u, which is bounded up to zero terminal SNR.
    """

    schedule: Schedule
    straight: bool

    @property
    def times(self) -> Tensor:
        """(T,) rising, of the timesteps."""
        return self.schedule.s if self.straight else torch.atan2(self.schedule.s, self.schedule.a)

    @property
    def start(self) -> float:
        """Where images are dequantized: at the first timestep, or where the noise is one value of a pixel, if that is later.

        Under less noise a density that does not know the values of pixels, as most networks do not, would say nothing of them.
        """
        level = 2 / (LEVELS - 1)
        return max(self.times[0].item(), level / (1 + level) if self.straight else math.atan(level))

    def a_s(self, time: float) -> tuple[Tensor, Tensor]:
        """Factors of image and noise."""
        t = torch.tensor(time, dtype=torch.float64)
        return (1 - t, t) if self.straight else (t.cos(), t.sin())

    def timestep(self, time: float) -> float:
        """What the network is given, between the timesteps linear."""
        times, given = self.times, self.schedule.timesteps.double()
        k = int(torch.searchsorted(times, torch.tensor(time, dtype=times.dtype)).clamp(1, len(times) - 1))
        share = (time - times[k - 1].item()) / (times[k] - times[k - 1]).item()
        return torch.lerp(given[k - 1], given[k], min(max(share, 0.0), 1.0)).item()

    def velocity(self, prediction_type: PredictionType, prediction: Tensor, x: Tensor, time: float) -> Tensor:
        """dx/dtime that a prediction implies; all (B, C, H, W)."""
        wanted: PredictionType = "flow" if self.straight else "v_prediction"
        if prediction_type == wanted:
            return prediction
        a, s = (factor.to(x) for factor in self.a_s(time))
        return prediction_of_x_0(wanted, predicted_x_0(prediction_type, prediction, x, a, s), x, a, s)


def log_density(velocity: Velocity, x: Tensor, probes: Tensor, start: float, end: float, tolerance: float) -> tuple[Tensor, int]:
    """Log density (B,) in nats, float64, of x at the time `start`, where at `end` it is standard normal, and the calls of `velocity`.

    Args:
        velocity: of the ODE; differentiable.
        x: (B, D) float64.
        probes: (P, B, D) of +1 and -1, fixed along the path: the divergence is the mean of p . (J p) over them.
        start, end: times.
        tolerance: relative and absolute, of x and of the log density per dimension, in each step.

    Raises:
        NotFiniteError: the solver finds no step that is small enough.
    """
    D, calls = x.shape[1], 0

    def with_divergence(state: Tensor, time: float) -> Tensor:
        nonlocal calls
        calls += 1
        with torch.enable_grad():
            leaf = state[:, :-1].detach().requires_grad_()
            moved = velocity(leaf, time)
            products = [
                (torch.autograd.grad(moved, leaf, probe.to(moved), retain_graph=k + 1 < len(probes))[0] * probe).sum(1)
                for k, probe in enumerate(probes)
            ]
        # The last entry is the integral of the divergence per dimension, of the size of x.
        return torch.cat([moved.detach(), torch.stack(products).mean(0)[:, None] / D], dim=1)

    state = torch.cat([x, x.new_zeros(len(x), 1)], dim=1)
    state = _integrate(with_divergence, state, start, end, tolerance)
    at_end = -(state[:, :-1].square().sum(1) + D * math.log(2 * math.pi)) / 2
    return at_end + D * state[:, -1], calls


def _integrate(f: Velocity, y: Tensor, time: float, end: float, tolerance: float) -> Tensor:
    """y (B, N) at `end` of dy/dtime = f(y, time): steps of order 5, whose error a solution of order 4 estimates.

    A step is as long as the image with the largest error allows: root mean square of error / (tolerance (1 + |y|)).
    """
    step, first = (end - time) / 50, f(y, time)
    for _ in range(MAX_STEPS):
        step = min(step, end - time)
        slopes = [first]
        for place, weights in zip(_PLACES[1:], _STAGES[1:]):
            moved = y + step * sum(w * slope for w, slope in zip(weights, slopes))
            slopes.append(f(moved, time + place * step))
        error = step * sum(w * slope for w, slope in zip(_ERROR, slopes))
        scaled = torch.as_tensor(error) / (tolerance * (1 + torch.maximum(y.abs(), moved.abs())))
        size = torch.maximum(scaled[:, :-1].square().mean(1).sqrt(), scaled[:, -1].abs()).max().item()
        if size <= 1:  # the last stage is at the solution, whose slope is the first of the next step
            time, y, first = time + step, moved, slopes[-1]
            if time >= end - 1e-12 * abs(end):
                return y
        step *= min(5.0, max(0.2, 0.9 * size**-0.2)) if size > 0 else 5.0
        if not (math.isfinite(size) and step > 1e-10 * end):
            break
    raise NotFiniteError(f"the probability-flow ODE cannot be solved at time {time:.4g} to a tolerance of {tolerance:g}; take a larger one")


def negative_log_likelihood(log_density: Tensor, x: Tensor, x_0: Tensor, a: float, s: float) -> Tensor:
    """(B,) nats: a bound on -log P(x_0) of pixels, from the log density (B,) of x = a x_0 + s noise (all (B, D) float64).

    The noise dequantizes: -log P <= E[-log p(x) - log P(x_0 | x) + log q(x | x_0)], where P(x_0 | x) is
    proportional to q(x | x_0) over the 256 values of each pixel (VDM, arXiv 2107.00630, section 3.3).
    """
    values = torch.linspace(-1, 1, LEVELS, dtype=torch.float64, device=x.device)
    decoded = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    entropy = x.shape[1] * (math.log(2 * math.pi * math.e) / 2 + math.log(s))
    for k in range(len(x)):  # one image after the other: (D, 256) at a time
        distances = ((x[k][:, None] - a * values) / s).square() / -2
        own = ((x[k] - a * x_0[k]) / s).square() / -2
        decoded[k] = (own - distances.logsumexp(1)).sum()
    return -log_density - decoded - entropy
