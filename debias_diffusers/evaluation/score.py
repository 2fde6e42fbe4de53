"""`eval.py score`: computes metrics of models and image sets against a reference, prints a table and writes files."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from ..config.hub_names import is_reference_file
from ..config.prompts import read_prompts
from ..config.registry import METRICS
from ..config.schema.data import DataConfig
from ..config.schema.evaluation import ScoreConfig
from ..config.schema.sampling import SampleConfig
from ..data import image_folders
from ..data.captions import read_captions
from ..data.sources.base import Source
from ..data.sources.folder import ImageFolder
from ..data.sources.opening import open_source
from ..data.text_dataset import prompts_of_data
from ..errors import InputError
from ..hub import client
from ..runs import checkpoints
from ..runs.model_folder import MODEL_INDEX, is_lora, task_of
from ..runs.run_directory import CHECKPOINTS
from ..sampling.generate import load_model, make_job, pinned_model, require_same_weights
from ..sampling.job import Job, make_solver
from ..sampling.pixel_job import PixelJob
from ..utils.console import say
from ..utils.distributed import inference_accelerator, told_by_the_first
from ..utils.files import require_replaceable, write_file
from ..utils.torch_errors import explained_torch_errors
from . import metrics
from .image_sets import ImageSet, generated_images, images_of_folder, images_of_npz, npz_shape, side_of_folder
from .measure import Measure, make_measure
from .metrics import Sample
from .plots import is_our_picture
from .reference import TrainedOn, any_run, caption_column, pinned_data, print_summary, reference_data, training_of_run
from .results import Row, as_json, as_row, best_width, draw_curves, has_fields, over_training_seeds, table, table_of_groups, unequal
from .statistics import NoReference, ReferenceFeatures, require_enough

MAX_GENERATED = 50_000
SWEEP = (0.03, 0.05, 0.07, 0.085, 0.1, 0.125, 0.15, 0.2)  # sigma_rel of `--ema sweep`


@told_by_the_first()
def score(config: ScoreConfig) -> dict[str, Any]:
    """Computes the metrics of all targets of a command, prints a table and writes files; returns the JSON object.

    Raises:
        InputError: targets or reference cannot be read, or have too few images for a metric.
    """
    accelerator = inference_accelerator(config.measure.num_threads)
    if accelerator.is_main_process and config.output:
        _require_output(config, config.output)
    config = _completed(config, accelerator)
    result = _scored(config, accelerator)
    if accelerator.is_main_process:
        if config.output:  # before printing, which may fail
            figures, picture = _files_of(config.output)
            write_file(figures, as_json(result))
            draw_curves(result["targets"], picture)
        _print(result)
    return result


def _completed(config: ScoreConfig, accelerator: Accelerator) -> ScoreConfig:
    """The command with commits for names on the Hub, the files of packed samples, and where no reference is named that of the runs."""
    targets = (target if target.endswith(".npz") else pinned_model(target, accelerator) for target in config.targets)
    targets = (str(image_folders.packed_samples(Path(target)) or target) for target in targets)
    config = dataclasses.replace(config, targets=tuple(targets), reference=pinned_data(config.reference, accelerator))
    needs_reference = any(METRICS[metric].reference != "nothing" for metric in config.measure.metrics.split(","))
    if config.reference is not None or not (needs_reference or any_run(config.targets)):
        return config
    data = reference_data(config.measure, None, config.targets)
    of_run = {name: getattr(data, name) for name in ("split", "image_column", "skip_bad", "class_conditional", "label_column")}
    measure = TrainedOn(**{**vars(config.measure), **of_run, "channels": config.measure.channels or data.channels})
    column = config.caption_column or caption_column(config.targets)
    return dataclasses.replace(config, reference=data.dataset, measure=measure, caption_column=column)


def _print(result: Mapping[str, Any]) -> None:
    """The tables on stdout, and on stderr what to know of them."""
    print(table(result))
    if "groups" in result:
        print(f"\nmeans over training seeds, with 95% intervals over these:\n\n{table_of_groups(result['groups'])}")
    for sentence in unequal(result["targets"]):
        say(f"note: {sentence}")
    for best in result.get("best", ()):
        (figure,) = best.keys() - {"target", "sigma_rel"}
        say(f"best {figure} of {best['target']}: {best[figure]:.4g} at sigma_rel {best['sigma_rel']:g}")


def _files_of(output: str) -> tuple[Path, Path]:
    """The JSON file of the metrics and the PNG file of their curves."""
    stem = re.sub(r"\.(json|png)$", "", str(Path(output)))  # removes only these extensions: names may contain dots
    return Path(f"{stem}.json"), Path(f"{stem}.png")


def _require_output(config: ScoreConfig, output: str) -> None:
    """Checks that the output files can be written. Raises as `require_replaceable`."""
    figures, picture = _files_of(output)
    before = has_fields(figures, "reference", "extractor", "targets")
    require_replaceable("output", figures, lambda _: before)
    if config.checkpoints or "," in config.steps or config.ema:
        require_replaceable("output", picture, lambda path: is_our_picture(path, before))


def _scored(config: ScoreConfig, accelerator: Accelerator) -> dict[str, Any]:
    _require_models(config)
    reference = config.reference
    if reference is not None and not is_reference_file(reference):
        source = open_source(reference_data(config.measure, reference))
        print_summary(source, reference, accelerator)  # before an extractor is fetched for nothing
    measure = make_measure(config.measure, reference or "", accelerator, config.clip_model)
    compared = ReferenceFeatures(reference, measure, config.allow_few_images) if reference is not None else NoReference()
    prompts = _prompts_of_all(config, measure)
    _require_enough_of_all(config, measure, compared, prompts)
    _require_drawable(config, compared, prompts, accelerator)
    rows = [_row(config, measure, compared, images, how) for images, how in _targets(config, compared, prompts, accelerator)]
    return _result(config, measure, compared, rows)


_Compared = ReferenceFeatures | NoReference
_Prompts = Mapping[str, Sequence[str]]  # by target


def _prompts_of_all(config: ScoreConfig, measure: Measure) -> _Prompts:
    """The prompts of every target that has some: those of which a text-to-image model draws, and captions of images that are judged.

    Raises:
        InputError: a target has no prompts and needs them; or a metric cannot judge them.
    """
    found, wanted = dict[str, Sequence[str]](), ", ".join(measure.of_prompts)
    for target in config.targets:
        path = Path(target)
        if _is_model(path) and task_of(client.configurations(target)) == "text_to_image":
            found[target] = _prompts_of_model(config, target)
        elif wanted and path.suffix != ".npz" and _is_folder_of_images(path):
            found[target] = _one_each(open_source(DataConfig(dataset=target)), config.caption_column, target)
        elif wanted:
            raise InputError(f"metric {wanted} needs the prompt of each image, which {target} does not have; leave it out")
    if config.prompts is not None and not any(task_of(client.configurations(target)) == "text_to_image" for target in found):
        raise InputError(f"prompts is {config.prompts}, but no target is a text-to-image model; leave it out")
    if config.base_model is not None and not any(is_lora(client.configurations(target)) for target in found):
        raise InputError(f"base_model is {config.base_model}, but no target is a LoRA; leave it out")
    if config.caption_column is not None and not found:
        raise InputError(f"caption_column is {config.caption_column}, but no captions are needed; leave it out")
    for prompts in found.values():
        for scorer in measure.of_prompts.values():
            scorer.check(prompts)
    return found


def _prompts_of_model(config: ScoreConfig, target: str) -> Sequence[str]:
    """Of --prompts, or `prompts_of_data` of the reference: image k has number k mod n of them."""
    if config.prompts is not None:
        return read_prompts(SampleConfig(model=target, prompts=config.prompts))
    if config.reference is None or is_reference_file(config.reference):
        raise InputError(
            f"{target} is a text-to-image model, whose images are drawn of the captions of the reference, and there are none; name a "
            f"data set with captions as --reference, or prompts with --prompts FILE"
        )
    source = open_source(reference_data(config.measure, config.reference))
    return prompts_of_data(read_captions(source, config.caption_column))


def _one_each(source: Source, column: str | None, target: str) -> Sequence[str]:
    """The first caption of every image; raises InputError if one has none."""
    captions = read_captions(source, column)
    if without := [k for k, each in enumerate(captions) if not each]:
        raise InputError(f"{len(without)} of {len(captions)} images of {target} have no caption, such as {source.read(without[0])[2]}")
    return [each[0] for each in captions]


def _targets(
    config: ScoreConfig, compared: _Compared, prompts: _Prompts, accelerator: Accelerator
) -> Iterator[tuple[ImageSet, dict[str, Any]]]:
    """Yields every set of images to score, and how it was sampled."""
    for target in config.targets:
        path = Path(target)
        if path.suffix == ".npz":
            yield images_of_npz(path, config.num_images, config.seed), {}
        elif _is_folder_of_images(path):
            folder = _folder(target)
            print_summary(folder, target, accelerator)
            yield images_of_folder(folder, target, config.num_images, seed=config.seed, prompts=prompts.get(target)), {}
        else:
            yield from _drawn(config, target, compared, prompts.get(target), accelerator)


# What says how images are drawn, and of what.
_OF_MODELS = ("schedulers", "steps", "checkpoints", "weights", "ema", "guidance_scale", "class_labels", "sampling_seeds")


def _require_models(config: ScoreConfig) -> None:
    """Raises InputError for a flag of models where no target is one."""
    neutral = ScoreConfig(targets=())
    given = next((name for name in _OF_MODELS if getattr(config, name) != getattr(neutral, name)), None)
    if given and not any(_is_model(Path(target)) for target in config.targets):
        raise InputError(f"{given} is {getattr(config, given)}, but no target is a model, which images are drawn with; leave it out")


def _require_drawable(config: ScoreConfig, compared: _Compared, prompts: _Prompts, accelerator: Accelerator) -> None:
    """Raises InputError for a model that a flag does not fit, or that lacks what it names, before another one is drawn.

    Likewise for targets whose resolution is not that of a reference in one file.
    """
    for target in config.targets:
        if not _is_model(Path(target)):
            continue
        _steps_of(Path(target), config.checkpoints)
        if config.class_labels != "data" and target in prompts:
            raise InputError(f"class_labels is {config.class_labels}, but {target} is a text-to-image model; leave it out")
    for target in config.targets[1:]:  # whatever the first one lacks is found before it is drawn
        compared.require(_side(config, target, compared, prompts, accelerator))


def _side(config: ScoreConfig, target: str, compared: _Compared, prompts: _Prompts, accelerator: Accelerator) -> int | None:
    """The side in pixels of the images of a target. A model is loaded for it, and gone when this returns."""
    path = Path(target)
    if _is_model(path):
        return next(_drawn(config, target, compared, prompts.get(target), accelerator, quiet=True))[0].side
    return npz_shape(path)[1] if path.suffix == ".npz" else side_of_folder(_folder(target))


def _require_enough_of_all(config: ScoreConfig, measure: Measure, compared: _Compared, prompts: _Prompts) -> None:
    """Raises InputError if a target or the reference has too few images, before features are computed."""
    like = measure.probe()
    for target in config.targets:
        require_enough(target, _count(config, target, compared, prompts.get(target)), measure.layers, like, config.allow_few_images)
    if isinstance(compared, ReferenceFeatures) and not compared.has_statistics:
        needed = {metric: layer for metric, layer in measure.layers.items() if METRICS[metric].reference != "nothing"}
        require_enough(compared.name, compared.count(), needed, like, config.allow_few_images)


def _count(config: ScoreConfig, target: str, compared: _Compared, prompts: Sequence[str] | None) -> int:
    """The number of images of a target that are compared."""
    path = Path(target)
    if path.suffix == ".npz":
        there = npz_shape(path)[0]
    elif _is_folder_of_images(path):
        there = len(_folder(target))
    else:
        return _num_drawn(config, compared, prompts)
    return min(config.num_images or there, there)


def _num_drawn(config: ScoreConfig, compared: _Compared, prompts: Sequence[str] | None) -> int:
    """The number of images that are sampled of a model: as many as the reference has, or, without one, of each prompt one."""
    return config.num_images or min(compared.count() or len(prompts or ()) or MAX_GENERATED, MAX_GENERATED)


def _folder(target: str) -> ImageFolder:
    """A target that is a folder of images. Raises InputError for another data set."""
    found = open_source(DataConfig(dataset=target))
    if not isinstance(found, ImageFolder):
        raise InputError(f"target {target} is a saved data set; name it as --reference, or give its images as a folder")
    return found


def _is_model(path: Path) -> bool:
    """Whether a target is drawn: a model on this disk or of the Hub."""
    return path.suffix != ".npz" and not _is_folder_of_images(path)


def _is_folder_of_images(path: Path) -> bool:
    return path.is_dir() and not (path / MODEL_INDEX).is_file() and not is_lora(path)


def _drawn(
    config: ScoreConfig,
    target: str,
    compared: _Compared,
    prompts: Sequence[str] | None,
    accelerator: Accelerator,
    quiet: bool = False,
) -> Iterator[tuple[ImageSet, dict[str, Any]]]:
    """The images of a model, each set drawn when it is read. With `quiet`, notes are not printed."""
    count, said = _num_drawn(config, compared, prompts), quiet or not accelerator.is_main_process
    for step, width in product(_steps_of(Path(target), config.checkpoints), SWEEP if config.ema else (None,)):
        commands = _commands(config, target, prompts, count, width)
        with _naming(target, config):
            loaded = load_model(commands[0], accelerator.device, step)
            require_same_weights(loaded.fingerprint, target, accelerator)
            for command in commands:  # what a solver cannot do is an error before the first images are drawn
                make_solver(command, loaded.scheduler, command.clipping)
        for command in commands:
            with _naming(target, config):
                job = make_job(command, accelerator.device, step, loaded)
            if isinstance(job, PixelJob) and config.class_labels == "balanced" and not job.pipeline.num_classes:
                raise InputError(f"class_labels is balanced, but {target} is unconditional; leave it out")
            for note in () if said else _notes(job, config, target):
                say(note)
            said = said or bool(prompts)  # they are the same for all
            how = {"scheduler": job.settings["scheduler"], "steps": command.steps, "network_evaluations": job.network_evaluations}
            how |= {"guidance_scale": job.options["guidance_scale"]} if prompts else {}
            how |= {"weights": command.weights, "training_step": job.settings["model_step"]}
            how |= {"checkpoint": step, "sigma_rel": width, "sampling_seed": command.seed if config.sampling_seeds else None}
            yield generated_images(job, count, target), how


def _commands(config: ScoreConfig, target: str, prompts: Sequence[str] | None, count: int, width: float | None) -> list[SampleConfig]:
    """The sampling commands of a model, for each seed, solver and number of steps; `width` is the sigma_rel of its weights, if given."""
    own: dict[str, Any] = (
        {"prompt": tuple(prompts[:count]), "base_model": config.base_model if is_lora(client.configurations(target)) else None}
        if prompts
        else {"class_labels": config.class_labels, "allow_pickle_import": config.allow_pickle_import}
    )
    seeds = (config.sampling_seeds or str(config.seed)).split(",")
    return [
        SampleConfig(
            model=target,
            scheduler=scheduler or None,
            steps=int(steps),
            num_images=count,
            batch_size=config.measure.batch_size,
            seed=int(seed),
            weights=f"sigma_rel={width}" if width else config.weights,
            guidance_scale=config.guidance_scale,
            **own,
        )
        for seed, scheduler, steps in product(seeds, config.schedulers.split(","), config.steps.split(","))
    ]


@contextlib.contextmanager
def _naming(target: str, config: ScoreConfig) -> Iterator[None]:
    """Of several targets, errors say which one they are about."""
    try:
        yield
    except InputError as error:
        if len(config.targets) == 1 or target in str(error):
            raise
        raise InputError(f"{target}: {error}") from error


def _notes(job: Job, config: ScoreConfig, target: str) -> list[str]:
    """What the user should know of a model's images."""
    if not isinstance(job, PixelJob):
        return job.notes()
    if job.pipeline.num_classes and job.config.class_labels != config.class_labels:
        return [f"{target} does not say how many images of each class it was trained on: as many are drawn of each"]
    return []


