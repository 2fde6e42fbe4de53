"""LoRAs on the disk: their names and strengths in commands, their base models, and weights in the names of diffusers. No torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.hub_names import is_model_id, is_pinned
from ..errors import InputError
from ..utils.files import hash_of, read_json
from .checkpoints import newest_state
from .part_files import loaded_files
from .run_directory import CHECKPOINTS

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"  # the name by which diffusers finds them
BASE_RECORD = "base_model.json"  # beside them: what they were trained on
PARTS = ("unet.", "text_encoder.", "text_encoder_2.")  # of a LoRA: how names of its tensors begin
ADAPTER = "default"  # peft's name of an adapter, which is part of the names of its parameters


# ---- names -----------------------------------------------------------------------------------------------------------


def with_strength(text: str) -> tuple[str, float]:
    """NAME or NAME:STRENGTH as name and strength, which is 1 if left out."""
    name, _, number = text.rpartition(":")
    try:
        return (name, float(number)) if name else (text, 1.0)
    except ValueError:  # a part of a name
        return text, 1.0


def lora_problems(field: str, name: str) -> list[str]:
    """A LoRA that is neither on this disk nor the name of a repository."""
    path = Path(name).expanduser()
    if not name or not (path.exists() or is_model_id(name)):
        return [f"{field} {name} does not exist; name a run directory, a .safetensors file or a Hub id such as user/name"]
    if path.is_dir() and not (path / LORA_WEIGHTS).is_file():
        return [f"{field} {name} is no LoRA: it has no {LORA_WEIGHTS}"]
    if path.is_file() and path.suffix != ".safetensors":
        return [f"{field} {name} is a {path.suffix or 'file without a suffix'}, but must be a .safetensors file"]
    return []


def strength_problems(loras: tuple[str, ...]) -> list[str]:
    """LoRAs of a sampling command that do not exist, or whose strength is no finite number."""
    found = []
    for name, strength in map(with_strength, loras):
        found += lora_problems("lora", name)
        if not math.isfinite(strength):
            found.append(f"lora {name} has the strength {strength}, but must have a finite one, such as {name}:0.8")
    return found


# ---- the base model --------------------------------------------------------------------------------------------------


_RECORD_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "base_model": str,
    "vae": (str, type(None)),
    "pipeline": str,
    "layers_per_block": (int, list),
    "force_zeros_for_empty_prompt": bool,
    "scheduler": dict,
    "files": dict,
}


def base_record(folder: Path) -> Mapping[str, Any]:
    """What a LoRA says of its base model; nothing where it says nothing.

    Raises:
        InputError: a value has another type than a training writes.
    """
    found = read_json(folder / BASE_RECORD)
    if not isinstance(found, dict):
        return {}
    for name, types in _RECORD_TYPES.items():
        if name in found and not isinstance(found[name], types):
            raise InputError(f"{folder / BASE_RECORD} is damaged: {name} is {json.dumps(found[name])}; put the original back")
    return found


def base_of_lora(folder: Path, model: str, given: str | None) -> str:
    """The base model of a LoRA: a path that exists, or a Hub id.

    Args:
        folder: of the LoRA.
        model: its name for messages.
        given: the base model that a command names.

    Raises:
        InputError: it is not known, or not there.
    """
    if given is not None:
        found = given if is_model_id(given) else _existing(given)
        if not found:
            raise InputError(f"base_model {given} does not exist; name the pipeline folder, or the Hub id, that {model} was trained on")
        return found
    if found := _recorded(folder, "base_model"):
        return found
    name = base_record(folder).get("base_model")
    known = f"was trained on base_model {name}, which is not there" if name else f"does not say its base model (no {BASE_RECORD})"
    raise InputError(f"{model} is a LoRA and {known}; name its base model with --base_model, a pipeline folder or a Hub id")


def vae_of_lora(folder: Path, model: str) -> str | None:
    """The VAE in place of that of the base model: a path that exists, or a Hub id; None where it is that of the base model.

    Raises:
        InputError: it is not there.
    """
    name = base_record(folder).get("vae")
    if name and not (found := _recorded(folder, "vae")):
        raise InputError(f"{model} was trained with the VAE {name}, which is not there; put it back")
    return found if name else None


def _recorded(folder: Path, name: str) -> str | None:
    """A model of the record, where it is now: a relative path may be that of another working directory, as the checkpoints say."""
    recorded = base_record(folder).get(name)
    moved = newest_state(folder / CHECKPOINTS).get("paths", {}).get(name)
    if recorded and is_pinned(recorded):
        return str(recorded)
    return next((found for place in (recorded, moved) if place and (found := _existing(place))), None)


def _existing(folder: str) -> str | None:
    path = Path(folder).expanduser()
    return str(path) if path.is_dir() else None


def require_base(record: Mapping[str, Any], model: str, base_model: str, base: Path, vae: Path) -> None:
    """Compares the files of a base model with those that a LoRA was trained on.

    Args:
        record: of the LoRA; without one, any base model will do.
        model: name of the LoRA.
        base_model: name of the base model.
        base: its folder.
        vae: the folder of the VAE.

    Raises:
        InputError: a file is missing, or another one.
    """
    for name, digest in record.get("files", {}).items():
        part, _, file = name.partition("/")
        path = loaded_files(vae if part == "vae" else base / part).get(file)
        if path is None:
            raise InputError(f"base_model {base_model} is not the one that {model} was trained on: it has no {name}; {_ADVICE}")
        if hash_of(path) != digest:
            raise InputError(f"base_model {base_model} is not the one that {model} was trained on: its {name} is another; {_ADVICE}")


_ADVICE = "name that one with --base_model, or draw with this one and --lora"


# ---- weights ---------------------------------------------------------------------------------------------------------


def exported_name(name: str) -> str:
    """The name that a parameter of an adapter has in the file that diffusers loads.

    Without adapters on the text encoders the names of a network are those of its UNet.
    """
    name = name.replace(f".{ADAPTER}.", ".")
    if not name.startswith(PARTS):
        return f"unet.{name}"
    # transformers 5 leaves the word out, and version 4 needs it; diffusers knows both.
    return re.sub(r"^(text_encoder|text_encoder_2)\.encoder\.", r"\1.text_model.encoder.", name)


def exported_weights(weights: Path, like: Path) -> bytes:
    """The weights of a checkpoint as a file that diffusers loads.

    Args:
        weights: adapters in a checkpoint, by the names of the network's parameters.
        like: exported adapters of another step of the same run, whose metadata (rank, alpha, targets) are those of all steps.
    """
    header, data = _parts(weights)
    metadata = _parts(like)[0]["__metadata__"]
    renamed = {exported_name(name): entry for name, entry in header.items() if name != "__metadata__"}
    content = json.dumps({"__metadata__": metadata, **renamed}).encode()
    content += b" " * (-len(content) % 8)  # the tensors begin at a multiple of 8
    return len(content).to_bytes(8, "little") + content + data


def _parts(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and tensors of a safetensors file: eight bytes with the header's length, JSON, and the bytes of the tensors."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]
