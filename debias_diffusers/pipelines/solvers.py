"""Solvers by name: diffusers schedulers built from a model's own scheduler, with fixes for some of them."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Sequence
from itertools import accumulate, repeat
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,  # noqa: F401 - DiffusionPipeline.from_pretrained looks for it beside the classes of a saved pipeline
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..config.registry import DEFAULT_FLOW_SOLVER, DEFAULT_SOLVER, SOLVERS
from ..config.schema.objective import ObjectiveConfig, is_straight
from ..config.schema.types import Clipping, PredictionType, SchedulerName, Spacing
from ..diffusion.noise_schedule import is_flow, make_schedule, predicted_x_0, prediction_type_of
from ..errors import InputError


def _index(scheduler: Any, timestep: Any) -> int:
    """The index of a timestep in the list of a scheduler.

    Raises:
        InputError: the list does not have it.
    """
    try:
        found = (scheduler.timesteps == float(timestep)).nonzero()
    except (TypeError, ValueError, RuntimeError):  # no number, or several
        found = torch.empty(0)
    if not len(found):
        raise InputError(f"timestep is {timestep}, which is none of the timesteps of this {type(scheduler).__name__}; step through those")
    return int(found[0])


def _require_shapes(model_output: Any, sample: Any, learned: bool = False) -> None:
    """Raises InputError unless both are tensors (B, C, ...); model_output has 2 C channels if the variance is `learned`."""
    shape, of_sample = (tuple(tensor.shape) if isinstance(tensor, Tensor) else () for tensor in (model_output, sample))
    expected = (*of_sample[:1], (1 + learned) * of_sample[1], *of_sample[2:]) if len(of_sample) > 1 else of_sample
    if not of_sample or shape != expected:
        raise InputError(
            f"model_output has shape {shape} and sample {of_sample}, but they must be tensors of one shape, and with as many channels "
            f"again in model_output for DDPM with a learned variance"
        )


def _require_timesteps(steps: Any, timesteps: Any, levels: float = math.inf) -> None:
    """Raises InputError unless steps is in 1..levels, or timesteps is a descending list of whole numbers in 0..levels - 1."""
    if timesteps is None:
        if not (isinstance(steps, int | np.integer) and 1 <= steps <= levels):
            raise InputError(f"num_inference_steps is {steps!r}, but must be a whole number from 1{f' to {levels}' * (levels < math.inf)}")
        return
    try:
        chosen = torch.as_tensor(timesteps)
    except (TypeError, ValueError, RuntimeError):
        chosen = torch.empty(0)
    if chosen.is_floating_point() or chosen.ndim != 1 or not levels > chosen[0] or chosen[-1] < 0 or (chosen.diff() >= 0).any():
        below = f" to below {levels}" * (levels < math.inf)
        raise InputError(f"timesteps is {timesteps!r}, but must be descending whole numbers from 0{below}")


class DDPM(DDPMScheduler):
    """DDPM (arXiv 2006.11239) without noise in its last step, also if that is not at t = 0 (spacing `trailing`)."""

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None, timesteps: Sequence[int] | None = None) -> None:
        """Spaced timesteps, or these (descending)."""
        _require_timesteps(num_inference_steps, timesteps, self.config.num_train_timesteps)
        super().set_timesteps(num_inference_steps if timesteps is None else None, device, timesteps)

    def step(
        self, model_output: Tensor, timestep: Tensor | int, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """One step from x_t to x_s, s < t the next timestep. All tensors (B, C, H, W); model_output (B, 2C, H, W) if learned."""
        _require_shapes(model_output, sample, self.variance_type in ("learned", "learned_range"))
        t = self.timesteps[_index(self, timestep)]
        stepped: DDPMSchedulerOutput | tuple[Tensor, Tensor] = super().step(model_output, t, sample, generator, return_dict)
        return stepped

    def _get_variance(self, t: int, predicted_variance: Tensor | None = None, variance_type: str | None = None) -> Tensor:
        variance: Tensor = super()._get_variance(t, predicted_variance, variance_type)
        if self.previous_timestep(t) >= 0:
            return variance
        is_log = (variance_type or self.variance_type) == "learned_range"
        return torch.full_like(variance, -torch.inf if is_log else 0.0)


class DDIM(DDIMScheduler):
    """DDIM (arXiv 2010.02502) that steps to the next timestep of its list; accepts a list of timesteps.

    The base class steps to t - T // N, which is not in the list with spacing `linspace` (for 19 of 50 steps, for example). The noise
    is computed from the clipped x_0, as in the paper's code. Without clipping this is Euler's method for x_t / a over s / a.
    """

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None, timesteps: Sequence[int] | None = None) -> None:
        """Spaced timesteps, or these (descending)."""
        _require_timesteps(num_inference_steps, timesteps, self.config.num_train_timesteps)
        if timesteps is None:
            super().set_timesteps(num_inference_steps, device)
        else:
            self.num_inference_steps = len(timesteps)
            self.timesteps = torch.tensor(timesteps, device=device)

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        eta: float = 0.0,
        generator: Any = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """One step from x_t to x_s, s < t the next timestep (equation 12). All tensors (B, C, H, W)."""
        _require_shapes(model_output, sample)
        place = _index(self, timestep)
        acp_t = self.alphas_cumprod[int(timestep)]
        acp_s = self._alphas_cumprod_after(place)
        x_0, noise = self._x_0_and_noise(model_output, sample, acp_t)
        sigma = eta * ((1 - acp_s) / (1 - acp_t) * (1 - acp_t / acp_s)).sqrt()  # equation 16
        x_s = acp_s.sqrt() * x_0 + (1 - acp_s - sigma**2).clamp(min=0).sqrt() * noise
        if eta > 0:
            x_s = x_s + sigma * randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        return DDIMSchedulerOutput(prev_sample=x_s, pred_original_sample=x_0) if return_dict else (x_s, x_0)

    def _alphas_cumprod_after(self, place: int) -> Tensor:
        """alphas_cumprod of the next timestep in the list, or of the clean image after the last one."""
        last = place + 1 == len(self.timesteps)
        after: Tensor = self.final_alpha_cumprod if last else self.alphas_cumprod[self.timesteps[place + 1]]
        return after

    def _x_0_and_noise(self, model_output: Tensor, sample: Tensor, acp: Tensor) -> tuple[Tensor, Tensor]:
        """The predicted x_0 (clipped) and noise of x_t, (B, C, H, W) each."""
        a, s = acp.sqrt(), (1 - acp).sqrt()
        x_0 = predicted_x_0(self.config.prediction_type, model_output, sample, a, s)
        if self.config.thresholding:
            x_0 = self._threshold_sample(x_0)
        elif self.config.clip_sample:
            x_0 = x_0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return x_0, (sample - a * x_0) / s


class EulerAncestral(DDIM):
    """Euler ancestral: a step to less noise than the next timestep has, then fresh noise. Equal to DDIM with eta = 1."""

    def step(  # type: ignore[override]
        self, model_output: Tensor, timestep: Tensor | int, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """As `DDIM.step` with eta = 1. All tensors (B, C, H, W)."""
        return super().step(model_output, timestep, sample, 1.0, generator, return_dict)


class Heun(DDIM):
    """Heun's method (arXiv 2206.00364, algorithm 1): a DDIM step (predictor), then a correction with the noise at its end.

    The list has each timestep once for each network evaluation: t_0, t_1, t_1, t_2, t_2, ... The last step, to the clean image,
    and a step from pure noise, which is infinitely long in s / a, have no correction.
    """

    order = 2

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None, timesteps: Sequence[int] | None = None) -> None:
        """Spaced timesteps, or these (descending)."""
        super().set_timesteps(num_inference_steps, device, timesteps)
        self.timesteps = torch.cat([self.timesteps[:1], self.timesteps[1:].repeat_interleave(2)])
        self._begun: tuple[Tensor, Tensor] | None = None  # after the predictor: noise and alphas_cumprod at the start of the step
        self._place = 0

    def step(  # type: ignore[override]
        self, model_output: Tensor, timestep: Tensor | int, sample: Tensor, return_dict: bool = True
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """The predictor or the correction of a step, in turn. All tensors (B, C, H, W)."""
        _require_shapes(model_output, sample)
        self._require_next(timestep)
        acp_t = self.alphas_cumprod[int(timestep)]
        x_0, noise = self._x_0_and_noise(model_output, sample, acp_t)
        if self._begun is None:
            acp_s = self._alphas_cumprod_after(self._place)
            x_s = acp_s.sqrt() * x_0 + (1 - acp_s).sqrt() * noise
            if self._place + 1 < len(self.timesteps):
                self._begun = noise, acp_t
        else:
            x_s = _corrected(sample, noise, acp_t, *self._begun)
            self._begun = None
        self._place += 1
        return DDIMSchedulerOutput(prev_sample=x_s, pred_original_sample=x_0) if return_dict else (x_s, x_0)

    def _require_next(self, timestep: Any) -> None:
        """Raises InputError unless the timestep is the next of the list, because the index decides: predictor or correction."""
        if self.num_inference_steps is None or self._place == len(self.timesteps):
            raise InputError("Heun's method has no timesteps yet, or has made all its steps; call set_timesteps first")
        if self.timesteps[_index(self, timestep)] != self.timesteps[self._place]:
            raise InputError(
                f"timestep is {timestep}, but the next one is {self.timesteps[self._place]}; or call set_timesteps to begin again"
            )


def _corrected(x_s: Tensor, noise: Tensor, acp_s: Tensor, noise_before: Tensor, acp_t: Tensor) -> Tensor:
    """Corrects x_s / a_s = x_t / a_t + (sigma_s - sigma_t) noise: the noise becomes the mean of those at t and s. x_s (B, C, H, W)."""
    if acp_t == 0:
        return x_s
    sigma_t, sigma_s = ((1 - acp_t) / acp_t).sqrt(), ((1 - acp_s) / acp_s).sqrt()
    return x_s + acp_s.sqrt() * (sigma_s - sigma_t) * (noise - noise_before) / 2


class UniPC(UniPCMultistepScheduler):
    """UniPC (arXiv 2302.04867) that also accepts a list of timesteps."""

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None, timesteps: Sequence[int] | None = None) -> None:
        """Spaced timesteps, or these (descending)."""
        _require_timesteps(num_inference_steps, timesteps, self.config.num_train_timesteps)
        super().set_timesteps(len(timesteps) if timesteps is not None else num_inference_steps, device)
        if timesteps is not None:
            acp = self.alphas_cumprod[list(timesteps)]
            self.timesteps = torch.tensor(timesteps, device=device)
            self.sigmas: Tensor = torch.cat([((1 - acp) / acp).sqrt(), self.sigmas[-1:]])

    def step(
        self, model_output: Tensor, timestep: Tensor | int, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """One step from x_t to x_s, s < t the next timestep. All tensors (B, C, H, W)."""
        _require_shapes(model_output, sample)
        if self.num_inference_steps is None or self.step_index == len(self.timesteps):
            raise InputError("UniPC has no timesteps yet, or has made a step of each; call set_timesteps first")
        _index(self, timestep)
        stepped: SchedulerOutput | tuple[Tensor] = super().step(model_output, timestep, sample, return_dict)
        return stepped


class SampleFlow:
    """A flow matching scheduler for a network that predicts x_0 on the straight path: u = (x_t - x_0) / t (JiT, arXiv 2511.13720)."""

    flow_prediction_type: PredictionType = "sample"

    def step(self, model_output: Tensor, timestep: Tensor | float, sample: Tensor, generator: Any = None, return_dict: bool = True) -> Any:
        """One step from x_t; model_output (B, C, H, W) is x_0. A timestep is T times t."""
        t = float(timestep) / self.config.num_train_timesteps  # type: ignore[attr-defined]
        velocity = (sample - model_output) / t
        return super().step(velocity, timestep, sample, generator=generator, return_dict=return_dict)  # type: ignore[misc]


class SampleFlowMatchEuler(SampleFlow, FlowMatchEulerDiscreteScheduler):
    """Euler's method for a network that predicts x_0 on the straight path."""


