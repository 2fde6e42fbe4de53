"""What a run is: frozen dataclasses whose fields carry type, range and, as a comment, help.

A configuration is written flat (one name, one value) and held in sections, one for each part of the package that uses it. Nothing
here imports torch, so that `--help` and every complaint about a configuration come at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typing_extensions import Doc

from .ranges import Range, above, at_least
from .registry import (
    DEFAULT_FLOW_SOLVER,
    DEFAULT_SOLVER,
    METRICS,
    SOLVERS,
    TIMESTEP_BIASES,
    TIMESTEP_SAMPLERS,
    TRACKERS,
    WEIGHTINGS,
    summaries,
)

PredictionType = Literal["epsilon", "sample", "v_prediction", "flow"]
NoiseSchedule = Literal["linear", "cosine", "scaled_linear", "sigmoid", "rectified_flow"]
VarianceType = Literal["fixed_small", "fixed_large"]
Spacing = Literal["linspace", "leading", "trailing", "stride"]
Clipping = Literal["off", "static", "dynamic"]
ImageFormat = Literal["png", "webp", "npz"]
Precision = Literal["no", "fp16", "bf16"]
ParamDtype = Literal["float32", "bf16"]
Task = Literal["pixels", "text_to_image"]
OptimizerName = Literal["adamw", "adafactor", "adamw8bit"]
LoraFormat = Literal["kohya", "diffusers"]
CompileMode = Literal["default", "reduce-overhead", "max-autotune"]
if TYPE_CHECKING:
    TimestepSamplerName = str
    TimestepBiasName = str
    SchedulerName = str
    TrackerName = str
else:
    TimestepSamplerName = Literal[tuple(TIMESTEP_SAMPLERS)]
    TimestepBiasName = Literal[tuple(TIMESTEP_BIASES)]
    SchedulerName = Literal[tuple(SOLVERS)]
    TrackerName = Literal[("none", *TRACKERS)]

Threads = Annotated[int | None, at_least(1, 2)]
Share = Annotated[float, Range("at least 0 and below 1, such as 0.1", lambda value: 0 <= value < 1)]
BOOTSTRAP = Range("0 (off) or at least 20, such as 200", lambda value: value == 0 or value >= 20)
SIGMA_REL = Range("from 0.01 to 0.28, such as 0.08", lambda value: 0.01 <= value <= 0.28)
NUM_IMAGES = Range("from 1 to 10 million, such as 64", lambda value: 1 <= value <= 10_000_000)
PORT = Range("from 1 to 65535, such as 7860", lambda value: 1 <= value <= 65535)
BatchSize = Annotated[int, at_least(1, 64)]
Channels = Annotated[int | None, Range("1 (grey) or 3 (colour)", lambda value: value in (1, 3))]
Quantile = Annotated[float, Range("above 0 and at most 1, such as 0.995", lambda value: 0 < value <= 1)]
Timeout = Annotated[int, Range("at least 1 (and at most 3 years), such as 1800", lambda value: 1 <= value <= 10**8)]
GuidanceScale = Annotated[float | None, at_least(0, "1 (off) or 3")]
Side = Annotated[int | None, at_least(8, 1024)]  # of an image
# Of no more than the 32 bits that generators of images, and those of numpy, take.
ImageSeed = Annotated[int, Range("at least 0 and below 2^32, such as 0", lambda value: 0 <= value < 2**32)]

# Channel multipliers by resolution, those of the paper's networks from 32 pixels on.
CHANNEL_MULT = {256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4), 32: (1, 2, 2, 2), 16: (1, 2, 2), 8: (1, 2)}

Size = Literal["tiny", "small", "base", "large"]
SIZES: dict[Size, dict[str, Any]] = {
    "tiny": {"model_channels": 32, "layers_per_block": 1, "attention_head_dim": 32},
    "small": {"model_channels": 64, "layers_per_block": 2, "attention_head_dim": 64},
    "base": {"model_channels": 128, "layers_per_block": 2, "attention_head_dim": 64},
    "large": {"model_channels": 192, "layers_per_block": 3, "attention_head_dim": 64},
}
# Fields that a size decides.
SIZE_FIELDS = ("model_channels", "channel_mult", "layers_per_block", "attention_resolutions", "attention_head_dim")

# Help of the fields that name an entry of a table.
_WEIGHTING = f"loss weighting, one objective whatever the prediction type: {summaries(WEIGHTINGS)}; or a name that you registered"
_TIMESTEP_SAMPLER = (
    f"distribution of the timesteps: {summaries(TIMESTEP_SAMPLERS)}; "
    f"{' and '.join(name for name, spec in TIMESTEP_SAMPLERS.items() if not spec.corrected)} change the objective"
)
_TIMESTEP_BIAS = (
    f"bias of the timesteps, a factor on what timestep_sampler draws, without correction, so that it changes the objective: "
    f"{summaries(TIMESTEP_BIASES)}"
)
_METRICS = f"metrics, separated by commas: {summaries(METRICS)}"
_SCHEDULER = f"scheduler (solver): {summaries(SOLVERS)}; {DEFAULT_SOLVER} if left out, {DEFAULT_FLOW_SOLVER} for a model of rectified flow"
_BIAS_SCHEDULER = "scheduler (solver), as in sample.py; ddim if left out, flow_euler for a model of rectified flow"

DIGITS, EMOJI = "digits", "emoji"
EMBEDDED = (DIGITS, EMOJI)  # the data sets of the package; each has a configuration of its name
DIGITS_TEXT = "digits_text"  # the configuration of the captioned digits
DEFAULT_SCHEDULE: NoiseSchedule = "linear"

# Ends of the betas at T = 1000; for other T they scale by 1000 / T, which keeps the noise of the last timestep about the same.
BETA_ENDS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "sigmoid": (1e-4, 0.02)}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training images."""

    # what is trained: a pixel model, or a text-to-image model; follows from base_model if left out
    task: Task | None = None
    # data set: digits, emoji, a folder of images, of .tar or of .parquet files, such a file, a pattern of them such as
    # 'shards/{0000..0127}.tar' (also https://... and hf://datasets/user/set/...), a saved dataset, or a Hub id (user/set@revision)
    dataset: str | None = None
    split: str = "train"  # split of a parquet, saved or Hub dataset
    # column of the images, or in .tar files their extension, such as jpg; found by its type if left out
    image_column: str | None = None
    # column of the class labels, or in .tar files an extension or a field of .json; found by its type, or cls, label or class, if left out
    label_column: str | None = None
    resolution: Annotated[int | None, at_least(1, 64)] = None  # image size in pixels: resize of the shorter side, then center crop
    channels: Channels = None  # image channels: 1 is grey (colours are converted), 3 is RGB; 3 as soon as one image has colours if left out
    class_conditional: bool = False  # class-conditional training, with class labels
    label_dropout: Share = 0.1  # label dropout for classifier-free guidance: share of labels replaced by "none"
    random_flip: bool = False  # random horizontal flip of half of the images
    # shuffle window, for data that do not fit into memory: shards (.tar files, row groups of parquet files, record batches of saved data)
    # whose images are shuffled together, in an order of the shards that is another in every epoch; all if left out
    shuffle_window: Annotated[int | None, at_least(1, 16)] = None
    folder_repeats: bool = False  # train images of a folder named N_NAME, such as 10_cats, N times in each epoch
    validation_split: Share = 0.0  # share of the images that is held out of training, for the validation loss; 0 is off
    # size of the cache on the disk for shards that are fetched from a server or from the Hub, in GB, shared by all runs of the machine
    shard_cache_gb: Annotated[float, above(0, 50)] = 50.0
    # check of the images before a new run: all are decoded, or a sample of 1000, or none; if left out all, but of 100 000 images or more
    # a sample
    check_images: Literal["all", "sample", "none"] | None = None
    # skip images that cannot be read, up to 1% of them, instead of stopping; one that the check has not found is replaced by another
    skip_bad: bool = False
    jpeg_draft: bool = False  # decode JPEG files of large images at 1/2, 1/4 or 1/8 of their size: faster, with other pixels
    num_workers: Annotated[int, at_least(0, 2)] = 2  # data loader workers per training process; 0 loads in the training process
    # cache of decoded images per process, in MB, used if all fit; 0 is off
    cache_images_mb: Annotated[int, at_least(0, 1024, zero="off")] = 1024


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Text-to-image only: the base model, captions, crops."""

    # base model whose UNet is trained: Stable Diffusion XL, 2.x or 1.x as a pipeline folder, a run directory or a Hub id
    # (user/name@revision); digits is the packaged one for the captioned digits
    base_model: str | None = None
    vae: str | None = None  # another VAE than that of the base model: its folder, or a Hub id
    # column of the captions, or in .tar files an extension or a field of .json: text, caption or prompt, else the only column of texts, if
    # left out; NAME.txt beside NAME.png in a folder and in .tar files
    caption_column: str | None = None
    caption_dropout: Share = 0.1  # caption dropout for classifier-free guidance: share of captions replaced by "no caption"
    # what "no caption" is: zeros, or the encoding of the empty prompt; as the base model samples without a negative prompt if left out
    null_caption: Literal["zeros", "empty"] | None = None
    shuffle_caption: bool = False  # shuffle the parts of a caption between its commas (tags)
    keep_tokens: Annotated[int, at_least(0, 1)] = 0  # parts at the beginning of a caption that shuffle_caption leaves in place
    # text encoder inputs per caption: each holds 75 tokens of Stable Diffusion's tokenizers; longer captions are cut
    caption_chunks: Annotated[int, at_least(1, 1)] = 1
    crop: Literal["center", "random"] = "center"  # crop of the resized image to a square, or to the size of its bucket
    crop_per_image: bool = False  # with crop random: always the same crop of an image, so that its latents are kept
    # images keep their shape: sizes of about the area of resolution^2, sides multiples of 64 (less below 512 pixels), each image in the
    # size of the nearest aspect ratio; a step has images of one size
    aspect_ratio_buckets: bool = False
    # folder of latents and text embeddings that are computed beforehand where nothing random precedes them, shared by runs; kept in memory
    # if left out
    precompute_dir: str | None = None
    sample_prompts: tuple[str, ...] = ()  # prompts of the sample grids; captions of the data if left out
    sample_guidance_scale: Annotated[float, at_least(0, "1 (off) or 5")] = 5.0  # guidance scale of sample grids and eval_metrics
    # model of clip_score in eval_metrics: a CLIPModel of transformers, as a folder, or as the name of a repository that is in the cache
    clip_model: str | None = None


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Text-to-image only: LoRA adapters, which are trained in place of the weights of the UNet."""

    # rank of LoRA adapters: they alone are trained, and the UNet stays as it is; the whole UNet is trained if left out
    lora_rank: Annotated[int | None, at_least(1, 16)] = None
    # alpha of LoRA: what an adapter adds is multiplied by alpha / rank; the rank if left out
    lora_alpha: Annotated[float | None, above(0, 16)] = None
    # modules that get an adapter: names, or their ends, as target_modules of peft
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    # adapters on the text encoders, too: on q_proj k_proj v_proj out_proj, and what else lora_targets names; embeddings are then computed
    # in every step
    lora_text_encoders: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The UNet that is built: these numbers, a size that stands for them, or a UNet2DModel configuration file."""

    # network size, in place of channels, multipliers, blocks, attention and head dimension: 32, 64, 128 or 192 base channels
    size: Size | None = None
    model_channels: Annotated[int, at_least(1, 128)] = 128  # base channels: those of the first level
    channel_mult: tuple[int, ...] = ()  # channel multipliers of the levels; by resolution if left out
    layers_per_block: Annotated[int, at_least(1, 2)] = 2  # residual blocks per level
    attention_resolutions: tuple[int, ...] = (16, 8)  # self-attention at the levels of these resolutions
    attention_head_dim: Annotated[int, at_least(1, 64)] = 64  # channels per attention head
    resblock_updown: bool = False  # residual blocks for up- and downsampling, instead of plain convolutions
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"  # time embedding: added, or as scale and shift (FiLM)
    dropout: Share = 0.0  # dropout rate in the residual blocks
    model_config: str | None = None  # UNet2DModel configuration, FILE.json, in place of the numbers above


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The training objective: parameterization, noise schedule, loss weighting, and distribution of the timesteps."""

    prediction_type: PredictionType = "epsilon"  # parameterization: the network predicts noise, x_0, v, or the velocity of rectified flow
    weighting: Annotated[str, Doc(_WEIGHTING)] = "debiased"
    snr_gamma: Annotated[float, above(0, 5)] = 5.0  # gamma of min_snr (threshold) and of soft_min_snr
    p2_k: Annotated[float, above(0, 1)] = 1.0  # k of p2
    p2_gamma: Annotated[float, at_least(0, 1)] = 1.0  # gamma of p2
    sigma_data: Annotated[float, above(0, 0.5)] = 0.5  # standard deviation of the data in edm and edm_monotonic
    # b of sigmoid, which is soft_min_snr with gamma = e^b
    sigmoid_bias: Annotated[float, Range("from -30 to 30, such as 0", lambda value: -30 <= value <= 30)] = 0.0
    # weights on d log(SNR) in place of dt: times -d log(SNR)/dt, so that the objective does not depend on the noise schedule
    schedule_free_weights: bool = False
    # learned uncertainty of EDM2: the weighted loss L(t) becomes L(t)/e^u(t) + u(t), where u is trained with the network
    learned_uncertainty: bool = False
    snr_floor: Annotated[float, at_least(0, "1e-3")] = 0.0  # minimum SNR at which the weighting is evaluated
    snr_ceiling: Annotated[float, at_least(0, 1000, zero="off")] = 0.0  # maximum SNR at which the weighting is evaluated; 0 is off
    # minimum loss weight on x_0 at zero terminal SNR, where sampling starts (before normalizing); 0 is off
    terminal_weight_floor: Annotated[float, at_least(0, 0.5, zero="off")] = 0.0
    normalize_weights: bool = False  # divide the loss weights by their mean
    # beta schedule, linear if left out; rectified_flow, the straight path, for prediction_type sample; flow is on the straight path anyway
    noise_schedule: NoiseSchedule | None = None
    num_train_timesteps: Annotated[int, at_least(2, 1000)] = 1000  # number of timesteps T
    schedule_shift: Annotated[float, above(0, 1)] = 1.0  # multiplies the SNR of every timestep; > 1 for low resolutions
    rescale_betas_zero_snr: bool = False  # rescale betas to zero terminal SNR
    learn_sigma: bool = False  # learned variance: the network also predicts that of a sampling step, by the variational bound
    variance_type: VarianceType | None = None  # variance of the steps of ddpm where it is not learned; fixed_large if left out
    timestep_sampler: Annotated[TimestepSamplerName, Doc(_TIMESTEP_SAMPLER)] = "uniform"
    # mean of ln(s/a) in log_normal, of ln(t/(1-t)) before any shift in logit_normal
    timestep_mean: Annotated[float, Range("a finite number, such as 0", math.isfinite)] = 0.0
    timestep_std: Annotated[float, above(0, 1)] = 1.0  # standard deviation of the same
    laplace_mean: Annotated[float, Range("a finite number, such as 0", math.isfinite)] = 0.0  # mean of ln(SNR) in laplace
    laplace_scale: Annotated[float, above(0, 0.5)] = 0.5  # scale b of laplace, whose standard deviation is sqrt(2) b
    # s of mode: above 0 the middle of t is drawn more often, below 0 its ends; 0 is uniform
    mode_scale: Annotated[float, Range("from -1 to 1.75, such as 1.29", lambda value: -1 <= value <= 1.75)] = 1.29
    speed_k: Annotated[float, at_least(1, 5)] = 5.0  # k of speed: how many times as often the first timesteps are drawn
    # portion of the timesteps that speed draws more often: those before the noise hides the image
    speed_portion: Annotated[float, Range("above 0 and at most 1, such as 0.7", lambda value: 0 < value <= 1)] = 0.7
    # lambda of speed: weights go from 1 - lambda to lambda, before they are divided by their mean; 0.5 is none
    speed_lambda: Annotated[float, Range("from 0.5 to 1, such as 0.6", lambda value: 0.5 <= value <= 1)] = 0.6
    # timestep_sampler of the steps from timestep_sampler_switch on; the same in the whole run if left out
    timestep_sampler_after: TimestepSamplerName | None = None
    # optimizer steps after which timestep_sampler_after draws
    timestep_sampler_switch: Annotated[int, at_least(0, 10_000)] = 0
    timestep_bias_strategy: Annotated[TimestepBiasName, Doc(_TIMESTEP_BIAS)] = "none"
    timestep_bias_multiplier: Annotated[float, above(0, 2)] = 1.0  # how many times as often these timesteps are drawn
    # portion of the timesteps that earlier and later bias
    timestep_bias_portion: Annotated[float, Range("above 0 and below 1, such as 0.25", lambda value: 0 < value < 1)] = 0.25
    timestep_bias_begin: Annotated[int, at_least(0, 0)] = 0  # first timestep of range
    timestep_bias_end: Annotated[int | None, at_least(1, 500)] = None  # the timestep after the last of range; T if left out


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """The noise in training, where it is not standard normal; sampling starts from standard normal noise all the same."""

    # offset noise: a normal number for each sample and channel, times this, is added to the noise; 0 is off
    noise_offset: Annotated[float, at_least(0, 0.05, zero="off")] = 0.0
    # pyramid (multi-resolution) noise: noise of a level times this is added to that of the level with more pixels; 0 is off
    pyramid_noise_discount: Share = 0.0
    # levels of pyramid noise below the full resolution, each with a half to a quarter of the pixels a side; fewer where one pixel is left
    pyramid_noise_iterations: Annotated[int, at_least(1, 6)] = 6
    # input perturbation: x_t is made with more noise than the target, by normal noise times this; 0 is off
    input_perturbation: Annotated[float, at_least(0, 0.1, zero="off")] = 0.0


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
    eval_metrics: Annotated[str, Doc(f"{_METRICS}; the first decides which checkpoint is the best")] = "fid,colour"
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
class HubConfig:
    """Publishing on the Hub."""

    push_to_hub: bool = False  # push to the Hub at checkpoints, in the background, and at the end
    hub_model_id: str | None = None  # Hub repository, user/name or name; created if it does not exist
    hub_private: bool = False  # make the repository private
    # steps between pushes; every checkpoint if left out; 0 pushes at the end only
    hub_every: Annotated[int | None, at_least(0, 10_000, zero="at the end only")] = None
    hub_tags: bool = False  # tag each pushed revision with its step, such as step-00010000
    hub_license: str | None = None  # license of the model in its card, such as apache-2.0; unknown if left out


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


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """Plot the loss weights of an objective over the timesteps, and write them as CSV."""

    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    against: tuple[str, ...] = ()  # more weightings in the same plot
    output_dir: str = "weights"  # output directory for weights.csv and weights.png


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Sample images from a trained model."""

    model: str  # a run directory, a pipeline folder, or a Hub id
    prompt: tuple[str, ...] = ()  # text-to-image models: prompts, repeated; image k of n prompts has prompt k mod n
    prompts: str | None = None  # text-to-image models: file of prompts, one a line, in UTF-8, in place of prompt
    negative_prompt: str | None = None  # text-to-image models: what guidance leads away from; as the model says if left out
    width: Side = None  # text-to-image models: width of the images in pixels; that of the model if left out
    height: Side = None  # text-to-image models: height of the images in pixels; that of the model if left out
    # text-to-image models: LoRAs, each a run directory, a .safetensors file or a Hub id, with a strength if it is not 1, such as runs/a:0.8
    lora: tuple[str, ...] = ()
    # base model of a model that is a LoRA: a pipeline folder or a Hub id with the files that it was trained on; as it says if left out
    base_model: str | None = None
    scheduler: Annotated[SchedulerName | None, Doc(_SCHEDULER)] = None
    steps: Annotated[int | None, at_least(1, 20)] = None  # number of inference steps; 20 if left out
    spacing: Spacing = "linspace"  # timestep spacing, as in diffusers; stride: with a whole stride from 0 on
    timesteps: tuple[int, ...] = ()  # custom timesteps, descending, in place of steps and spacing
    # timestep respacing: number of steps in each equal part of the timesteps, least noisy first, in place of steps and spacing
    sections: tuple[int, ...] = ()
    # eta of ddim: 0 is deterministic, 1 adds as much noise as ddpm
    eta: Annotated[float, Range("from 0 (off) to 1", lambda value: 0 <= value <= 1)] = 0.0
    clipping: Clipping | None = None  # clipping of the predicted x_0; as the model says for ddpm and ddim, off for others, if left out
    clipping_quantile: Quantile = 0.995  # quantile of dynamic clipping (dynamic thresholding)
    num_images: Annotated[int, NUM_IMAGES] = 64  # number of images
    batch_size: BatchSize = 64  # batch size per process
    seed: ImageSeed = 0  # random seed: image k has a generator of (seed * 2654435761 + k) mod 2^32
    # class labels of a class-conditional model: names or numbers, repeated; balanced: all trained ones in turn; drawn: at random among
    # them; data: in proportion to the training images of each
    class_labels: Literal["balanced", "drawn", "data"] | tuple[str | int, ...] = "balanced"
    # classifier-free guidance scale; 1 is off; if left out, 1 for pixel models, and for text-to-image models the default of their
    # pipeline: 5 for Stable Diffusion XL, 7.5 for Stable Diffusion
    guidance_scale: GuidanceScale = None
    guidance_interval: tuple[int, int] | None = None  # guidance interval: minimum and maximum guided timestep; all if left out
    # network weights: ema (as exported), raw, an EMA decay rate of the run such as 0.999, or sigma_rel=0.08 of one with --post_hoc_ema
    weights: str = "ema"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # dtype of the network; the solver is always float32
    compile: bool = False  # torch.compile the network: takes minutes at the start, then faster steps
    num_threads: Threads = None  # CPU threads per process; all cores, shared by the processes on them, if left out
    format: ImageFormat = "png"  # image format: png, webp (lossless), or npz: one file, as guided-diffusion's evaluation reads it
    trajectory: bool = False  # also save the denoising trajectory of the first images
    # output directory; MODEL/samples/SCHEDULER-STEPS for a run if left out, with all other settings that are not left out in its name
    output_dir: str | None = None
    overwrite: bool = False  # replace images of other settings in the output directory, and images beyond num_images
    allow_pickle_import: bool = False  # also load a model that has .bin weights only, read as tensors only


@dataclass(frozen=True, kw_only=True)
class PlayConfig:
    """Draw with a model, or compare two on the same seeds, on a web page on this machine."""

    models: tuple[str, ...]  # one or two of: run directory, pipeline folder, Hub id
    base_model: str | None = None  # base model of models that are LoRAs; as they say if left out
    # write a folder for a Hugging Face Space with this playground, and end; models are best Hub ids
    space: str | None = None
    # address that the page listens on; 127.0.0.1 is this machine only, 0.0.0.0 is everybody who can reach this machine
    host: str = "127.0.0.1"
    port: Annotated[int | None, PORT] = None  # port of the page; the first free one from 7860 on if left out
    # limit of one request: images x steps x models
    max_image_steps: Annotated[int, at_least(1, 4000)] = 4000
    max_queue: Annotated[int, at_least(1, 8)] = 8  # requests that may wait, as one is drawn at a time
    # batch size; 64 for pixel models, 4 for text-to-image models, if left out
    batch_size: Annotated[int | None, at_least(1, 64)] = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # dtype of the network; the solver is always float32
    num_threads: Threads = None  # CPU threads; all cores if left out


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """Metrics and features."""

    metrics: Annotated[str, Doc(_METRICS)] = "fid,kid,prc,colour"
    # feature extractor: digits, emoji, or a name of torch-fidelity; digits and emoji for these data sets, else inception-v3-compat
    feature_extractor: str | None = None
    feature_extractor_weights: str | None = None  # weight file of the feature extractor; packaged or downloaded if left out
    split: str | None = None  # split of a reference that is a data set; that of the run if both are left out, else train
    image_column: str | None = None  # column of its images; that of the run if both are left out, else found by its type
    skip_bad: bool = False  # skip images of a reference that cannot be read, up to 1% of them; as the run did if left out
    resolution: Annotated[int | None, at_least(1, 64)] = None  # image size of the reference in pixels; that of the targets if left out
    channels: Channels = None  # image channels: 1 converts the reference to grey; as the run learned if both are left out, else 3
    batch_size: BatchSize = 64  # batch size per process
    cache_dir: str | None = None  # cache directory for features; ~/.cache/debias_diffusers/features if left out, "" is off
    num_threads: Threads = None  # CPU threads per process; all cores, shared by the processes on them, if left out


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Score images of models, of folders or of .npz files against a reference."""

    targets: tuple[str, ...]  # run directories, pipeline folders, Hub ids, folders of images, .npz files
    # reference data: a data set, folder, .npz or file of `eval.py stats`; what a run was trained on if left out
    reference: str | None = None
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    prompts: str | None = None  # prompts of text-to-image models: a file, one a line; the captions of the reference if left out
    # column of the captions, of the reference and of folders of images; text, caption or prompt, else the only column of texts, or as
    # the run says, if left out
    caption_column: str | None = None
    # model of clip_score: a CLIPModel of transformers, as a folder, or as the name of a repository that is in the cache
    clip_model: str | None = None
    base_model: str | None = None  # base model of targets that are LoRAs; as they say if left out
    # number of images of each target: of a folder or an .npz a random subset, all if left out; of a model as many as the reference has
    num_images: Annotated[int | None, NUM_IMAGES] = None
    schedulers: str = ""  # schedulers (solvers) for models, separated by commas; as in sample.py if left out
    steps: str = "20"  # numbers of inference steps for models, separated by commas
    checkpoints: str = ""  # checkpoints of runs: all, or steps separated by commas; the exported weights if left out
    weights: str = "ema"  # network weights of models: ema, raw, an EMA decay rate of the run, or sigma_rel=0.08 as in sample.py
    # sweep: averages of several widths (sigma_rel) of runs with --post_hoc_ema, and which is best by the first metric
    ema: Literal["sweep"] | None = None
    guidance_scale: GuidanceScale = None  # classifier-free guidance scale of models; 1 is off; as in sample.py if left out
    # class labels of class-conditional models: in proportion as trained, all in turn, at random
    class_labels: Literal["data", "balanced", "drawn"] = "data"
    seed: ImageSeed = 0  # random seed of sampling, of subsets of images, of KID's subsets and of the bootstrap
    # several random seeds of sampling for models, separated by commas, such as 0,1,2; seed alone if left out
    sampling_seeds: str = ""
    # bootstrap samples for confidence intervals; 0 is off; 200 in compare, else 0, if left out
    bootstrap: Annotated[int | None, BOOTSTRAP] = None
    allow_few_images: bool = False  # compute metrics of fewer images than they need
    allow_pickle_import: bool = False  # also load models that have .bin weights only, read as tensors only
    output: str | None = None  # output file: FILE.json for all figures, FILE.png for curves


