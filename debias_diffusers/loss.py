"""Batch, network, schedule and weighting to loss terms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .config import WEIGHTING_PARAMETERS, ObjectiveConfig, PredictionType
from .schedule import Schedule, at, make_schedule
from .weighting import weight

Network = Callable[[Tensor, Tensor], Tensor]  # x_t (B, C, H, W), t (B,) -> prediction (B, C, H, W)


@dataclass(frozen=True)
class Objective:
    """What is minimised: the mean over samples of weight(t) times the mean square of prediction - target."""

    schedule: Schedule
    prediction_type: PredictionType
    weights: Tensor  # (T,) float64, in the space of prediction_type

    def __call__(self, network: Network, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Weighted loss of each sample.

        Args:
            network: maps x_t (B, C, H, W) and t (B,) to a prediction (B, C, H, W).
            x_0: (B, C, H, W) clean images in [-1, 1].
            noise: (B, C, H, W) standard normal.
            t: (B,) int64 timesteps, on the CPU.

        Returns:
            (B,) in the dtype of `x_0`.
        """
        x_t = self.schedule.add_noise(x_0, noise, t)
        prediction = network(x_t, t.to(x_t.device, non_blocking=True))
        return self.terms(prediction, x_0, noise, t)

    def terms(self, prediction: Tensor, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Weighted loss of each sample (B,), given the prediction."""
        target = self.schedule.target(self.prediction_type, x_0, noise, t)
        mse = (prediction.to(target.dtype) - target).square().flatten(1).mean(1)
        return at(self.weights, t, mse) * mse


def make_objective(config: ObjectiveConfig) -> Objective:
    """The objective of a configuration."""
    schedule = make_schedule(config)
    parameters = {name: getattr(config, name) for name in WEIGHTING_PARAMETERS.get(config.weighting, ())}
    weights = weight(schedule.snr, config.weighting, config.prediction_type, snr_floor=config.snr_floor, **parameters)
    return Objective(schedule, config.prediction_type, weights)
