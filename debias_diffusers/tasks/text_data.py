"""The base model and the data of a text-to-image run: opened, and the same as before on a resume."""

from __future__ import annotations

from collections.abc import Collection

from accelerate import Accelerator

from ..config.choices import as_flags
from ..config.loading import flatten
from ..config.schema.training import TrainConfig
from ..data.captions import CaptionedSource
from ..data.sources.base import Source
from ..data.sources.summary import summary
from ..runs.checkpoints import Checkpoint
from ..utils.console import say
from ..utils.distributed import broadcast_from_first
from .base_model import BaseModel, contradictions, open_base, with_objective
from .pixel_data import readable


def base_of_run(
    config: TrainConfig, found: Checkpoint | None, chosen: Collection[str], accelerator: Accelerator
) -> tuple[TrainConfig, BaseModel]:
    """The base model, and the configuration with the parameterization that its scheduler says for the fields in `chosen`.

    Raises:
        InputError: the base model cannot be used, or does not go with the resolution.
    """
    base = broadcast_from_first(lambda: open_base(config.text), accelerator)
    config = with_objective(config, base, () if found else chosen, accelerator.num_processes)
    if found:
        return config, base
    if accelerator.is_main_process:
        values = {name: value for name, value in flatten(config).items() if name in chosen}
        say(f"as base_model {config.text.base_model} has it: {as_flags(values)}") if values else None
        for sentence in contradictions(base, config):
            say(f"warning: {sentence}")
    return config, base


def captioned(config: TrainConfig, source: Source, found: Checkpoint | None, accelerator: Accelerator) -> Source:
    """The source with its captions, less its unreadable images.

    Raises:
        InputError: there are no captions, or images that cannot be read.
    """
    with_captions = CaptionedSource(source, config.text.caption_column)
    for sentence in summary(with_captions, config.data.dataset) if accelerator.is_main_process else ():
        say(sentence)
    return readable(config, with_captions, found, 3, accelerator)[0]
