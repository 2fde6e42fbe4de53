"""LoRAs in the names of kohya's scripts (sd-scripts), which most interfaces read, and back to those of diffusers."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..config.schema.types import LoraFormat
from ..errors import InputError
from ..pipelines.lora import METADATA, alpha_of, lora_file, read_lora
from ..runs.lora_folder import BASE_RECORD, LORA_WEIGHTS, base_record
from ..utils.console import say
from ..utils.files import filled_folder, new_folder, remove_old_temporary_files, require_new_file, write_file
from .single_file_names import blocks_per_level, renamed, text_encoder_name, unet_modules

XL_WIDTH = 2048  # of the text embeddings of Stable Diffusion XL
LAYERS = 2  # residual blocks per level of the UNets of Stable Diffusion

_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
_SD_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te"}  # of Stable Diffusion 1.x and 2.x
_DIRECTIONS = {"A": "lora_down", "B": "lora_up"}

_XL_ATTENDS = (False, True, True)  # which levels of the UNet of Stable Diffusion XL have transformers

# Names of modules with an underscore, which a name with underscores in place of dots does not tell from two modules.
_WORDS = re.compile(
    "down_blocks|mid_block|up_blocks|transformer_blocks|to_(?:q|k|v|out)|proj_(?:in|out)|conv_(?:in|out|shortcut)|time_emb_proj|"
    "(?:time|add)_embedding|linear_[12]|text_model|self_attn|(?:q|k|v|out)_proj|text_projection|[^_]+"
)

# The modules of Stable Diffusion that can have adapters. Any other name would be converted to one that no model has.
_UNET_MODULE = re.compile(r"(?:down|up)_blocks\.\d+\..+|mid_block\..+|conv_(?:in|out)|(?:time|add)_embedding\.linear_[12]")
_TEXT_MODULE = re.compile(r"text_model\.encoder\.layers\.\d+\..+|text_projection")


def convert(lora: str, out: str, format: LoraFormat) -> None:
    """Converts a LoRA: to a file with kohya's names, or to a folder with a file that `load_lora_weights` reads.

    Args:
        lora: a run directory, a .safetensors file or a Hub id.
        out: the new file FILE.safetensors (kohya), or the new folder (diffusers).
        format: of `out`.

    Raises:
        InputError: it cannot be read, has other names, or `out` exists.
        CannotWriteError: `out` cannot be written.
    """
    path, place = lora_file("lora", lora), Path(out)
    tensors, about = read_lora(path, f"LoRA {lora}")
    if format == "kohya":
        if any(name.endswith(".lora_down.weight") for name in tensors):
            raise InputError(f"LoRA {lora} has the names of kohya's scripts already")
        if place.suffix != ".safetensors":
            raise InputError(f"out is {out}, which is no place for a LoRA; name a new file that ends in .safetensors")
        require_new_file(out, "lora.safetensors")
        record = base_record(path.parent) if path.name == LORA_WEIGHTS else {}
        xl = record["pipeline"] == "StableDiffusionXLPipeline" if "pipeline" in record else is_xl(tensors, lora)
        found = to_kohya(tensors, about, xl, record.get("layers_per_block", LAYERS))
        remove_old_temporary_files(place.parent)
        write_file(place, safetensors.torch.save(found, _kohya_metadata(found, xl)))
    else:
        place = new_folder(out)
        found, about = to_diffusers(tensors)
        header = {"format": "pt", METADATA: json.dumps(about, indent=2, sort_keys=True)}
        with filled_folder(place, LORA_WEIGHTS) as folder:
            safetensors.torch.save_file(found, folder / LORA_WEIGHTS, header)
    say(f"{len(found)} tensors in {place}")


def is_xl(tensors: Mapping[str, Tensor], lora: str) -> bool:
    """Whether a LoRA in diffusers' names is one of Stable Diffusion XL, as the width of its text embeddings says.

    Raises:
        InputError: it has no adapter by which one could tell.
    """
    if any(name.startswith("text_encoder_2.") for name in tensors):
        return True
    widths = {tensor.shape[1] for name, tensor in tensors.items() if re.search(r"attn2\.to_[kv]\.lora_A\.weight$", name)}
    if not widths:
        raise InputError(
            f"LoRA {lora} does not say whether it is one of Stable Diffusion XL: it has neither {BASE_RECORD} beside it nor attn2"
        )
    return XL_WIDTH in widths


# ---- to kohya's names ------------------------------------------------------------------------------------------------


def to_kohya(tensors: Mapping[str, Tensor], about: Mapping[str, Any], xl: bool, layers: int | Sequence[int] = LAYERS) -> dict[str, Tensor]:
    """A LoRA in the names of kohya's scripts, with the alpha of each module.

    Args:
        tensors: in the names of diffusers: PART.MODULE.lora_A.weight, of which A comes first.
        about: of `read_lora`; without it alpha is the rank.
        xl: whether it is one of Stable Diffusion XL.
        layers: residual blocks per level of its UNet; or a list, of each level.

    Raises:
        InputError: a name is another one.
    """
    found, prefixes = dict[str, Tensor](), _PREFIXES if xl else _SD_PREFIXES
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(unet|text_encoder|text_encoder_2)\.(.+)\.lora_([AB])\.weight", name)
        if not match or match[1] not in prefixes:
            raise InputError(f"the LoRA has {name}, which has no name in kohya's scripts")
        part, module, kind = match.groups()
        module = module if part == "unet" else text_encoder_name(module)
        if not _is_module(part, module):
            raise InputError(f"the LoRA has {name}, which is of no module of Stable Diffusion")
        theirs = original_name(module, layers) if xl and part == "unet" else module
        stem = f"{prefixes[part]}_{theirs.replace('.', '_')}"
        found[f"{stem}.{_DIRECTIONS[kind]}.weight"] = tensor.contiguous()
        if kind == "A":
            found[f"{stem}.alpha"] = torch.tensor(alpha_of(name, len(tensor), about))
    return found


def _is_module(part: str, module: str) -> bool:
    """Whether it can be a module of Stable Diffusion, by its name in diffusers."""
    return bool((_UNET_MODULE if part == "unet" else _TEXT_MODULE).fullmatch(module))


def original_name(module: str, layers: int | Sequence[int] = LAYERS) -> str:
    """The name in the original code of a module of diffusers' UNet of Stable Diffusion XL.

    Raises:
        InputError: it is not known.
    """
    modules = unet_modules(blocks_per_level(layers), _XL_ATTENDS)
    if (name := renamed(module, modules)) == module:
        raise InputError(f"the UNet of Stable Diffusion XL has no module {module}")
    return name


def _kohya_metadata(found: Mapping[str, Tensor], xl: bool) -> dict[str, str]:
    """What interfaces read in the header."""
    ranks = Counter(len(tensor) for name, tensor in found.items() if name.endswith(".lora_down.weight"))
    alphas = Counter(tensor.item() for name, tensor in found.items() if name.endswith(".alpha"))
    about = {"ss_network_dim": str(ranks.most_common(1)[0][0]), "ss_network_alpha": str(alphas.most_common(1)[0][0])}
    return {"format": "pt", "ss_network_module": "networks.lora", **about} | ({"ss_base_model_version": "sdxl_base_v1-0"} if xl else {})


# ---- to diffusers' names ---------------------------------------------------------------------------------------------


def to_diffusers(tensors: Mapping[str, Tensor], layers: int = LAYERS) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A LoRA of kohya's scripts in the names of diffusers, and what goes into the header: rank and alpha of each part, and its modules.

    Raises:
        InputError: a name is another one, as of LoHa or LoKr, or an alpha is no number.
    """
    found, ranks, alphas = dict[str, Tensor](), dict[str, dict[str, int]](), dict[str, dict[str, float]]()
    for name, down in tensors.items():
        stem, _, kind = name.partition(".")
        if kind not in ("lora_down.weight", "lora_up.weight", "alpha") or f"{stem}.lora_down.weight" not in tensors:
            raise InputError(f"the LoRA has {name}, which is no name of kohya's networks.lora (or is already one of diffusers)")
        if kind == "alpha" and down.numel() != 1:
            raise InputError(f"the LoRA has {name} of {down.numel()} numbers, but alpha is one")
        if kind != "lora_down.weight":
            continue
        part, module = diffusers_name(stem, layers)
        found[f"{part}.{module}.lora_A.weight"] = down
        found[f"{part}.{module}.lora_B.weight"] = tensors[f"{stem}.lora_up.weight"]
        target = module.removeprefix("text_model.")  # which transformers 5 leaves out; peft compares the ends of names
        ranks.setdefault(part, {})[target] = len(down)
        alphas.setdefault(part, {})[target] = float(tensors[f"{stem}.alpha"]) if f"{stem}.alpha" in tensors else float(len(down))
    about: dict[str, Any] = {}
    for part, rank_of in ranks.items():
        rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (rank_of, alphas[part]))
        values = {
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": sorted(rank_of),
            "rank_pattern": {module: own for module, own in rank_of.items() if own != rank},
            "alpha_pattern": {module: own for module, own in alphas[part].items() if own != alpha},
        }
        about |= {f"{part}.{name}": value for name, value in values.items()}
    return found, about


