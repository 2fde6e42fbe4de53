"""Converts single-file checkpoints of Stable Diffusion XL, 2.x and 1.x to pipeline folders, and back."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..config.schema.data import TextConfig
from ..errors import InputError, reason
from ..hub import client
from ..pipelines.loading import class_of_part, folder_of_model, load_part, require_finite
from ..pipelines.text_pipeline import quiet, zero_snr_scheduler
from ..runs.model_folder import MODEL_INDEX, part_config, require_text_model, text_parts
from ..tasks.base_model import UNUSED, open_base
from ..utils import text_libraries
from ..utils.console import say
from ..utils.files import (
    filled_folder,
    move_file,
    new_folder,
    read_json_object,
    remove_old_temporary_files,
    require_new_file,
    temporary_folder,
    translate_write_errors,
)
from .single_file_names import Stored, clip_name, open_clip_name, text_encoder_name, unet_name, vae_name

Namer = Callable[[str], Stored]  # by the key of a tensor in diffusers or transformers

_V, _ZERO_SNR = "v_pred", "ztsnr"  # empty tensors by which files of Stable Diffusion XL say that they predict v, with zero terminal SNR
_PREDICTS = "modelspec.prediction_type"  # of the metadata, epsilon or v
# Of a scheduler; no file says them, and programs take them for granted.
_USUAL = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000, "trained_betas": None}


@dataclass(frozen=True)
class Layout:
    """A family of single files."""

    architecture: str  # as the metadata names it
    known_by: str  # a tensor that only its files have
    encoders: Mapping[str, tuple[Callable[[str, str], Stored], str]]  # by the folder of the text encoder: its names and their prefix
    config: str | None  # the repository with the usual configuration files; None where there are several that a file does not tell apart


LAYOUTS = (
    Layout(
        "stable-diffusion-xl-v1-base",
        "conditioner.embedders.1.model.ln_final.weight",
        {
            "text_encoder": (clip_name, "conditioner.embedders.0.transformer"),
            "text_encoder_2": (open_clip_name, "conditioner.embedders.1.model"),
        },
        "stabilityai/stable-diffusion-xl-base-1.0",
    ),
    Layout(
        "stable-diffusion-v2",
        "cond_stage_model.model.ln_final.weight",
        {"text_encoder": (open_clip_name, "cond_stage_model.model")},
        None,
    ),
    Layout(
        "stable-diffusion-v1",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
        {"text_encoder": (clip_name, "cond_stage_model.transformer")},
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
    ),
)


# ---- file to folder --------------------------------------------------------------------------------------------------


def unpack(file: str, out: str, config: str | None = None) -> None:
    """Writes the pipeline folder of a single file, whose weights keep their precision.

    Args:
        file: a `.safetensors` in the layout of Stable Diffusion XL, 2.x or 1.x.
        out: the folder, which must be new or empty.
        config: a pipeline folder or Hub id with the configuration files and tokenizers; the usual one of the layout if None.

    Raises:
        InputError: the file is of another kind, or does not fit the configuration.
        HubError: the Hub cannot be reached or refuses.
    """
    folder = new_folder(out)
    with _opened(file) as opened:
        names = set(opened.keys())
        layout = next((each for each in LAYOUTS if each.known_by in names), None)
        if layout is None:
            raise InputError(f"{file} is no single file of Stable Diffusion XL, 2.x or 1.x: it has no text encoder of theirs; take another")
        source = _configuration(file, layout, config)
        with filled_folder(folder, MODEL_INDEX) as temporary:
            for name, kind in text_parts(source).items():
                _copy_settings(source / name, temporary / name, whole=not kind[0].endswith("Model") and name.startswith("tokenizer"))
            shutil.copytree(source / "scheduler", temporary / "scheduler")
            _write_index(source, temporary, _write_scheduler(temporary, opened.metadata() or {}, names))
            used = {_V, _ZERO_SNR}
            for name, namer in _namers(source, layout).items():
                stem = "model" if name.startswith("text_encoder") else client.WEIGHTS
                shapes = _shapes(source, name)
                used |= {namer(key).name for key in shapes}
                tensors = _taken(opened, names, shapes, namer, file)
                require_finite(tensors, file)
                safetensors.torch.save_file(tensors, temporary / name / f"{stem}.safetensors", {"format": "pt"})
            open_base(TextConfig(base_model=str(temporary)))  # whether all fits
    if others := sorted(names - used):
        say(f"{len(others)} tensors of {file} are in no part of a pipeline, such as {others[0]}")
    say(f"{out} is the pipeline folder of {file}; --base_model {shlex.quote(out)} trains it")


def _opened(file: str) -> Any:
    if Path(file).suffix != ".safetensors":
        raise InputError(f"{file} is no .safetensors; other formats can contain code and are not read")
    try:
        return safetensors.safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} cannot be read: {reason(error)}") from error


def _configuration(file: str, layout: Layout, config: str | None) -> Path:
    """The folder with configuration files and tokenizers, checked as far as they go."""
    name = config or layout.config
    if name is None:
        raise InputError(
            f"{file} is of Stable Diffusion 2.x, which does not say whether it predicts epsilon or v; name a pipeline folder or Hub id of "
            f"the same model with --config"
        )
    folder = client.configurations(name, "*/merges.txt")
    if not text_parts(folder):
        raise InputError(f"config {name} is no pipeline of Stable Diffusion XL, 2.x or 1.x; name another")
    require_text_model(folder, name)
    if (has := {each for each in text_parts(folder) if each.startswith("text_encoder")}) != set(layout.encoders):
        raise InputError(f"{file} has {len(layout.encoders)} text encoder(s), but config {name} has {len(has)}; name one of the same model")
    return folder


def _copy_settings(source: Path, destination: Path, whole: bool) -> None:
    """The configuration of a part, or all files of a tokenizer."""
    destination.mkdir()
    for path in source.iterdir():
        if path.is_file() and (whole or path.name == "config.json"):
            shutil.copyfile(path, destination / path.name)


def _write_index(source: Path, folder: Path, scheduler: str | None) -> None:
    """model_index.json with another class of scheduler, if one is given."""
    index = read_json_object("config", source / MODEL_INDEX)
    kept = {name: [None, None] if name in UNUSED else value for name, value in index.items() if name != "_name_or_path"}
    if "requires_safety_checker" in kept:
        kept["requires_safety_checker"] = False
    if scheduler:
        kept["scheduler"] = ["diffusers", scheduler]
    (folder / MODEL_INDEX).write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def _write_scheduler(folder: Path, metadata: Mapping[str, str], names: set[str]) -> str | None:
    """The scheduler with the parameterization that the file says, where it says one. Returns its class, if that is another one then."""
    path = folder / "scheduler" / "scheduler_config.json"
    values = read_json_object("config", path)
    own = values.get("_class_name")
    said = {"epsilon": "epsilon", "v": "v_prediction"}.get(metadata.get(_PREDICTS, ""))
    if predicts := "v_prediction" if _V in names else said:
        values["prediction_type"] = predicts
    if _ZERO_SNR in names:
        values = zero_snr_scheduler(values)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return None if values.get("_class_name") == own else str(values["_class_name"])


def _namers(folder: Path, layout: Layout) -> dict[str, Namer]:
    """Where the tensors of each part are, by its folder."""
    unet, vae = part_config(folder, "unet"), part_config(folder, "vae")
    found: dict[str, Namer] = {"unet": lambda key: unet_name(key, unet), "vae": lambda key: vae_name(key, vae)}
    for name, (namer, prefix) in layout.encoders.items():
        found[name] = lambda key, namer=namer, prefix=prefix: namer(key, prefix)  # type: ignore[misc]
    return found


def _shapes(folder: Path, name: str) -> dict[str, torch.Size]:
    """Names and shapes of the tensors of a part, as its weight file has them."""
    kind, config = class_of_part(folder, name), dict(part_config(folder, name))
    with torch.device("meta"):  # a text encoder is a model of transformers, whose configuration is an object
        module = kind.from_config(config) if name in ("unet", "vae") else kind(kind.config_class.from_dict(config))
    return {_with_prefix(key, name): value.shape for key, value in module.state_dict().items()}


def _with_prefix(key: str, part: str) -> str:
    """The name of a tensor of a text encoder in its weight file, which newer versions of transformers shorten; older ones need it whole."""
    return text_encoder_name(key) if part.startswith("text_encoder") else key


def _taken(opened: Any, names: set[str], shapes: Mapping[str, torch.Size], namer: Namer, file: str) -> dict[str, Tensor]:
    """The tensors of a part out of the file."""
    found = {}
    for key, shape in shapes.items():
        stored = namer(key)
        if stored.name not in names:
            raise InputError(f"{file} lacks {stored.name}, which its configuration needs; name that of the same model with --config")
        value = opened.get_tensor(stored.name)
        if value.is_floating_point() and value.element_size() == 1:
            raise InputError(f"{file} has {stored.name} in float8, which the libraries do not load; take the file in float16 or float32")
        value = value if stored.third is None else value.chunk(3)[stored.third]
        value = value.T if stored.transposed else value[..., 0, 0] if stored.is_conv and value.ndim == 4 else value
        if value.shape != shape:
            raise InputError(
                f"{stored.name} of {file} has shape {list(value.shape)}, but its configuration needs {list(shape)} (as models of "
                f"inpainting have others); take a text-to-image model, or name the configuration of this one with --config"
            )
        found[key] = value.contiguous()
    return found


# ---- folder to file --------------------------------------------------------------------------------------------------


def pack(model: str, out: str, dtype: str = "float32") -> None:
    """Writes a pipeline of Stable Diffusion XL, 2.x or 1.x as a single file.

    Args:
        model: a run directory, a pipeline folder or a Hub id.
        out: the `.safetensors`, which must not exist.
        dtype: of the tensors: float32, float16 or bfloat16.

    Raises:
        InputError: the model is of another kind, or cannot be loaded; or a weight is too large for the precision.
        HubError: the Hub cannot be reached or refuses.
    """
    require_new_file(out, "model.safetensors")
    folder = folder_of_model(model)
    if not text_parts(folder):
        raise InputError(f"{model} is no pipeline of Stable Diffusion XL, 2.x or 1.x; take python -m debias_diffusers.convert export")
    text_libraries.require()
    require_text_model(folder, model)
    layout = _layout_of(folder)
    tensors: dict[str, Tensor] = {}
    for name, namer in _namers(folder, layout).items():
        tensors |= _placed(_weights(folder, name), namer, getattr(torch, dtype), name)
    require_finite(tensors, f"{model} as {dtype}")
    scheduler = read_json_object("model", folder / "scheduler" / "scheduler_config.json")
    metadata, marks = _parameterization(scheduler, layout)
    place = Path(out)
    remove_old_temporary_files(place.parent)
    # Not into an open file: safetensors makes a new one of its own in place of it, for its owner only.
    with translate_write_errors(place), temporary_folder(place) as temporary:
        safetensors.torch.save_file({**tensors, **marks}, temporary / place.name, metadata)
        move_file(temporary / place.name, place)
    say(f"{out} has the weights of {model} in {dtype}")
    if unsaid := _unsaid(scheduler, layout):
        say(f"warning: no single file says {', '.join(unsaid)}: set this in other programs, and name {model} with --config to turn it back")


def _layout_of(folder: Path) -> Layout:
    """XL by its second encoder; 2.x and 1.x by the activation of theirs: OpenCLIP's is gelu."""
    if "text_encoder_2" in text_parts(folder):
        return LAYOUTS[0]
    return LAYOUTS[1 if part_config(folder, "text_encoder").get("hidden_act") == "gelu" else 2]


