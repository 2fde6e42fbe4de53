"""Noise schedules as float64 tables over t: x_t = a x_0 + s noise, SNR = a^2 / s^2.

Variance-preserving schedules (a^2 + s^2 = 1) are given by betas; rectified flow goes straight from image to noise
(a + s = 1). diffusers keeps its tables in float32, where the SNR of a shifted schedule is off by 1% and more. Everything
here is float64 and stays on the CPU; coefficients are cast once, when they meet the images.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..config.loading import checked_objective
from ..config.schema.objective import BETA_ENDS, ObjectiveConfig, is_straight, noise_schedule
from ..config.schema.types import PredictionType
from ..config.validation.objective import beta_problems
from ..errors import InputError, raise_all
from ..utils.tensor_memory import sent

# SNR of the first timestep: less holds hardly an image; more has an alphas_cumprod that is 1 in float32, as solvers keep it.
MIN_FIRST_SNR, MAX_FIRST_SNR = 0.01, 2.0**23
MAX_FIRST_SNR_OF_FLOW = 1e12  # t = 1e-6, a thousandth of a timestep
# SNR of the last timestep from which on sampling, which starts from pure noise, starts from what the network never saw: a tenth of the
# image's amplitude is left there. Stable Diffusion's schedule (scaled_linear) ends at 0.0047, that of the packaged digits at 0.0026.
MAX_TERMINAL_SNR = 0.01
TINY_SNR = 1e-150  # stands for an SNR of 0 where a limit is taken: far below any in use, and above 0 even when squared


@dataclass(frozen=True)
class Schedule:
    """Tables over the timesteps t = 0 .. T-1, from nearly clean to (nearly) pure noise."""

    a: Tensor  # (T,) float64, factor of the clean image
    s: Tensor  # (T,) float64, factor of the noise
    snr: Tensor  # (T,) float64
    timesteps: Tensor  # (T,) what the network is given as the time: t itself, or T times the t in [0, 1] of a flow
    diffusers: dict[str, Any]  # the same schedule as keyword arguments of a diffusers scheduler

    def __len__(self) -> int:
        return len(self.snr)

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """(T,) a^2, the share of the image in the variance of a variance-preserving schedule."""
        return self.a.square()

    @cached_property
    def betas(self) -> Tensor:
        """(T,) variances of the steps of a variance-preserving schedule."""
        return betas_of_snr(self.snr)

    @cached_property
    def log_snr_speed(self) -> Tensor:
        """(T,) -d log(SNR) / dt, where t goes from 0 to 1: what turns a weight on d log(SNR) into one on dt (arXiv 2303.00848).

        log(SNR) = 2 log a - 2 log s. Where a^2 + s^2 = 1 that is -2 a' / (a s^2), on the straight path -2 a' / (a s): a' is finite up to
        zero terminal SNR, where log(SNR) is not. A tiny a in place of 0 then gives the limit of products with the SNR.
        """
        straight = torch.allclose(self.a + self.s, torch.ones_like(self.a))
        (slope,) = torch.gradient(torch.cat([self.a.new_ones(1), self.a]))  # before the first timestep there is no noise
        return -2 * len(self) * slope[1:] / (self.a.clamp(min=TINY_SNR**0.5) * (self.s if straight else self.s.square()))

    @property
    def ends_in_noise(self) -> bool:
        """Whether the terminal SNR is 0."""
        return self.snr[-1].item() == 0

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = a x_0 + s noise (DDPM, arXiv 2006.11239, equation 4). Images (B, C, H, W); `t` (B,) int64 on the CPU."""
        return at(self.a, t, x_0) * x_0 + at(self.s, t, x_0) * noise

    def target(self, prediction_type: PredictionType, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should predict, (B, C, H, W).

        The noise, x_0, v = a noise - s x_0 (arXiv 2202.00512), or u = noise - x_0, along which rectified flow moves (arXiv
        2209.03003).
        """
        if prediction_type == "epsilon":
            return noise
        if prediction_type == "sample":
            return x_0
        if prediction_type == "flow":
            return noise - x_0
        return at(self.a, t, x_0) * noise - at(self.s, t, x_0) * x_0

    def x_0_per_prediction(self, prediction_type: PredictionType) -> Tensor:
        """(T,) k with d x_0 = k d prediction: how an error of the prediction moves the x_0 that it implies, at fixed x_t."""
        if prediction_type == "epsilon":
            return -self.s / self.a
        if prediction_type == "sample":
            return torch.ones_like(self.s)
        return -self.s  # of v, because x_0 = a x_t - s v, and of u, because x_0 = x_t - s u


def predicted_x_0(prediction_type: PredictionType, prediction: Tensor, x_t: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """The clean image that a prediction implies; images (B, C, H, W), a and s of the timestep."""
    if prediction_type == "epsilon":
        return (x_t - s * prediction) / a
    if prediction_type == "sample":
        return prediction
    if prediction_type == "flow":
        return x_t - s * prediction
    return a * x_t - s * prediction


def prediction_of_x_0(prediction_type: PredictionType, x_0: Tensor, x_t: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """The prediction (B, C, H, W) that implies this clean image: the inverse of `predicted_x_0`, for s > 0."""
    if prediction_type == "sample":
        return x_0
    noise = (x_t - a * x_0) / s
    if prediction_type == "epsilon":
        return noise
    return noise - x_0 if prediction_type == "flow" else a * noise - s * x_0


def at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Entries (B,) of a float64 table, shaped (B, 1, ...) to multiply `like`, with its dtype and device."""
    return sent(table[t].to(like.dtype).view(-1, *[1] * (like.ndim - 1)), like.device)


def variance_preserving(snr: Tensor, diffusers: Mapping[str, Any] | None = None) -> Schedule:
    """The schedule with a^2 + s^2 = 1 that has these SNR, (T,) float64."""
    T = len(snr)
    return Schedule((snr / (1 + snr)).sqrt(), (1 + snr).rsqrt(), snr, torch.arange(T), {"num_train_timesteps": T, **(diffusers or {})})


def rectified_flow(T: int, shift: float = 1.0) -> Schedule:
    """The straight path a = 1 - t, s = t at T timesteps, the last of which is pure noise.

    They are equally spaced in [1/T, 1], then multiplied by `shift` in their ratio t / (1 - t), as diffusers does it
    (arXiv 2403.03206, equation 23). The SNR is thereby divided by shift^2.
    """
    level = torch.arange(1, T + 1, dtype=torch.float64) / T
    s = shift * level / (1 - level + shift * level)
    a = (1 - level) / (1 - level + shift * level)
    return Schedule(a, s, (a / s).square(), (T * s).float(), {"num_train_timesteps": T, "shift": shift})


def snr_of_betas(betas: Tensor) -> Tensor:
    """(T,) SNR of variances (T,) float64.

    With L = sum log(1 - beta), SNR = e^L / (1 - e^L) = 1 / (e^-L - 1): no difference of nearly equal numbers at either end.
    """
    return 1 / torch.expm1(-torch.log1p(-betas).cumsum(0))


def betas_of_snr(snr: Tensor) -> Tensor:
    """(T,) variances float64 whose SNR is `snr`."""
    log_alphas_cumprod = -torch.log1p(1 / snr)
    return -torch.expm1(torch.diff(log_alphas_cumprod, prepend=log_alphas_cumprod.new_zeros(1)))


def with_zero_terminal_snr(snr: Tensor) -> Tensor:
    """(T,) SNR of the schedule whose a is shifted to end at 0 and scaled to begin as before (arXiv 2305.08891, algorithm 1)."""
    a = (snr / (1 + snr)).sqrt()
    rescaled = (a - a[-1]) * a[0] / (a[0] - a[-1])
    return rescaled.square() / ((1 - rescaled) * (1 + rescaled))


def _linear(beta_start: float, beta_end: float, T: int) -> Tensor:
    return torch.linspace(beta_start, beta_end, T, dtype=torch.float64)


def _scaled_linear(beta_start: float, beta_end: float, T: int) -> Tensor:
    """Linear in the square root (latent diffusion, arXiv 2112.10752)."""
    return torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64).square()


