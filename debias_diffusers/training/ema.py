"""Averages of the weights: exponential (EMA) at constant rates, which a warm-up limits at first, and by power functions of the step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..diffusion.power_ema import exponent, share_of_step
from ..errors import InputError
from ..utils.sharding import local, part_like


class EMA:
    """For each rate r and each weight w: average <- r average + (1 - r) w, after every step, beginning with w itself.

    With a warm-up r is at most (1 + n) / (10 + n) in the update after n others (as in TensorFlow's ExponentialMovingAverage): the
    initial weights are forgotten within some hundred steps, whatever the rate. A function of the step, so that nothing is saved.

    At the rate 0 the average is the weights themselves, which takes neither memory nor time.

    A power-function average (`diffusion.power_ema`) is told by its sigma_rel. Its rate at step t is (1 - 1/t)^(gamma + 1).
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        rates: Iterable[float],
        warmup: bool = False,
        on_cpu: bool = False,
        sigma_rels: Iterable[float] = (),
    ) -> None:
        """`weights` are the trained parameters by name; they are read again at each update. `on_cpu`: averages are in main memory.

        Raises:
            InputError: a rate is not at least 0 and below 1.
        """
        rates = tuple(rates)
        if wrong := [rate for rate in rates if not 0 <= rate < 1]:
            raise InputError(f"a rate of EMA is {wrong[0]}, but must be at least 0 and below 1, such as 0.9999")
        self.warmup = warmup
        self.weights = dict(weights)  # not detached: DistributedDataParallel may give a parameter other storage
        # In float32 whatever the weights are: in bf16 an average at 0.9999 would never move.
        self.averages = {rate: {name: _float32_copy(w, on_cpu) for name, w in weights.items()} for rate in rates if rate}
        self.power_averages = {sigma: {name: _float32_copy(w, on_cpu) for name, w in weights.items()} for sigma in sigma_rels}
        self._exponents = {sigma: exponent(sigma) for sigma in self.power_averages}

    def of(self, rate: float) -> Mapping[str, Tensor]:
        """The averages at a rate; {} at the rate 0, of weights that are as they are."""
        return self.averages[rate] if rate else {}

    @torch.no_grad()
    def update(self, step: int | None = None) -> None:
        """`step`: the number of updates before this one, on which a warm-up and power-function averages depend.

        Raises:
            InputError: it is left out where something depends on it.
        """
        if step is None and (self.warmup or self.power_averages):
            raise InputError("EMA with a warm-up or sigma_rels depends on the number of updates before each; call update(step)")
        step = step or 0
        weights = [local(weight) for weight in self.weights.values()]
        for rate, average in self.averages.items():
            if self.warmup:
                rate = min(rate, (1 + step) / (10 + step))
            _move_towards(weights, average, 1 - rate)
        for sigma, average in self.power_averages.items():
            _move_towards(weights, average, share_of_step(self._exponents[sigma], step + 1))

    def checksums(self) -> dict[float, list[int]]:
        """Of the bits of each average by rate, to see whether it moved; waits for the device."""
        return {
            rate: torch.stack([local(tensor).view(torch.int32).sum() for tensor in average.values()]).tolist()
            for rate, average in self.averages.items()
        }

    @torch.no_grad()
    def load(self, rate: float, average: Mapping[str, Tensor]) -> None:
        """Puts back an average that was saved; names and shapes must be those of the weights."""
        _load(self.averages[rate], average)

    @torch.no_grad()
    def load_power(self, sigma_rel: float, average: Mapping[str, Tensor]) -> None:
        """Puts back a power-function average, as `load` does."""
        _load(self.power_averages[sigma_rel], average)


def _move_towards(weights: list[Tensor], average: Mapping[str, Tensor], share: float) -> None:
    """average <- average + share (weights - average)."""
    tensors = [local(tensor) for tensor in average.values()]
    if all(w.dtype == tensor.dtype and w.device == tensor.device for tensor, w in zip(tensors, weights)):
        torch._foreach_lerp_(tensors, weights, share)
    else:  # one after the other: a copy of all weights would take as much memory as the average
        for tensor, w in zip(tensors, weights):
            tensor.lerp_(w.to(tensor.device).float(), share)


def _load(into: Mapping[str, Tensor], average: Mapping[str, Tensor]) -> None:
    for name, tensor in into.items():
        tensor.copy_(part_like(average[name], tensor))


def _float32_copy(weight: Tensor, on_cpu: bool) -> Tensor:
    return weight.detach().to("cpu" if on_cpu else weight.device, torch.float32, copy=True)
