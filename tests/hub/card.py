"""What the Hub demands of the metadata at the head of a README.md."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

LICENSES = {
    "apache-2.0",
    "mit",
    "cc-by-4.0",
    "cc-by-nc-4.0",
    "cc0-1.0",
    "openrail",
    "openrail++",
    "creativeml-openrail-m",
    "other",
    "unknown",
}

# As the client finds it.
_FRONT_MATTER = re.compile(r"^(\s*---[\r\n]+)([\S\s]*?)([\r\n]+---(\r\n|\n|$))")


def checked(text: str) -> tuple[list[str], list[str]]:
    """(errors, warnings) about a card."""
    found = _FRONT_MATTER.match(text)
    if found is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        metadata = yaml.safe_load(found[2])
    except yaml.YAMLError as error:
        return [f"the metadata is no valid YAML: {error}"], []
    if not isinstance(metadata, dict):
        return ["the metadata is no mapping"], []
    return [*_license_errors(metadata), *_list_errors(metadata), *_index_errors(metadata)], []


def _license_errors(metadata: dict[Any, Any]) -> Iterator[str]:
    if "license" in metadata and metadata["license"] not in LICENSES:
        yield f'"license" must be one of {", ".join(sorted(LICENSES))}, not {metadata["license"]!r}'


def _list_errors(metadata: dict[Any, Any]) -> Iterator[str]:
    for name in ("tags", "datasets"):
        value = metadata.get(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            yield f'"{name}" must be a list of strings'


def _index_errors(metadata: dict[Any, Any]) -> Iterator[str]:
    models = metadata.get("model-index", [])
    if not isinstance(models, list):
        yield '"model-index" must be a list'
        return
    for number, model in enumerate(models):
        where = f"model-index[{number}]"
        yield from _missing(model, where, "name", "results")
        for place, result in enumerate(_items(model, "results")):
            yield from _result_errors(result, f"{where}.results[{place}]")


def _result_errors(result: Any, where: str) -> Iterator[str]:
    yield from _missing(result, where, "task.type", "dataset.name", "dataset.type", "metrics")
    for place, metric in enumerate(_items(result, "metrics")):
        yield from _missing(metric, f"{where}.metrics[{place}]", "type", "value")


def _items(mapping: Any, name: str) -> list[Any]:
    value = mapping.get(name) if isinstance(mapping, dict) else None
    return value if isinstance(value, list) else []


def _missing(mapping: Any, where: str, *names: str) -> Iterator[str]:
    """An error for each name that leads nowhere; a dot leads into the mapping before it."""
    for name in names:
        value = mapping
        for step in name.split("."):
            value = value.get(step) if isinstance(value, dict) else None
        if value is None:
            yield f'"{where}.{name}" is required'
        elif name in ("results", "metrics") and not isinstance(value, list):
            yield f'"{where}.{name}" must be a list'
