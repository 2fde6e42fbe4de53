"""Flags to dataclasses, with tyro: help with types in words, and errors as one sentence. No torch."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import tyro
from tyro import _errors as tyro_errors  # of a private module, so that pyproject.toml bounds the version

from .config import aliases
from .config.ranges import field_types
from .errors import InputError, shortened

T = TypeVar("T")


def parse(kind: type[T], argv: list[str], program: str, description: str | None = None, default: T | None = None) -> T:
    """Parses flags to a dataclass, whose docstring is the default description. An error of tyro becomes an InputError of one sentence.

    Raises:
        InputError: an unknown flag (says what was meant) or an invalid value.
    """

    def refuse(event: tyro_errors.ParseErrorEvent) -> None:
        sentence = _sentence(event, kind, argv)
        separator = "\n" if "\n" in sentence else "; "
        raise InputError(f"{sentence}{separator}{program} --help lists all flags")

    options: dict[str, Any] = {} if default is None else {"default": default}
    options |= {"config": (tyro.conf.OmitArgPrefixes, tyro.conf.PositionalRequiredArgs), "registry": _registry()}
    with tyro_errors.on_parse_error(refuse), _quick_sources():
        parsed: T = tyro.cli(kind, args=argv, prog=program, description=description or kind.__doc__, use_underscores=True, **options)
    return parsed


@contextlib.contextmanager
def _quick_sources() -> Iterator[None]:
    """Quickens `inspect.getsource`, by which tyro finds the comments of fields: it parses the module of a class anew, twice for each."""
    original = inspect.getsource

    @functools.cache
    def source(item: Any) -> str:
        if not isinstance(item, type):
            return original(item)
        lines = inspect.getsource(sys.modules[item.__module__]).splitlines(keepends=True)
        start = next((k for k, line in enumerate(lines) if re.match(rf"class {item.__name__}\b", line)), None)
        return original(item) if start is None else "".join(inspect.getblock(lines[start:]))

    inspect.getsource = source  # type: ignore[assignment]
    try:
        yield
    finally:
        inspect.getsource = original


def _registry() -> tyro.constructors.ConstructorRegistry:
    """What makes tyro print types in words, and no default where a value is left out."""
    registry, asked = tyro.constructors.ConstructorRegistry(), []
    # tyro asks for each twice; the default is kept, so that no other object has its id
    known: dict[tuple[Any, int], tuple[Any, tyro.constructors.StructConstructorSpec | None]] = {}

    def in_words(info: tyro.constructors.StructTypeInfo) -> tyro.constructors.StructConstructorSpec | None:
        if not dataclasses.is_dataclass(info.type) or info.type in asked:
            return None
        key = info.type, id(info.default)
        if key not in known:
            asked.append(info.type)  # so that tyro's own rule answers
            found = registry.get_struct_spec(info)
            asked.pop()
            if isinstance(found, tyro.constructors.StructConstructorSpec):
                known[key] = info.default, dataclasses.replace(found, fields=tuple(map(_with_words, found.fields)))
            else:
                known[key] = info.default, None
        return known[key][1]

    # tyro asks for the same type several times. Where a registry has a rule for it, tyro does not look whether it is a dataclass, too.
    specs: dict[Any, tyro.constructors.PrimitiveConstructorSpec | None] = {}

    def primitive(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
        key = info.type, frozenset(info.markers)
        if key not in specs:
            specs[key] = None  # so that tyro's own rules answer
            found = registry.get_primitive_spec(info)
            specs[key] = found if isinstance(found, tyro.constructors.PrimitiveConstructorSpec) else None
        return specs[key]

    registry.struct_rule(in_words)
    registry.primitive_rule(primitive)
    return registry


def _with_words(field: tyro.constructors.StructFieldSpec) -> tyro.constructors.StructFieldSpec:
    """A field with what `--help` prints of it: its type in words, or its name where it stands without a flag; and its default."""
    words = _words(field.type)
    if field.default in (tyro.MISSING, tyro.constructors.MISSING_NONPROP):
        words = field.name.upper() + (" ..." if words.endswith("...") else "")
    said = tyro.conf.arg(
        metavar=words or None,  # of true and false, which are two flags
        help_behavior_hint=lambda default: "" if default in LEFT_OUT else f"(default: {default})",
    )
    hint: Any = Annotated[field.type, said]
    return dataclasses.replace(field, type=hint)


LEFT_OUT = ("None", "", "''")  # as tyro writes None, () and ""


def _words(hint: Any) -> str:
    """A type as `--help` prints it: INTEGER, NUMBER ..., {one,of,these}; "" for true and false."""
    origin, members = get_origin(hint), [member for member in get_args(hint) if member not in (type(None), Ellipsis)]
    if origin is Annotated:
        return _words(members[0])
    if origin is Literal:
        return "{" + ",".join(members) + "}"
    if origin is tuple:
        return f"{_words(members[0])} ..." if len(members) == 1 else " ".join(map(_words, members))
    if members:
        return " or ".join(dict.fromkeys(map(_words, members)))
    return {int: "INTEGER", float: "NUMBER", str: "TEXT"}.get(hint, "")


BOLD = r"\[/?bold\]"  # markup of tyro


def _sentence(event: tyro_errors.ParseErrorEvent, kind: Any, argv: Sequence[str]) -> str:
    """An error of tyro as one sentence, with a line for each flag where several are not known."""
    if isinstance(event, tyro_errors.UnrecognizedArgs):
        return f"Unrecognized options: {', '.join(event.tokens)}{_suggestions(event.tokens, kind, argv)}"
    if isinstance(event, tyro_errors.MissingArgs):
        fields = [argument.arg.field for argument in event.missing_arguments]
        helptexts = [field.helptext() if callable(field.helptext) else field.helptext for field in fields]
        return "; ".join(f"{field.intern_name} is missing: {text}" for field, text in zip(fields, helptexts))
    argument = getattr(event, "argument", None)
    flag = argument.display_name() if argument else "the arguments"
    if isinstance(event, tyro_errors.InvalidChoice):
        choices = sorted(set(event.choices) - {"None"})
        near = aliases.value_suggestion(flag.lstrip("-"), event.value, choices)
        meant = f"; did you mean {near}?" if near else ""
        return f"invalid choice {event.value!r} for argument {flag!r}. Expected one of {', '.join(choices)}{meant}"
    if isinstance(event, tyro_errors.InstantiationFailure):
        typed, hint = _typed_values(flag, argv), field_types(kind).get(field_name(flag))
        if "..." in _words(hint) or " " in _words(hint):
            problem = f"it takes {_words(hint)}, but has {' '.join(typed)}"
        else:  # of a union, tyro lists why each member does not fit; the last is what is not None
            problem = shortened(re.sub(BOLD, "", event.message.rpartition("\n- ")[2].rpartition(">: ")[2]))
        return f"Error parsing {flag}: {problem}{aliases.typed_suggestion(flag, typed, hint)}"
    if isinstance(event, tyro_errors.BadValue):
        if not flag.startswith("-"):
            return f"{flag} is missing: it stands without a flag, before the options"
        return f"Missing value for argument {flag!r}. Expected {event.argument.lowered.nargs} values."
    return "the arguments cannot be read"


def field_name(token: str) -> str:
    """The field that a flag as typed names."""
    return token.split("=")[0].lstrip("-").replace("-", "_")


def _words_of(argv: Sequence[str]) -> list[str]:
    """The arguments with `--flag=value` in two."""
    return [part for token in argv for part in (token.split("=", 1) if token.startswith("--") else [token])]


def _typed_values(flag: str, argv: Sequence[str]) -> list[str]:
    """What was typed after a flag, the last time."""
    words = _words_of(argv)
    places = [place for place, word in enumerate(words) if word.startswith("--") and field_name(word) == field_name(flag)]
    return list(itertools.takewhile(lambda word: not word.startswith("--"), words[places[-1] + 1 :])) if places else []


def _suggestions(tokens: Sequence[str], kind: Any, argv: Sequence[str]) -> str:
    """What was meant by options that are not known; a line for each where there are several."""
    found = {token.split("=")[0]: aliases.suggestion(field_name(token), kind) for token in tokens if token.startswith("--")}
    for flag, value in pairwise(_words_of(argv)):
        if value in tokens and not value.startswith("-") and flag.startswith("--") and field_types(kind).get(field_name(flag)) is bool:
            found[value] = f"--{field_name(flag)} takes no value; type --{field_name(flag)} or --no_{field_name(flag)}"
    if len(found) == 1:
        return "".join(f"; {text}" for text in found.values() if text)
    return "".join(f"\n  - {typed}: {text}" for typed, text in found.items() if text)
