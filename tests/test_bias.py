"""`eval.py bias`: errors by timestep against closed forms, swapped networks, the page, and the command."""

import csv
import math
import re
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from conftest import as_ranks
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from debias_diffusers import cli
from debias_diffusers.analysis import bias, bias_report, denoising, figures
from debias_diffusers.analysis.bias import held_out
from debias_diffusers.analysis.denoising import Denoiser, fixed_noise, measure_errors, shares, spread_timesteps, weights_of_timesteps
from debias_diffusers.analysis.models import STEPS, folders_of, open_models, scheduler_of, steps_of
from debias_diffusers.analysis.report_page import ReportPage, is_our_page
from debias_diffusers.analysis.run_files import labels_of
from debias_diffusers.analysis.sampled import Drawn, job_of, swapped_jobs, thresholds
from debias_diffusers.analysis.swap import SwappedUNet, require_swappable
from debias_diffusers.config.schema.data import DataConfig
from debias_diffusers.config.schema.evaluation import BiasConfig, MeasureConfig
from debias_diffusers.config.schema.objective import ObjectiveConfig
from debias_diffusers.config.validation.evaluation import bias_problems
from debias_diffusers.data.sources.opening import open_source
from debias_diffusers.data.validation_split import split_source
from debias_diffusers.diffusion.noise_schedule import make_schedule, prediction_of_x_0
from debias_diffusers.errors import InputError
from debias_diffusers.evaluation.measure import Measure
from debias_diffusers.evaluation.metrics import Sample
from debias_diffusers.pipelines.solvers import exported_scheduler, make_scheduler

MEAN, STD, T = 0.1, 0.2, 100
KINDS = ("epsilon", "sample", "v_prediction", "flow")


class Planted(nn.Module):
    """The best network for pixels of N(MEAN, STD^2), plus a bias of each channel of the prediction, which is its parameter."""

    def __init__(self, schedule, kind, bias=(0.0, 0.0, 0.0)):
        super().__init__()
        self.schedule, self.kind = schedule, kind
        self.bias = nn.Parameter(torch.tensor(bias))
        self.config = SimpleNamespace(in_channels=3)

    def forward(self, x_t, timestep, labels, return_dict):
        t = int((self.schedule.timesteps - timestep).abs().argmin())
        a, s = self.schedule.a[t], self.schedule.s[t]
        x_0 = MEAN + a * STD**2 / (a**2 * STD**2 + s**2) * (x_t.double() - a * MEAN)
        prediction = prediction_of_x_0(self.kind, x_0, x_t.double(), a, s).float()
        return (prediction + self.bias.view(1, -1, 1, 1),)


STRAIGHT_X_0 = {"prediction_type": "sample", "noise_schedule": "rectified_flow"}  # JiT's


def denoiser_of(kind, bias=(0.0, 0.0, 0.0)):
    objective = ObjectiveConfig(prediction_type=kind, num_train_timesteps=T)
    schedule = make_schedule(objective)
    return Denoiser(Planted(schedule, kind, bias), schedule, kind)


X_0 = MEAN + STD * torch.randn(48, 3, 16, 16, generator=torch.Generator().manual_seed(0))
NOISE = fixed_noise((3, 16, 16), 0, range(48))
PLACES = spread_timesteps(T, 12)


