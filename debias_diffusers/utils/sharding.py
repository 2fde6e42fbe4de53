"""Sharded networks (torch's FSDP2, `fully_shard`), their tensors (DTensor), of which each process has a part, and files of these parts.

The files are those of torch.distributed.checkpoint in safetensors; a tensor has the name PART/NAME in them, such as model/conv_in.weight.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import CannotWriteError

# Classes of diffusers whose weights are gathered together, when they are computed with, and dropped again.
UNITS = {"ResnetBlock2D", "BasicTransformerBlock", "Attention"}


def units(network: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules of the classes `UNITS`."""
    for child in network.children():
        if type(child).__name__ in UNITS:
            yield child
        else:
            yield from units(child)


def gathered_bytes(network: nn.Module) -> int:
    """Bytes beside the shards: whole weights of two units, one of which is fetched ahead, float32 gradients of one, and what is in none.

    `network` is whole, in the dtype in which it is gathered.
    """
    each = [sum(p.nbytes for p in unit.parameters()) for unit in units(network)]
    largest = max(units(network), key=lambda unit: sum(p.nbytes for p in unit.parameters()), default=None)
    gradients = 4 * sum(p.numel() for p in largest.parameters()) if largest is not None else 0
    return sum(p.nbytes for p in network.parameters()) - sum(each) + 2 * max(each, default=0) + gradients


def shard(network: nn.Module, device_type: str, processes: int, half: torch.dtype | None, reshard_after_forward: bool = True) -> None:
    """Leaves each process with its part of the parameters, in place; what is in no unit is gathered for the whole forward and backward.

    Args:
        network: whole and the same in each process, on its device.
        half: the dtype of mixed precision, in which weights are gathered; gradients are averaged in float32.
        reshard_after_forward: whether the weights of a unit are dropped between its forward and its backward.
    """
    mesh = init_device_mesh(device_type, (processes,))
    # The inputs stay as they are: sizes such as SDXL's are no numbers of half precision, and autocast casts the others.
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in list(units(network)):
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    fully_shard(network, mesh=mesh, mp_policy=policy)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, which shares its memory; a tensor that is not sharded itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; where it is sharded, all processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors: those that are sharded in the first process alone, on the CPU, one after the other. All processes must call it."""
    found = {}
    for name, tensor in tensors.items():
        value = whole(tensor)
        if value is tensor:
            found[name] = value
        elif torch.distributed.get_rank() == 0:
            found[name] = value.cpu()
    return found


def part_like(value: Tensor, tensor: Tensor) -> Tensor:
    """The part of a whole `value` that this process has of a `tensor` of the same shape. Nothing is sent."""
    if not isinstance(tensor, DTensor):
        return value
    return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)


# ---- files -----------------------------------------------------------------------------------------------------------


def write_shards(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Writes the parts of this process to a file of the folder. All processes must call it, with the same names.

    Raises:
        CannotWriteError: in all processes, if one of them cannot write.
    """
    alone = not torch.distributed.is_initialized()
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}  # not channels last
    try:
        with _without_warnings():
            dcp.save(contiguous, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True), no_dist=alone)
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise CannotWriteError(f"{folder} cannot be written by process {rank}: {cause}") from error


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """torch warns of work that is not coordinated with other processes, be it meant or not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def saved_tensors(folder: Path, part: str) -> dict[str, Tensor]:
    """Empty tensors of the shapes and dtypes of a part, by NAME; without memory, on the meta device."""
    saved: dict[str, Any] = dict(HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata)
    named = {key.removeprefix(f"{part}/"): entry for key, entry in saved.items() if key.startswith(f"{part}/")}
    return {name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta") for name, entry in named.items()}


def load_shards(tensors: Mapping[str, Tensor], folder: Path, part: str) -> None:
    """Reads what this process has of a part's tensors into them, over any number of processes. Nothing is sent."""
    wanted = {f"{part}/{name}": tensor for name, tensor in tensors.items()}
    with _without_warnings():
        dcp.load(wanted, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


def read_shards(folder: Path, part: str) -> dict[str, Tensor]:
    """The whole tensors of a part, by NAME; {} if there is none."""
    tensors = {name: torch.empty_like(tensor, device="cpu") for name, tensor in saved_tensors(folder, part).items()}
    load_shards(tensors, folder, part)
    return tensors