class SampleFlowMatchHeun(SampleFlow, FlowMatchHeunDiscreteScheduler):
    """Heun's method for a network that predicts x_0 on the straight path."""


# By the names of `registry.SOLVERS`: the class, and what it needs beside the model's own scheduler configuration.
SCHEDULERS: dict[SchedulerName, tuple[type, dict[str, Any]]] = {
    "ddpm": (DDPM, {}),
    "ddim": (DDIM, {}),
    # arXiv 2206.00927; this form cannot end at sigma = 0
    "dpmsolver": (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "dpmsolver", "solver_order": 2, "final_sigmas_type": "sigma_min"},
    ),
    # arXiv 2211.01095, and its form with fresh noise in each step
    "dpmsolver++": (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero"},
    ),
    "dpmsolver++sde": (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero"},
    ),
    # arXiv 2302.04867, order 3 and B(h) = h as in the paper's code; this B(h) is infinite for a step to sigma = 0
    "unipc": (UniPC, {"solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"}),
    # Of the probability-flow ODE for x_t / a over s / a (arXiv 2206.00364), Euler's method is DDIM without clipping
    "heun": (Heun, {"clip_sample": False, "thresholding": False}),
    "euler": (DDIM, {"clip_sample": False, "thresholding": False}),
    "euler_ancestral": (EulerAncestral, {"clip_sample": False, "thresholding": False}),
    # Ordinary differential equation of a rectified flow (arXiv 2209.03003), by Euler's and by Heun's method
    "flow_euler": (FlowMatchEulerDiscreteScheduler, {}),
    "flow_heun": (FlowMatchHeunDiscreteScheduler, {}),
}
assert SCHEDULERS.keys() == SOLVERS.keys(), SCHEDULERS.keys() ^ SOLVERS.keys()
SAMPLE_FLOW = {"flow_euler": SampleFlowMatchEuler, "flow_heun": SampleFlowMatchHeun}  # in place of those, where the network predicts x_0
FLOW = tuple(name for name, spec in SOLVERS.items() if spec.flow)
SIGMA_SPACING_OPTIONS = {"use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas"}
COMMON_BETA_SCHEDULES = {"linear", "scaled_linear", "squaredcos_cap_v2"}  # of all diffusers schedulers; DDPMScheduler has more