def errors_of(denoiser):
    return measure_errors(denoiser, X_0, NOISE, None, PLACES, batch_size=20)


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_of_x_0_is_the_posterior_variance_of_a_gaussian(kind):
    denoiser = denoiser_of(kind)
    found, a, s = errors_of(denoiser), denoiser.schedule.a[PLACES], denoiser.schedule.s[PLACES]
    expected = STD**2 * s**2 / (a**2 * STD**2 + s**2)
    torch.testing.assert_close(found.x_0_mse.mean(1), expected, rtol=0.03, atol=1e-6)
    for mean in found.x_0_bias[:, :, 0]:  # nothing is planted
        _, low, high = denoising.mean_and_interval(mean)
        assert low - 0.003 < 0 < high + 0.003


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_bias_of_the_prediction_is_the_signed_error_of_x_0(kind):
    """-b / sqrt(SNR) of predicted noise, b of x_0, -s b of v and of u."""
    b = torch.tensor([0.02, -0.05, 0.1])
    planted, plain = (errors_of(denoiser_of(kind, bias)) for bias in (tuple(b.tolist()), (0.0, 0.0, 0.0)))
    schedule = denoiser_of(kind).schedule
    expected = {"epsilon": -schedule.snr.rsqrt(), "sample": torch.ones(T).double()}.get(kind, -schedule.s)[PLACES]
    moved = (planted.x_0_bias - plain.x_0_bias).mean(1)
    finite = expected.isfinite()
    torch.testing.assert_close(moved[finite], (expected[:, None] * b.double())[finite], rtol=1e-3, atol=1e-5)


def test_the_gradient_is_that_of_the_mean_over_the_images_whatever_the_batches():
    """Of the bias of channel c: 2/3 of the mean error of that channel."""
    denoiser = denoiser_of("epsilon", (0.02, -0.05, 0.1))
    found = errors_of(denoiser)
    mean = found.x_0_bias.mean(1) / denoiser.schedule.x_0_per_prediction("epsilon")[PLACES, None]
    torch.testing.assert_close(found.gradient_norm, (2 / 3 * mean).square().sum(1).sqrt(), rtol=1e-4, atol=1e-7)
    assert denoiser.network.bias.grad is None


def test_one_step_estimates_are_x_0_plus_the_error():
    denoiser = denoiser_of("v_prediction", (0.02, -0.05, 0.1))
    found = errors_of(denoiser)
    for k in (0, 5, 11):
        away = denoiser.estimate(X_0, NOISE, PLACES[k], None) - X_0
        torch.testing.assert_close(away.mean((2, 3)).double(), found.x_0_bias[k], rtol=1e-3, atol=1e-5)


def test_x_0_that_is_predicted_on_the_straight_path_is_not_taken_for_a_velocity():
    objective = ObjectiveConfig(num_train_timesteps=T, **STRAIGHT_X_0)
    pipeline = SimpleNamespace(unet=Planted(make_schedule(objective), "sample"), scheduler=exported_scheduler(objective))
    denoiser = Denoiser.of(pipeline)
    assert denoiser.prediction_type == "sample"
    torch.testing.assert_close(errors_of(denoiser).x_0_mse, errors_of(denoiser_of("flow")).x_0_mse, rtol=1e-3, atol=1e-6)
    assert scheduler_of(BiasConfig(runs=()), SimpleNamespace(scheduler=pipeline.scheduler)) == "flow_euler"


def test_noise_and_timesteps_do_not_depend_on_the_subset():
    assert torch.equal(fixed_noise((1, 4, 4), 3, [7, 9])[1], fixed_noise((1, 4, 4), 3, [9])[0])
    assert spread_timesteps(1000, 20)[::19] == [0, 999] and spread_timesteps(4, 20) == [0, 1, 2, 3]


