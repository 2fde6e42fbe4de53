"""The command `ema`: averaged weights from the snapshots of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from .. import parsing
from ..config.ranges import range_problems
from ..config.schema.sampling import ReconstructConfig
from ..errors import InputError, raise_all
from ..runs import ema_snapshots
from .base import dispatch

EMA_HELP = """
  reconstruct RUN --sigma_rel 0.08    averaged weights of any width, of a run that trained with --post_hoc_ema"""


def run_ema(argv: list[str], program: str) -> None:
    """Runs `reconstruct`."""
    dispatch({"reconstruct": _reconstruct}, EMA_HELP, argv, program)


def _reconstruct(argv: list[str], program: str) -> None:
    config = parsing.parse(ReconstructConfig, argv, program)
    raise_all(range_problems(ReconstructConfig, dataclasses.asdict(config)))
    if config.sigma_rel is None:
        raise InputError("sigma_rel is missing; name the width of the average, such as --sigma_rel 0.08")
    if not (Path(config.run) / ema_snapshots.FOLDER).is_dir():
        raise InputError(f"{config.run} has no {ema_snapshots.FOLDER}; name a run directory that was trained with --post_hoc_ema 32")
    from ..sampling import post_hoc_ema

    post_hoc_ema.reconstruct(config.run, config.sigma_rel, config.out, config.step)
