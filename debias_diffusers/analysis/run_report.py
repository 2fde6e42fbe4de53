"""`eval.py report`: runs as one page: curves, losses by timestep, grids over time, metrics, weights of the objective, configuration."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.loading import flatten, layered, stored
from ..config.registry import FIGURES, WEIGHTINGS
from ..config.schema.evaluation import ReportConfig
from ..config.schema.training import TrainConfig
from ..config.schema.types import PredictionType
from ..data import images
from ..diffusion.noise_schedule import make_schedule
from ..errors import InputError
from ..utils.console import say
from ..utils.files import read_file, write_file
from .charts import chart, scale_of, swatch
from .denoising import weights_of_timesteps
from .figures import Curve, Scale
from .report_page import ReportPage
from .run_files import Points, RunFiles, Scores, is_number, read_runs, read_scores

POINTS = 100  # of a curve at most; of longer runs each is the mean of several lines
MAX_GRIDS, GRID_SIDE = 24, 1024  # of a run, evenly spaced, and pixels a side, so that a page stays below some 5 MB for each run
ENLARGED = 640  # grids with sides below so many pixels are enlarged without smoothing
LAST = 10  # the last tenth of its values is what a run is like now

# Curves over the steps by their name in metrics.jsonl: title, scale if it is not for the values to decide, note.
CURVES: dict[str, tuple[str, Scale | None, str]] = {
    "loss": ("Loss", None, "The weighted loss of the logged steps; its size depends on the weighting."),
    "validation_loss": ("Validation loss", None, "The weighted loss of the EMA weights on images that are held out."),
    "validation_mse": ("Validation error", None, "The mean square error on them without weights, which weightings can be compared by."),
    "grad_norm": ("Gradient norm", None, "Before clipping."),
    "learning_rate": ("Learning rate", "linear", ""),
    "images_per_second": ("Images per second", "linear", "Of the training steps, without grids, metrics and checkpoints."),
    "effective_sample_size": ("Effective sample size", "linear", "The share of a batch that equal weights would need."),
    "clip_rate": ("Share of clipped steps", "linear", "How often the gradient was clipped."),
    "skipped_images": ("Skipped images", "linear", "Images that could not be read, since the run began."),
}  # fmt: skip
BY_TIMESTEP = {
    "loss_by_t": ("Loss by timestep", "With weights: what the training pays attention to."),
    "mse_by_t": ("Error by timestep", "Without weights: how well each part is predicted."),
    "bound_by_t": ("Term of the variational bound by timestep", "Of the learned variance."),
}
X_PARTS = "t / T (0: nearly clean, 1: noise)"
HOW = (  # of a score
    "weights", "training_step", "checkpoint", "sigma_rel", "sampling_seed", "scheduler", "steps", "network_evaluations",
    "guidance_scale", "resolution", "images",
)  # fmt: skip


def write_report(config: ReportConfig) -> Path:
    """Writes the page of a command, and returns its path.

    Raises:
        InputError: a file of scores is none, or has none of the runs.
        CannotWriteError: the page cannot be written.
    """
    runs = read_runs(config.runs)
    page = make_page(runs, read_scores(runs, config.scores)).html()
    path = Path(config.output)
    write_file(path, page)
    say(f"report of {len(runs)} {'run' if len(runs) == 1 else 'runs'} in {path} ({len(page) / 1e3:.0f} kB)")
    return path


def make_page(runs: Sequence[RunFiles], scores: Sequence[Scores]) -> ReportPage:
    """The page of runs, side by side in the order of the command."""
    page = ReportPage("Training report: " + ", ".join(run.label for run in runs), contents=True)
    page.table(["", *(run.label for run in runs)], _summary(runs), "The runs", words=True)
    _add_differences(page, runs)
    _add_grids(page, runs)
    _add_curves(page, runs)
    _add_timesteps(page, runs)
    _add_metrics(page, runs, scores)
    _add_weights(page, runs)
    _add_configuration(page, runs)
    page.heading("Model cards" if len(runs) > 1 else "Model card")
    for run in runs:
        if run.card is None:
            page.paragraph(f"{run.label} has no model card yet: it comes with the first checkpoint.")
        else:
            page.preformatted(run.card, f"README.md of {run.label}")
    _add_versions(page, runs)
    return page


# ---- the runs --------------------------------------------------------------------------------------------------------


def _summary(runs: Sequence[RunFiles]) -> Iterator[list[object]]:
    yield ["state", *(run.status for run in runs)]
    yield ["what is trained", *(_kind(run.values) for run in runs)]
    yield ["prediction type", *(run.values["prediction_type"] for run in runs)]
    yield ["weighting", *(run.values["weighting"] for run in runs)]
    yield ["samples", *(_samples(run) for run in runs)]
    yield ["time of the steps", *(_duration(run) for run in runs)]
    yield ["images per second", *(_recent(run.points("images_per_second")) for run in runs)]
    yield ["loss at the end", *(_recent(run.points("loss")) for run in runs)]
    for name in dict.fromkeys(name for run in runs for name in run.names("validation_mse", "eval_")):
        yield [f"last {name.removeprefix('eval_')}", *(_last(run.points(name)) for run in runs)]


def _kind(values: Mapping[str, Any]) -> str:
    side = f"{values['resolution']} x {values['resolution']}" if values.get("resolution") else "images"
    if not values.get("base_model"):
        return f"{'class-conditional ' if values.get('class_conditional') else ''}pixel model, {side}"
    how = f"LoRA of rank {values['lora_rank']} on" if values.get("lora_rank") else "text-to-image model from"
    return f"{how} {values['base_model']}, {side}"


def _samples(run: RunFiles) -> str:
    """Samples that were trained: up to the checkpoint as it says, after it by the batch size."""
    known, step = int(run.state.get("position", 0)), int(run.state.get("step", 0))
    return f"{known + (run.step - step) * run.values['batch_size']:,}"


def _duration(run: RunFiles) -> str | None:
    """The time of the optimizer steps, by the images per second of each line."""
    rates, before, seconds = run.points("images_per_second"), 0, 0.0
    changes = [change for change in run.changes if change["name"] == "batch_size"]
    for step, rate in rates:
        batch_size = next((change["before"] for change in changes if step <= change["step"]), run.values["batch_size"])
        seconds += (step - before) * batch_size / rate if rate > 0 else 0
        before = step
    minutes = round(seconds / 60)
    return None if not rates else f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{seconds / 60:.1f} min"


def _recent(points: Points) -> str | None:
    """The mean of the last tenth."""
    return f"{statistics.fmean(_latest(points)):.4g}" if points else None


def _latest(points: Points) -> list[float]:
    """The values of the last tenth."""
    return [value for _, value in points[-max(1, len(points) // LAST) :]]


def _last(points: Points) -> str | None:
    return f"{points[-1][1]:.4g} (step {points[-1][0]})" if points else None


def _add_differences(page: ReportPage, runs: Sequence[RunFiles]) -> None:
    """What the configurations do not have in common; of a single run, what is not a default."""
    configs = [stored(layered(run.values)) for run in runs]
    if len(runs) == 1:
        defaults = flatten(TrainConfig())
        changed = {name: value for name, value in configs[0].items() if _text(value) != _text(defaults[name])}
        page.heading("What is not the default")
        page.table(["field", "default", "this run"], [[k, _text(defaults[k]), _text(v)] for k, v in changed.items()], "Fields", words=True)
    else:
        page.heading("What differs")
        names = [name for name in differing(configs) if all(name in config for config in configs)]
        if names:
            rows = [[name, *(_text(config.get(name)) for config in configs)] for name in names]
            page.table(["field", *(run.label for run in runs)], rows, "Fields whose values differ", marked=range(len(rows)), words=True)
        if others := len(differing(configs)) - len(names):
            page.paragraph(f"{others} more are fields that not all of these kinds of model have; they stand under Configuration.")
        elif not names:
            page.paragraph("The configurations are the same.")
    for run in runs:
        if run.changes:
            rows = [[change["step"], change["name"], _text(change["before"]), _text(change["after"])] for change in run.changes]
            page.table(["step", "field", "before", "after"], rows, f"Changed in the middle of {run.label}", words=True)


def differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names that have not the same value in all configurations, in the order of the fields."""
    names = dict.fromkeys(name for config in configs for name in config)
    return [name for name in names if len({_text(config.get(name)) for config in configs}) > 1]


