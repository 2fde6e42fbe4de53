"""Environment variables of `accelerate launch` and torchrun: which are unsupported. Checked before data and network are read. No torch.

Supported are the number of processes and their ranks (RANK, WORLD_SIZE, ...), the precision, the CPU, the device, debug mode and CPU
affinity. Variables that only refine an unsupported option (FSDP_*, MEGATRON_LM_*, ACCELERATE_DYNAMO_MODE) are not checked.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

SWITCHED_OFF = {"", "n", "no", "f", "false", "off", "0"}  # as accelerate reads them

_NOT_SHARDED = "training is not distributed that way here, but by DistributedDataParallel alone: --multi_gpu of accelerate launch"

# Variable: (values that change nothing, advice for other values).
UNSUPPORTED: dict[str, tuple[set[str], str]] = {
    "ACCELERATE_USE_FSDP": (SWITCHED_OFF, _NOT_SHARDED),
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


def environment_problems(environment: Mapping[str, str]) -> list[str]:
    """One sentence for each variable that asks for an unsupported option."""
    return [
        f"{name} is {environment[name]}, but {advice}; unset it"
        for name, (harmless, advice) in UNSUPPORTED.items()
        if environment.get(name, "").strip().lower() not in harmless
    ]


def is_first_process() -> bool:
    """Whether this is the only process, or the one of rank 0, which prints what all of them find."""
    return int(os.environ.get("RANK", "0")) == 0


def is_launched() -> bool:
    """Whether `accelerate launch` or torchrun started this process."""
    return any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"))
