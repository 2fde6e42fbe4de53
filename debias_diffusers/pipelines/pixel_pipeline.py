"""A diffusers pipeline for pixel UNets: class labels, classifier-free guidance, clipping, any scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

# Older pipelines name this module, and diffusers takes solvers only from modules that were imported.
from .. import schedulers  # noqa: F401
from ..config.schema.types import Clipping, PredictionType
from ..data.labels import from_config_mapping, label_indices
from ..diffusion.noise_schedule import is_flow, predicted_x_0, prediction_of_x_0, prediction_type_of
from ..errors import InputError, NotFiniteError
from ..hub import client
from ..runs.model_folder import task_of
from ..runs.part_files import variant_of
from ..utils.tensor_memory import sent
from .loading import explained_errors, folder_of_model, require_all_weights, require_variant
from .solvers import set_timesteps


class PixelPipeline(DiffusionPipeline):
    """Samples images with a UNet2DModel, unconditional or class-conditional.

    Args:
        unet: predicts what the scheduler's `prediction_type` says.
        scheduler: any diffusers scheduler; diffusion or flow matching, as the model was trained.
        null_label: the label of the unconditional prediction, for guidance; None if the model was trained without label dropout.
        class_names: the name of each class by str(label); None if the classes have no names.
        class_counts: the number of training images of each class by str(label); None if unknown.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ("x_t", "x_0", "class_labels", "latents")
    _guidance_scale, _num_timesteps, _interrupt = 1.0, 0, False  # before the first call

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: Any,
        null_label: int | None = None,
        class_names: Mapping[str, str] | None = None,
        class_counts: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(null_label=null_label, class_names=class_names, class_counts=class_counts)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As in diffusers: a folder, or a Hub id with `revision`. Reads safetensors unless `use_safetensors` says otherwise."""
        return super().from_pretrained(pretrained_model_name_or_path, **{"use_safetensors": True, **kwargs})

    @property
    def num_classes(self) -> int:
        """The number of classes; 0 for an unconditional model."""
        embeds = self.unet.config.num_class_embeds or 0
        return embeds - (self.config.null_label is not None)

    @property
    def class_names(self) -> list[str] | None:
        """Class names by label; None if unknown."""
        return from_config_mapping(self.config.class_names, self.num_classes, str)

    @property
    def class_counts(self) -> list[int] | None:
        """The number of training images by label; None if unknown."""
        return from_config_mapping(self.config.class_counts, self.num_classes, int)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: Sequence[int | str] | Tensor | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        num_inference_steps: int = 20,
        timesteps: Sequence[int] | None = None,
        eta: float = 0.0,
        clipping: Clipping | None = None,
        clipping_quantile: float = 0.995,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any] | None]
        | PipelineCallback
        | MultiPipelineCallbacks
        | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("x_t", "latents"),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Samples a batch of images.

        The network computes in the dtype of its weights; x_t is at least float32.

        Args:
            batch_size: B, the number of images.
            class_labels: (B,) for a class-conditional model: the label or class name of each image.
            guidance_scale: g of classifier-free guidance (arXiv 2207.12598): unconditional + g (conditional - unconditional); 1 is off.
            guidance_interval: the smallest and the largest timestep with guidance (arXiv 2404.07724); all timesteps if None.
            num_inference_steps: the number of steps of the scheduler.
            timesteps: descending timesteps, for schedulers that accept them; num_inference_steps is then unused.
            eta: the scale of the noise in DDIM's steps (arXiv 2010.02502, equation 16); 0 for schedulers without it.
            clipping: "static" clamps the predicted x_0 to [-1, 1] in each step; "dynamic" thresholding clamps it to a quantile of
                its absolute values and rescales that to 1 (arXiv 2205.11487, section 2.3). Both work with any scheduler. None or
                "off": the scheduler does what its configuration says.
            clipping_quantile: of the absolute values of an image, for "dynamic".
            generator: one for the batch, or a list with one for each image, which makes an image independent of its batch.
            latents: (B, C, H, W) standard normal noise to start from, instead of noise from the generator.
            output_type: "pil"; "np" (B, H, W, C) or "pt" (B, C, H, W), both float in [0, 1]; "latent" (B, C, H, W), the last
                x_t, unclamped, images in [-1, 1].
            return_dict: return an ImagePipelineOutput; else a tuple.
            callback_on_step_end: called after each step with this pipeline, the step index, the timestep, and a dictionary of
                tensors. If it returns another `x_t` or `latents`, sampling continues with that. It may set `_interrupt` to
                stop, and `_guidance_scale` for the next steps. diffusers' PipelineCallback and MultiPipelineCallbacks name
                their tensors themselves.
            callback_on_step_end_tensor_inputs: names among x_t (B, C, H, W) after the step, latents (the same tensor, as in
                other pipelines), x_0 (B, C, H, W) as predicted in the step, and class_labels (B,).

        Raises:
            InputError: invalid labels, guidance, noise, steps, or callback tensors for this model.
            NotFiniteError: the network or the solver returned NaN or infinity.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self._check(guidance_interval, clipping, output_type, callback_on_step_end_tensor_inputs)
        labels = self._labels(batch_size, class_labels, guidance_scale)
        if not isinstance(self.scheduler, DDPMScheduler) and self.unet.config.in_channels > 3:
            self.scheduler.register_to_config(variance_type=None)  # else DPM-Solver drops all channels after the third
        set_timesteps(self.scheduler, num_inference_steps, timesteps)
        step_arguments = self._step_arguments(generator, eta)
        x_t = self._noise(batch_size, generator, latents)
        scaled = getattr(self.scheduler, "scale_model_input", lambda x_t, t: x_t)
        self._guidance_scale, self._num_timesteps, self._interrupt = guidance_scale, len(self.scheduler.timesteps), False
        with self.progress_bar(total=self._num_timesteps) as progress:
            for step, t in enumerate(self.scheduler.timesteps):
                model_input = scaled(x_t, t)
                prediction = self._predict(model_input, t, labels, self._guidance_scale if _within(guidance_interval, t) else 1.0)
                prediction = self._clipped(prediction, model_input, t, clipping, clipping_quantile)
                x_t = self.scheduler.step(prediction, t, x_t, **step_arguments).prev_sample
                if callback_on_step_end:
                    x_0 = self._x_0(prediction, model_input, t) if "x_0" in callback_on_step_end_tensor_inputs else None
                    tensors = {"x_t": x_t, "x_0": x_0, "class_labels": labels, "latents": x_t}
                    asked = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    x_t = _replaced(x_t, callback_on_step_end(self, step, t, asked) or {})
                progress.update()
                if self._interrupt:
                    break
        if not x_t.isfinite().all():
            raise NotFiniteError(f"{type(self.scheduler).__name__} with {num_inference_steps} steps drew images that are not finite")
        images: Any = x_t if output_type == "latent" else (x_t / 2 + 0.5).clamp(0, 1)
        self.maybe_free_model_hooks()
        if output_type in ("pil", "np"):
            images = images.cpu().permute(0, 2, 3, 1).numpy()
            images = self.numpy_to_pil(images) if output_type == "pil" else images
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the current or last call."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """The number of network evaluations of the current or last call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has asked to stop sampling."""
        return self._interrupt

    def _check(
        self, guidance_interval: tuple[float, float] | None, clipping: str | None, output_type: str, tensor_inputs: Sequence[str]
    ) -> None:
        if guidance_interval is not None and not guidance_interval[0] <= guidance_interval[1]:
            raise InputError(f"guidance_interval is {guidance_interval}, but its first timestep must be the smaller one")
        if clipping not in (None, "off", "static", "dynamic"):
            raise InputError(f"clipping is {clipping!r}, but must be off, static or dynamic")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise InputError(f"output_type is {output_type!r}, but must be pil, np, pt or latent")
        if unknown := sorted(set(tensor_inputs) - set(self._callback_tensor_inputs)):
            raise InputError(f"a callback can be given {', '.join(self._callback_tensor_inputs)}, but not {', '.join(unknown)}")

    def _step_arguments(self, generator: Any, eta: float) -> dict[str, Any]:
        """Keyword arguments of the scheduler's step: generator and eta, if it has them. ODE solvers draw no noise and have neither."""
        known = inspect.signature(self.scheduler.step).parameters
        if eta and "eta" not in known:
            raise InputError(f"eta is {eta}, but {type(self.scheduler).__name__} has none; take ddim, or leave it out")
        return {name: value for name, value in (("generator", generator), ("eta", eta)) if name in known}

    def _noise(self, batch_size: int, generator: Any, latents: Tensor | None) -> Tensor:
        """The initial x_T (B, C, H, W) of the scheduler, from `latents` if given, else from the generator."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch_size, self.unet.config.in_channels, height, width)
        dtype = torch.promote_types(self._dtype, torch.float32)
        if latents is not None and latents.shape != shape:
            raise InputError(f"latents has shape {tuple(latents.shape)}, but must have {shape}, for a batch_size of {batch_size}")
        device = self._execution_device
        noise = latents.to(device, dtype) if latents is not None else randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        return noise * getattr(self.scheduler, "init_noise_sigma", 1.0)  # flow matching schedulers have none: their noise has scale 1

    def _labels(self, batch_size: int, class_labels: Sequence[int | str] | Tensor | None, guidance_scale: float) -> Tensor | None:
        if isinstance(class_labels, str) or not (class_labels is None or hasattr(class_labels, "__len__")):
            raise InputError(
                f"class_labels is {class_labels!r}, but must have one label for each of {batch_size} images, as [{class_labels!r}]"
            )
        if class_labels is not None and not isinstance(class_labels, Tensor) and self.num_classes:
            class_labels = label_indices(class_labels, self.class_names)
        check_labels(self, class_labels, guidance_scale)
        if class_labels is None:
            return None
        labels = torch.as_tensor(class_labels, dtype=torch.long, device=self._execution_device)
        if labels.shape != (batch_size,):
            raise InputError(f"class_labels has shape {tuple(labels.shape)}, but must have one label for each of {batch_size} images")
        return labels

    def _predict(self, x_t: Tensor, t: Tensor, labels: Tensor | None, guidance_scale: float) -> Tensor:
        """The input of the scheduler's step: the guided prediction, and the conditional learned variance if the scheduler uses it."""
        C = self.unet.config.in_channels
        if labels is None or guidance_scale == 1 or self.config.null_label is None:
            output = self._call(x_t, t, labels)
            prediction, values = output[:, :C], output[:, C:]
        else:
            null = torch.full_like(labels, self.config.null_label)
            output, unconditional = self._call(x_t.repeat(2, 1, 1, 1), t, torch.cat([labels, null])).chunk(2)
            prediction = unconditional[:, :C] + guidance_scale * (output[:, :C] - unconditional[:, :C])
            values = output[:, C:]
        return torch.cat([prediction, values], dim=1) if self._uses_variance else prediction

    def _call(self, x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """Calls the network in the dtype of its weights; the output has the dtype of x_t."""
        t = sent(t, x_t.device)  # which the network would do itself, and wait for the device
        output: Tensor = self.unet(x_t.to(self._dtype), t, labels, return_dict=False)[0]
        return output.to(x_t.dtype)

    @property
    def _dtype(self) -> torch.dtype:
        weights: Tensor = next(self.unet.parameters())  # `unet.dtype` walks over all modules, which takes a millisecond
        return weights.dtype

    def _clipped(self, prediction: Tensor, x_t: Tensor, t: Tensor, clipping: Clipping | None, quantile: float) -> Tensor:
        """The prediction that corresponds to the clipped x_0. Channels of a learned variance are unchanged."""
        if clipping in (None, "off"):
            return prediction
        x_0 = self._x_0(prediction, x_t, t)
        if clipping == "static":
            x_0 = x_0.clamp(-1, 1)
        else:
            bound = x_0.abs().flatten(1).quantile(quantile, dim=1).clamp(min=1).view(-1, 1, 1, 1)
            x_0 = x_0.clamp(-bound, bound) / bound
        values = prediction[:, x_t.shape[1] :]
        return torch.cat([prediction_of_x_0(self._prediction_type, x_0, x_t, *self._a_s(t)), values], dim=1)

    def _x_0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The x_0 (B, C, H, W) that corresponds to a prediction."""
        return predicted_x_0(self._prediction_type, prediction[:, : x_t.shape[1]], x_t, *self._a_s(t))

    @property
    def _prediction_type(self) -> PredictionType:
        kind: PredictionType = prediction_type_of(self.scheduler)
        return kind

    def _a_s(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """a = sqrt(alphas_cumprod) and s = sqrt(1 - alphas_cumprod) of timestep t. For a fractional t, s / a is interpolated."""
        if is_flow(self.scheduler):
            s = t.double() / self.scheduler.config.num_train_timesteps
            return 1 - s, s
        if not hasattr(self.scheduler, "alphas_cumprod"):
            name = type(self.scheduler).__name__
            raise InputError(f"{name} has no alphas_cumprod, which clipping and the x_0 of a callback need; leave them out")
        acp = self.scheduler.alphas_cumprod.double()
        if t != t.floor():
            sigma = ((1 - acp) / acp).sqrt()
            sigma = torch.lerp(sigma[int(t)], sigma[int(t) + 1], t.double().frac())
            return (1 + sigma**2).rsqrt(), sigma * (1 + sigma**2).rsqrt()
        return acp[int(t)].sqrt(), (1 - acp[int(t)]).sqrt()

    @property
    def _uses_variance(self) -> bool:
        """Whether the scheduler's step uses a learned variance: only DDPM does, though others keep the setting in their configuration."""
        return isinstance(self.scheduler, DDPMScheduler) and (self.scheduler.config.variance_type or "").startswith("learned")


def _replaced(x_t: Tensor, returned: dict[str, Any]) -> Tensor:
    """The next x_t: the tensor that a callback returned as `x_t` or `latents` if it is a new one."""
    return next((returned[name] for name in ("x_t", "latents") if returned.get(name, x_t) is not x_t), x_t)


def _within(interval: tuple[float, float] | None, t: Tensor) -> bool:
    return interval is None or interval[0] <= float(t) <= interval[1]


diffusers.PixelPipeline = PixelPipeline  # DiffusionPipeline.from_pretrained looks up the class of a saved pipeline here


def check_labels(pipeline: PixelPipeline, class_labels: Sequence[Any] | Tensor | None, guidance_scale: float) -> None:
    """Raises InputError for labels (B,) or a guidance scale that the model does not support."""
    classes = pipeline.num_classes
    if class_labels is not None and classes == 0:
        raise InputError("class_labels are given, but the model is unconditional; leave them out")
    if class_labels is None and classes:
        raise InputError(f"class_labels are missing, but the model has {classes} classes; give one from 0 to {classes - 1} for each image")
    if wrong := sorted({float(k) for k in class_labels if not (0 <= k < classes and int(k) == k)} if class_labels is not None else ()):
        raise InputError(f"class_labels has {wrong[0]:g}, but the model's classes are 0 to {classes - 1}")
    if guidance_scale != 1 and pipeline.config.null_label is None:
        raise InputError(f"guidance_scale is {guidance_scale}, but the model was not trained with dropped labels; take --guidance_scale 1")


def load_pipeline(model: str, allow_pickle: bool = False, variant: str | None = None) -> PixelPipeline:
    """Loads a pipeline from a run directory, a pipeline folder or a Hub id (user/name, user/name@revision).

    Args:
        model: path or Hub id.
        allow_pickle: read .bin weights if there are no safetensors; only tensors are read from them.
        variant: of the weights, such as ema_0_999; None for the default weights.

    Raises:
        InputError: there is no model, or a file is damaged; names it.
        HubError: the Hub cannot be reached or rejects the request.
    """
    if task_of(client.configurations(model)) == "text_to_image":  # before its weights are downloaded
        raise InputError(f"model {model} is a text-to-image model, but this is for pixel models")
    folder = folder_of_model(model, variant, allow_pickle)
    logging.disable_progress_bar()  # of loading two components
    with explained_errors(f"model {model}"):
        parts = {name for name, value in PixelPipeline.load_config(folder).items() if isinstance(value, list | tuple) and value[0]}
        if other := sorted(parts - {"unet", "scheduler"}):
            raise ValueError(f"it has a {other[0]}, but this is for pixel models, of a unet and a scheduler only")
        safe = _has_safetensors(folder, model, allow_pickle)
        require_variant(folder, model, variant)
        variant = variant or variant_of(folder / "unet")
        pipeline: PixelPipeline = PixelPipeline.from_pretrained(folder, use_safetensors=safe, variant=variant)
    if not isinstance(pipeline.unet, UNet2DModel):
        raise InputError(
            f"model {model} cannot be loaded: its unet is a {type(pipeline.unet).__name__}, but pixel models have a UNet2DModel"
        )
    require_all_weights(pipeline.unet, model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _has_safetensors(folder: Path, model: str, allow_pickle: bool) -> bool:
    """Whether to read safetensors. Raises InputError for a model with .bin weights only, whose format can contain code."""
    place = folder / "unet" if (folder / "unet").is_dir() else folder
    others = sorted(place.glob(f"{client.WEIGHTS}*.bin"))
    if not others or any(place.glob(f"{client.WEIGHTS}*.safetensors")):
        return True
    if not allow_pickle:
        raise client.bin_refused(model, str(others[0].relative_to(folder)))
    return False
