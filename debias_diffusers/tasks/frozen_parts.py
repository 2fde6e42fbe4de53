"""The frozen parts of a text-to-image model: captions to embeddings, images to latents; kept where nothing random precedes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from ..data.text_dataset import TextData
from ..errors import InputError, reason
from ..pipelines.loading import class_of_part, load_part
from ..pipelines.text_pipeline import ENCODED_AT_ONCE, Embeddings, decode, encode_prompts, joined, latent_scale, null_embeddings
from ..sampling.job import to_bytes
from ..utils import memory
from ..utils.console import say
from ..utils.distributed import broadcast_from_first
from ..utils.tensor_memory import sent
from .base import HALF_DTYPES, sent_locked
from .base_model import BaseModel
from .precompute import Group, encoded
from .tensor_store import E

KEPT_SHARE = 0.5  # of the free main memory, which embeddings and latents of all processes of a machine may take
MOST_IMAGES, MOST_PIXELS = 64, 1 << 22  # that the VAE encodes at once: four of 1024 pixels


def stock_pipeline(base: BaseModel, **parts: Any) -> Any:
    """The stock pipeline of a base model with these parts alone, and without safety checker and watermark."""
    given: dict[str, Any] = {**dict.fromkeys(("unet", *base.parts)), **parts}
    if base.is_xl:
        return StableDiffusionXLPipeline(**given, add_watermarker=False)
    return StableDiffusionPipeline(**given, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def load_tokenizers(base: BaseModel) -> Any:
    """The stock pipeline with tokenizers alone.

    Raises:
        InputError: a file is missing or damaged.
    """
    from transformers import CLIPTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # one for each of a few files
    names = [name for name in base.parts if name.startswith("tokenizer")]
    try:
        parts = {name: CLIPTokenizer.from_pretrained(base.folder / name, local_files_only=True) for name in names}
    except Exception as error:  # a damaged file may provoke any
        raise InputError(f"the tokenizers of base_model {base.folder} cannot be loaded: {reason(error)}") from error
    return stock_pipeline(base, **parts)


def load_text_encoders(base: BaseModel, device: torch.device) -> dict[str, Any]:
    """The text encoders by name, in float32.

    Raises:
        InputError: a file is missing or damaged.
    """
    names = [name for name in base.parts if name.startswith("text_encoder")]
    return {name: _loaded(class_of_part(base.folder, name), base.folder / name, device) for name in names}


def _loaded(kind: Any, folder: Path, device: torch.device) -> Any:
    """A model of a folder, frozen and in float32. What is drawn in between, such as dropout, does not depend on when it is loaded."""
    with torch.random.fork_rng(devices=[]):
        return load_part(kind, folder, str(folder)).eval().requires_grad_(False).to(device)


class TextConditions:
    """Embeddings of captions and of "no caption": kept for all that are known beforehand, or computed batch by batch."""

    def __init__(self, base: BaseModel, device: torch.device, zeros: bool, chunks: int) -> None:
        """Loads the tokenizers; the text encoders are loaded when they are needed. `zeros` and `chunks` as of `null_embeddings`."""
        self.base, self.device, self.zeros, self.chunks = base, device, zeros, chunks
        self.pipeline = load_tokenizers(base)
        self._kept: Embeddings | None = None  # of the texts in `_rows`
        self._rows = dict[str | None, int]()  # None is "no caption"
        self._stored: Mapping[str | None, Mapping[str, Tensor]] = {}  # None is "no caption"

    def load(self) -> Any:
        """The pipeline with its text encoders.

        Raises:
            InputError: one of them cannot be loaded.
        """
        if self.pipeline.text_encoder is None:
            self.pipeline.register_modules(**load_text_encoders(self.base, self.device))
        return self.pipeline

    def unload(self) -> None:
        """Frees the memory of the text encoders, until they are needed again."""
        self.pipeline.register_modules(**{name: None for name in self.base.parts if name.startswith("text_encoder")})

    @cached_property
    def null(self) -> Embeddings:
        """The embeddings of "no caption" (B is 1)."""
        if None in self._stored:
            return _embeddings([self._stored[None]])
        return null_embeddings(self.load(), self.zeros, self.chunks)

    @property
    def bytes_each(self) -> int:
        """Of the embeddings of one caption."""
        return self.null.text.nbytes + (0 if self.null.pooled is None else self.null.pooled.nbytes)

    def keep(self, texts: Sequence[str], accelerator: Accelerator) -> None:
        """Encodes texts and keeps their embeddings on the CPU; the processes share the work."""
        self._rows = {text: number for number, text in enumerate([None, *texts])}
        table = _table(encoded([([None], 1), (texts, ENCODED_AT_ONCE)], self.encode, "text embeddings", accelerator), self._rows)
        self._kept = Embeddings(table["text"], table.get("pooled"))
        self.unload()

    def read_from(self, stored: Mapping[str | None, Mapping[str, Tensor]]) -> None:
        """Takes embeddings as of `encode` from a mapping that has all that are known beforehand, and that of None, "no caption"."""
        self._stored = stored
        self.unload()

    def encode(self, texts: Sequence[str | None]) -> dict[str, Tensor]:
        """The embeddings of some texts by name, on the CPU; None, alone, is "no caption"."""
        found = encode_prompts(self.load(), [text or "" for text in texts], self.chunks) if list(texts) != [None] else self.null
        return {"text": found.text} if found.pooled is None else {"text": found.text, "pooled": found.pooled}

    def of(self, captions: Sequence[str], dropped: Sequence[bool], device: Any) -> Embeddings:
        """The embeddings of a batch on a device, float32; those of "no caption" where it is dropped."""
        wanted = dict.fromkeys(caption for caption, left_out in zip(captions, dropped) if not left_out)
        if wanted.keys() <= self._stored.keys() and self._stored:
            found = _embeddings([self._stored[None if left_out else caption] for caption, left_out in zip(captions, dropped)])
        else:
            known = self._kept if wanted.keys() <= self._rows.keys() else None
            table, rows = (known, self._rows) if known else self._encoded(list(wanted))
            places = [rows[None if left_out else caption] for caption, left_out in zip(captions, dropped)]
            found = Embeddings(table.text[places], None if table.pooled is None else table.pooled[places])
        return Embeddings(sent_locked(found.text, device), None if found.pooled is None else sent_locked(found.pooled, device))

    def _encoded(self, texts: Sequence[str]) -> tuple[Embeddings, dict[str | None, int]]:
        """The embeddings of "no caption" and of texts, and the row of each."""
        parts = [self.null, encode_prompts(self.load(), texts, self.chunks)] if texts else [self.null]
        return joined(parts), {text: number for number, text in enumerate([None, *texts])}


def _embeddings(rows: Sequence[Mapping[str, Tensor]]) -> Embeddings:
    """The embeddings of a batch from those of each caption, copied."""
    pooled = torch.stack([row["pooled"] for row in rows]) if "pooled" in rows[0] else None
    return Embeddings(torch.stack([row["text"] for row in rows]), pooled)


class Latents:
    """Images to latents: the VAE's posterior, a draw from it, and its scale."""

    def __init__(self, base: BaseModel, device: torch.device, precision: str) -> None:
        """The VAE is loaded when it is needed. Images are encoded in `precision`, a mixed_precision, where it does not overflow."""
        self.folder, self.device = base.vae_folder, device
        with torch.device("meta"):
            config = AutoencoderKL.from_config(dict(base.vae)).config  # with the defaults of what the file lacks
        # `force_upcast` says that half precision overflows.
        self.precision = "no" if config.force_upcast else precision
        self._left = False
        self._shift, self._scale = latent_scale(config)

    @cached_property
    def vae(self) -> AutoencoderKL:
        """The VAE in float32, loaded now if it was not.

        Raises:
            InputError: a file is missing or damaged.
        """
        vae: AutoencoderKL = _loaded(AutoencoderKL, self.folder, self.device)
        return vae

    @contextmanager
    def on_device(self) -> Iterator[AutoencoderKL]:
        """The VAE on its device, which it leaves again where it has left it before."""
        try:
            yield self.vae.to(self.device)
        finally:
            if self._left:
                self.vae.to("cpu")

    def leave(self) -> None:
        """Moves the VAE to the main memory, from where it comes back for previews."""
        self._left = True
        if "vae" in self.__dict__:
            self.vae.to("cpu")

    @torch.no_grad()
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, C, h, w) float32 of images (B, 3, H, W) uint8, on the device."""
        half = HALF_DTYPES.get(self.precision)
        with self.on_device() as vae, torch.autocast(self.device.type, half, enabled=half is not None):
            found = vae.encode(sent(images, self.device).float() / 127.5 - 1).latent_dist
        return found.mean.float(), found.std.float()

    def drawn(self, mean: Tensor, std: Tensor, posterior: Tensor) -> Tensor:
        """x_0 (B, C, h, w) float32: the draw mean + std * posterior, scaled as the UNet knows latents."""
        latents = mean + std * posterior
        shift, scale = (sent(factor.to(latents.dtype), latents.device) for factor in (self._shift, self._scale))
        x_0: Tensor = (latents - shift) * scale
        return x_0

    def decoded(self, x_0: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8 on the CPU of latents x_0."""
        with self.on_device() as vae:
            return to_bytes(decode(vae, x_0.to(self.device))).cpu()


