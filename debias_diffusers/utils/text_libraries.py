"""transformers and peft, which text-to-image models need: diffusers imports them wherever they are installed, for seconds."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from ..errors import InputError

NAMES = ("transformers", "peft")


class _WithoutThem(PathFinder):
    """The usual finder of modules, which does not find them."""

    @classmethod
    def find_spec(cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return None if fullname in NAMES else super().find_spec(fullname, path, target)


def hide() -> None:
    """Keeps diffusers from importing them in this process, until `show` or `require` is called; only before diffusers is imported.

    (None in `sys.modules`, which forbids an import, would be an error in `datasets`.)
    """
    sys.meta_path[:] = [_WithoutThem if finder is PathFinder else finder for finder in sys.meta_path]


def show() -> None:
    """Makes them available again."""
    sys.meta_path[:] = [PathFinder if finder is _WithoutThem else finder for finder in sys.meta_path]


def require_peft() -> None:
    """Raises InputError where peft, which LoRA needs, is not installed; after `require`."""
    if importlib.util.find_spec("peft") is None:
        raise InputError('LoRA needs peft, which is not installed; run pip install "debias_diffusers[text]"')


def require() -> None:
    """`show`, for a text-to-image model.

    Raises:
        InputError: transformers is not installed; says how to install it.
    """
    show()
    if importlib.util.find_spec("transformers") is None:
        raise InputError('text-to-image models need transformers, which is not installed; run pip install "debias_diffusers[text]"')
