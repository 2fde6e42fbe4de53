"""Solvers by name: diffusers schedulers built from a model's own, with the traps of some of them mended."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .config import ObjectiveConfig, SchedulerName, Spacing
from .errors import InputError
from .schedule import is_flow, make_schedule


class DDPM(DDPMScheduler):
    """DDPM (arXiv 2006.11239) that adds no noise after its last step, also where that is not t = 0 (spacing `trailing`)."""

    def _get_variance(self, t: int, predicted_variance: Tensor | None = None, variance_type: str | None = None) -> Tensor:
        variance: Tensor = super()._get_variance(t, predicted_variance, variance_type)
        if self.previous_timestep(t) >= 0:
            return variance
        is_log = (variance_type or self.variance_type) == "learned_range"
        return torch.full_like(variance, -torch.inf if is_log else 0.0)


class DDIM(DDIMScheduler):
    """DDIM (arXiv 2010.02502) that steps to the next timestep of its list.

    The base class steps to t - T // N, which is not in the list under `linspace` (19 of 50 steps, say). The noise is taken
    from the clipped x_0, as in the paper's code.
    """

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        eta: float = 0.0,
        generator: Any = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """x_t to x_s for the next timestep s < t (equation 12). All tensors (B, C, H, W)."""
        place = int((self.timesteps == int(timestep)).nonzero()[0])
        following = int(self.timesteps[place + 1]) if place + 1 < len(self.timesteps) else -1
        acp_t = self.alphas_cumprod[int(timestep)]
        acp_s = self.alphas_cumprod[following] if following >= 0 else self.final_alpha_cumprod

        x_0 = self._predicted_x_0(model_output, sample, acp_t)
        noise = (sample - acp_t.sqrt() * x_0) / (1 - acp_t).sqrt()
        sigma = eta * ((1 - acp_s) / (1 - acp_t) * (1 - acp_t / acp_s)).sqrt()  # equation 16
        x_s = acp_s.sqrt() * x_0 + (1 - acp_s - sigma**2).clamp(min=0).sqrt() * noise
        if eta > 0:
            x_s = x_s + sigma * randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        return DDIMSchedulerOutput(prev_sample=x_s, pred_original_sample=x_0) if return_dict else (x_s, x_0)

    def _predicted_x_0(self, model_output: Tensor, sample: Tensor, acp: Tensor) -> Tensor:
        a, s = acp.sqrt(), (1 - acp).sqrt()
        if self.config.prediction_type == "epsilon":
            x_0 = (sample - s * model_output) / a
        elif self.config.prediction_type == "v_prediction":
            x_0 = a * sample - s * model_output
        else:
            x_0 = model_output
        if self.config.thresholding:
            x_0 = self._threshold_sample(x_0)
        elif self.config.clip_sample:
            x_0 = x_0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return x_0


# name: the class, and what it needs beside the model's own scheduler configuration
SCHEDULERS: dict[str, tuple[type, dict[str, Any]]] = {
    "ddpm": (DDPM, {}),
    "ddim": (DDIM, {}),
    # arXiv 2206.00927; this form cannot end at sigma = 0
    "dpmsolver": (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "dpmsolver", "solver_order": 2, "final_sigmas_type": "sigma_min", "variance_type": None},
    ),
    # arXiv 2211.01095
    "dpmsolver++": (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero", "variance_type": None},
    ),
    # arXiv 2302.04867, order 3 and B(h) = h as in the paper's code; this B(h) is infinite for a step to sigma = 0
    "unipc": (UniPCMultistepScheduler, {"solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"}),
    # Ordinary differential equation of a rectified flow (arXiv 2209.03003), by Euler's and by Heun's method
    "flow_euler": (FlowMatchEulerDiscreteScheduler, {}),
    "flow_heun": (FlowMatchHeunDiscreteScheduler, {}),
}
FLOW: tuple[SchedulerName, ...] = ("flow_euler", "flow_heun")


def default_scheduler(own: Any) -> SchedulerName:
    """The solver for a model whose own scheduler is `own`, where none is named."""
    return "flow_heun" if is_flow(own) else "unipc"


def exported_scheduler(objective: ObjectiveConfig) -> DDPMScheduler | FlowMatchEulerDiscreteScheduler:
    """The scheduler that is saved with a trained model, over the schedule it was trained with: ancestral sampling, or a flow's."""
    schedule = make_schedule(objective)
    if objective.prediction_type == "flow":
        return FlowMatchEulerDiscreteScheduler(**schedule.diffusers)
    return DDPMScheduler(
        **schedule.diffusers,
        prediction_type=objective.prediction_type,
        variance_type="learned_range" if objective.learn_sigma else objective.variance_type or "fixed_large",
        clip_sample=True,
        timestep_spacing="linspace",
    )


def make_scheduler(name: SchedulerName, own: Any, spacing: Spacing, steps: int) -> Any:
    """The solver `name` for a model whose own scheduler is `own`, set to `steps` steps.

    Raises:
        InputError: a solver or spacing for another kind of model, more steps than noise levels, or a single step that would
            start at the clean end.
    """
    T = own.config.num_train_timesteps
    if is_flow(own) != (name in FLOW):
        model = "a rectified flow" if is_flow(own) else f"no rectified flow (it predicts {own.config.prediction_type})"
        raise InputError(f"scheduler is {name}, but the model is {model}; take --scheduler {default_scheduler(own)}")
    if name in FLOW and spacing != "linspace":
        raise InputError(f"spacing is {spacing}, but scheduler {name} has linspace only; leave it out")
    if steps > T:
        raise InputError(f"steps is {steps}, but the model has {T} noise levels; take at most {T}")
    if steps == 1 and name in ("ddpm", "ddim") and spacing != "trailing":
        raise InputError(
            f"steps is 1, but scheduler {name} with spacing {spacing} would start from t = 0; take 2 steps or --spacing trailing"
        )
    kind, overrides = SCHEDULERS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # that "dpmsolver" will go in diffusers 1.0
        changes = overrides if name in FLOW else {"timestep_spacing": spacing, **overrides}
        scheduler = kind.from_config(own.config, **changes)  # type: ignore[attr-defined]
    if name in FLOW:  # it shifts its levels once more when steps are set, so the ends must be those before any shift
        scheduler.sigma_max, scheduler.sigma_min = 1.0, 1 / T
    try:
        scheduler.set_timesteps(steps)
    except (ValueError, IndexError) as error:
        raise InputError(f"scheduler {name} cannot make {steps} steps with spacing {spacing}: {error}") from error
    if len(scheduler.timesteps.unique()) != steps:
        raise InputError(f"scheduler {name} cannot make {steps} different steps with spacing {spacing}; take fewer")
    return scheduler