@dataclass(frozen=True, kw_only=True)
class StatsConfig:
    """Write the statistics of a reference, to score against without its images."""

    reference: str  # a data set, a folder or an .npz file
    out: str  # output file, FILE.safetensors
    measure: MeasureConfig = field(default_factory=MeasureConfig)


@dataclass(frozen=True, kw_only=True)
class BitsConfig:
    """Bits per dimension of a model (negative log-likelihood of images): variational bound, or by the probability-flow ODE."""

    model: str  # a run directory, a pipeline folder, or a Hub id
    reference: str | None = None  # reference data: a data set or folder; what a run was trained on if left out
    split: str | None = None  # split of the reference; that of the run if both are left out, else train
    image_column: str | None = None  # column of its images; that of the run if both are left out, else found by its type
    label_column: str | None = None  # column of its labels, for class-conditional models; likewise
    skip_bad: bool = False  # skip images that cannot be read, up to 1% of them; as the run did if left out
    num_images: Annotated[int, NUM_IMAGES] = 64  # number of its images, a random subset
    batch_size: BatchSize = 64  # batch size per process
    # bound: the variational bound; ode: also the likelihood by the probability-flow ODE, of any model
    method: Literal["bound", "ode"] = "bound"
    # ode: random directions for each image that estimate the divergence (Hutchinson); more take longer, and lower the standard error
    probes: Annotated[int, at_least(1, 1)] = 1
    # ode: relative and absolute tolerance of the solver
    tolerance: Annotated[float, Range("from 1e-10 to 0.1, such as 1e-5", lambda value: 1e-10 <= value <= 0.1)] = 1e-5
    clipping: bool = True  # clip the predicted x_0 to [-1, 1] in the bound, as sampling does
    weights: str = "ema"  # network weights: ema, raw, an EMA decay rate of the run, or sigma_rel=0.08 as in sample.py
    seed: Annotated[int, at_least(0, 0)] = 0  # random seed of the subset and of the noise
    num_threads: Threads = None  # CPU threads per process
    allow_pickle_import: bool = False  # also load a model that has .bin weights only, read as tensors only
    output: str | None = None  # output file, FILE.json, for the terms of all timesteps


