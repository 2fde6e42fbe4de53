"""The reference of an evaluation: a data set, a folder, an `.npz`, or the training data of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..config import hub_names, shard_names
from ..config.hub_names import absolute_path, is_dataset_id, is_pinned, is_reference_file
from ..config.loading import CHANGEABLE, read_config, stored
from ..config.schema.data import EMBEDDED, DataConfig
from ..config.schema.evaluation import BiasConfig, BitsConfig, MeasureConfig
from ..config.schema.training import TrainConfig
from ..data import image_folders
from ..data.dataset import TrainingData
from ..data.sources.base import Source
from ..data.sources.folder import ImageFolder
from ..data.sources.opening import open_readable, open_source
from ..data.sources.summary import summary
from ..data.validation_split import HELD_OUT
from ..errors import InputError
from ..hub import client
from ..pipelines.pixel_pipeline import PixelPipeline
from ..runs import checkpoints
from ..runs.run_directory import CHECKPOINTS, CONFIG
from ..utils.console import say
from ..utils.distributed import broadcast_from_first
from .image_sets import ImageSet, images_of_folder, images_of_npz, images_of_source, npz_shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedOn(MeasureConfig):
    """How images are compared with what runs were trained on: of a folder with labels that is what has one, if they have labels, too."""

    class_conditional: bool = False
    label_column: str | None = None


def print_summary(source: Source, name: str | None, accelerator: Accelerator) -> None:
    """Prints, in the first process, what a data set has and which files are ignored."""
    for sentence in summary(source, name) if accelerator.is_main_process else ():
        say(sentence)


def open_reference(name: str, config: MeasureConfig, side: int | None) -> ImageSet:
    """The images of a reference: a data set resized to `side` pixels as in training, a folder, or an `.npz`."""
    if Path(name).suffix == ".npz":
        require_npz_side(name, side)
        return images_of_npz(Path(name))
    source = open_readable(reference_data(config, name))
    if side is None and isinstance(source, ImageFolder):
        return images_of_folder(source, name, channels=config.channels)
    if side is None:
        raise InputError(f"resolution is missing, and reference {name} must be resized; add --resolution, such as 64")
    return images_of_source(source, name, side, channels=config.channels)


def require_npz_side(name: str, side: int | None) -> None:
    """Raises InputError where the images of a reference `.npz` have not `side` pixels."""
    own = npz_shape(Path(name))[1]
    if side not in (None, own):
        raise InputError(
            f"reference {name} has images of {own} pixels, which are not resized, but the targets have {side}; "
            f"take targets of that size, or add --resolution {own} to compare all the same"
        )


def reference_data(config: MeasureConfig | BitsConfig | BiasConfig, reference: str | None, targets: Sequence[str] = ()) -> DataConfig:
    """The data configuration of a reference: the given one, or the training data of the targets. Given split and columns win.

    Raises:
        InputError: no reference is given, and the targets are not runs, or runs on different data.
    """
    data = DataConfig(dataset=reference) if reference is not None else _trained_on(targets)
    if isinstance(config, TrainedOn):
        data = dataclasses.replace(data, class_conditional=config.class_conditional, label_column=config.label_column)
    return dataclasses.replace(
        data,
        split=config.split or data.split,
        image_column=config.image_column or data.image_column,
        skip_bad=config.skip_bad or data.skip_bad,
    )


def data_of_model(config: BitsConfig | BiasConfig, chosen: DataConfig, pipeline: PixelPipeline, has: str) -> TrainingData:
    """The images of a `reference_data`, of the size and channels of a pixel model and with its labels.

    Its classes are in the order of the model; the first version had them in plain order, without names. `has` is for the error, such as
    "the model has".

    Raises:
        InputError: the data cannot be read, or have another number of classes.
    """
    given = dataclasses.replace(
        chosen,
        label_column=config.label_column or chosen.label_column,
        class_conditional=pipeline.num_classes > 0,
        resolution=pipeline.unet.config.sample_size,
        channels=pipeline.unet.config.in_channels,
        num_workers=0,
    )
    data = TrainingData(open_readable(given, pipeline.class_names or "plain"), given, config.seed)
    if data.num_classes != pipeline.num_classes:
        raise InputError(f"reference {chosen.dataset} has {data.num_classes} classes, but {has} {pipeline.num_classes}")
    return data


def _trained_on(targets: Sequence[str]) -> DataConfig:
    """The common training data of all runs among the targets; label_column is that of the first run."""
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
        **{name: first[name] for name in names},
        class_conditional=all(values.get("class_conditional") for values in values_of.values()),  # as below, of pixel models only
        label_column=first.get("label_column"),
        skip_bad=first.get("skip_bad", False),
        channels=1 if grey else None,
    )


def caption_column(targets: Sequence[str]) -> str | None:
    """The column of captions of the first run among the targets; None if no target is a run, or its was found by its name."""
    return next((values.get("caption_column") for target in targets if (values := _values_of_run(target))), None)


def any_run(targets: Sequence[str]) -> bool:
    """Whether a target is a run, which knows its data."""
    return any(_values_of_run(target) is not None for target in targets)


def training_of_run(target: str) -> dict[str, Any] | None:
    """What shaped the training of a run directory, with its seed: the configuration without what any resume may change.

    The number of steps is there, too. None of what is no run directory.
    """
    run = Path(target)
    if not (run / CHECKPOINTS).is_dir() or not (run / CONFIG).is_file():
        return None
    values = {**stored(TrainConfig()), **read_config(str(run / CONFIG))}
    return {name: value for name, value in values.items() if name == "max_steps" or name not in CHANGEABLE}


def _of_same_files(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two runs were trained on the same local files, possibly under different paths."""
    names = (one["dataset"], other["dataset"])
    if any(name in EMBEDDED or is_pinned(name) or shard_names.is_remote(name) for name in names):
        return False
    return names[0] == names[1] or _fingerprint(one) == _fingerprint(other) is not None


