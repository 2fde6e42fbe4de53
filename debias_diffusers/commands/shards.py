"""The command `shards`: shards made, indexed and verified."""

from __future__ import annotations

from .. import parsing
from ..config.schema.data import ShardsConfig, ShardsMakeConfig
from ..config.validation.conversion import shards_data_problems, shards_problems
from ..errors import raise_all
from .base import dispatch

SHARDS_HELP = """
  make DATA OUT    write a data set as .tar shards of --shard_mb, with an index
  index DATA       index shards as they are
  verify DATA      compare shards with their index, and decode every image"""


def run_shards(argv: list[str], program: str) -> None:
    """Runs `make`, `index` or `verify`."""
    dispatch({"make": _make_shards, "index": _index_shards, "verify": _verify_shards}, SHARDS_HELP, argv, program)


def _make_shards(argv: list[str], program: str) -> None:
    config = parsing.parse(ShardsMakeConfig, argv, program)
    raise_all(shards_problems(config))
    from ..data.shards import commands

    commands.make(config)


def _index_shards(argv: list[str], program: str) -> None:
    config = parsing.parse(ShardsConfig, argv, program, "Index shards as they are; those that have not changed are not read again.")
    raise_all(shards_data_problems(config.data))
    from ..data.shards import commands

    commands.index(config)


def _verify_shards(argv: list[str], program: str) -> None:
    config = parsing.parse(ShardsConfig, argv, program, "Compare shards with their index, and decode every image.")
    raise_all(shards_data_problems(config.data))
    from ..data.shards import commands

    commands.verify(config)
