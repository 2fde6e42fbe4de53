"""The objective: combinations without a meaning, and values that would be ignored."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping
from typing import Any

from ..aliases import value_suggestion
from ..ranges import range_problems
from ..registry import TIMESTEP_BIASES, TIMESTEP_SAMPLERS, WEIGHTINGS, Parametrized, parameters_of
from ..schema.objective import BETA_ENDS, ObjectiveConfig, WeightsConfig, is_straight, noise_schedule

MIN_SNR_FLOOR = 1e-4  # to be a bound worth its name: the debiased weights of the cosine schedule are then up to 100


def objective_problems(objective: ObjectiveConfig) -> list[str]:
    """Everything that is wrong with an objective: combinations without a meaning, and values that would be ignored."""
    if unknown := unknown_weighting(objective.weighting):
        found = [unknown]
    else:
        found = [*_unused(objective).values(), *_weighting_problems(objective)]
    found += bound_problems(dataclasses.asdict(objective)) + _timestep_bias_problems(objective) + _phase_problems(objective)
    return found + _schedule_problems(objective) + variance_problems(objective)


def weights_problems(config: WeightsConfig) -> list[str]:
    """Everything that is wrong with a command that plots loss weights. Objectives that nobody should train are no problem here."""
    names, objective = (config.objective.weighting, *config.against), config.objective
    if unknown := [problem for name in names if (problem := unknown_weighting(name))]:
        return unknown
    found = range_problems(ObjectiveConfig, dataclasses.asdict(objective))
    if "variational" in names:
        found.append("weighting variational is no function of the SNR, so it has no loss weights to draw; leave it out")
    unused = set.intersection(*(set(_unused(dataclasses.replace(objective, weighting=name))) for name in names))
    unused |= {"learn_sigma", "variance_type", "learned_uncertainty", "timestep_sampler_after", "timestep_sampler_switch"}
    if not objective.normalize_weights:
        unused |= {"timestep_sampler", *parameters_of(TIMESTEP_SAMPLERS), "timestep_bias_strategy", *parameters_of(TIMESTEP_BIASES)}
    found += [
        f"{name} is {getattr(objective, name)}, but changes no weight of {', '.join(names)}; leave it out"
        for name in sorted(unused)
        if _changed(objective, name)
    ]
    found += bound_problems(dataclasses.asdict(objective))
    # Whatever the prediction type, all are plotted: it decides only between the path of rectified flow and the others.
    path = objective if is_straight(objective) else dataclasses.replace(objective, prediction_type="v_prediction")
    return found + _schedule_problems(path)


def bound_problems(values: Mapping[str, Any]) -> list[str]:
    """A floor of the SNR above its ceiling."""
    floor, ceiling = values.get("snr_floor", 0.0), values.get("snr_ceiling", 0.0)
    if 0 < ceiling < floor:
        return [f"snr_ceiling is {ceiling}, but snr_floor is {floor}; take a ceiling above the floor"]
    return []


def beta_problems(objective: ObjectiveConfig) -> list[str]:
    """So few timesteps that a beta is 1 or more."""
    name, T = noise_schedule(objective), objective.num_train_timesteps
    _, beta_end = BETA_ENDS.get(name or "", (0.0, 0.0))
    if T < 2 or beta_end * 1000 / T < 1:
        return []
    return [
        f"num_train_timesteps is {T}, but the betas of noise_schedule {name} scale by 1000/T and must stay below 1; "
        f"take at least {int(beta_end * 1000) + 1}"
    ]


def unknown_weighting(name: str) -> str | None:
    """A sentence about a weighting that is not registered, with a name that is."""
    if name in WEIGHTINGS:
        return None
    near = value_suggestion("weighting", name, WEIGHTINGS)
    hint = f"did you mean {near}?" if near else f"take one of: {', '.join(WEIGHTINGS)}"
    return f"weighting is {name}, which is not known; {hint}"


def _unused(objective: ObjectiveConfig) -> dict[str, str]:
    """Fields that the rest of the objective leaves no use for, and a sentence for each."""
    weighting, samplers, found = objective.weighting, timestep_samplers(objective), _unused_parameters(objective)
    spec, bound = WEIGHTINGS[weighting], weighting == "variational"
    constant_below = getattr(objective, spec.constant_below) if isinstance(spec.constant_below, str) else spec.constant_below
    without_use = {
        "snr_floor": objective.snr_floor <= constant_below,
        "snr_ceiling": objective.snr_ceiling >= spec.constant_above,
        "normalize_weights": bound,
        "terminal_weight_floor": bound,
        "schedule_free_weights": bound,
        "learned_uncertainty": bound,
    }
    for name, useless in without_use.items():
        if useless:
            found[name] = f"changes nothing in weighting {weighting}; leave it out or take --weighting debiased"
    if not any(TIMESTEP_SAMPLERS[name].draws_zero_snr for name in samplers):
        found["terminal_weight_floor"] = (
            f"timestep_sampler {' and '.join(samplers)} never draws the last timestep where its SNR is 0; take "
            f"--timestep_sampler log_normal_corrected or leave it out"
        )
    return {name: f"{name} is {getattr(objective, name)}, but {reason}" for name, reason in found.items() if _changed(objective, name)}


def _unused_parameters(objective: ObjectiveConfig) -> dict[str, str]:
    """Parameters of other weightings, samplers and biases than the chosen ones, and what to do about each."""
    found = _parameters_of_others("weighting", WEIGHTINGS, objective.weighting)
    found |= _parameters_of_others("timestep_sampler", TIMESTEP_SAMPLERS, *timestep_samplers(objective))
    return found | _parameters_of_others("timestep_bias_strategy", TIMESTEP_BIASES, objective.timestep_bias_strategy)


def named_problems(objective: ObjectiveConfig, named: Container[str]) -> list[str]:
    """Parameters that a command names, with the value that they have anyway, and that nothing uses.

    In diffusers' scripts `--snr_gamma 5` chooses the weighting, too.
    """
    if objective.weighting not in WEIGHTINGS:
        return []  # said elsewhere
    return [
        f"{name} is {getattr(objective, name)}, but {reason}"
        for name, reason in _unused_parameters(objective).items()
        if name in named and not _changed(objective, name)
    ]


def _parameters_of_others(kind: str, table: Mapping[str, Parametrized], *chosen: str) -> dict[str, str]:
    """The parameters that the chosen entries of a table do not have, and what to do about each."""
    return {
        name: f"{kind} is {' and '.join(chosen)}, which does not have it; take --{kind} {' or '.join(owners)} or leave {name} out"
        for name, owners in parameters_of(table).items()
        if not set(chosen) & set(owners)
    }


def timestep_samplers(objective: ObjectiveConfig) -> tuple[str, ...]:
    """The names of the samplers of a run, in the order of its steps."""
    after = objective.timestep_sampler_after
    return (objective.timestep_sampler, after) if after else (objective.timestep_sampler,)


def _changed(objective: ObjectiveConfig, name: str) -> bool:
    changed: bool = getattr(objective, name) != getattr(ObjectiveConfig(), name)
    return changed


def _weighting_problems(objective: ObjectiveConfig) -> list[str]:
    """Weights without bound, or without a meaning for the prediction type."""
    weighting, predicted, found = objective.weighting, objective.prediction_type, repeats_problems(objective)
    spec = WEIGHTINGS[weighting]
    samplers = timestep_samplers(objective)
    if objective.schedule_free_weights and (changing := [name for name in samplers if not TIMESTEP_SAMPLERS[name].corrected]):
        found.append(
            f"schedule_free_weights is on, but timestep_sampler {changing[0]} multiplies the objective by its density; take "
            f"--timestep_sampler stratified, or {changing[0]}_corrected where there is one"
        )
    if objective.schedule_free_weights and objective.timestep_bias_strategy != "none":
        found.append(
            f"schedule_free_weights is on, but timestep_bias_strategy {objective.timestep_bias_strategy} multiplies the objective at "
            f"timesteps of this schedule; leave one of the two out"
        )
    if objective.learned_uncertainty and "loss_second_moment" in samplers:
        found.append(
            "learned_uncertainty is on, but timestep_sampler loss_second_moment draws by the size of the losses, to which the uncertainty "
            "is added; take --timestep_sampler stratified"
        )
    unbounded = predicted in spec.unbounded and objective.snr_floor < MIN_SNR_FLOOR
    # The last SNR of the cosine schedule is 2.4e-9: the debiased weights then have an effective sample size of 0.0015.
    if unbounded and objective.noise_schedule == "cosine":
        found.append(
            f"weighting {weighting} with noise_schedule cosine and prediction_type {predicted} lets a few timesteps carry "
            f"nearly the whole loss; add --snr_floor 1e-3, or take --weighting debiased --prediction_type v_prediction"
        )
    elif unbounded and (objective.rescale_betas_zero_snr or is_straight(objective)) and predicted != "epsilon":
        found.append(f"weighting {weighting} is infinite where the SNR is 0; add --snr_floor 1e-3, or take --weighting debiased")
    return found


def repeats_problems(objective: ObjectiveConfig) -> list[str]:
    """A weighting that repeats other code, with a prediction type that this code does not know."""
    repeats = WEIGHTINGS[objective.weighting].repeats
    if not repeats or objective.prediction_type in repeats:
        return []
    return [
        f"weighting {objective.weighting} repeats code that knows {', '.join(repeats)} only, but prediction_type is "
        f"{objective.prediction_type}; take --weighting debiased"
    ]


def path_problems(objective: ObjectiveConfig) -> list[str]:
    """A noise schedule and a prediction type that do not go together: no loss weight would be right."""
    predicted, found = objective.prediction_type, []
    if predicted == "flow" and objective.noise_schedule is not None:
        found.append(
            f"noise_schedule is {objective.noise_schedule}, but prediction_type flow has its own, a = 1 - t and s = t; leave it out"
        )
    if objective.noise_schedule == "rectified_flow" and predicted in ("epsilon", "v_prediction"):
        found.append(
            f"noise_schedule is rectified_flow, but prediction_type is {predicted}; take --prediction_type sample, or --prediction_type "
            f"flow, which has it, and leave noise_schedule out"
        )
    return found


def _schedule_problems(objective: ObjectiveConfig) -> list[str]:
    predicted, found = objective.prediction_type, beta_problems(objective) + path_problems(objective)
    if is_straight(objective) and objective.rescale_betas_zero_snr:
        path = "prediction_type flow" if predicted == "flow" else "noise_schedule rectified_flow"
        found.append(f"rescale_betas_zero_snr is on, but {path} ends at zero SNR as it is; leave it out")
    if predicted == "epsilon" and objective.rescale_betas_zero_snr:
        found.append(
            "rescale_betas_zero_snr is on, but prediction_type is epsilon, and where the SNR is 0 the input is the noise itself: "
            "a prediction of it says nothing about the image; take --prediction_type v_prediction"
        )
    if objective.terminal_weight_floor > 0 and not is_straight(objective) and not objective.rescale_betas_zero_snr:
        found.append(
            f"terminal_weight_floor is {objective.terminal_weight_floor}, but the terminal SNR of this schedule is not 0; "
            f"add --rescale_betas_zero_snr --prediction_type v_prediction, or take --prediction_type flow"
        )
    return found


def _phase_problems(objective: ObjectiveConfig) -> list[str]:
    """A second timestep sampler that never draws, or draws as the first, and weights that cannot be normalized for both."""
    after, switch = objective.timestep_sampler_after, objective.timestep_sampler_switch
    if after is None:
        return (
            [f"timestep_sampler_switch is {switch}, but timestep_sampler_after is left out; name it, or leave both out"] if switch else []
        )
    found = []
    if after == objective.timestep_sampler:
        found.append(f"timestep_sampler_after is {after}, as timestep_sampler is; leave it out")
    if not switch:
        found.append("timestep_sampler_switch is 0, so that timestep_sampler never draws; take --timestep_sampler_switch 10000")
    if objective.normalize_weights and not all(TIMESTEP_SAMPLERS[name].corrected for name in timestep_samplers(objective)):
        found.append(
            "normalize_weights is on, but timestep_sampler and timestep_sampler_after have other densities, and the weights have one mean; "
            "leave one of the two out"
        )
    return found


def _timestep_bias_problems(objective: ObjectiveConfig) -> list[str]:
    """A bias that changes nothing."""
    strategy, T = objective.timestep_bias_strategy, objective.num_train_timesteps
    if strategy == "none":
        return []
    found = []
    if objective.timestep_bias_multiplier == 1:
        found.append(
            f"timestep_bias_strategy is {strategy}, but timestep_bias_multiplier is 1, which changes nothing; "
            f"take --timestep_bias_multiplier 2, or --timestep_bias_strategy none"
        )
    begin, end = objective.timestep_bias_begin, T if objective.timestep_bias_end is None else objective.timestep_bias_end
    if strategy == "range" and not (0 <= begin < end <= T and end - begin < T):
        found.append(
            f"timestep_bias_strategy is range, from timestep_bias_begin {begin} to before timestep_bias_end {end}, but must be a part of "
            f"the timesteps 0 to {T - 1}; take --timestep_bias_begin {T // 2}" + (f" --timestep_bias_end {T}" if end != T else "")
        )
    portion = objective.timestep_bias_portion
    if strategy != "range" and 0 < portion < 1 and not 0 < round(portion * T) < T:
        found.append(f"timestep_bias_portion is {portion}, which is none or all of {T} timesteps; take --timestep_bias_portion 0.25")
    return found


def variance_problems(objective: ObjectiveConfig) -> list[str]:
    """A variance that is learned, fixed or needed where it has no meaning."""
    found = []
    if objective.weighting == "variational" and not objective.learn_sigma:
        other = " --prediction_type v_prediction" if is_straight(objective) else ""
        found.append(f"weighting variational is the bound with a learned variance, but learn_sigma is off; add --learn_sigma{other}")
    if is_straight(objective):
        path = "prediction_type flow" if objective.prediction_type == "flow" else "noise_schedule rectified_flow"
        found += [
            f"{name} is {getattr(objective, name)}, but {path} is sampled without random steps, which have no variance; "
            f"leave it out or take --prediction_type v_prediction"
            for name in ("learn_sigma", "variance_type")
            if _changed(objective, name)
        ]
    elif objective.learn_sigma and objective.variance_type:
        found.append(f"variance_type is {objective.variance_type}, but learn_sigma makes the network predict it; give one of the two")
    return found
