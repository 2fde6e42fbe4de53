"""Bits per dimension of a model: the variational bound (arXiv 2006.11239, equation 5), and the likelihood by the probability-flow ODE."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..config.schema.evaluation import BitsConfig
from ..diffusion.noise_schedule import Schedule, is_flow, predicted_x_0, prediction_type_of, schedule_of_scheduler
from ..diffusion.ode_likelihood import Path as OdePath
from ..diffusion.ode_likelihood import log_density, negative_log_likelihood
from ..diffusion.variational_bound import BITS, VariationalBound
from ..errors import InputError
from ..pipelines.pixel_pipeline import PixelPipeline
from ..sampling.generate import pinned_model, require_same_weights
from ..sampling.job import batch_size_of
from ..sampling.pixel_job import fingerprint, open_model
from ..utils import seeding
from ..utils.console import say
from ..utils.distributed import gather_from_all, inference_accelerator, told_by_the_first
from ..utils.files import require_replaceable, write_file
from ..utils.torch_errors import explained_torch_errors
from .image_sets import process_batches
from .reference import data_of_model, print_summary, reference_data
from .results import as_json, has_fields

# A fixed variance as a value of the variance channels: -1 is the smallest (posterior) variance, 1 is beta.
FIXED = {"fixed_small": -1.0, "fixed_small_log": -1.0, "fixed_large": 1.0, "fixed_large_log": 1.0}


@told_by_the_first()
def bits_per_dimension(config: BitsConfig) -> dict[str, Any]:
    """Computes bits per dimension of a data set, prints them and writes them to a JSON file; returns the JSON object.

    Takes a random subset of the images, a function of the seed, without flips. The noise is a function of (seed, image, t). With the
    method ode, the bound is there as well, if the model has one.

    Raises:
        InputError: model or images cannot be read, or the model is a rectified flow, which has no bound.
    """
    accelerator = inference_accelerator(config.num_threads)
    if accelerator.is_main_process and config.output:
        require_replaceable("output", Path(config.output), lambda path: has_fields(path, "total", "standard_error", "prior", "terms"))
    config = dataclasses.replace(config, model=pinned_model(config.model, accelerator))
    pipeline = open_model(config.model, config.weights, config.allow_pickle_import)
    require_same_weights(fingerprint(pipeline), config.model, accelerator)
    pipeline.to(accelerator.device)
    ode = OdeLikelihood(pipeline, config.probes, config.tolerance) if config.method == "ode" else None
    bound = None if ode and not has_bound(pipeline.scheduler) else Bound(pipeline, config.clipping)
    data = data_of_model(config, reference_data(config, config.reference, [config.model]), pipeline, "the model has")
    print_summary(data.source, data.config.dataset, accelerator)
    chosen = seeding.subset(config.seed, len(data.source), config.num_images)
    side = pipeline.unet.config.sample_size
    size = batch_size_of(config.batch_size, len(chosen), side, side)
    dealt = list(process_batches(chosen, size, accelerator.process_index, accelerator.num_processes))
    unit, each = ("timestep", len(bound.schedule)) if bound else ("batch", 1)
    with tqdm(total=len(dealt) * each, unit=unit, disable=not accelerator.is_main_process) as progress:

        def measured(number: int, indices: Sequence[int]) -> tuple[int, Any, Any]:
            images, labels = zip(*(data.decoded(k) for k in indices))
            x_0 = torch.stack(images).float() / 127.5 - 1
            given = torch.tensor(labels) if data.num_classes else None
            of_bound = (bound.terms(x_0, given, config.seed, indices, progress), bound.prior(x_0)) if bound else None
            of_ode = ode.bits(x_0, given, config.seed, indices) if ode else None
            progress.update(not bound)
            return number, of_bound, of_ode

        with explained_torch_errors("--batch_size", size):
            parts = gather_from_all(lambda: [measured(*batch) for batch in dealt], accelerator.num_processes)
    parts = sorted(parts, key=lambda part: part[0])
    terms, priors = zip(*(of_bound or (None, None) for _, of_bound, _ in parts))
    result: dict[str, Any] = (
        _result(torch.cat(terms), torch.cat(priors)) if bound else dict.fromkeys(("total", "standard_error", "prior", "terms"))
    )
    if ode:
        bits, calls = zip(*(of_ode for *_, of_ode in parts))
        result["ode"] = ode.result(torch.cat(bits), max(calls))
    result |= {
        "model": config.model,
        "images": len(chosen),
        "total_images": len(data.source),
        "seed": config.seed,
        "clipping": config.clipping,
        "variance_type": pipeline.scheduler.config.get("variance_type"),
    }
    if accelerator.is_main_process:
        if config.output:
            write_file(Path(config.output), as_json(result))
        _print(result)
    return result


def _print(result: Mapping[str, Any]) -> None:
    """The bound and the likelihood by the ODE, whichever there are."""
    over = f"{result['images']} of {result['total_images']} images"
    if result["total"] is not None:
        what = "bits per dimension by the variational bound" if "ode" in result else "bits per dimension"
        say(f"{result['total']:.4f} {what} (standard error {result['standard_error']:.2g}) over {over}")
        say(f"of which {result['terms'][0]:.4f} are for the last step and {result['prior']:.2g} for the prior")
    if ode := result.get("ode"):
        say(
            f"{ode['total']:.4f} bits per dimension by the probability-flow ODE (standard error {ode['standard_error']:.2g}) over "
            f"{over}, {ode['network_evaluations']} evaluations of the network"
        )


def _result(terms: Tensor, prior: Tensor) -> dict[str, Any]:
    """Means over images of the terms (N, T) and the prior (N,), in bits per dimension."""
    return {**_mean(terms.sum(1) + prior), "prior": prior.mean().item(), "terms": terms.mean(0).tolist()}


def _mean(total: Tensor) -> dict[str, float]:
    """Mean and standard error of bits per dimension (N,) of images."""
    error = total.std().item() / math.sqrt(len(total)) if len(total) > 1 else math.nan
    return {"total": total.mean().item(), "standard_error": error}


def has_bound(scheduler: Any) -> bool:
    """Whether the steps of a model have a variance, without which there is no variational bound."""
    kind = scheduler.config.get("variance_type")
    return not is_flow(scheduler) and (kind in FIXED or kind == "learned_range")


class Bound:
    """Computes the variational bound of one model."""

    def __init__(self, pipeline: PixelPipeline, clipping: bool) -> None:
        """`clipping`: clamp the predicted x_0 to [-1, 1]. Raises InputError if the steps of the model have no variance."""
        own = pipeline.scheduler
        kind = own.config.get("variance_type")
        if not has_bound(own):
            raise InputError(
                f"the model's scheduler is {type(own).__name__} with variance_type {kind}, whose steps have no bound here; eval.py score "
                f"measures any model (fid, kid, prc); a model of another --prediction_type than flow has a bound, --method ode is for all"
            )
        self.pipeline, self.clipping, self.kind = pipeline, clipping, kind
        self.schedule: Schedule = schedule_of_scheduler(own)
        self.bound = VariationalBound.of(self.schedule)

    @torch.no_grad()
    def terms(self, x_0: Tensor, labels: Tensor | None, seed: int, indices: Sequence[int], progress: Any = None) -> Tensor:
        """The terms (B, T) float64 in bits per dimension of images (B, C, H, W) in [-1, 1]; at t = 0 the likelihood of the image.

        `progress` is a progress bar over timesteps.
        """
        device, T = self.pipeline.device, len(self.schedule)
        x_0, labels = x_0.to(device), labels.to(device) if labels is not None else None
        columns = []
        for timestep in range(T):
            shape = x_0.shape[1:]
            noise = seeding.normal(shape, seed, "bits", (k * T + timestep for k in indices))
            t = torch.full((len(x_0),), timestep)
            x_t = self.schedule.add_noise(x_0, noise.to(device), t)
            predicted, values = self._predicted(x_t, timestep, labels)
            columns.append(self.bound.terms(predicted - x_0, values, x_0, t).double().cpu())
            if progress is not None:
                progress.update()
        return torch.stack(columns, dim=1)

    def _predicted(self, x_t: Tensor, timestep: int, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """The predicted x_0 (B, C, H, W), and the variance channels (B, C, H, W) of the step."""
        C = x_t.shape[1]
        output = self.pipeline.unet(x_t.to(self.pipeline.unet.dtype), timestep, labels, return_dict=False)[0].to(x_t.dtype)
        a, s = self.schedule.a[timestep], self.schedule.s[timestep]
        x_0 = predicted_x_0(self.pipeline.scheduler.config.prediction_type, output[:, :C], x_t, a, s)
        x_0 = x_0.clamp(-1, 1) if self.clipping else x_0
        # With a large fixed variance, t = 0 has the posterior variance of t = 1, as in the paper's code.
        fixed = FIXED.get(self.kind, 0.0) if timestep else -1.0
        return x_0, output[:, C:] if self.kind == "learned_range" else torch.full_like(x_0, fixed)

    def prior(self, x_0: Tensor) -> Tensor:
        """The prior term (B,): KL divergence of q(x_T | x_0) from N(0, 1) in bits per dimension, for images (B, C, H, W)."""
        a, s = self.schedule.a[-1].item(), self.schedule.s[-1].item()
        return ((a * x_0.double()).square() + s**2 - 1 - 2 * math.log(s)).flatten(1).mean(1) / 2 * BITS


class OdeLikelihood:
    """Computes the likelihood of images under one model by the probability-flow ODE. The predicted x_0 is never clipped."""

    def __init__(self, pipeline: PixelPipeline, probes: int, tolerance: float) -> None:
        """`probes` of the trace estimator for each image; `tolerance` of the solver."""
        self.pipeline, self.probes, self.tolerance = pipeline, probes, tolerance
        self.kind = prediction_type_of(pipeline.scheduler)
        self.path = OdePath(schedule_of_scheduler(pipeline.scheduler), is_flow(pipeline.scheduler))

    @torch.no_grad()
    def bits(self, x_0: Tensor, labels: Tensor | None, seed: int, indices: Sequence[int]) -> tuple[Tensor, int]:
        """Bits per dimension (B,) float64 of images (B, C, H, W) in [-1, 1], and the evaluations of the network.

        Noise and probes are functions of (seed, image); the steps of the solver are those that the hardest image of the batch needs.
        """
        device, shape = self.pipeline.device, x_0.shape
        labels = labels.to(device) if labels is not None else None
        noise = seeding.normal(shape[1:], seed, "ode noise", indices)
        probes = seeding.normal((self.probes, *shape[1:]), seed, "ode probes", indices).transpose(0, 1)
        start, (a, s) = self.path.start, (factor.item() for factor in self.path.a_s(self.path.start))
        clean = x_0.to(device, torch.float64)
        x = a * clean + s * noise.to(device, torch.float64)

        def velocity(flat: Tensor, time: float) -> Tensor:
            x_t = flat.view(shape).to(self.pipeline.unet.dtype)
            timestep = torch.tensor(self.path.timestep(time), dtype=torch.float32, device=device)
            output = self.pipeline.unet(x_t, timestep, labels, return_dict=False)[0][:, : shape[1]].double()
            return self.path.velocity(self.kind, output, flat.view(shape), time).flatten(1)

        signs = torch.where(probes >= 0, 1.0, -1.0).to(device, torch.float64).flatten(2)
        density, calls = log_density(velocity, x.flatten(1), signs, start, self.path.times[-1].item(), self.tolerance)
        nats = negative_log_likelihood(density, x.flatten(1), clean.flatten(1), a, s)
        return (nats / clean[0].numel() * BITS).cpu(), calls

    def result(self, bits: Tensor, calls: int) -> dict[str, Any]:
        """What the JSON says, of the bits per dimension (N,) of images; `calls` of the network for the hardest batch."""
        return {**_mean(bits), "network_evaluations": calls, "probes": self.probes, "tolerance": self.tolerance}
