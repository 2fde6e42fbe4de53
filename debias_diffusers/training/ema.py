"""Exponential moving averages (EMA) of the weights, at constant rates, which a warm-up limits at first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..utils.sharding import local, part_like


class EMA:
    """For each rate r and each weight w: average <- r average + (1 - r) w, after every step, beginning with w itself.

    With a warm-up r is at most (1 + n) / (10 + n) in the update after n others (as in TensorFlow's ExponentialMovingAverage): the
    initial weights are forgotten within some hundred steps, whatever the rate. A function of the step, so that nothing is saved.

    At the rate 0 the average is the weights themselves, which takes neither memory nor time.
    """

    def __init__(self, weights: Mapping[str, Tensor], rates: Iterable[float], warmup: bool = False, on_cpu: bool = False) -> None:
        """`weights` are the trained parameters by name; they are read again at each update. `on_cpu`: averages are in main memory."""
        self.warmup = warmup
        self.weights = dict(weights)  # not detached: DistributedDataParallel may give a parameter other storage
        # In float32 whatever the weights are: in bf16 an average at 0.9999 would never move.
        self.averages = {rate: {name: _float32_copy(w, on_cpu) for name, w in weights.items()} for rate in rates if rate}

    def of(self, rate: float) -> Mapping[str, Tensor]:
        """The averages at a rate; {} at the rate 0, of weights that are as they are."""
        return self.averages[rate] if rate else {}

    @torch.no_grad()
    def update(self, step: int = 0) -> None:
        """`step`: the number of updates before this one."""
        weights = [local(weight) for weight in self.weights.values()]
        for rate, average in self.averages.items():
            if self.warmup:
                rate = min(rate, (1 + step) / (10 + step))
            tensors = [local(tensor) for tensor in average.values()]
            if all(w.dtype == tensor.dtype and w.device == tensor.device for tensor, w in zip(tensors, weights)):
                torch._foreach_lerp_(tensors, weights, 1 - rate)
            else:  # one after the other: a copy of all weights would take as much memory as the average
                for tensor, w in zip(tensors, weights):
                    tensor.lerp_(w.to(tensor.device).float(), 1 - rate)

    def checksums(self) -> dict[float, list[int]]:
        """Of the bits of each average by rate, to see whether it moved; waits for the device."""
        return {
            rate: torch.stack([local(tensor).view(torch.int32).sum() for tensor in average.values()]).tolist()
            for rate, average in self.averages.items()
        }

    @torch.no_grad()
    def load(self, rate: float, average: Mapping[str, Tensor]) -> None:
        """Puts back an average that was saved; names and shapes must be those of the weights."""
        for name, tensor in self.averages[rate].items():
            tensor.copy_(part_like(average[name], tensor))


def _float32_copy(weight: Tensor, on_cpu: bool) -> Tensor:
    return weight.detach().to("cpu" if on_cpu else weight.device, torch.float32, copy=True)
