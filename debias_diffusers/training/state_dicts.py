"""The tensors of a training, out of their objects and back: network, optimizer, averages.

Gathered with torch.distributed.checkpoint, which gives the same names and shapes for one process, DDP and sharded models.
"""

from __future__ import annotations

import contextlib
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
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict, set_model_state_dict
from torch.optim import Optimizer

from ..config.schema.objective import NoiseConfig, ObjectiveConfig
from ..diffusion.timestep_samplers import TimestepSampler
from ..diffusion.uncertainty import NAME as UNCERTAINTY_MODULE
from ..diffusion.uncertainty import Uncertainty
from ..runs.checkpoints import MODEL, OPTIMIZER, SAMPLER, UNCERTAINTY, Checkpoint, ema_file, weights_file
from ..runs.ema_snapshots import power_file
from ..runs.run_directory import DATA
from ..utils.sharding import gathered, load_shards, local, part_like, saved_tensors, whole
from .ema import EMA
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
    skipped_images: int = 0  # samples so far whose image could not be read and was replaced
    trained_alone: bool = False  # is saved: the weights that are not trained are those of another model
    uncertainty: Uncertainty | None = None  # that is learned, a submodule of the model

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
    # With the weights that are not trained, which have no average: each file is a whole network, unless they are not saved.
    ema = state.optimizer_step.ema
    averages = {ema_file(rate): {**weights, **gathered(average)} for rate, average in ema.averages.items()}
    averages |= {power_file(sigma): {**weights, **gathered(average)} for sigma, average in ema.power_averages.items()}
    return {
        **_with_uncertainty_apart({MODEL: weights, **averages}),
        OPTIMIZER: _named(moments),
        **({SAMPLER: state.timestep_sampler.state()} if state.timestep_sampler.learns else {}),
    }


