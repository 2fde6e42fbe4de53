"""eval.py weights: the numbers of the tables, in a file and in a picture."""

import csv
import math

import pytest
from PIL import Image

from debias_diffusers import cli
from debias_diffusers.config.schema.objective import ObjectiveConfig
from debias_diffusers.diffusion.loss import make_objective
from debias_diffusers.evaluation import plots


def weights(*flags):
    """The exit code of `eval.py weights`."""
    return cli.evaluate(["weights", *map(str, flags)])


@pytest.fixture
def undrawn(monkeypatch):
    """The picture, which takes seconds, is laid out but not drawn."""
    monkeypatch.setattr(plots, "png_of", lambda _: b"")


def rows(folder):
    with open(folder / "weights.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("options", [{}, {"noise_schedule": "cosine"}, {"prediction_type": "flow", "terminal_weight_floor": 0.5}])
def test_the_numbers_are_those_of_the_objective(tmp_path, undrawn, options):
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    assert weights(*flags, "--against", "min_snr", "debiased_kohya", "--output_dir", tmp_path / "w") == 0
    found = rows(tmp_path / "w")
    assert len(found) == 3000 and {row["weighting"] for row in found} == {"debiased", "min_snr", "debiased_kohya"}
    space = options.get("prediction_type", "epsilon")
    objective = make_objective(ObjectiveConfig(**options))
    for t in (0, 500, 999):
        row = found[t]
        assert float(row["t"]) == t and float(row["snr"]) == objective.schedule.snr[t].item()
        assert float(row["log_snr"]) == pytest.approx(math.log(row_snr) if (row_snr := float(row["snr"])) else -math.inf)
        assert float(row[space]) == objective.weights[t].item()
    assert found[2000]["sample"] == "" and found[2000]["v_prediction"] != ""  # kohya's code knows no prediction of x_0


def test_the_picture_is_drawn(tmp_path):
    """Though the mean over the timesteps of flow's first weights is infinite, so that an axis has fewer lines."""
    flags = ["--normalize_weights", "--prediction_type", "flow", "--against", "min_snr", "debiased_kohya"]
    assert weights(*flags, "--output_dir", tmp_path / "w") == 0
    assert Image.open(tmp_path / "w" / "weights.png").size[0] > 1000


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--weighting", "debias"], "did you mean debiased"),
        (["--snr_floor", "10", "--snr_ceiling", "1"], "take a ceiling above the floor"),
        (["--weighting", "constant", "--snr_floor", "1"], "snr_floor is 1.0, but changes no weight"),
        (["--normalize_weights", "--timestep_mean", "3"], "timestep_mean is 3.0, but changes no weight"),
        (["--schedule_shift", "1e300"], "take a shift from"),
        (["--num_train_timesteps", "10"], "take at least 21"),
        (["--against", "variational"], "no loss weights to draw"),
        (["--snr_gamma", "3"], "snr_gamma is 3.0, but changes no weight of debiased"),
        (["--learn_sigma"], "learn_sigma is True, but changes no weight"),
        (["--timestep_sampler", "logit_normal"], "timestep_sampler is logit_normal, but changes no weight"),
        (["--prediction_type", "flow", "--noise_schedule", "linear"], "noise_schedule is linear"),
        (["--snr_floor=-1"], "snr_floor is -1"),
    ],
)
def test_what_would_be_ignored_is_refused(tmp_path, capfd, flags, named):
    assert weights(*flags, "--output_dir", tmp_path / "w") == 2
    assert named in capfd.readouterr().err and not (tmp_path / "w").exists()


@pytest.mark.parametrize("flags", [["--prediction_type", "flow"], ["--rescale_betas_zero_snr"]])
def test_what_has_no_mean_is_not_normalized(tmp_path, undrawn, flags):
    assert weights("--normalize_weights", *flags, "--output_dir", tmp_path / "w") == 0
    found = rows(tmp_path / "w")
    assert {row["epsilon"] for row in found} == {""}
    assert sum(float(row["v_prediction"]) for row in found) / 1000 == pytest.approx(1)


def test_weights_beyond_every_axis_are_written_all_the_same(tmp_path):
    for k, expected in ((0.1, math.inf), (1e10, 0.0)):
        folder = tmp_path / str(k)
        assert weights("--weighting", "p2", "--p2_k", k, "--p2_gamma", 400, "--output_dir", folder) == 0
        assert float(rows(folder)[999]["epsilon"]) == expected