def _text(value: object) -> str:
    """A value of a configuration; nothing where it is left out."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


# ---- grids -----------------------------------------------------------------------------------------------------------


def _add_grids(page: ReportPage, runs: Sequence[RunFiles]) -> None:
    page.heading("Grids over time")
    pictures, notes = {}, []
    for run in runs:
        found = {}
        for step in spread(sorted(run.grids), MAX_GRIDS):
            try:
                found[step] = _picture(run, step)
            except InputError as error:
                notes.append(f"{error}.")
        if found:
            pictures[run.label] = found
        else:
            off = run.values.get("sample_every") == 0
            notes.append(f"{run.label} has no grids" + (": sample_every is 0." if off else " yet."))
        if len(run.grids) > MAX_GRIDS:
            notes.append(f"Of the {len(run.grids)} grids of {run.label}, {MAX_GRIDS} are shown.")
    if pictures:
        page.paragraph(
            f"Drawn from the EMA weights while training, always from the same seeds. Grids are reduced to {GRID_SIDE} pixels a side, "
            "photographs to JPEG; the originals are in samples/ of the run."
        )
        page.pictures(pictures)
    for note in notes:
        page.paragraph(note)


def _picture(run: RunFiles, step: int) -> tuple[bytes, str, bool]:
    """A grid for the page, its alternative text, and whether it is enlarged without smoothing. Raises InputError as `preview`."""
    made = images.preview(read_file(run.grids[step]), str(run.grids[step]), GRID_SIDE)
    prompts = run.values.get("sample_prompts") or ()
    of = f" of the prompts {'; '.join(prompts)}" if prompts else ""
    return made, f"Images drawn by {run.label} at step {step}{of}", max(images.size_of(made, "")) < ENLARGED


def spread(items: Sequence[int], count: int) -> list[int]:
    """At most so many items, evenly spaced, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(k * (len(items) - 1) / (count - 1))] for k in range(count)]


