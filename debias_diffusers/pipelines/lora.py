"""LoRAs on stock pipelines: a LoRA with its base model, more LoRAs, and their strengths."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import safetensors
from diffusers import AutoencoderKL
from torch import Tensor

from ..config.hub_names import is_model_id
from ..errors import InputError, raise_all
from ..hub import client
from ..runs.lora_folder import (
    ADAPTER,
    LORA_WEIGHTS,
    base_of_lora,
    base_record,
    exported_name,
    lora_problems,
    require_base,
    vae_of_lora,
    with_strength,
)
from ..runs.model_folder import is_lora
from ..utils import text_libraries
from .loading import explained_errors, folder_of_model, load_part, require_finite
from .text_pipeline import load_text_pipeline, quiet

METADATA = "lora_adapter_metadata"  # diffusers' key in the header of a file
# The ends of the names of A and B: of diffusers, of kohya, and older ones.
_UP_OF = {".lora_A.weight": ".lora_B.weight", ".lora_down.weight": ".lora_up.weight", ".lora.down.weight": ".lora.up.weight"}


def load_text_model(model: str, variant: str | None = None, base_model: str | None = None) -> Any:
    """Loads a text-to-image model: a whole one as `load_text_pipeline`, or a LoRA on its base model.

    Args:
        model: a run directory, a pipeline folder or a Hub id.
        variant: of the weights of UNet or LoRA, such as ema_0_999; None for the default weights.
        base_model: of a LoRA, in place of the one that it names.

    Raises:
        InputError: as of `load_text_pipeline`; or the base model of a LoRA is missing, or another one.
        HubError: the Hub cannot be reached or rejects the request.
    """
    if not is_lora(client.configurations(model)):
        return load_text_pipeline(model, variant)
    name = f"{Path(LORA_WEIGHTS).stem}.{variant}.safetensors" if variant else LORA_WEIGHTS
    folder = client.configurations(model, name)
    if not (folder / name).is_file():
        raise InputError(f"model {model} has no {name}; " + ("take --weights ema" if variant else "train it, or name another"))
    base, vae = base_of_lora(folder, model, base_model), vae_of_lora(folder, model)
    base_folder = folder_of_model(base)
    vae_folder = _vae_folder(vae) if vae else base_folder / "vae"
    record = base_record(folder)
    if not (is_model_id(base) and base == record.get("base_model")):  # whose commit says what it is
        require_base(record, model, base, base_folder, vae_folder)
    pipeline = load_text_pipeline(base)
    if vae:
        pipeline.vae = load_part(AutoencoderKL, vae_folder, vae).requires_grad_(False).eval()
    if "scheduler" in record:
        _set_scheduler(pipeline, record, model)
    add_lora(pipeline, folder / name, model, ADAPTER)
    return pipeline


def _vae_folder(name: str) -> Path:
    folder = client.download_model(name) if is_model_id(name) else Path(name).expanduser()
    return folder / "vae" if (folder / "vae" / "config.json").is_file() else folder


def _set_scheduler(pipeline: Any, record: Mapping[str, Any], model: str) -> None:
    """Gives a pipeline the scheduler with which a LoRA was trained, and its "no prompt"."""
    values = record["scheduler"]
    with explained_errors(f"model {model}"):
        pipeline.scheduler = getattr(diffusers, values["_class_name"]).from_config(values)
    if "force_zeros_for_empty_prompt" in pipeline.config and "force_zeros_for_empty_prompt" in record:
        pipeline.register_to_config(force_zeros_for_empty_prompt=record["force_zeros_for_empty_prompt"])


# ---- adapters --------------------------------------------------------------------------------------------------------


def lora_file(field: str, name: str) -> Path:
    """The weight file of a LoRA: of a run directory, a .safetensors file, or a Hub id.

    Raises:
        InputError: there is none.
        HubError: the Hub cannot be reached or rejects the request.
    """
    raise_all(lora_problems(field, name), "LoRA")
    if not is_model_id(name):
        path = Path(name).expanduser()
        return path / LORA_WEIGHTS if path.is_dir() else path
    path = client.configurations(name, LORA_WEIGHTS) / LORA_WEIGHTS
    if not path.is_file():
        raise InputError(f"{field} {name} has no {LORA_WEIGHTS}; download its .safetensors file, and name that")
    return path


def read_lora(path: Path, name: str) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Tensors of a file by name, and what diffusers wrote into its header of rank, alpha and targets, if anything.

    Raises:
        InputError: it is damaged, a tensor is missing or has another rank than its other half, or values are not finite.
    """
    with explained_errors(name), safetensors.safe_open(path, "pt") as file:
        about = json.loads((file.metadata() or {}).get(METADATA, "{}"))
        _require_numbers(about, name)
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    downs = _downs(tensors)
    if not downs:
        raise InputError(f"{name} has no adapters: no tensor's name ends in {' or '.join(_UP_OF)}")
    for down, up in downs.items():
        if up not in tensors:
            raise InputError(f"{name} lacks {up}")
        if tensors[up].ndim < 2 or len(tensors[down]) != tensors[up].shape[1]:
            raise InputError(f"{name} has shapes that do not go together: {down} and {up} have other ranks")
    require_finite(tensors, name)
    return tensors, about


