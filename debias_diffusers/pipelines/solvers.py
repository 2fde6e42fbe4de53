"""Solvers by name: diffusers schedulers built from a model's own, with the traps of some of them mended."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Sequence
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
from ..config.schema import Clipping, ObjectiveConfig, SchedulerName, Spacing
from ..diffusion.noise_schedule import is_flow, make_schedule, predicted_x_0
from ..errors import InputError


def _index(scheduler: Any, timestep: Any) -> int:
    """Where a timestep stands in the list of a scheduler.

    Raises:
        InputError: it is not there.
    """
    try:
        found = (scheduler.timesteps == float(timestep)).nonzero()
    except (TypeError, ValueError, RuntimeError):  # no number, or several
        found = torch.empty(0)
    if not len(found):
        raise InputError(f"timestep is {timestep}, which is none of the timesteps of this {type(scheduler).__name__}; step through those")
    return int(found[0])


def _require_shapes(model_output: Any, sample: Any, learned: bool = False) -> None:
    """Raises InputError unless both are tensors (B, C, ...), the first with as many channels again of a `learned` variance."""
    shape, of_sample = (tuple(tensor.shape) if isinstance(tensor, Tensor) else () for tensor in (model_output, sample))
    expected = (*of_sample[:1], (1 + learned) * of_sample[1], *of_sample[2:]) if len(of_sample) > 1 else of_sample
    if not of_sample or shape != expected:
        raise InputError(
            f"model_output has shape {shape} and sample {of_sample}, but they must be tensors of one shape, and with as many channels "
            f"again in model_output for DDPM with a learned variance"
        )


def _require_timesteps(steps: Any, timesteps: Any, levels: float = math.inf) -> None:
    """Raises InputError unless there is a number of steps, or a falling list of timesteps, of so many noise levels."""
    if timesteps is None:
        if not (isinstance(steps, int | np.integer) and 1 <= steps <= levels):
            raise InputError(f"num_inference_steps is {steps!r}, but must be a whole number from 1{f' to {levels}' * (levels < math.inf)}")
        return
    try:
        chosen = torch.as_tensor(timesteps)
    except (TypeError, ValueError, RuntimeError):
        chosen = torch.empty(0)
    if chosen.is_floating_point() or chosen.ndim != 1 or not levels > chosen[0] or chosen[-1] < 0 or (chosen.diff() >= 0).any():
        raise InputError(f"timesteps is {timesteps!r}, but must be whole numbers that fall, below {levels} and not below 0")


class DDPM(DDPMScheduler):
    """DDPM (arXiv 2006.11239) that adds no noise after its last step, also where that is not t = 0 (spacing `trailing`)."""

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None, timesteps: Sequence[int] | None = None) -> None:
        """Spaced timesteps, or these (descending)."""
        _require_timesteps(num_inference_steps, timesteps, self.config.num_train_timesteps)
        super().set_timesteps(num_inference_steps if timesteps is None else None, device, timesteps)

    def step(
        self, model_output: Tensor, timestep: Tensor | int, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """x_t to x_s for the next timestep s < t of its list. All tensors (B, C, H, W), model_output (B, 2C, H, W) if learned."""
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
    """DDIM (arXiv 2010.02502) that steps to the next timestep of its list, which may be given.

    The base class steps to t - T // N, which is not in the list under `linspace` (19 of 50 steps, say). The noise is taken
    from the clipped x_0, as in the paper's code. Without clipping this is Euler's method for x_t / a over s / a.
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
        """x_t to x_s for the next timestep s < t (equation 12). All tensors (B, C, H, W)."""
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
        """Of the timestep that follows in the list, or of the clean image."""
        last = place + 1 == len(self.timesteps)
        after: Tensor = self.final_alpha_cumprod if last else self.alphas_cumprod[self.timesteps[place + 1]]
        return after

    def _x_0_and_noise(self, model_output: Tensor, sample: Tensor, acp: Tensor) -> tuple[Tensor, Tensor]:
        """What the network thinks that x_t consists of, x_0 brought into its bounds."""
        a, s = acp.sqrt(), (1 - acp).sqrt()
        x_0 = predicted_x_0(self.config.prediction_type, model_output, sample, a, s)
        if self.config.thresholding:
            x_0 = self._threshold_sample(x_0)
        elif self.config.clip_sample:
            x_0 = x_0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return x_0, (sample - a * x_0) / s


