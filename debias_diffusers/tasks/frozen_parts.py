"""The frozen parts of a text-to-image model: captions to embeddings, images to latents; kept where nothing random precedes them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor
from tqdm import tqdm

from ..data.text_dataset import TextData
from ..errors import InputError, reason
from ..pipelines.loading import load_part
from ..pipelines.text_pipeline import ENCODED_AT_ONCE, Embeddings, decode, encode_prompts, joined, null_embeddings
from ..utils import memory
from ..utils.console import say
from ..utils.distributed import broadcast_from_first
from .base_model import BaseModel

KEPT_SHARE = 0.5  # of the free main memory, which embeddings and latents of all processes of a machine may take
MOST_IMAGES, MOST_PIXELS = 64, 1 << 22  # that the VAE encodes at once: four of 1024 pixels


def load_text_encoders(base: BaseModel, device: torch.device) -> Any:
    """The stock pipeline with tokenizers and text encoders alone, in float32.

    Raises:
        InputError: a file is missing or damaged.
    """
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # one for each of a few files
    kinds = {kind.__name__: kind for kind in (CLIPTextModel, CLIPTextModelWithProjection)}
    names = [name for name in base.parts if name.startswith("text_encoder")]
    parts: dict[str, Any] = {name: _loaded(kinds[base.index[name][1]], base.folder / name, device) for name in names}
    tokenizers = [name for name in base.parts if name.startswith("tokenizer")]
    try:
        parts |= {name: CLIPTokenizer.from_pretrained(base.folder / name, local_files_only=True) for name in tokenizers}
    except Exception as error:  # a damaged file may provoke any
        raise InputError(f"the tokenizers of base_model {base.folder} cannot be loaded: {reason(error)}") from error
    if base.is_xl:
        return StableDiffusionXLPipeline(vae=None, unet=None, scheduler=None, add_watermarker=False, **parts)
    return StableDiffusionPipeline(
        vae=None, unet=None, scheduler=None, safety_checker=None, feature_extractor=None, requires_safety_checker=False, **parts
    )


def load_vae(folder: Path, device: torch.device) -> AutoencoderKL:
    """The VAE in float32.

    Raises:
        InputError: a file is missing or damaged.
    """
    vae: AutoencoderKL = _loaded(AutoencoderKL, folder, device)
    return vae


def _loaded(kind: Any, folder: Path, device: torch.device) -> Any:
    """A model of a folder, frozen and in float32."""
    return load_part(kind, folder, str(folder)).eval().requires_grad_(False).to(device)


class TextConditions:
    """Embeddings of captions and of "no caption": kept for all that are known beforehand, or computed batch by batch."""

    def __init__(self, pipeline: Any, zeros: bool, chunks: int) -> None:
        """`pipeline` has tokenizers and text encoders; `zeros` and `chunks` as of `null_embeddings`."""
        self.pipeline, self.zeros, self.chunks = pipeline, zeros, chunks
        self._kept: Embeddings | None = None  # of "no caption" and of the texts in `_rows`
        self._rows = dict[str, int]()

    @cached_property
    def null(self) -> Embeddings:
        """The embeddings of "no caption" (B is 1)."""
        return null_embeddings(self.pipeline, self.zeros, self.chunks)

    @property
    def bytes_each(self) -> int:
        """Of the embeddings of one caption."""
        return self.null.text.nbytes + (0 if self.null.pooled is None else self.null.pooled.nbytes)

    def keep(self, texts: Sequence[str]) -> None:
        """Encodes texts and keeps their embeddings on the CPU; then the text encoders need not stay on a GPU."""
        self._kept, self._rows = self._encoded(texts)
        self.pipeline.to("cpu")

    def of(self, captions: Sequence[str], dropped: Sequence[bool], device: Any) -> Embeddings:
        """The embeddings of a batch on a device, float32; those of "no caption" where it is dropped."""
        wanted = dict.fromkeys(caption for caption, left_out in zip(captions, dropped) if not left_out)
        known = self._kept if wanted.keys() <= self._rows.keys() else None
        table, rows = (known, self._rows) if known else self._encoded(list(wanted))
        places = [0 if left_out else rows[caption] for caption, left_out in zip(captions, dropped)]
        pooled = None if table.pooled is None else table.pooled[places].to(device, non_blocking=True)
        return Embeddings(table.text[places].to(device, non_blocking=True), pooled)

    def _encoded(self, texts: Sequence[str]) -> tuple[Embeddings, dict[str, int]]:
        """The embeddings of "no caption" and of texts, and the row of each text."""
        starts = tqdm(range(0, len(texts), ENCODED_AT_ONCE), "encoding the captions", leave=False, delay=5)
        parts = [self.null, *(encode_prompts(self.pipeline, texts[start : start + ENCODED_AT_ONCE], self.chunks) for start in starts)]
        return joined(parts), {text: number for number, text in enumerate(texts, start=1)}


class Latents:
    """Images to latents: the VAE's posterior, a draw from it, and its scale."""

    def __init__(self, vae: AutoencoderKL, half: torch.dtype | None = None) -> None:
        """`half`: the precision in which images are encoded, if it is not float32."""
        self.vae, self.half = vae, half
        shift, deviation = (vae.config.get(name) for name in ("latents_mean", "latents_std"))
        self._shift = torch.tensor(shift).view(1, -1, 1, 1) if shift else torch.zeros(1)
        self._scale = vae.config.scaling_factor / (torch.tensor(deviation).view(1, -1, 1, 1) if deviation else torch.ones(1))

    @torch.no_grad()
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, C, h, w) float32 of images (B, 3, H, W) uint8, on the VAE's device."""
        vae = self.vae
        with torch.autocast(vae.device.type, self.half, enabled=self.half is not None):
            found = vae.encode(images.to(vae.device).float() / 127.5 - 1).latent_dist
        return found.mean.float(), found.std.float()

    def drawn(self, mean: Tensor, std: Tensor, posterior: Tensor) -> Tensor:
        """x_0 (B, C, h, w) float32: the draw mean + std * posterior, scaled as the UNet knows latents."""
        latents = mean + std * posterior
        x_0: Tensor = (latents - self._shift.to(latents)) * self._scale.to(latents)
        return x_0

    def decoded(self, x_0: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8 on the CPU of latents x_0."""
        pixels = decode(self.vae, x_0.to(self.vae.device))
        return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to("cpu", torch.uint8)


def keep_latents(data: TextData, latents: Latents, accelerator: Accelerator) -> None:
    """Encodes all images, as they are and mirrored where they may be, and keeps the posteriors on the CPU; the processes share the work.

    Raises:
        InputError: an image cannot be read.
    """
    flips = (False, True) if data.config.random_flip else (False,)
    found = [_encoded(data, latents, flipped, accelerator) for flipped in flips]
    mean, std, time_ids = (torch.stack(parts) for parts in zip(*found))
    data.latents = mean, std, time_ids


def _encoded(data: TextData, latents: Latents, flipped: bool, accelerator: Accelerator) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and standard deviation (N, C, h, w) and time_ids (N, 6) of all images, on the CPU."""
    rank, processes = accelerator.process_index, accelerator.num_processes
    # The same images are encoded together in any number of processes.
    size = max(1, min(MOST_IMAGES, MOST_PIXELS // data.resolution**2))
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    # In every round each process encodes one batch; behind the last image it repeats it.
    rounds = range(0, len(data.images), size * processes)
    for first in tqdm(rounds, "encoding the images", leave=False, delay=5, disable=rank > 0):
        start = first + rank * size
        indices = [min(index, len(data.images) - 1) for index in range(start, start + size)]
        pixels, time_ids = zip(*(data.pixels(index, flipped, position=0) for index in indices))
        mean, std = latents.posterior(torch.stack(pixels))
        _require_finite(mean + std, data, indices)
        together = (mean, std, torch.stack(time_ids).to(mean.device))
        mean, std, ids = (accelerator.gather(part).cpu() for part in together) if processes > 1 else (part.cpu() for part in together)
        parts.append((mean, std, ids))
    mean, std, ids = (torch.cat(each)[: len(data.images)] for each in zip(*parts))
    return mean, std, ids


def _require_finite(latents: Tensor, data: TextData, indices: Sequence[int]) -> None:
    """Raises InputError where the VAE overflows, and names the image."""
    if not latents.isfinite().all():
        bad = next(index for index, each in zip(indices, latents) if not each.isfinite().all())
        where = data.images.read(bad)[2]
        raise InputError(f"the VAE gives latents of image {where} that are not finite; take --mixed_precision no, or another --vae")


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