def _downs(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The names of A of a LoRA, and for each that of its B."""
    ends = {name: next((end for end in _UP_OF if name.endswith(end)), None) for name in tensors}
    return {name: name.removesuffix(end) + _UP_OF[end] for name, end in ends.items() if end}


def _require_numbers(about: Mapping[str, Any], name: str) -> None:
    """Raises InputError where ranks or alphas of a header are no positive numbers."""
    for key, value in about.items():
        field = key.rpartition(".")[2]
        numbers = [value] if field in ("r", "lora_alpha") else (value or {}).values() if field in ("rank_pattern", "alpha_pattern") else ()
        if wrong := [number for number in numbers if not isinstance(number, (int, float)) or not 0 < number < math.inf]:
            raise InputError(f"the header of {name} has {key} {wrong[0]!r:.40}, which must be a number above 0")


def alpha_of(name: str, rank: int, about: Mapping[str, Any]) -> float:
    """The alpha of a module, as peft finds it: of the first pattern that its name ends with, else that of all, else its rank.

    Args:
        name: of its A in diffusers: PART.MODULE.lora_A.weight.
        rank: of its adapter.
        about: of `read_lora`.
    """
    part, _, module = name.removesuffix(".lora_A.weight").partition(".")
    patterns = about.get(f"{part}.alpha_pattern") or {}
    own = next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), None)
    alpha = float(about.get(f"{part}.lora_alpha", rank) if own is None else own)
    return alpha * math.sqrt(rank) if about.get(f"{part}.use_rslora") else alpha


def add_loras(pipeline: Any, loras: Sequence[str]) -> None:
    """Adds LoRAs, NAME or NAME:STRENGTH, to a pipeline, which may be that of a LoRA.

    Raises:
        InputError: one cannot be loaded, or is of another base model.
        HubError: the Hub cannot be reached or rejects the request.
    """
    strengths = dict.fromkeys({adapter for found in pipeline.get_list_adapters().values() for adapter in found}, 1.0) if loras else {}
    for number, (name, strength) in enumerate(map(with_strength, loras), start=1):
        add_lora(pipeline, lora_file("lora", name), name, f"lora_{number}")
        strengths[f"lora_{number}"] = strength
    if strengths:
        pipeline.set_adapters([*strengths], [*strengths.values()])


def add_lora(pipeline: Any, path: Path, name: str, adapter: str) -> None:
    """Adds a LoRA, with names of diffusers or of kohya's scripts, as stock pipelines do, under the name `adapter`.

    Raises:
        InputError: peft is not installed; or the file is damaged, or of another base model.
    """
    text_libraries.require_peft()
    given = len(_downs(read_lora(path, f"LoRA {name}")[0]))
    with explained_errors(f"LoRA {name}"), quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # of another LoRA
        try:
            pipeline.load_lora_weights(
                path.parent, weight_name=path.name, adapter_name=adapter, local_files_only=True, use_safetensors=True
            )
        except RuntimeError as error:  # of load_state_dict, with a line for each tensor
            if other := re.search(r"size mismatch for (\S+): ", str(error)):
                raise InputError(f"LoRA {name} cannot be loaded: of another base model, {other[1]} has another shape") from error
            raise
    parts = [part for part in (getattr(pipeline, part, None) for part in pipeline._lora_loadable_modules) if part is not None]
    taken = sum(adapter in getattr(module, "lora_A", ()) for part in parts for module in part.modules())
    if taken != given:  # diffusers says nothing of the others, or a warning
        raise InputError(
            f"LoRA {name} has adapters of {given} modules, of which {taken} are in the base model: it was trained on another one, or "
            f"has names that diffusers does not know (try convert lora --format diffusers)"
        )


def set_weights(pipeline: Any, weights: Mapping[str, Tensor], name: str) -> None:
    """Puts the adapters of a checkpoint in place of those of the pipeline of that LoRA.

    Raises:
        InputError: they are not those of the same LoRA.
    """
    renamed = {exported_name(key): value for key, value in weights.items()}
    parts = {name: part for name in pipeline._lora_loadable_modules if (part := getattr(pipeline, name, None)) is not None}
    there = {
        exported_name(f"{name}.{key}"): parameter
        for name, part in parts.items()
        for key, parameter in part.named_parameters()
        if f".{ADAPTER}." in key and ".lora_" in key
    }
    if renamed.keys() != there.keys() or any(renamed[key].shape != there[key].shape for key in there):
        raise InputError(f"the checkpoints of {name} have other adapters than its {LORA_WEIGHTS}")
    for key, parameter in there.items():
        parameter.data.copy_(renamed[key])
