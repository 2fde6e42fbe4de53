"""Modules that take the place of diffusers' own before a network is compiled compute the same."""

import copy

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from torch import nn

from debias_diffusers.config.schema.network import ModelConfig
from debias_diffusers.pipelines import compiled
from debias_diffusers.tasks.unet import build_unet, unet_config


def results(module, x, **kwargs):
    """Output, and gradients of input and weights."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = module(x, **kwargs)
    out.backward(torch.cos(torch.arange(out.numel(), dtype=out.dtype)).reshape(out.shape))
    return [out.detach(), x.grad, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("shape", [(3, 12, 5, 7), (2, 12, 9)], ids=["images", "attention"])
def test_group_norm_by_channel_is_group_norm(shape):
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, 12).double()
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = 3 * torch.randn(shape) + 50 + 10 * torch.arange(12).view(1, 12, *(1,) * (len(shape) - 2))  # means far above the deviations
    expected = results(norm, x.double())
    other = copy.deepcopy(norm).float()
    other.__class__, other.weight.grad, other.bias.grad = compiled.GroupNormByChannel, None, None
    for found, right in zip(results(other, x), expected):
        torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=2e-5 * float(right.abs().max()))


def test_group_norm_by_channel_keeps_the_precision_and_computes_in_float32():
    norm = nn.GroupNorm(2, 4)
    norm.__class__ = compiled.GroupNormByChannel
    x = (1000 + torch.randn(2, 4, 64, 64)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), nn.functional.group_norm(x.float(), 2), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("flags", [{}, {"use_conv": True}, {"use_conv": True, "name": "Conv2d_0"}], ids=str)
def test_upsampling_by_repeating_is_nearest_upsampling(flags):
    torch.manual_seed(0)
    stock = Upsample2D(3, out_channels=5, **flags) if flags else Upsample2D(3)
    other = copy.deepcopy(stock)
    other.__class__ = compiled.UpsampleByRepeating
    x = torch.randn(2, 3, 4, 6).contiguous(memory_format=torch.channels_last)
    for more in ({}, {"output_size": (7, 11)}):
        for found, right in zip(results(other, x, **more), results(stock, x, **more)):
            torch.testing.assert_close(found, right)
        other.zero_grad(), stock.zero_grad()


def test_a_network_gets_both_and_keeps_its_weights(monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", lambda *_, **__: None)
    config = ModelConfig(model_channels=8, channel_mult=(1, 2), attention_resolutions=(8,), attention_head_dim=4, resblock_updown=True)
    network = build_unet(unet_config(config, 16, 3, 0))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    expected = network(x, t).sample
    compiled.compile_channels_last(network)
    kinds = {type(module) for module in network.modules()}
    assert {compiled.GroupNormByChannel, compiled.UpsampleByRepeating} < kinds and not {nn.GroupNorm, Upsample2D} & kinds
    torch.testing.assert_close(network(x, t).sample, expected, rtol=1e-4, atol=1e-5)
    assert network.state_dict().keys() == before.keys() and all(torch.equal(network.state_dict()[name], before[name]) for name in before)


@pytest.mark.nightly
def test_compiled_it_learns_the_same():
    """By the compiler of a CPU, in channels_last."""
    torch.manual_seed(0)
    config = ModelConfig(model_channels=8, channel_mult=(1, 2), attention_resolutions=(8,), attention_head_dim=4, resblock_updown=True)
    network = build_unet(unet_config(config, 16, 3, 0)).to(memory_format=torch.channels_last)
    other = copy.deepcopy(network)
    compiled.compile_channels_last(other)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    for each in (network, other):
        each(x, t).sample.square().mean().backward()
    for found, right in zip(other.parameters(), network.parameters()):
        torch.testing.assert_close(found.grad, right.grad, rtol=1e-3, atol=1e-5)
