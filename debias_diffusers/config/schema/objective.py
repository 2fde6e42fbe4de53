"""Configurations of the objective: prediction type, noise schedule, loss weighting, timesteps, noise."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated

from typing_extensions import Doc

from ..ranges import Range, above, at_least
from ..registry import TIMESTEP_BIASES, TIMESTEP_SAMPLERS, WEIGHTINGS, summaries
from .types import NoiseSchedule, PredictionType, Share, TimestepBiasName, TimestepSamplerName, VarianceType

# Help of the fields that name an entry of a table.
_WEIGHTING = f"loss weighting, one objective whatever the prediction type: {summaries(WEIGHTINGS)}; or a name that you registered"
_TIMESTEP_SAMPLER = (
    f"distribution of the timesteps: {summaries(TIMESTEP_SAMPLERS)}; "
    f"{' and '.join(name for name, spec in TIMESTEP_SAMPLERS.items() if not spec.corrected)} change the objective"
)
_TIMESTEP_BIAS = (
    f"bias of the timesteps, a factor on what timestep_sampler draws, without correction, so that it changes the objective: "
    f"{summaries(TIMESTEP_BIASES)}"
)
DEFAULT_SCHEDULE: NoiseSchedule = "linear"
# Ends of the betas at T = 1000; for other T they scale by 1000 / T, which keeps the noise of the last timestep about the same.
BETA_ENDS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "sigmoid": (1e-4, 0.02)}


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The training objective: parameterization, noise schedule, loss weighting, and distribution of the timesteps."""

    prediction_type: PredictionType = "epsilon"  # parameterization: the network predicts noise, x_0, v, or the velocity of rectified flow
    weighting: Annotated[str, Doc(_WEIGHTING)] = "debiased"
    snr_gamma: Annotated[float, above(0, 5)] = 5.0  # gamma of min_snr (threshold) and of soft_min_snr
    p2_k: Annotated[float, above(0, 1)] = 1.0  # k of p2
    p2_gamma: Annotated[float, at_least(0, 1)] = 1.0  # gamma of p2
    sigma_data: Annotated[float, above(0, 0.5)] = 0.5  # standard deviation of the data in edm and edm_monotonic
    # b of sigmoid, which is soft_min_snr with gamma = e^b
    sigmoid_bias: Annotated[float, Range("from -30 to 30, such as 0", lambda value: -30 <= value <= 30)] = 0.0
    # weights on d log(SNR) in place of dt: times -d log(SNR)/dt, so that the objective does not depend on the noise schedule
    schedule_free_weights: bool = False
    # learned uncertainty of EDM2: the weighted loss L(t) becomes L(t)/e^u(t) + u(t), where u is trained with the network
    learned_uncertainty: bool = False
    snr_floor: Annotated[float, at_least(0, "1e-3")] = 0.0  # minimum SNR at which the weighting is evaluated
    snr_ceiling: Annotated[float, at_least(0, 1000, zero="off")] = 0.0  # maximum SNR at which the weighting is evaluated; 0 is off
    # minimum loss weight on x_0 at zero terminal SNR, where sampling starts (before normalizing); 0 is off
    terminal_weight_floor: Annotated[float, at_least(0, 0.5, zero="off")] = 0.0
    normalize_weights: bool = False  # divide the loss weights by their mean
    # beta schedule, linear if left out; rectified_flow, the straight path, for prediction_type sample; flow is on the straight path anyway
    noise_schedule: NoiseSchedule | None = None
    num_train_timesteps: Annotated[int, at_least(2, 1000)] = 1000  # number of timesteps T
    schedule_shift: Annotated[float, above(0, 1)] = 1.0  # multiplies the SNR of every timestep; > 1 for low resolutions
    rescale_betas_zero_snr: bool = False  # rescale betas to zero terminal SNR
    learn_sigma: bool = False  # learned variance: the network also predicts that of a sampling step, by the variational bound
    variance_type: VarianceType | None = None  # variance of the steps of ddpm where it is not learned; fixed_large if left out
    timestep_sampler: Annotated[TimestepSamplerName, Doc(_TIMESTEP_SAMPLER)] = "uniform"
    # mean of ln(s/a) in log_normal, of ln(t/(1-t)) before any shift in logit_normal
    timestep_mean: Annotated[float, Range("a finite number, such as 0", math.isfinite)] = 0.0
    timestep_std: Annotated[float, above(0, 1)] = 1.0  # standard deviation of the same
    laplace_mean: Annotated[float, Range("a finite number, such as 0", math.isfinite)] = 0.0  # mean of ln(SNR) in laplace
    laplace_scale: Annotated[float, above(0, 0.5)] = 0.5  # scale b of laplace, whose standard deviation is sqrt(2) b
    # s of mode: above 0 the middle of t is drawn more often, below 0 its ends; 0 is uniform
    mode_scale: Annotated[float, Range("from -1 to 1.75, such as 1.29", lambda value: -1 <= value <= 1.75)] = 1.29
    speed_k: Annotated[float, at_least(1, 5)] = 5.0  # k of speed: how many times as often the first timesteps are drawn
    # portion of the timesteps that speed draws more often: those before the noise hides the image
    speed_portion: Annotated[float, Range("above 0 and at most 1, such as 0.7", lambda value: 0 < value <= 1)] = 0.7
    # lambda of speed: weights go from 1 - lambda to lambda, before they are divided by their mean; 0.5 is none
    speed_lambda: Annotated[float, Range("from 0.5 to 1, such as 0.6", lambda value: 0.5 <= value <= 1)] = 0.6
    # timestep_sampler of the steps from timestep_sampler_switch on; the same in the whole run if left out
    timestep_sampler_after: TimestepSamplerName | None = None
    # optimizer steps after which timestep_sampler_after draws
    timestep_sampler_switch: Annotated[int, at_least(0, 10_000)] = 0
    timestep_bias_strategy: Annotated[TimestepBiasName, Doc(_TIMESTEP_BIAS)] = "none"
    timestep_bias_multiplier: Annotated[float, above(0, 2)] = 1.0  # how many times as often these timesteps are drawn
    # portion of the timesteps that earlier and later bias
    timestep_bias_portion: Annotated[float, Range("above 0 and below 1, such as 0.25", lambda value: 0 < value < 1)] = 0.25
    timestep_bias_begin: Annotated[int, at_least(0, 0)] = 0  # first timestep of range
    timestep_bias_end: Annotated[int | None, at_least(1, 500)] = None  # the timestep after the last of range; T if left out


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """The noise in training, where it is not standard normal; sampling starts from standard normal noise all the same."""

    # offset noise: a normal number for each sample and channel, times this, is added to the noise; 0 is off
    noise_offset: Annotated[float, at_least(0, 0.05, zero="off")] = 0.0
    # pyramid (multi-resolution) noise: noise of a level times this is added to that of the level with more pixels; 0 is off
    pyramid_noise_discount: Share = 0.0
    # levels of pyramid noise below the full resolution, each with a half to a quarter of the pixels a side; fewer where one pixel is left
    pyramid_noise_iterations: Annotated[int, at_least(1, 6)] = 6
    # input perturbation: x_t is made with more noise than the target, by normal noise times this; 0 is off
    input_perturbation: Annotated[float, at_least(0, 0.1, zero="off")] = 0.0


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """Plot the loss weights of an objective over the timesteps, and write them as CSV."""

    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    against: tuple[str, ...] = ()  # more weightings in the same plot
    output_dir: str = "weights"  # output directory for weights.csv and weights.png


def noise_schedule(objective: ObjectiveConfig) -> NoiseSchedule | None:
    """The noise schedule of an objective; None of rectified flow."""
    return objective.noise_schedule or (None if objective.prediction_type == "flow" else DEFAULT_SCHEDULE)


def is_straight(objective: ObjectiveConfig) -> bool:
    """Whether x_t is on the straight path from image to noise, that of rectified flow."""
    return objective.prediction_type == "flow" or objective.noise_schedule == "rectified_flow"


def needs_own_scheduler(objective: ObjectiveConfig) -> bool:
    """Whether the exported scheduler is one of this package: those of diffusers take no x_0 on the straight path."""
    return is_straight(objective) and objective.prediction_type != "flow"
