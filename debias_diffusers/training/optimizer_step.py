"""The update of a step: clipping, the optimizer and averages, made only where loss and gradient are finite.

With AdamW all of it is on the device and nothing here waits: whether a step was made is decided there, and read later. The other
optimizers cannot be told on the device, so for them the gate is read first. (torch's Adafactor waits anyway, twice for each tensor.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..config.schema.training import OptimizationConfig
from ..config.schema.types import OptimizerName
from ..errors import InputError, reason
from ..utils import seeding
from ..utils.sharding import local, part_like, whole
from .ema import EMA

P = TypeVar("P", bound=Tensor)

# Of Adafactor. The first is a floor of 1e-30 on the second moment, as in the paper (arXiv 1804.04235). torch's default, the epsilon of
# float32, is above the mean square of most gradients, which would then no more be divided by their average over the steps. The second
# is a floor on the RMS of a tensor, by which the learning rate is multiplied: 1 leaves it as it is unless its RMS is above 1.
ADAFACTOR_EPS = (1e-15, 1.0)

VALUES_AT_ONCE = 1 << 24  # of weights in bf16 that are in float32 at the same time, as far as whole tensors allow

SKIPPED_IN_A_ROW = "skipped_in_a_row"  # in state.json: steps of fp16 before it that were not made

_8BIT_BLOCK, _8BIT_LEAST = 256, 4096  # of bitsandbytes: values that share a scale, and of the smallest tensor with 8-bit moments


def make_optimizer(parameters: Sequence[nn.Parameter], config: OptimizationConfig) -> torch.optim.Optimizer:
    """The optimizer of a configuration."""
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "adafactor":
        return torch.optim.Adafactor(parameters, lr=rate, eps=ADAFACTOR_EPS, weight_decay=decay)
    if config.optimizer == "adamw8bit":
        import bitsandbytes

        optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(parameters, lr=rate, weight_decay=decay)
        return optimizer
    # Fused, because of all kinds it alone asks `found_inf` on the device.
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=True)


def require_optimizer(config: OptimizationConfig, device: torch.device) -> None:
    """Tries the kernels of bitsandbytes on a device, where they are asked for.

    Raises:
        InputError: they do not run.
    """
    if config.optimizer != "adamw8bit":
        return
    try:
        parameter = nn.Parameter(torch.zeros(_8BIT_LEAST, device=device))
        parameter.grad = torch.ones_like(parameter)
        make_optimizer([parameter], config).step()
    except (ImportError, RuntimeError, OSError, AttributeError, NotImplementedError) as error:
        raise InputError(
            f"optimizer is adamw8bit, but the 8-bit kernels of bitsandbytes do not run on this {device.type}: {reason(error)}; "
            f"take --optimizer adamw or adafactor"
        ) from error


def state_bytes(optimizer: OptimizerName, parameters: Iterable[Tensor]) -> int:
    """Bytes of an optimizer's state for these parameters, in memory and in a checkpoint."""
    return sum(_state_bytes(optimizer, parameter) for parameter in parameters)


