"""What a run is: frozen dataclasses with a comment per field, YAML and JSON in and out.

A configuration is written flat (one name, one value) and held in sections, one for each room that uses it. Nothing here
imports torch, so that `--help` and every complaint about a configuration come at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

PredictionType = Literal["epsilon", "sample", "v_prediction", "flow"]
NoiseSchedule = Literal["linear", "cosine", "scaled_linear", "sigmoid"]
VarianceType = Literal["fixed_small", "fixed_large"]
TimestepSampler = Literal[
    "uniform", "stratified", "log_normal", "logit_normal", "log_normal_corrected", "logit_normal_corrected", "loss_second_moment"
]
SchedulerName = Literal[
    "ddpm", "ddim", "dpmsolver", "dpmsolver++", "dpmsolver++sde", "unipc", "heun", "euler", "euler_ancestral", "flow_euler", "flow_heun"
]
Spacing = Literal["linspace", "leading", "trailing", "stride"]
Clipping = Literal["off", "static", "dynamic"]
ImageFormat = Literal["png", "webp", "npz"]
Precision = Literal["no", "fp16", "bf16"]
CompileMode = Literal["default", "reduce-overhead", "max-autotune"]

# Every weighting, and the parameters that it has beside the SNR. `register_weighting` adds a user's own.
WEIGHTING_PARAMETERS: dict[str, tuple[str, ...]] = {
    "constant": (),
    "debiased": (),
    "inverse_snr": (),
    "p2": ("p2_k", "p2_gamma"),
    "min_snr": ("snr_gamma",),
    "soft_min_snr": ("snr_gamma",),
    "truncated_snr": (),
    "edm": ("sigma_data",),
    # As other code has them, which is not one objective in every space.
    "debiased_as_is": (),
    "debiased_diffengine": (),
    "debiased_kohya": (),
    # The variational bound itself: not a function of the SNR alone, so it has no entry among the weights.
    "variational": (),
}

# Channel multipliers of the paper's networks by resolution, taken when `channel_mult` is left out.
CHANNEL_MULT = {256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4), 32: (1, 2, 2, 2)}

DIGITS = "digits"
DEFAULT_SCHEDULE: NoiseSchedule = "linear"

# Ends of the betas at T = 1000; for other T they scale by 1000 / T, which keeps the noise of the last level about the same.
BETA_ENDS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "sigmoid": (1e-4, 0.02)}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images the model learns."""

    dataset: str | None = None  # digits, a folder of images, a .parquet file, a saved dataset, or a Hub id (user/set@revision)
    split: str = "train"  # split of a parquet, saved or Hub dataset
    image_column: str | None = None  # column of the images; found by its type if left out
    label_column: str | None = None  # column of the class labels; found by its type if left out
    resolution: int | None = None  # pixels a side: the shorter side is resized to it, then the centre is cut out
    channels: int | None = None  # 1 grey (colours are converted), 3 colour; 3 as soon as one image has colours if left out
    class_conditional: bool = False  # train with class labels
    label_dropout: float = 0.1  # share of labels replaced by "none", which guidance needs
    random_flip: bool = False  # mirror half of the images
    skip_bad: bool = False  # leave out images that cannot be read, up to 1% of them, instead of stopping at the start
    num_workers: int = 2  # processes that read images, per training process; 0 reads in the loop
    cache_images_mb: int = 1024  # decoded images are kept by each training process if all fit into so many million bytes; 0 keeps none


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The UNet that is built: either these numbers, or a UNet2DModel configuration file."""

    model_channels: int = 128  # channels of the first level
    channel_mult: tuple[int, ...] = ()  # channels of each level as multiples; by resolution if left out
    layers_per_block: int = 2  # residual blocks in each level
    attention_resolutions: tuple[int, ...] = (16, 8)  # levels with attention, by their resolution
    attention_head_dim: int = 64  # channels of one attention head
    resblock_updown: bool = False  # residual blocks resize, instead of plain convolutions
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"  # how the time enters a block
    dropout: float = 0.0  # share of activations dropped in residual blocks
    model_config: str | None = None  # FILE.json of a UNet2DModel, in place of the numbers above


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the network predicts, under which noise, and how much each noise level counts."""

    prediction_type: PredictionType = "epsilon"  # what the network predicts: noise, clean image, velocity, or that of rectified flow
    # Weight of a noise level, one objective whatever the prediction type: constant, debiased, inverse_snr, p2, min_snr,
    # soft_min_snr, truncated_snr, edm; variational (the bound itself); as other code has it: debiased_as_is,
    # debiased_diffengine, debiased_kohya; or a name that you registered.
    weighting: str = "debiased"
    snr_gamma: float = 5.0  # threshold of min_snr, half-way point of soft_min_snr
    p2_k: float = 1.0  # k of p2
    p2_gamma: float = 1.0  # gamma of p2
    sigma_data: float = 0.5  # standard deviation of the data in edm
    snr_floor: float = 0.0  # the weighting is taken at an SNR of at least this
    snr_ceiling: float = 0.0  # the weighting is taken at an SNR of at most this; 0 is off
    terminal_weight_floor: float = 0.0  # weight of x_0's error at zero SNR, where sampling starts, is at least this (before normalizing)
    normalize_weights: bool = False  # divide the weights by their mean
    noise_schedule: NoiseSchedule | None = None  # how the noise grows with t: linear if left out; flow has its own
    num_train_timesteps: int = 1000  # number of noise levels T
    schedule_shift: float = 1.0  # factor on the SNR of every noise level; above 1 for images that drown in less noise
    rescale_betas_zero_snr: bool = False  # the last noise level holds nothing of the image
    learn_sigma: bool = False  # the network also predicts the variance of a sampling step, by the variational bound
    variance_type: VarianceType | None = None  # of ddpm's steps where it is not learned; fixed_large if left out
    timestep_sampler: TimestepSampler = "uniform"  # how t is drawn; log_normal and logit_normal change the objective
    timestep_mean: float = 0.0  # mean of ln(s/a) in log_normal, of ln(t/(1-t)) before any shift in logit_normal
    timestep_std: float = 1.0  # standard deviation of the same


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """How the weights are found."""

    batch_size: int = 64  # images per optimizer step, over all processes
    micro_batch_size: int | None = None  # images per forward and process; smaller takes less memory
    max_steps: int = 100_000  # optimizer steps of the whole run
    max_hours: float = 0.0  # stop and save after so many hours of this start; 0 is off
    learning_rate: float = 1e-4  # peak learning rate of AdamW
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"  # after the warm-up: stay, or fall to 0
    warmup_steps: int = 0  # steps over which the learning rate rises from 0
    weight_decay: float = 0.0  # decoupled weight decay of AdamW
    max_grad_norm: float = 0.0  # gradients longer than this are shortened; 0 is off
    ema_decay: tuple[float, ...] = (0.9999,)  # rates of the averaged weights; the first is exported
    ema_warmup: bool = True  # at step n the rates are at most (1 + n) / (10 + n), so that averages soon forget the initial weights
    init: str | None = None  # start from these weights: a run directory, a pipeline folder, or a Hub id (user/name@revision)
    allow_pickle_import: bool = False  # also from .bin weights, read as tensors only
    mixed_precision: Precision | None = None  # as the launcher says if left out, else no
    gradient_checkpointing: bool = False  # compute activations again in the backward: much less memory, steps a third longer
    compile: bool = False  # compile the network first: minutes at the start, for long runs on a GPU
    compile_mode: CompileMode = "default"  # reduce-overhead has CUDA graphs, for small networks; max-autotune tries kernels out as well
    num_threads: int | None = None  # CPU threads of a process; all cores, shared by the machine's processes, if left out
    seed: int = 0  # with the position of a sample, decides all of its chance


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run is kept and what it tells."""

    output_dir: str | None = None  # the run directory; typing the same command again resumes it
    checkpoint_every: int = 1000  # steps between checkpoints; 0 saves at the end only
    keep_checkpoints: int = 2  # how many checkpoints are kept
    sample_every: int = 1000  # steps between sample grids; 0 is off
    log_every: int = 10  # steps between lines of metrics.jsonl; 0 is off
    eval_every: int = 0  # steps between measurements of what the averaged weights draw, against the training images; 0 is off
    eval_metrics: str = "fid,colour"  # what is measured, as in eval.py score; the first decides which checkpoint is the best
    eval_images: int | None = None  # how many images are drawn for it; 1000, or more where the metrics need more, if left out
    feature_extractor: str | None = None  # of these metrics: digits, or a name of torch-fidelity; as in eval.py score if left out
    feature_extractor_weights: str | None = None  # its weight file; packaged or fetched if left out
    cache_dir: str | None = None  # features of the training images are kept here; as in eval.py score if left out, "" keeps none
    keep_best: bool = False  # keep the best measured checkpoint beyond keep_checkpoints
    ddp_timeout: int = 1800  # seconds that a process waits for another, which may measure or save alone, before the run ends
    report_to: Literal["none", "tensorboard", "wandb"] = "none"  # tracker, through accelerate
    accept_changed_data: bool = False  # resume although the data set is not the one the run began with
    dry_run: bool = False  # show what would be trained, then stop


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """Whether and where the run is published."""

    push_to_hub: bool = False  # push at checkpoints, in the background, and at the end
    hub_model_id: str | None = None  # the repository, user/name or name; made if it is not there
    hub_private: bool = False  # only you may see the repository
    hub_every: int | None = None  # steps between pushes; at every checkpoint if left out, 0: at the end only
    hub_tags: bool = False  # tag what is pushed with its step, such as step-00010000
    hub_license: str | None = None  # licence of the model that its card names, such as apache-2.0; unknown if left out


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a diffusion model with the debiased loss (arXiv 2310.08442)."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    run: RunConfig = field(default_factory=RunConfig)
    hub: HubConfig = field(default_factory=HubConfig)


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """Draw the weights of an objective over the noise levels and write down their numbers."""

    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    against: tuple[str, ...] = ()  # other weightings in the same picture
    output_dir: str = "weights"  # gets weights.csv and weights.png


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Draw images with a trained model."""

    model: str  # a run directory, a pipeline folder, or a Hub id
    scheduler: SchedulerName | None = None  # the solver; unipc if left out, flow_heun for a model of rectified flow
    steps: int | None = None  # steps of the solver, each a call of the network (heun and flow_heun: two); 20 if left out
    spacing: Spacing = "linspace"  # how the steps are spread over the noise levels; stride: whole numbers apart, from 0 on
    timesteps: tuple[int, ...] = ()  # the noise levels to visit, descending, in place of steps and spacing
    sections: tuple[int, ...] = ()  # steps in each equal part of the noise levels, least noisy first, in place of steps and spacing
    eta: float = 0.0  # fresh noise in the steps of ddim: 0 none, 1 as much as ddpm
    clipping: Clipping | None = None  # of the predicted clean image; as the model says for ddpm and ddim, none for others, if left out
    clipping_quantile: float = 0.995  # share of an image's values that dynamic clipping leaves as they are
    num_images: int = 64  # how many images
    batch_size: int = 64  # images drawn together in each process
    seed: int = 0  # image k is drawn from a generator of (seed * 2654435761 + k) mod 2^32
    # Labels of a model with classes: names or numbers, repeated; balanced: all that were trained in turn; drawn: at random among
    # them; data: in proportion to the images of each that it was trained on.
    class_labels: Literal["balanced", "drawn", "data"] | tuple[str | int, ...] = "balanced"
    guidance_scale: float = 1.0  # strength of classifier-free guidance; 1 is off
    guidance_interval: tuple[int, int] | None = None  # least and greatest timestep that is guided; all if left out
    weights: str = "ema"  # ema (as exported), raw, or an EMA rate of the run such as 0.999
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # numbers of the network; the solver always has float32
    compile: bool = False  # compile the network first: minutes at the start, faster steps
    num_threads: int | None = None  # CPU threads of a process; all cores, shared by the machine's processes, if left out
    format: ImageFormat = "png"  # png, webp (lossless), or npz: all in one file, as guided-diffusion's evaluation reads them
    trajectory: bool = False  # also a picture of the first images at stages of their drawing
    output_dir: str | None = None  # MODEL/samples/SCHEDULER-STEPS for a run if left out
    allow_pickle_import: bool = False  # also take a model that has .bin weights only, read as tensors


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """What images are compared by."""

    metrics: str = "fid,kid,prc,colour"  # among fid, sfid, is, kid, prc (precision and recall), colour; apart by commas
    feature_extractor: str | None = None  # digits, or a name of torch-fidelity; digits for the digits, else inception-v3-compat
    feature_extractor_weights: str | None = None  # its weight file; packaged or fetched if left out
    split: str | None = None  # split of a reference that is a data set; that of the run if both are left out, else train
    image_column: str | None = None  # its column of images; that of the run if both are left out, else found by its type
    skip_bad: bool = False  # leave out images of a reference that cannot be read, up to 1% of them; as the run did if left out
    resolution: int | None = None  # pixels a side that the reference is brought to; as the targets have if left out
    channels: int | None = None  # 1 brings the reference to grey; as the run learned if both are left out, else 3
    batch_size: int = 64  # images computed with at once in each process
    cache_dir: str | None = None  # features are kept here; ~/.cache/debias_diffusers/features if left out, "" keeps none
    num_threads: int | None = None  # CPU threads of a process; all cores, shared by the machine's processes, if left out


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Measure how far images of models, of folders or of .npz files are from a reference."""

    targets: tuple[str, ...]  # run directories, pipeline folders, Hub ids, folders of images, .npz files
    reference: str | None = None  # a data set, folder, .npz or file of `eval.py stats`; what a run was trained on if left out
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    # How many of each target: of a folder or an .npz a random subset, all if left out; of a model as many as the reference has if left out.
    num_images: int | None = None
    schedulers: str = ""  # of models, several apart by commas; unipc or flow_heun if left out
    steps: str = "20"  # of models, several apart by commas
    checkpoints: str = ""  # of runs: all, or steps apart by commas; the exported weights if left out
    weights: str = "ema"  # of models: ema, raw, or an EMA rate of the run
    guidance_scale: float = 1.0  # of models: strength of classifier-free guidance; 1 is off
    class_labels: Literal["data", "balanced", "drawn"] = "data"  # of models with classes: in proportion as trained, all in turn, at random
    seed: int = 0  # of models, of which images of other targets, of KID's subsets and of the bootstrap
    bootstrap: int | None = None  # redrawn sets of images for confidence intervals; 0 is off; if left out 200 in compare, else 0
    allow_few_images: bool = False  # measure although a metric needs more images
    allow_pickle_import: bool = False  # also take models that have .bin weights only, read as tensors
    output: str | None = None  # FILE.json for all figures, FILE.png for curves


@dataclass(frozen=True, kw_only=True)
class StatsConfig:
    """Write the statistics of a reference, to score against without its images."""

    reference: str  # a data set, a folder or an .npz file
    out: str  # FILE.safetensors
    measure: MeasureConfig = field(default_factory=MeasureConfig)


@dataclass(frozen=True, kw_only=True)
class BitsConfig:
    """Bound the bits per dimension that a model needs to describe images."""

    model: str  # a run directory, a pipeline folder, or a Hub id
    reference: str | None = None  # a data set or folder; what a run was trained on if left out
    split: str | None = None  # its split; that of the run if both are left out, else train
    image_column: str | None = None  # its column of images; that of the run if both are left out, else found by its type
    label_column: str | None = None  # its column of labels, for models with classes; likewise
    skip_bad: bool = False  # leave out images that cannot be read, up to 1% of them; as the run did if left out
    num_images: int = 64  # how many of its images, a random subset
    batch_size: int = 64  # images computed with at once in each process
    clipping: bool = True  # bring the predicted x_0 to [-1, 1], as sampling does
    weights: str = "ema"  # ema, raw, or an EMA rate of the run
    seed: int = 0  # of which images, and of the noise
    num_threads: int | None = None  # CPU threads of a process
    allow_pickle_import: bool = False  # also take a model that has .bin weights only, read as tensors
    output: str | None = None  # FILE.json for the terms of all noise levels


@dataclass(frozen=True, kw_only=True)
class GuidedConfig:
    """Make a pipeline of a checkpoint of guided-diffusion."""

    model: str  # the .pt file
    out: str  # a new folder for the pipeline
    flags: str = ""  # what it was trained with: a .json file, or as typed, '--image_size 256 --num_head_channels 64'


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Make a checkpoint of guided-diffusion of a pipeline."""

    model: str  # a run directory, a pipeline folder, or a Hub id
    out: str  # the .pt file; its flags are written beside it
    allow_pickle_import: bool = False  # also take a model that has .bin weights only, read as tensors


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Push a run to the Hub, or what is missing of it. Typed again, it goes on where it ended."""

    run: str  # the run directory
    hub_model_id: str | None = None  # the repository, user/name or name; that of the push before if left out, with all that follows
    hub_private: bool = False  # only you may see the repository
    hub_tags: bool = False  # tag what is pushed with its step
    hub_license: str | None = None  # licence of the model that its card names, such as apache-2.0; unknown if left out
    background: bool = False  # end when standard input is closed, as it is when the training ends that started this


def noise_schedule(objective: ObjectiveConfig) -> NoiseSchedule | None:
    """The schedule that is meant where none is named."""
    return objective.noise_schedule or (None if objective.prediction_type == "flow" else DEFAULT_SCHEDULE)
