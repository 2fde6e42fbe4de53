"""Converts checkpoints of guided-diffusion (the paper's code, ADM, P2, Min-SNR) to pipelines, and back: commands, flags, files."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
import re
import shlex
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, UNet2DModel
from torch import Tensor

from ..config.ranges import range_problems
from ..config.schema.objective import ObjectiveConfig
from ..config.schema.types import PredictionType
from ..config.validation.objective import objective_problems
from ..diffusion.noise_schedule import is_flow, make_schedule, schedule_of_scheduler
from ..errors import InputError, raise_all, reason
from ..pipelines.loading import require_finite
from ..pipelines.pixel_pipeline import PixelPipeline, load_pipeline
from ..pipelines.solvers import exported_scheduler
from ..runs.model_folder import MODEL_INDEX
from ..tasks.unet import build_unet, differing_fields
from ..utils.console import say
from ..utils.files import filled_folder, new_folder, read_json_object, remove_old_temporary_files, require_new_file, write_file
from .state_dicts import (
    DEFAULT_FLAGS,
    WHOLE_NUMBER,
    Shape,
    State,
    attention_widths,
    flag_conflicts,
    flags_from_weights,
    from_guided,
    infer_shape,
    resolve_head_dim,
    size_problems,
    state_problems,
    to_guided,
    unet_arguments,
    unsupported_features,
    whole_number,
)

# Flags of guided-diffusion that resemble those in DEFAULT_FLAGS, but are not misspelt.
_OTHER_FLAGS = {"classifier_resblock_updown", "classifier_use_scale_shift_norm", "classifier_attention_resolutions"}


_YES, _NO = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")  # as guided-diffusion reads them


def read_flags(text: str) -> dict[str, Any]:
    """Flags of guided-diffusion, from a JSON file or from text such as `--image_size 256 --learn_sigma True`.

    Raises:
        InputError: unreadable, a value of the wrong type, or a name that is abbreviated or looks misspelt.
    """
    given = read_json_object("flags", Path(text)) if text.lower().endswith(".json") else _typed_flags(text)
    for name in given:
        if name and name not in DEFAULT_FLAGS and (longer := [known for known in DEFAULT_FLAGS if known.startswith(name)]):
            raise InputError(f"flag {name!r} is an abbreviation, of {' or '.join(longer)}; write it in full")
        near = difflib.get_close_matches(name, DEFAULT_FLAGS, n=1, cutoff=0.85)
        if near and name not in DEFAULT_FLAGS and name not in _OTHER_FLAGS:
            raise InputError(f"flag {name} is not known; did you mean {near[0]}?")
    return {name: _as(type(default), name, given[name]) for name, default in DEFAULT_FLAGS.items() if name in given}


def _typed_flags(text: str) -> dict[str, Any]:
    try:
        words = [part for word in shlex.split(text) for part in (word.split("=", 1) if word.startswith("--") else [word])]
    except ValueError as error:
        raise InputError(f"flags {text!r} cannot be read: {error}") from error
    if len(words) % 2 or not all(name.startswith("--") and name.strip("-") for name in words[::2]):
        raise InputError(f"flags {text!r} must be a .json file, or pairs such as '--image_size 256 --learn_sigma True'")
    return {name.lstrip("-").replace("-", "_"): value for name, value in zip(words[::2], words[1::2])}


def _as(kind: type, name: str, value: Any) -> Any:
    if kind is str:
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)
    text = str(value).strip().lower()
    if kind is bool and text in (*_YES, *_NO):
        return text in _YES
    if kind is int:
        with contextlib.suppress(ValueError):
            return whole_number(text)
    raise InputError(f"flag {name} is {value!r:.60}, but must be {'True or False' if kind is bool else WHOLE_NUMBER}")


def read_state(path: str) -> State:
    """The state dict of a `.pt` file, read with weights_only=True, so that no code in it runs.

    Raises:
        InputError: the file is missing, damaged, or contains anything but tensors.
    """
    cannot = f"{path or 'the empty name'} cannot be read as a file of weights"
    try:
        damaged = _damaged_part(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about old file formats
            state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file may provoke any
        raise InputError(f"{cannot}: {_why_unreadable(error)}") from error
    if damaged:
        raise InputError(f"{cannot}: {damaged} in it does not match its checksum; copy it once more")
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()) or not state:
        raise InputError(f"{path} holds no state dict (names and tensors); take the reference's model*.pt or ema*.pt")
    return state


def _damaged_part(path: str) -> str | None:
    """The name of the first damaged member of a zip file as torch.save writes it; None if all match. torch checks no checksums."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as file:
        without_checksums = not any(part.CRC for part in file.infolist())  # after torch.serialization.set_crc32_options(False)
        return None if without_checksums else file.testzip()


def _why_unreadable(error: Exception) -> str:
    text = reason(error)
    if "weights_only" in text:  # torch's message advises to run the code in the file
        found = re.search(r"(?:GLOBAL|Unsupported class) (\S+)", str(error))
        what = f"it holds more than tensors ({found[1]})" if found else "it holds more than tensors, or is damaged"
        return f"{what}; who made it can save its state dict alone"
    return "it is empty, damaged or of another kind" if isinstance(error, (LookupError, EOFError)) else text


