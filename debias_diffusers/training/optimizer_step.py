"""The update of a step: clipping, AdamW and averages, all on the device, and made only where loss and gradient are finite.

Nothing here waits for the device. Whether a step was made is decided there, and read later.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..config.schema import OptimizationConfig
from .ema import EMA


class OptimizerStep:
    """AdamW with a gate: what is not finite reaches neither weights nor moments.

    A step that ends the run closes the gate for good, because more steps may be launched before anybody has read that it did.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], ema: EMA, config: OptimizationConfig, skips: int = 0) -> None:
        """`skips`: how many steps in a row may have a gradient that is not finite without an end of the run."""
        self.parameters, self.ema, self.max_grad_norm, self.most_skips = parameters, ema, config.max_grad_norm, skips
        # Fused, because of all kinds it alone asks `found_inf` on the device.
        self.adamw = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
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
        grad_norm = torch.nn.utils.get_total_norm(grads)
        finite = loss.isfinite() & grad_norm.isfinite()
        self.skips = torch.where(finite, 0, self.skips + 1)
        self.aborted = self.aborted | ~loss.isfinite() | (self.skips > self.most_skips)
        self.adamw.found_inf = (self.aborted | ~finite).float()  # type: ignore[attr-defined]
        clipped = finite & (grad_norm > self.max_grad_norm) if self.max_grad_norm else torch.zeros_like(finite)
        if self.max_grad_norm:
            self.adamw.grad_scale = (grad_norm / self.max_grad_norm).clamp(min=1)  # type: ignore[attr-defined]
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        self.adamw.zero_grad()
        self.ema.update(step)  # of a step that was not made, towards the weights as they stayed
        return grad_norm, clipped
