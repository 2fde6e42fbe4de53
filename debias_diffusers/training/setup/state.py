"""What state.json says of a training at every step, and whether a checkpoint is of the same training."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator

from ...config import shard_names
from ...config.hub_names import PINNED, absolute_path, is_dataset_id, is_model_id
from ...config.loading import BEFORE_THE_FIELD, CHANGES, differences, flatten, stored
from ...config.schema.data import EMBEDDED
from ...config.schema.training import TrainConfig
from ...diffusion.loss import Objective
from ...errors import InputError, raise_all
from ...runs.checkpoints import Checkpoint
from ...runs.run_directory import DATA, Change
from ...tasks.base import Task
from ...utils.console import say
from ...utils.distributed import broadcast_from_first
from .. import device, state_dicts

# Fields of files or folders beside those that may be on the Hub, which a resume in another working directory needs, too.
FILES = ("model_config", "feature_extractor_weights", "precompute_dir")


def constants_of(
    config: TrainConfig, found: Checkpoint | None, accelerator: Accelerator, objective: Objective, task: Task
) -> dict[str, Any]:
    """What state.json says at every step: processes, versions, data, network, loss weights and configuration."""
    # Fields that the run began before, which it goes on without: what is resumed tells by them what may be asked of it.
    older = BEFORE_THE_FIELD.keys() - found.state["config"].keys() if found else set()
    data = broadcast_from_first(task.data.source.fingerprint, accelerator)  # which looks at every file of a folder
    paths = {name: path for name, path in found.state.get("paths", {}).items() if name not in found.changing} if found else {}
    return {
        "num_processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "versions": device.versions(),
        "data": data,
        "paths": paths | _paths(config, tuple(name for name in PINNED if name != "init") if found else PINNED),
        "weights": _some_weights(objective),
        "config": {name: value for name, value in stored(config).items() if name not in older},
        **({CHANGES: changes} if (changes := _changes(config, found, data)) else {}),
        **task.state(),
    }


def _paths(config: TrainConfig, names: tuple[str, ...] = PINNED) -> dict[str, str]:
    """Where the data, the first weights and the other files that a run reads are, as far as they are on this disk."""
    values = flatten(config)
    ids = {name: is_dataset_id if name == "dataset" else is_model_id for name in names}
    there = {
        name: values[name] for name in names if values[name] and values[name] not in EMBEDDED and not shard_names.is_remote(values[name])
    }
    found = {name: value for name, value in there.items() if not ids[name](value)}
    return {name: absolute_path(value) for name, value in (found | {name: values[name] for name in FILES if values[name]}).items()}


def _changes(config: TrainConfig, found: Checkpoint | None, data: dict[str, Any]) -> list[Change]:
    """What --allow_change has changed so far: at this step also the files of the data, and names on the Hub with their commit."""
    if found is None:
        return []
    values, changes = stored(config), found.state.get(CHANGES, [])
    changes = [c | {"after": values[c["name"]]} if c["step"] == found.step and c["name"] in PINNED else c for c in changes]
    other = {"step": found.step, "name": DATA, "before": found.state["data"], "after": data}
    return changes if data == found.state["data"] or other in changes else [*changes, other]


def _some_weights(objective: Objective) -> dict[str, float]:
    """Loss weights at a few timesteps, to six digits, so that rounding on other hardware does not matter."""
    weights, T = objective.weights, len(objective.schedule)
    if weights is None:
        return {}
    some = {f"weight at t = {t}": weights[t] for t in (0, T // 4, T // 2, 3 * T // 4, T - 1)} | {"mean weight": weights.mean()}
    return {name: float(f"{value:.6g}") for name, value in some.items()}


def require_same_training(found: Checkpoint, now: dict[str, Any], config: TrainConfig) -> None:
    """Refuses another network or weighting behind the same names, and says what else is not as it was."""
    optim, where = config.optimization, f"run directory {config.run.output_dir}"
    # The file behind --model_config may have changed, though its name has not.
    allowed = {name: value for name, value in now["network"].items() if name in found.changing}  # the dropout rate
    raise_all(differences(found.state["network"] | allowed, now["network"]), f"{where} holds another network")
    if found.state.get("frozen_parts") != now.get("frozen_parts"):  # pixel models have none
        parts = "UNet, text encoders" if config.lora.lora_rank else "text encoders"
        raise InputError(
            f"{where} was trained with other files of {parts}, tokenizers or VAE than those of base_model {config.text.base_model} now; "
            f"put them back, or name another --output_dir"
        )
    if not found.changing & state_dicts.OBJECTIVE:
        # A function that was registered may have changed, though its name has not.
        other = differences(found.state.get("weights", now["weights"]), now["weights"])
        raise_all(other, f"{where} holds another weighting", "put it back, or name another --output_dir")
    device.say_what_changed(found.state, now)
    if (before := found.state["config"]["max_steps"]) != optim.max_steps and optim.lr_schedule != "constant":
        say(f"warning: max_steps was {before}, now it is {optim.max_steps}: the learning rate falls to 0 there")
