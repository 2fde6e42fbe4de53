"""The files of a part of a pipeline, such as its UNet, that are loaded. No torch."""

from __future__ import annotations

import re
from pathlib import Path

HALF = "fp16"  # variant that some models are published as alone

# Configurations, vocabularies and weights, but no variants of these.
_LOADED = re.compile(r"[\w-]+\.(json|txt)|(diffusion_pytorch_model|model)(-\d+-of-\d+\.safetensors|\.safetensors(\.index\.json)?)")


def has_weights(part: Path) -> bool:
    """Whether the folder of a part has safetensors weights that are no variant: one file, or shards with their index."""
    return any(part.glob("*model.safetensors*"))


def variant_of(part: Path) -> str | None:
    """The variant of the weights in the folder of a part that is loaded: None for its own, fp16 where it has no others."""
    return HALF if not has_weights(part) and any(part.glob(f"*model.{HALF}.safetensors")) else None


def loaded_files(part: Path) -> dict[str, Path]:
    """The files in the folder of a part that are loaded. Beside them others may come and go, such as variants in the cache of the Hub.

    Weights that are there in fp16 alone are named as if they were no variant: in an exported folder every program finds them.
    """
    variant = variant_of(part)
    # Parts have no sub-folders; a VAE's may hold others, such as .git or a run.
    named = {path.name.replace(f".{HALF}.", ".") if variant else path.name: path for path in sorted(part.glob("*")) if path.is_file()}
    return {name: path for name, path in named.items() if _LOADED.fullmatch(name)}