def _with_uncertainty_apart(networks: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """The files of networks, whose tensors of a learned uncertainty are a file of their own, by FILE/NAME."""
    found: dict[str, dict[str, Tensor]] = {file: {} for file in networks}
    for file, tensors in networks.items():
        for name, tensor in tensors.items():
            if name.startswith(f"{UNCERTAINTY_MODULE}."):
                found.setdefault(UNCERTAINTY, {})[f"{Path(file).stem}/{name}"] = tensor
            else:
                found[file][name] = tensor
    return found


def _load_network(found: Checkpoint, file: str) -> dict[str, Tensor]:
    """The tensors of a network in a checkpoint, with those that `_with_uncertainty_apart` took away."""
    tensors: dict[str, Tensor] = safetensors.torch.load_file(found.verified(file))
    if (found.path / UNCERTAINTY).is_file():
        start = f"{Path(file).stem}/"
        apart = safetensors.torch.load_file(found.verified(UNCERTAINTY)).items()
        tensors |= {name.removeprefix(start): tensor for name, tensor in apart if name.startswith(start)}
    return tensors


def _weights(state: TrainingState) -> dict[str, Any]:
    """The weights that are saved as they are in this process: the parameters themselves, or its part of them."""
    return get_model_state_dict(state.model, options=StateDictOptions(ignore_frozen_params=state.trained_alone))


def shards(state: TrainingState) -> dict[str, Tensor]:
    """What this process has of all tensors, as `write_shards` takes them."""
    step = state.optimizer_step
    parts: dict[str, Mapping[str, Any]] = {
        MODEL: _weights(state),
        **{ema_file(rate): average for rate, average in step.ema.averages.items()},
        OPTIMIZER: {f"{name}/{key}": v for name, p in step.ema.weights.items() for key, v in step.optimizer.state.get(p, {}).items()},
    }
    return {f"{Path(file).stem}/{name}": value for file, values in parts.items() for name, value in values.items()}


def exported(state: TrainingState, rate: float) -> dict[str, Mapping[str, Tensor]]:
    """The weights that are exported and what `shards` leaves out, by file name; weights whole in the first process."""
    weights: dict[str, Any] = {**_weights(state), **state.optimizer_step.ema.of(rate)}
    learned = {SAMPLER: state.timestep_sampler.state()} if state.timestep_sampler.learns else {}
    return {weights_file(rate): gathered(weights), **learned}


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

    What `gather` takes from an accelerator is a copy already, except the averages, which may be in main memory themselves.
    """

    def copy_of(value: Tensor, file: str) -> Tensor:
        again = device.type == "cpu" or file not in (MODEL, OPTIMIZER)
        return value.detach().to("cpu", memory_format=torch.contiguous_format, copy=again)

    return {file: {name: copy_of(value, file) for name, value in values.items()} for file, values in tensors.items()}


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


def without_memory(network: nn.Module) -> dict[str, Tensor]:
    """Tensors of the meta device in place of the parameters, whole if they are sharded."""
    return {name: torch.empty(weight.shape, device="meta") for name, weight in network.named_parameters()}


def evaluated(
    bare: nn.Module, network: nn.Module, ema: EMA, rate: float, device: torch.device
) -> tuple[nn.Module, Callable[[], contextlib.AbstractContextManager[None]]]:
    """The network with the averaged weights of a rate, in float32 on the device, and a context within which it has them.

    Where they are like that anyway they are shared, which takes neither memory nor time. Else (weights in bf16 that have no average,
    averages in main memory, shards) the context makes copies and drops them at its end; all processes must enter it. Linear layers that
    are not trained, in bf16, are shared, too, and copied when they are called: they are most of the network beside adapters.

    Args:
        bare: the modules of `network` as of `with_weights`, without what wraps its `forward`.
    """

    def weights() -> dict[str, Tensor]:
        return {**dict(network.named_parameters()), **ema.of(rate)}

    def ready(weight: Tensor) -> bool:
        return weight.dtype == torch.float32 and weight.device.type == device.type and local(weight) is weight

    if all(ready(weight) for weight in weights().values()):
        return with_weights(bare, ema.of(rate)), contextlib.nullcontext
    empty = without_memory(network)
    module = with_weights(bare, empty)
    frozen = {
        name
        for name, weight in network.named_parameters()
        if not weight.requires_grad and weight.device.type == device.type and local(weight) is weight
    }
    shared = set[str]()
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and f"{name}.weight" in frozen:
            layer.forward = partial(_in_float32, layer)  # type: ignore[method-assign]
            shared |= {f"{name}.weight", f"{name}.bias"}

    @contextlib.contextmanager
    def present() -> Iterator[None]:
        copies = {
            name: weight.detach() if name in shared else whole(weight.detach()).to(device, torch.float32)
            for name, weight in weights().items()
        }
        module.load_state_dict(copies, strict=False, assign=True)
        try:
            yield
        finally:
            module.load_state_dict(empty, strict=False, assign=True)

    return module, present


def _in_float32(layer: nn.Linear, values: Tensor) -> Tensor:
    """What a linear layer whose weights are in half precision would give if they were in float32."""
    return nn.functional.linear(values, layer.weight.float(), None if layer.bias is None else layer.bias.float())


def size(tensors: Mapping[str, Mapping[str, Tensor]]) -> int:
    """Bytes that a save needs: the tensors of the checkpoint, and the weights once more for the exported model."""
    return sum(value.nbytes for values in (*tensors.values(), tensors.get(MODEL, {})) for value in values.values())


@torch.no_grad()
def restore(found: Checkpoint, state: TrainingState, process: int, processes: int) -> None:
    """Puts everything back in this process of so many, as it was after the checkpoint's step.

    Names and shapes are those of the same configuration.

    Where --allow_change changes something at this step: an EMA rate that the checkpoint does not have starts from the average whose
    rate is nearest; losses under another objective, by which `loss_second_moment` draws and of which a line of metrics has the means,
    are forgotten; and no metric against other data is the best.
    """
    ema = state.optimizer_step.ema
    nearest = {rate: min(found.ema_rates or [0.0], key=lambda saved: abs(math.log1p(-saved) - math.log1p(-rate))) for rate in ema.averages}
    if found.shards:
        _restore_shards(found, state, nearest)
    else:
        _restore_optimizer(found, state.optimizer_step)
        weights: dict[str, Any] = _load_network(found, MODEL)
        set_model_state_dict(state.model, weights, options=state.options)
        for rate, saved in nearest.items():
            ema.load(rate, _load_network(found, weights_file(saved)))
        for sigma in ema.power_averages:
            ema.load_power(sigma, _load_network(found, power_file(sigma)))
    if not found.changing & OBJECTIVE:
        if state.timestep_sampler.learns:
            state.timestep_sampler.load(safetensors.torch.load_file(found.verified(SAMPLER)))
        state.statistics.load(found.state["window"], process, processes)
    best = None if found.changing & {"dataset", DATA} else found.state.get("best")
    state.measured.best, state.measured.last = best, found.state.get("measured")


def _restore_shards(found: Checkpoint, state: TrainingState, nearest: Mapping[float, float]) -> None:
    """Reads the tensors of a checkpoint in shards in place; `nearest` is the saved rate of each average."""
    for name in found.shards:
        found.verified(name)
    optimizer, ema = state.optimizer_step.optimizer, state.optimizer_step.ema
    load_shards(_weights(state), found.path, Path(MODEL).stem)
    for rate, saved in nearest.items():
        load_shards(ema.averages[rate], found.path, Path(weights_file(saved)).stem)
    part, moments = Path(OPTIMIZER).stem, dict[str, Any]()
    for key, value in saved_tensors(found.path, part).items():
        parameter_name, name = key.split("/")
        parameter = ema.weights[parameter_name]
        moments[key] = _state_value(optimizer, parameter, name, torch.empty_like(value, device="cpu"))
        optimizer.state[parameter][name] = moments[key]
    load_shards(moments, found.path, part)


def _restore_optimizer(found: Checkpoint, optimizer_step: OptimizerStep) -> None:
    """Puts the state back into the optimizer itself, whose own `load_state_dict` would round it to the dtype of the weights.

    Learning rate, decay and the like come from the configuration.
    """
    optimizer, parameters = optimizer_step.optimizer, optimizer_step.ema.weights
    for key, value in safetensors.torch.load_file(found.verified(OPTIMIZER)).items():
        parameter_name, *_, name = key.split("/")
        parameter = parameters[parameter_name]
        optimizer.state[parameter][name] = _state_value(optimizer, parameter, name, value)


def _state_value(optimizer: Optimizer, parameter: Tensor, name: str, value: Tensor) -> Tensor | int:
    """A value of an optimizer's state as the optimizer keeps it; `value` is in the mapped file."""
    if value.dtype == torch.int64:  # the step of bitsandbytes, as `_named` has it
        return int(value)
    if name == "step" and not isinstance(optimizer, torch.optim.AdamW):
        return value.clone()
    if isinstance(optimizer, torch.optim.Adafactor) or value.shape != parameter.shape:  # whole in each process
        return value.to(parameter.device, copy=True)
    if local(parameter) is not parameter:
        return part_like(value, parameter)
    # The fused optimizer walks through memory as it lies, so moments must lie there as their weights do (channels last or not).
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