def guided(model: str, flags: str, out: str) -> None:
    """Converts a checkpoint of guided-diffusion to a pipeline folder.

    Args:
        model: the `.pt` file.
        flags: the flags of its training, a .json file or as typed. `image_size` and the number or width of heads are required;
            flags that the weights determine are optional; others have the defaults of guided-diffusion, which are printed.
        out: a new or empty folder.

    Raises:
        InputError: a file cannot be read, weights and flags conflict, or UNet2DModel does not support the network.
    """
    given, folder = read_flags(flags), new_folder(out)
    if not Path(model).exists():
        raise InputError(f"model {model} does not exist; name a .pt file")
    raise_all(_missing(given), "flags")
    values = {**DEFAULT_FLAGS, **given}
    try:
        unet = _network(model, given, values)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:  # for unexpected shapes
        why = f"{error} is missing" if isinstance(error, KeyError) else reason(error)
        raise InputError(f"{model} holds no UNet of guided-diffusion as its flags say: {why}") from error
    scheduler = exported_scheduler(_objective(values, unet.config.out_channels > unet.config.in_channels))
    pipeline = PixelPipeline(unet, scheduler) if unet.config.num_class_embeds else DDPMPipeline(unet, scheduler)
    with filled_folder(folder, MODEL_INDEX) as temporary:
        pipeline.save_pretrained(temporary, safe_serialization=True)
    names = ("use_new_attention_order", "noise_schedule", "diffusion_steps", "predict_xstart", "predict_v")
    if assumed := [f"{name} {values[name]}" for name in names if name not in given]:
        say(f"assumed, as the reference does where flags are left out: {', '.join(assumed)}")
    if values["predict_xstart"]:  # the weights do not tell: their shapes are the same
        say(
            "flag predict_xstart is True: check that the network was trained with it and not only sampled with it (the README of the "
            "paper's code samples a network trained for noise so); if it was trained without, convert again with predict_xstart False"
        )
    say(f"{out}: {sum(p.numel() for p in unet.parameters())} parameters, images of {values['image_size']} pixels; sample.py draws with it")


def _missing(given: Mapping[str, Any]) -> list[str]:
    """Required flags that are missing: the weights do not determine them, and their defaults are not safe."""
    found = []
    if given.get("image_size", 0) < 1:
        found.append("image_size is missing, and the weights do not tell it; add it, such as --image_size 256")
    if not any(given.get(name, 0) >= 1 for name in ("num_head_channels", "num_heads")):
        found.append("num_head_channels (or num_heads) is missing, and the weights do not tell it; the paper's runs have 64")
    return found


def _network(model: str, given: Mapping[str, Any], values: Mapping[str, Any]) -> UNet2DModel:
    """The network of a checkpoint. `given` are the user's flags, `values` these with the defaults of guided-diffusion."""
    state = read_state(model)
    raise_all(state_problems(state), f"{model} holds no UNet of guided-diffusion")
    shape = infer_shape(state)
    raise_all(size_problems(shape, values["image_size"]), f"{model} and its flags differ")
    told = flags_from_weights(state, shape, values["image_size"])
    raise_all(unsupported_features(values, state, shape), f"{model} cannot be converted")
    raise_all(flag_conflicts(given, told, shape), f"{model} and its flags differ")
    head_dim = resolve_head_dim(values, shape)
    unet = build_unet(unet_arguments(shape, told, values["image_size"], head_dim, state["input_blocks.0.0.weight"].shape[1]))
    _load(unet, from_guided(state, shape, head_dim, values["use_new_attention_order"]), model)
    return unet


def _load(unet: UNet2DModel, weights: State, model: str) -> None:
    """Loads a state dict. Raises InputError if a weight is missing, unknown, of another shape, or not finite."""
    try:
        unet.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"{model} does not fit the network that its names describe: {reason(error)}") from error
    require_finite(weights, model)


def _objective(flags: Mapping[str, Any], learn_sigma: bool) -> ObjectiveConfig:
    """The objective of the checkpoint, as far as a scheduler needs it.

    Raises:
        InputError: a noise schedule that guided-diffusion does not have.
    """
    if flags["noise_schedule"] not in ("linear", "cosine"):
        raise InputError(f"flag noise_schedule is {flags['noise_schedule']!r}, but the reference has linear and cosine only")
    if flags["predict_xstart"] and flags["predict_v"]:
        raise InputError("flags predict_xstart and predict_v are both True, but a network has one target; correct them")
    prediction_type: PredictionType = "sample" if flags["predict_xstart"] else "v_prediction" if flags["predict_v"] else "epsilon"
    objective = ObjectiveConfig(
        prediction_type=prediction_type,
        weighting="constant",  # not used by schedulers
        noise_schedule=flags["noise_schedule"],
        num_train_timesteps=flags["diffusion_steps"],
        learn_sigma=learn_sigma,
    )
    problems = range_problems(ObjectiveConfig, dataclasses.asdict(objective)) or objective_problems(objective)
    raise_all(problems, "flags diffusion_steps and noise_schedule")
    return objective


