"""Train, sample and evaluate diffusion models with the debiased loss (arXiv 2310.08442)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .pipeline import PixelPipeline
    from .weighting import loss_weight, register_weighting

__all__ = ["PixelPipeline", "loss_weight", "register_weighting"]


def __getattr__(name: str) -> Any:
    # Imported on first use: importing the package alone must not import torch (the command line answers at once).
    if name in ("loss_weight", "register_weighting"):
        from . import weighting

        return getattr(weighting, name)
    if name == "PixelPipeline":
        from .pipeline import PixelPipeline

        return PixelPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
