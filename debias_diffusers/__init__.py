"""Train, sample and evaluate diffusion models with the debiased loss (arXiv 2310.08442)."""

from __future__ import annotations

import re
import sys
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


def _require_command(argv: list[str], arguments: list[str]) -> None:
    """Ends `python -m debias_diffusers.MODULE` with a sentence where the module is no command: it would do nothing, and return 0.

    While Python looks for the module to run, `argv[0]` is "-m"; `arguments` are those of the interpreter.
    """
    named = next(filter(None, (re.fullmatch(r"(?:-\w*m)?debias_diffusers\.(\w+)", argument) for argument in arguments)), None)
    if argv[:1] == ["-m"] and named and named[1] not in ("__main__", "convert", "hub"):
        commands = "python -m debias_diffusers {train,sample,eval,convert,hub}"
        print(f"error: debias_diffusers.{named[1]} is no command; run {commands}", file=sys.stderr)
        raise SystemExit(2)


_require_command(sys.argv, sys.orig_argv)
