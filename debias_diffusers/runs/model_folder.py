"""The folder of a model, a pipeline of diffusers: what its configuration files say before any weights are read. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.hub_names import is_model_id
from ..config.loading import CONFIG
from ..config.prompts import read_prompts
from ..config.schema.data import DIGITS
from ..config.schema.evaluation import BiasConfig
from ..config.schema.sampling import SampleConfig
from ..config.schema.types import Task
from ..config.validation.sampling import model_flag_problems
from ..errors import InputError, raise_all
from ..utils import text_libraries
from ..utils.files import read_json
from .lora_folder import BASE_RECORD, LORA_WEIGHTS, base_of_lora, strength_problems

MODEL_INDEX = "model_index.json"
# Of a text encoder's configuration that leaves them out: transformers does not write what is its default.
CLIP_WIDTH, CLIP_POSITIONS = 512, 77
STOCK_FACTOR = 8  # stock pipelines draw sides that are multiples of it

_CLIP = ("CLIPTokenizer", "CLIPTokenizerFast")
_PARTS: dict[str, tuple[str, ...]] = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "tokenizer": _CLIP,
    "text_encoder": ("CLIPTextModel",),
}
_XL_PARTS = _PARTS | {"tokenizer_2": _CLIP, "text_encoder_2": ("CLIPTextModelWithProjection",)}
# The stock text-to-image pipelines, and the classes that their parts must have.
TEXT_PIPELINES = {"StableDiffusionPipeline": _PARTS, "StableDiffusionXLPipeline": _XL_PARTS}


def model_index(folder: Path) -> Mapping[str, Any]:
    """What model_index.json says; nothing where there is none, or it is damaged."""
    found = read_json(folder / MODEL_INDEX)
    return found if isinstance(found, dict) else {}


def text_parts(folder: Path) -> Mapping[str, tuple[str, ...]]:
    """The parts of a text-to-image model, with the classes that they may have; {} of another one."""
    return TEXT_PIPELINES.get(str(model_index(folder).get("_class_name")), {})


def is_lora(folder: Path) -> bool:
    """Whether a folder has a LoRA, and no pipeline. (Of one on the Hub, the configuration files alone may be there.)"""
    return any((folder / name).is_file() for name in (LORA_WEIGHTS, BASE_RECORD)) and not (folder / MODEL_INDEX).is_file()


def task_of(folder: Path) -> Task:
    """What the model in a folder draws images of: of a text (Stable Diffusion, Stable Diffusion XL, a LoRA), or without one."""
    return "text_to_image" if text_parts(folder) or is_lora(folder) else "pixels"


def require_model(folder: Path, model: str) -> None:
    """Raises InputError where a folder is none, or holds no pipeline; `model` is its name for messages."""
    if folder.is_file():
        raise InputError(f"{model} is a file; {convert_advice(model)} (of a LoRA, name the base model, and the file with --lora)")
    if model and is_lora(folder):
        raise InputError(f"{model} is a LoRA, not a whole model; python -m debias_diffusers.convert lora makes a file of it")
    if not model or (folder.exists() and not (folder / MODEL_INDEX).is_file()):
        raise InputError(f"{model or 'an empty name'} holds no model (no {MODEL_INDEX}); train one, or name another folder")
    if not folder.exists():
        raise InputError(f"{model} does not exist; name a run directory, a pipeline folder or a Hub id such as user/name")


def convert_advice(file: str) -> str:
    """What to do with a single file where a pipeline folder is needed."""
    return f"make a folder of it once: python -m debias_diffusers.convert single {file} {Path(file).with_suffix('').name}"


def pixel_problems(model: str, what: str) -> list[str]:
    """A text-to-image model on this disk where `what` is for pixel models only; other names are looked at when they are loaded."""
    if task_of(Path(model)) == "pixels":
        return []
    return [f"{model} is a text-to-image model, but {what} is for pixel models; eval.py score and eval.py bias measure it"]


def bias_model_problems(config: BiasConfig, folders: Mapping[str, Path]) -> list[str]:
    """Models of two kinds in one command that measures their bias, or flags for the other kind. `folders` by name of the run."""
    by_task = {task_of(folder): run for run, folder in folders.items()}
    if len(by_task) > 1:
        pixels, text = by_task["pixels"], by_task["text_to_image"]
        return [f"{text} is a text-to-image model, but {pixels} is a pixel model; name models of one kind"]
    if not by_task:
        return []
    ((task, run),) = by_task.items()
    if task == "pixels":
        other, said = ["caption_column", "guidance_scale", "base_model"], f"for text-to-image models, and {run} is a pixel model"
    else:
        other, said = ["label_column", "allow_pickle_import"], f"for pixel models, and {run} is a text-to-image model"
    found = [
        f"{name} is {value}, but is {said}; leave it out"
        for name in other
        if (value := getattr(config, name)) is not None and value is not False
    ]
    if task == "text_to_image" and config.base_model and not any(map(is_lora, folders.values())):
        found.append(f"base_model is {config.base_model}, but no run is a LoRA; leave it out")
    return found


def require_text_model(folder: Path, model: str) -> None:
    """Checks a text-to-image model before its weights are read.

    Args:
        folder: with the configuration files of the pipeline.
        model: its name for messages.

    Raises:
        InputError: transformers is not installed, a part is missing or of another class, or two parts do not fit.
    """
    text_libraries.require()
    index = model_index(folder)
    if index.get("_class_name") not in TEXT_PIPELINES:
        raise InputError(f"model {model} is no {' or '.join(TEXT_PIPELINES)}; take one")
    for name, classes in TEXT_PIPELINES[index["_class_name"]].items():
        given = index.get(name)
        kind = given[1] if isinstance(given, list) and len(given) == 2 else None
        if kind is None or not (folder / name).is_dir():
            raise InputError(f"model {model} has no {name}; take a whole {index['_class_name']}")
        if kind not in classes:
            raise InputError(f"model {model} has a {name} of class {kind}, but must have a {classes[0]}")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    if isinstance(scheduler, dict) and str(scheduler.get("_class_name")).startswith("FlowMatch"):
        raise InputError(
            f"model {model} is a rectified flow (its scheduler is {scheduler['_class_name']}), which {index['_class_name']} is not"
        )
    unet, vae = part_config(folder, "unet"), part_config(folder, "vae")
    if unet.get("in_channels") != vae.get("latent_channels"):
        raise InputError(
            f"the unet of model {model} takes {unet.get('in_channels')} channels, but its vae has {vae.get('latent_channels')} "
            f"(as models of inpainting do); take a text-to-image model"
        )
    encoders = [config for name in ("text_encoder", "text_encoder_2") if (config := part_config(folder, name))]
    width = sum(config.get("hidden_size", CLIP_WIDTH) for config in encoders)
    if unet.get("cross_attention_dim") != width:
        raise InputError(
            f"the unet of model {model} takes embeddings of width {unet.get('cross_attention_dim')}, but its text encoders have {width}"
        )
    _require_tokenizer_lengths(folder, model)


def _require_tokenizer_lengths(folder: Path, model: str) -> None:
    """Raises InputError for a tokenizer without a length, to which stock pipelines pad prompts, or with more than its encoder reads."""
    for tokenizer in ("tokenizer", "tokenizer_2"):
        encoder = part_config(folder, tokenizer.replace("tokenizer", "text_encoder"))
        if not encoder:
            continue
        settings = read_json(folder / tokenizer / "tokenizer_config.json")
        length = settings.get("model_max_length") if isinstance(settings, dict) else None
        most = encoder.get("max_position_embeddings", CLIP_POSITIONS)
        if not isinstance(length, int) or not 2 < length <= most:
            has = "no model_max_length" if length is None else f"model_max_length {length}"
            raise InputError(
                f"the {tokenizer} of model {model} has {has}, but its text encoder reads {most} tokens; write "
                f'"model_max_length": {most} into {tokenizer}/tokenizer_config.json'
            )


def check_sampling(config: SampleConfig, folder: Path, base: Path | None = None) -> None:
    """Checks a sampling command against the configuration files of its model, which are in a folder. Reads no weights.

    Args:
        config: the command.
        folder: of the model.
        base: with the configuration files of the base model of a LoRA; if left out, one on this disk is found.

    Raises:
        InputError: there is no model; flags are for the other kind of model; or prompts or sizes do not fit it, or it cannot be drawn with.
    """
    if not is_lora(folder):
        require_model(folder, config.model)
    task, pipeline = task_of(folder), folder
    found = model_flag_problems(config, task) + strength_problems(config.lora)
    if is_lora(folder):
        name = base_of_lora(folder, config.model, config.base_model)
        pipeline = base or Path(name).expanduser()
    elif config.base_model is not None:
        found.append(f"base_model is {config.base_model}, but {config.model} is no LoRA: it is drawn with as it is; leave base_model out")
    if task == "text_to_image":
        found += size_problems(pipeline, width=config.width, height=config.height)
        asked = "guidance_scale" if (config.guidance_scale or 1) > 1 else "negative_prompt" if config.negative_prompt is not None else None
        if asked and knows_prompts_only(folder):
            found.append(
                f"{asked} is {getattr(config, asked)}, but {config.model} was trained with caption_dropout 0 from a base model without "
                f"weights, so that it knows no image without a prompt; leave {asked} out"
            )
    raise_all(found)
    if task == "text_to_image":
        if config.lora or is_lora(folder):
            text_libraries.require()
            text_libraries.require_peft()
        if base or not is_lora(folder) or not is_model_id(name):
            require_text_model(pipeline, config.model if pipeline == folder else name)
        read_prompts(config)


def part_config(folder: Path, name: str) -> Mapping[str, Any]:
    """The configuration of a part; nothing where there is none."""
    found = read_json(folder / name / "config.json")
    return found if isinstance(found, dict) else {}


def vae_scale(config: Mapping[str, Any]) -> list[Any]:
    """What the configuration of a VAE says of the scale of its latents; VAEs of one kind say the same."""
    return [config.get(name) for name in ("scaling_factor", "latents_mean", "latents_std")]


def size_problems(folder: Path, **sizes: int | None) -> list[str]:
    """Widths and heights of images (None is what was left out) that a text-to-image model cannot draw."""
    levels = part_config(folder, "vae").get("block_out_channels")
    factor = math.lcm(STOCK_FACTOR, 2 ** (len(levels) - 1) if isinstance(levels, list) and levels else 1)
    return [
        f"{name} is {size}, but must be a multiple of {factor}; take {max(1, round(size / factor)) * factor}"
        for name, size in sizes.items()
        if size is not None and size % factor
    ]


def knows_prompts_only(folder: Path) -> bool:
    """Whether the run in a folder never learned images without a prompt, as its base model had not, either: it has no guidance."""
    return bool(run_setting(folder, "caption_dropout") == 0 and run_setting(folder, "base_model") == DIGITS)


def run_setting(folder: Path, name: str) -> Any:
    """What the configuration of the run in a folder has for a field; None where the folder is no run."""
    found = read_json(folder / CONFIG)
    return found.get(name) if isinstance(found, dict) and "dataset" in found else None
