"""How much each noise level counts: weights as functions of the SNR, and what they become in other prediction spaces.

A weighting is defined once, on the squared error of the predicted noise. At fixed x_t every prediction is an affine
function of the predicted x_0, so squared errors are proportional:

    |d noise|^2 = SNR |d x_0|^2        |d v|^2 = (SNR + 1) |d x_0|^2

and a weight w on the noise error is the same objective as SNR w on x_0 and SNR / (SNR + 1) w on v: the same gradients.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, get_args

import torch
from torch import Tensor

from .config import WEIGHTING_PARAMETERS, PredictionType, Weighting
from .errors import InputError, raise_all
from .rules import range_problems
from .schedule import snr_of_scheduler


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
        parameters: those of the weighting, named like the flags: `snr_gamma` (5) of min_snr, `p2_k` (1) and `p2_gamma` (1)
            of p2, `snr_floor` (0) of all.

    Returns:
        (B,) float32, on the device of `timesteps`.

    Raises:
        InputError: an unknown name, a parameter the weighting does not have or that is out of range, timesteps that the
            scheduler does not have, or a weight that is not finite.
    """
    snr = snr_of_scheduler(scheduler)
    prediction_type = prediction_type or scheduler.config.prediction_type
    _require_known("weighting", weighting, WEIGHTINGS)
    _require_known("prediction_type", prediction_type, get_args(PredictionType))
    for name in parameters:
        _require_known("parameter", name, (*WEIGHTING_PARAMETERS.get(weighting, ()), "snr_floor"))
    raise_all(range_problems(parameters), "loss_weight")
    table = weight(snr, weighting, prediction_type, **parameters)
    t = timesteps.cpu()
    if t.is_floating_point() or not ((t >= 0) & (t < len(table))).all():
        raise InputError(f"timesteps must be whole numbers from 0 to {len(table) - 1}, but are {t.tolist()}")
    weights = table[t]
    if not weights.isfinite().all():
        raise InputError(
            f"weighting {weighting} on {prediction_type} is not finite at timesteps {t[~weights.isfinite()].tolist()}, "
            f"where the SNR is 0; add snr_floor=1e-3, or predict v"
        )
    return weights.to(timesteps.device, torch.float32)


def _require_known(what: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise InputError(f"{what} {value!r} is not known here; take one of: {', '.join(known)}")
