"""Configurations of the data: images, captions, shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from ..ranges import above, at_least
from .types import Channels, Share, Task

DIGITS, EMOJI = "digits", "emoji"
EMBEDDED = (DIGITS, EMOJI)  # the data sets of the package; each has a configuration of its name
DIGITS_TEXT = "digits_text"  # the configuration of the captioned digits


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training images."""

    # what is trained: a pixel model, or a text-to-image model; follows from base_model if left out
    task: Task | None = None
    # data set: digits, emoji, a folder of images, of .tar or of .parquet files, such a file, a pattern of them such as
    # 'shards/{0000..0127}.tar' (also https://... and hf://datasets/user/set/...), a saved dataset, or a Hub id (user/set@revision)
    dataset: str | None = None
    split: str = "train"  # split of a folder, parquet, saved or Hub dataset
    # column of the images, or in .tar files their extension, such as jpg; found by its type if left out
    image_column: str | None = None
    # column of the class labels, or in .tar files an extension or a field of .json; found by its type, or cls, label or class, if left out
    label_column: str | None = None
    resolution: Annotated[int | None, at_least(1, 64)] = None  # image size in pixels: resize of the shorter side, then center crop
    channels: Channels = None  # image channels: 1 is grey (colours are converted), 3 is RGB; 3 as soon as one image has colours if left out
    class_conditional: bool = False  # class-conditional training, with class labels
    label_dropout: Share = 0.1  # label dropout for classifier-free guidance: share of labels replaced by "none"
    random_flip: bool = False  # random horizontal flip of half of the images
    # shuffle window, for data that do not fit into memory: shards (.tar files, row groups of parquet files, record batches of saved data)
    # whose images are shuffled together, in an order of the shards that is another in every epoch; all if left out
    shuffle_window: Annotated[int | None, at_least(1, 16)] = None
    folder_repeats: bool = False  # train images of a folder named N_NAME, such as 10_cats, N times in each epoch
    validation_split: Share = 0.0  # share of the images that is held out of training, for the validation loss; 0 is off
    # size of the cache on the disk for shards that are fetched from a server or from the Hub, in GB, shared by all runs of the machine
    shard_cache_gb: Annotated[float, above(0, 50)] = 50.0
    # check of the images before a new run: all are decoded, or a sample of 1000, or none; if left out all, but of 100 000 images or more
    # a sample
    check_images: Literal["all", "sample", "none"] | None = None
    # skip images that cannot be read, up to 1% of them, instead of stopping; one that the check has not found is replaced by another
    skip_bad: bool = False
    jpeg_draft: bool = False  # decode JPEG files of large images at 1/2, 1/4 or 1/8 of their size: faster, with other pixels
    num_workers: Annotated[int, at_least(0, 2)] = 2  # data loader workers per training process; 0 loads in the training process
    # cache of decoded images per process, in MB, used if all fit; 0 is off
    cache_images_mb: Annotated[int, at_least(0, 1024, zero="off")] = 1024


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Text-to-image only: the base model, captions, crops."""

    # base model whose UNet is trained: Stable Diffusion XL, 2.x or 1.x as a pipeline folder, a run directory or a Hub id
    # (user/name@revision); digits is the packaged one for the captioned digits
    base_model: str | None = None
    vae: str | None = None  # another VAE than that of the base model: its folder, or a Hub id
    # column of the captions, or in .tar files an extension or a field of .json: text, caption or prompt, else the only column of texts, if
    # left out; NAME.txt beside NAME.png in a folder and in .tar files
    caption_column: str | None = None
    caption_dropout: Share = 0.1  # caption dropout for classifier-free guidance: share of captions replaced by "no caption"
    # what "no caption" is: zeros, or the encoding of the empty prompt; as the base model samples without a negative prompt if left out
    null_caption: Literal["zeros", "empty"] | None = None
    shuffle_caption: bool = False  # shuffle the parts of a caption between its commas (tags)
    keep_tokens: Annotated[int, at_least(0, 1)] = 0  # parts at the beginning of a caption that shuffle_caption leaves in place
    # text encoder inputs per caption: each holds 75 tokens of Stable Diffusion's tokenizers; longer captions are cut
    caption_chunks: Annotated[int, at_least(1, 1)] = 1
    crop: Literal["center", "random"] = "center"  # crop of the resized image to a square, or to the size of its bucket
    crop_per_image: bool = False  # with crop random: always the same crop of an image, so that its latents are kept
    # images keep their shape: sizes of about the area of resolution^2, sides multiples of 64 (less below 512 pixels), each image in the
    # size of the nearest aspect ratio; a step has images of one size
    aspect_ratio_buckets: bool = False
    # folder of latents and text embeddings that are computed beforehand where nothing random precedes them, shared by runs; kept in memory
    # if left out
    precompute_dir: str | None = None
    sample_prompts: tuple[str, ...] = ()  # prompts of the sample grids; captions of the data if left out
    sample_guidance_scale: Annotated[float, at_least(0, "1 (off) or 5")] = 5.0  # guidance scale of sample grids and eval_metrics
    # model of clip_score in eval_metrics: a CLIPModel of transformers, as a folder, or as the name of a repository that is in the cache
    clip_model: str | None = None


@dataclass(frozen=True, kw_only=True)
class ShardsMakeConfig:
    """Write a data set as .tar shards with an index, with labels and captions where it has them. The same command goes on after a kill."""

    data: str  # data set, as --dataset of train.py
    out: str  # output folder
    shard_mb: Annotated[int, at_least(1, 256)] = 256  # size of a shard at most, in MB, unless one image is larger
    split: str = "train"  # split of a folder, parquet, saved or Hub dataset
    image_column: str | None = None  # column of the images; found by its type if left out
    label_column: str | None = None  # column of the class labels; found by its type if left out
    caption_column: str | None = None  # column of the captions; found by its name if left out


@dataclass(frozen=True, kw_only=True)
class ShardsConfig:
    """Shards, .tar or .parquet files."""

    data: str  # a folder of shards, a file, or a pattern such as 'shards/{0000..0127}.tar'
    split: str = "train"  # split of a folder
    image_column: str | None = None  # images: a column, or in a .tar file the extension, such as jpg; found by its type if left out
    label_column: str | None = None  # labels: a column, or in a .tar file an extension or a field of .json; found by its type if left out
    caption_column: str | None = None  # captions: likewise; found by its name if left out
