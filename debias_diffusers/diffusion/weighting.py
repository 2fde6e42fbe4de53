"""Loss weights as functions of the SNR, and what they become for other parameterizations.

A weighting is defined once, on the squared error of the predicted noise. At fixed x_t every prediction is an affine
function of the predicted x_0, so squared errors are proportional:

    |d noise|^2 = SNR |d x_0|^2      |d v|^2 = (SNR + 1) |d x_0|^2      |d u|^2 = (sqrt(SNR) + 1)^2 |d x_0|^2

(v where a^2 + s^2 = 1; u = noise - x_0 of rectified flow, where a = 1 - t, s = t and so sqrt(SNR) + 1 = 1/t). A weight w on
the noise error is therefore the same objective, with the same gradients, as SNR w on x_0, SNR / (SNR + 1) w on v, and
SNR / (sqrt(SNR) + 1)^2 w = (1 - t)^2 w on u.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..config.ranges import range_problems
from ..config.registry import WEIGHTINGS, WeightingSpec, parameters_of
from ..config.schema.objective import ObjectiveConfig
from ..config.schema.types import PredictionType
from ..config.validation.objective import bound_problems
from ..errors import InputError, raise_all
from .noise_schedule import TINY_SNR, is_flow, prediction_type_of, schedule_of_scheduler

_HUGE = 1e150  # above any SNR in use, and finite even when squared, as `TINY_SNR` is above 0


def constant(snr: Tensor) -> Tensor:
    """1: the simple loss of DDPM (arXiv 2006.11239, equation 14)."""
    return torch.ones_like(snr)


def debiased(snr: Tensor) -> Tensor:
    """1 / sqrt(SNR), the weight on the noise error (arXiv 2310.08442)."""
    return snr.rsqrt()


def inverse_snr(snr: Tensor) -> Tensor:
    """1 / SNR: errors of x_0 count the same at every timestep."""
    return 1 / snr


def p2(snr: Tensor, p2_k: float = 1.0, p2_gamma: float = 1.0) -> Tensor:
    """(k + SNR)^-gamma (P2, arXiv 2204.00227)."""
    return (p2_k + snr) ** -p2_gamma


def min_snr(snr: Tensor, snr_gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma) / SNR (Min-SNR, arXiv 2303.09556)."""
    return (snr_gamma / snr).clamp(max=1)


def soft_min_snr(snr: Tensor, snr_gamma: float = 5.0) -> Tensor:
    """gamma / (SNR + gamma): Min-SNR without its kink (arXiv 2401.11605)."""
    return snr_gamma / (snr + snr_gamma)


def truncated_snr(snr: Tensor) -> Tensor:
    """max(SNR, 1) / SNR (progressive distillation, arXiv 2202.00512, section 4)."""
    return (1 / snr).clamp(min=1)


def edm(snr: Tensor, sigma_data: float = 0.5) -> Tensor:
    """1 + 1 / (SNR sigma_data^2) (EDM, arXiv 2206.00364, table 1: lambda(sigma) on x_0, with sigma^2 = 1 / SNR)."""
    return 1 + 1 / (snr * sigma_data**2)


def edm_monotonic(snr: Tensor, sigma_data: float = 0.5) -> Tensor:
    """EDM's weight times its density of lambda = log SNR, N(2.4, 2.4^2), held at its peak for smaller lambda; 1 there.

    "EDM-monotonic" of arXiv 2303.00848, section 4.1, where weights are on d lambda: it goes with `schedule_free_weights`. 2.4 is -2 times
    the mean -1.2 of ln(sigma) in EDM, and twice its standard deviation 1.2 (arXiv 2206.00364, table 1).
    """

    def log_weight(log_snr: Tensor) -> Tensor:
        return -((log_snr - 2.4) ** 2) / (2 * 2.4**2) + (torch.exp(-log_snr) + sigma_data**2).log()

    peak, width = 0.0, 64.0  # beyond +-64 the density alone is below e^-330 of its peak
    for _ in range(8):
        around = torch.linspace(peak - width, peak + width, 201, dtype=torch.float64)
        peak, width = around[log_weight(around).argmax()].item(), width / 50
    log_snr = snr.double().clamp(TINY_SNR, _HUGE).log()
    return (log_weight(log_snr.clamp(min=peak)) - log_weight(log_snr.new_tensor(peak))).exp()


def flow(snr: Tensor) -> Tensor:
    """(1 + 1 / sqrt(SNR))^2: 1 on u = noise - x_0, the plain loss of flow matching (arXiv 2210.02747)."""
    return (1 + snr.rsqrt()).square()


