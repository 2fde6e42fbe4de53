"""Configurations of the commands of `eval.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from typing_extensions import Doc

from ..ranges import Range, at_least
from .types import BOOTSTRAP, METRICS_HELP, NUM_IMAGES, Channels, GuidanceScale, ImageSeed, InferenceBatchSize, SchedulerName, Threads

_BIAS_SCHEDULER = "scheduler (solver), as in sample.py; ddim if left out, flow_euler for a model of rectified flow"


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """Metrics and features."""

    metrics: Annotated[str, Doc(METRICS_HELP)] = "fid,kid,prc,colour"
    # feature extractor: digits, emoji, or a name of torch-fidelity; digits and emoji for these data sets, else inception-v3-compat
    feature_extractor: str | None = None
    feature_extractor_weights: str | None = None  # weight file of the feature extractor; packaged or downloaded if left out
    split: str | None = None  # split of a reference that is a data set; that of the run if both are left out, else train
    image_column: str | None = None  # column of its images; that of the run if both are left out, else found by its type
    skip_bad: bool = False  # skip images of a reference that cannot be read, up to 1% of them; as the run did if left out
    resolution: Annotated[int | None, at_least(1, 64)] = None  # image size of the reference in pixels; that of the targets if left out
    channels: Channels = None  # image channels: 1 converts the reference to grey; as the run learned if both are left out, else 3
    batch_size: InferenceBatchSize = None
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
    # number of images of each target, of a folder or an .npz a random subset; if left out all, and of a model as many as the reference has,
    # at most 50 000
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
    batch_size: InferenceBatchSize = None
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
    batch_size: InferenceBatchSize = None
    weights: str = "ema"  # network weights: ema, raw, an EMA decay rate of the run, or sigma_rel=0.08 as in sample.py
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
