"""What models and images are compared with: a data set, a folder, or what a run was trained on."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..config import hub_names
from ..config.hub_names import is_hub_id, is_pinned, place_of
from ..config.loading import read_config, stored
from ..config.schema import DIGITS, BitsConfig, DataConfig, MeasureConfig, TrainConfig
from ..data import image_folders
from ..data.sources import Folder, Source, open_readable, open_source, summary
from ..errors import InputError
from ..hub import client
from ..runs import checkpoints
from ..runs.run_directory import CHECKPOINTS, CONFIG
from ..utils.console import say
from ..utils.distributed import agreed
from ..utils.files import read_json
from .image_sets import (
    ImageSet,
    of_folder,
    of_npz,
    of_source,
)


def say_found(source: Source, name: str | None, accelerator: Accelerator) -> None:
    """What was found of a data set, and what was passed over; by the first process."""
    for sentence in summary(source, name) if accelerator.is_main_process else ():
        say(sentence)


def open_reference(name: str, config: MeasureConfig, side: int | None) -> ImageSet:
    """The images of a reference: a data set brought to a size as training does it, a folder, or an `.npz`."""
    if Path(name).suffix == ".npz":
        images = of_npz(Path(name))
        if side not in (None, images.side):
            raise InputError(
                f"reference {name} has images of {images.side} pixels, which are compared as they are, but {side} are asked for; "
                f"take targets of that size, or add --resolution {images.side} to compare all the same"
            )
        return images
    source = open_readable(reference_data(config, name))
    if side is None and isinstance(source, Folder):
        return of_folder(source, name, channels=config.channels)
    if side is None:
        raise InputError(f"resolution is missing, which reference {name} is brought to; add --resolution, such as 64")
    return of_source(source, name, side, channels=config.channels)


def reference_data(config: MeasureConfig | BitsConfig, reference: str | None, targets: Sequence[str] = ()) -> DataConfig:
    """Where the images of a reference are: what is named, or what the targets were trained on; split and column as given, or as of that.

    Raises:
        InputError: nothing is named, and the targets have no run, or runs of different data.
    """
    data = DataConfig(dataset=reference) if reference is not None else _trained_on(targets)
    return dataclasses.replace(
        data,
        split=config.split or data.split,
        image_column=config.image_column or data.image_column,
        skip_bad=config.skip_bad or data.skip_bad,
    )


def _trained_on(targets: Sequence[str]) -> DataConfig:
    """The data of all runs among the targets; the column of labels is the first one's."""
    values_of = {target: values for target in targets if (values := _values_of_run(target))}
    if not values_of:
        no_run = f"{targets[0]} is no run that knows its data"
        raise InputError(f"reference is missing, and {no_run}; add --reference, such as digits or a folder")
    (named, first), *others = values_of.items()
    names = ("dataset", "split", "image_column")
    for run, values in others:
        if _of_same_files(values, first):
            values = {**values, "dataset": first["dataset"]}
        if apart := [f"{name} {values[name]}, not {first[name]}" for name in names if values[name] != first[name]]:
            said = f"{run} was trained on {', '.join(apart)} as {named}"
            raise InputError(f"reference is missing, and {said}; add --reference, such as {first['dataset']}")
    grey = all(values.get("channels") == 1 for values in values_of.values())
    return DataConfig(
        **{name: first[name] for name in (*names, "label_column")},
        skip_bad=first.get("skip_bad", False),
        channels=1 if grey else None,
    )


def _of_same_files(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two runs learned the same files of a disk, whatever they are called."""
    names = (one["dataset"], other["dataset"])
    if any(name == DIGITS or is_pinned(name) for name in names):
        return False
    return names[0] == names[1] or _fingerprint(one) == _fingerprint(other) is not None


def _fingerprint(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Of the data of a run; None where they cannot be opened."""
    fields = {field.name: values[field.name] for field in dataclasses.fields(DataConfig) if field.name in values}
    try:
        return open_source(DataConfig(**fields)).fingerprint()
    except InputError:
        return None


def _values_of_run(target: str) -> dict[str, Any] | None:
    """The configuration of a run, on this disk or pushed to the Hub, with its data where they are now; None of what is no run.

    Raises:
        InputError: the data are not there.
    """
    if not hub_names.is_id(target):
        run = Path(target)
        if not (run / CHECKPOINTS).is_dir() or not (run / CONFIG).is_file():
            return None
        return _with_data(target, read_config(str(run / CONFIG)), _newest_state(run))
    path = client.download_files(target, [CONFIG]) / CONFIG
    try:
        values = read_config(str(path)) if path.is_file() else {}
    except InputError:  # somebody else's model has another config.json
        values = {}
    return _with_data(target, {**stored(TrainConfig()), **values}, {}) if "dataset" in values else None


def _with_data(target: str, values: dict[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """Data of a disk are taken as the run names them where these are the same files, else where they lay when it was trained."""
    typed, lay = values["dataset"], state.get("paths", {}).get("dataset")
    if typed == DIGITS or is_pinned(typed):  # of the Hub, a run writes down the commit
        return values
    if os.path.exists(os.path.expanduser(typed)):
        before = {name: value for name, value in state.get("data", {}).items() if name != "skipped"}
        if lay is None or place_of(typed) == lay or _fingerprint(values) == before:
            return values
    if lay is None or not os.path.exists(lay):
        raise InputError(f"{target} was trained on {lay or typed}, which is not there; name the data with --reference")
    return {**values, "dataset": lay}


def _newest_state(run: Path) -> dict[str, Any]:
    """What the newest checkpoint of a run says; {} where there is none that can be read."""
    there = checkpoints.checkpoints(run / CHECKPOINTS)
    found = read_json(there[-1] / checkpoints.STATE) if there else None
    return found if isinstance(found, dict) and isinstance(found.get("paths"), dict) else {}


def pinned_data(reference: Any, accelerator: Accelerator) -> Any:
    """A Hub id of a data set with its commit, the same in all processes, and the file of packed samples; anything else as it is."""
    if isinstance(reference, str) and (file := image_folders.packed(Path(reference))):
        return str(file)
    named = isinstance(reference, str) and Path(reference).suffix not in (".npz", ".safetensors") and is_hub_id(reference)
    return agreed(lambda: client.pinned(reference, "dataset"), accelerator) if named else reference
