"""The network of a training: built, wrapped, with its optimizer and averages."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn

from ...config.schema.training import OptimizationConfig
from ...diffusion.power_ema import KEPT
from ...diffusion.uncertainty import NAME as UNCERTAINTY_MODULE
from ...diffusion.uncertainty import Uncertainty
from ...pipelines.compiled import compile_channels_last
from ...runs.checkpoints import Checkpoint
from ...tasks.base import Task, trained_parameters
from ...utils import seeding
from ...utils.console import say
from .. import device
from ..ema import EMA
from ..optimizer_step import OptimizerStep

SKIPS_IN_A_ROW = 20  # fp16 steps with overflowing gradients that are taken for a search of the loss scale


def make_network(
    task: Task, optim: OptimizationConfig, found: Checkpoint | None, accelerator: Accelerator, uncertainty: Uncertainty | None
) -> nn.Module:
    """The network on its device, with fresh weights or those of `init`; a learned uncertainty becomes a part of it."""
    torch.manual_seed(seeding.derive_seed(optim.seed, "weights", 0))
    network = task.build()
    if optim.init and found is None:
        warnings = task.load(network, optim.init)
        for sentence in (*(f"warning: {warning}" for warning in warnings), f"starting from the weights of {optim.init}"):
            if accelerator.is_main_process:
                say(sentence)
    if uncertainty is not None:  # so that whatever trains, averages and saves a network does the same with it
        network.add_module(UNCERTAINTY_MODULE, uncertainty)
    if optim.param_dtype == "bf16":
        network.bfloat16()  # not by .to(), for which diffusers prints a warning
    return device.to_train(network, accelerator, optim.optimizer)


def wrapped(network: nn.Module, optim: OptimizationConfig, accelerator: Accelerator) -> nn.Module:
    """The network as it is called in training: mixed precision, DDP, gradient checkpointing, compiled."""
    model: nn.Module = device.to_shards(network, accelerator) if device.sharded(accelerator) else accelerator.prepare(network)
    if optim.gradient_checkpointing:
        network.enable_gradient_checkpointing()  # type: ignore[operator]
    if optim.compile:  # in place, so that weights keep their names; within DDP, which then exchanges while it computes
        _compile(network, optim, accelerator)
    return model


def _compile(network: nn.Module, optim: OptimizationConfig, accelerator: Accelerator) -> None:
    if getattr(network, "_repeated_blocks", None):  # of which diffusers compiles one for all: minutes less
        network.compile_repeated_blocks(mode=optim.compile_mode)  # type: ignore[operator]
    elif accelerator.device.type == "cuda" and device.memory_format(accelerator, optim.optimizer) == torch.channels_last:
        compile_channels_last(network, optim.compile_mode)
    else:
        network.compile(mode=optim.compile_mode)


def make_optimizer_step(network: nn.Module, optim: OptimizationConfig, accelerator: Accelerator) -> OptimizerStep:
    """Optimizer and averages over the parameters as they are after the network was wrapped."""
    trained = trained_parameters(network)
    ema = EMA(trained, optim.ema_decay, optim.ema_warmup, optim.ema_on_cpu, KEPT if optim.post_hoc_ema else ())
    if optim.ema_on_cpu and accelerator.device.type == "cpu" and accelerator.is_main_process:
        say("ema_on_cpu changes nothing here: the averages of a training on a CPU are in main memory anyway")
    # A loss that is not finite is never the search of fp16 for its scale, an overflowing gradient may be.
    step = OptimizerStep(list(trained.values()), ema, optim, SKIPS_IN_A_ROW - 1 if accelerator.scaler is not None else 0)
    if accelerator.scaler is not None:
        accelerator.prepare(step.optimizer)
    return step
