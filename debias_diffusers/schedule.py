"""Noise schedules as float64 tables over t: x_t = a x_0 + s noise with a^2 + s^2 = 1 and SNR = a^2 / s^2.

diffusers keeps the same tables in float32, where the SNR of a shifted schedule is off by up to 1.2%. Everything here is
float64 and stays on the CPU; coefficients are cast once, when they meet the images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .config import ObjectiveConfig, PredictionType
from .errors import InputError


@dataclass(frozen=True)
class Schedule:
    """The noise levels t = 0 .. T-1, from nearly clean to nearly pure noise."""

    snr: Tensor  # (T,) float64
    diffusers: dict[str, Any]  # the same schedule as keyword arguments of a diffusers scheduler

    def __len__(self) -> int:
        return len(self.snr)

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """(T,) a^2, the share of the image in the variance."""
        return self.snr / (1 + self.snr)

    @cached_property
    def a(self) -> Tensor:
        """(T,) factor of the clean image."""
        return self.alphas_cumprod.sqrt()

    @cached_property
    def s(self) -> Tensor:
        """(T,) factor of the noise."""
        return (1 + self.snr).rsqrt()

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = a x_0 + s noise (DDPM, arXiv 2006.11239, equation 4). Images (B, C, H, W); `t` (B,) int64 on the CPU."""
        return at(self.a, t, x_0) * x_0 + at(self.s, t, x_0) * noise

    def target(self, prediction_type: PredictionType, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should predict, (B, C, H, W): the noise, x_0, or v = a noise - s x_0 (arXiv 2202.00512)."""
        if prediction_type == "epsilon":
            return noise
        if prediction_type == "sample":
            return x_0
        return at(self.a, t, x_0) * noise - at(self.s, t, x_0) * x_0


def at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Entries (B,) of a float64 table, shaped (B, 1, ...) to multiply `like`, with its dtype and device."""
    return table[t].to(like.dtype).view(-1, *[1] * (like.ndim - 1)).to(like.device, non_blocking=True)


def snr_of_betas(betas: Tensor) -> Tensor:
    """(T,) SNR of variances (T,) float64.

    With L = sum log(1 - beta), SNR = e^L / (1 - e^L) = 1 / (e^-L - 1): no difference of nearly equal numbers at either end.
    """
    return 1 / torch.expm1(-torch.log1p(-betas).cumsum(0))


def betas_of_snr(snr: Tensor) -> Tensor:
    """(T,) variances float64 whose SNR is `snr`."""
    log_alphas_cumprod = -torch.log1p(1 / snr)
    return -torch.expm1(torch.diff(log_alphas_cumprod, prepend=log_alphas_cumprod.new_zeros(1)))


def _linear(beta_start: float, beta_end: float, T: int) -> Tensor:
    return torch.linspace(beta_start, beta_end, T, dtype=torch.float64)


def _scaled_linear(beta_start: float, beta_end: float, T: int) -> Tensor:
    """Linear in the square root (latent diffusion, arXiv 2112.10752)."""
    return torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64).square()


def _cosine(T: int) -> Tensor:
    """Improved DDPM, arXiv 2102.09672, equation 17, with its bound of 0.999 on beta."""
    f = [math.cos((i / T + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(T + 1)]
    return torch.tensor([min(1 - after / before, 0.999) for before, after in pairwise(f)], dtype=torch.float64)


# Ends of the betas at T = 1000; for other T they scale by 1000 / T, which keeps the noise of the last level about the same.
_LINEAR_ENDS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}
_LINEAR_BETAS = {"linear": _linear, "scaled_linear": _scaled_linear}


def make_schedule(config: ObjectiveConfig) -> Schedule:
    """The schedule of a configuration: a named one, its SNR multiplied by `schedule_shift`."""
    T = config.num_train_timesteps
    named: dict[str, Any]
    if config.noise_schedule == "cosine":
        betas, named = _cosine(T), {"beta_schedule": "squaredcos_cap_v2"}
    else:
        start, end = (1000 / T * beta for beta in _LINEAR_ENDS[config.noise_schedule])
        betas = _LINEAR_BETAS[config.noise_schedule](start, end, T)
        named = {"beta_schedule": config.noise_schedule, "beta_start": start, "beta_end": end}
    snr = snr_of_betas(betas)
    if config.schedule_shift != 1:
        snr = config.schedule_shift * snr
        named = {"trained_betas": betas_of_snr(snr).tolist()}
    return Schedule(snr, {"num_train_timesteps": T, **named})


def snr_of_scheduler(scheduler: Any) -> Tensor:
    """(T,) SNR of a diffusers scheduler, in float64 from the definition of its betas where it has one.

    Raises:
        InputError: the scheduler has no discrete noise schedule (flow matching, for example).
    """
    if not hasattr(scheduler, "alphas_cumprod"):
        name = type(scheduler).__name__
        raise InputError(f"{name} has no alphas_cumprod; take a scheduler with a discrete noise schedule, such as DDPMScheduler")
    config = scheduler.config
    # Its own float32 betas are exact enough (1e-5) for schedules that have no formula here.
    betas = scheduler.betas.double().cpu()
    if config.get("trained_betas") is not None:
        betas = torch.as_tensor(config.trained_betas, dtype=torch.float64)
    elif config.get("beta_schedule") in _LINEAR_BETAS:
        betas = _LINEAR_BETAS[config.beta_schedule](config.beta_start, config.beta_end, config.num_train_timesteps)
    elif config.get("beta_schedule") == "squaredcos_cap_v2":
        betas = _cosine(config.num_train_timesteps)
    snr = snr_of_betas(betas)
    own = scheduler.alphas_cumprod.double().cpu()
    if (own - snr / (1 + snr)).abs().max() > 1e-4:  # it rescaled its betas or its alphas_cumprod
        snr = own / (1 - own)
    return snr
