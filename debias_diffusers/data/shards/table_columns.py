"""Which columns of a table are images, labels and captions. No torch."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...config.schema.data import DataConfig
from ...errors import InputError, reason

COLUMNS = ("text", "caption", "prompt")  # of captions, in this order, where no column is named

Features = Mapping[str, Any]  # of the `datasets` library, by the names of the columns


class NoCaptionsError(InputError):
    """No captions were named, and none found; or several columns that may be captions."""


@dataclass(frozen=True)
class Found:
    """The columns of a table, and what its labels are."""

    image: str
    label: str | None
    caption: str | None
    class_names: list[str] | None  # of the classes that labels count; None where labels are names, or numbers without names
    whole_numbers: bool | None  # whether labels are numbers; None where there are none


def features_of(schema: Any, where: str) -> Features:
    """The columns of a parquet file by its Arrow schema. Raises InputError where `datasets` has no type for one of them."""
    import datasets

    try:
        return datasets.Features.from_arrow_schema(schema)  # type: ignore[no-any-return]
    except (ValueError, TypeError, NotImplementedError) as error:
        raise InputError(f"{where} has a column that cannot be read ({reason(error)}); write it without that column") from error


def find_columns(features: Features, config: DataConfig) -> Found:
    """The columns of a parquet file, which must have labels where the configuration has classes.

    Raises:
        InputError: there is no column of images, or of the labels that are asked for.
    """
    import datasets

    image = config.image_column or only_column(features, datasets.Image, "image")
    check_column(features, image, "image_column")
    label: tuple[str | None, list[str] | None, bool | None] = (None, None, None)
    caption = None
    asked = config.class_conditional or config.label_column is not None
    with contextlib.nullcontext() if asked else contextlib.suppress(InputError):
        label = _labels(features, config.label_column)
    with contextlib.suppress(NoCaptionsError):
        caption = caption_column(features, None, config.dataset)
    return Found(image, label[0], caption, *label[1:])


def _labels(features: Features, column: str | None) -> tuple[str, list[str] | None, bool]:
    """The column of labels, and `class_names` and `whole_numbers` of `Found`. Raises InputError where there is none, or of another type."""
    import datasets

    column = column or only_column(features, datasets.ClassLabel, "label")
    check_column(features, column, "label_column")
    names = getattr(features[column], "names", None)
    return column, None if names is None else list(names), names is not None or holds_whole_numbers(features[column], column)


def holds_whole_numbers(feature: Any, column: str) -> bool:
    """Whether a column of labels has whole numbers, and not text. Raises InputError where it has neither."""
    dtype = str(getattr(feature, "dtype", ""))
    if dtype.startswith(("int", "uint")):
        return True
    if dtype in ("string", "large_string"):
        return False
    raise InputError(f"label_column {column} holds {feature} and no whole numbers or text; name another")


def only_column(features: Features, kind: type, role: str) -> str:
    """The column of images or labels (`role`), by its type, else by its name. Raises InputError where there is none, or several."""
    found: list[str] = [name for name, feature in features.items() if isinstance(feature, kind)]
    if not found and role in features:
        found = [role]
    if len(found) == 1:
        return found[0]
    several = f"several columns of {role}s: {', '.join(found)}"
    which = several if found else f"no column of {role}s among {', '.join(features)}"
    raise InputError(f"the dataset has {which}; name one with --{role}_column")


def check_column(features: Features, column: str, field: str) -> None:
    """Raises InputError where there is no such column."""
    if column not in features:
        raise InputError(f"{field} is {column}, but the dataset has only: {', '.join(features)}")


def caption_column(features: Features, column: str | None, where: str | None) -> str:
    """The column of captions: the one that is named, else the first of `COLUMNS`, else the only one of texts.

    Raises:
        InputError: there is no such column, or it holds something else; a `NoCaptionsError` where none is named.
    """
    import datasets

    wrong = NoCaptionsError if column is None else InputError
    if column is None:
        texts = [name for name, feature in features.items() if getattr(feature, "dtype", None) in ("string", "large_string")]
        usual = [name for name in COLUMNS if name in features]
        if not usual and len(texts) != 1:
            which = f"several columns of texts: {', '.join(texts)}" if texts else f"no column of texts among {', '.join(features)}"
            raise wrong(f"dataset {where} has {which}; name that of the captions with --caption_column")
        column = (usual or texts)[0]
    if column not in features:
        raise InputError(f"caption_column is {column}, but dataset {where} has only: {', '.join(features)}")
    feature = features[column]
    inner = getattr(feature, "feature", feature if not isinstance(feature, list) else feature[0])  # of a list of texts
    if not isinstance(inner, datasets.Value) or inner.dtype not in ("string", "large_string"):
        raise wrong(f"caption_column {column} of dataset {where} holds {feature} and no texts; name another")
    return column