@dataclass(frozen=True, kw_only=True)
class BiasConfig:
    """Measure how the loss weight shows, timestep by timestep: errors, estimates of x_0, images over steps; a folder with report.html.

    For each run: errors of the prediction and of x_0, with the signed error of each colour channel, at fixed timesteps, for the same images
    and noise; and images of the same seeds at different numbers of steps.
    """

    runs: tuple[str, ...]  # run directories, pipeline folders, Hub ids: pixel models, or text-to-image models with the same VAE
    reference: str | None = None  # reference data: a data set or folder; what the runs were trained on if left out
    output_dir: str = "bias"  # output directory for report.html, .csv and .png files
    split: str | None = None  # split of the reference; that of the run if both are left out, else train
    image_column: str | None = None  # column of its images; that of the run if both are left out, else found by its type
    label_column: str | None = None  # column of its labels, for class-conditional models; likewise
    caption_column: str | None = None  # column of its captions, for text-to-image models; likewise, else found by its name
    skip_bad: bool = False  # skip images that cannot be read, up to 1% of them; as the run did if left out
    # number of its images on which errors are measured, a random subset: of those that all runs held out (validation_split) if they did
    num_images: Annotated[int, NUM_IMAGES] = 256
    num_timesteps: Annotated[int, at_least(2, 20)] = 20  # number of timesteps at which errors are measured, from 0 to the last
    # numbers of inference steps; 2 3 4 5 10 20 50 100 250 1000, as far as the model has timesteps, if left out
    steps: tuple[int, ...] = ()
    num_samples: Annotated[int, NUM_IMAGES] = 256  # number of images that are sampled for each number of steps
    scheduler: Annotated[SchedulerName | None, Doc(_BIAS_SCHEDULER)] = None
    guidance_scale: GuidanceScale = None  # classifier-free guidance scale of text-to-image models; 1 is off; as in sample.py if left out
    # of two runs: also sample with the first one's network from a timestep on and the second one's below it, over that timestep
    swap: bool = False
    swap_steps: Annotated[int, at_least(1, 20)] = 20  # number of inference steps of swap
    # metrics of what is sampled, separated by commas, as in eval.py score; if left out fid,colour for digits and emoji, or with
    # feature_extractor (also of the runs), else colour
    metrics: str | None = None
    feature_extractor: str | None = None  # feature extractor: digits, emoji, or a name of torch-fidelity; as of the runs if left out
    feature_extractor_weights: str | None = None  # weight file of the feature extractor; packaged or downloaded if left out
    cache_dir: str | None = None  # cache directory for features; as in eval.py score if left out, "" is off
    batch_size: BatchSize = 64  # batch size
    weights: str = "ema"  # network weights: ema, raw, or an EMA decay rate of the run
    seed: ImageSeed = 0  # random seed of the subset, of the noise and of sampling
    num_threads: Threads = None  # CPU threads
    base_model: str | None = None  # base model of runs that are LoRAs; as they say if left out
    allow_pickle_import: bool = False  # also load models that have .bin weights only, read as tensors only


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write runs, finished or training, as one HTML file: configuration, curves, grids over time, metrics, weights, model card."""

    runs: tuple[str, ...]  # run directories, which are shown side by side
    output: str = "report.html"  # output file, FILE.html, which needs no other file
    # files that eval.py score or compare wrote with --output FILE.json; those in the run directories are taken anyhow
    scores: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class GuidedConfig:
    """Convert a checkpoint of guided-diffusion to a pipeline."""

    model: str  # the .pt file
    out: str  # output folder of the pipeline, which must not exist
    flags: str = ""  # flags that it was trained with: a .json file, or as typed, '--image_size 256 --num_head_channels 64'


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Convert a pipeline to a checkpoint of guided-diffusion."""

    model: str  # a run directory, a pipeline folder, or a Hub id
    out: str  # output file, .pt; its flags are written beside it
    allow_pickle_import: bool = False  # also load a model that has .bin weights only, read as tensors only


