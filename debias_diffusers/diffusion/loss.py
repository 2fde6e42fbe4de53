"""The training loss of a batch: network, noise schedule, loss weights, variational bound."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.loading import checked_objective
from ..config.registry import WEIGHTINGS
from ..config.schema.objective import ObjectiveConfig
from ..config.schema.types import PredictionType
from ..config.validation.objective import path_problems, repeats_problems, unknown_weighting, variance_problems
from ..errors import InputError, raise_all
from ..utils.tensor_memory import sent
from .noise_schedule import Schedule, at, make_schedule
from .timestep_samplers import objective_density
from .uncertainty import Uncertainty
from .variational_bound import VariationalBound
from .weighting import weight

Network = Callable[[Tensor, Tensor], Tensor]  # x_t (B, C, H, W), timestep (B,) -> prediction (B, C, H, W) or (B, 2 C, H, W)


@dataclass(frozen=True)
class Terms:
    """Loss terms of a batch, sample by sample; all in the dtype of the images."""

    loss: Tensor  # (B,) to be minimised
    mse: Tensor  # (B,) mean square of prediction - target
    bound: Tensor | None = None  # (B,) the variational bound's term in bits per dimension, where the variance is learned
    precision: Tensor | None = None  # (B,) e^-u, the factor of a learned uncertainty on the weight

    def detached(self) -> Terms:
        """The same numbers without their graph."""
        return dataclasses.replace(self, **{name: term.detach() for name, term in vars(self).items() if term is not None})


@dataclass(frozen=True)
class Objective:
    """What is minimised: the mean over samples of weight(t) times the mean square of prediction - target.

    With a learned variance the hybrid objective adds T / 1000 times the variational bound, whose gradient reaches the variance
    only (Improved DDPM, arXiv 2102.09672, equation 16). Without weights it is T times the bound itself: the bits per dimension.

    A learned uncertainty u(t) divides the weighted square by e^u(t) and adds u(t).
    """

    schedule: Schedule
    prediction_type: PredictionType
    weights: Tensor | None  # (T,) float64, loss weights on the squared error of prediction_type; None for the variational bound
    bound: VariationalBound | None = None  # None where the variance is not learned

    def __call__(
        self,
        network: Network,
        x_0: Tensor,
        noise: Tensor,
        t: Tensor,
        input_noise: Tensor | None = None,
        *,
        uncertainty: Uncertainty | None = None,
    ) -> Terms:
        """Loss of each sample.

        Args:
            network: maps x_t (B, C, H, W) and the timesteps (B,) to a prediction (B, C, H, W); with a learned variance
                (B, 2 C, H, W), the second half of which are the values that `VariationalBound.log_variance` reads.
            x_0: (B, C, H, W) clean images in [-1, 1].
            noise: (B, C, H, W) standard normal.
            t: (B,) int64 timesteps, on the CPU.
            input_noise: (B, C, H, W) noise of which x_t is made, where the target is of another (input perturbation, arXiv 2301.11706).
            uncertainty: where it is learned.
        """
        x_t = self.schedule.add_noise(x_0, noise if input_noise is None else input_noise, t)
        prediction = network(x_t, sent(self.schedule.timesteps[t], x_t.device))
        return self.terms(prediction, x_0, noise, t, uncertainty)

    def terms(self, prediction: Tensor, x_0: Tensor, noise: Tensor, t: Tensor, uncertainty: Uncertainty | None = None) -> Terms:
        """Loss of each sample, given the network's output for x_t; arguments as of a call.

        Raises:
            InputError: the output has not the shape that follows from the images, to which torch would stretch or cut it; or these are no
                floats.
        """
        shape = (len(x_0), (2 if self.bound else 1) * x_0.shape[1], *x_0.shape[2:])
        if prediction.shape != shape:
            raise InputError(f"the network gives {tuple(prediction.shape)} for images {tuple(x_0.shape)}, but must give {shape}")
        if not x_0.is_floating_point():
            raise InputError(f"images are {x_0.dtype}, but must be floats in [-1, 1], such as images.float() / 127.5 - 1")
        prediction, *values = prediction.to(x_0.dtype).split(x_0.shape[1], dim=1)
        error = prediction - self.schedule.target(self.prediction_type, x_0, noise, t)
        mse = error.square().flatten(1).mean(1)
        T = len(self.schedule)
        if self.weights is None:
            bound = self._bound(error, values[0], x_0, t)
            return Terms(T * bound, mse, bound)
        loss, precision = at(self.weights, t, mse) * mse, None
        if uncertainty is not None:
            u = uncertainty(t).to(mse)
            precision = torch.exp(-u)
            loss = loss * precision + u
        if self.bound is None:
            return Terms(loss, mse, precision=precision)
        bound = self._bound(error.detach(), values[0], x_0, t)
        return Terms(loss + T / 1000 * bound, mse, bound, precision)

    def _bound(self, error: Tensor, values: Tensor, x_0: Tensor, t: Tensor) -> Tensor:
        """(B,) in bits per dimension."""
        assert self.bound is not None
        x_0_error = at(self.schedule.x_0_per_prediction(self.prediction_type), t, error) * error
        return self.bound.terms(x_0_error, values, x_0, t)


def make_objective(config: ObjectiveConfig) -> Objective:
    """The objective of a configuration.

    Raises:
        InputError: a value is of a wrong type or out of range; the weighting is not registered, or needs a learned variance; prediction
            type and noise schedule or weighting do not go together; a timestep has no usable loss weight; or the schedule has no noise
            that float32 can hold.
    """
    config = checked_objective(config)
    unknown = unknown_weighting(config.weighting)
    raise_all([unknown] if unknown else path_problems(config) + repeats_problems(config) + variance_problems(config))
    schedule = make_schedule(config)
    weights = None if config.weighting == "variational" else weight_table(config, schedule, config.prediction_type)
    if weights is not None:
        _require_usable(weights, config, schedule)
    return Objective(schedule, config.prediction_type, weights, VariationalBound.of(schedule) if config.learn_sigma else None)


def weight_table(config: ObjectiveConfig, schedule: Schedule, prediction_type: PredictionType) -> Tensor:
    """(T,) float64: the loss weight of each timestep for a prediction type, with all options of the configuration."""
    parameters = {name: getattr(config, name) for name in (*WEIGHTINGS[config.weighting].parameters, "snr_floor", "snr_ceiling")}
    weights = weight(schedule.snr, config.weighting, prediction_type, **parameters)
    if config.schedule_free_weights:
        weights = weights * schedule.log_snr_speed
    if schedule.ends_in_noise and prediction_type != "epsilon":
        # There an error of x_0 and one of v, or of u, are of the same size: one floor for all three.
        weights[-1] = weights[-1].clamp(min=config.terminal_weight_floor)
    if config.normalize_weights:
        weights = weights / (objective_density(config, schedule) * weights).sum()
    return weights


def _require_usable(weights: Tensor, config: ObjectiveConfig, schedule: Schedule) -> None:
    """Raises InputError where a weight is negative or beyond float32, in which losses are summed, or where all are 0."""
    usable = (weights >= 0) & (weights <= torch.finfo(torch.float32).max)
    if not usable.all():
        t = int((~usable).nonzero()[0])
        raise InputError(
            f"weighting {config.weighting} on {config.prediction_type} gives {weights[t]:.3g} at t = {t}, where the SNR is "
            f"{schedule.snr[t]:.3g}; take other parameters, or bound the SNR with --snr_floor or --snr_ceiling"
        )
    if weights.float().sum() == 0:
        raise InputError(f"weighting {config.weighting} on {config.prediction_type} is 0 at every timestep; take other parameters")