def _sigmoid(beta_start: float, beta_end: float, T: int) -> Tensor:
    """From one end to the other as a sigmoid over [-6, 6] (GeoDiff, arXiv 2203.02923; `sigmoid` in diffusers)."""
    return beta_start + (beta_end - beta_start) * torch.linspace(-6, 6, T, dtype=torch.float64).sigmoid()


def _cosine(T: int) -> Tensor:
    """Improved DDPM, arXiv 2102.09672, equation 17, with its bound of 0.999 on beta."""
    f = [math.cos((i / T + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(T + 1)]
    return torch.tensor([min(1 - after / before, 0.999) for before, after in pairwise(f)], dtype=torch.float64)


_BETAS = {"linear": _linear, "scaled_linear": _scaled_linear, "sigmoid": _sigmoid}


def make_schedule(config: ObjectiveConfig) -> Schedule:
    """The schedule of a configuration: a named one, its SNR multiplied by `schedule_shift`, perhaps rescaled to zero terminal SNR.

    Raises:
        InputError: a value is of a wrong type or out of range; the shift leaves no noise that float32 can hold at the first timestep, or
            nothing but noise; or there are too few timesteps for betas below 1.
    """
    config = checked_objective(config)
    raise_all(beta_problems(config))
    straight = is_straight(config)
    make = _flow if straight else _with_betas
    schedule = make(config)
    first = schedule.snr[0].item()
    largest = MAX_FIRST_SNR_OF_FLOW if straight else MAX_FIRST_SNR
    if not MIN_FIRST_SNR <= first <= largest:
        plain = make(dataclasses.replace(config, schedule_shift=1.0)).snr[0].item()
        min_shift, max_shift = 1.1 * MIN_FIRST_SNR / plain, 0.9 * largest / plain  # so that they hold when rounded to two digits
        raise InputError(
            f"schedule_shift is {config.schedule_shift}, which makes the SNR of the first timestep {first:.2g}; solvers need "
            f"{MIN_FIRST_SNR} to {largest:.2g}; take a shift from {min_shift:.2g} to {max_shift:.2g}"
        )
    return schedule


def _flow(config: ObjectiveConfig) -> Schedule:
    return rectified_flow(config.num_train_timesteps, config.schedule_shift**-0.5)


def _with_betas(config: ObjectiveConfig) -> Schedule:
    T = config.num_train_timesteps
    name = noise_schedule(config)
    assert name is not None
    named: dict[str, Any]
    if name == "cosine":
        betas, named = _cosine(T), {"beta_schedule": "squaredcos_cap_v2"}
    else:
        start, end = (1000 / T * beta for beta in BETA_ENDS[name])
        betas = _BETAS[name](start, end, T)
        named = {"beta_schedule": name, "beta_start": start, "beta_end": end}
    snr = snr_of_betas(betas)
    if config.schedule_shift != 1:
        snr = config.schedule_shift * snr
    if config.rescale_betas_zero_snr:
        snr = with_zero_terminal_snr(snr)
    if config.schedule_shift != 1 or name == "sigmoid":  # a name that DDPMScheduler alone knows
        named = {"trained_betas": betas_of_snr(snr).tolist()}
    if config.rescale_betas_zero_snr:
        # Also where the betas are rescaled already, which changes them no more: it tells solvers to expect an SNR of 0.
        named["rescale_betas_zero_snr"] = True
    return variance_preserving(snr, named)


def require_noise_at_the_end(config: ObjectiveConfig, schedule: Schedule) -> None:
    """Refuses a schedule that cannot be sampled from pure noise (arXiv 2305.08891, section 3.1).

    Raises:
        InputError: the SNR of the last timestep is above `MAX_TERMINAL_SNR`; names the largest shift that works.
    """
    if problem := terminal_snr_problem(schedule):
        largest = 0.9 * MAX_TERMINAL_SNR / schedule.snr[-1].item() * config.schedule_shift  # so that it holds when rounded to two digits
        shift = f"--schedule_shift {float(f'{largest:.2g}'):g} (now {config.schedule_shift:g})"
        raise InputError(f"{problem}; take {shift}, or --rescale_betas_zero_snr --prediction_type v_prediction, or --prediction_type flow")


def terminal_snr_problem(schedule: Schedule) -> str | None:
    """What is wrong with the end of a schedule, if something is."""
    last = schedule.snr[-1].item()
    if last <= MAX_TERMINAL_SNR:
        return None
    return (
        f"the noise schedule ends at timestep {len(schedule) - 1} with an SNR of {last:.2g}, above {MAX_TERMINAL_SNR}: sampling starts "
        f"from pure noise (SNR 0), which the network never sees"
    )


def schedule_of_scheduler(scheduler: Any) -> Schedule:
    """The schedule of a diffusers scheduler, in float64 from the definition of its betas where it has one.

    Raises:
        InputError: the scheduler has neither betas, each from 0 to 1, nor a straight path that is the same for all images.
    """
    config = scheduler.config
    if is_flow(scheduler):
        if config.get("use_dynamic_shifting"):
            raise InputError(f"{type(scheduler).__name__} shifts its timesteps by the size of the image; take one with a fixed shift")
        return rectified_flow(config.num_train_timesteps, config.shift)
    if not hasattr(scheduler, "alphas_cumprod"):
        name = type(scheduler).__name__
        raise InputError(f"{name} has no alphas_cumprod; take a scheduler with a discrete noise schedule, such as DDPMScheduler")
    defined = True
    if config.get("trained_betas") is not None:
        betas = torch.as_tensor(config.trained_betas, dtype=torch.float64)
    elif config.get("beta_schedule") in _BETAS:
        betas = _BETAS[config.beta_schedule](config.beta_start, config.beta_end, config.num_train_timesteps)
    elif config.get("beta_schedule") == "squaredcos_cap_v2":
        betas = _cosine(config.num_train_timesteps)
    else:  # its own float32 betas are exact enough (1e-5) for schedules that have no formula here
        defined, betas = False, scheduler.betas.double().cpu()
    if betas.ndim != 1 or not len(betas) or not ((betas >= 0) & (betas <= 1)).all():
        raise InputError(
            f"{type(scheduler).__name__} has betas that are no list of numbers from 0 to 1; correct trained_betas, beta_start, beta_end "
            f"or num_train_timesteps in its configuration"
        )
    snr = snr_of_betas(betas)
    if defined and config.get("rescale_betas_zero_snr"):
        snr = with_zero_terminal_snr(snr)
    own = scheduler.alphas_cumprod.double().cpu()
    if (own - snr / (1 + snr)).abs().max() > 1e-4:  # it changes its table itself
        snr = own / (1 - own)
    return variance_preserving(snr)


def prediction_type_of(scheduler: Any) -> Any:
    """What the network of a diffusers scheduler predicts: one of flow matching moves along u, but those of `SampleFlow` are given x_0."""
    if is_flow(scheduler):
        return getattr(scheduler, "flow_prediction_type", "flow")
    return scheduler.config.get("prediction_type", "epsilon")


def is_flow(scheduler: Any) -> bool:
    """Whether a diffusers scheduler is one of flow matching (its timesteps are T times the t in [0, 1] of the path)."""
    return any("FlowMatch" in kind.__name__ for kind in type(scheduler).__mro__)
