"""What `eval.py bias` writes: tables (.csv), figures (.png), and a page with both."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.registry import FIGURES
from ..config.schema.evaluation import BiasConfig
from ..errors import shortened
from ..evaluation.plots import is_our_picture
from ..sampling.job import to_bytes
from ..utils.files import read_file, require_replaceable, write_file
from .denoising import Errors, mean_and_interval, shares, spread_timesteps, weights_of_timesteps
from .figures import Curve, Scale, curves, mosaic
from .models import Examples, Model
from .report_page import ReportPage, is_our_page
from .sampled import SHOWN_SAMPLES, Drawn

ESTIMATES = 10  # timesteps of the picture of estimates
ESTIMATED_IMAGES = 3
PAGE = "report.html"
# Figures over the timesteps by file: quantity, title, label and scale of the axis, caption.
BY_TIMESTEP: dict[str, tuple[str, str, str, Scale, str]] = {
    "prediction": (
        "prediction_mse", "Squared error of the prediction", "mean square", "log",
        "The error that the loss sees, before its weight.",
    ),
    "x_0": (
        "x_0_mse", "Squared error of the estimate of x_0", "mean square", "log",
        "The same error as one of x_0: the squared error of the prediction times the square of the amplification.",
    ),
    "amplification": (
        "amplification", "Amplification", "factor", "log",
        "How far the estimate of x_0 moves for an error of 1 of the prediction.",
    ),
    "colour_bias": (
        "x_0_bias", "Signed error of the estimate of x_0", "mean error", "linear",
        "Existence: estimates that are too dark (below 0) or too light (above 0) on average. "
        "Of twenty bands without a bias, one leaves out 0 by chance.",
    ),
    "latent_bias": (
        "latent_bias", "Signed error of the estimate of x_0", "mean error", "linear",
        "Existence: the mean error of each channel of the latents, before they are decoded.",
    ),
    "loss_share": (
        "loss_share", "Share of the weighted loss", "share", "linear",
        "Reasons: how much of the objective comes from each part of the timesteps. All parts are equally long.",
    ),
    "gradient_share": (
        "gradient_share", "Share of the weighted gradient norm", "share", "linear",
        "Reasons: where the updates of the network come from, in the same parts.",
    ),
}  # fmt: skip
PLACE = {"timesteps": ("run", "t", "snr"), "steps": ("run", "steps"), "swap": ("run", "threshold")}
VALUES = ("quantity", "channel", "value", "low", "high")

Row = dict[str, Any]  # of a CSV file: what PLACE and VALUES name


def require_output(folder: Path) -> None:
    """Checks before the measurement that every file can be written. Raises as `require_replaceable`."""
    require_replaceable("output_dir has", folder / PAGE, is_our_page)
    for name, columns in PLACE.items():
        require_replaceable("output_dir has", folder / f"{name}.csv", _begins_with(columns))
    distances = [f"{name}_{figure}" for name in ("steps", "swap") for figure in (*FIGURES, "bias")]
    for name in (*BY_TIMESTEP, *distances, "estimates", "samples"):
        require_replaceable("output_dir has", folder / f"{name}.png", lambda path: is_our_picture(path, False))


def _begins_with(columns: Sequence[str]) -> Callable[[Path], bool]:
    return lambda path: read_file(path).startswith(",".join((*columns, *VALUES)).encode())


class BiasReport:
    """Writes tables and figures as they come, and collects them in a page."""

    def __init__(self, config: BiasConfig, models: Sequence[Model], folder: Path, channels: int) -> None:
        """`channels`: of the images."""
        self.config, self.models, self.folder = config, models, folder
        self.page = ReportPage("Bias over the timesteps: " + ", ".join(model.label for model in models))
        self.channels = ["grey"] if channels == 1 else ["red", "green", "blue"]
        header = ("run", "step", "prediction type", "weighting", "timesteps T", "seed", "weights")
        self.page.table(header, [self._about(model) for model in models], "The runs")

    def about(self, reference: str | None, images: int, candidates: int, total: int, extractor: str | None) -> None:
        """Says what is measured: errors on so many images of the candidates among all images of the reference."""
        held = ", which all runs held out of training" if candidates < total else ""
        features = f" Features for the metrics are those of {extractor}." if extractor else ""
        self.page.paragraph(
            f"Reference: {reference}, {total} images. Errors are measured on {images} of {candidates} images{held}.{features} "
            f"Seed {self.config.seed}."
        )

    def _about(self, model: Model) -> list[object]:
        denoiser, values = model.denoiser, model.values
        known = (values.get("weighting"), values.get("seed"))
        return [model.name, model.step, denoiser.prediction_type, known[0], len(denoiser.schedule), known[1], self.config.weights]

    def timesteps(self, errors: dict[str, Errors]) -> None:
        """Existence and reasons: errors of each run, by label, at each timestep."""
        rows = [row for model in self.models for row in rows_of_errors(model, errors[model.label], self.channels)]
        self._csv("timesteps", rows)
        self.page.heading("Errors at each timestep")
        values = "values of x_0 are from -1 (black) to 1 (white)"
        if self.models[0].task == "text_to_image":
            values = (
                "x_0 is latents: the mean of the VAE's posterior, scaled as in training. For the colours the VAE decodes the estimate, "
                "without clipping, and x_0; their values are from -1 (black) to 1 (white). Each picture has its caption, without guidance"
            )
        self.page.paragraph(
            "The network sees the same pictures and noise at every timestep t, from nearly clean (0) to noise. Its prediction implies an "
            "estimate of x_0 in one step. An error of the prediction moves that estimate by the amplification, which is 1/sqrt(SNR) for "
            "predicted noise: an error that hardly counts in the loss can be a visible shift of the colour. Bands are 95% intervals of the "
            f"mean over the pictures; {values}."
        )
        for name, (quantity, title, y_label, scale, caption) in BY_TIMESTEP.items():
            self._curves(name, rows, "t", quantity, title, caption, "timestep t", y_label, y_scale=scale)
        for model in self.models:
            own = [row for row in rows if row["run"] == model.label]
            self._table(own, {"t": "t", "snr": "SNR"}, f"All numbers of {model.label}, by timestep")

    def _table(self, rows: Sequence[Row], place: Mapping[str, str], caption: str) -> None:
        """Rows by their values of `place`, whose columns have these titles, with a column for each quantity and channel."""
        columns = list(dict.fromkeys((row["quantity"], row["channel"]) for row in rows))
        cells = {(*(row[name] for name in place), row["quantity"], row["channel"]): row for row in rows}
        header = [*place.values(), *(" ".join(part for part in column if part).replace("_", " ") for column in columns)]
        places = dict.fromkeys(key[:-2] for key in cells)
        lines = [[*at, *(_with_interval(cells.get((*at, *column))) for column in columns)] for at in places]
        self.page.table(header, lines, caption, folded=True)

    @torch.no_grad()
    def estimates(self, examples: Examples, noise: Tensor, pictures: Callable[[Tensor], Tensor]) -> None:
        """Estimates of x_0 from the same pictures and noise at ten timesteps: for each picture x_t, then a row for each run.

        Args:
            examples: of which the first ones are shown.
            noise: theirs (N, C, H, W).
            pictures: x_0 (B, C, H, W) as images in about [-1, 1], on the CPU.
        """
        x_0, noise = examples.x_0[:ESTIMATED_IMAGES], noise[:ESTIMATED_IMAGES]
        given = None if examples.conditions is None else examples.conditions[:ESTIMATED_IMAGES]
        places = spread_timesteps(len(self.models[0].denoiser.schedule), ESTIMATES)
        by_model = []
        for model in self.models:
            device, own = model.pipeline.device, spread_timesteps(len(model.denoiser.schedule), ESTIMATES)
            labels = None if given is None else given.to(device)
            by_model.append([pictures(model.denoiser.estimate(x_0.to(device), noise.to(device), t, labels)) for t in own])
        noised = [pictures(self.models[0].denoiser.noised(x_0, noise, t)) for t in places]
        x_0 = pictures(x_0)
        rows = []
        for k in range(len(x_0)):
            rows.append((f"x_t of picture {k + 1}", [to_bytes(each[k]) for each in (x_0, *noised)]))
            for model, estimated in zip(self.models, by_model):
                rows.append((model.label, [to_bytes(each[k]) for each in (x_0, *estimated)]))
        self.page.heading("Estimates of x_0 in one step")
        same = len({len(model.denoiser.schedule) for model in self.models}) == 1
        x_label = "timestep t" if same else f"timestep t of {self.models[0].label}; of others the same part of their timesteps"
        picture = mosaic(rows, ["x_0", *map(str, places)], x_label)
        caption = "What each run takes the picture for, seen with the same noise at ten timesteps; the first column is the picture itself."
        if examples.captions:
            caption += f" Captions: {_listed(examples.captions[:ESTIMATED_IMAGES])}."
        self._figure("estimates", picture, caption, wide=True)

    def steps(self, drawn: dict[str, dict[int, Drawn]]) -> None:
        """Impact: the same seeds at different numbers of steps, by label and steps."""
        rows = [row for label, by_steps in drawn.items() for n, found in by_steps.items() for row in self._rows(label, "steps", n, found)]
        self._csv("steps", rows)
        self.page.heading("The same seeds over the steps of the solver")
        self.page.paragraph(
            f"{self.config.num_samples} images of the same seeds for each number of steps, compared with the reference. The colour bias is "
            "the mean colour of the images minus that of the reference, in grey levels from 0 to 255."
        )
        if jobs := {model.label: model.job for model in self.models if model.job}:
            prompts = next(iter(jobs.values())).conditions(range(min(SHOWN_SAMPLES, self.config.num_samples))).prompts or ()
            scales = ", ".join(f"{job.options['guidance_scale']:g} of {label}" for label, job in jobs.items())
            self.page.paragraph(f"The prompts are captions of the reference, below: {_listed(prompts)}. Guidance scale: {scales}.")
        counts = sorted({n for by_steps in drawn.values() for n in by_steps})
        blank = torch.full_like(next(iter(next(iter(drawn.values())).values())).first[0], 255)
        lines = [
            (label if k == 0 else "", [by_steps[n].first[k] if n in by_steps else blank for n in counts])
            for label, by_steps in drawn.items()
            for k in range(len(next(iter(by_steps.values())).first))
        ]
        self._figure("samples", mosaic(lines, list(map(str, counts)), "steps"), "The same seeds at each number of steps.", wide=True)
        self._distances("steps", rows, "steps of the solver", "log")

    def swap(self, drawn: dict[int, Drawn]) -> None:
        """Which timesteps make the difference: by the timestep from which on the first network predicts."""
        above, below = self.models
        label = f"{above.label} above, {below.label} below"
        rows = [row for threshold, found in drawn.items() for row in self._rows(label, "threshold", threshold, found)]
        self._csv("swap", rows)
        self.page.heading("Which timesteps make the difference")
        self.page.paragraph(
            f"Images of {self.config.swap_steps} steps, for which {above.label} predicts at timesteps from the threshold on, and "
            f"{below.label} below it. At threshold 0 (left) all is predicted by {above.label}, at the last one (right) by {below.label}. "
            "Where the curve changes, the two networks differ in what matters."
        )
        self._distances("swap", rows, "threshold: timestep from which on the first run predicts", "linear")

    def finish(self) -> None:
        """Writes the page."""
        write_file(self.folder / PAGE, self.page.html())

    def _distances(self, name: str, rows: Sequence[Row], x_label: str, x_scale: Any) -> None:
        """Figures and a table of what was sampled over the second column of the table."""
        place = PLACE[name][1]
        distances = {
            row["quantity"]: row["quantity"].replace("_", " ")
            for row in rows
            if FIGURES.get(row["quantity"], "neither") != "neither" and row["quantity"] != "brightness_bias"
        }
        for quantity, title in distances.items():
            caption = f"{title}: {FIGURES[quantity]} is better."
            self._curves(f"{name}_{quantity}", rows, place, quantity, title, caption, x_label, "", x_scale)
        caption = "Mean colour of the images minus that of the reference, with 95% intervals over the images."
        self._curves(f"{name}_bias", rows, place, "colour_bias", "Colour bias", caption, x_label, "grey levels", x_scale)
        self._table(rows, {"run": "run", place: place}, "All numbers")

    def _rows(self, label: str, place: str, x: int, found: Drawn) -> Iterator[Row]:
        for name, value in found.figures.items():
            yield {"run": label, place: x, **_value(name, value)}
        for channel, (mean, low, high) in zip(self.channels, found.colour_bias):
            yield {"run": label, place: x, **_value("colour_bias", mean, channel, low, high)}

    def _csv(self, name: str, rows: Sequence[Row]) -> None:
        columns = (*PLACE[name], *VALUES)
        box = io.StringIO()
        writer = csv.DictWriter(box, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_file(self.folder / f"{name}.csv", box.getvalue().encode())

    def _figure(self, name: str, picture: bytes, caption: str, wide: bool = False) -> None:
        write_file(self.folder / f"{name}.png", picture)
        self.page.figure(picture, caption, wide)

    def _curves(
        self,
        name: str,
        rows: Sequence[Row],
        place: str,
        quantity: str,
        title: str,
        caption: str,
        x_label: str,
        y_label: str,
        x_scale: Scale = "linear",
        y_scale: Scale = "linear",
    ) -> None:
        """A figure of a quantity over a column of the table, with a panel for each channel; none where no run has the quantity."""
        panels: dict[str, dict[str, Curve]] = {}
        of_quantity = [row for row in rows if row["quantity"] == quantity]
        for channel in dict.fromkeys(row["channel"] for row in of_quantity):
            found = [row for row in of_quantity if row["channel"] == channel]
            runs = dict.fromkeys(row["run"] for row in found)
            named = title + (f", {channel}" if channel and len(self.channels) > 1 else "")
            panels[named] = {run: _curve([row for row in found if row["run"] == run], place) for run in runs}
        if panels:
            self._figure(name, curves(panels, x_label, y_label, x_scale, y_scale), caption)


def _value(quantity: str, value: float, channel: str = "", low: float | None = None, high: float | None = None) -> Row:
    return {"quantity": quantity, "channel": channel, "value": value, "low": low, "high": high}


def _curve(rows: Sequence[Row], place: str) -> Curve:
    low, high = ([row[end] for row in rows] if rows[0][end] is not None else () for end in ("low", "high"))
    return Curve([row[place] for row in rows], [row["value"] for row in rows], low, high)


def _with_interval(row: Row | None) -> str | None:
    if row is None:
        return None
    return f"{row['value']:.4g}" + (f" ({row['low']:.3g} to {row['high']:.3g})" if row["low"] is not None else "")


def _listed(captions: Sequence[str | None]) -> str:
    return ", ".join("none" if caption is None else repr(shortened(caption)) for caption in captions)


def _biases(quantity: str, means: Tensor, channels: Sequence[str]) -> Iterator[Row]:
    """The mean over the images of their mean errors (N, C), with intervals."""
    for c, channel in enumerate(channels):
        mean, low, high = mean_and_interval(means[:, c])
        yield _value(quantity, mean, channel, low, high)


def rows_of_errors(model: Model, errors: Errors, channels: Sequence[str]) -> list[Row]:
    """What the table has of a run at each timestep. Shares only where the objective is known and has weights."""
    schedule, kind = model.denoiser.schedule, model.denoiser.prediction_type
    amplification = schedule.x_0_per_prediction(kind).abs()
    weights = weights_of_timesteps(model.objective, schedule, kind) if model.objective else None
    parts = {}
    if weights is not None:
        parts["loss_share"] = shares(errors.timesteps, errors.mse.mean(1), weights)
        parts["gradient_share"] = shares(errors.timesteps, errors.gradient_norm, weights)
    found = []
    for k, t in enumerate(errors.timesteps):
        values = [_value("amplification", amplification[t].item())]
        values += [
            _value(name, mean, "", low, high)
            for name, each in (("prediction_mse", errors.mse[k]), ("x_0_mse", errors.x_0_mse[k]))
            for mean, low, high in [mean_and_interval(each)]
        ]
        latents = errors.decoded_bias.shape[2] > 0
        values += list(_biases("x_0_bias", (errors.decoded_bias if latents else errors.x_0_bias)[k], channels))
        if latents:
            values += list(_biases("latent_bias", errors.x_0_bias[k], [f"latent {c}" for c in range(errors.x_0_bias.shape[2])]))
        values.append(_value("gradient_norm", errors.gradient_norm[k].item()))
        values += [_value(name, each[k].item()) for name, each in parts.items()]
        found += [{"run": model.label, "t": t, "snr": schedule.snr[t].item(), **value} for value in values]
    return found
