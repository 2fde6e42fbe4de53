"""Kernel distances, density and coverage against their definitions; intervals over training seeds; several sampling seeds."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from debias_diffusers import cli
from debias_diffusers.config.schema.evaluation import ScoreConfig
from debias_diffusers.config.validation.evaluation import score_problems
from debias_diffusers.evaluation import metrics
from debias_diffusers.evaluation.measure import extractor_of_metrics, usual_extractor
from debias_diffusers.evaluation.metrics import Sample
from debias_diffusers.evaluation.results import STUDENT, over_training_seeds, table_of_groups


def sample(count, shift=0.0, width=4):
    return Sample.of({"x": torch.randn(count, width, generator=torch.Generator().manual_seed(count)) + shift})


def test_the_gaussian_kernel_distance_is_the_unbiased_estimate_by_hand():
    one, other = sample(30, 2.0), sample(30)
    found = metrics.figures(one, other, {"kid_rbf": "x"})
    x, y = one.features["x"].double(), other.features["x"].double()

    def kernel(a, b):
        return torch.exp(-((a[:, None] - b[None]) ** 2).sum(2) / 200)

    off = ~torch.eye(30, dtype=bool)
    expected = kernel(x, x)[off].mean() + kernel(y, y)[off].mean() - 2 * kernel(x, y).mean()
    assert found == {"kid_rbf": pytest.approx(expected.item(), rel=1e-5)}
    assert set(metrics.figures(sample(40), other, {"kid_rbf": "x"})) == {"kid_rbf", "kid_rbf_std"}


def test_cmmd_is_the_kernel_distance_of_directions():
    one, other = sample(25, 1.0), sample(40)
    x, y = ((s.features["x"] / s.features["x"].norm(dim=1, keepdim=True)).double() for s in (one, other))

    def kernel(a, b):
        return np.mean([[math.exp(-float((p - q) @ (p - q)) / 200) for q in b] for p in a])

    expected = 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
    assert metrics.figures(one, other, {"cmmd": "x"})["cmmd"] == pytest.approx(expected, rel=1e-5)
    assert metrics.figures(other, other, {"cmmd": "x"})["cmmd"] == pytest.approx(0, abs=1e-9)


def test_density_and_coverage_are_their_definition():
    one, other = sample(50, 0.5, width=3), sample(70, width=3)
    x, y = one.features["x"], other.features["x"]
    inside, covered = 0, 0
    for image in y:
        radius = (y - image).norm(dim=1).sort().values[5]
        within = ((x - image).norm(dim=1) < radius).sum().item()
        inside, covered = inside + within, covered + (within > 0)
    found = metrics.figures(one, other, {"dc": "x"})
    assert found == {"density": pytest.approx(inside / (5 * 50)), "coverage": pytest.approx(covered / 70)}
    same = metrics.figures(other, other, {"dc": "x"})
    assert same["coverage"] == 1 and same["density"] == pytest.approx(1)  # each ball holds its five nearest, less the one at its edge


def test_density_and_coverage_are_1_of_the_same_distribution_and_fall_where_modes_are_missing():
    reference, same, half = sample(900, width=2), sample(901, width=2), sample(902, width=2)
    half = Sample.of({"x": half.features["x"][half.features["x"][:, 0] > 0]})
    both, one = (metrics.figures(each, reference, {"dc": "x"}) for each in (same, half))
    assert both["density"] == pytest.approx(1, abs=0.1) and both["coverage"] > 0.9
    assert one["coverage"] < 0.6 < one["density"]


def test_metrics_that_are_named_after_their_network_choose_it():
    assert extractor_of_metrics("colour,fd_dinov2") == "dinov2-vit-l-14" and extractor_of_metrics("cmmd") == "clip-vit-l-14-336px"
    assert extractor_of_metrics("fid,sfid,kid") is None
    assert usual_extractor("digits", "cmmd,colour") == "clip-vit-l-14-336px" and usual_extractor("digits", "fid") == "digits"


# ---- seeds -------------------------------------------------------------------------------------------------------------


def test_means_and_intervals_over_training_seeds_are_those_of_students_t():
    runs = {f"{name}{seed}": {"seed": seed, "weighting": name, "batch_size": 8} for name in ("a", "b") for seed in range(3)}
    runs["alone"] = {"seed": 0, "weighting": "a", "batch_size": 16}
    values = {name: [1.0 + k, 3.0 + k] for k, name in enumerate(runs)}  # of two sampling seeds
    rows = [{"target": n, "steps": 20, "images": 9, "fid": v, "kid_std": 0.1} for n, vs in values.items() for v in vs]
    rows.append({"target": "photos", "images": 9, "fid": 0.0})
    groups = over_training_seeds(rows, runs)
    assert [group["group"] for group in groups] == ["weighting a", "weighting b"]
    first = groups[0]
    assert first["targets"] == ["a0", "a1", "a2"] and first["training_seeds"] == [0, 1, 2] and first["sampling_seeds"] == 2
    half = 4.303 * 1.0 / math.sqrt(3)  # of the means 2, 3, 4
    assert first["figures"] == {"fid": pytest.approx({"mean": 3.0, "low": 3 - half, "high": 3 + half})}
    assert "| weighting b " in table_of_groups(groups) and "| 6 (3.516 to 8.484) " in table_of_groups(groups)
    more = [{**row, "steps": 50} for row in rows]
    assert [group["steps"] for group in over_training_seeds(rows + more, runs)] == [20, 20, 50, 50]
    stopped = [{**row, "training_step": 10 if row["target"] == "a2" else 30} for row in rows]
    assert [group["training_seeds"] for group in over_training_seeds(stopped, runs)] == [[0, 1], [0, 1, 2]]


def test_the_quantiles_are_those_of_the_distribution():
    """By its density: 97.5% lies below."""
    grid = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    for freedom in (1, 2, 5, 13, 30):
        t = grid * STUDENT[freedom - 1]
        inside = torch.distributions.StudentT(float(freedom)).log_prob(t).exp()
        assert torch.trapezoid(inside, t).item() == pytest.approx(0.475, abs=2e-5)


def test_a_command_draws_with_several_seeds_and_says_what_runs_have_in_common(trained, tmp_path, capsys):
    runs = [shutil.copytree(trained, tmp_path / f"run{seed}") for seed in (0, 1)]
    config = json.loads((runs[1] / "config.json").read_text())
    (runs[1] / "config.json").write_text(json.dumps({**config, "seed": 1}))
    flags = ["--metrics", "colour", "--num_images", 16, "--steps", 2, "--sampling_seeds", "0,5", "--bootstrap", 0]
    assert cli.evaluate(["compare", *map(str, (*runs, *flags)), "--output", str(tmp_path / "out.json")]) == 0
    said, found = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    rows = {(row["target"], row["sampling_seed"]): row["brightness_bias"] for row in found["targets"]}
    assert len(rows) == 4 and rows[str(runs[0]), 0] != rows[str(runs[0]), 5] and rows[str(runs[0]), 0] == rows[str(runs[1]), 0]
    (group,) = found["groups"]
    assert group["training_seeds"] == [0, 1] and group["figures"]["brightness_bias"]["mean"] == pytest.approx(sum(rows.values()) / 4)
    assert "means over training seeds" in said and "| sampling seed |" in said


def test_seeds_that_are_no_seeds_are_refused():
    for seeds in ("1,x", "1,1", "4294967296"):
        assert "must be different seeds below 2^32" in score_problems(ScoreConfig(targets=("x",), sampling_seeds=seeds))[0]
