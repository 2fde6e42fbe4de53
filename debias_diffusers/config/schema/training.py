"""The configuration of a training: its sections, of which optimization and output are here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from typing_extensions import Doc

from ..ranges import above, at_least
from .data import DataConfig, TextConfig
from .hub import HubConfig
from .network import LoraConfig, ModelConfig
from .objective import NoiseConfig, ObjectiveConfig
from .types import METRICS_HELP, BatchSize, CompileMode, OptimizerName, ParamDtype, Precision, Threads, Timeout, TrackerName


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """Optimizer, EMA, initial weights, precision."""

    batch_size: BatchSize = 64  # batch size: images per optimizer step, over all processes
    # gradient accumulation: images per forward pass and process; smaller takes less memory
    micro_batch_size: Annotated[int | None, at_least(1, 8)] = None
    max_steps: Annotated[int, at_least(1, 100_000)] = 100_000  # optimizer steps of the whole run
    # epochs of the whole run, in place of max_steps, which is written down as soon as the number of training images is known
    num_epochs: Annotated[float | None, above(0, 50)] = None
    max_hours: Annotated[float, at_least(0, 12, zero="off")] = 0.0  # time limit: save and stop after so many hours of this start; 0 is off
    # optimizer: adamw; adafactor: torch's, whose state is smaller (factored second moments, no first); adamw8bit: that of bitsandbytes
    optimizer: OptimizerName = "adamw"
    learning_rate: Annotated[float, above(0, "1e-4")] = 1e-4  # peak learning rate; with adafactor the RMS of an update
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"  # learning rate schedule after the warmup: constant, or decay to 0
    warmup_steps: Annotated[int, at_least(0, 0)] = 0  # learning rate warmup: steps over which it rises from 0
    weight_decay: Annotated[float, at_least(0, 0.01)] = 0.0  # weight decay (decoupled): learning rate times it in each step
    max_grad_norm: Annotated[float, at_least(0, 1, zero="off")] = 0.0  # gradient norm clipping; 0 is off
    ema_decay: tuple[float, ...] = (0.9999,)  # EMA decay rates; the EMA weights of the first are exported; 0 is off
    ema_warmup: bool = True  # EMA warmup: at step n the rates are at most (1 + n) / (10 + n)
    # post-hoc EMA: at most so many snapshots of two power-function averages, one with each checkpoint, of which
    # `python -m debias_diffusers.ema reconstruct` makes any other; each takes 8 bytes per weight on the disk; 0 is off
    post_hoc_ema: Annotated[int, at_least(0, 32, zero="off")] = 0
    # keep and update the EMA in main memory, for a GPU that is too small: 4 bytes per weight less for each rate, and slower steps
    ema_on_cpu: bool = False
    # pretrained model to start from: a run directory, a pipeline folder, or a Hub id (user/name@revision); with lora_rank a LoRA, as a
    # run directory, a .safetensors file, or a Hub id
    init: str | None = None
    allow_pickle_import: bool = False  # also from .bin weights, read as tensors only
    mixed_precision: Precision | None = None  # mixed precision training; as the launcher says if left out, else no
    # dtype of the weights: bf16, with mixed_precision bf16, halves weights and gradients; the optimizer computes in float32, its result is
    # rounded stochastically, and the EMA stays in float32
    param_dtype: ParamDtype = "float32"
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: much less memory, steps take a third longer
    compile: bool = False  # torch.compile the network: takes minutes at the start, for long runs on a GPU
    # mode of torch.compile: reduce-overhead has CUDA graphs, for small networks; max-autotune also tunes kernels
    compile_mode: CompileMode = "default"
    # deterministic algorithms on a GPU: resumes with equal bits, as on a CPU, and slower steps
    deterministic: bool = False
    num_threads: Threads = None  # CPU threads per process; all cores, shared by the processes on them, if left out
    seed: Annotated[int, at_least(0, 0)] = 0  # random seed


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Output: checkpoints, sample grids, logs, metrics."""

    output_dir: str | None = None  # run directory; the same command resumes the run
    checkpoint_every: Annotated[int, at_least(0, 1000, zero="at the end only")] = 1000  # steps between checkpoints; 0 saves at the end only
    keep_checkpoints: Annotated[int, at_least(1, 2)] = 2  # number of checkpoints to keep
    # each process writes its part of a checkpoint, which is not gathered first: for networks that are large and sharded (FSDP)
    sharded_checkpoints: bool = False
    sample_every: Annotated[int, at_least(0, 1000, zero="off")] = 1000  # steps between sample grids; 0 is off
    log_every: Annotated[int, at_least(0, 10, zero="off")] = 10  # steps between lines of metrics.jsonl; 0 is off
    # with validation_split: steps between validation losses, of the EMA weights on the images that are held out, always with the same noise
    validation_every: Annotated[int, at_least(0, 1000, zero="off")] = 1000
    # steps between evaluations of samples of the EMA weights against the training images; 0 is off
    eval_every: Annotated[int, at_least(0, 5000, zero="off")] = 0
    eval_metrics: Annotated[str, Doc(f"{METRICS_HELP}; the first decides which checkpoint is the best")] = "fid,colour"
    # number of samples per evaluation; 1000, or more where the metrics need more, if left out
    eval_images: Annotated[int | None, at_least(1, 1000)] = None
    # feature extractor of these metrics: digits, emoji, or a name of torch-fidelity; as in eval.py score if left out
    feature_extractor: str | None = None
    feature_extractor_weights: str | None = None  # weight file of the feature extractor; packaged or downloaded if left out
    cache_dir: str | None = None  # cache directory for features of the training images; as in eval.py score if left out, "" is off
    keep_best: bool = False  # keep the checkpoint with the best metric, beyond keep_checkpoints
    # timeout of collective operations in seconds: how long a process waits for another, which may evaluate or save alone
    ddp_timeout: Timeout = 1800
    report_to: tuple[TrackerName, ...] = ()  # experiment trackers, through accelerate, one or several; none is off
    # fields that this resume changes on purpose, such as learning_rate, from its checkpoint on; train.py --help lists them
    allow_change: tuple[str, ...] = ()
    accept_changed_data: bool = False  # resume although the data set has changed since the run began: --allow_change dataset
    dry_run: bool = False  # check everything as a start does, show data, network, memory and time, and stop; nothing is written
    # with dry_run: show the whole configuration, too, and write the images of the first batch to OUTPUT_DIR-first-batch.png
    verbose: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a diffusion model with the debiased loss (arXiv 2310.08442)."""

    data: DataConfig = field(default_factory=DataConfig)
    text: TextConfig = field(default_factory=TextConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    run: RunConfig = field(default_factory=RunConfig)
    hub: HubConfig = field(default_factory=HubConfig)
