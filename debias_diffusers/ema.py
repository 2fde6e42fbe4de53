"""Exponential moving averages of the weights, at constant rates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


class EMA:
    """For each rate r and each weight w: average <- r average + (1 - r) w, after every step, beginning with w itself."""

    def __init__(self, weights: Mapping[str, Tensor], rates: Iterable[float]) -> None:
        """`weights` are the trained parameters by name; they are read again at each update."""
        self.weights = dict(weights)  # not detached: DistributedDataParallel may give a parameter other storage
        self.averages = {rate: {name: w.detach().clone() for name, w in weights.items()} for rate in rates}

    @torch.no_grad()
    def update(self) -> None:
        weights = list(self.weights.values())
        for rate, average in self.averages.items():
            torch._foreach_lerp_(list(average.values()), weights, 1 - rate)

    @torch.no_grad()
    def load(self, rate: float, average: Mapping[str, Tensor]) -> None:
        """Puts back an average that was saved; names and shapes must be those of the weights."""
        for name, tensor in self.averages[rate].items():
            tensor.copy_(average[name])
