"""Images to figures: which sets are compared, their features, tables and files."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from . import checkpoint, folders, hub, metrics
from .config import (
    DIGITS,
    BitsConfig,
    DataConfig,
    MeasureConfig,
    SampleConfig,
    ScoreConfig,
    StatsConfig,
    TrainConfig,
    is_hub_id,
    is_pinned,
    place_of,
    read_config,
    stored,
)
from .errors import InputError, reason
from .extractors import INCEPTION, SPATIAL, Extractor
from .feature_cache import key_of, open_cache
from .files import read_file, read_json, require_replaceable, write_file
from .imagesets import (
    ImageSet,
    coloured,
    content_hashes,
    content_key,
    drawn,
    holds_images,
    npz_shape,
    of_folder,
    of_npz,
    of_source,
    read_npz_statistics,
    transform,
)
from .machine import agreed, gathered, start_processes
from .metrics import COLOUR, Sample, Statistics
from .plots import curves, is_our_picture
from .run import CHECKPOINTS, CONFIG, say
from .sampling import make_job, pinned_model
from .sources import Folder, Source, open_readable, open_source, state_of_files, summary

MOST_DRAWN = 50_000
USUALLY_DRAWN = 1000  # for a measurement while training
ORDER = ("fid", "sfid", "is", "is_std", "kid", "kid_std", "kid_subset", "precision", "recall", "brightness_bias", "colour_distance")


@dataclass(frozen=True)
class Row:
    """A target, as it was drawn, and its figures."""

    target: str
    images: int
    figures: dict[str, float]
    total_images: int | None = None  # of a folder or an .npz, of which `images` were taken
    scheduler: str | None = None
    steps: int | None = None
    checkpoint: int | None = None
    intervals: dict[str, tuple[float, float]] | None = None


class Measure:
    """An extractor with its cache, and everything that is the same for all sets of images."""

    def __init__(self, config: MeasureConfig, extractor: str, device: Any, process: int = 0, processes: int = 1) -> None:
        """Loads the extractor onto a device. Of several processes, each computes its share, and all know the result."""
        wanted = config.metrics.split(",")
        by_features = [metric for metric in wanted if metric != COLOUR]
        self.config, self.device, self.process, self.processes = config, device, process, processes
        self.extractor = Extractor(extractor, by_features, config.feature_extractor_weights) if by_features else None
        if self.extractor:
            self.extractor.network.to(device)
        layers = dict(self.extractor.layers) if self.extractor else {}
        self.layers = {metric: COLOUR if metric == COLOUR else layers[metric] for metric in wanted}
        self.cache = open_cache(config.cache_dir)

    def sample(self, images: ImageSet) -> Sample:
        """The features of a set, computed over all processes in one pass for all metrics, or read from the cache."""
        key = self._key(images.key) if images.key else None
        if key and (found := self._kept(key, images.count)):
            return Sample.of(found)
        share = -(-images.count // self.processes)
        with tqdm(total=share, desc=images.name, unit="image", leave=False, disable=self.process > 0) as progress:
            sample = self.joined(images.batches(self.config.batch_size, self.process, self.processes), progress)
        if key and self.process == 0:
            self.cache.put(key, sample.features)
        return sample

    def joined(self, batches: Iterator[tuple[int, Tensor]], progress: Any = None) -> Sample:
        """The features of all processes' batches (B, 3, H, W) uint8, in the order of their numbers.

        Raises:
            Exception: what any process met, in all of them.
        """

        def share() -> Iterator[tuple[int, dict[str, Tensor]]]:
            for number, batch in batches:
                yield number, self.features(batch)
                if progress is not None:
                    progress.update(len(batch))

        return Sample.joined([part for _, part in sorted(gathered(lambda: list(share()), self.processes), key=lambda pair: pair[0])])

    def features(self, batch: Tensor) -> dict[str, Tensor]:
        """Of a batch (B, 3, H, W) uint8: (B, D) by layer."""
        found = self.extractor(batch.to(self.device)) if self.extractor else {}
        return found | {COLOUR: batch.float().mean((2, 3)).cpu()}

    def _key(self, of_images: str) -> str:
        """Of content and transform, extractor and weights."""
        parts = [of_images]
        if self.extractor:
            parts += [self.extractor.name, self.extractor.weights_sha256, *sorted(self.extractor.layers.values())]
        return key_of(*parts)

    def _kept(self, key: str, count: int) -> dict[str, Tensor] | None:
        """Features of the cache, where all processes find them: if one computed alone, it would wait for ever."""
        found = self.cache.get(key)
        there = found is not None and _are_sound(found, {COLOUR, *self.layers.values()}, count)
        everywhere = all(gather_object([there])) if self.processes > 1 else there
        return found if everywhere else None


def _are_sound(found: Mapping[str, Tensor], layers: set[str], count: int) -> bool:
    """Whether features of a cache are those of so many images; if not, they are computed again."""
    return found.keys() == layers and all(v.ndim == 2 and len(v) == count and bool(v.isfinite().all()) for v in found.values())


# ---- score and compare -----------------------------------------------------------------------------------------------


def score(config: ScoreConfig) -> dict[str, Any]:
    """Measures all targets of a command, prints a table and writes what it is asked for; returns what the JSON holds.

    Raises:
        InputError: targets or reference cannot be read, or are too few for a metric.
    """
    accelerator = start_processes(config.measure.num_threads)
    if accelerator.is_main_process and config.output:
        _require_output(config, config.output)
    targets = (target if target.endswith(".npz") else pinned_model(target, accelerator) for target in config.targets)
    targets = (str(folders.packed(Path(target)) or target) for target in targets)
    config = dataclasses.replace(config, targets=tuple(targets), reference=_pinned_data(config.reference, accelerator))
    if config.reference is None:
        data = reference_data(config.measure, None, config.targets)
        channels = config.measure.channels or data.channels
        measure = dataclasses.replace(
            config.measure, split=data.split, image_column=data.image_column, skip_bad=data.skip_bad, channels=channels
        )
        config = dataclasses.replace(config, reference=data.dataset, measure=measure)
    assert config.reference is not None
    result = _scored(config, config.reference, accelerator)
    if accelerator.is_main_process:
        if config.output:  # before the table, which may have nowhere to go
            figures, picture = _files_of(config.output)
            write_file(figures, as_json(result))
            _draw_curves(result["targets"], picture)
        print(table(result))
    return result


def _files_of(output: str) -> tuple[Path, Path]:
    """The files of figures and of their curves."""
    stem = re.sub(r"\.(json|png)$", "", str(Path(output)))  # and no more: a name may have points in it
    return Path(f"{stem}.json"), Path(f"{stem}.png")


def _require_output(config: ScoreConfig, output: str) -> None:
    """Looks whether the files of a command can be written. Raises as `require_replaceable`."""
    figures, picture = _files_of(output)
    before = has_fields(figures, "reference", "extractor", "targets")
    require_replaceable("output", figures, lambda _: before)
    if config.checkpoints or "," in config.steps:
        require_replaceable("output", picture, lambda path: is_our_picture(path, before))


def has_fields(path: Path, *names: str) -> bool:
    """Whether a file is a JSON object with these fields, by which a result of this package is recognised."""
    found = read_json(path)
    return isinstance(found, dict) and found.keys() >= set(names)


def as_json(result: Mapping[str, Any]) -> bytes:
    """The text of a file of figures. JSON knows neither NaN nor infinity: null stands for them."""
    finite = json.loads(json.dumps(result), parse_constant=lambda _: None)
    return (json.dumps(finite, indent=2) + "\n").encode()


def _scored(config: ScoreConfig, reference: str, accelerator: Accelerator) -> dict[str, Any]:
    if Path(reference).suffix not in (".npz", ".safetensors"):
        say_found(
            open_source(reference_data(config.measure, reference)), reference, accelerator
        )  # before an extractor is fetched for nothing
    measure = _measure(config.measure, reference, accelerator)
    compared = _References(reference, measure, config.allow_few_images)
    rows = [_row(config, measure, compared, images, how) for images, how in _targets(config, compared, accelerator)]
    return _result(config, measure, compared, reference, rows)


def say_found(source: Source, name: str | None, accelerator: Accelerator) -> None:
    """What was found of a data set, and what was passed over; by the first process."""
    for sentence in summary(source, name) if accelerator.is_main_process else ():
        say(sentence)


def _measure(config: MeasureConfig, reference: str, accelerator: Accelerator) -> Measure:
    extractor = config.feature_extractor or usual_extractor(reference)
    return Measure(config, extractor, accelerator.device, accelerator.process_index, accelerator.num_processes)


def usual_extractor(reference: str) -> str:
    """What images are compared by where nothing is said: what statistics were made with, else by the data."""
    if Path(reference).suffix == ".safetensors" and (made_with := _about(Path(reference)).get("extractor")):
        return made_with
    return DIGITS if reference == DIGITS else INCEPTION


class _References:
    """The reference, at each size that the targets have."""

    def __init__(self, name: str, measure: Measure, allow_few_images: bool) -> None:
        self.name, self.measure, self.allow_few_images = name, measure, allow_few_images
        self.known: dict[int | None, Sample] = {}
        self.path, self.npz = Path(name), Path(name).suffix == ".npz"
        self.statistics = self.path.suffix == ".safetensors" or (self.npz and not holds_images(self.path))
        self.side = npz_shape(self.path)[1] if self.npz and not self.statistics else None  # None: of its targets

    def sample(self, side: int | None) -> Sample:
        """At a size of targets."""
        side = self.measure.config.resolution or side or self.side
        if side not in self.known:
            found = self._statistics(side) if self.statistics else self._images(side)
            metrics.require_images(found, self.measure.layers)
            # The Inception score is of the targets alone, and statistics beside images are of more than these.
            given = found.statistics if found.features else {}
            own = {m: layer for m, layer in self.measure.layers.items() if m != "is" and not (m in metrics.FRECHET and layer in given)}
            _require_enough(self.name, found.count, own, found, self.allow_few_images)
            self.known[side] = found
        return self.known[side]

    def _images(self, side: int | None) -> Sample:
        sample = self.measure.sample(open_reference(self.name, self.measure.config, side))
        if self.npz and self.measure.extractor and self.measure.extractor.name == INCEPTION:
            # ADM's files have statistics of a whole data set beside 10,000 of its images, and its evaluator takes them.
            sample.statistics.update(_npz_statistics(self.path))
        return sample

    def count(self) -> int | None:
        """Of its images, as far as is known; without computing features."""
        if self.statistics:
            return self._statistics(None).count
        return npz_shape(self.path)[0] if self.npz else len(open_source(reference_data(self.measure.config, self.name)))

    def _statistics(self, side: int | None) -> Sample:
        return Sample({}, _npz_statistics(self.path), None) if self.npz else read_statistics(self.path, self.measure, side)


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
    if not hub.is_id(target):
        run = Path(target)
        if not (run / CHECKPOINTS).is_dir() or not (run / CONFIG).is_file():
            return None
        return _with_data(target, read_config(str(run / CONFIG)), _newest_state(run))
    path = hub.fetched_files(target, [CONFIG]) / CONFIG
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
    there = checkpoint.checkpoints(run / CHECKPOINTS)
    found = read_json(there[-1] / checkpoint.STATE) if there else None
    return found if isinstance(found, dict) and isinstance(found.get("paths"), dict) else {}


def _pinned_data(reference: Any, accelerator: Accelerator) -> Any:
    """A Hub id of a data set with its commit, the same in all processes, and the file of packed samples; anything else as it is."""
    if isinstance(reference, str) and (file := folders.packed(Path(reference))):
        return str(file)
    named = isinstance(reference, str) and Path(reference).suffix not in (".npz", ".safetensors") and is_hub_id(reference)
    return agreed(lambda: hub.pinned(reference, "dataset"), accelerator) if named else reference


def _targets(config: ScoreConfig, compared: _References, accelerator: Accelerator) -> Iterator[tuple[ImageSet, dict[str, Any]]]:
    """Every set of images that is scored, and how it was drawn."""
    for target in config.targets:
        path = Path(target)
        if path.suffix == ".npz":
            yield of_npz(path, config.num_images, config.seed), {}
        elif path.is_dir() and not (path / "model_index.json").is_file():
            folder = open_source(DataConfig(dataset=target))
            if not isinstance(folder, Folder):
                raise InputError(f"target {target} is a saved data set; name it as --reference, or give its images as a folder")
            say_found(folder, target, accelerator)
            yield of_folder(folder, target, config.num_images, seed=config.seed), {}
        else:
            yield from _drawn(config, target, compared, accelerator)


def _drawn(config: ScoreConfig, target: str, compared: _References, accelerator: Accelerator) -> Iterator[tuple[ImageSet, dict[str, Any]]]:
    count = config.num_images or min(compared.count() or MOST_DRAWN, MOST_DRAWN)
    for step in _steps_of(Path(target), config.checkpoints):
        for scheduler in config.schedulers.split(","):
            for steps in map(int, config.steps.split(",")):
                command = SampleConfig(
                    model=target,
                    scheduler=scheduler or None,  # type: ignore[arg-type]
                    steps=steps,
                    num_images=count,
                    batch_size=config.measure.batch_size,
                    seed=config.seed,
                    weights=config.weights,
                    guidance_scale=config.guidance_scale,
                    class_labels=config.class_labels,
                    allow_pickle_import=config.allow_pickle_import,
                )
                job = make_job(command, accelerator.device, step)
                if config.class_labels == "balanced" and not job.pipeline.num_classes:
                    raise InputError(f"class_labels is balanced, but {target} is unconditional; leave it out")
                if job.pipeline.num_classes and job.config.class_labels != config.class_labels and accelerator.is_main_process:
                    say(f"{target} does not say how many images of each class it was trained on: as many are drawn of each")
                yield drawn(job, count, target), {"scheduler": job.settings["scheduler"], "steps": steps, "checkpoint": step}


def _steps_of(run: Path, wanted: str) -> Sequence[int | None]:
    if not wanted:
        return [None]
    there = [checkpoint.step_of(path) for path in checkpoint.checkpoints(run / CHECKPOINTS)]
    if not there:
        raise InputError(f"checkpoints is {wanted}, but {run} has none; leave it out")
    return there if wanted == "all" else [int(step) for step in wanted.split(",")]


def _row(config: ScoreConfig, measure: Measure, compared: _References, images: ImageSet, how: Mapping[str, Any]) -> Row:
    reference = compared.sample(images.side)
    _require_enough(images.name, images.count, measure.layers, reference, config.allow_few_images)
    target = measure.sample(images)
    figures = metrics.figures(target, reference, measure.layers, config.seed)
    intervals = metrics.intervals(figures, _redrawn(config, measure, target, reference, images.name)) if config.bootstrap else None
    return Row(images.name, images.count, figures, images.total, intervals=intervals, **how)


def _redrawn(config: ScoreConfig, measure: Measure, target: Sample, reference: Sample, name: str) -> list[dict[str, float]]:
    """Figures of every redrawn set of a target's images; the sets are dealt to the processes."""
    draws = range(measure.process, config.bootstrap or 0, measure.processes)
    shown = tqdm(draws, desc=f"{name} redrawn", unit="set", leave=False, disable=measure.process > 0)
    mine = [metrics.redrawn(target, reference, measure.layers, config.seed, draw) for draw in shown]
    return gather_object(mine) if measure.processes > 1 else mine


