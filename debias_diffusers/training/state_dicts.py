"""The tensors of a training, out of their objects and back: network, optimizer, averages.

Gathered with torch.distributed.checkpoint, which gives the same names and shapes for one process, DDP and sharded models.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from ..config.schema import NoiseConfig, ObjectiveConfig
from ..diffusion.timestep_samplers import TimestepSampler
from ..runs.checkpoints import MODEL, OPTIMIZER, SAMPLER, Checkpoint, ema_file, weights_file
from ..runs.run_directory import DATA
from .loss_statistics import LossStatistics
from .optimizer_step import OptimizerStep

OBJECTIVE = {part.name for kind in (ObjectiveConfig, NoiseConfig) for part in fields(kind)}  # what decides the losses

_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
_TRAINED = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)  # of the rest nothing is saved


@dataclass
class MetricHistory:
    """The metrics of a run so far, as its state.json has them."""

    best: dict[str, Any] | None = None  # step, value (negated where higher is better) and settings of the best
    last: dict[str, Any] | None = None  # step, settings and all metrics of the last


@dataclass
class TrainingState:
    """What a training changes, all of which is in a checkpoint."""

    model: nn.Module  # wrapped by accelerate
    optimizer_step: OptimizerStep  # with the optimizer and the averages
    timestep_sampler: TimestepSampler
    statistics: LossStatistics
    measured: MetricHistory = field(default_factory=MetricHistory)
    trained_alone: bool = False  # is saved: the weights that are not trained are those of another model

    @property
    def options(self) -> StateDictOptions:
        """Which weights are gathered and put back."""
        return _TRAINED if self.trained_alone else _FULL


def gather(state: TrainingState) -> dict[str, Mapping[str, Tensor]]:
    """Tensors by file name, whole in the first process. Every process must call it, after a step of the optimizer.

    Before the first step that the optimizer makes, it has no state; get_optimizer_state_dict would make an empty step and change the
    training.
    """
    weights: Any = get_model_state_dict(state.model, options=state.options)
    optimizer = state.optimizer_step.optimizer
    moments: Any = get_optimizer_state_dict(state.model, optimizer, options=_FULL).get("state", {}) if optimizer.state else {}
    averages = state.optimizer_step.ema.averages
    return {
        MODEL: weights,
        # With the weights that are not trained, which have no average: each file is a whole network, unless they are not saved.
        **{ema_file(rate): {**weights, **average} for rate, average in averages.items()},
        OPTIMIZER: _named(moments),
        **({SAMPLER: state.timestep_sampler.state()} if state.timestep_sampler.learns else {}),
    }


def _named(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state of an optimizer as tensors by PARAMETER/NAME, or PARAMETER/.../NAME where its values are nested.

    bitsandbytes counts steps in a number, nests its 8-bit tensors, and shares tables among parameters, which safetensors refuses.
    """
    found = {}
    for name, value in state.items():
        if isinstance(value, dict):
            found.update({f"{name}/{inner}": tensor for inner, tensor in _named(value).items()})
        else:
            found[name] = value.clone() if name.startswith("qmap") else torch.as_tensor(value)
    return found


def copied(tensors: Mapping[str, Mapping[str, Tensor]], device: torch.device) -> dict[str, Mapping[str, Tensor]]:
    """The tensors on the CPU in memory of their own, which a training on `device` does not change.

    What `gather` takes from an accelerator is a copy already, except the averages, which are on it.
    """
    again = device.type == "cpu"
    return {
        file: {name: value.detach().to("cpu", memory_format=torch.contiguous_format, copy=again) for name, value in values.items()}
        for file, values in tensors.items()
    }


def writers(tensors: Mapping[str, Mapping[str, Tensor]]) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """File names, and what writes each, tensor by tensor."""
    for name, values in tensors.items():
        yield name, partial(_write, values)


def _write(values: Mapping[str, Tensor], path: Path) -> None:
    safetensors.torch.save_file({name: value.detach().cpu().contiguous() for name, value in values.items()}, path)


def with_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A network of the same modules, in evaluation mode, whose parameters are these tensors themselves; the others it shares.

    Neither takes memory. To be made before anything wraps the network's `forward`, or of a network that nothing wraps.
    """
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    other = copy.deepcopy(network, shared)
    unknown = other.load_state_dict(weights, strict=False, assign=True).unexpected_keys
    assert not unknown, unknown
    return other.eval()


def size(tensors: Mapping[str, Mapping[str, Tensor]]) -> int:
    """Bytes that a save needs: the tensors of the checkpoint, and the weights once more for the exported model."""
    return sum(value.nbytes for values in (*tensors.values(), tensors[MODEL]) for value in values.values())


@torch.no_grad()
def restore(found: Checkpoint, state: TrainingState, is_main_process: bool) -> None:
    """Puts everything back as it was after the checkpoint's step. Names and shapes are those of the same configuration.

    Where --allow_change changes something at this step: an EMA rate that the checkpoint does not have starts from the average whose
    rate is nearest; losses under another objective, by which `loss_second_moment` draws and of which a line of metrics has the means,
    are forgotten; and no metric against other data is the best.
    """
    _restore_optimizer(found, state.model, state.optimizer_step.optimizer)  # first: setting its state makes an empty step
    weights: dict[str, Any] = safetensors.torch.load_file(found.verified(MODEL))
    set_model_state_dict(state.model, weights, options=state.options)
    ema = state.optimizer_step.ema
    for rate in ema.averages:
        nearest = min(found.ema_rates or [0.0], key=lambda saved: abs(math.log1p(-saved) - math.log1p(-rate)))
        ema.load(rate, safetensors.torch.load_file(found.verified(weights_file(nearest))))
    if not found.changing & OBJECTIVE:
        if state.timestep_sampler.learns:
            state.timestep_sampler.load(safetensors.torch.load_file(found.verified(SAMPLER)))
        state.statistics.load(found.state["window"], is_main_process)
    best = None if found.changing & {"dataset", DATA} else found.state.get("best")
    state.measured.best, state.measured.last = best, found.state.get("measured")


def _restore_optimizer(found: Checkpoint, model: nn.Module, optimizer: Optimizer) -> None:
    state: dict[str, Any] = {}
    for key, value in safetensors.torch.load_file(found.verified(OPTIMIZER)).items():
        parameter, *outer, name = key.split("/")
        values = state.setdefault(parameter, {})
        for part in outer:
            values = values.setdefault(part, {})
        # The optimizer keeps it; the loaded one is in the mapped file. A whole number is the step of bitsandbytes, as `_named` has it.
        values[name] = value.item() if value.dtype == torch.int64 else value.clone()
    if not state:
        return
    # Learning rate, decay and the like come from the configuration, so only the tensors are kept.
    hyper = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    groups = [{**hyper, "params": list(state)}]
    set_optimizer_state_dict(model, optimizer, {"state": state, "param_groups": groups}, options=_FULL)
    _lay_like_the_weights(optimizer)


def _lay_like_the_weights(optimizer: Optimizer) -> None:
    """The fused optimizer walks through memory as it lies, so moments must lie there as their weights do (channels last or not)."""
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
