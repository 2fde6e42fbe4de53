"""Statistics since the last line of metrics: losses by timestep, weights, clipping.

Sums stay on the device until a line is written, so no step waits for them. They are part of the checkpoint: a run that is resumed
between two lines writes the same line.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import Tensor

from ..diffusion.loss import Terms
from ..diffusion.noise_schedule import at
from ..utils.tensor_memory import sent

BINS = 10  # equal ranges of the timesteps 0 .. T-1

Gather = Callable[[Tensor], Tensor]  # (1, ...) of this process -> (num_processes, ...) of all


class LossStatistics:
    """Sums over the samples and steps since the last line."""

    def __init__(self, T: int, device: Any) -> None:
        self.T = T
        # For each bin: samples, their losses, mean squares, terms of the bound, weights, and squares of the weights.
        self.sums = torch.zeros(6, BINS, device=device)
        self.steps, self.clipped = 0, torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, t: Tensor, terms: Terms, weights: Tensor) -> None:
        """Adds a micro-batch: timesteps (B,) int64 on the CPU, their terms (B,), and the loss weights (T,) of all timesteps."""
        w = at(weights, t, terms.loss) * (1 if terms.precision is None else terms.precision)
        bound = torch.zeros_like(w) if terms.bound is None else terms.bound
        rows = torch.stack([torch.ones_like(w), terms.loss, terms.mse, bound, w, w.square()]).float()
        self.sums.index_add_(1, sent(t * BINS // self.T, rows.device), rows)

    def step(self, clipped: Tensor) -> None:
        """Counts an optimizer step; `clipped` (): whether its gradient was."""
        self.steps += 1
        self.clipped += clipped

    def copy(self) -> LossStatistics:
        """The sums as they are now."""
        copied = copy(self)
        copied.sums, copied.clipped = self.sums.clone(), self.clipped.clone()
        return copied

    def reset(self, gather: Gather) -> dict[str, Any]:
        """The `values` of a line, after which all sums are 0."""
        values = self.values(gather)
        self.sums.zero_()
        self.clipped.zero_()
        self.steps = 0
        return values

    def values(self, gather: Gather) -> dict[str, Any]:
        """The values of a line, over all processes, which all must call it.

        Returns:
            `loss_by_t`, `mse_by_t`, `bound_by_t`: the mean weighted loss, mean square error, and term of the variational bound of
            each tenth of the timesteps, None where none was drawn; `effective_sample_size` of the weights that were
            drawn; `clip_rate`, the share of steps whose gradient was clipped.
        """
        samples, losses, squares, bounds, weights, squared_weights = gather(self.sums[None]).sum(0).tolist()

        def means(sums: list[float]) -> list[float | None]:
            return [total / n if n else None for total, n in zip(sums, samples)]

        return {
            "loss_by_t": means(losses),
            "mse_by_t": means(squares),
            **({"bound_by_t": means(bounds)} if any(bounds) else {}),
            "effective_sample_size": sum(weights) ** 2 / (sum(samples) * sum(squared_weights) or 1),
            "clip_rate": self.clipped.item() / max(1, self.steps),
        }

    def state(self, gather: Gather) -> dict[str, Any]:
        """What a checkpoint must hold, over all processes, which all must call it.

        The sums of each, and not their total: a resume goes on adding in the same order, and its next line has the same bits.
        """
        return {"sums": gather(self.sums[None]).tolist(), "steps": self.steps, "clipped": int(self.clipped.item())}

    def load(self, state: dict[str, Any], process: int, processes: int) -> None:
        """Puts back a `state`; the first process has the sums of all where they were others."""
        sums = torch.tensor(state["sums"])
        if sums.ndim == 2:  # of older versions, which saved the total
            sums = sums[None]
        if len(sums) != processes:
            sums = torch.stack([sums.sum(0), *[torch.zeros_like(sums[0])] * (processes - 1)])
        self.sums.copy_(sums[process])
        self.steps = state["steps"]
        self.clipped.fill_(state["clipped"])