def _require_enough(name: str, count: int | None, layers: Mapping[str, str], like: Sample, few: bool) -> None:
    """Refuses too few images before any is drawn or looked at. A count that nobody wrote down is taken for enough."""
    lacking = {metric: least for metric, least in metrics.least_images(layers, like, few).items() if count is not None and count < least}
    if lacking:
        would_do = count is not None and count >= max(metrics.LEAST[metric] for metric in lacking)
        raise InputError(
            f"{name} has {count} images, but metrics {','.join(lacking)} of these features need {max(lacking.values())}; take more, or "
            + ("add --allow_few_images" if would_do else "other metrics")
        )


def _result(config: ScoreConfig, measure: Measure, compared: _References, reference: str, rows: list[Row]) -> dict[str, Any]:
    known = next(iter(compared.known.items()))
    return {
        "reference": {"name": reference, "images": known[1].count, "resolution": known[0]},
        "extractor": {
            "name": measure.extractor.name if measure.extractor else None,
            "weights_sha256": measure.extractor.weights_sha256 if measure.extractor else None,
            "layers": measure.layers,
            "transform": "bytes of 0 to 255, grey as three equal channels; the extractor resizes them itself; no flips",
        },
        "halves_of_the_reference": _yardstick(known[1], measure.layers, config),
        "seed": config.seed,
        "targets": [_plain(row) for row in rows],
    }


