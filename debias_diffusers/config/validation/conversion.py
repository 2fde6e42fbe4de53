"""The rules of the commands that convert models and data sets."""

from __future__ import annotations

import dataclasses
from pathlib import PurePath

from ..hub_names import absolute_path, data_problems
from ..ranges import range_problems
from ..schema.conversion import SingleConfig
from ..schema.data import ShardsMakeConfig


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


def shards_data_problems(data: str) -> list[str]:
    """Data that are not there."""
    return data_problems("data", data) if data else ["data is empty; name a folder, a file or a Hub id"]


def shards_problems(config: ShardsMakeConfig) -> list[str]:
    """Values out of range, data that are not there, and an output in them."""
    found = range_problems(ShardsMakeConfig, dataclasses.asdict(config))
    found += shards_data_problems(config.data)
    if config.data and PurePath(absolute_path(config.out)).is_relative_to(absolute_path(config.data)):
        found.append(f"out {config.out} is in the data; name another folder")
    return found
