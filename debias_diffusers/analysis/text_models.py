"""Text-to-image models of an analysis: latents in place of pixels, the UNet with captions and sizes, sampling with prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config.schema.data import DataConfig, TextConfig
from ..config.schema.evaluation import BiasConfig
from ..config.schema.sampling import SampleConfig
from ..data.captions import CaptionedSource
from ..data.sources.base import Source
from ..data.sources.opening import open_readable
from ..data.sources.subset import SourceSubset
from ..data.text_dataset import TextData, prompts_of_data
from ..errors import InputError
from ..evaluation.reference import caption_column
from ..pipelines.text_pipeline import Embeddings, decode, encode, joined
from ..runs.model_folder import vae_scale
from ..sampling.job import LoadedModel
from ..sampling.text_job import decoded_small, make_text_job
from .denoising import MeanColours
from .models import Examples, Model, scheduler_of, steps_of

VAE_PIXELS = 1 << 20  # of the images that are encoded or decoded at once: one of 1024 pixels a side, four of 512


class ConditionedUNet(nn.Module):
    """The UNet of a text-to-image model with the conditions of N images, of which it is given the numbers in place of labels."""

    def __init__(self, unet: Any, embeddings: Embeddings, time_ids: Tensor) -> None:
        """`embeddings` of N captions, `time_ids` (N, 6) as of `TextData`, which SDXL alone takes; both stay on the CPU."""
        super().__init__()
        self.unet, self.embeddings, self.time_ids, self.config = unet, embeddings, time_ids, unet.config

    def forward(self, x_t: Tensor, timestep: Any, numbers: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """(prediction (B, C, h, w),) of x_t (B, C, h, w) at a timestep, for the images of some numbers (B,)."""
        rows, device, added = numbers.cpu(), x_t.device, None
        if self.embeddings.pooled is not None:
            added = {"text_embeds": self.embeddings.pooled[rows].to(device), "time_ids": self.time_ids[rows].to(device)}
        return (self.unet(x_t, timestep, self.embeddings.text[rows].to(device), added_cond_kwargs=added, return_dict=False)[0],)


def require_same_conditions(one: Model, other: Model) -> None:
    """Raises InputError for two text-to-image models whose text embeddings differ, so that neither network can predict for the other."""
    if one.job and other.job:
        pairs = zip(_embeddings_of(one), _embeddings_of(other))
        if not all(torch.equal(a, b) for a, b in pairs):
            raise InputError("the text embeddings of the two runs differ, so that their networks cannot be swapped; leave --swap out")


def _embeddings_of(model: Model) -> list[Tensor]:
    """Those of the captions and of "no caption"."""
    found = (model.denoiser.network.embeddings, model.job.null if model.job else None)
    return [part for each in found if each for part in (each.text, each.pooled) if part is not None]


class TextImages:
    """The captioned images of a reference, cropped to squares at their centre, as text-to-image models of one VAE see them."""

    def __init__(self, config: BiasConfig, chosen: DataConfig, models: Sequence[Model]) -> None:
        """Reads the captions.

        Raises:
            InputError: the models differ in VAE or size, or the data cannot be read, or have no captions.
        """
        _require_same_vae(models)
        self.config, self.pipeline, self.side, self.channels = config, models[0].pipeline, _side(models), 3
        given = dataclasses.replace(chosen, resolution=self.side, num_workers=0)
        column = config.caption_column or (caption_column(config.runs) if config.reference is None else None)
        self.source = _captioned(open_readable(given), column)
        latents = self.side // self.pipeline.vae_scale_factor
        shape = (self.pipeline.vae.config.latent_channels, latents, latents)
        self.data = TextData(self.source, given, TextConfig(), config.seed, shape)

    def examples(self, indices: Sequence[int]) -> Examples:
        """The latents of the images of some indices: the means of the VAE's posterior, scaled as in training. Each has one of its captions.

        Raises:
            InputError: an image cannot be read.
        """
        x_0, time_ids = list[Tensor](), list[Tensor]()
        for part in torch.tensor(indices).split(self._at_once):
            pixels, sizes = zip(*(self.data.pixels(k, flipped=False, position=0) for k in part.tolist()))
            images = torch.stack(pixels).to(self.pipeline.vae.device).float() / 127.5 - 1
            x_0.append(encode(self.pipeline.vae, images).cpu())
            time_ids += sizes
        captions = [found[index % len(found)] if (found := self.data.captions[index]) else None for index in indices]
        return Examples(indices, torch.cat(x_0), torch.arange(len(indices)), torch.stack(time_ids), captions)

    def conditioned(self, model: Model, examples: Examples, device: Any) -> Model:
        """A model with the captions of the examples, and with a sampling job. Its text encoders are no longer there.

        An image without a caption is given what "no caption" is in training; sampled images have prompts of `prompts_of_data`.
        """
        prompts = tuple(prompts_of_data(self.data.captions, self.config.num_samples))
        loaded = LoadedModel(model.pipeline, model.scheduler, model.step, "")
        job = make_text_job(self._command(model, prompts), device, loaded=loaded)
        known = {text: job.encode(text) for text in dict.fromkeys([*prompts, *examples.captions]) if text is not None}
        model.pipeline.register_modules(**{name: None for name in model.pipeline.components if name.startswith("text_encoder")})
        embeddings = joined([job.null if caption is None else known[caption] for caption in examples.captions])
        assert examples.time_ids is not None
        network = ConditionedUNet(model.pipeline.unet, embeddings, examples.time_ids)
        denoiser = dataclasses.replace(model.denoiser, network=network)
        return dataclasses.replace(model, denoiser=denoiser, job=dataclasses.replace(job, encode=known.__getitem__))

    def _command(self, model: Model, prompts: tuple[str, ...]) -> SampleConfig:
        return SampleConfig(
            model=model.name,
            prompt=prompts,
            scheduler=scheduler_of(self.config, model),
            steps=steps_of(self.config, [model])[model.label][0],
            num_images=self.config.num_samples,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            weights=self.config.weights,
            guidance_scale=self.config.guidance_scale,
            width=self.side,
            height=self.side,
            base_model=self.config.base_model if model.is_lora else None,
        )

    def colours(self, x_0: Tensor) -> MeanColours:
        """Of the images to which latents are decoded."""
        return MeanColours(self._mean_colours, self._mean_colours(x_0))

    def _mean_colours(self, latents: Tensor) -> Tensor:
        """(B, 3) float64 on the CPU, of images that are not clipped."""
        return torch.cat([decode(self.pipeline.vae, part).double().mean((2, 3)).cpu() for part in self._parts(latents)])

    def pictures(self, latents: Tensor) -> Tensor:
        """Latents as images (B, 3, H, W) in about [-1, 1], of at most 256 pixels a side, on the CPU."""
        return torch.cat([decoded_small(self.pipeline.vae, part) for part in self._parts(latents)])

    def _parts(self, latents: Tensor) -> Iterator[Tensor]:
        return (part.to(self.pipeline.vae.device) for part in latents.split(self._at_once))

    @property
    def _at_once(self) -> int:
        return max(1, VAE_PIXELS // self.side**2)


def _captioned(source: Source, column: str | None) -> Source:
    """A source of `open_readable` with its captions."""
    if isinstance(source, SourceSubset):
        return SourceSubset(CaptionedSource(source.source, column), source.skipped)
    return CaptionedSource(source, column)


def _side(models: Sequence[Model]) -> int:
    """The size of the images in pixels: what runs were trained with; without a run, what the models draw."""
    trained = {model.name: side for model in models if (side := model.values.get("resolution"))}
    sides: dict[str, Any] = trained or {model.name: _drawn_side(model) for model in models}
    (first, side), *others = sides.items()
    for name, other in others:
        if other != side:
            raise InputError(f"{first} has images of {side} pixels, but {name} of {other}; name models of one size")
    return int(side)


def _drawn_side(model: Model) -> int:
    size = model.pipeline.unet.config.sample_size
    if not isinstance(size, int):
        raise InputError(f"{model.name} does not say which square images it draws, and is no run; name a run, or another model")
    return int(size * model.pipeline.vae_scale_factor)


def _require_same_vae(models: Sequence[Model]) -> None:
    """Raises InputError unless latents are the same for all models."""
    first = models[0].pipeline.vae
    weights = first.state_dict()
    for model in models[1:]:
        vae = model.pipeline.vae
        own, same = vae.state_dict(), vae_scale(vae.config) == vae_scale(first.config)
        if not same or own.keys() != weights.keys() or not all(torch.equal(own[name], weights[name]) for name in own):
            raise InputError(f"{models[0].name} and {model.name} have different VAEs, so that their latents cannot be compared")
