"""The rules of the commands that convert models and data sets."""

from __future__ import annotations

import dataclasses
from pathlib import PurePath

from ..ranges import range_problems
from ..schema import ShardsMakeConfig, SingleConfig


def single_problems(config: SingleConfig) -> list[str]:
    """A conversion from neither a single file nor to one, or from one to another."""
    given, made = (PurePath(path).suffix == ".safetensors" for path in (config.model, config.out))
    if given == made:
        what = "both are" if given else "none is"
        return [f"of model {config.model} and out {config.out} one must be a .safetensors file, but {what}; name a folder and a file"]
    if made and config.config:
        return [f"config is {config.config}, but {config.model} has its own; leave config out"]
    if given and config.dtype != "float32":
        return [f"dtype is {config.dtype}, but a folder keeps the precision of the file; leave dtype out"]
    return []


def shards_problems(config: ShardsMakeConfig) -> list[str]:
    """Values out of range, and an output that is the input."""
    found = range_problems(ShardsMakeConfig, dataclasses.asdict(config))
    if PurePath(config.data) == PurePath(config.out):
        found.append(f"out {config.out} is the data; name another folder")
    return found
