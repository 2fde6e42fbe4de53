"""The command `cache`: latents and text embeddings before a training."""

from __future__ import annotations

import os

from ..errors import InputError
from ..parsing import field_name
from .base import HELP_FLAGS
from .train import train_command

CACHE_HELP = """
Compute the latents and text embeddings of a text-to-image training before it starts, or what is missing of them:

  DATA --base_model MODEL --resolution R --precompute_dir DIR ...

DATA is what train.py has as --dataset. The other flags are those of the training (train.py --help), and mean the same. The training
reads DIR with --precompute_dir DIR; several trainings may share it. With accelerate launch the processes share the work."""


def run_cache(argv: list[str], program: str) -> None:
    """Computes latents and text embeddings before a training."""
    if not argv or not HELP_FLAGS.isdisjoint(argv):
        print(f"usage: {program} ...\n{CACHE_HELP}")
        return
    if not argv[0].startswith("-"):
        if any(field_name(flag) == "dataset" for flag in argv if flag.startswith("--")):
            raise InputError(f"dataset is named twice, {argv[0]} and --dataset; leave one of them out")
        argv = ["--dataset", *argv]
    from ..training.start import precompute

    precompute(*train_command(argv, os.environ.get("ACCELERATE_MIXED_PRECISION"), program))
