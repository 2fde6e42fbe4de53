"""How t is drawn, as a map of uniform numbers: the data give each sample its u(seed, position)."""

import torch
from torch import Tensor


def uniform(u: Tensor, num_train_timesteps: int) -> Tensor:
    """Every t equally often. `u` (B,) float64 in [0, 1); returns (B,) int64 in [0, T)."""
    # u T may round up to T where u is the last double below 1.
    return (u * num_train_timesteps).to(torch.int64).clamp(max=num_train_timesteps - 1)