def default_scheduler(own: Any) -> SchedulerName:
    """The name of the default solver for a model with the scheduler `own`."""
    return DEFAULT_FLOW_SOLVER if is_flow(own) else DEFAULT_SOLVER


def exported_scheduler(objective: ObjectiveConfig) -> DDPMScheduler | FlowMatchEulerDiscreteScheduler:
    """The scheduler that is saved with a trained model and has its noise schedule: DDPM, or Euler for rectified flow."""
    schedule = make_schedule(objective)
    if is_straight(objective):
        kind = FlowMatchEulerDiscreteScheduler if objective.prediction_type == "flow" else SampleFlowMatchEuler
        return kind(**schedule.diffusers)
    return DDPMScheduler(
        **schedule.diffusers,
        prediction_type=objective.prediction_type,
        variance_type="learned_range" if objective.learn_sigma else objective.variance_type or "fixed_large",
        clip_sample=True,
        # Stock schedulers inherit this. With other spacings DDIMScheduler steps to timesteps that are not in its list.
        timestep_spacing="leading",
    )


def strided_timesteps(T: int, steps: int) -> list[int]:
    """Descending timesteps 0, k, 2k, ... below T with the smallest stride k that gives `steps` of them: `ddimN` of guided-diffusion.

    Raises:
        InputError: no stride gives exactly `steps` timesteps.
    """
    for stride in range(1, T):
        if len(range(0, T, stride)) == steps:
            return list(range(0, T, stride))[::-1]
    near = min((len(range(0, T, stride)) for stride in range(1, T)), key=lambda count: abs(count - steps))
    raise InputError(f"steps is {steps}, but no stride gives as many of {T} timesteps; take {near}, or another --spacing")