# ---- curves ----------------------------------------------------------------------------------------------------------


def grouped(points: Points) -> Curve:
    """A curve of at most `POINTS` points: means of equally many lines that follow each other, with their smallest and largest value."""
    size = -(-len(points) // POINTS)
    groups = [points[first : first + size] for first in range(0, len(points), size or 1)]
    values = [[value for _, value in group] for group in groups]
    bounds = ([min(each) for each in values], [max(each) for each in values]) if size > 1 else ([], [])
    return Curve([group[-1][0] for group in groups], [statistics.fmean(each) for each in values], *bounds)


def _add_curves(page: ReportPage, runs: Sequence[RunFiles]) -> None:
    page.heading("Curves")
    made = []
    for name, (title, scale, note) in CURVES.items():
        points = {run.label: found for run in runs if (found := run.points(name))}
        if name == "clip_rate" and not any(value for found in points.values() for _, value in found):
            continue  # nothing was clipped, or clipping is off
        made += _chart(title, points, runs, note, scale)
    if not made:
        page.paragraph(_no_lines(runs))
        return
    longest = max(len(run.points("loss")) for run in runs)
    many = f" Points are means of up to {-(-longest // POINTS)} lines, and bands reach from their smallest to their largest value."
    page.paragraph(
        "Move over a curve, or focus it and press the arrow keys, for its numbers, which are those of metrics.jsonl."
        + (many if longest > POINTS else "")
    )
    _add_legend(page, runs)
    page.charts(made)


def _chart(title: str, points: Mapping[str, Points], runs: Sequence[RunFiles], note: str = "", scale: Scale | None = None) -> list[str]:
    """A chart over the steps, with the colours of the runs; none where there are no points."""
    lines = {label: grouped(found) for label, found in points.items() if found}
    places = {run.label: k for k, run in enumerate(runs)}
    return [chart(title, lines, places, "step", scale or scale_of(lines), note)] if lines else []


def _add_legend(page: ReportPage, runs: Sequence[RunFiles]) -> None:
    if len(runs) > 1:
        page.legend((swatch(k), run.label) for k, run in enumerate(runs))


def _no_lines(runs: Sequence[RunFiles]) -> str:
    off = all(run.values.get("log_every") == 0 for run in runs)
    return "Nothing is logged: log_every is 0." if off else "There are no lines of metrics yet."


def _add_timesteps(page: ReportPage, runs: Sequence[RunFiles]) -> None:
    """The losses of parts of the timesteps: now, of all runs, and over the steps, of each."""
    page.heading("Losses by timestep")
    places = {run.label: k for k, run in enumerate(runs)}
    ends, made = [], []
    for name, (title, note) in BY_TIMESTEP.items():
        lines = {run.label: profile for run in runs if (profile := _profile(run.parts(name))).x}
        if lines:
            ends.append(chart(f"{title}, at the end", lines, places, X_PARTS, scale_of(lines), note))
    if not ends:
        page.paragraph(_no_lines(runs))
        return
    parts = max(len(run.parts("loss_by_t")) for run in runs)
    names = [f"{k / parts:.1f} to {(k + 1) / parts:.1f}" for k in range(parts)]
    for run in runs:
        lines = {name: grouped(points) for name, points in zip(names, run.parts("loss_by_t")) if points}
        if lines:
            without_bands = {name: Curve(line.x, line.y) for name, line in lines.items()}
            numbers = {name: k for k, name in enumerate(names)}
            made.append(
                chart(f"Loss by timestep, {run.label}", without_bands, numbers, "step", scale_of(lines), "A line for each part.", "part")
            )
    page.paragraph("Each part is a tenth of the timesteps. At the end means the mean of the last tenth of its values.")
    _add_legend(page, runs)
    page.charts(ends)
    page.legend((swatch(k, "part"), f"t / T {name}") for k, name in enumerate(names))
    page.charts(made)


def _profile(parts: Sequence[Points]) -> Curve:
    """The mean of the last tenth of the values of each part, at its middle."""
    recent = {k: statistics.fmean(_latest(points)) for k, points in enumerate(parts) if points}
    return Curve([(k + 0.5) / len(parts) for k in recent], [*recent.values()])


# ---- metrics ---------------------------------------------------------------------------------------------------------


def _add_metrics(page: ReportPage, runs: Sequence[RunFiles], scores: Sequence[Scores]) -> None:
    """What `--eval_every` and `eval.py score` have measured."""
    page.heading("Metrics")
    for found in scores:
        _add_scores(page, found)
    made = []
    for name in dict.fromkeys(name for run in runs for name in run.names("eval_")):
        metric = name.removeprefix("eval_")
        better = FIGURES.get(metric, "neither")
        note = "" if better == "neither" else f"{better.capitalize()} is better."
        made += _chart(metric.replace("_", " "), {run.label: run.points(name) for run in runs}, runs, note)
    if made:
        page.paragraph("Measured while training (--eval_every): samples of the EMA weights against the training images.")
        _add_legend(page, runs)
        page.charts(made)
    if not made and not scores:
        page.paragraph(
            "No metrics: the runs have no --eval_every, and no file of eval.py score is in their directories or named with --scores."
        )


def _add_scores(page: ReportPage, scores: Scores) -> None:
    rows = [row for _, row in scores.rows]
    names = [name for name in FIGURES if any(name in row for row in rows)]
    how = [name for name in HOW if any(name in row for row in rows)]
    header = ["run", *(name.replace("_", " ") for name in (*how, *names))]
    cells = [[label, *(row.get(name) for name in how), *(_with_interval(row, name) for name in names)] for label, row in scores.rows]
    reference, extractor = ((scores.found.get(name) or {}).get("name") for name in ("reference", "extractor"))
    about = f", against {reference}" if reference else ""
    about += f", features of {extractor}" if extractor else ""
    intervals = "; in brackets 95% bootstrap intervals over the images" if any(row.get("intervals") for row in rows) else ""
    page.table(header, cells, f"{scores.path.name}: eval.py score{about}{intervals}")
    labels = {row["target"]: label for label, row in scores.rows}
    groups = [group for group in scores.found.get("groups", ()) if labels.keys() >= set(group["targets"])]
    if groups:
        columns = [name for name in FIGURES if any(name in group["figures"] for group in groups)]
        drawn = [name for name in HOW if len({group.get(name) for group in groups}) > 1]
        lines = [
            [
                ", ".join(labels[target] for target in group["targets"]),
                *(group.get(name) for name in drawn),
                *(_of_group(group["figures"].get(name)) for name in columns),
            ]
            for group in groups
        ]
        page.table(
            ["runs", *(name.replace("_", " ") for name in drawn), *columns],
            lines,
            f"{scores.path.name}: means over training seeds, in brackets 95% intervals over these",
        )


def _with_interval(row: Mapping[str, Any], name: str) -> str | None:
    if not is_number(row.get(name)):
        return None
    low_high = (row.get("intervals") or {}).get(name)
    return f"{row[name]:.4g}" + (f" ({low_high[0]:.4g} to {low_high[1]:.4g})" if low_high and all(map(is_number, low_high)) else "")


def _of_group(figure: Mapping[str, float] | None) -> str | None:
    return None if figure is None or not all(map(is_number, figure.values())) else "{mean:.4g} ({low:.4g} to {high:.4g})".format(**figure)


# ---- objective, configuration, versions ------------------------------------------------------------------------------


def _add_weights(page: ReportPage, runs: Sequence[RunFiles]) -> None:
    """The weight of the squared error at each timestep, times how often it is drawn, as a share of the sum."""
    page.heading("Weights of the objective")
    kinds = {run.values["prediction_type"] for run in runs}
    kind: PredictionType = kinds.pop() if len(kinds) == 1 else "epsilon"
    lines = {}
    for run in runs:
        objective = layered(run.values).objective
        if objective.weighting not in WEIGHTINGS:
            page.paragraph(f"The weighting {objective.weighting} of {run.label} is not registered in this process.")
            continue
        if objective.learned_uncertainty:
            page.paragraph(f"The weights of {run.label} were learned with it (learned_uncertainty), and are in its checkpoints only.")
            continue
        if kind not in (WEIGHTINGS[objective.weighting].repeats or (kind,)):
            page.paragraph(f"The weighting {objective.weighting} of {run.label} has no weights on {kind}.")
            continue
        weights = weights_of_timesteps(objective, make_schedule(objective), kind)
        if weights is None:
            page.paragraph(f"{run.label} minimises the variational bound, without weights.")
            continue
        share = (weights / weights[weights.isfinite()].sum()).tolist()
        shown = [(t, share[t]) for t in spread(range(len(share)), 2 * POINTS) if is_number(share[t]) and share[t] > 0]
        lines[run.label] = Curve([t for t, _ in shown], [value for _, value in shown])
    lines = {label: line for label, line in lines.items() if line.x}
    if lines:
        page.paragraph(
            f"The weight of the squared error of {kind} at each timestep t, times how often t is drawn, as a share of the sum over all t."
        )
        places = {run.label: k for k, run in enumerate(runs)}
        _add_legend(page, runs)
        page.charts([chart(f"Weight of the error of {kind}", lines, places, "timestep t", "log")])


def _add_configuration(page: ReportPage, runs: Sequence[RunFiles]) -> None:
    page.heading("Configuration")
    configs = [stored(layered(run.values)) for run in runs]
    names = list(dict.fromkeys(name for config in configs for name in config))
    marked = set(differing(configs))
    rows = [[name, *(_text(config.get(name)) for config in configs)] for name in names]
    different = f", of which {len(marked)} differ (highlighted)" if marked else ""
    caption = f"All {len(names)} fields{different}"
    page.table(
        ["field", *(run.label for run in runs)], rows, caption, True, [k for k, name in enumerate(names) if name in marked], words=True
    )


def _add_versions(page: ReportPage, runs: Sequence[RunFiles]) -> None:
    page.heading("Versions and device")
    known = [
        {name: run.state.get(name) for name in ("device", "num_processes", "num_threads")} | run.state.get("versions", {}) for run in runs
    ]
    if not any(run.state for run in runs):
        page.paragraph("Not known yet: they are in the first checkpoint.")
        return
    names = list(dict.fromkeys(name for each in known for name in each))
    rows = [[name.replace("_", " "), *(_text(each.get(name)) for each in known)] for name in names]
    marked = [k for k, row in enumerate(rows) if len(set(row[1:])) > 1]
    page.table(["", *(run.label for run in runs)], rows, "As of the newest checkpoint", marked=marked, words=True)
