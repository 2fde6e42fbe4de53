"""Modules of a network in a form from which torch.compile makes fast kernels for convolutions in channels_last (docs/scaling.md)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn


def compile_channels_last(network: nn.Module, mode: str = "default") -> None:
    """Compiles a network in place, whose convolutions lie in channels_last on a GPU.

    Group norms and nearest upsampling get forms of their own before: the compiler lays the input of a group norm out anew, and
    adds the gradients of upsampling up by atomic operations. Together that is a third of a compiled step on an H200. Names and
    values of weights stay as they are; results differ by rounding.
    """
    for module in network.modules():
        if type(module) is nn.GroupNorm and module.affine:
            module.__class__ = GroupNormByChannel
        elif type(module) is Upsample2D and module.interpolate and not module.use_conv_transpose and module.norm is None:
            module.__class__ = UpsampleByRepeating
    network.compile(mode=mode)


class GroupNormByChannel(nn.GroupNorm):
    """Group norm by the mean and variance of each channel, which are read as channels_last has them, and joined for each group.

    As under autocast, sums are computed in float32; the result has the dtype of the input.
    """

    def forward(self, input: Tensor) -> Tensor:
        """`input`: (N, C, *)."""
        x = input.float()
        variances, means = torch.var_mean(x, tuple(range(2, x.ndim)), correction=0)
        variances, means = (value.unflatten(1, (self.num_groups, -1)) for value in (variances, means))
        mean = means.mean(-1, keepdim=True)
        # The variance of a group: the mean variance of its channels, and the variance of their means.
        variance = variances.mean(-1, keepdim=True) + (means - mean).square().mean(-1, keepdim=True)
        scale = (variance + self.eps).rsqrt().expand_as(means).flatten(1) * self.weight
        shift = self.bias - mean.expand_as(means).flatten(1) * scale
        shape = (*scale.shape, *(1,) * (x.ndim - 2))
        return torch.addcmul(shift.view(shape), x, scale.view(shape)).to(input.dtype)


class UpsampleByRepeating(Upsample2D):
    """Nearest upsampling by 2, whose gradient is a sum of four and not scattered."""

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """`hidden_states`: (N, C, H, W), to (N, C', 2H, 2W)."""
        if output_size is not None:
            return super().forward(hidden_states, output_size, *args, **kwargs)  # type: ignore[no-any-return]
        n, c, height, width = hidden_states.shape
        x = hidden_states.permute(0, 2, 3, 1)[:, :, None, :, None].expand(n, height, 2, width, 2, c)
        x = x.reshape(n, 2 * height, 2 * width, c).permute(0, 3, 1, 2)
        convolution = (self.conv if self.name == "conv" else self.Conv2d_0) if self.use_conv else None
        return x if convolution is None else convolution(x)
