"""How much each noise level counts: weights as functions of the SNR, and what they become in other prediction spaces.

A weighting is defined once, on the squared error of the predicted noise. At fixed x_t every prediction is an affine
function of the predicted x_0, so squared errors are proportional:

    |d noise|^2 = SNR |d x_0|^2        |d v|^2 = (SNR + 1) |d x_0|^2

and a weight w on the noise error is the same objective as SNR w on x_0 and SNR / (SNR + 1) w on v: the same gradients.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .config import PredictionType, Weighting
from .errors import InputError
from .schedule import from_scheduler


def constant(snr: Tensor) -> Tensor:
    """1: the simple loss of DDPM (arXiv 2006.11239, equation 14)."""
    return torch.ones_like(snr)


def debiased(snr: Tensor) -> Tensor:
    """1 / sqrt(SNR), the weight on the noise error (arXiv 2310.08442)."""
    return snr.rsqrt()


def inverse_snr(snr: Tensor) -> Tensor:
    """1 / SNR: every noise level of x_0 counts the same."""
    return 1 / snr


def p2(snr: Tensor, p2_k: float = 1.0, p2_gamma: float = 1.0) -> Tensor:
    """(k + SNR)^-gamma (P2, arXiv 2204.00227)."""
    return (p2_k + snr) ** -p2_gamma


def min_snr(snr: Tensor, snr_gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma) / SNR (Min-SNR, arXiv 2303.09556)."""
    return (snr_gamma / snr).clamp(max=1)


WEIGHTINGS: dict[str, Callable[..., Tensor]] = {
    "constant": constant,
    "debiased": debiased,
    "inverse_snr": inverse_snr,
    "p2": p2,
    "min_snr": min_snr,
}

# Far below and above any SNR in use, and far from the limits of float64 even when squared.
_TINY, _HUGE = 1e-150, 1e150


def weight(snr: Tensor, weighting: Weighting, prediction_type: PredictionType, *, snr_floor: float = 0.0, **parameters: float) -> Tensor:
    """The weight of the squared error in the space of `prediction_type`, of the same shape as `snr`, in float64.

    Args:
        snr: signal-to-noise ratios.
        snr_floor: the weighting is evaluated at an SNR of at least this (the conversion between spaces is not).
        parameters: `snr_gamma`, `p2_k`, `p2_gamma`; each weighting takes its own and leaves the rest.
    """
    on_noise = WEIGHTINGS[weighting]
    mine = {name: parameters[name] for name in inspect.signature(on_noise).parameters if name in parameters}
    snr = snr.double()
    if prediction_type == "epsilon":
        return on_noise(snr.clamp(min=snr_floor), **mine)
    # In the other spaces the limit at SNR = 0 is finite; a tiny SNR in place of 0 gives it without 0 times infinity.
    snr = snr.clamp(_TINY, _HUGE)
    on_sample = snr * on_noise(snr.clamp(min=snr_floor), **mine)
    return on_sample if prediction_type == "sample" else on_sample / (1 + snr)


def loss_weight(
    scheduler: Any,
    timesteps: Tensor,
    weighting: Weighting = "debiased",
    prediction_type: PredictionType | None = None,
    **parameters: float,
) -> Tensor:
    """Loss weights for a training loop of your own: multiply the mean square error of each sample.

    Args:
        scheduler: a diffusers scheduler with a discrete noise schedule.
        timesteps: (B,) the timesteps of the batch.
        weighting: one of `WEIGHTINGS`.
        prediction_type: the space of the error; the scheduler's own if left out.
        parameters: `snr_gamma` (5), `p2_k` (1), `p2_gamma` (1), `snr_floor` (0).

    Returns:
        (B,) float32, on the device of `timesteps`.

    Raises:
        InputError: an unknown name or parameter, or a weight that is not finite.
    """
    prediction_type = prediction_type or scheduler.config.prediction_type
    for name, value, known in (
        ("weighting", weighting, tuple(WEIGHTINGS)),
        ("prediction_type", prediction_type, ("epsilon", "sample", "v_prediction")),
        *(("parameter", name, ("snr_gamma", "p2_k", "p2_gamma", "snr_floor")) for name in parameters),
    ):
        if value not in known:
            raise InputError(f"{name} {value!r} is not known; take one of: {', '.join(known)}")
    table = weight(from_scheduler(scheduler).snr, weighting, prediction_type, **parameters)
    weights = table[timesteps.cpu()]
    if not weights.isfinite().all():
        bad = timesteps.cpu()[~weights.isfinite()].tolist()
        raise InputError(
            f"weighting {weighting} on {prediction_type} is not finite at timesteps {bad}, where the SNR is 0; "
            f"add snr_floor=1e-3, or predict v"
        )
    return weights.to(timesteps.device, torch.float32)