def _yardstick(reference: Sample, layers: Mapping[str, str], config: ScoreConfig) -> dict[str, float] | None:
    """How far two halves of the reference are apart, by the metrics for which they have images enough."""
    apart = metrics.halves(reference, config.seed)
    if apart is None:
        return None
    least = metrics.least_images(layers, reference, config.allow_few_images)
    enough = {metric: layer for metric, layer in layers.items() if len(apart[0].features[layer]) >= least[metric]}
    return metrics.figures(*apart, enough, config.seed) or None


def _plain(row: Row) -> dict[str, Any]:
    """What the JSON says of a target."""
    about = {name: value for name, value in dataclasses.asdict(row).items() if value is not None and name != "figures"}
    return about | row.figures


def table(result: Mapping[str, Any]) -> str:
    """The figures as a table in Markdown, the distance between two halves of the reference as the last row."""
    targets = result["targets"]
    names = [name for name in ORDER if any(name in row for row in targets)]
    how = [name for name in ("checkpoint", "scheduler", "steps") if any(name in row for row in targets)]
    head = ["target", *how, "images", *names]
    lines = [" | ".join(head), "|".join(["---"] * len(head))]
    for row in targets:
        cells = [row["target"], *(str(row.get(name, "")) for name in how), str(row["images"])]
        lines.append(" | ".join([*cells, *(_cell(row, name) for name in names)]))
    if yardstick := result["halves_of_the_reference"]:
        cells = ["two halves of the reference", *("" for _ in how), str(result["reference"]["images"] // 2)]
        lines.append(" | ".join([*cells, *(_cell(yardstick, name) for name in names)]))
    return "\n".join(f"| {line} |" for line in lines)


def _cell(row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        return ""
    low_high = (row.get("intervals") or {}).get(name)
    return f"{row[name]:.4g}" + (f" ({low_high[0]:.4g} to {low_high[1]:.4g})" if low_high else "")


def _draw_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """A picture of each figure over steps, or over checkpoints, where there are several."""
    along = "checkpoint" if len({row.get("checkpoint") for row in rows}) > 1 else "steps"
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        if (place := row.get(along)) is None:
            continue
        parts = (row["target"], row["scheduler"], row.get("steps" if along == "checkpoint" else "checkpoint"))
        label = " ".join(str(part) for part in parts if part is not None)
        for name in ORDER:
            if name in row and not name.endswith(("_std", "_subset")):
                lines.setdefault(name, {}).setdefault(label, []).append((place, row[name]))
    if any(len(points) > 1 for labelled in lines.values() for points in labelled.values()):
        write_file(path, curves(lines, "training step" if along == "checkpoint" else "steps of the solver"))


# ---- while training --------------------------------------------------------------------------------------------------


class Monitor:
    """Measures what a network in training draws against the images that it learns. Of several processes, each does its share."""

    def __init__(self, config: TrainConfig, source: Source, device: Any, process: int = 0, processes: int = 1) -> None:
        """Loads the extractor; reads no image.

        Raises:
            InputError: there is no such extractor, or too few images for the metrics.
        """
        assert config.run.eval_every and config.data.dataset and config.data.resolution
        chosen, data = config.run, config.data
        self.name, self.side, self.channels, wanted = str(data.dataset), int(data.resolution or 0), data.channels, chosen.eval_images
        measure = MeasureConfig(
            metrics=chosen.eval_metrics, feature_extractor_weights=chosen.feature_extractor_weights, cache_dir=chosen.cache_dir
        )
        self.measure = Measure(measure, chosen.feature_extractor or usual_extractor(self.name), device, process, processes)
        # How wide the layers are, on which it depends how many images are needed, one image tells as well.
        like = Sample.of(self.measure.features(torch.zeros(1, 3, self.side, self.side, dtype=torch.uint8)))
        least = max(metrics.least_images(self.measure.layers, like).values())
        self.count = wanted or max(USUALLY_DRAWN, least)
        if (fewest := min(self.count, len(source))) < least:
            more = "take more --eval_images" if fewest < len(source) else "the data set has no more: take other --eval_metrics"
            raise InputError(f"eval_metrics {chosen.eval_metrics} need {least} images, but there are {fewest}; {more}")
        labels = {"class_labels": "data"} if source.class_names else {}
        self.about = {"images": self.count, **_of_extractor(self.measure), **labels}  # what figures must share to be compared

    def read(self, source: Source) -> None:
        """Computes the features of the training images, or finds them in the cache; then no image is read whose file did not change.

        Raises:
            InputError: an image cannot be read.
        """
        images = of_source(source, self.name, self.side, channels=self.channels, key=self._key(source))
        self.reference = self.measure.sample(images)

    def _key(self, source: Source) -> str:
        """The content key of the images: as written down when their files were as they are now, else by reading them."""
        processes, cache = self.measure.processes, self.measure.cache
        state = state_of_files(source) if self.measure.process == 0 and cache.folder else None
        how = transform(self.side, self.channels)
        entry = key_of("content", state, how) if state else None
        known = gathered(lambda: [cache.get_json(entry) if entry else None], processes)[0]
        if isinstance(known, str):
            return known
        indices = range(self.measure.process, len(source), processes)
        parts = gathered(lambda: [list(content_hashes(source, indices))], processes)
        key = content_key(how, (parts[k % processes][k // processes] for k in range(len(source))))
        if entry:
            cache.put_json(entry, key)
        return key

    def figures(self, drawn: Iterator[tuple[int, Tensor]]) -> dict[str, float]:
        """Of this process's batches (number, (B, C, H, W) uint8); {} in all processes but the first."""
        sample = self.measure.joined((number, coloured(batch)) for number, batch in drawn)
        return metrics.figures(sample, self.reference, self.measure.layers) if self.measure.process == 0 else {}


# ---- statistics of a reference ---------------------------------------------------------------------------------------


def stats(config: StatsConfig) -> None:
    """Writes mean and covariance of each layer of a reference, and what they are of.

    Raises:
        InputError: the reference cannot be read.
    """
    accelerator = start_processes(config.measure.num_threads)
    if accelerator.is_main_process:
        require_replaceable("out", Path(config.out), _is_of_stats)
    config = dataclasses.replace(config, reference=_pinned_data(config.reference, accelerator))
    measure = _measure(config.measure, config.reference, accelerator)
    if Path(config.reference).suffix != ".npz":
        say_found(open_source(reference_data(config.measure, config.reference)), config.reference, accelerator)
    images = open_reference(config.reference, config.measure, config.measure.resolution)
    sample = measure.sample(images)
    if not accelerator.is_main_process:
        return
    tensors = {f"{layer}/{name}": torch.from_numpy(value) for layer in sample.features for name, value in sample.moments(layer).items()}
    about = {"reference": config.reference, "images": str(sample.count), "resolution": str(images.side), **_of_extractor(measure)}
    write_file(Path(config.out), safetensors.torch.save(tensors, metadata=about))
    say(f"statistics of {sample.count} images of {images.side} pixels in {config.out}")


def _of_extractor(measure: Measure) -> dict[str, str]:
    return {"extractor": measure.extractor.name, "weights_sha256": measure.extractor.weights_sha256} if measure.extractor else {}


def _is_of_stats(path: Path) -> bool:
    try:
        return _about(path).keys() >= {"reference", "images", "resolution"}
    except InputError:
        return False


def read_statistics(path: Path, measure: Measure, side: int | None) -> Sample:
    """What `stats` wrote.

    Raises:
        InputError: it cannot be read, or is of another extractor or size of images.
    """
    about = _about(path)
    try:
        tensors = safetensors.torch.load(read_file(path))
        layers = {name.rsplit("/", 1)[0] for name in tensors}
        found = {layer: {name: tensors[f"{layer}/{name}"].double().numpy() for name in ("mu", "sigma")} for layer in layers}
        images = int(about["images"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"reference {path} is no file of eval.py stats: {reason(error)}") from error
    ours = _of_extractor(measure) | ({"resolution": str(side)} if side else {})
    if other := [f"{name} {about.get(name)}, not {value}" for name, value in ours.items() if about.get(name) != value]:
        raise InputError(f"reference {path} was made with {'; '.join(other)}; make it anew")
    return Sample({}, _sound(path, found), images)


def _npz_statistics(path: Path) -> dict[str, Statistics]:
    """What an `.npz` has of them, by layer of Inception-v3."""
    found = read_npz_statistics(path)
    pairs = {"2048": {"mu": "mu", "sigma": "sigma"}, SPATIAL: {"mu": "mu_s", "sigma": "sigma_s"}}
    given = {layer: {name: found[key] for name, key in pair.items() if key in found} for layer, pair in pairs.items()}
    return _sound(path, {layer: pair for layer, pair in given.items() if pair})


def _sound(path: Path, statistics: dict[str, Statistics]) -> dict[str, Statistics]:
    """Statistics of a file.

    Raises:
        InputError: one has no mean (D,) or no covariance (D, D), or they are not finite.
    """
    for layer, pair in statistics.items():
        mu, sigma = pair.get("mu", np.zeros(())), pair.get("sigma", np.zeros(()))
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise InputError(
                f"reference {path} has for layer {layer} mu of {mu.shape} and sigma of {sigma.shape}, but must have finite numbers, "
                f"(D,) and (D, D); make it anew"
            )
    return statistics


def _about(path: Path) -> dict[str, str]:
    """What a file of statistics says of itself."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"reference {path} cannot be read as a file of eval.py stats: {reason(error)}") from error