def _weights(folder: Path, name: str) -> dict[str, Tensor]:
    with quiet():
        loaded = load_part(class_of_part(folder, name), folder / name, str(folder))
    return {_with_prefix(key, name): value for key, value in loaded.state_dict().items()}


def _placed(weights: Mapping[str, Tensor], namer: Namer, dtype: torch.dtype, part: str) -> dict[str, Tensor]:
    """The tensors of a part by their names in a file."""
    found: dict[str, Tensor] = {}
    thirds: dict[str, dict[int, Tensor]] = {}
    for key, value in weights.items():
        stored, value = namer(key), value.to(dtype)
        if stored.third is not None:
            thirds.setdefault(stored.name, {})[stored.third] = value
        else:
            found[stored.name] = (value.T if stored.transposed else value[..., None, None] if stored.is_conv else value).contiguous()
    return found | {name: torch.cat([parts[k] for k in range(3)]) for name, parts in thirds.items()}


def _parameterization(values: Mapping[str, Any], layout: Layout) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata, and the empty tensors by which programs know what a model of Stable Diffusion XL predicts; `values` of its scheduler."""
    is_v, zero = values.get("prediction_type") == "v_prediction", bool(values.get("rescale_betas_zero_snr"))
    metadata = {"format": "pt", "modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": layout.architecture}
    metadata[_PREDICTS] = "v" if is_v else "epsilon"
    marks = {name: torch.zeros(0) for name, there in ((_V, is_v), (_ZERO_SNR, zero)) if there and layout is LAYOUTS[0]}
    return metadata, marks


def _unsaid(values: Mapping[str, Any], layout: Layout) -> list[str]:
    """What a file of a layout cannot say of a scheduler with these values."""
    usual = _USUAL if layout is LAYOUTS[0] else {**_USUAL, "rescale_betas_zero_snr": False}
    return [f"{name} {values[name]!s:.40}" for name, value in usual.items() if values.get(name, value) != value]
