"""Values of a preset that give way to flags which they do not go with."""

from __future__ import annotations

from collections.abc import Callable, Container

from ..loading import flatten, update
from ..registry import TIMESTEP_BIASES, TIMESTEP_SAMPLERS, WEIGHTINGS, parameters_of
from ..schema.training import TrainConfig
from .training import train_problems

# Values of a preset (--config, or the digits' own) that give way to a flag which they do not go with. Not what defines the objective.
YIELDING = (
    "warmup_steps", "label_dropout", "label_column", "attention_resolutions", "attention_head_dim", "channel_mult",
    *parameters_of(WEIGHTINGS), "snr_floor", "snr_ceiling", "terminal_weight_floor", "normalize_weights",
    *parameters_of(TIMESTEP_SAMPLERS), *parameters_of(TIMESTEP_BIASES), "noise_schedule", "learn_sigma", "variance_type",
    "micro_batch_size", "gradient_checkpointing", "compile_mode",
    "pyramid_noise_iterations", "validation_every",
    "keep_best", "eval_metrics", "eval_images", "feature_extractor", "feature_extractor_weights",
    "hub_model_id", "hub_private", "hub_every", "hub_tags", "hub_license",
)  # fmt: skip


def yielded(
    config: TrainConfig, preset: TrainConfig, typed: Container[str], resolve: Callable[[TrainConfig], TrainConfig]
) -> tuple[TrainConfig, list[str]]:
    """A configuration whose values of the preset go with the flags that were typed, and a sentence for each value that gave way.

    Args:
        config: the preset, changed by flags.
        preset: what it was without them; what is wrong with it alone stays wrong.
        typed: names of the flags.
        resolve: fills in what was left out.
    """
    wrong_alone, before, defaults = set(train_problems(resolve(preset))), flatten(preset), flatten(TrainConfig())
    defaults["warmup_steps"] = max(0, config.optimization.max_steps // 10)
    said = []
    problems = set(train_problems(resolve(config))) - wrong_alone
    for name in YIELDING:
        if not problems or name in typed or before[name] == defaults[name]:
            continue
        other = update(config, {name: defaults[name]})
        if (left := set(train_problems(resolve(other))) - wrong_alone) < problems:
            said.append(f"{name} is {defaults[name]}, and not as configured: {min(problems - left)}")
            config, problems = other, left
    return config, said
