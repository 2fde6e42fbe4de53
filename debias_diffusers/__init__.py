"""Train, sample and evaluate diffusion models with the debiased loss (arXiv 2310.08442)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .pipeline import PixelPipeline
    from .weighting import loss_weight

__all__ = ["PixelPipeline", "loss_weight"]


def __getattr__(name: str) -> Any:
    # Imported on first use: importing the package alone must not import torch (the command line answers at once).
    if name == "loss_weight":
        from .weighting import loss_weight

        return loss_weight
    if name == "PixelPipeline":
        from .pipeline import PixelPipeline

        return PixelPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
