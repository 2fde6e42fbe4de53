"""The learned uncertainty of EDM2: a function u(t) that is trained with the network and balances the losses of all timesteps."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..utils.tensor_memory import sent

NAME = "uncertainty"  # of the submodule of a network that is trained with one
TERMS = 32
SCALE = 10.0  # at a learning rate of 1e-4 each step of Adam then moves each term of u by 1e-3


class Uncertainty(nn.Module):
    """u(t), by which a weighted loss L(t) becomes L(t) / e^u(t) + u(t) (EDM2, arXiv 2312.02696, equation 14).

    Its minimum is at e^u(t) = mean of L(t), so that all timesteps come to count the same, whatever the weighting and the prediction type.
    In the paper u is a layer on Fourier features of the noise level; here it is a cosine series over the timesteps. It begins with u = 0,
    which is the loss without it.
    """

    def __init__(self, T: int) -> None:
        super().__init__()
        self.T = T
        self.coefficients = nn.Parameter(torch.zeros(TERMS))

    def forward(self, t: Tensor) -> Tensor:
        """(B,) u of timesteps (B,) int64, float32 on the device of the coefficients."""
        angles = math.pi * (t + 0.5) / self.T * torch.arange(TERMS).unsqueeze(1)  # (TERMS, B)
        features = SCALE * sent(angles.cos().float(), self.coefficients.device)
        return (self.coefficients.float().unsqueeze(1) * features).sum(0)
