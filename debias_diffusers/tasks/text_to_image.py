"""The text-to-image task: latents of images with captions, and the UNet of Stable Diffusion XL, 2.x or 1.x."""

from __future__ import annotations

import copy
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

from ..config.schema.training import TrainConfig
from ..data import images
from ..data.buckets import Buckets
from ..data.captions import counted_captions, first_captions, summary
from ..data.labels import row_names
from ..data.sources.base import Source
from ..data.sources.subset import RepeatedSource
from ..data.text_dataset import TextData, prompts_of_data
from ..data.validation_split import validation_seed
from ..diffusion.loss import Network
from ..diffusion.noise_schedule import make_schedule
from ..hub.model_card import model_card
from ..pipelines.loading import explained_errors, load_part, require_finite
from ..pipelines.text_pipeline import ENCODED_AT_ONCE, Embeddings, count_tokens, draw, token_ids, tokens_read, zero_snr_scheduler
from ..runs.lora_folder import BASE_RECORD
from ..sampling.job import image_generators
from ..utils.console import say
from ..utils.distributed import broadcast_from_first
from ..utils.files import hash_of
from ..utils.tensor_memory import sent
from . import frozen_parts, lora, precompute
from .base import ONE_FILE, Batch, sent_locked
from .base_model import SIZE_IDS, BaseModel

PREVIEW_PROMPTS = 4  # of the data, where none are named
PREVIEW_STEPS = 20  # of the scheduler


