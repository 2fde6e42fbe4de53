"""Configurations of drawing images: `sample.py`, the playground, averaged weights for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from typing_extensions import Doc

from ..ranges import Range, at_least
from ..registry import DEFAULT_FLOW_SOLVER, DEFAULT_SOLVER, SOLVERS, summaries
from .types import (
    NUM_IMAGES,
    PORT,
    SIGMA_REL,
    Clipping,
    GuidanceScale,
    ImageFormat,
    ImageSeed,
    InferenceBatchSize,
    Quantile,
    SchedulerName,
    Side,
    Spacing,
    Threads,
)

_SCHEDULER = f"scheduler (solver): {summaries(SOLVERS)}; {DEFAULT_SOLVER} if left out, {DEFAULT_FLOW_SOLVER} for a model of rectified flow"


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
    batch_size: InferenceBatchSize = None
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
    batch_size: InferenceBatchSize = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # dtype of the network; the solver is always float32
    num_threads: Threads = None  # CPU threads; all cores if left out


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig:
    """Reconstruct averaged weights (EMA) of any width from the snapshots of a run that trained with --post_hoc_ema."""

    run: str  # the run directory
    # width of the average: its standard deviation over the steps, as a share of all steps; 0.05 and 0.1 are those of the snapshots
    sigma_rel: Annotated[float | None, SIGMA_REL] = None
    step: Annotated[int | None, at_least(1, 1000)] = None  # the step at which the average ends; that of the newest snapshot if left out
    out: str | None = None  # output folder of the pipeline, which must not exist; RUN/sigma_rel-SIGMA_REL if left out