def _steps_of(run: Path, wanted: str) -> Sequence[int | None]:
    if not wanted:
        return [None]
    there = [checkpoints.step_of_folder(path) for path in checkpoints.list_checkpoints(run / CHECKPOINTS)]
    if not there:
        raise InputError(f"checkpoints is {wanted}, but {run} has none; leave it out")
    steps = there if wanted == "all" else [int(step) for step in wanted.split(",")]
    if absent := [step for step in steps if step not in there]:
        raise InputError(f"{run} has no checkpoint at step {absent[0]}; take some of {', '.join(map(str, there))}")
    return steps


def _row(config: ScoreConfig, measure: Measure, compared: _Compared, images: ImageSet, how: Mapping[str, Any]) -> Row:
    with explained_torch_errors("--batch_size", measure.batch_size(images)):
        reference = compared.sample(images.side)
        require_enough(images.name, images.count, measure.layers, reference, config.allow_few_images)  # of the reference's statistics, too
        target = measure.sample(images)
    figures = metrics.figures(target, reference, measure.layers, config.seed)
    intervals = metrics.intervals(figures, _bootstrap(config, measure, target, reference, images.name)) if config.bootstrap else None
    return Row(images.name, images.count, figures, images.total, images.side, intervals=intervals, **how)


def _bootstrap(config: ScoreConfig, measure: Measure, target: Sample, reference: Sample, name: str) -> list[dict[str, float]]:
    """Metrics of every bootstrap resample of a target's images, distributed over the processes."""
    draws = range(measure.process, config.bootstrap or 0, measure.processes)
    shown = tqdm(draws, desc=f"{name} redrawn", unit="set", leave=False, disable=measure.process > 0)
    mine = [metrics.redrawn(target, reference, measure.layers, config.seed, draw) for draw in shown]
    return gather_object(mine) if measure.processes > 1 else mine