@dataclass(frozen=True, kw_only=True)
class SingleConfig:
    """Convert a single-file checkpoint of Stable Diffusion XL, 2.x or 1.x to a pipeline folder, or a pipeline to such a file."""

    model: str  # the .safetensors; or a run directory, a pipeline folder or a Hub id
    out: str  # output folder, which must not exist; or output file, .safetensors
    # of a file: a pipeline folder or Hub id with configurations and tokenizers; if left out the usual one of Stable Diffusion XL or 1.x
    config: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # precision of the weights in an output file


@dataclass(frozen=True, kw_only=True)
class LoraFormatConfig:
    """Convert a LoRA to the names of kohya's scripts (sd-scripts), which most interfaces read, or from these to those of diffusers."""

    lora: str  # a run directory, a .safetensors file or a Hub id
    out: str  # output: with format kohya a file, FILE.safetensors, with format diffusers a folder; it must not exist
    format: LoraFormat = "kohya"  # names of the tensors of the output


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig:
    """Reconstruct averaged weights (EMA) of any width from the snapshots of a run that trained with --post_hoc_ema."""

    run: str  # the run directory
    # width of the average: its standard deviation over the steps, as a share of all steps; 0.05 and 0.1 are those of the snapshots
    sigma_rel: Annotated[float | None, SIGMA_REL] = None
    step: Annotated[int | None, at_least(1, 1000)] = None  # the step at which the average ends; that of the newest checkpoint if left out
    out: str | None = None  # output folder of the pipeline, which must not exist; RUN/sigma_rel-SIGMA_REL if left out