def test_shares_are_those_of_the_sum_over_all_timesteps():
    """Of errors that are linear between the measured timesteps, by hand; each equal part has one of these."""
    schedule = make_schedule(ObjectiveConfig(num_train_timesteps=T))
    weights = weights_of_timesteps(ObjectiveConfig(num_train_timesteps=T), schedule, "epsilon")
    torch.testing.assert_close(weights, schedule.snr.rsqrt() / T)
    places = spread_timesteps(T, 5)
    assert [t * 5 // T for t in places] == list(range(5))
    terms = weights * (2 - torch.arange(T) / T)
    expected = terms.view(5, 20).sum(1) / terms.sum()
    torch.testing.assert_close(shares(places, 2 - torch.tensor(places) / T, weights), expected)
    for unknown in (ObjectiveConfig(weighting="variational", learn_sigma=True), ObjectiveConfig(learned_uncertainty=True)):
        assert weights_of_timesteps(unknown, schedule, "epsilon") is None


def test_the_shares_of_a_run_in_phases_are_those_of_the_last_one():
    schedule, later = make_schedule(ObjectiveConfig(num_train_timesteps=T)), {"timestep_sampler": "logit_normal", "num_train_timesteps": T}
    phases = ObjectiveConfig(**later | {"timestep_sampler": "mode"}, timestep_sampler_after="logit_normal", timestep_sampler_switch=5)
    weights = [weights_of_timesteps(each, schedule, "epsilon") for each in (phases, ObjectiveConfig(**later))]
    assert torch.equal(*weights)


def test_the_interval_of_a_mean_has_nearly_two_standard_errors():
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    mean, low, high = denoising.mean_and_interval(values)
    half = 1.96 * math.sqrt(5 / 3) / 2
    assert (mean, low, high) == pytest.approx((2.5, 2.5 - half, 2.5 + half))
    assert math.isnan(denoising.mean_and_interval(values[:1])[1])


# ---- swapped networks ------------------------------------------------------------------------------------------------


class Constant(nn.Module):
    """Predicts one number."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))
        self.config = SimpleNamespace(in_channels=1)

    def forward(self, x_t, timestep, labels=None, return_dict=False):
        return (self.value.expand_as(x_t),)


def constant(value, kind="epsilon", **objective):
    return Denoiser(Constant(value), make_schedule(ObjectiveConfig(num_train_timesteps=T, **objective)), kind)


def test_the_first_network_predicts_from_the_threshold_on_and_the_second_below():
    x_t = torch.zeros(1, 1, 2, 2)
    for threshold, of_the_first in ((0, T), (40, 60), (T, 0)):
        swapped = SwappedUNet(constant(1.0), constant(2.0), threshold)
        said = [swapped(x_t, torch.tensor(t))[0].mean().item() for t in range(T)]
        assert said == [2.0] * (T - of_the_first) + [1.0] * of_the_first


def test_a_prediction_of_another_type_is_converted():
    x_t, x_0, t = torch.full((1, 1, 2, 2), 0.3), 0.5, 30
    swapped = SwappedUNet(constant(1.0), constant(x_0, "sample"), 60)
    a, s = swapped.above.schedule.a[t], swapped.above.schedule.s[t]
    torch.testing.assert_close(swapped(x_t, torch.tensor(t))[0], ((x_t - a * x_0) / s).float())
    with pytest.raises(InputError, match="between those of the schedule; take ddim"):
        swapped(x_t, torch.tensor(30.5))


def test_images_at_the_thresholds_0_and_t_are_those_of_the_first_and_of_the_second_run(trained, tmp_path):
    other = shutil.copytree(trained, tmp_path / "other")
    weights = load_file(other / "unet" / "diffusion_pytorch_model.safetensors")
    save_file({name: -tensor for name, tensor in weights.items()}, other / "unet" / "diffusion_pytorch_model.safetensors")
    config = BiasConfig(runs=(str(trained), str(other)), swap=True, swap_steps=3, num_samples=2)
    models = open_models(config, folders_of(config, SimpleNamespace(process_index=0, num_processes=1)), torch.device("cpu"))
    assert steps_of(config, models)[models[0].label] == list(STEPS) == [2, 3, 4, 5, 10, 20, 50, 100, 250, 1000]
    first, second = (job_of(model, config, 3, "cpu").draw(range(2)) for model in models)
    swapped = swapped_jobs(config, models, "cpu")
    at = {threshold: swapped(threshold).draw(range(2)) for threshold in (0, 500, 1000)}
    assert torch.equal(at[0], first) and torch.equal(at[1000], second)
    assert not torch.equal(at[500], first) and not torch.equal(at[500], second)


def test_on_the_straight_path_u_and_x_0_are_converted_at_any_timestep():
    x_t, x_0 = torch.full((1, 1, 2, 2), 0.3), 0.5
    of_u = constant(1.0, "flow", prediction_type="flow")
    of_x_0 = constant(x_0, "sample", **STRAIGHT_X_0)
    for level in (1.0, 30.5, 100.0):
        swapped = SwappedUNet(of_u, of_x_0, 101)
        torch.testing.assert_close(swapped(x_t, torch.tensor(level))[0], (x_t - x_0) / (level / T))
        swapped = SwappedUNet(of_x_0, of_u, 101)
        torch.testing.assert_close(swapped(x_t, torch.tensor(level))[0], x_t - level / T)


@pytest.mark.parametrize("solver, objective", [("ddim", {}), ("flow_euler", {"prediction_type": "flow", "schedule_shift": 0.2})])
def test_the_thresholds_go_from_before_the_first_timestep_to_after_the_last(solver, objective):
    objective = ObjectiveConfig(num_train_timesteps=T, **objective)
    scheduler = make_scheduler(solver, exported_scheduler(objective), "linspace", 20)
    first, *_, last = thresholds(SimpleNamespace(denoiser=SimpleNamespace(schedule=make_schedule(objective))))
    assert first == 0 and last == scheduler.timesteps.max() + 1


def test_networks_that_do_not_fit_together_are_not_swapped():
    with pytest.raises(InputError, match="different noise schedules"):
        require_swappable(constant(1.0), constant(2.0, schedule_shift=4.0), "ddim")
    learned = constant(1.0)
    learned.network.config.out_channels = 2
    require_swappable(learned, constant(2.0), "ddim")
    with pytest.raises(InputError, match="take another --scheduler than ddpm"):
        require_swappable(learned, constant(2.0), "ddpm")


# ---- the page --------------------------------------------------------------------------------------------------------


class Loaded(HTMLParser):
    """Every attribute that a browser would load, and the tags that are open at the end."""

    def __init__(self):
        super().__init__()
        self.loaded, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.loaded += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_page_loads_nothing_and_escapes_what_it_is_told(tmp_path):
    page = ReportPage("Runs <a> & b")
    page.heading("Errors")
    picture = figures.curves({"error": {"a": figures.Curve([1, 2], [1, 2])}}, "t", "error")
    page.figure(picture, 'Two "runs"', wide=True)
    page.figure(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "An SVG")
    page.table(["run", "fid"], [["<script>alert(1)</script>", 1.23456], ["b", None]], "Distances", folded=True)
    text = page.html().decode()
    parser = Loaded()
    parser.feed(text)
    assert parser.open == [] and len(parser.loaded) == 3
    assert all(value.startswith("data:") for value in parser.loaded)
    assert "<script" not in text and "&lt;script&gt;" in text and "<td>1.235</td>" in text and "<td></td>" in text
    assert "@import" not in text and "url(" not in text and "prefers-color-scheme: dark" in text and "width=device-width" in text
    (tmp_path / "report.html").write_text(text)
    (tmp_path / "other.html").write_text("<html></html>")
    assert is_our_page(tmp_path / "report.html") and not is_our_page(tmp_path / "other.html")


# ---- the command -----------------------------------------------------------------------------------------------------


def test_what_is_wrong_with_a_command_is_said_at_once():
    for given, said in (
        ({"runs": ()}, "runs are missing"),
        ({"runs": ("a", "a")}, "each can be named once"),
        ({"runs": ("a",), "swap": True}, "swap is on, but 1 runs are named"),
        ({"runs": ("a",), "swap_steps": 5}, "swap is off"),
        ({"runs": ("a",), "steps": (5, 0)}, "steps is 5 0"),
        ({"runs": ("a",), "num_timesteps": 1}, "num_timesteps is 1"),
        ({"runs": ("a",), "metrics": "clip_score"}, "needs the prompt of each image"),
        ({"runs": ("a",), "weights": "best"}, "weights is 'best'"),
    ):
        (problem,) = bias_problems(BiasConfig(**given))
        assert said in problem


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--num_samples", 10], "num_samples is 10, but metrics fid,colour need 65; take more, or --metrics colour"),
        (
            ["--reference", "few", "--metrics", "fid", "--feature_extractor", "digits"],
            "reference few has 5 images, but metrics fid need 65",
        ),
        (["--feature_extractor", "none"], "feature_extractor is none, which is not known"),
    ],
)
def test_what_the_metrics_need_is_said_before_a_model_is_loaded(trained, tmp_path, monkeypatch, capsys, flags, said):
    (tmp_path / "few").mkdir()
    for k in range(5):
        Image.new("L", (8, 8), 50 * k).save(tmp_path / "few" / f"{k}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bias, "open_models", lambda *_: pytest.fail("loaded"))
    assert cli.evaluate(["bias", str(trained), "--num_threads", "1", *map(str, flags)]) == 2
    assert said in capsys.readouterr().err


def test_four_samples_are_shown_whatever_the_batches():
    class Drawing:
        config, name, batch_size = SimpleNamespace(num_images=7, seed=0), "job", 3

        def draw(self, indices):
            return torch.tensor(list(indices), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)

    measure = Measure(MeasureConfig(metrics="colour", cache_dir=""), "digits", "cpu")
    reference = Sample.of({"colour": torch.rand(9, 3)})
    assert Drawn.of(Drawing(), measure, reference, 1).first[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


def test_the_colour_bias_of_sampled_images_is_their_mean_less_that_of_the_reference():
    """By channel, in grey levels, with an interval over the images; on two images that are 10 and 30 in red, 0 in green, 200 in blue."""

    class Drawing:
        config, name, batch_size = SimpleNamespace(num_images=2, seed=0), "job", 2

        def draw(self, indices):
            colours = torch.tensor([[10, 0, 200], [30, 0, 200]], dtype=torch.uint8)
            return colours[list(indices)].view(-1, 3, 1, 1).expand(-1, 3, 8, 8)

    measure = Measure(MeasureConfig(metrics="colour", cache_dir=""), "digits", "cpu")
    found = Drawn.of(Drawing(), measure, Sample.of({"colour": torch.tensor([[40.0, 0.0, 90.0], [60.0, 20.0, 110.0]])}), 3)
    half = 1.96 * 10  # standard error of 10 and 30
    assert [value for channel in found.colour_bias for value in channel] == pytest.approx(
        [-30, -30 - half, -30 + half, *[-10] * 3, *[100] * 3]
    )
    assert found.figures["brightness_bias"] == pytest.approx(20)


def test_a_run_is_named_by_its_folder_wherever_the_command_runs(tmp_path, monkeypatch):
    (tmp_path / "constant").mkdir()
    monkeypatch.chdir(tmp_path / "constant")
    assert labels_of([".", "../debiased/"]) == ["constant", "debiased"] and labels_of(["a/x", "b/x"]) == ["a/x", "b/x"]


def test_images_that_all_runs_held_out_are_preferred():
    source = open_source(DataConfig(dataset="digits"))
    held = [split_source(source, 0.1, seed)[1].indices for seed in (0, 1)]
    of = [{"validation_split": 0.1, "seed": seed} for seed in (0, 1)]
    assert held_out(source, of[:1]) == held[0]
    assert held_out(source, of) == sorted(set(held[0]) & set(held[1]))
    assert held_out(source, [of[0], {"validation_split": 0.0, "seed": 0}]) == range(1797)


def table_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def drawn_once(monkeypatch):
    """Draws one figure of curves for each pair of scales, which takes half a second, and takes it for the others."""
    curves, found = bias_report.curves, {}

    def once(panels, x_label, y_label, *scales):
        if scales not in found:
            found[scales] = curves(panels, x_label, y_label, *scales)
        return found[scales]

    monkeypatch.setattr(bias_report, "curves", once)


def test_the_command_writes_tables_figures_and_a_page(trained, tmp_path, capsys, monkeypatch):
    drawn_once(monkeypatch)
    mosaics, mosaic = [], bias_report.mosaic
    monkeypatch.setattr(bias_report, "mosaic", lambda rows, *labels: mosaics.append((rows, *labels)) or mosaic(rows, *labels))
    other = tmp_path / "other"
    other.symlink_to(trained)
    small = ["--num_images", 6, "--num_timesteps", 3, "--num_samples", 4, "--steps", 2, 3, "--metrics", "colour", "--num_threads", 1]
    swap = ["--swap", "--swap_steps", 2]
    command = [str(part) for part in ("bias", trained, other, "--output_dir", tmp_path / "out", *small, *swap, "--cache_dir", "")]
    assert cli.evaluate(command) == 0
    out = tmp_path / "out"
    rows = table_of(out / "timesteps.csv")
    assert {(row["run"], row["t"]) for row in rows} == {(run, t) for run in (trained.name, "other") for t in ("0", "500", "999")}
    by_run = [[{**row, "run": ""} for row in rows if row["run"] == run] for run in (trained.name, "other")]
    assert by_run[0] == by_run[1]  # the same network, images and noise
    for quantity in ("loss_share", "gradient_share"):
        assert sum(float(row["value"]) for row in by_run[0] if row["quantity"] == quantity) == pytest.approx(1)
    (bias,) = (row for row in by_run[0] if row["t"] == "500" and row["quantity"] == "x_0_bias")
    assert bias["channel"] == "grey" and float(bias["low"]) < float(bias["value"]) < float(bias["high"])
    amplification = {row["t"]: row for row in by_run[0] if row["quantity"] == "amplification"}
    assert all(float(row["value"]) == pytest.approx(float(row["snr"]) ** -0.5) for row in amplification.values())
    (rows, timesteps, _), (samples, counts, _) = mosaics
    assert [label for label, _ in rows] == [label for k in (1, 2, 3) for label in (f"x_t of picture {k}", trained.name, "other")]
    assert timesteps == ["x_0", *map(str, spread_timesteps(1000, 10))] and all(len(images) == 11 for _, images in rows)
    assert [label for label, _ in samples] == [trained.name, "", "", "", "other", "", "", ""] and counts == ["2", "3"]
    steps, swap = table_of(out / "steps.csv"), table_of(out / "swap.csv")
    assert {row["steps"] for row in steps} == {"2", "3"}
    assert {row["quantity"] for row in steps} == {"brightness_bias", "colour_distance", "colour_bias"}
    assert len({row["threshold"] for row in swap}) == 11
    assert len({row["value"] for row in swap if row["quantity"] == "colour_bias"}) == 1  # of equal networks it does not matter
    page = (out / "report.html").read_text()
    assert page.count("<img") == len(list(out.glob("*.png"))) == 12
    assert not re.search(r"<(script|iframe|object)", page) and page.count("<table") == 5

    (out / "steps.csv").write_text("mine")
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert cli.evaluate(command) == 2 and "was not written by this command" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.nightly
def test_two_processes_write_the_tables_and_figures_of_one(trained, tmp_path):
    other = tmp_path / "other"
    other.symlink_to(trained)
    flags = ["--num_images", 6, "--num_timesteps", 3, "--num_samples", 4, "--steps", 2, 3, "--metrics", "colour", "--num_threads", 1]
    flags += ["--swap", "--swap_steps", 2, "--cache_dir", ""]
    for processes in (1, 2):
        code, said = as_ranks(processes, "eval.py", "bias", trained, other, "--output_dir", tmp_path / str(processes), *flags)
        assert code == 0, said
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("1", "2"))
    assert one == two and len(one) == 16  # three tables, twelve figures and a page
