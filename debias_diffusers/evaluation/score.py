"""`eval.py score`: computes metrics of models and image sets against a reference, prints a table and writes files."""

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
from ..data.sources import ImageFolder, open_source
from ..errors import InputError
from ..runs import checkpoints
from ..runs.run_directory import CHECKPOINTS
from ..sampling.generate import make_job, pinned_model
from ..utils.console import say
from ..utils.distributed import inference_accelerator
from ..utils.files import require_replaceable, write_file
from . import metrics
from .feature_extractors import INCEPTION
from .image_sets import ImageSet, generated_images, holds_images, images_of_folder, images_of_npz, npz_shape
from .measure import Measure, make_measure
from .metrics import Sample
from .plots import is_our_picture
from .reference import open_reference, pinned_data, print_summary, reference_data
from .results import Row, as_json, as_row, draw_curves, has_fields, table, unequal
from .statistics import npz_statistics, read_statistics

MAX_GENERATED = 50_000


# ---- score and compare -----------------------------------------------------------------------------------------------


def score(config: ScoreConfig) -> dict[str, Any]:
    """Computes the metrics of all targets of a command, prints a table and writes files; returns the JSON object.

    Raises:
        InputError: targets or reference cannot be read, or have too few images for a metric.
    """
    accelerator = inference_accelerator(config.measure.num_threads)
    if accelerator.is_main_process and config.output:
        _require_output(config, config.output)
    targets = (target if target.endswith(".npz") else pinned_model(target, accelerator) for target in config.targets)
    targets = (str(image_folders.packed_samples(Path(target)) or target) for target in targets)
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
        if config.output:  # before printing, which may fail
            figures, picture = _files_of(config.output)
            write_file(figures, as_json(result))
            draw_curves(result["targets"], picture)
        print(table(result))
        for sentence in unequal(result["targets"]):
            say(f"note: {sentence}")
    return result


def _files_of(output: str) -> tuple[Path, Path]:
    """The JSON file of the metrics and the PNG file of their curves."""
    stem = re.sub(r"\.(json|png)$", "", str(Path(output)))  # removes only these extensions: names may contain dots
    return Path(f"{stem}.json"), Path(f"{stem}.png")


def _require_output(config: ScoreConfig, output: str) -> None:
    """Checks that the output files can be written. Raises as `require_replaceable`."""
    figures, picture = _files_of(output)
    before = has_fields(figures, "reference", "extractor", "targets")
    require_replaceable("output", figures, lambda _: before)
    if config.checkpoints or "," in config.steps:
        require_replaceable("output", picture, lambda path: is_our_picture(path, before))


def _scored(config: ScoreConfig, reference: str, accelerator: Accelerator) -> dict[str, Any]:
    if Path(reference).suffix not in (".npz", ".safetensors"):
        print_summary(
            open_source(reference_data(config.measure, reference)), reference, accelerator
        )  # before an extractor is fetched for nothing
    measure = make_measure(config.measure, reference, accelerator)
    compared = _References(reference, measure, config.allow_few_images)
    _require_enough_of_all(config, measure, compared)
    rows = [_row(config, measure, compared, images, how) for images, how in _targets(config, compared, accelerator)]
    return _result(config, measure, compared, reference, rows)


class _References:
    """The reference, at each resolution of the targets."""

    def __init__(self, name: str, measure: Measure, allow_few_images: bool) -> None:
        self.name, self.measure, self.allow_few_images = name, measure, allow_few_images
        self.known: dict[int | None, Sample] = {}
        self.path, self.npz = Path(name), Path(name).suffix == ".npz"
        self.statistics = self.path.suffix == ".safetensors" or (self.npz and not holds_images(self.path))
        self.side = npz_shape(self.path)[1] if self.npz and not self.statistics else None  # None: of its targets
        # ADM's files have statistics of a whole data set and 10,000 of its images; its evaluator uses the statistics.
        of_inception = measure.extractor is not None and measure.extractor.name == INCEPTION
        self.has_statistics = self.statistics or (self.npz and of_inception)

    def sample(self, side: int | None) -> Sample:
        """Features or statistics of the reference for targets of `side` pixels; None for its own resolution."""
        side = self.measure.config.resolution or side or self.side
        if side not in self.known:
            found = self._statistics(side) if self.statistics else self._images(side)
            metrics.require_images(found, self.measure.layers)
            # The Inception score needs no reference, and the statistics in a file may be of more images than the file has.
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
        if self.has_statistics:
            sample.statistics.update(npz_statistics(self.path))
        return sample

    def count(self) -> int | None:
        """The number of reference images, if known; computes no features."""
        if self.statistics:
            return self._statistics(None).count
        return npz_shape(self.path)[0] if self.npz else len(open_source(reference_data(self.measure.config, self.name)))

    def _statistics(self, side: int | None) -> Sample:
        return Sample({}, npz_statistics(self.path), None) if self.npz else read_statistics(self.path, self.measure, side)


