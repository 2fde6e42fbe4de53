"""LoRAs in the names of kohya's scripts (sd-scripts), which most interfaces read, and back to those of diffusers."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..config.schema import LoraFormat
from ..errors import InputError
from ..pipelines.lora import METADATA, lora_file, read_lora
from ..runs.lora_folder import BASE_RECORD, LORA_WEIGHTS, base_record
from ..tasks.unet import require_finite
from ..utils.console import say
from ..utils.files import require_writable, temporary_folder, translate_write_errors, user_files, write_file

XL_WIDTH = 2048  # of the text embeddings of Stable Diffusion XL
LAYERS = 2  # residual blocks per level of the UNets of Stable Diffusion

_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
_SD_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te"}  # of Stable Diffusion 1.x and 2.x
_DIRECTIONS = {"A": "lora_down", "B": "lora_up"}

# What kohya's scripts, whose UNet of Stable Diffusion XL has the names of the original code, call modules of diffusers' UNet.
_OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_INNER = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
_PLACES = {"resnets": 0, "attentions": 1, "upsamplers": 2}

# Names of modules with an underscore, which a name with underscores in place of dots does not tell from two modules.
_WORDS = re.compile(
    "down_blocks|mid_block|up_blocks|transformer_blocks|to_(?:q|k|v|out)|proj_(?:in|out)|conv_(?:in|out|shortcut)|time_emb_proj|"
    "(?:time|add)_embedding|linear_[12]|text_model|self_attn|(?:q|k|v|out)_proj|text_projection|[^_]+"
)


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
    require_finite(tensors, f"LoRA {lora}")
    if format == "kohya":
        _require_new(place, place.suffix == ".safetensors" and not place.exists(), "name a new file that ends in .safetensors")
        record = base_record(path.parent) if path.name == LORA_WEIGHTS else {}
        xl = record["pipeline"] == "StableDiffusionXLPipeline" if record else is_xl(tensors, lora)
        found = to_kohya(tensors, about, xl, record.get("layers_per_block", LAYERS))
        require_writable(place)
        write_file(place, safetensors.torch.save(found, _kohya_metadata(found, xl)))
    else:
        _require_new(place, not place.exists() or (place.is_dir() and not user_files(place)), "name a new or empty folder")
        found, about = to_diffusers(tensors)
        header = {"format": "pt", METADATA: json.dumps(about, indent=2, sort_keys=True)}
        with translate_write_errors(place), temporary_folder(place) as folder:
            write_file(folder / LORA_WEIGHTS, safetensors.torch.save(found, header))
            folder.rename(place)
    say(f"{len(found)} tensors in {place}")


def _require_new(out: Path, is_new: bool, advice: str) -> None:
    if not is_new:
        raise InputError(f"out is {out}, which exists or is no place for a LoRA; {advice}")


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


def to_kohya(tensors: Mapping[str, Tensor], about: Mapping[str, Any], xl: bool, layers: int = LAYERS) -> dict[str, Tensor]:
    """A LoRA in the names of kohya's scripts, with the alpha of each module.

    Args:
        tensors: in the names of diffusers: PART.MODULE.lora_A.weight, of which A comes first.
        about: of `read_lora`; without it alpha is the rank.
        xl: whether it is one of Stable Diffusion XL.
        layers: residual blocks per level of its UNet.

    Raises:
        InputError: a name is another one.
    """
    found, prefixes = dict[str, Tensor](), _PREFIXES if xl else _SD_PREFIXES
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(unet|text_encoder|text_encoder_2)\.(.+)\.lora_([AB])\.weight", name)
        if not match or match[1] not in prefixes:
            raise InputError(f"the LoRA has {name}, which has no name in kohya's scripts")
        part, module, kind = match.groups()
        if part == "unet":
            theirs = original_name(module, layers) if xl else module
        else:  # transformers 5 leaves the first word out
            theirs = module if module.startswith(("text_model.", "text_projection")) else f"text_model.{module}"
        stem = f"{prefixes[part]}_{theirs.replace('.', '_')}"
        found[f"{stem}.{_DIRECTIONS[kind]}.weight"] = tensor.contiguous()
        if kind == "A":
            found[f"{stem}.alpha"] = torch.tensor(_alpha(module, len(tensor), part, about))
    return found


def _alpha(module: str, rank: int, part: str, about: Mapping[str, Any]) -> float:
    """The alpha of a module, as peft finds it: of the first pattern that its name ends with, else that of all."""
    patterns = about.get(f"{part}.alpha_pattern") or {}
    own = next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), None)
    alpha = float(about.get(f"{part}.lora_alpha", rank) if own is None else own)
    return alpha * math.sqrt(rank) if about.get(f"{part}.use_rslora") else alpha


def original_name(module: str, layers: int = LAYERS) -> str:
    """The name in the original code of a module of diffusers' UNet of Stable Diffusion XL.

    Raises:
        InputError: it is not known.
    """
    if module in _OUTER:
        return _OUTER[module]
    match = re.fullmatch(r"(down_blocks|up_blocks)\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", module)
    middle = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", module)
    if middle:
        part, number, inner = middle.groups()
        return f"middle_block.{1 if part == 'attentions' else 2 * int(number)}.{_INNER.get(inner, inner)}"
    if not match:
        raise InputError(f"the UNet of Stable Diffusion XL has no module {module}")
    block, level, part, number, inner = match.groups()
    place = int(level) * (layers + 1) + (layers if "samplers" in part else int(number))
    if block == "down_blocks":
        return f"input_blocks.{place + 1}." + ("0.op" if part == "downsamplers" else f"{_PLACES[part]}.{_INNER.get(inner, inner)}")
    return f"output_blocks.{place}.{_PLACES[part]}.{_INNER.get(inner, inner)}"


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
        InputError: a name is another one, as of LoHa or LoKr, or a tensor is missing.
    """
    found, ranks, alphas = dict[str, Tensor](), dict[str, dict[str, int]](), dict[str, dict[str, float]]()
    for name, down in tensors.items():
        stem, _, kind = name.partition(".")
        if kind not in ("lora_down.weight", "lora_up.weight", "alpha") or f"{stem}.lora_down.weight" not in tensors:
            raise InputError(f"the LoRA has {name}, which is no name of kohya's networks.lora (or is already one of diffusers)")
        if kind != "lora_down.weight":
            continue
        if f"{stem}.lora_up.weight" not in tensors:
            raise InputError(f"the LoRA lacks {stem}.lora_up.weight")
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
    name = stem.removeprefix(f"{prefix}_")
    return prefixes[prefix], _of_original(name, layers) if prefix == "lora_unet" else _dotted(name)


