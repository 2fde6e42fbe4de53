"""What a plain `train.py --dataset ...` chooses for the fields that were left out: what suits the images, the steps and the device.

Only a command without `--config` chooses, and only at its first start: the values stand in config.json, and a resume keeps them. The field
defaults of `schema` stay neutral, for configurations and for Python.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from .loading import PARAMETERIZATION, update
from .schema.network import SIZE_FIELDS, SIZES, Size, network_of_size
from .schema.training import OptimizationConfig, TrainConfig

CPU_STEPS = 10_000  # without a GPU: hours at 32 pixels, where the 100 000 of the field would be days
CPU_BATCH = 32
MAX_SHIFT = 128.0  # at the linear schedule's last timestep hardly anything of an image is left
GRIDS = 20  # sample grids, and checkpoints, of a run
WARMUP = 20  # one in so many steps
EMA_HORIZON = 10  # the average is over about one in so many steps
EMA_DECAYS = (0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998, 0.9999)
LEARNING_RATES: dict[Size, float] = {"tiny": 5e-4, "small": 2e-4, "base": 1e-4, "large": 1e-4}
FEW_IMAGES, MANY_IMAGES = 5_000, 500_000


@dataclass(frozen=True)
class Group:
    """Values that are chosen for one reason."""

    what: str
    values: dict[str, Any]
    reason: str


CHOSEN = {
    "max_steps", "batch_size", *SIZE_FIELDS, "prediction_type", "schedule_shift", "timestep_sampler", "learning_rate", "lr_schedule",
    "warmup_steps", "max_grad_norm", "ema_decay", "sample_every", "checkpoint_every",
}  # fmt: skip

# Of the network from whose weights a run begins.
NETWORK = {*SIZE_FIELDS, "model_config", "resblock_updown", "resnet_time_scale_shift", "learn_sigma"}


def left_out(typed: Collection[str]) -> frozenset[str]:
    """The fields that a plain command chooses, given those that were typed.

    With `init` the network and the parameterization are those of its model, so they are not chosen.
    """
    names = CHOSEN - set(typed) - ({"max_steps"} if "num_epochs" in typed else set())
    if "init" in typed:
        names -= NETWORK.union(PARAMETERIZATION)
    return frozenset(names if {"size", "model_config"}.isdisjoint(typed) else names - NETWORK)


def of_init(typed: Collection[str]) -> frozenset[str]:
    """The fields that a plain command with `init` takes from that run, given those that were typed."""
    if "init" not in typed:
        return frozenset()
    of_network = NETWORK if {*SIZE_FIELDS, "size", "model_config"}.isdisjoint(typed) else set()
    return frozenset(of_network.union(PARAMETERIZATION) - set(typed))


def of_base(named: Collection[str]) -> frozenset[str]:
    """The fields of a text-to-image training that its base model decides, given those that a command and its configuration name."""
    return frozenset(set(PARAMETERIZATION) - set(named))


def choose(config: TrainConfig, names: Collection[str], images: int, gpu: bool) -> tuple[TrainConfig, list[str]]:
    """The configuration with what was left out chosen, and a line for each group of values.

    Args:
        config: checked and resolved; what was typed is in it.
        names: fields that may be chosen, as of `left_out`.
        images: number of training images; 0 where it is not known yet.
        gpu: whether it trains on one.
    """
    lines = []
    for group in (_length, _network, _objective, _optimization):
        found = group(config, images, gpu)
        values = {name: value for name, value in found.values.items() if name in names}
        if values:
            config = update(config, values)
            lines.append(f"{found.what}: {as_flags(values)} ({found.reason})")
    return config, lines


def steps_of_epochs(optim: OptimizationConfig, images: int, step: int = 0, position: int = 0) -> int:
    """The `max_steps` that `num_epochs` of so many training images are, of a run that is at this step and position."""
    assert optim.num_epochs is not None
    left = math.ceil(optim.num_epochs * images) - position
    return step + max(0, -(-left // optim.batch_size))


def as_flags(values: Mapping[str, Any]) -> str:
    """Values as they are typed on the command line."""
    return " ".join(_as_flag(name, value) for name, value in values.items())


def _as_flag(name: str, value: Any) -> str:
    return f"--{'' if value else 'no_'}{name}" if isinstance(value, bool) else f"--{name} {_typed(value)}"


def _typed(value: Any) -> str:
    """A value as it is typed on the command line."""
    return " ".join(map(_typed, value)) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else str(value)


def _length(config: TrainConfig, images: int, gpu: bool) -> Group:
    if gpu:
        return Group("length", {}, "")
    return Group("length", {"max_steps": CPU_STEPS, "batch_size": CPU_BATCH}, "no GPU")


def _network(config: TrainConfig, images: int, gpu: bool) -> Group:
    if config.data.resolution is None or config.data.resolution < 1:
        return Group("network", {}, "")  # a problem that the validation names
    size: Size = "tiny" if not gpu else "small" if images < FEW_IMAGES else "base" if images < MANY_IMAGES else "large"
    reason = f"size {size}: {'no GPU' if not gpu else f'{images} images'}; another with --size {'|'.join(SIZES)}"
    values = network_of_size(size, config.data.resolution, config.model.channel_mult)
    # It divides the channels of every level, also where model_channels was typed.
    values["attention_head_dim"] = math.gcd(values["attention_head_dim"], config.model.model_channels)
    return Group("network", values, reason)


def _objective(config: TrainConfig, images: int, gpu: bool) -> Group:
    resolution = config.data.resolution or 64
    ends_in_noise = config.objective.noise_schedule != "scaled_linear"  # also where its SNR is multiplied
    values = {
        "prediction_type": "v_prediction",
        # At a lower resolution the same noise hides more of an image: the SNR that the schedule has at 64 pixels, per pixel of those
        # (arXiv 2301.11093, section 2.1).
        "schedule_shift": min(MAX_SHIFT if ends_in_noise else 1.0, (64 / resolution) ** 2),
        "timestep_sampler": "stratified",
    }
    return Group("objective", values, f"noise as it suits {resolution} pixels")


def _optimization(config: TrainConfig, images: int, gpu: bool) -> Group:
    optim, width = config.optimization, config.model.model_channels
    size: Size = next((size for size in LEARNING_RATES if width <= SIZES[size]["model_channels"]), "large")
    steps = steps_of_epochs(optim, images) if optim.num_epochs and images else optim.max_steps
    every = max(100, min(1000, steps // GRIDS))
    values = {
        "learning_rate": LEARNING_RATES[size],
        "lr_schedule": "cosine",
        "warmup_steps": min(1000, steps // WARMUP),
        "max_grad_norm": 1.0,
        "ema_decay": (next((rate for rate in reversed(EMA_DECAYS) if round(1 / (1 - rate)) <= steps / EMA_HORIZON), EMA_DECAYS[0]),),
        "sample_every": every,
        # What is measured or pushed must be saved.
        "checkpoint_every": math.gcd(config.run.eval_every * config.run.keep_best, config.hub.hub_every or 0) or every,
    }
    return Group("optimization", values, f"{steps} steps" if config.model.model_config else f"{width} channels, {steps} steps")