class TextToImageTask:
    """Images, captions and the UNet that learns their latents; a `Task`."""

    def __init__(
        self, config: TrainConfig, base: BaseModel, source: Source, accelerator: Accelerator, held_out: Source | None = None
    ) -> None:
        """Loads the frozen parts of the base model, unless they may not be needed. `held_out` are the images of the validation loss.

        Raises:
            InputError: a part cannot be loaded.
        """
        assert config.data.resolution is not None
        self.config, self.base, self.accelerator = config, base, accelerator
        text, optim = config.text, config.optimization
        shape = base.latent_shape(config.data.resolution)
        self.data = TextData(source, config.data, text, optim.seed, shape, config.noise, self._buckets(source), optim.batch_size)
        self.held_out: TextData | None = None
        if held_out:
            plain = dataclasses.replace(config.data, random_flip=False)
            undropped = dataclasses.replace(text, caption_dropout=0.0, shuffle_caption=False)
            seed, noise = validation_seed(optim.seed), dataclasses.replace(config.noise, input_perturbation=0.0)
            self.held_out = TextData(held_out, plain, undropped, seed, shape, noise, self._buckets(held_out))
        self._scheduler()  # which is needed at the first preview only, but is wrong now
        self.zeros = base.zeros_for_empty if text.null_caption is None else text.null_caption == "zeros"
        # Text encoders that get adapters are part of the network; these are what it is built from.
        place = torch.device("cpu") if config.lora.lora_text_encoders else accelerator.device
        self.texts = frozen_parts.TextConditions(base, place, self.zeros, text.caption_chunks)
        self.latents = frozen_parts.Latents(base, accelerator.device, optim.mixed_precision or "no")
        # A dry run writes nothing, and computes as a run without the folder.
        self.folder = None if config.run.dry_run else text.precompute_dir
        if not self.folder or config.lora.lora_text_encoders:
            self.texts.load()
            _ = self.latents.vae  # which loads it
        if config.lora.lora_rank:
            with torch.device("meta"):
                self.build()  # for the names of its modules

    def _buckets(self, source: Source) -> Buckets | None:
        """The sizes of the images of a source, each once; None where all are square."""
        if not self.config.text.aspect_ratio_buckets:
            return None
        once = source.source if isinstance(source, RepeatedSource) else source
        assert self.config.data.resolution is not None
        sizes = precompute.image_sizes(once, self.accelerator, self.config.data.skip_bad)
        return Buckets(sizes, self.config.data.resolution, self.base.side_unit)

    def say_data(self) -> None:
        """Prints how many captions there are, how many are missing or too long, and the sizes of the images, if they have several."""
        texts, pipeline = self.data.texts(), self.texts.pipeline
        counted = counted_captions(texts)
        tokens = dict(zip(counted, count_tokens(pipeline, counted)))
        say(summary(self.data.captions, tokens, tokens_read(pipeline, self.texts.chunks), len(texts)))
        if sizes := self.data.describe_sizes():
            say(sizes)

    def prepare(self, positions: Sequence[int] | None = None) -> None:
        """Computes embeddings and latents where nothing random precedes them and they fit into the memory, or are kept in a folder.

        Args:
            positions: whose captions and images are encoded, by a dry run; all if left out, which may take hours.

        Raises:
            InputError: an image cannot be read.
            CannotWriteError: the folder cannot be written to, or its disk has not enough room.
        """
        if self.folder:
            self._precompute(self.folder, self._prompts())
            return
        in_folder = self.config.text.precompute_dir is not None  # which a dry run leaves as it is
        if self._embeddings_are_fixed and (prompts := self._prompts() if in_folder else self._prompts_that_fit()) is not None:
            self.texts.keep(prompts if positions is None else self.data.texts_of(positions), self.accelerator)
        count = len(self.data.images) * len(self.data.possible_flips)
        if self.data.crops_are_fixed and (in_folder or frozen_parts.fits(count, self._latent_bytes, "latents", self.accelerator)):
            entries = None if positions is None else self.data.images_of(positions)
            frozen_parts.keep_latents(self.data, self.latents, self.accelerator, entries)
            self.latents.leave()

    def _prompts_that_fit(self) -> list[str] | None:
        """As `_prompts`, if their embeddings may be kept in memory. Of millions of captions no list is made unless they fit."""
        if self._embeddings_fit(self.data.texts()) and self._embeddings_fit(prompts := self._prompts()):
            return prompts
        return None

    def _prompts(self) -> list[str]:
        """All texts that the run encodes: captions and prompts of previews."""
        held_out = self.held_out.texts() if self.held_out else ()
        return list(dict.fromkeys([*self.data.texts(), *held_out, *self.config.text.sample_prompts]))

    def _embeddings_fit(self, texts: Sequence[str]) -> bool:
        return frozen_parts.fits(len(texts), self.texts.bytes_each, "text embeddings", self.accelerator)

    @property
    def _embeddings_are_fixed(self) -> bool:
        """Whether a caption always has the same embeddings, so that they can be kept."""
        return self.data.captions_are_fixed and not self.config.lora.lora_text_encoders

    def _precompute(self, folder: str, texts: Sequence[str]) -> None:
        """Fills the folder, and reads from it."""
        made, acc = Path(folder), self.accelerator
        if not self.data.crops_are_fixed and acc.is_main_process:
            say("latents are computed in every step, because each has a crop of its own; --crop_per_image, or --crop center, keeps them")
        embeddings: precompute.Precomputation[str | None] | None = None
        latents: precompute.Precomputation[tuple[int, bool]] | None = None
        missing = dict[str, tuple[int, int]]()
        if self._embeddings_are_fixed:
            embeddings = precompute.Precomputation(made / "text_embeddings", "text embeddings", self._text_keys(texts), acc)
            if embeddings.missing:
                missing["text embeddings"] = len(embeddings.missing), self.texts.bytes_each
        if self.data.crops_are_fixed:
            latents = precompute.Precomputation(made / "latents", "latents", self._latent_keys(), acc)
            if latents.missing:
                missing["latents"] = len(latents.missing), self._latent_bytes
        if missing:
            precompute.say_size(folder, missing, acc)
        if embeddings:
            self.texts.read_from(embeddings.filled([([None], 1), (texts, ENCODED_AT_ONCE)], self.texts.encode))
        if latents:
            encoder = frozen_parts.ImageEncoder(self.data, self.latents)
            self.data.stored = latents.filled(encoder.groups(), encoder)
            self.latents.leave()

    def _text_keys(self, texts: Sequence[str]) -> dict[str | None, bytes]:
        """The keys of the embeddings of texts, and of "no caption"."""
        files = self._files_of("text_encoder", "tokenizer")
        same = precompute.key_of(kind="text embeddings", files=files, chunks=self.texts.chunks, precision="no", device=self._device).hex()
        null = precompute.key_of(same=same, caption=None, zeros=self.zeros)
        return {None: null, **{text: precompute.key_of(same=same, caption=text) for text in texts}}

    def _latent_keys(self) -> dict[tuple[int, bool], bytes]:
        """The keys of the latents of all images, as they are and mirrored where they may be."""
        data = self.data
        hashes = precompute.picture_hashes(data.images, self.accelerator)
        of_vae = {"files": self._files_of("vae"), "precision": self.latents.precision, "device": self._device}
        resampling = images.RESAMPLING + " of a JPEG draft" * data.config.jpeg_draft
        same = precompute.key_of(kind="latents", resampling=resampling, **of_vae).hex()
        return {
            (index, flipped): precompute.key_of(
                same=same, picture=picture, size=data.size(index), crop=data.fixed_crop(index), flipped=flipped
            )
            for flipped in data.possible_flips
            for index, picture in enumerate(hashes)
        }

    @property
    def _device(self) -> str:
        """The kind of device, on which it depends how numbers are rounded."""
        return str(self.accelerator.device.type)

    @property
    def _latent_bytes(self) -> int:
        """Of what is kept of an image, mirrored or not."""
        return 2 * 4 * torch.Size(self.shape).numel() + 4 * SIZE_IDS

    def _bytes_on_disk(self) -> dict[str, int]:
        """What `precompute_dir` keeps of the training images and their captions."""
        latents = len(self.data.images) * len(self.data.possible_flips) * self._latent_bytes
        embeddings = len(self.data.texts()) * self.texts.bytes_each
        found = (("latents", self.data.crops_are_fixed, latents), ("text embeddings", self._embeddings_are_fixed, embeddings))
        return {what: size for what, fixed, size in found if fixed}

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, h, w) of the latents."""
        return self.data.shape

    # ---- network -----------------------------------------------------------------------------------------------------

    def build(self) -> nn.Module:
        """The UNet of the base model; with fresh weights where it has none, or without memory (device "meta"); with adapters of LoRA."""
        network: nn.Module
        on_meta = torch.get_default_device().type == "meta"
        if on_meta or not self.base.is_trained:
            network = UNet2DConditionModel.from_config(dict(self.base.unet))
        else:
            network = load_part(UNet2DConditionModel, self.base.folder / "unet", str(self.base.folder))
            require_finite(network.state_dict(), f"base_model {self.base.folder}")
        if self.config.lora.lora_rank:
            encoders = self._own_text_encoders() if self.config.lora.lora_text_encoders else {}
            lora.add_adapters({"unet": network, **encoders}, self.config.lora)
            if encoders:
                return lora.UNetWithTextEncoders(network, encoders, self.zeros, self.texts.chunks)
        return network

    def _own_text_encoders(self) -> dict[str, Any]:
        """Copies of the text encoders, without memory on the device "meta"."""
        pipeline = self.texts.load()
        encoders = {name: getattr(pipeline, name) for name in self.base.parts if name.startswith("text_encoder")}
        if torch.get_default_device().type == "meta":
            return {name: type(encoder)(encoder.config) for name, encoder in encoders.items()}
        return {name: copy.deepcopy(encoder) for name, encoder in encoders.items()}

    def load(self, network: nn.Module, model: str) -> list[str]:
        """Puts the weights of a LoRA into the adapters. (The base model has those from which the training of the whole UNet starts.)"""
        lora.load(network, model, self.config.lora)
        return []

    @property
    def frozen_bytes(self) -> int:
        """Of the VAE and the text encoders; the latter leave the device where all embeddings are kept.

        Text encoders with adapters are part of the network.
        """
        if self.config.lora.lora_text_encoders:
            return sum(tensor.nbytes for tensor in self.latents.vae.parameters())
        parts = (getattr(self.texts.load(), name, None) for name in ("text_encoder", "text_encoder_2"))
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
        return self.latents.drawn(*(sent_locked(part, device) for part in (mean, std, batch["posterior"])))

    def conditioned(self, model: nn.Module, batch: Batch, device: Any) -> Network:
        """The model as a function of x_t (B, C, h, w) and the timesteps (B,), with the captions and sizes of the batch."""
        captions: Any = batch["caption"]
        sizes = batch["time_ids"] if "time_ids" in batch else self._kept(batch)[2]
        sizes = sent(sizes, device)  # float32: half precision has no odd numbers above 2048, or 256
        if self.config.lora.lora_text_encoders:
            ids, dropped = self._ids(captions, batch["dropped"], device)
            return lambda x_t, t: model(x_t, t, ids, dropped, sizes)
        found = self.texts.of(captions, batch["dropped"].tolist(), device)
        added = {"text_embeds": found.pooled, "time_ids": sizes} if self.base.is_xl else None
        return lambda x_t, t: model(x_t, t, found.text, added_cond_kwargs=added, return_dict=False)[0]

    def _ids(self, captions: Sequence[str], dropped: Tensor, device: Any) -> tuple[list[Tensor], Tensor]:
        """What text encoders with adapters read: ids of captions, or of the empty prompt where they are dropped; and which are."""
        texts = ["" if left_out else caption for caption, left_out in zip(captions, dropped.tolist())]
        ids = token_ids(self.texts.pipeline, texts, self.texts.chunks)
        return [sent(each, device) for each in ids], sent(dropped, device)

    def _embeddings(self, network: nn.Module, captions: Sequence[str], dropped: Sequence[bool]) -> Embeddings:
        """The embeddings of captions, and of "no caption" where one is dropped, as the network has learned them, too."""
        device = self.accelerator.device
        if not isinstance(network, lora.UNetWithTextEncoders):
            return self.texts.of(captions, dropped, device)
        with torch.no_grad():
            text, pooled = network.embeddings(*self._ids(captions, torch.tensor(dropped), device))
        return Embeddings(text, pooled if self.base.is_xl else None)

    # ---- what is exported and drawn ----------------------------------------------------------------------------------

    def scheduler_config(self) -> dict[str, Any]:
        """The scheduler of the base model, of the same class if it can be, with the objective of the run."""
        objective, own = self.config.objective, self.base.objective()
        if all(getattr(objective, name) == value for name, value in own.items()):
            return dict(self.base.scheduler)
        found = {**self.base.scheduler, "prediction_type": objective.prediction_type, **make_schedule(objective).diffusers}
        if objective.rescale_betas_zero_snr == own["rescale_betas_zero_snr"]:
            return found
        return zero_snr_scheduler(found) if objective.rescale_betas_zero_snr else {**found, "rescale_betas_zero_snr": False}

    def frozen_files(self) -> Mapping[str, Path]:
        """The files of the base model that the exported pipeline has, too, but for those that `export` writes; none beside a LoRA."""
        if self.config.lora.lora_rank:
            return {}
        return {name: path for name, path in self.base.frozen_files().items() if not name.startswith("scheduler/")}

    def export(self, network: nn.Module, folder: Path) -> None:
        """Writes what is not the base model's own: the UNet, the scheduler's configuration and model_index.json; or adapters."""
        if self.config.lora.lora_rank:
            lora.save(network, self.base.is_xl, folder)
            record = self.base.record(self.config.text, self.zeros, self.scheduler_config(), self._file_hashes)
            (folder / BASE_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            return
        unet: Any = network
        unet.save_pretrained(folder / "unet", safe_serialization=True, max_shard_size=ONE_FILE)
        scheduler = self.scheduler_config()
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n", encoding="utf-8")
        (folder / "model_index.json").write_text(self.base.exported_index(self.zeros, scheduler), encoding="utf-8")

    def model_card(self, config: TrainConfig, step: int, measured: Mapping[str, Any] | None) -> str:
        """README.md of a run at a step."""
        other = bool(config.lora.lora_rank) and self.scheduler_config() != dict(self.base.scheduler)
        return model_card(config, step, 0, len(self.data.images), measured, {}, own_scheduler=other)

    def describe(self) -> Sequence[str]:
        """Images, captions, latents, and what is frozen."""
        folder, kept = self.config.text.precompute_dir, self._bytes_on_disk()
        kind, sizes = "Stable Diffusion XL" if self.base.is_xl else "Stable Diffusion", self.data.describe_sizes()
        dropped = "zeros" if self.zeros else 'the encoding of ""'
        adapters = self.config.lora
        scale = f"rank {adapters.lora_rank}, alpha {adapters.lora_alpha or adapters.lora_rank}, on {', '.join(adapters.lora_targets)}"
        return [
            f"images: {len(self.data.images)}, as latents of {'about ' * bool(sizes)}{'x'.join(map(str, self.shape))}; "
            f"{len(self.data.texts())} different captions",
            *([sizes] if sizes else []),
            f"base_model: {self.config.text.base_model} ({kind}); its text encoders and VAE stay as they are",
            f"no caption: {self.config.text.caption_dropout:.0%} of the captions, as {dropped}",
            *([f"precompute_dir: {folder}, where {' and '.join(kept)} take {sum(kept.values()) / 1e6:.1f} MB"] if folder else []),
            *([f"LoRA: {scale}" + (", and on the text encoders" if adapters.lora_text_encoders else "")] if adapters.lora_rank else []),
        ]

    def picture(self, batch: Batch) -> Any:
        """The images of a batch as the VAE decodes them, in a grid."""
        decoded = self.latents.decoded(self.x_0(batch, self.accelerator.device))
        return images.grid([images.from_array(image.numpy()) for image in decoded])

    def state(self) -> dict[str, Any]:
        """Network, and the hash of the files that stay as they are."""
        network = {name: value for name, value in self.base.unet.items() if not name.startswith("_")}
        return {"network": network, "frozen_parts": broadcast_from_first(self._frozen_hash, self.accelerator)}

    def _frozen_hash(self) -> str:
        return hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in self._file_hashes.items()).encode()).hexdigest()

    @cached_property
    def _file_hashes(self) -> dict[str, str]:
        """The sha256 of each file of the base model that stays as it is; beside adapters these are all."""
        files = self.base.read_files() if self.config.lora.lora_rank else self.frozen_files()
        return {name: hash_of(path) for name, path in files.items()}

    def _files_of(self, *parts: str) -> dict[str, str]:
        """The sha256 of the frozen files of some parts, and of those with the same name and a number. All processes must call it."""
        every = broadcast_from_first(lambda: self._file_hashes, self.accelerator)
        return {name: digest for name, digest in every.items() if name.split("/")[0].removesuffix("_2") in parts}

    def conditions(self, count: int, as_in_data: bool) -> Sequence[str]:
        """Prompts: as `prompts_of_data` has them, or those of the configuration, or the first captions of the data."""
        if as_in_data:
            return prompts_of_data(self.data.captions, count)
        return self.config.text.sample_prompts or first_captions(self.data.captions, PREVIEW_PROMPTS)

    def condition_names(self, conditions: Sequence[str]) -> Sequence[str]:
        """The beginnings of the prompts."""
        return row_names(range(len(conditions)), list(conditions))

    def draw(self, network: nn.Module, indices: Sequence[int], conditions: Sequence[str]) -> Tensor:
        """Images (len(indices), 3, H, W) uint8 on the CPU, image k from the seed k and the prompt `conditions[k]`, in turn."""
        side = self.data.resolution
        prompts = self._embeddings(network, [conditions[k % len(conditions)] for k in indices], [False] * len(indices))
        null = self._embeddings(network, [""], [True])
        generators = image_generators(0, indices)
        options = {"num_inference_steps": PREVIEW_STEPS, "guidance_scale": self.config.text.sample_guidance_scale}
        with self.latents.on_device() as vae:
            pipeline = self._pipeline(lora.networks(network)["unet"], vae)
            return draw(pipeline, prompts, null, generators, height=side, width=side, **options).cpu()

    def _scheduler(self) -> Any:
        """A scheduler of the exported pipeline.

        Raises:
            InputError: diffusers has no such class, or it does not take its configuration.
        """
        values = self.scheduler_config()
        with explained_errors(f"model {self.base.folder}/scheduler"):
            return getattr(diffusers, values["_class_name"]).from_config(values)

    def _pipeline(self, network: nn.Module, vae: Any) -> Any:
        """The stock pipeline with a network and VAE, without text encoders, and with the scheduler class of the base model."""
        pipeline = frozen_parts.stock_pipeline(self.base, vae=vae, unet=network, scheduler=self._scheduler())
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
