"""Train, sample and evaluate diffusion models with the debiased loss (arXiv 2310.08442)."""

from __future__ import annotations

import importlib
import re
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .config.schema.objective import ObjectiveConfig
    from .config.schema.training import TrainConfig
    from .diffusion.loss import Objective, make_objective
    from .diffusion.noise_schedule import Schedule, make_schedule
    from .diffusion.weighting import loss_weight, register_weighting
    from .pipelines.pixel_pipeline import PixelPipeline
    from .training.ema import EMA
    from .training.start import train

__all__ = [
    "EMA",
    "Objective",
    "ObjectiveConfig",
    "PixelPipeline",
    "Schedule",
    "TrainConfig",
    "loss_weight",
    "make_objective",
    "make_schedule",
    "register_weighting",
    "train",
]

# Imported on first use: importing the package alone must not import torch (the command line answers at once).
_MODULES = {
    "EMA": "training.ema",
    "Objective": "diffusion.loss",
    "ObjectiveConfig": "config.schema.objective",
    "PixelPipeline": "pipelines.pixel_pipeline",
    "Schedule": "diffusion.noise_schedule",
    "TrainConfig": "config.schema.training",
    "loss_weight": "diffusion.weighting",
    "make_objective": "diffusion.loss",
    "make_schedule": "diffusion.noise_schedule",
    "register_weighting": "diffusion.weighting",
    "train": "training.start",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def _require_command(argv: list[str], arguments: list[str]) -> None:
    """Ends `python -m debias_diffusers.MODULE` with a sentence where the module is no command: it would do nothing, and return 0.

    While Python looks for the module to run, `argv[0]` is "-m"; `arguments` are those of the interpreter.
    """
    named = next(filter(None, (re.fullmatch(r"(?:-\w*m)?debias_diffusers\.([\w.]+)", argument) for argument in arguments)), None)
    if argv[:1] == ["-m"] and named and named[1] not in ("__main__", "cache", "convert", "ema", "hub", "play", "shards"):
        commands = "python -m debias_diffusers {train,sample,eval,convert,hub,cache,ema,play,shards}"
        print(f"error: debias_diffusers.{named[1]} is no command; run {commands}", file=sys.stderr)
        raise SystemExit(2)


_require_command(sys.argv, sys.orig_argv)
