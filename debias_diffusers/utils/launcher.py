"""Environment variables of `accelerate launch` and torchrun: which are unsupported. Checked before data and network are read. No torch.

Supported are the number of processes and their ranks (RANK, WORLD_SIZE, ...), the precision, the CPU, the device, debug mode, CPU
affinity, and in a training FSDP of version 2. Variables that only refine an unsupported option (MEGATRON_LM_*, ACCELERATE_DYNAMO_MODE), or
that version 2 does not have (FSDP_SHARDING_STRATEGY, ...), are not checked.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal

from ..errors import InputError

SWITCHED_OFF = {"", "n", "no", "f", "false", "off", "0"}  # as accelerate reads them

_NOT_SHARDED = (
    "training is not distributed that way here, but by DistributedDataParallel (--multi_gpu of accelerate launch) or by FSDP of version 2"
)
_FSDP = "ACCELERATE_USE_FSDP"

# Variable: (values that change nothing, advice for other values).
UNSUPPORTED: dict[str, tuple[set[str], str]] = {
    _FSDP: (SWITCHED_OFF, "only trainings are sharded, and by FSDP of version 2 (fsdp_version: 2 of its configuration) alone"),
    "ACCELERATE_USE_DEEPSPEED": (SWITCHED_OFF, _NOT_SHARDED),
    "ACCELERATE_USE_MEGATRON_LM": (SWITCHED_OFF, _NOT_SHARDED),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (SWITCHED_OFF, _NOT_SHARDED),
    "ACCELERATE_USE_SAGEMAKER": (SWITCHED_OFF, _NOT_SHARDED),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        {"", "1"},
        "--batch_size is that of an optimizer step, and --micro_batch_size how many images of it are computed with at once",
    ),
    "ACCELERATE_DYNAMO_BACKEND": ({"", "no"}, "the network is compiled by --compile: --dynamo_backend no of accelerate launch"),
}


# Options of FSDP.
UNSUPPORTED_OF_FSDP: dict[str, tuple[set[str], str]] = {
    "FSDP_OFFLOAD_PARAMS": (SWITCHED_OFF, "weights are not moved to main memory between the steps"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": (SWITCHED_OFF, "each process reads the weights itself"),
    "FSDP_ACTIVATION_CHECKPOINTING": (SWITCHED_OFF, "activations are recomputed by --gradient_checkpointing"),
}


def is_sharded(environment: Mapping[str, str]) -> bool:
    """Whether the launcher asks for FSDP of version 2."""
    return environment.get(_FSDP, "").strip().lower() not in SWITCHED_OFF and environment.get("FSDP_VERSION", "1").strip() == "2"


def environment_problems(environment: Mapping[str, str], training: bool = False) -> list[str]:
    """One sentence for each variable that asks for an unsupported option; a training may be sharded."""
    table = UNSUPPORTED
    if training and is_sharded(environment):
        table = {name: entry for name, entry in UNSUPPORTED.items() if name != _FSDP} | UNSUPPORTED_OF_FSDP
    return [
        f"{name} is {environment[name]}, but {advice}; unset it"
        for name, (harmless, advice) in table.items()
        if environment.get(name, "").strip().lower() not in harmless
    ]


def is_first_process() -> bool:
    """Whether this is the only process, or the one of rank 0, which prints what all of them find."""
    rank = os.environ.get("RANK", "")
    return not rank.isdecimal() or int(rank) == 0  # what is no number is said by the first process, which is then the only one


def world_size(name: Literal["WORLD_SIZE", "LOCAL_WORLD_SIZE"] = "WORLD_SIZE") -> int:
    """The number of processes, of all computers or of this one; 1 where no launcher says it.

    Raises:
        InputError: the variable is no such number.
    """
    value = os.environ.get(name, "").strip()
    if value and not (value.isdecimal() and int(value)):
        raise InputError(f"launcher: {name} is {value}, but must be the number of processes; unset it, or start with accelerate launch")
    return int(value or 1)


def is_launched() -> bool:
    """Whether `accelerate launch` or torchrun started this process."""
    return any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"))
