"""Sampling with text-to-image models: prompts, a negative prompt, sizes."""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import hub_names
from ..config.prompts import prompts_hash, read_prompts
from ..config.schema.sampling import SampleConfig
from ..data.labels import shortened_list
from ..diffusion.noise_schedule import predicted_x_0
from ..errors import InputError, shortened
from ..hub import client
from ..pipelines import text_pipeline
from ..pipelines.lora import add_loras, load_text_model
from ..pipelines.solvers import without_last_zero
from ..pipelines.text_pipeline import Embeddings
from ..runs.lora_folder import base_of_lora, with_strength
from ..runs.model_folder import check_sampling, is_lora, knows_prompts_only, run_setting, vae_scale
from .job import (
    Conditions,
    Job,
    LoadedModel,
    folder_name,
    image_generators,
    make_ready,
    make_solver,
    no_stop,
    open_weights,
    require_dtype,
    settings_of,
)

SHOWN = 256  # pixels a side, at most, of the images of a trajectory
KEPT_EMBEDDINGS = 1024  # prompts; 630 kB each of Stable Diffusion XL
_FIELDS = ("guidance_scale", "eta", "negative_prompt", "width", "height", "spacing", "seed", "dtype", "format")


@dataclass(frozen=True)
class TextJob(Job):
    """A sampling command with a text-to-image model: image k of n prompts shows prompt k mod n."""

    prompts: tuple[str, ...]
    chunks: int  # text encoder inputs per prompt
    encode: Callable[[str], Embeddings]  # of one prompt
    null: Embeddings  # what guidance leads away from

    def draw(self, indices: Sequence[int]) -> Tensor:
        prompts = text_pipeline.joined([self.encode(prompt) for prompt in self._prompts_of(indices)])
        return text_pipeline.draw(self.pipeline, prompts, self.null, image_generators(self.config.seed, indices), **self.options)

    def watch(
        self, indices: Sequence[int], calls: Sequence[int], on_call: Callable[[int], None] = no_stop, first: int | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """A callback of the stock pipelines sees x_t alone, so the solver is watched; both are decoded."""
        scheduler, seen, count = self.pipeline.scheduler, list[tuple[Tensor, Tensor]](), 0
        step = scheduler.step

        @functools.wraps(step)  # the pipeline asks for its signature
        def watched(prediction: Tensor, t: Tensor, x_t: Tensor, *rest: Any, **options: Any) -> Any:
            nonlocal count
            stepped = step(prediction, t, x_t, *rest, **options)
            if count in calls:
                acp = scheduler.alphas_cumprod.double()[int(t)]
                x_0 = predicted_x_0(scheduler.config.prediction_type, prediction, x_t, acp.sqrt(), (1 - acp).sqrt())
                seen.append((self._shown(stepped[0][:first]), self._shown(x_0[:first])))
            on_call(count)
            count += 1
            return stepped

        scheduler.step = watched
        try:
            return self.draw(indices), seen
        finally:
            del scheduler.step

    def conditions(self, indices: Sequence[int]) -> Conditions:
        return Conditions(prompts=self._prompts_of(indices))

    def notes(self) -> list[str]:
        """How many tokens of which prompts are cut, and whether there are prompts that no image shows."""
        most = text_pipeline.tokens_read(self.pipeline, self.chunks)
        given = [*dict.fromkeys(self.prompts), *([self.config.negative_prompt] if self.config.negative_prompt else [])]
        long = {prompt: count - most for prompt, count in zip(given, text_pipeline.count_tokens(self.pipeline, given)) if count > most}
        found = []
        if long:
            shown = [repr(shortened(prompt)[:60]) for prompt in long]
            found.append(
                f"warning: {len(long)} of {len(given)} prompts are longer than the {most} tokens that the text encoders read: "
                f"{sum(long.values())} tokens at their ends are cut, of {shortened_list(shown, 1)}"
            )
        if (unused := len(self.prompts) - self.config.num_images) > 0:
            found.append(
                f"the last {unused} of {len(self.prompts)} prompts have no image; --num_images {len(self.prompts)} draws one of each"
            )
        return found

    @property
    def size(self) -> tuple[int, int]:
        return self.options["height"], self.options["width"]

    def with_steps(self, own: Any, steps: int) -> TextJob:
        """The same command with another number of steps, in place of this one, which can no longer be drawn. `own` as of `make_solver`."""
        config = replace(self.config, steps=steps)
        solver = make_solver(config, own, "off")
        self.pipeline.scheduler = solver.scheduler
        settings, options = {**self.settings, **solver.settings()}, {**self.options, "num_inference_steps": steps}
        return replace(self, config=config, name=f"{solver.name}-{steps}", settings=settings, options=options)

    def _shown(self, latents: Tensor) -> Tensor:
        return decoded_small(self.pipeline.vae, latents)

    def _prompts_of(self, indices: Sequence[int]) -> list[str]:
        return [self.prompts[k % len(self.prompts)] for k in indices]


def decoded_small(vae: Any, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) as images (B, 3, H, W) in about [-1, 1], of at most SHOWN pixels a side, on the CPU."""
    return shrunk(text_pipeline.decode(vae, latents.float()).cpu())


def shrunk(images: Tensor) -> Tensor:
    """Images (B, C, H, W) of at most SHOWN pixels a side; smaller ones as they are."""
    factor = min(1.0, SHOWN / max(images.shape[-2:]))
    return nn.functional.interpolate(images, scale_factor=factor, mode="bilinear", antialias=True) if factor < 1 else images


def load_text_to_image(config: SampleConfig, device: Any, step: int | None = None) -> LoadedModel:
    """As `generate.load_model`, for a text-to-image model."""
    require_dtype(config, device)
    pipeline, step = open_weights(
        lambda variant: load_text_model(config.model, variant, config.base_model), config.model, config.weights, step
    )
    add_loras(pipeline, config.lora)
    loaded = LoadedModel(pipeline, pipeline.scheduler, step, _fingerprint(pipeline))
    if config.dtype != "float32":
        text_pipeline.cast_unet_inputs(pipeline)
    make_ready(pipeline, config, device)
    return loaded


def make_text_job(config: SampleConfig, device: Any, step: int | None = None, loaded: LoadedModel | None = None) -> TextJob:
    """As `generate.make_job`, for a text-to-image model."""
    folder = client.configurations(config.model)
    base = client.configurations(base_of_lora(folder, config.model, config.base_model)) if is_lora(folder) else None
    check_sampling(config, folder, base)
    prompts = read_prompts(config)
    chunks = run_setting(folder, "caption_chunks") or 1
    if not isinstance(chunks, int):
        raise InputError(f"caption_chunks of {config.model} is {chunks!r}, but must be a whole number")
    loaded = loaded or load_text_to_image(config, device, step)
    pipeline = loaded.pipeline
    if _own_size(pipeline, folder) is None and not (config.width and config.height):
        raise InputError(f"{config.model} does not say how large its images are; name --width and --height")
    config = _completed(config, pipeline, folder)
    solver = make_solver(config, loaded.scheduler, "off")  # latents are not in [-1, 1]
    pipeline.scheduler = solver.scheduler
    own = {**solver.settings(), "prompts_sha256": prompts_hash(prompts), **({"caption_chunks": chunks} if chunks > 1 else {})}
    if config.lora:
        own["lora"] = _lora_labels(config)
    settings = settings_of(config, own, _FIELDS, loaded)
    steps = (
        {"timesteps": without_last_zero(solver.scheduler, solver.timesteps)} if solver.timesteps else {"num_inference_steps": solver.steps}
    )
    options = {**steps, **{name: getattr(config, name) for name in ("guidance_scale", "eta", "height", "width")}}
    return TextJob(
        config,
        pipeline,
        _name(config, pipeline, prompts, f"{solver.name}-{solver.steps}", folder),
        settings,
        options,
        prompts,
        chunks,
        functools.lru_cache(KEPT_EMBEDDINGS)(lambda prompt: text_pipeline.encode_prompts(pipeline, [prompt], chunks)),
        _null(pipeline, config.negative_prompt, chunks),
    )


def _completed(config: SampleConfig, pipeline: Any, folder: Path) -> SampleConfig:
    """The command with what was left out: the guidance as the stock pipeline has it, the size as the model was trained."""
    usual = inspect.signature(pipeline.__call__).parameters["guidance_scale"].default
    if knows_prompts_only(folder):
        usual = 1.0
    height, width = _own_size(pipeline, folder) or (None, None)
    return replace(
        config,
        guidance_scale=usual if config.guidance_scale is None else config.guidance_scale,
        height=config.height or height,
        width=config.width or width,
    )


def _own_size(pipeline: Any, folder: Path) -> tuple[int, int] | None:
    """Height and width of the images that a run has learned, or that another model says to draw; None where it says nothing."""
    if isinstance(side := run_setting(folder, "resolution"), int):  # the UNet still says the size of its base model
        return side, side
    size = pipeline.unet.config.sample_size
    height, width = size if isinstance(size, Sequence) else (size, size)
    return (height * pipeline.vae_scale_factor, width * pipeline.vae_scale_factor) if size else None


def _null(pipeline: Any, negative_prompt: str | None, chunks: int) -> Embeddings:
    if negative_prompt is None:
        return text_pipeline.null_embeddings(pipeline, text_pipeline.null_is_zeros(pipeline), chunks)
    return text_pipeline.encode_prompts(pipeline, [negative_prompt], chunks)


def _name(config: SampleConfig, pipeline: Any, prompts: Sequence[str], start: str, folder: Path) -> str:
    """The folder's name, with words of the first prompt and a hash of all."""
    words = re.sub(r"[^0-9A-Za-z]+", "_", prompts[0]).strip("_")[:30]
    what = "-".join(part for part in (words, prompts_hash(prompts)[:8]) if part)
    given = replace(
        config,
        negative_prompt=prompts_hash([config.negative_prompt])[:8] if config.negative_prompt is not None else None,
        lora=tuple(re.sub(r"[^\w.]+", "-", label) for label in _lora_labels(config)),
    )
    return folder_name(given, f"{start}-{what}", (*_FIELDS, "lora"), _completed(SampleConfig(model=""), pipeline, folder))


def _lora_labels(config: SampleConfig) -> list[str]:
    """The LoRAs of a command as NAME:STRENGTH; of a path its last part, as files may be moved."""
    named = map(with_strength, config.lora)
    return [f"{name if hub_names.is_model_id(name) else Path(name).name}:{strength}" for name, strength in named]


def _fingerprint(pipeline: Any) -> str:
    """A hash of all weights, of the tokenizers, of what "no prompt" is, and of the model's own scheduler."""
    digest = hashlib.sha256(pipeline.scheduler.to_json_string().encode())
    digest.update(repr((text_pipeline.null_is_zeros(pipeline), vae_scale(pipeline.vae.config))).encode())
    for name, part in sorted(pipeline.components.items()):
        if isinstance(part, nn.Module):
            for key, tensor in part.state_dict().items():
                digest.update(f"{name} {key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
        elif name.startswith("tokenizer"):
            digest.update(repr((name, sorted(part.get_vocab().items()), part.model_max_length, part.pad_token)).encode())
    return digest.hexdigest()