def v(snr: Tensor) -> Tensor:
    """1 + 1 / SNR: 1 on v, the plain loss of v-prediction (arXiv 2202.00512)."""
    return 1 + 1 / snr


def sigmoid(snr: Tensor, sigmoid_bias: float = 0.0) -> Tensor:
    """sigmoid(b - log SNR) = e^b / (e^b + SNR): soft Min-SNR with gamma = e^b; at b = 0, P2 (arXiv 2303.00848; arXiv 2410.19324)."""
    return (sigmoid_bias - snr.log()).sigmoid()


def cosmap(snr: Tensor) -> Tensor:
    """2 / pi (1 + sqrt(SNR))^4 / (SNR (1 + SNR)): 2 / (pi (1 - 2t + 2t^2)) on u (arXiv 2403.03206, section 3.1)."""
    noise = snr.rsqrt()  # s / a
    # (1 + s/a)^4 / (1 + (s/a)^2), without infinity over infinity at either end.
    return 2 / math.pi * (1 + noise).square() * (1 + 2 / (noise + 1 / noise))


def sigma_sqrt(snr: Tensor) -> Tensor:
    """(1 + sqrt(SNR))^4 / SNR: t^-2 on u (`sigma_sqrt` in diffusers' scripts for Stable Diffusion 3)."""
    return (snr.sqrt() + 2 + snr.rsqrt()).square()


# By the names of `registry.WEIGHTINGS`.
WEIGHTING_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "constant": constant,
    "debiased": debiased,
    "inverse_snr": inverse_snr,
    "p2": p2,
    "min_snr": min_snr,
    "soft_min_snr": soft_min_snr,
    "truncated_snr": truncated_snr,
    "edm": edm,
    "edm_monotonic": edm_monotonic,
    "flow": flow,
    "v": v,
    "sigmoid": sigmoid,
    "cosmap": cosmap,
    "sigma_sqrt": sigma_sqrt,
}

# The debiased weight as other code has it, to repeat its runs: for each prediction type of that code, the weight on its squared error.
REPEATED_FUNCTIONS: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
    # The paper's code: the weight of the noise error whatever the target.
    "debiased_as_is": {"epsilon": debiased, "sample": debiased, "v_prediction": debiased},
    # diffengine: too heavy by 1/a on v. OneTrainer is not repeated: it bounds the SNR at 1000 for both.
    "debiased_diffengine": {"epsilon": debiased, "v_prediction": lambda snr: (snr + 1).rsqrt()},
    # sd-scripts bound the SNR at 1000. On v this is the uniform error of x_0.
    "debiased_kohya": {"epsilon": lambda snr: snr.clamp(max=1000).rsqrt(), "v_prediction": lambda snr: 1 / (snr.clamp(max=1000) + 1)},
}
assert not (apart := {*WEIGHTING_FUNCTIONS, *REPEATED_FUNCTIONS, "variational"} ^ WEIGHTINGS.keys()), apart


