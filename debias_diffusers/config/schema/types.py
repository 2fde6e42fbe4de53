"""Types, ranges and help of the fields."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from typing_extensions import Doc

from ..ranges import Range, at_least
from ..registry import METRICS, SOLVERS, TIMESTEP_BIASES, TIMESTEP_SAMPLERS, TRACKERS, summaries

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
InferenceBatchSize = Annotated[
    int | None, at_least(1, 64), Doc("batch size per process; if left out 64, of large images fewer: 16 of 512x512 pixels, 4 of 1024x1024")
]
Channels = Annotated[int | None, Range("1 (grey) or 3 (colour)", lambda value: value in (1, 3))]
Quantile = Annotated[float, Range("above 0 and at most 1, such as 0.995", lambda value: 0 < value <= 1)]
Timeout = Annotated[int, Range("at least 1 (and at most 3 years), such as 1800", lambda value: 1 <= value <= 10**8)]
GuidanceScale = Annotated[float | None, at_least(0, "1 (off) or 3")]
Side = Annotated[int | None, at_least(8, 1024)]  # of an image
# Of no more than the 32 bits that generators of images, and those of numpy, take.
ImageSeed = Annotated[int, Range("at least 0 and below 2^32, such as 0", lambda value: 0 <= value < 2**32)]

METRICS_HELP = f"metrics, separated by commas: {summaries(METRICS)}"