def _state_bytes(optimizer: OptimizerName, parameter: Tensor) -> int:
    values = parameter.numel()
    if optimizer == "adafactor":  # factored over the last two axes: of a convolution those of its kernel
        return 4 * (values // parameter.shape[-1] + values // parameter.shape[-2] if parameter.ndim > 1 else values)
    if optimizer == "adamw8bit" and values >= _8BIT_LEAST:
        return 2 * (values + 4 * -(-values // _8BIT_BLOCK))
    return 8 * values


def temporary_bytes(config: OptimizationConfig, parameters: Sequence[Tensor]) -> int:
    """Bytes that a step of the optimizer takes at most beside weights, gradients and state."""
    largest = max(parameter.numel() for parameter in parameters)
    of_optimizer = 12 * largest if config.optimizer == "adafactor" else 0  # variance, update and its square, one tensor at a time
    if config.param_dtype == "float32":
        return of_optimizer
    # Weights and gradients in float32, and the draws of one tensor, which is then rounded.
    return of_optimizer + 6 * largest + 8 * max(sum(parameter.numel() for parameter in part) for part in _parts(parameters))


def total_norm(grads: list[Tensor]) -> Tensor:
    """The norm () of all gradients together, float32, also of those whose shards all processes have together."""
    if all(grad.dtype == torch.float32 for grad in grads):
        return whole(torch.nn.utils.get_total_norm(grads))
    norm: Tensor = torch.linalg.vector_norm(torch.stack([whole(torch.linalg.vector_norm(grad, dtype=torch.float32)) for grad in grads]))
    return norm


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """bf16 tensor of float32 `values`: each is rounded up or down to a neighbour, so that the mean over many draws is the value itself.

    To the nearest, an update below half the distance of neighbours (2^-9 of the weight) would be lost. Values of bf16 stay as they are.
    Each value takes its draw by its index, whatever the memory format. Overwrites `values`.
    """
    bits = values.view(torch.int32)
    bits += torch.randint(1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    bits &= -(1 << 16)  # the upper 16 bits of a float32 are the bf16 towards zero
    return values.bfloat16()


class OptimizerStep:
    """An optimizer with a gate: what is not finite reaches neither weights nor moments.

    A step that ends the run closes the gate for good, because more steps may be launched before anybody has read that it did.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], ema: EMA, config: OptimizationConfig, skips: int = 0) -> None:
        """`skips`: how many steps in a row may have a gradient that is not finite without an end of the run."""
        self.parameters, self.ema, self.max_grad_norm, self.most_skips = parameters, ema, config.max_grad_norm, skips
        self.seed = config.seed
        self.optimizer = make_optimizer(parameters, config)
        device = parameters[0].device
        self.skips = torch.zeros((), dtype=torch.int32, device=device)  # steps in a row that were not made
        self.aborted = torch.zeros((), dtype=torch.bool, device=device)

    @torch.no_grad()
    def __call__(self, loss: Tensor, learning_rate: float, step: int) -> tuple[Tensor, Tensor]:
        """Makes the step that the parameters' gradients stand for, and forgets them.

        Args:
            loss: () over all processes; a step whose loss is not finite ends the run.
            learning_rate: of this step.
            step: the number of steps before this one, whether they were made or not.

        Returns:
            The norm () of the gradient before it is clipped, and whether () it was.
        """
        grads = [p.grad for p in self.parameters if p.grad is not None]
        grad_norm = total_norm(grads)
        finite = loss.isfinite() & grad_norm.isfinite()
        self.skips = torch.where(finite, 0, self.skips + 1)
        self.aborted = self.aborted | ~loss.isfinite() | (self.skips > self.most_skips)
        clipped = finite & (grad_norm > self.max_grad_norm) if self.max_grad_norm else torch.zeros_like(finite)
        divisor = (grad_norm / self.max_grad_norm).clamp(min=1) if self.max_grad_norm else None
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self._step(self.aborted | ~finite, divisor, grads, step)
        self.optimizer.zero_grad()
        self.ema.update(step)  # of a step that was not made, towards the weights as they stayed
        return grad_norm, clipped

    def _step(self, closed: Tensor, divisor: Tensor | None, grads: list[Tensor], step: int) -> None:
        """The optimizer's step with the gradients divided by `divisor` (), unless the gate is `closed` ()."""
        if isinstance(self.optimizer, torch.optim.AdamW):
            self.optimizer.found_inf = closed.float()  # type: ignore[attr-defined]
            if divisor is not None:
                self.optimizer.grad_scale = divisor  # type: ignore[attr-defined]
            self._optimize(step)
        elif not closed:
            if divisor is not None:
                torch._foreach_div_([local(grad) for grad in grads], divisor)
            self._optimize(step)

    def _optimize(self, step: int) -> None:
        """The optimizer's step, if need be with copies of some tensors at a time in place of the weights.

        They are in float32 where the weights are in bf16, to which they are then rounded stochastically; the draws are a function of
        (seed, step), so that they are the same after a resume and in all processes. They are whole where Adafactor trains shards, whose
        rows and columns it averages over: each process then makes the same step and keeps its part of the result.
        """
        sharded, rounded = local(self.parameters[0]) is not self.parameters[0], self.parameters[0].dtype != torch.float32
        gathered = sharded and isinstance(self.optimizer, torch.optim.Adafactor)
        if not rounded and not gathered:
            self.optimizer.step()
            return
        # Each process draws for its own shards; all draw the same for tensors of which each has all.
        purpose = f"rounding of process {torch.distributed.get_rank()}" if sharded and not gathered else "rounding"
        draws = seeding.generator(self.seed, purpose, step, self.parameters[0].device)
        (group,), state = self.optimizer.param_groups, self.optimizer.state
        for part in _parts(self.parameters):
            copies = [nn.Parameter((whole(parameter) if gathered else parameter).float()) for parameter in part]
            for parameter, copy in zip(part, copies):
                grad = parameter.grad
                copy.grad = None if grad is None else (whole(grad) if gathered else grad).float()
                _move(state, parameter, copy)
            group["params"] = copies
            self.optimizer.step()
            for parameter, copy in zip(part, copies):
                _move(state, copy, parameter)
                values = round_stochastically(local(copy.detach()), draws) if rounded else copy.detach()
                local(parameter).copy_(local(part_like(values, parameter)) if gathered else values)
        group["params"] = list(self.parameters)


def _parts(parameters: Sequence[P]) -> Iterator[list[P]]:
    """The parameters in their order, in lists of up to `VALUES_AT_ONCE` values, or of one tensor."""
    part, values = list[P](), 0
    for parameter in parameters:
        if part and values + parameter.numel() > VALUES_AT_ONCE:
            yield part
            part, values = [], 0
        part.append(parameter)
        values += parameter.numel()
    yield part


def _move(state: MutableMapping[Tensor, Any], parameter: Tensor, to: Tensor) -> None:
    """Makes an optimizer's state of one tensor, if there is any, that of another."""
    if parameter in state:
        state[to] = state.pop(parameter)