def _fingerprint(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """The fingerprint of a run's data; None if they cannot be opened."""
    fields = {field.name: values[field.name] for field in dataclasses.fields(DataConfig) if field.name in values}
    try:
        return open_source(DataConfig(**fields)).fingerprint()
    except InputError:
        return None


def _values_of_run(target: str) -> dict[str, Any] | None:
    """The configuration of a run, local or on the Hub, with the current path of its data; None if the target is not a run.

    Raises:
        InputError: the data do not exist.
    """
    if not hub_names.is_model_id(target):
        run = Path(target)
        if not (run / CHECKPOINTS).is_dir() or not (run / CONFIG).is_file():
            return None
        return _with_data(target, {**stored(TrainConfig()), **read_config(str(run / CONFIG))}, checkpoints.newest_state(run / CHECKPOINTS))
    path = client.download_files(target, [CONFIG]) / CONFIG
    try:
        values = read_config(str(path)) if path.is_file() else {}
    except InputError:  # the model of another package has another config.json
        values = {}
    return _with_data(target, {**stored(TrainConfig()), **values}, {}) if "dataset" in values else None


def _with_data(target: str, values: dict[str, Any], state: Mapping[str, Any]) -> dict[str, Any] | None:
    """Sets the path of local data: the path in the configuration if it has the same files, else the absolute path at training time.

    None where the configuration names no data.
    """
    paths = state.get("paths")
    typed, lay = values["dataset"], paths.get("dataset") if isinstance(paths, dict) else None
    if typed is None:
        return None
    if typed in EMBEDDED or is_pinned(typed) or shard_names.is_remote(typed):  # for the Hub, a run saves the commit
        return values
    if shard_names.exists(typed):
        before = {name: value for name, value in state.get("data", {}).items() if name not in ("skipped", "captions", HELD_OUT)}
        if lay is None or absolute_path(typed) == lay or _fingerprint(values) == before:
            return values
    if lay is None or not shard_names.exists(lay):
        raise InputError(f"{target} was trained on {lay or typed}, which does not exist; name the data with --reference")
    return {**values, "dataset": lay}


def pinned_data(reference: Any, accelerator: Accelerator) -> Any:
    """Adds the commit to the Hub id of a data set, the same in all processes; returns the `.npz` of packed samples; else unchanged."""
    if isinstance(reference, str) and (file := image_folders.packed_samples(Path(reference))):
        return str(file)
    named = isinstance(reference, str) and not is_reference_file(reference) and is_dataset_id(reference)
    return broadcast_from_first(lambda: client.pinned(reference, "dataset"), accelerator) if named else reference
