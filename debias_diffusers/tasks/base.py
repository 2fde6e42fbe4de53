"""What the training loop needs to know of what it trains: one kind of data, network and pipeline is one task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..config.schema.training import TrainConfig
from ..data.dataset import PositionedData
from ..diffusion.loss import Network
from ..utils.tensor_memory import sent

Batch = Mapping[str, Tensor]

HALF_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}  # by mixed_precision; "no" has none

# Weights of any size are exported as one file, which replaces that of the step before at once. From 10 GB on, as the UNet of Stable
# Diffusion XL has them, diffusers would write shards, which a kill mixes with those of another step.
ONE_FILE = "1TB"


def sent_locked(values: Tensor, device: Any) -> Tensor:
    """As `sent`, for what is made of batches: a GPU copies larger tensors without a wait only from page-locked memory, as batches have."""
    pinned = values.pin_memory() if torch.device(device).type == "cuda" and values.device.type == "cpu" else values
    return sent(pinned, device)


def trained_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a network that are trained, averaged and saved, by name: all, or those of its adapters."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


class Task(Protocol):
    """Data, network and pipeline of one kind of training. B is the size of a batch.

    The loop draws timesteps and noise, computes the loss, and steps, averages and saves; it knows neither pixels nor latents.
    """

    @property
    def data(self) -> PositionedData:
        """Samples by position, which have u (the timestep as a uniform number) and noise of the shape of x_0, too."""

    @property
    def held_out(self) -> PositionedData | None:
        """The images of the validation loss, each at one of the first positions, with all conditions; None without them."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one x_0, such as (C, H, W)."""

    def prepare(self, positions: Sequence[int] | None = None) -> None:
        """Computes what is known before the first step, such as the latents of images; of some positions only, for a dry run."""

    def build(self) -> nn.Module:
        """The network with fresh weights, from torch's global generator."""

    def load(self, network: nn.Module, model: str) -> list[str]:
        """Puts the weights of another model (a run, a pipeline folder, a Hub id) into a network that `build` made.

        Returns:
            What else that model was trained for, a sentence each.

        Raises:
            InputError: its network is another one.
        """

    @property
    def frozen_bytes(self) -> int:
        """Bytes of what is on the device beside the network, such as a VAE."""

    def dummy_batch(self, size: int) -> Batch:
        """A batch of zeros that the network can be called with."""

    def x_0(self, batch: Batch, device: Any) -> Tensor:
        """The clean values (B, *shape) float32 of a batch, on a device."""

    def conditioned(self, model: nn.Module, batch: Batch, device: Any) -> Network:
        """The model as a function of x_t and the timesteps, with the conditions (labels, captions) of a batch."""

    def frozen_files(self) -> Mapping[str, Path]:
        """Files of the exported pipeline that no training changes: where they are, by their path in the folder."""

    def export(self, network: nn.Module, folder: Path) -> None:
        """Writes the pipeline with this network into a folder, as `from_pretrained` reads it, but for the frozen files."""

    def model_card(self, config: TrainConfig, step: int, measured: Mapping[str, Any] | None) -> str:
        """README.md of a run at a step, with the last measurement of its metrics."""

    def describe(self) -> Sequence[str]:
        """Lines of a dry run: the data."""

    def picture(self, batch: Batch) -> Any:
        """The images of a batch as one picture, for a dry run."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint's state.json says of network and data; a resumed run must have the same network."""

    def conditions(self, count: int, as_in_data: bool) -> Sequence[Any]:
        """Conditions of `count` preview images: each in turn, or as often as in the data. Shorter lists are repeated; () has none."""

    def condition_names(self, conditions: Sequence[Any]) -> Sequence[str]:
        """What a grid writes beside the images of each condition."""

    def draw(self, network: nn.Module, indices: Sequence[int], conditions: Sequence[Any]) -> Tensor:
        """Images (len(indices), C, H, W) uint8 on the CPU, image k from the seed k and the condition `k % len(conditions)`."""
