"""The command `hub`: pushing a run to the Hub."""

from __future__ import annotations

from .. import parsing
from ..config.schema.hub import PushConfig
from .base import dispatch

PUSH_HELP = """
  push RUN    push a run to the Hub, or what is missing of it"""


def run_hub(argv: list[str], program: str) -> None:
    """Runs `push`."""
    dispatch({"push": _push}, PUSH_HELP, argv, program)


def _push(argv: list[str], program: str) -> None:
    config = parsing.parse(PushConfig, argv, program)
    from ..hub import publish

    publish.push(config)
