"""Batches, precision, averages and the length of a training."""

from __future__ import annotations

from ..schema.objective import ObjectiveConfig
from ..schema.training import OptimizationConfig, TrainConfig


def optimization_problems(optimization: OptimizationConfig, num_processes: int) -> list[str]:
    found = []
    if optimization.init == "":
        found.append("init is an empty name; name a run directory, a pipeline folder or a Hub id, or leave it out")
    if optimization.allow_pickle_import and not optimization.init:
        found.append("allow_pickle_import is on, but init is left out; name a model with --init, or leave allow_pickle_import out")
    if optimization.batch_size % num_processes:
        fits = num_processes * max(1, round(optimization.batch_size / num_processes))
        found.append(f"batch_size is {optimization.batch_size}, but must be a multiple of the {num_processes} processes; take {fits}")
    if optimization.compile_mode != "default" and not optimization.compile:
        found.append(f"compile_mode is {optimization.compile_mode}, but compile is off; add --compile or leave compile_mode out")
    per_process, micro_batch = optimization.batch_size // num_processes, optimization.micro_batch_size
    if optimization.compile_mode != "default" and micro_batch and 1 <= micro_batch < per_process:
        found.append(
            f"micro_batch_size is {micro_batch}, but the CUDA graphs of compile_mode {optimization.compile_mode} would "
            f"write a micro-batch's gradients over those of the one before; leave one of the two out"
        )
    if optimization.param_dtype == "bf16" and optimization.mixed_precision != "bf16":
        found.append(
            f"param_dtype is bf16, but mixed_precision is {optimization.mixed_precision or 'no'}, and weights in bf16 are computed with in "
            f"bf16; add --mixed_precision bf16 or leave param_dtype out"
        )
    rates = optimization.ema_decay
    if not rates or not all(0 <= rate < 1 for rate in rates) or len(set(rates)) < len(rates):
        found.append(f"ema_decay is {list(rates)}, but must be one or more different rates, each at least 0 and below 1, such as 0.9999")
    if optimization.ema_on_cpu and not any(rates):
        found.append("ema_on_cpu is on, but ema_decay is 0, which is off; add --ema_decay 0.9999 or leave ema_on_cpu out")
    if optimization.num_epochs is not None and optimization.max_steps != OptimizationConfig().max_steps:
        found.append(f"num_epochs is {optimization.num_epochs:g}, but max_steps is {optimization.max_steps}; give one of the two")
    if optimization.warmup_steps > optimization.max_steps >= 1:
        found.append(
            f"warmup_steps is {optimization.warmup_steps}, but max_steps is only {optimization.max_steps}; "
            f"take --warmup_steps {optimization.max_steps // 10}"
        )
    return found


def post_hoc_ema_problems(config: TrainConfig) -> list[str]:
    """Snapshots of averages that are never taken, or that nothing reads."""
    found, count = [], config.optimization.post_hoc_ema
    if 0 < count < 4:
        found.append(f"post_hoc_ema is {count}, but other averages are made of several snapshots; take --post_hoc_ema 32")
    if not config.run.checkpoint_every:
        found.append(
            f"post_hoc_ema is {count}, but checkpoint_every is 0, and snapshots are taken with checkpoints; take --checkpoint_every 1000"
        )
    others = {"lora_rank": config.lora.lora_rank, "sharded_checkpoints": config.run.sharded_checkpoints}
    return found + [
        f"{name} is {value}, which does not go with post_hoc_ema; leave one of the two out" for name, value in others.items() if value
    ]


def sharding_problems(optimization: OptimizationConfig, objective: ObjectiveConfig) -> list[str]:
    """What does not go with a training whose weights are sharded over processes."""
    found = []
    if objective.learned_uncertainty:
        found.append("learned_uncertainty is on, but the weights are sharded over processes (FSDP), which it does not know; leave it out")
    if optimization.optimizer == "adamw8bit":
        found.append("optimizer is adamw8bit, but bitsandbytes knows no sharded weights; take --optimizer adamw or adafactor")
    if optimization.mixed_precision == "fp16":
        found.append("mixed_precision is fp16, which is not tested with sharded weights; take --mixed_precision bf16")
    for name in ("compile", "ema_on_cpu"):
        if getattr(optimization, name):
            found.append(f"{name} is on, but the weights are sharded over processes (FSDP), which does not go with it; leave it out")
    return found