def _result(config: ScoreConfig, measure: Measure, compared: _Compared, rows: list[Row]) -> dict[str, Any]:
    side, sample = next(iter(compared.known.items()), (None, None))
    of_prompts = {metric: {"weights_sha256": scorer.weights_sha256} for metric, scorer in measure.of_prompts.items()}
    if "clip_score" in of_prompts:
        of_prompts["clip_score"] |= {"clip_model": str(config.clip_model)}
    targets = [as_row(row) for row in rows]
    groups = over_training_seeds(targets, {target: found for target in config.targets if (found := training_of_run(target))})
    return {
        "reference": {"name": config.reference, "images": sample.count, "resolution": side} if sample else None,
        "extractor": {
            "name": measure.extractor.name if measure.extractor else None,
            "weights_sha256": measure.extractor.weights_sha256 if measure.extractor else None,
            "layers": measure.layers,
            "transform": "bytes of 0 to 255, grey as three equal channels; the extractor resizes them itself; no flips",
        },
        **({"of_prompts": of_prompts} if of_prompts else {}),
        "halves_of_the_reference": _distance_of_halves(sample, measure.layers, config) if sample else None,
        "seed": config.seed,
        "targets": targets,
        **({"groups": groups} if groups else {}),
        **({"best": best_width(targets, next(iter(METRICS[config.measure.metrics.split(",")[0]].figures)))} if config.ema else {}),
    }


def _distance_of_halves(reference: Sample, layers: Mapping[str, str], config: ScoreConfig) -> dict[str, float] | None:
    """Metrics between two random halves of the reference, for those metrics for which they have enough images."""
    apart = metrics.halves(reference, config.seed)
    if apart is None:
        return None
    least = metrics.least_images(layers, reference, config.allow_few_images)
    there = {metric: layer for metric, layer in layers.items() if layer in apart[0].features}  # not what needs prompts
    enough = {metric: layer for metric, layer in there.items() if len(apart[0].features[layer]) >= least[metric]}
    return metrics.figures(*apart, enough, config.seed) or None
