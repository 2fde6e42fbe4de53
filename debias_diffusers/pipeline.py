"""A diffusers pipeline for pixel UNets: class labels, guidance, any scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from safetensors import SafetensorError
from torch import Tensor

from .errors import InputError, NotFiniteError


class PixelPipeline(DiffusionPipeline):
    """Draws images with a UNet2DModel, unconditional or by class.

    Args:
        unet: predicts what the scheduler's `prediction_type` says.
        scheduler: any diffusers scheduler, of the kind that the model was trained for.
        null_label: the label that stands for "no label", for guidance; None where the model was trained without one.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet2DModel, scheduler: Any, null_label: int | None = None) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(null_label=null_label)

    @property
    def num_classes(self) -> int:
        """Labels that can be asked for; 0 for an unconditional model."""
        embeds = self.unet.config.num_class_embeds or 0
        return embeds - (self.config.null_label is not None)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: Sequence[int] | Tensor | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 20,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws a batch of images.

        Args:
            batch_size: how many.
            class_labels: (batch_size,) a label for each image of a class-conditional model.
            guidance_scale: g of classifier-free guidance (arXiv 2207.12598): none + g (label - none); 1 is off.
            num_inference_steps: steps of the scheduler.
            generator: one for all, or a list with one for each image, which makes an image independent of its batch.
            output_type: "pil"; "np" (B, H, W, C) or "pt" (B, C, H, W), both float in [0, 1].
            return_dict: an ImagePipelineOutput, or a plain tuple.

        Raises:
            InputError: labels or guidance that the model does not have.
            NotFiniteError: the network or the solver gave NaN or infinity.
        """
        labels = self._labels(batch_size, class_labels, guidance_scale)
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch_size, self.unet.config.in_channels, height, width)
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        x_t = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self.unet.dtype)
        x_t = x_t * getattr(self.scheduler, "init_noise_sigma", 1.0)  # those of flow matching have none, and scale nothing
        scaled = getattr(self.scheduler, "scale_model_input", lambda x_t, t: x_t)
        # Solvers of ODEs draw nothing and have no such argument.
        chance = {"generator": generator} if "generator" in inspect.signature(self.scheduler.step).parameters else {}
        for t in self.progress_bar(self.scheduler.timesteps):
            prediction = self._predict(scaled(x_t, t), t, labels, guidance_scale)
            x_t = self.scheduler.step(prediction, t, x_t, **chance).prev_sample
        if not x_t.isfinite().all():
            raise NotFiniteError(f"{type(self.scheduler).__name__} with {num_inference_steps} steps drew images that are not finite")
        images = (x_t / 2 + 0.5).clamp(0, 1)
        self.maybe_free_model_hooks()
        if output_type != "pt":
            images = images.float().cpu().permute(0, 2, 3, 1).numpy()
            images = self.numpy_to_pil(images) if output_type == "pil" else images
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _labels(self, batch_size: int, class_labels: Sequence[int] | Tensor | None, guidance_scale: float) -> Tensor | None:
        check_labels(self, class_labels, guidance_scale)
        if class_labels is None:
            return None
        labels = torch.as_tensor(class_labels, dtype=torch.long, device=self._execution_device)
        if labels.shape != (batch_size,):
            raise InputError(f"class_labels has shape {tuple(labels.shape)}, but must have one label for each of {batch_size} images")
        return labels

    def _predict(self, x_t: Tensor, t: Tensor, labels: Tensor | None, guidance_scale: float) -> Tensor:
        """What the scheduler takes: the guided prediction, and the values of a learned variance (of the label) if it uses them."""
        C = self.unet.config.in_channels
        if labels is None or guidance_scale == 1:
            output = self.unet(x_t, t, labels).sample
            prediction, values = output[:, :C], output[:, C:]
        else:
            null = torch.full_like(labels, self.config.null_label)
            output, without = self.unet(x_t.repeat(2, 1, 1, 1), t, torch.cat([labels, null])).sample.chunk(2)
            prediction, values = without[:, :C] + guidance_scale * (output[:, :C] - without[:, :C]), output[:, C:]
        return torch.cat([prediction, values], dim=1) if self._uses_variance else prediction

    @property
    def _uses_variance(self) -> bool:
        """DDPM alone; the others keep the name of the variance in their configuration, but know nothing of it."""
        return isinstance(self.scheduler, DDPMScheduler) and self.scheduler.config.variance_type.startswith("learned")


def check_labels(pipeline: PixelPipeline, class_labels: Sequence[int] | Tensor | None, guidance_scale: float) -> None:
    """Raises InputError where a model does not have the labels or the guidance asked for."""
    classes = pipeline.num_classes
    if class_labels is not None and classes == 0:
        raise InputError("class_labels are given, but the model is unconditional; leave them out")
    if class_labels is None and classes:
        raise InputError(f"class_labels are missing, but the model has {classes} classes; give one from 0 to {classes - 1} for each image")
    if wrong := sorted({int(k) for k in class_labels if not 0 <= int(k) < classes} if class_labels is not None else ()):
        raise InputError(f"class_labels has {wrong[0]}, but the model's classes are 0 to {classes - 1}")
    if guidance_scale != 1 and pipeline.config.null_label is None:
        raise InputError(f"guidance_scale is {guidance_scale}, but the model was not trained with dropped labels; take --guidance_scale 1")


def load_pipeline(model: str) -> PixelPipeline:
    """A pipeline from a run directory, a pipeline folder or a Hub id. Weights are read from safetensors only.

    Raises:
        InputError: there is no model, or a file of it is damaged; names it.
    """
    folder = Path(model)
    if not model or (folder.exists() and not (folder / "model_index.json").is_file()):
        raise InputError(f"{model or 'an empty name'} holds no model (no model_index.json); train one, or name another folder")
    if not folder.exists() and (model.count("/") != 1 or model.startswith((".", "~", "/"))):
        raise InputError(f"{model} does not exist; name a run directory, a pipeline folder or a Hub id such as user/name")
    logging.disable_progress_bar()  # of loading two components
    try:
        pipeline: PixelPipeline = PixelPipeline.from_pretrained(model, use_safetensors=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"model {model} cannot be loaded: {reason}") from error
    if missing := [name for name, parameter in pipeline.unet.named_parameters() if parameter.is_meta]:
        raise InputError(f"model {model} cannot be loaded: its weight file lacks {missing[0]}")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
