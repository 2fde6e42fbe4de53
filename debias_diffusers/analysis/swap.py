"""Two networks in one: one predicts at the noisy timesteps, the other at the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.noise_schedule import at, predicted_x_0, prediction_of_x_0
from ..errors import InputError
from .denoising import Denoiser


def require_swappable(above: Denoiser, below: Denoiser, scheduler: str) -> None:
    """Raises InputError if two networks cannot be one, or not for this solver."""
    if len(above.schedule) != len(below.schedule) or not torch.allclose(above.schedule.snr, below.schedule.snr, rtol=1e-4):
        raise InputError("the two runs have different noise schedules, so that their networks cannot be swapped; leave --swap out")
    if scheduler == "ddpm" and above.network.config.out_channels != above.network.config.in_channels:
        raise InputError("swap does not sample a learned variance; take another --scheduler than ddpm")


class SwappedUNet(nn.Module):
    """The network of one model at timesteps from a threshold on, and that of another below it.

    Where the other predicts something else (noise, x_0, v), its prediction is converted to what the first predicts.
    """

    def __init__(self, above: Denoiser, below: Denoiser, threshold: int) -> None:
        """`threshold`: a timestep as the network is given it, from 0 (the first network alone) to after the last (the other alone)."""
        super().__init__()
        self.above, self.below, self.threshold = above, below, threshold
        self.unet, self.other = above.network, below.network
        self.config = above.network.config

    @property
    def device(self) -> torch.device:
        """Of the parameters, as a pipeline asks for it."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Likewise."""
        return next(self.parameters()).dtype

    @property
    def add_embedding(self) -> nn.Module:
        """Of Stable Diffusion XL, whose pipeline looks at its size."""
        embedding: nn.Module = self.unet.add_embedding
        return embedding

    def forward(self, x_t: Tensor, timestep: Any, *conditions: Any, **named: Any) -> tuple[Tensor]:
        """As of a UNet2DModel or UNet2DConditionModel without `return_dict`: (prediction (B, C, H, W),)."""
        C, level = x_t.shape[1], float(timestep)
        if level >= self.threshold:
            return (self.unet(x_t, timestep, *conditions, **named)[0][:, :C],)
        prediction = self.other(x_t, timestep, *conditions, **named)[0][:, :C]
        if self.below.prediction_type == self.above.prediction_type:
            return (prediction,)
        a, s = self._factors(level, x_t)
        x_0 = predicted_x_0(self.below.prediction_type, prediction, x_t, a, s)
        return (prediction_of_x_0(self.above.prediction_type, x_0, x_t, a, s),)

    def _factors(self, level: float, x_t: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of image and noise at a timestep."""
        schedule, kinds = self.above.schedule, (self.above.prediction_type, self.below.prediction_type)
        if "flow" in kinds:  # both are on the straight path, where a timestep is T times s
            s = x_t.new_tensor(level / len(schedule))
            return 1 - s, s
        if not level.is_integer():
            said = " and ".join(kinds)
            raise InputError(f"the runs predict {said}, and this scheduler has timesteps between those of the schedule; take ddim")
        t = torch.tensor([int(level)])
        return at(schedule.a, t, x_t), at(schedule.s, t, x_t)
