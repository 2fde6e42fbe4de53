"""The text-to-image task: latents of images with captions, and the UNet of Stable Diffusion XL, 2.x or 1.x."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ..config.schema import TrainConfig
from ..data import images
from ..data.captions import summary
from ..data.labels import row_names
from ..data.sources import Source
from ..data.text_dataset import TextData, prompts_of_data
from ..data.validation_split import validation_seed
from ..diffusion.loss import Network
from ..diffusion.noise_schedule import make_schedule
from ..hub.model_card import model_card
from ..pipelines.loading import explained_errors, load_part
from ..pipelines.text_pipeline import count_tokens, draw, tokens_read
from ..runs.checkpoints import hash_of
from ..runs.lora_folder import BASE_RECORD
from ..sampling.job import image_seeds
from ..utils.console import say
from . import frozen_parts, lora
from .base import Batch
from .base_model import BaseModel
from .unet import require_finite

PREVIEW_PROMPTS = 4  # of the data, where none are named
PREVIEW_STEPS = 20  # of the scheduler


class TextToImageTask:
    """Images, captions and the UNet that learns their latents; a `Task`."""

    def __init__(
        self, config: TrainConfig, base: BaseModel, source: Source, accelerator: Accelerator, held_out: Source | None = None
    ) -> None:
        """Loads the frozen parts of the base model. `held_out` are the images of the validation loss.

        Raises:
            InputError: a part cannot be loaded.
        """
        assert config.data.resolution is not None
        self.config, self.base, self.accelerator = config, base, accelerator
        text, optim = config.text, config.optimization
        shape = base.latent_shape(config.data.resolution)
        self.data = TextData(source, config.data, text, optim.seed, shape, config.noise)
        self.held_out: TextData | None = None
        if held_out:
            plain = dataclasses.replace(config.data, random_flip=False)
            undropped = dataclasses.replace(text, caption_dropout=0.0, shuffle_caption=False)
            seed, noise = validation_seed(optim.seed), dataclasses.replace(config.noise, input_perturbation=0.0)
            self.held_out = TextData(held_out, plain, undropped, seed, shape, noise)
        self._scheduler()  # which is needed at the first preview only, but is wrong now
        if config.lora.lora_rank:
            with torch.device("meta"):
                self.build()  # for the names of its modules
        encoders = frozen_parts.load_text_encoders(base, accelerator.device)
        zeros = base.zeros_for_empty if text.null_caption is None else text.null_caption == "zeros"
        self.zeros, self.texts = zeros, frozen_parts.TextConditions(encoders, zeros, text.caption_chunks)
        vae = frozen_parts.load_vae(base.vae_folder, accelerator.device)
        half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(optim.mixed_precision or "no")
        # `force_upcast` says that half precision overflows.
        self.latents = frozen_parts.Latents(vae, None if vae.config.force_upcast else half)

    def say_captions(self) -> None:
        """Prints how many captions there are, and how many are missing or too long."""
        texts, pipeline = self.data.texts(), self.texts.pipeline
        tokens = dict(zip(texts, count_tokens(pipeline, texts)))
        say(summary(self.data.captions, tokens, tokens_read(pipeline, self.texts.chunks)))

    def prepare(self) -> None:
        """Computes embeddings and latents where nothing random precedes them and they fit into the memory.

        Raises:
            InputError: an image cannot be read.
        """
        held_out = self.held_out.texts() if self.held_out else ()
        texts = list(dict.fromkeys([*self.data.texts(), *held_out, *self.config.text.sample_prompts]))
        if self.data.captions_are_fixed and frozen_parts.fits(len(texts), self.texts.bytes_each, "text embeddings", self.accelerator):
            self.texts.keep(texts)
        each = 2 * 4 * (1 + self.config.data.random_flip) * torch.Size(self.data.shape).numel()
        if self.data.crops_are_fixed and frozen_parts.fits(len(self.data.images), each, "latents", self.accelerator):
            frozen_parts.keep_latents(self.data, self.latents, self.accelerator)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, h, w) of the latents."""
        return self.data.shape

    # ---- network -----------------------------------------------------------------------------------------------------

    def build(self) -> UNet2DConditionModel:
        """The UNet of the base model; with fresh weights where it has none, or without memory (device "meta"); with adapters of LoRA."""
        network: UNet2DConditionModel
        if torch.get_default_device().type == "meta" or not self.base.is_trained:
            network = UNet2DConditionModel.from_config(dict(self.base.unet))
        else:
            network = load_part(UNet2DConditionModel, self.base.folder / "unet", str(self.base.folder))
            require_finite(network.state_dict(), f"base_model {self.base.folder}")
        if self.config.lora.lora_rank:
            lora.add_adapters(network, self.config.lora)
        return network

    def load(self, network: nn.Module, model: str) -> list[str]:
        """Puts the weights of a LoRA into the adapters. (The base model has those from which the training of the whole UNet starts.)"""
        lora.load(network, model, self.config.lora)
        return []

    def trained(self, network: nn.Module) -> dict[str, nn.Parameter]:
        """All parameters of the UNet, or those of its adapters."""
        return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}

    @property
    def frozen_bytes(self) -> int:
        """Of the VAE and the text encoders; the latter leave the device where all embeddings are kept."""
        parts = (getattr(self.texts.pipeline, name, None) for name in ("text_encoder", "text_encoder_2"))
        return sum(tensor.nbytes for part in (self.latents.vae, *parts) if part is not None for tensor in part.parameters())

    # ---- batches -----------------------------------------------------------------------------------------------------

    def dummy_batch(self, size: int) -> Batch:
        """Latents of zeros without captions."""
        zeros = torch.zeros(size, *self.shape)
        texts: dict[str, Any] = {"caption": [""] * size, "dropped": torch.ones(size, dtype=torch.bool)}
        return {**texts, "mean": zeros, "std": zeros, "posterior": zeros, "time_ids": torch.zeros(size, 6)}

    def _kept(self, batch: Batch) -> tuple[Tensor, ...]:
        """Mean and standard deviation of the posterior, and time_ids, of a batch whose latents are kept."""
        assert self.data.latents is not None
        return tuple(part[batch["flipped"], batch["index"]] for part in self.data.latents)

    def x_0(self, batch: Batch, device: Any) -> Tensor:
        """(B, C, h, w) float32: a draw from the VAE's posterior, scaled."""
        if "image" in batch:
            mean, std = self.latents.posterior(batch["image"])
        else:
            mean, std = (batch["mean"], batch["std"]) if "mean" in batch else self._kept(batch)[:2]
        parts = (part.to(device, non_blocking=True) for part in (mean, std, batch["posterior"]))
        return self.latents.drawn(*parts)

    def conditioned(self, model: nn.Module, batch: Batch, device: Any) -> Network:
        """The model as a function of x_t (B, C, h, w) and the timesteps (B,), with the captions and sizes of the batch."""
        captions: Any = batch["caption"]
        found = self.texts.of(captions, batch["dropped"].tolist(), device)
        sizes = batch["time_ids"] if "time_ids" in batch else self._kept(batch)[2]
        sizes = sizes.to(device, non_blocking=True)  # float32: half precision has no odd numbers above 2048, or 256
        added = {"text_embeds": found.pooled, "time_ids": sizes} if self.base.is_xl else None
        return lambda x_t, t: model(x_t, t, found.text, added_cond_kwargs=added, return_dict=False)[0]

    # ---- what is exported and drawn ----------------------------------------------------------------------------------

    def scheduler_config(self) -> dict[str, Any]:
        """The scheduler of the base model, of the same class, with the objective of the run."""
        objective = self.config.objective
        trained = {"prediction_type": objective.prediction_type, **make_schedule(objective).diffusers}
        same = all(getattr(objective, name) == value for name, value in self.base.objective().items())
        return dict(self.base.scheduler) if same else {**self.base.scheduler, **trained}

    def frozen_files(self) -> Mapping[str, Path]:
        """The files of the base model that the exported pipeline has, too, but for those that `export` writes; none beside a LoRA."""
        if self.config.lora.lora_rank:
            return {}
        return {name: path for name, path in self.base.frozen_files().items() if not name.startswith("scheduler/")}

    def export(self, network: nn.Module, folder: Path) -> None:
        """Writes what is not the base model's own: the UNet, the scheduler's configuration and model_index.json; or adapters."""
        if self.config.lora.lora_rank:
            lora.save(network, self.base.is_xl, folder)
            record = self.base.record(self.config.text, self.zeros, self.scheduler_config(), self._hashes)
            (folder / BASE_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            return
        unet: Any = network
        unet.save_pretrained(folder / "unet", safe_serialization=True)
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(self.scheduler_config(), indent=2) + "\n", encoding="utf-8")
        (folder / "model_index.json").write_text(self.base.exported_index(self.zeros), encoding="utf-8")

    def model_card(self, config: TrainConfig, step: int, measured: Mapping[str, Any] | None) -> str:
        """README.md of a run at a step."""
        other = bool(config.lora.lora_rank) and self.scheduler_config() != dict(self.base.scheduler)
        return model_card(config, step, 0, len(self.data.images), measured, {}, own_scheduler=other)

    def describe(self) -> Sequence[str]:
        """Images, captions, latents, and what is frozen."""
        kind = "Stable Diffusion XL" if self.base.is_xl else "Stable Diffusion"
        dropped = "zeros" if self.zeros else 'the encoding of ""'
        adapters = self.config.lora
        scale = f"rank {adapters.lora_rank}, alpha {adapters.lora_alpha or adapters.lora_rank}, on {', '.join(adapters.lora_targets)}"
        return [
            f"images: {len(self.data.images)}, as latents of {'x'.join(map(str, self.shape))}; {len(self.data.texts())} different captions",
            f"base_model: {self.config.text.base_model} ({kind}); its text encoders and VAE stay as they are",
            f"no caption: {self.config.text.caption_dropout:.0%} of the captions, as {dropped}",
            *([f"LoRA: {scale}"] if adapters.lora_rank else []),
        ]

    def picture(self, batch: Batch) -> Any:
        """The images of a batch as the VAE decodes them, in a grid."""
        decoded = self.latents.decoded(self.x_0(batch, self.accelerator.device))
        return images.grid([images.from_array(image.numpy()) for image in decoded])

    def state(self) -> dict[str, Any]:
        """Network, and the hash of the files that stay as they are, where the first process writes it down."""
        network = {name: value for name, value in self.base.unet.items() if not name.startswith("_")}
        return {"network": network, "frozen_parts": self._frozen_hash() if self.accelerator.is_main_process else ""}

    def _frozen_hash(self) -> str:
        digest = hashlib.sha256()
        for name, hash_of_file in self._hashes.items():
            digest.update(f"{name} {hash_of_file}\n".encode())
        return digest.hexdigest()

    @cached_property
    def _hashes(self) -> Mapping[str, str]:
        """Of the files of the base model that stay as they are; beside adapters these are all."""
        found = {}
        for name, path in (self.base.read_files() if self.config.lora.lora_rank else self.frozen_files()).items():
            with open(path, "rb") as file:
                found[name] = hash_of(file)
        return found

    def conditions(self, count: int, as_in_data: bool) -> Sequence[str]:
        """Prompts: as `prompts_of_data` has them, or those of the configuration, or the first captions of the data."""
        if as_in_data:
            return prompts_of_data(self.data.captions)[:count]
        return self.config.text.sample_prompts or list(dict.fromkeys(each[0] for each in self.data.captions if each))[:PREVIEW_PROMPTS]

    def condition_names(self, conditions: Sequence[str]) -> Sequence[str]:
        """The beginnings of the prompts."""
        return row_names(range(len(conditions)), list(conditions))

    def draw(self, network: nn.Module, indices: Sequence[int], conditions: Sequence[str]) -> Tensor:
        """Images (len(indices), 3, H, W) uint8 on the CPU, image k from the seed k and the prompt `conditions[k]`, in turn."""
        device, side = self.accelerator.device, self.data.resolution
        pipeline = self._pipeline(network)
        prompts = self.texts.of([conditions[k % len(conditions)] for k in indices], [False] * len(indices), device)
        generators = [torch.Generator().manual_seed(seed) for seed in image_seeds(0, indices)]
        options = {"num_inference_steps": PREVIEW_STEPS, "guidance_scale": self.config.text.sample_guidance_scale}
        return draw(pipeline, prompts, self.texts.null, generators, height=side, width=side, **options).cpu()

    def _scheduler(self) -> Any:
        """A scheduler of the exported pipeline.

        Raises:
            InputError: diffusers has no such class, or it does not take its configuration.
        """
        values = self.scheduler_config()
        with explained_errors(f"{self.base.folder}/scheduler"):
            return getattr(diffusers, values["_class_name"]).from_config(values)

    def _pipeline(self, network: nn.Module) -> Any:
        """The stock pipeline with a network, without text encoders, and with the scheduler class of the base model."""
        parts = {"vae": self.latents.vae, "unet": network, "scheduler": self._scheduler(), "tokenizer": None, "text_encoder": None}
        if self.base.is_xl:
            more: dict[str, Any] = {"tokenizer_2": None, "text_encoder_2": None, "add_watermarker": False}
            pipeline: Any = diffusers.StableDiffusionXLPipeline(**parts, **more)
        else:
            more = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            pipeline = diffusers.StableDiffusionPipeline(**parts, **more)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