class EulerAncestral(DDIM):
    """Euler's method down to less noise than the next timestep has, and fresh noise to make up for it: DDIM at eta = 1."""

    def step(  # type: ignore[override]
        self, model_output: Tensor, timestep: Tensor | int, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """As of DDIM, without a choice of eta."""
        return super().step(model_output, timestep, sample, 1.0, generator, return_dict)


class Heun(DDIM):
    """Heun's method (arXiv 2206.00364, algorithm 1): a step of DDIM, and back half of it with the noise found where it led.

    Timesteps stand in the list once for each call of the network: t_0, t_1, t_1, t_2, t_2, ... The last step, to the clean
    image, and one from pure noise, which is infinitely long in s / a, stay as DDIM makes them.
    """

    order = 2

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None, timesteps: Sequence[int] | None = None) -> None:
        """Spaced timesteps, or these (descending)."""
        super().set_timesteps(num_inference_steps, device, timesteps)
        self.timesteps = torch.cat([self.timesteps[:1], self.timesteps[1:].repeat_interleave(2)])
        self._begun: tuple[Tensor, Tensor] | None = None  # half-way through a step: noise and alphas_cumprod where it began
        self._place = 0

    def step(  # type: ignore[override]
        self, model_output: Tensor, timestep: Tensor | int, sample: Tensor, return_dict: bool = True
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """One call of the network: forth, or back half of it. All tensors (B, C, H, W)."""
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
        """Raises InputError unless the timestep is the next of the list: which half of a step it is depends on the place."""
        if self.num_inference_steps is None or self._place == len(self.timesteps):
            raise InputError("Heun's method has no timesteps yet, or has made all its steps; call set_timesteps first")
        if self.timesteps[_index(self, timestep)] != self.timesteps[self._place]:
            raise InputError(
                f"timestep is {timestep}, but the next one is {self.timesteps[self._place]}; or call set_timesteps to begin again"
            )


def _corrected(x_s: Tensor, noise: Tensor, acp_s: Tensor, noise_before: Tensor, acp_t: Tensor) -> Tensor:
    """x_s / a_s = x_t / a_t + (sigma_s - sigma_t) noise: here the noise becomes the mean of that at both ends."""
    if acp_t == 0:
        return x_s
    sigma_t, sigma_s = ((1 - acp_t) / acp_t).sqrt(), ((1 - acp_s) / acp_s).sqrt()
    return x_s + acp_s.sqrt() * (sigma_s - sigma_t) * (noise - noise_before) / 2


class UniPC(UniPCMultistepScheduler):
    """UniPC (arXiv 2302.04867) that takes a list of timesteps, too, and works out what each x_0 weighs without tensors.

    The base class solves its small systems with some sixty operations of tensors with a few numbers in each step, which takes
    longer than a small network on a fast device.
    """

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
        """x_t to x_s for the next timestep s < t of its list. All tensors (B, C, H, W)."""
        _require_shapes(model_output, sample)
        if self.num_inference_steps is None or self.step_index == len(self.timesteps):
            raise InputError("UniPC has no timesteps yet, or has made a step of each; call set_timesteps first")
        _index(self, timestep)
        stepped: SchedulerOutput | tuple[Tensor] = super().step(model_output, timestep, sample, return_dict)
        return stepped

    def multistep_uni_p_bh_update(self, model_output: Tensor, *args: Any, sample: Tensor, order: int) -> Tensor:
        """The predictor, UniP: x_t (B, C, H, W) at the next level, from x_0 as predicted at this and at `order` - 1 levels before."""
        if not self._is_weighed:
            predicted: Tensor = super().multistep_uni_p_bh_update(model_output, sample=sample, order=order)
            return predicted
        on_x, on_x_0, _ = self._weights(self.step_index + 1, order, correct=False)
        return self._combined(on_x * sample, on_x_0)

    def multistep_uni_c_bh_update(
        self, this_model_output: Tensor, *args: Any, last_sample: Tensor, this_sample: Tensor, order: int
    ) -> Tensor:
        """The corrector, UniC: x_t (B, C, H, W) at this level once more, now that x_0 was predicted from it."""
        if not self._is_weighed:
            corrected: Tensor = super().multistep_uni_c_bh_update(
                this_model_output, last_sample=last_sample, this_sample=this_sample, order=order
            )
            return corrected
        on_x, on_x_0, on_this = self._weights(self.step_index, order, correct=True)
        return self._combined(on_x * last_sample + on_this * this_model_output, on_x_0)

    @property
    def _is_weighed(self) -> bool:
        """Not in the forms of the base class that no solver here takes."""
        return self.predict_x0 and self.config.solver_type == "bh1" and not self.solver_p

    def _combined(self, x_t: Tensor, on_x_0: Sequence[float]) -> Tensor:
        for weight, x_0 in zip(on_x_0, reversed(self.model_outputs)):
            x_t = x_t.add(x_0, alpha=weight)
        return x_t

    def _weights(self, place: int, order: int, correct: bool) -> tuple[float, list[float], float]:
        """What weighs how much in a step to the level at `place`: x, the predictions of x_0 (newest first), and the one there.

        Algorithms 1 and 2 with B(h) = h for the prediction of x_0, the names as in appendix A; lambda = log(a / s).
        """
        sigma = self.sigmas[place - order : place + 1].double().numpy()[::-1]  # s / a at the level to reach, at the one before, ...
        a, lambdas = 1 / np.sqrt(1 + sigma**2), -np.log(sigma)
        h = lambdas[1] - lambdas[0]
        r = np.append((lambdas[2:] - lambdas[1]) / -h, 1.0)
        known = order if correct else order - 1
        phi, factorial, g = np.expm1(h) / h - 1 if known else 0.0, 1, []  # h is 0 in a last step from t = 0, which is of order 1
        for k in range(1, known + 1):
            g.append(phi * factorial / h)
            factorial *= k + 1
            phi = phi / h - 1 / factorial
        # The lowest orders are the paper's code's, which takes the limit for small h.
        rho = np.full(1, 0.5) if known == 1 else np.linalg.solve(np.vander(r[:known], known, increasing=True).T, g)
        on_differences = -a[0] * h * rho / r[:known]
        others = on_differences[: order - 1].tolist()
        on_newest = -a[0] * np.expm1(h) - on_differences.sum()
        return float(a[0] * sigma[0] / (a[1] * sigma[1])), [float(on_newest), *others], float(on_differences[-1]) if correct else 0.0


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
FLOW = tuple(name for name, spec in SOLVERS.items() if spec.flow)
PLACES_OF_THEIR_OWN = {"use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas"}
KNOWN_TO_ALL = {"linear", "scaled_linear", "squaredcos_cap_v2"}  # names of betas; DDPMScheduler has more than the others


def default_scheduler(own: Any) -> SchedulerName:
    """The solver for a model whose own scheduler is `own`, where none is named."""
    return DEFAULT_FLOW_SOLVER if is_flow(own) else DEFAULT_SOLVER


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
        # Stock schedulers take it over. With the others DDIMScheduler steps to timesteps that it then does not visit.
        timestep_spacing="leading",
    )