def section_timesteps(T: int, counts: Sequence[int]) -> list[int]:
    """Descending timesteps from equal sections of 0..T - 1, `counts[k]` from section k (the least noisy section is first).

    If T is not divisible, the first sections have one timestep more. The timesteps of a section are equally spaced and include
    its ends, as with the lists of guided-diffusion (`timestep_respacing`).

    Raises:
        InputError: a section has fewer timesteps than its count.
    """
    chosen: list[int] = []
    start = 0
    for k, count in enumerate(counts):
        size = T // len(counts) + (k < T % len(counts))
        if count > size:
            raise InputError(f"sections has {count}, but each of {len(counts)} sections has {size} of the {T} timesteps; take at most that")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # Summed up as guided-diffusion does it: half-way between two timesteps a product is rounded to the other one.
        chosen += [start + round(place) for place in accumulate(repeat(stride, count - 1), initial=0.0)]
        start += size
    return chosen[::-1]


def make_scheduler(
    name: SchedulerName,
    own: Any,
    spacing: Spacing,
    steps: int,
    timesteps: Sequence[int] | None = None,
    clipping: Clipping | None = None,
) -> Any:
    """Builds the solver `name` for a model and sets its timesteps.

    Args:
        name: a key of `SCHEDULERS`.
        own: the scheduler that the model was saved with; gives noise schedule and prediction type.
        spacing: how the timesteps are spaced.
        steps: the number of steps.
        timesteps: descending timesteps, instead of spacing and steps. Solvers that end at t = 0 need no network evaluation
            there and drop a last 0.
        clipping: if None, ddpm and ddim clip x_0 as the model's own scheduler says; else the scheduler does not clip,
            because the pipeline does.

    Raises:
        InputError: solver or spacing do not fit the model, more steps than timesteps, or a single step that would start at
            the clean end.
    """
    _refuse_other_models(name, own, spacing, timesteps)
    T = own.config.num_train_timesteps
    if timesteps and timesteps[0] >= T:
        raise InputError(f"timesteps has {timesteps[0]}, but the model's timesteps are 0 to {T - 1}")
    if steps > T:
        raise InputError(f"steps is {steps}, but the model has {T} timesteps; take at most {T}")
    if timesteps and timesteps[0] == 0:
        raise InputError("timesteps begin at 0, the clean end, but images begin as noise; take more steps, or --spacing trailing")
    low = spacing == "leading" or (spacing == "linspace" and issubclass(SCHEDULERS[name][0], DDPM | DDIM))
    if steps == 1 and not timesteps and low:
        raise InputError(f"steps is 1, which scheduler {name} with spacing {spacing} begins too low; take 2 steps or --spacing trailing")
    scheduler = _built(name, own, spacing)
    if clipping:
        scheduler.register_to_config(clip_sample=False, thresholding=False)
    try:
        set_timesteps(scheduler, steps, timesteps)
    except (ValueError, IndexError) as error:
        raise InputError(f"scheduler {name} cannot make {steps} steps with spacing {spacing}: {error}") from error
    if not timesteps and len(scheduler.timesteps.unique()) != steps:
        raise InputError(f"scheduler {name} cannot make {steps} different steps with spacing {spacing}; take fewer")
    return scheduler