def _dotted(name: str) -> str:
    return ".".join(_WORDS.findall(name))


def _of_original(name: str, layers: int) -> str:
    """The inverse of `original_name`, of a name with underscores in place of dots; other names are diffusers' own."""
    outer = {theirs.replace(".", "_"): ours for ours, theirs in _OUTER.items()}
    inner_names = {theirs.replace(".", "_"): ours for ours, theirs in _INNER.items()}
    if name in outer:
        return outer[name]
    if match := re.fullmatch(r"middle_block_([012])_(.+)", name):
        place, inner = int(match[1]), match[2]
        part = "attentions.0" if place == 1 else f"resnets.{place // 2}"
        return f"mid_block.{part}.{inner_names.get(inner, _dotted(inner))}"
    match = re.fullmatch(r"(input|output)_blocks_(\d+)_([012])_(.+)", name)
    if not match:
        return _dotted(name)
    number, place, inner = int(match[2]), int(match[3]), match[4]
    level, layer = divmod(number - (match[1] == "input"), layers + 1)
    block = f"{'down' if match[1] == 'input' else 'up'}_blocks.{level}"
    if inner == "op":
        return f"{block}.downsamplers.0.conv"
    if inner == "conv":
        return f"{block}.upsamplers.0.conv"
    return f"{block}.{'attentions' if place else 'resnets'}.{layer}.{inner_names.get(inner, _dotted(inner))}"