Flipped = tuple[int, bool]  # an image, as it is or mirrored


class ImageEncoder:
    """All images of a run, as they are and mirrored where they may be, to mean, std and time_ids."""

    def __init__(self, data: TextData, latents: Latents) -> None:
        self.data, self.latents = data, latents

    def groups(self, wanted: Iterable[Flipped] | None = None) -> list[Group[Flipped]]:
        """Images, all if left out, those of one size together, and how many are encoded at once."""
        alike = dict[tuple[bool, tuple[int, int]], list[Flipped]]()
        images, flips = range(len(self.data.images)), self.data.possible_flips
        for index, flipped in wanted or ((index, flipped) for flipped in flips for index in images):
            alike.setdefault((flipped, self.data.size(index)), []).append((index, flipped))
        return [(entries, max(1, min(MOST_IMAGES, MOST_PIXELS // (height * width)))) for (_, (height, width)), entries in alike.items()]

    def __call__(self, entries: Sequence[Flipped]) -> dict[str, Tensor]:
        """Mean and standard deviation (B, C, h, w) of the posteriors, and time_ids (B, 6), on the device.

        Raises:
            InputError: an image cannot be read, or the VAE overflows.
        """
        pixels, time_ids = zip(*(self.data.pixels(index, flipped, position=0) for index, flipped in entries))
        mean, std = self.latents.posterior(torch.stack(pixels))
        self._require_finite(mean + std, entries)
        return {"mean": mean, "std": std, "time_ids": torch.stack(time_ids)}

    def _require_finite(self, latents: Tensor, entries: Sequence[Flipped]) -> None:
        """Raises InputError where the VAE overflows, and names the image."""
        if not latents.isfinite().all():
            bad = next(index for (index, _), each in zip(entries, latents) if not each.isfinite().all())
            where = self.data.images.read(bad)[2]
            raise InputError(f"the VAE gives latents of image {where} that are not finite; take --mixed_precision no, or another --vae")


def keep_latents(data: TextData, latents: Latents, accelerator: Accelerator, wanted: Sequence[Flipped] | None = None) -> None:
    """Encodes images, all if left out, and keeps the posteriors on the CPU; the processes share the work.

    Raises:
        InputError: an image cannot be read.
    """
    encoder = ImageEncoder(data, latents)
    parts = encoded(encoder.groups(wanted), encoder, "latents", accelerator)
    if data.buckets or wanted:
        rows = ((entry, tensors, row) for entries, tensors in parts for row, entry in enumerate(entries))
        data.stored = {entry: {name: tensor[row] for name, tensor in tensors.items()} for entry, tensors, row in rows}
        return
    images, flips = range(len(data.images)), data.possible_flips
    table = _table(parts, {entry: row for row, entry in enumerate((index, flipped) for flipped in flips for index in images)})
    mean, std, time_ids = (table[name].unflatten(0, (len(flips), -1)) for name in ("mean", "std", "time_ids"))
    data.latents = mean, std, time_ids


def _table(parts: Iterable[tuple[Sequence[E], Mapping[str, Tensor]]], rows: Mapping[E, int]) -> dict[str, Tensor]:
    """The tensors of all entries by name, each in its row. Parts that were joined at the end would take the memory twice."""
    found = dict[str, Tensor]()
    for entries, tensors in parts:
        places = [rows[entry] for entry in entries]
        for name, value in tensors.items():
            if name not in found:
                found[name] = value.new_empty(len(rows), *value.shape[1:])
            found[name][places] = value
    return found


def fits(count: int, bytes_each: int, what: str, accelerator: Accelerator) -> bool:
    """Whether so many may be kept in the memory of each process; where not, that is said."""
    needed = count * bytes_each
    allowed = broadcast_from_first(lambda: int(KEPT_SHARE * memory.free_memory() / accelerator.num_processes), accelerator)
    if needed <= allowed:
        return True
    if accelerator.is_main_process:
        say(
            f"{what} are computed anew in every step: kept, they would take {needed / 1e9:.1f} GB of each process, of which "
            f"{allowed / 1e9:.1f} GB may be used ({KEPT_SHARE:.0%} of the free memory)"
        )
    return False