def _targets(config: ScoreConfig, compared: _References, accelerator: Accelerator) -> Iterator[tuple[ImageSet, dict[str, Any]]]:
    """Yields every set of images to score, and how it was sampled."""
    for target in config.targets:
        path = Path(target)
        if path.suffix == ".npz":
            yield images_of_npz(path, config.num_images, config.seed), {}
        elif _is_folder_of_images(path):
            folder = open_source(DataConfig(dataset=target))
            if not isinstance(folder, ImageFolder):
                raise InputError(f"target {target} is a saved data set; name it as --reference, or give its images as a folder")
            print_summary(folder, target, accelerator)
            yield images_of_folder(folder, target, config.num_images, seed=config.seed), {}
        else:
            yield from _drawn(config, target, compared, accelerator)


def _require_enough_of_all(config: ScoreConfig, measure: Measure, compared: _References) -> None:
    """Raises InputError if a target or the reference has too few images, before features are computed."""
    like = measure.probe()
    for target in config.targets:
        _require_enough(target, _count(config, target, compared), measure.layers, like, config.allow_few_images)
    if not compared.has_statistics:
        needed = {metric: layer for metric, layer in measure.layers.items() if METRICS[metric].reference != "nothing"}
        _require_enough(compared.name, compared.count(), needed, like, config.allow_few_images)


def _count(config: ScoreConfig, target: str, compared: _References) -> int:
    """The number of images of a target that are compared."""
    path = Path(target)
    if path.suffix == ".npz":
        there = npz_shape(path)[0]
    elif _is_folder_of_images(path):
        there = len(open_source(DataConfig(dataset=target)))
    else:
        return _num_drawn(config, compared)
    return min(config.num_images or there, there)


def _num_drawn(config: ScoreConfig, compared: _References) -> int:
    """The number of images that are sampled of a model."""
    return config.num_images or min(compared.count() or MAX_GENERATED, MAX_GENERATED)


def _is_folder_of_images(path: Path) -> bool:
    return path.is_dir() and not (path / "model_index.json").is_file()


def _drawn(config: ScoreConfig, target: str, compared: _References, accelerator: Accelerator) -> Iterator[tuple[ImageSet, dict[str, Any]]]:
    count = _num_drawn(config, compared)
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
                how = {"scheduler": job.settings["scheduler"], "steps": steps, "network_evaluations": job.network_evaluations}
                yield generated_images(job, count, target), {**how, "checkpoint": step}


def _steps_of(run: Path, wanted: str) -> Sequence[int | None]:
    if not wanted:
        return [None]
    there = [checkpoints.step_of_folder(path) for path in checkpoints.list_checkpoints(run / CHECKPOINTS)]
    if not there:
        raise InputError(f"checkpoints is {wanted}, but {run} has none; leave it out")
    return there if wanted == "all" else [int(step) for step in wanted.split(",")]


def _row(config: ScoreConfig, measure: Measure, compared: _References, images: ImageSet, how: Mapping[str, Any]) -> Row:
    reference = compared.sample(images.side)
    _require_enough(images.name, images.count, measure.layers, reference, config.allow_few_images)  # of the reference's statistics, too
    target = measure.sample(images)
    figures = metrics.figures(target, reference, measure.layers, config.seed)
    intervals = metrics.intervals(figures, _bootstrap(config, measure, target, reference, images.name)) if config.bootstrap else None
    return Row(images.name, images.count, figures, images.total, intervals=intervals, **how)


def _bootstrap(config: ScoreConfig, measure: Measure, target: Sample, reference: Sample, name: str) -> list[dict[str, float]]:
    """Metrics of every bootstrap resample of a target's images, distributed over the processes."""
    draws = range(measure.process, config.bootstrap or 0, measure.processes)
    shown = tqdm(draws, desc=f"{name} redrawn", unit="set", leave=False, disable=measure.process > 0)
    mine = [metrics.redrawn(target, reference, measure.layers, config.seed, draw) for draw in shown]
    return gather_object(mine) if measure.processes > 1 else mine


def _require_enough(name: str, count: int | None, layers: Mapping[str, str], like: Sample, few: bool) -> None:
    """Raises InputError for too few images, before any is sampled or read. An unknown count (None) passes."""
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
        "halves_of_the_reference": _distance_of_halves(known[1], measure.layers, config),
        "seed": config.seed,
        "targets": [as_row(row) for row in rows],
    }


def _distance_of_halves(reference: Sample, layers: Mapping[str, str], config: ScoreConfig) -> dict[str, float] | None:
    """Metrics between two random halves of the reference, for those metrics for which they have enough images."""
    apart = metrics.halves(reference, config.seed)
    if apart is None:
        return None
    least = metrics.least_images(layers, reference, config.allow_few_images)
    enough = {metric: layer for metric, layer in layers.items() if len(apart[0].features[layer]) >= least[metric]}
    return metrics.figures(*apart, enough, config.seed) or None