@dataclass(frozen=True, kw_only=True)
class ShardsMakeConfig:
    """Write a data set as .tar shards with an index, with labels and captions where it has them. The same command goes on after a kill."""

    data: str  # data set, as --dataset of train.py
    out: str  # output folder
    shard_mb: Annotated[int, at_least(1, 256)] = 256  # size of a shard at most, in MB, unless one image is larger
    split: str = "train"  # split of a parquet, saved or Hub dataset
    image_column: str | None = None  # column of the images; found by its type if left out
    label_column: str | None = None  # column of the class labels; found by its type if left out
    caption_column: str | None = None  # column of the captions; found by its name if left out


@dataclass(frozen=True, kw_only=True)
class ShardsConfig:
    """Shards, .tar or .parquet files."""

    data: str  # a folder of shards, a file, or a pattern such as 'shards/{0000..0127}.tar'
    split: str = "train"  # split of a folder
    image_column: str | None = None  # images: a column, or in a .tar file the extension, such as jpg; found by its type if left out
    label_column: str | None = None  # labels: a column, or in a .tar file an extension or a field of .json; found by its type if left out
    caption_column: str | None = None  # captions: likewise; found by its name if left out


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Push a run to the Hub, or what is missing of it. The same command resumes a push."""

    run: str  # the run directory
    hub_model_id: str | None = None  # Hub repository, user/name or name; with all that follows, as in the last push if left out
    hub_private: bool = False  # make the repository private
    hub_tags: bool = False  # tag the pushed revision with its step
    hub_license: str | None = None  # license of the model in its card, such as apache-2.0; unknown if left out
    background: bool = False  # end when standard input is closed, as it is when the training that started this ends


def noise_schedule(objective: ObjectiveConfig) -> NoiseSchedule | None:
    """The noise schedule of an objective; None of rectified flow."""
    return objective.noise_schedule or (None if objective.prediction_type == "flow" else DEFAULT_SCHEDULE)


def is_straight(objective: ObjectiveConfig) -> bool:
    """Whether x_t is on the straight path from image to noise, that of rectified flow."""
    return objective.prediction_type == "flow" or objective.noise_schedule == "rectified_flow"


def needs_own_scheduler(objective: ObjectiveConfig) -> bool:
    """Whether the exported scheduler is one of this package: those of diffusers take no x_0 on the straight path."""
    return is_straight(objective) and objective.prediction_type != "flow"


def channel_mult(resolution: int) -> tuple[int, ...]:
    """The usual channel multipliers of a resolution, one for each time that it can be halved; () if it cannot."""
    usual = CHANNEL_MULT[max((side for side in CHANNEL_MULT if side <= resolution), default=min(CHANNEL_MULT))]
    levels = 1
    while levels < len(usual) and resolution % 2**levels == 0:
        levels += 1
    return usual[:levels] if levels > 1 else ()


def network_of_size(size: Size, resolution: int, mult: tuple[int, ...] = ()) -> dict[str, Any]:
    """The SIZE_FIELDS of a network size, with self-attention at the levels from 5 to 16 pixels (to 8 in tiny).

    `mult`: the channel multipliers, if they are not the usual ones.
    """
    mult, largest = mult or channel_mult(resolution), 8 if size == "tiny" else 16
    sides = tuple(resolution // 2**level for level in range(len(mult)))
    return SIZES[size] | {"channel_mult": mult, "attention_resolutions": tuple(side for side in sides if 4 < side <= largest)}
