"""The command `sample`."""

from __future__ import annotations

from pathlib import Path

from .. import parsing
from ..config import hub_names
from ..config.schema.sampling import SampleConfig
from ..config.validation.sampling import sample_problems
from ..runs.model_folder import check_sampling
from ..runs.run_directory import sampling_problems
from ..utils import text_libraries
from .base import raise_problems


def run_sample(argv: list[str], program: str) -> None:
    """Draws images."""
    config = parsing.parse(SampleConfig, argv, program, "Draw images with a trained model.")
    raise_problems(sample_problems(config) + sampling_problems(config.model, config.output_dir))
    if hub_names.is_model_id(config.model):
        text_libraries.show()  # which it may need
    else:
        check_sampling(config, Path(config.model))
    from ..utils.signals import stop_with_launcher

    stop_with_launcher()  # else orphaned processes would write into a folder that a new command may lock
    from ..sampling import generate

    generate.sample(config)
