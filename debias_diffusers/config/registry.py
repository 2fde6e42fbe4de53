"""What is chosen by name, one table for each kind: weightings, timestep samplers and biases, metrics, solvers.

Flags, validation, `--help`, the model card and the tests derive from these tables; nothing else lists the names. No torch: the
functions and classes are where tensors are, and each of those modules asserts on import that it has one for every name here. (Feature
extractors have the registry of torch-fidelity, see `evaluation.feature_extractors`.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True, kw_only=True)
class WeightingSpec:
    """A loss weight on the squared error of the noise, as a function of the SNR."""

    summary: str
    source: str = ""
    parameters: tuple[str, ...] = ()  # beside the SNR: fields of ObjectiveConfig, which carry range and help
    unbounded: tuple[str, ...] = ()  # prediction types on which it grows without bound as the SNR falls to 0
    constant_below: float | str = -math.inf  # the same for every SNR up to this number, or up to the value of this field
    constant_above: float = math.inf  # the same for every SNR from this number on
    repeats: tuple[str, ...] = ()  # of a weighting that repeats other code: the prediction types of that code; () converts to all


WEIGHTINGS: dict[str, WeightingSpec] = {
    "constant": WeightingSpec(summary="1", source="arXiv 2006.11239", constant_below=math.inf, constant_above=-math.inf),
    "debiased": WeightingSpec(summary="1/sqrt(SNR)", source="arXiv 2310.08442", unbounded=("epsilon",)),
    "inverse_snr": WeightingSpec(summary="1/SNR", unbounded=("epsilon",)),
    "p2": WeightingSpec(summary="(k + SNR)^-gamma", source="arXiv 2204.00227", parameters=("p2_k", "p2_gamma")),
    "min_snr": WeightingSpec(
        summary="min(SNR, gamma)/SNR", source="arXiv 2303.09556", parameters=("snr_gamma",), constant_below="snr_gamma"
    ),
    "soft_min_snr": WeightingSpec(summary="gamma/(SNR + gamma)", source="arXiv 2401.11605", parameters=("snr_gamma",)),
    "truncated_snr": WeightingSpec(summary="max(SNR, 1)/SNR", source="arXiv 2202.00512", unbounded=("epsilon",), constant_above=1.0),
    "edm": WeightingSpec(summary="1 + 1/(SNR sigma_data^2)", source="arXiv 2206.00364", parameters=("sigma_data",), unbounded=("epsilon",)),
    "edm_monotonic": WeightingSpec(
        summary="edm times the density of log SNR in EDM, and its largest value towards more noise",
        source="arXiv 2303.00848",
        parameters=("sigma_data",),
    ),
    "flow": WeightingSpec(summary="(1 + 1/sqrt(SNR))^2, which is 1 on flow", source="arXiv 2210.02747", unbounded=("epsilon",)),
    "v": WeightingSpec(summary="1 + 1/SNR, which is 1 on v_prediction", source="arXiv 2202.00512", unbounded=("epsilon",)),
    "sigmoid": WeightingSpec(summary="sigmoid(b - log SNR)", source="arXiv 2303.00848", parameters=("sigmoid_bias",)),
    "cosmap": WeightingSpec(summary="2/pi (1 + sqrt(SNR))^4/(SNR (1 + SNR))", source="arXiv 2403.03206", unbounded=("epsilon",)),
    "sigma_sqrt": WeightingSpec(summary="(1 + sqrt(SNR))^4/SNR, which is t^-2 on flow", source="diffusers", unbounded=("epsilon",)),
    # As other code has it, which is not one objective whatever the prediction type.
    "debiased_as_is": WeightingSpec(
        summary="1/sqrt(SNR) on every prediction type",
        source="the paper's code",
        unbounded=("epsilon", "sample", "v_prediction"),
        repeats=("epsilon", "sample", "v_prediction"),
    ),
    "debiased_diffengine": WeightingSpec(
        summary="1/sqrt(SNR) on epsilon and 1/sqrt(SNR + 1) on v_prediction",
        source="diffengine",
        unbounded=("epsilon",),
        repeats=("epsilon", "v_prediction"),
    ),
    "debiased_kohya": WeightingSpec(
        summary="1/sqrt(S) on epsilon and 1/(S + 1) on v_prediction, where S = min(SNR, 1000)",
        source="sd-scripts",
        unbounded=("epsilon",),
        repeats=("epsilon", "v_prediction"),
    ),
    # Not a function of the SNR alone, so it has no weights.
    "variational": WeightingSpec(
        summary="the variational bound", source="arXiv 2102.09672", constant_below=math.inf, constant_above=-math.inf
    ),
}


@dataclass(frozen=True, kw_only=True)
class TimestepSamplerSpec:
    """A distribution of the timesteps of a batch."""

    summary: str
    parameters: tuple[str, ...] = ()  # fields of ObjectiveConfig, which carry range and help
    corrected: bool = True  # losses are divided by T p(t): the objective stays that of uniform t. Else it is multiplied by the density
    draws_zero_snr: bool = True  # also a last timestep with an SNR of 0
    card: str = ""  # what the model card says of the parameters of an uncorrected one


_NORMAL = ("timestep_mean", "timestep_std")
_NORMAL_CARD = "mean {timestep_mean}, standard deviation {timestep_std}"
_LAPLACE = ("laplace_mean", "laplace_scale")
_LAPLACE_CARD = "mean {laplace_mean}, scale {laplace_scale}"

TIMESTEP_SAMPLERS: dict[str, TimestepSamplerSpec] = {
    "uniform": TimestepSamplerSpec(summary="every timestep equally often"),
    "stratified": TimestepSamplerSpec(summary="sample k of a batch of B in the k-th of B equal parts of t"),
    "log_normal": TimestepSamplerSpec(
        summary="ln(s/a) from a normal", parameters=_NORMAL, corrected=False, draws_zero_snr=False, card=_NORMAL_CARD
    ),
    "logit_normal": TimestepSamplerSpec(summary="ln(t/(1-t)) from a normal", parameters=_NORMAL, corrected=False, card=_NORMAL_CARD),
    "log_normal_corrected": TimestepSamplerSpec(summary="as log_normal, and a tenth uniform", parameters=_NORMAL),
    "logit_normal_corrected": TimestepSamplerSpec(summary="as logit_normal, and a tenth uniform", parameters=_NORMAL),
    "laplace": TimestepSamplerSpec(
        summary="ln(SNR) from a Laplace distribution", parameters=_LAPLACE, corrected=False, draws_zero_snr=False, card=_LAPLACE_CARD
    ),
    "laplace_corrected": TimestepSamplerSpec(summary="as laplace, and a tenth uniform", parameters=_LAPLACE),
    "mode": TimestepSamplerSpec(
        summary="t = 1 - u - s (cos^2(pi u/2) - 1 + u), u uniform", parameters=("mode_scale",), corrected=False, card="s {mode_scale}"
    ),
    "speed": TimestepSamplerSpec(
        summary="SpeeD: the first timesteps k times as often as the others, losses weighted by how fast the noise grows",
        parameters=("speed_k", "speed_portion", "speed_lambda"),
        corrected=False,
        card="k {speed_k}, portion {speed_portion}, lambda {speed_lambda}",
    ),
    "loss_second_moment": TimestepSamplerSpec(summary="t in proportion to the root mean square of its last losses"),
}


@dataclass(frozen=True, kw_only=True)
class TimestepBiasSpec:
    """Timesteps that are drawn more (or less) often than the sampler says. Never corrected: the objective is multiplied, too."""

    summary: str
    parameters: tuple[str, ...] = ()  # fields of ObjectiveConfig, which carry range and help


# The names are those of diffusers' example scripts.
TIMESTEP_BIASES: dict[str, TimestepBiasSpec] = {
    "none": TimestepBiasSpec(summary="as the timestep sampler says"),
    "earlier": TimestepBiasSpec(summary="a portion from t = 0 on", parameters=("timestep_bias_multiplier", "timestep_bias_portion")),
    "later": TimestepBiasSpec(summary="a portion up to t = T - 1", parameters=("timestep_bias_multiplier", "timestep_bias_portion")),
    "range": TimestepBiasSpec(
        summary="from begin to before end", parameters=("timestep_bias_multiplier", "timestep_bias_begin", "timestep_bias_end")
    ),
}


PIXEL_LAYERS = ("colour", "projections")  # of metrics, computed of the pixels without an extractor
Better = Literal["lower", "higher", "near 0", "neither"]  # neither: a spread or a size, which no curve shows


@dataclass(frozen=True, kw_only=True)
class MetricSpec:
    """A comparison of two sets of images."""

    summary: str
    figures: Mapping[str, Better]  # what it computes; the first decides which checkpoint is the best
    min_images: int = 2  # of each set
    # What it takes of the reference. Covariances (statistics) are singular unless there are more images than features.
    reference: Literal["statistics", "images", "nothing"]
    layer: str | None = None  # the features that it compares; the extractor's for `layer_of` if None
    layer_of: str = "fid"  # name of a metric in torch-fidelity
    extractor: str | None = None  # the only extractor with this layer
    of_prompts: bool = False  # it is a mean over images of how well each fits its prompt, which is its layer

    @property
    def by_features(self) -> bool:
        """Whether it compares features of an extractor, and neither pixels nor prompts."""
        return self.layer not in PIXEL_LAYERS and not self.of_prompts


METRICS: dict[str, MetricSpec] = {
    "fid": MetricSpec(summary="Frechet distance", figures={"fid": "lower"}, reference="statistics"),
    "sfid": MetricSpec(
        summary="Frechet distance of spatial features",
        figures={"sfid": "lower"},
        reference="statistics",
        layer="spatial",
        extractor="inception-v3-compat",
    ),
    "is": MetricSpec(
        summary="Inception score",
        figures={"is": "higher", "is_std": "neither"},
        min_images=10,  # it is the mean over ten parts
        reference="nothing",
        layer_of="isc",
    ),
    "kid": MetricSpec(
        summary="kernel distance",
        figures={"kid": "lower", "kid_std": "neither", "kid_subset": "neither"},
        reference="images",
        layer_of="kid",
    ),
    "kid_rbf": MetricSpec(
        summary="kernel distance with a Gaussian (RBF) kernel",
        figures={"kid_rbf": "lower", "kid_rbf_std": "neither"},
        reference="images",
        layer_of="kid",
    ),
    "cmmd": MetricSpec(
        summary="CMMD, 1000 times the kernel distance of CLIP's embeddings",
        figures={"cmmd": "lower"},
        reference="images",
        layer="clip",
        extractor="clip-vit-l-14-336px",
    ),
    "fd_dinov2": MetricSpec(
        summary="FD-DINOv2, the Frechet distance of DINOv2's features",
        figures={"fd_dinov2": "lower"},
        reference="statistics",
        layer="dinov2",
        extractor="dinov2-vit-l-14",
    ),
    "prc": MetricSpec(
        summary="precision and recall",
        figures={"precision": "higher", "recall": "higher"},
        min_images=4,  # each with three neighbours
        reference="images",
        layer_of="prc",
    ),
    "dc": MetricSpec(
        summary="density and coverage",
        figures={"density": "higher", "coverage": "higher"},
        min_images=6,  # each with five neighbours
        reference="images",
        layer_of="prc",
    ),
    "colour": MetricSpec(
        summary="colour shift; needs no feature extractor",
        figures={"brightness_bias": "near 0", "colour_distance": "lower"},
        reference="statistics",
        layer="colour",
    ),
    "channel_bias": MetricSpec(
        summary="bias of the mean of each colour channel; needs no feature extractor",
        figures={"red_bias": "near 0", "green_bias": "near 0", "blue_bias": "near 0"},
        reference="statistics",
        layer="colour",
    ),
    "swd": MetricSpec(
        summary="sliced Wasserstein distance of the pixels; needs no feature extractor",
        figures={"swd": "lower"},
        reference="images",
        layer="projections",
    ),
    "prompt_accuracy": MetricSpec(
        summary="share of images of digits that show the digit which their prompt names",
        figures={"prompt_accuracy": "higher"},
        min_images=1,
        reference="nothing",
        layer="prompt_accuracy",
        of_prompts=True,
    ),
    "clip_score": MetricSpec(
        summary="similarity of image and prompt, the mean of max(100 cos, 0) of CLIP's embeddings",
        figures={"clip_score": "higher"},
        min_images=1,
        reference="nothing",
        layer="clip_score",
        of_prompts=True,
    ),
}
FIGURES: dict[str, Better] = {name: better for spec in METRICS.values() for name, better in spec.figures.items()}


# Experiment trackers, those of accelerate: modules, of which one must be there, and what pip installs.
TRACKERS: dict[str, tuple[tuple[str, ...], str]] = {
    "aim": (("aim",), '"aim<4"'),
    "clearml": (("clearml",), "clearml"),
    "comet_ml": (("comet_ml",), "comet-ml"),
    "dvclive": (("dvclive",), "dvclive"),
    "mlflow": (("mlflow",), "mlflow"),
    "swanlab": (("swanlab",), "swanlab"),
    "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"),
    "trackio": (("trackio",), "trackio"),
    "wandb": (("wandb",), "wandb"),
}


@dataclass(frozen=True, kw_only=True)
class SolverSpec:
    """A sampling algorithm."""

    summary: str
    parameters: tuple[str, ...] = ()  # fields of SampleConfig that it alone has
    flow: bool = False  # for models of rectified flow, and only these


SOLVERS: dict[str, SolverSpec] = {
    "ddpm": SolverSpec(summary="ancestral sampling"),
    "ddim": SolverSpec(summary="deterministic unless eta is above 0", parameters=("eta",)),
    "dpmsolver": SolverSpec(summary="second order, on the noise"),
    "dpmsolver++": SolverSpec(summary="second order, on x_0"),
    "dpmsolver++sde": SolverSpec(summary="second order, with fresh noise in each step"),
    "unipc": SolverSpec(summary="third order"),
    "heun": SolverSpec(summary="second order, two calls of the network in each step"),
    "euler": SolverSpec(summary="ddim without clipping"),
    "euler_ancestral": SolverSpec(summary="ddim at eta 1 without clipping"),
    "flow_euler": SolverSpec(summary="Euler's method for rectified flow", flow=True),
    "flow_heun": SolverSpec(summary="Heun's method for rectified flow, two calls of the network in each step", flow=True),
}
DEFAULT_SOLVER, DEFAULT_FLOW_SOLVER = "unipc", "flow_heun"


class Spec(Protocol):
    """What the entries of all tables have, but for the parameters of metrics, which have none."""

    @property
    def summary(self) -> str: ...


class Parametrized(Spec, Protocol):
    @property
    def parameters(self) -> tuple[str, ...]: ...


def parameters_of(table: Mapping[str, Parametrized]) -> dict[str, list[str]]:
    """Every parameter of a table's entries, and the names of the entries that have it."""
    names = dict.fromkeys(parameter for spec in table.values() for parameter in spec.parameters)
    return {parameter: [name for name, spec in table.items() if parameter in spec.parameters] for parameter in names}


def summaries(table: Mapping[str, Spec]) -> str:
    """Names and what they mean, for a help text."""
    return "; ".join(f"{name}: {spec.summary}" for name, spec in table.items())