def register_weighting(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Makes a function of the SNR a weighting that can be named like any other. To be used as a decorator.

    Args:
        function: maps the SNR, float64 of any shape, to the weight on the squared error of the noise, of the same shape. Its
            name becomes the weighting's. It may take parameters named like the flags of weightings (`snr_gamma`, ...), which
            also have the defaults.

    Raises:
        InputError: the name is taken, a parameter has no flag or another default, or what is returned is no tensor of weights.
    """
    try:
        name = function.__name__
        _, *parameters = inspect.signature(function).parameters.values()
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{function!r} cannot be registered; write a function with a name, such as def mine(snr)") from error
    if name in WEIGHTINGS:
        raise InputError(f"weighting {name!r} is there already; give your function another name")
    known = sorted(parameters_of(WEIGHTINGS))
    for parameter in parameters:
        _require_known("parameter", parameter.name, known)
        default = getattr(ObjectiveConfig(), parameter.name)
        if parameter.default not in (inspect.Parameter.empty, default):
            raise InputError(f"parameter {parameter.name} of {name} has default {parameter.default}, the flag's is {default}; leave it out")
    names = tuple(parameter.name for parameter in parameters)
    probe = torch.ones(3, dtype=torch.float64)
    returned = function(probe, **_defaults(names))
    if not isinstance(returned, Tensor) or returned.shape != probe.shape or not returned.is_floating_point():
        raise InputError(f"weighting {name} must return a tensor of the shape of the SNR, but returned {returned!r}")
    WEIGHTING_FUNCTIONS[name] = function
    WEIGHTINGS[name] = WeightingSpec(summary=(function.__doc__ or "").partition("\n")[0], parameters=names)
    return function


def _defaults(names: Iterable[str]) -> dict[str, float]:
    """Those of the flags."""
    return {name: getattr(ObjectiveConfig(), name) for name in names}


def weight(
    snr: Tensor,
    weighting: str,
    prediction_type: PredictionType,
    *,
    snr_floor: float = 0.0,
    snr_ceiling: float = 0.0,
    **parameters: float,
) -> Tensor:
    """The weight of the squared error of `prediction_type`, of the same shape as `snr`, in float64.

    Args:
        snr: signal-to-noise ratios.
        weighting: a name of `registry.WEIGHTINGS` that has a function.
        prediction_type: what the network predicts, whose error is weighted.
        snr_floor: the weighting is evaluated at an SNR of at least this (the conversion between parameterizations is not).
        snr_ceiling: and of at most this; 0 is none.
        parameters: `snr_gamma`, `p2_k`, `p2_gamma`, `sigma_data`, `sigmoid_bias`; those that the weighting has.
    """

    def seen(snr: Tensor) -> Tensor:
        return snr.clamp(snr_floor, snr_ceiling or None)

    snr = snr.double()
    if weighting in REPEATED_FUNCTIONS:
        return REPEATED_FUNCTIONS[weighting][prediction_type](seen(snr))
    on_noise = WEIGHTING_FUNCTIONS[weighting]
    if prediction_type == "epsilon":
        return on_noise(seen(snr), **parameters)
    # For the other parameterizations the limit at SNR = 0 is finite; a tiny SNR in place of 0 gives it without 0 times infinity.
    snr = snr.clamp(TINY_SNR, _HUGE)
    on_sample = snr * on_noise(seen(snr), **parameters)
    if prediction_type == "sample":
        return on_sample
    return on_sample / (1 + snr if prediction_type == "v_prediction" else (1 + snr.sqrt()).square())


def effective_sample_size(weights: Tensor, probabilities: Tensor | None = None) -> float:
    """(mean w)^2 / mean w^2: the share of the samples that would, equally weighted, estimate a mean as well. 1 for equal weights.

    Args:
        weights: (n,).
        probabilities: (n,) with which each is drawn; equal ones if left out.
    """
    p = torch.full_like(weights, 1 / len(weights)) if probabilities is None else probabilities
    return ((p * weights).sum().square() / (p * weights.square()).sum()).item()


def loss_weight(
    scheduler: Any,
    timesteps: Tensor | Sequence[float] | float,
    weighting: str = "debiased",
    prediction_type: PredictionType | None = None,
    **parameters: float,
) -> Tensor:
    """Loss weights for a training loop of your own: multiply the mean square error of each sample.

    Args:
        scheduler: a diffusers scheduler with a discrete noise schedule, or one of flow matching.
        timesteps: (B,) the timesteps of the batch, as a tensor or a list: whole numbers, or for flow matching T times t with t in
            [0, 1]. Or a single one as a number.
        weighting: a name that `--weighting` takes (but for `variational`), or a registered one.
        prediction_type: what the network predicts; the scheduler's own if left out.
        parameters: those of the weighting, named like the flags: `snr_gamma` (5) of min_snr and soft_min_snr, `p2_k` (1) and
            `p2_gamma` (1) of p2, `sigma_data` (0.5) of edm and edm_monotonic, `sigmoid_bias` (0) of sigmoid, `snr_floor` (0) and
            `snr_ceiling` (0, which is none) of all.

    Returns:
        (B,) float32, on the device of `timesteps`; () of a single number.

    Raises:
        InputError: an unknown name, a parameter the weighting does not have or that is out of range, a prediction type that is
            not the scheduler's kind or not known to the code that the weighting repeats; on a CPU also timesteps that the scheduler
            does not have, or a weight that is not finite. An accelerator is not waited for: there these weights are not finite.
    """
    flow, timesteps = is_flow(scheduler), _as_tensor(timesteps)
    prediction_type = prediction_type or prediction_type_of(scheduler)
    _require_known("weighting", weighting, (*WEIGHTING_FUNCTIONS, *REPEATED_FUNCTIONS))
    _require_known("prediction_type", prediction_type, get_args(PredictionType))
    if prediction_type not in (("flow", "sample") if flow else ("epsilon", "sample", "v_prediction")):
        raise InputError(f"prediction_type is {prediction_type}, which does not go with {type(scheduler).__name__}; leave it out")
    spec = WEIGHTINGS[weighting]
    if spec.repeats:
        _require_known(f"prediction_type of {weighting}", prediction_type, spec.repeats)
    for name in parameters:
        _require_known("parameter", name, (*spec.parameters, "snr_floor", "snr_ceiling"))
    raise_all(range_problems(ObjectiveConfig, parameters) + bound_problems(parameters), "loss_weight")
    if flow:
        weights = _weights(_snr_of_flow(scheduler, timesteps), weighting, prediction_type, parameters)
    else:
        weights = _at(_table(scheduler, weighting, prediction_type, parameters, timesteps.device), timesteps)
    weights = weights.to(timesteps.device, torch.float32)  # in which a finite number may be none
    if timesteps.device.type == "cpu" and not weights.isfinite().all():
        wrong = timesteps[~weights.isfinite()].tolist()
        raise InputError(
            f"weighting {weighting} on {prediction_type} is not finite at timesteps {wrong}, where the SNR is 0 or infinite; "
            f"add snr_floor=1e-3, or take weighting debiased and predict v; draw timesteps of a flow above 0"
        )
    return weights


def _as_tensor(timesteps: Tensor | Sequence[float] | float) -> Tensor:
    try:
        return torch.as_tensor(timesteps)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"timesteps must be a tensor, a list of numbers or a number, but are {timesteps!r:.80}") from error


def _weights(snr: Tensor, weighting: str, prediction_type: PredictionType, parameters: Mapping[str, float]) -> Tensor:
    return weight(snr, weighting, prediction_type, **{**_defaults(WEIGHTINGS[weighting].parameters), **parameters})


# Weights of all timesteps by scheduler: what the schedule was made of when they were computed, and the tables by what was asked for.
_tables: WeakKeyDictionary[Any, tuple[list[Any], list[int], dict[Any, Tensor]]] = WeakKeyDictionary()
MAX_TABLES = 32  # of one scheduler: parameters may change at every step


def _table(scheduler: Any, weighting: str, prediction_type: PredictionType, parameters: Mapping[str, float], device: Any) -> Tensor:
    """(T,) float32 on a device, computed once, and again where the scheduler's configuration or its tensors are others by now."""
    parts, versions = _parts(scheduler)
    parts_before, versions_before, tables = _tables.get(scheduler, ([], [], {}))
    if versions != versions_before or any(one is not other for one, other in zip(parts, parts_before)):
        tables = {}
        _tables[scheduler] = parts, versions, tables
    asked = (weighting, WEIGHTING_FUNCTIONS.get(weighting), prediction_type, tuple(sorted(parameters.items())), device)
    if asked not in tables:
        if len(tables) >= MAX_TABLES:
            tables.clear()
        weights = _weights(schedule_of_scheduler(scheduler).snr, weighting, prediction_type, parameters)
        tables[asked] = weights.to(device, torch.float32)
    return tables[asked]


def _parts(scheduler: Any) -> tuple[list[Any], list[int]]:
    """What the schedule of a scheduler is made of, and the versions of the tensors among it: one that is written to has another."""
    tensors = [getattr(scheduler, name, None) for name in ("betas", "alphas_cumprod")]
    versions = [t._version if isinstance(t, Tensor) and not t.is_inference() else 0 for t in tensors]
    return [scheduler.config, *tensors], versions


def _at(table: Tensor, timesteps: Tensor) -> Tensor:
    """Entries (B,) of a table. On an accelerator nothing waits for the timesteps: NaN where the scheduler does not have one."""
    T = len(table)
    known = (timesteps >= 0) & (timesteps < T)
    if timesteps.is_floating_point() or (timesteps.device.type == "cpu" and not known.all()):
        raise InputError(f"timesteps must be whole numbers from 0 to {T - 1}, but are {timesteps.tolist()}")
    return torch.where(known, table[timesteps.long().clamp(0, T - 1)], math.nan)


def _snr_of_flow(scheduler: Any, timesteps: Tensor) -> Tensor:
    """((1 - t) / t)^2: whatever shift the scheduler has is in its timesteps already. NaN as of `_at`."""
    T: int = scheduler.config.num_train_timesteps
    t = (timesteps.cpu() if timesteps.device.type == "mps" else timesteps).double() / T  # which has no float64
    known = (t >= 0) & (t <= 1)
    if t.device.type == "cpu" and not known.all():
        raise InputError(f"timesteps must be from 0 to {T}, but are {timesteps.tolist()}")
    if scheduler.config.get("invert_sigmas"):  # as Mochi's, whose timesteps go from the noise at 0 to the image at T
        t = 1 - t
    return torch.where(known, ((1 - t) / t).square(), math.nan)


def _require_known(what: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise InputError(f"{what} {value!r} is not known here; take one of: {', '.join(known)}")