def _refuse_other_models(name: SchedulerName, own: Any, spacing: Spacing, timesteps: Sequence[int] | None) -> None:
    predicts = own.config.get("prediction_type")
    if not is_flow(own) and not (hasattr(own, "alphas_cumprod") and predicts in ("epsilon", "sample", "v_prediction")):
        raise InputError(
            f"the model's own scheduler is {type(own).__name__}, which has no betas of DDPM or predicts something else ({predicts}), and "
            f"is no rectified flow"
        )
    if is_flow(own) != (name in FLOW):
        model = "a rectified flow" if is_flow(own) else f"no rectified flow (it predicts {own.config.prediction_type})"
        raise InputError(f"scheduler is {name}, but the model is {model}; take --scheduler {default_scheduler(own)}")
    if name in FLOW and (spacing != "linspace" or timesteps):
        given = "timesteps, sections or a stride are given" if timesteps else f"spacing is {spacing}"
        raise InputError(f"{given}, but scheduler {name} has linspace only; leave it out")


def _built(name: SchedulerName, own: Any, spacing: Spacing) -> Any:
    kind, changes = SCHEDULERS[name]
    if name in FLOW and prediction_type_of(own) == "sample":
        kind = SAMPLE_FLOW[name]
    # These options would silently override `spacing`.
    config = {field: value for field, value in own.config.items() if field not in SIGMA_SPACING_OPTIONS}
    if config.get("variance_type") == "fixed_large_log":  # of which DDPMScheduler takes the root of a logarithm
        config["variance_type"] = "fixed_large"
    if name not in FLOW:
        changes = {"timestep_spacing": spacing, **changes}
        if own.config.get("trained_betas") is None and own.config.get("beta_schedule") not in COMMON_BETA_SCHEDULES:
            changes["trained_betas"] = own.betas.tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # that "dpmsolver" will go in diffusers 1.0
        scheduler = kind.from_config(config, **changes)  # type: ignore[attr-defined]
    if name in FLOW:  # set_timesteps shifts the sigmas again, so the ends must be unshifted
        scheduler.sigma_max, scheduler.sigma_min = 1.0, 1 / own.config.num_train_timesteps
    return scheduler


def set_timesteps(scheduler: Any, steps: int, timesteps: Sequence[int] | None = None) -> None:
    """Sets a scheduler to `steps` steps, or to descending `timesteps`. They stay on the CPU, because schedulers index tables with
    them there, and reading a value from a device would wait for it."""
    _require_timesteps(steps, timesteps)
    if timesteps is None:
        scheduler.set_timesteps(steps, device="cpu")
        return
    if "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
        raise InputError(f"timesteps are given, but {type(scheduler).__name__} takes none; leave them out")
    scheduler.set_timesteps(timesteps=without_last_zero(scheduler, timesteps), device="cpu")


def without_last_zero(scheduler: Any, timesteps: Sequence[int]) -> list[int]:
    """Descending timesteps as a scheduler takes them: one that ends at t = 0 by itself evaluates no network there."""
    ends_by_itself = scheduler.config.get("final_sigmas_type") == "sigma_min" and timesteps[-1] == 0 and len(timesteps) > 1
    return list(timesteps[:-1] if ends_by_itself else timesteps)
