"""What commands have in common: their sub-commands, and the problems that end them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from ..errors import InputError, raise_all
from ..utils import launcher

HELP_FLAGS = {"-h", "--help"}

Command = Callable[[list[str], str], None]


def dispatch(commands: Mapping[str, Command], summary: str, argv: list[str], program: str) -> None:
    """Runs the sub-command that the first argument names.

    Raises:
        InputError: there is no such sub-command.
    """
    if not argv or argv[0] in HELP_FLAGS:
        print(f"usage: {program} {{{','.join(commands)}}} ...\n{summary}")
        return
    if argv[0] not in commands:
        names = " or ".join(commands) if len(commands) <= 2 else f"one of {', '.join(commands)}"
        raise InputError(f"{program} {argv[0]} is not known; take {names}")
    commands[argv[0]](argv[1:], f"{program} {argv[0]}")


def raise_problems(problems: list[str]) -> None:
    """Raises InputError for an unsupported launcher environment, then for problems of a configuration."""
    raise_all(launcher.environment_problems(os.environ), "launcher")
    raise_all(problems)