# ---- export to guided-diffusion --------------------------------------------------------------------------------------


def export(model: str, out: str, allow_pickle_import: bool = False) -> None:
    """Writes the network of a pipeline as a state dict that guided-diffusion loads, and its flags as JSON.

    Args:
        model: a run directory, a pipeline folder or a Hub id.
        out: the `.pt` file; the flags go to `OUT.flags.json`.
        allow_pickle_import: also accept a model with .bin weights only.

    Raises:
        InputError: guided-diffusion does not support the network, prediction type or noise schedule.
    """
    flags_file = Path(f"{out}.flags.json")
    require_new_file(out, "model.pt")
    require_new_file(str(flags_file), "model.pt")
    pipeline = load_pipeline(model, allow_pickle_import)
    unet, own = pipeline.unet, pipeline.scheduler
    if not (isinstance(unet, UNet2DModel) and isinstance(unet.config.sample_size, int) and unet.config.attention_head_dim):
        raise InputError(f"{model} cannot be exported: its network is no UNet2DModel with a size of images and of attention heads")
    require_finite(unet.state_dict(), model)
    shape = Shape(
        widths=tuple(unet.config.block_out_channels),
        blocks=unet.config.layers_per_block,
        attends=tuple("Attn" in name for name in unet.config.down_block_types),
        updown=unet.config.downsample_type == "resnet",
    )
    raise_all(_unsupported_by_guided_diffusion(unet, own, shape), f"{model} cannot be exported")
    state = to_guided(unet.state_dict(), shape, unet.config.attention_head_dim)
    size = unet.config.sample_size
    flags = {
        **DEFAULT_FLAGS,
        **flags_from_weights(state, shape, size),
        "image_size": size,
        "num_head_channels": unet.config.attention_head_dim,
        "diffusion_steps": own.config.num_train_timesteps,
        "noise_schedule": _schedule_name(own),
        "predict_xstart": own.config.prediction_type == "sample",
        "predict_v": own.config.prediction_type == "v_prediction",
    }
    box = io.BytesIO()
    torch.save(state, box)
    remove_old_temporary_files(Path(out).parent)
    write_file(flags_file, (json.dumps(flags, indent=2) + "\n").encode())
    try:
        write_file(Path(out), box.getvalue())
    except BaseException:
        flags_file.unlink(missing_ok=True)  # else the same command would refuse to replace it
        raise
    say(f"{out}: load it with the flags in {flags_file}")


def _unsupported_by_guided_diffusion(unet: UNet2DModel, own: Any, shape: Shape) -> list[str]:
    """What guided-diffusion does not support, one sentence each."""
    found, config = [], unet.config
    told = {
        "use_scale_shift_norm": config.resnet_time_scale_shift == "scale_shift",
        "class_cond": bool(config.num_class_embeds),
        "num_classes": config.num_class_embeds,
        "learn_sigma": config.out_channels == 2 * config.in_channels,
    }
    if config.in_channels != 3:
        found.append(f"its images have {config.in_channels} channel(s), those of the reference 3")
    if any(width % 32 for width in shape.widths):
        found.append(f"its levels have {list(shape.widths)} channels, but the reference's norms have 32 groups")
    elif size := size_problems(shape, config.sample_size):
        found += size
    elif config.attention_head_dim < 1 or any(width % config.attention_head_dim for width in attention_widths(shape)):
        found.append(
            f"its attention heads have {config.attention_head_dim} channels, which do not divide {sorted(attention_widths(shape))}"
        )
    else:
        twin = build_unet(unet_arguments(shape, told, config.sample_size, config.attention_head_dim, config.in_channels)).config
        found += [
            f"its {name} is {config[name]}, that of the reference {twin[name]}" for name in differing_fields(twin, config, {"dropout"})
        ]
    target, T = own.config.get("prediction_type"), own.config.get("num_train_timesteps")
    if is_flow(own):
        found.append("it is a rectified flow, which the reference does not know")
    elif target not in ("epsilon", "sample", "v_prediction"):
        found.append(f"its {type(own).__name__} has prediction_type {target}, but the reference predicts epsilon, sample or v_prediction")
    elif not isinstance(T, int) or T < 2:
        found.append(f"its {type(own).__name__} has num_train_timesteps {T}, but must have at least 2")
    elif not _schedule_name(own):
        found.append("its noise schedule is neither linear nor cosine as the reference has them (shifted, rescaled, or another)")
    return found


def _schedule_name(own: Any) -> str | None:
    """The name of a scheduler's noise schedule in guided-diffusion; None if it has none."""
    table, T = schedule_of_scheduler(own).alphas_cumprod, own.config.num_train_timesteps
    if len(table) != T:  # custom betas, not T of them
        return None
    for name in ("linear", "cosine"):
        theirs = make_schedule(ObjectiveConfig(noise_schedule=name, num_train_timesteps=T)).alphas_cumprod
        if (table - theirs).abs().max() < 1e-6:
            return name
    return None