def strided(T: int, steps: int) -> list[int]:
    """Timesteps from 0 on with the smallest whole stride that gives so many, descending: `ddimN` of guided-diffusion.

    Raises:
        InputError: no stride gives just so many.
    """
    for stride in range(1, T):
        if len(range(0, T, stride)) == steps:
            return list(range(0, T, stride))[::-1]
    near = min((len(range(0, T, stride)) for stride in range(1, T)), key=lambda count: abs(count - steps))
    raise InputError(f"steps is {steps}, but no whole stride gives that of {T} noise levels; take {near}, or another --spacing")


def in_sections(T: int, counts: Sequence[int]) -> list[int]:
    """Timesteps of T levels cut into equal sections, so many of each (the first, least noisy, first), descending.

    Where T cannot be divided, the first sections have a level more; in each, ends are included and the rest is equally
    spaced, as with the lists of guided-diffusion.

    Raises:
        InputError: a section has fewer levels than it should give.
    """
    chosen: list[int] = []
    start = 0
    for k, count in enumerate(counts):
        size = T // len(counts) + (k < T % len(counts))
        if count > size:
            raise InputError(
                f"sections has {count}, but each of {len(counts)} sections has {size} of the {T} noise levels; take at most that"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1
        chosen += [start + round(place * stride) for place in range(count)]
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
    """The solver `name` for a model whose own scheduler is `own`, set to `steps` steps.

    Args:
        name: of `SCHEDULERS`.
        own: what the model was saved with; its schedule and prediction type are taken over.
        spacing: how the timesteps are spread.
        steps: how many.
        timesteps: the timesteps themselves, descending, in place of the two. Solvers that end at t = 0 need no call there:
            they leave a last 0 out.
        clipping: left out, ddpm and ddim bound x_0 as the model's own scheduler says; else nothing is bounded here, because
            the pipeline does it, or nobody.

    Raises:
        InputError: a solver or spacing for another kind of model, more steps than noise levels, or a single step that would
            start at the clean end.
    """
    _refuse_other_models(name, own, spacing, timesteps)
    T = own.config.num_train_timesteps
    if timesteps and timesteps[0] >= T:
        raise InputError(f"timesteps has {timesteps[0]}, but the model's noise levels are 0 to {T - 1}")
    if steps > T:
        raise InputError(f"steps is {steps}, but the model has {T} noise levels; take at most {T}")
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
        given = "timesteps are given" if timesteps else f"spacing is {spacing}"
        raise InputError(f"{given}, but scheduler {name} has linspace only; leave it out")


def _built(name: SchedulerName, own: Any, spacing: Spacing) -> Any:
    kind, changes = SCHEDULERS[name]
    # Ways to place the steps that would silently win over the spacing asked for.
    config = {field: value for field, value in own.config.items() if field not in PLACES_OF_THEIR_OWN}
    if config.get("variance_type") == "fixed_large_log":  # of which DDPMScheduler takes the root of a logarithm
        config["variance_type"] = "fixed_large"
    if name not in FLOW:
        changes = {"timestep_spacing": spacing, **changes}
        if own.config.get("trained_betas") is None and own.config.get("beta_schedule") not in KNOWN_TO_ALL:
            changes["trained_betas"] = own.betas.tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # that "dpmsolver" will go in diffusers 1.0
        scheduler = kind.from_config(config, **changes)  # type: ignore[attr-defined]
    if name in FLOW:  # it shifts its levels once more when steps are set, so the ends must be those before any shift
        scheduler.sigma_max, scheduler.sigma_min = 1.0, 1 / own.config.num_train_timesteps
    return scheduler


def set_timesteps(scheduler: Any, steps: int, timesteps: Sequence[int] | None = None) -> None:
    """Sets a scheduler to `steps` steps, or to these timesteps. They stay on the CPU: tables are looked up there, and reading
    a number back from a device would wait for it."""
    _require_timesteps(steps, timesteps)
    if timesteps is None:
        scheduler.set_timesteps(steps, device="cpu")
        return
    if "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
        raise InputError(f"timesteps are given, but {type(scheduler).__name__} takes none; leave them out")
    if scheduler.config.get("final_sigmas_type") == "sigma_min" and timesteps[-1] == 0 and len(timesteps) > 1:
        timesteps = timesteps[:-1]
    scheduler.set_timesteps(timesteps=list(timesteps), device="cpu")