def diffusers_name(stem: str, layers: int = LAYERS) -> tuple[str, str]:
    """Part (unet, text_encoder, text_encoder_2) and module of diffusers that a name of kohya's scripts stands for.

    Raises:
        InputError: it is not known.
    """
    prefixes = {**{prefix: part for part, prefix in _PREFIXES.items()}, "lora_te": "text_encoder"}
    prefix = next((prefix for prefix in prefixes if stem.startswith(f"{prefix}_")), None)
    if prefix is None:
        raise InputError(f"the LoRA has {stem}, which does not begin with {', '.join(prefixes)}")
    part, name = prefixes[prefix], stem.removeprefix(f"{prefix}_")
    module = _of_original(name, layers) if part == "unet" else _dotted(name)
    if not _is_module(part, module):
        raise InputError(f"the LoRA has {stem}, which is no module of Stable Diffusion XL, 2.x or 1.x")
    return part, module


def _dotted(name: str) -> str:
    return ".".join(_WORDS.findall(name))


def _of_original(name: str, layers: int) -> str:
    """The inverse of `original_name`, of a name with underscores in place of dots; other names are diffusers' own."""
    modules = {theirs.replace(".", "_"): ours for ours, theirs in unet_modules(layers, _XL_ATTENDS).items()}
    stem = max((each for each in modules if name == each or name.startswith(f"{each}_")), key=len, default=None)
    if stem is None:
        return _dotted(name)
    return ".".join(filter(None, (modules[stem], _dotted(name[len(stem) :]))))
