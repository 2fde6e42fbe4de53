"""Images to figures: which sets are compared, their features, tables and files."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from ..config.registry import METRICS
from ..config.schema import DataConfig, SampleConfig, ScoreConfig
from ..data import image_folders
from ..data.sources import Folder, open_source
from ..errors import InputError
from ..runs import checkpoints
from ..runs.run_directory import CHECKPOINTS
from ..sampling.generate import make_job, pinned_model
from ..utils.console import say
from ..utils.distributed import start_processes
from ..utils.files import require_replaceable, write_file
from . import metrics
from .feature_extractors import INCEPTION
from .image_sets import (
    ImageSet,
    drawn,
    holds_images,
    npz_shape,
    of_folder,
    of_npz,
)
from .measure import Measure, make_measure
from .metrics import Sample
from .plots import is_our_picture
from .reference import open_reference, pinned_data, reference_data, say_found
from .results import Row, as_json, as_row, draw_curves, has_fields, table
from .statistics import npz_statistics, read_statistics

MOST_DRAWN = 50_000


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
    targets = (str(image_folders.packed(Path(target)) or target) for target in targets)
    config = dataclasses.replace(config, targets=tuple(targets), reference=pinned_data(config.reference, accelerator))
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
            draw_curves(result["targets"], picture)
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


def _scored(config: ScoreConfig, reference: str, accelerator: Accelerator) -> dict[str, Any]:
    if Path(reference).suffix not in (".npz", ".safetensors"):
        say_found(
            open_source(reference_data(config.measure, reference)), reference, accelerator
        )  # before an extractor is fetched for nothing
    measure = make_measure(config.measure, reference, accelerator)
    compared = _References(reference, measure, config.allow_few_images)
    rows = [_row(config, measure, compared, images, how) for images, how in _targets(config, compared, accelerator)]
    return _result(config, measure, compared, reference, rows)


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
            own = {
                m: layer
                for m, layer in self.measure.layers.items()
                if METRICS[m].reference != "nothing" and not (METRICS[m].reference == "statistics" and layer in given)
            }
            _require_enough(self.name, found.count, own, found, self.allow_few_images)
            self.known[side] = found
        return self.known[side]

    def _images(self, side: int | None) -> Sample:
        sample = self.measure.sample(open_reference(self.name, self.measure.config, side))
        if self.npz and self.measure.extractor and self.measure.extractor.name == INCEPTION:
            # ADM's files have statistics of a whole data set beside 10,000 of its images, and its evaluator takes them.
            sample.statistics.update(npz_statistics(self.path))
        return sample

    def count(self) -> int | None:
        """Of its images, as far as is known; without computing features."""
        if self.statistics:
            return self._statistics(None).count
        return npz_shape(self.path)[0] if self.npz else len(open_source(reference_data(self.measure.config, self.name)))

    def _statistics(self, side: int | None) -> Sample:
        return Sample({}, npz_statistics(self.path), None) if self.npz else read_statistics(self.path, self.measure, side)


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
                    scheduler=scheduler or None,
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
    there = [checkpoints.step_of(path) for path in checkpoints.checkpoints(run / CHECKPOINTS)]
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
        would_do = count is not None and count >= max(METRICS[metric].min_images for metric in lacking)
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
        "targets": [as_row(row) for row in rows],
    }


def _yardstick(reference: Sample, layers: Mapping[str, str], config: ScoreConfig) -> dict[str, float] | None:
    """How far two halves of the reference are apart, by the metrics for which they have images enough."""
    apart = metrics.halves(reference, config.seed)
    if apart is None:
        return None
    least = metrics.least_images(layers, reference, config.allow_few_images)
    enough = {metric: layer for metric, layer in layers.items() if len(apart[0].features[layer]) >= least[metric]}
    return metrics.figures(*apart, enough, config.seed) or None
