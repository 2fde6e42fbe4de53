"""Power-function averages against their definition, any of them from snapshots, and the commands that make and compare them."""

import json
import math
import re
import shutil

import pytest
import torch
from conftest import same, sample_config, tensors
from diffusers import DDPMPipeline
from here import tiny, trained_here
from safetensors.torch import load

from debias_diffusers import cli
from debias_diffusers.config.schema.evaluation import ScoreConfig
from debias_diffusers.config.schema.training import TrainConfig
from debias_diffusers.config.validation.evaluation import score_problems
from debias_diffusers.config.validation.training import train_problems
from debias_diffusers.diffusion.power_ema import KEPT, combination, exponent, weights_of_steps
from debias_diffusers.errors import CannotWriteError, InputError
from debias_diffusers.evaluation import score
from debias_diffusers.runs import checkpoints, ema_snapshots
from debias_diffusers.runs.checkpoints import latest_valid
from debias_diffusers.runs.ema_snapshots import FOLDER, steps, thinned
from debias_diffusers.sampling.generate import make_job
from debias_diffusers.sampling.post_hoc_ema import reconstructed
from debias_diffusers.training.ema import EMA
from debias_diffusers.utils.files import remove_folder

POWERS = ["power_0.05.safetensors", "power_0.1.safetensors"]


def test_the_exponent_is_the_one_of_the_paper():
    """gamma = 16.97 and 6.94 at sigma_rel 0.05 and 0.10 (arXiv 2312.02696, section 3.1)."""
    assert exponent(0.05) == pytest.approx(16.97, abs=0.005) and exponent(0.10) == pytest.approx(6.94, abs=0.005)
    for sigma in (0.01, 0.08, 0.28):
        g = exponent(sigma)
        assert (g + 1) ** 0.5 / ((g + 2) * (g + 3) ** 0.5) == pytest.approx(sigma, rel=1e-12)


def test_a_power_average_weighs_the_steps_by_its_profile():
    """By hand: theta_k has the weight of k^gamma between k - 1 and k, and the standard deviation of the steps is sigma_rel t."""
    weight, end = torch.nn.Parameter(torch.zeros(400)), 400
    ema = EMA({"w": weight}, [0.0], sigma_rels=KEPT)
    for step in range(end):
        weight.data.zero_()[step] = 1.0
        ema.update(step)
    for sigma in KEPT:
        found, g = ema.power_averages[sigma]["w"].double(), exponent(sigma)
        expected = torch.tensor([(k / end) ** (g + 1) - ((k - 1) / end) ** (g + 1) for k in range(1, end + 1)], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
        place = torch.arange(1, end + 1).double() / end
        mean = (found * place).sum()
        assert ((found * (place - mean) ** 2).sum().sqrt().item()) == pytest.approx(sigma, rel=0.01)
        torch.testing.assert_close(weights_of_steps(torch.tensor([g]).double(), torch.tensor([end]), torch.arange(1, 401))[0], expected)


def trajectory(count, size=40):
    """Weights far from 0 that drift and jitter as those of a training: (count, size)."""
    generator = torch.Generator().manual_seed(0)
    jitter, found, base = torch.zeros(size).double(), [], 5 + torch.randn(size, generator=generator).double()
    direction = torch.randn(size, generator=generator).double()
    for step in range(count):
        jitter = 0.97 * jitter + 0.05 * torch.randn(size, generator=generator).double()
        found.append(base + math.log1p(step / 50) * direction + jitter)
    return torch.stack(found)


def test_a_reconstruction_is_the_average_that_was_tracked_to_a_thousandth_of_its_distance_from_the_raw_weights():
    thetas, wanted = trajectory(4000), (0.06, 0.08, 0.12, 0.15)
    weight = torch.nn.Parameter(torch.zeros(40, dtype=torch.float64))
    ema, snapshots = EMA({"w": weight}, [0.0], sigma_rels=(*KEPT, *wanted)), {}
    for kind in ema.power_averages.values():
        kind["w"] = kind["w"].double()
    for step, theta in enumerate(thetas):
        weight.data.copy_(theta)
        for sigma, average in ema.power_averages.items():
            average["w"].lerp_(weight.data, 1 - (1 - 1 / (step + 1)) ** (exponent(sigma) + 1))
        if (step + 1) % 50 == 0:
            snapshots[step + 1] = torch.stack([ema.power_averages[sigma]["w"].clone() for sigma in KEPT])
            snapshots = {kept: snapshots[kept] for kept in thinned(list(snapshots), 32)}
    assert len(snapshots) == 32 and max(snapshots) == 4000
    for sigma in wanted:
        coefficients, missing = combination(list(snapshots), sigma, 4000)
        made = (coefficients[:, :, None] * torch.stack(list(snapshots.values()))).sum((0, 1))
        tracked = ema.power_averages[sigma]["w"]
        assert (made - tracked).norm() < 1e-3 * (tracked - thetas[-1]).norm()
        assert coefficients.sum().item() == pytest.approx(1, abs=1e-12) and missing < 0.01
    for k, sigma in enumerate(KEPT):  # which are there
        assert combination(list(snapshots), sigma, 4000)[0][-1, k].item() == pytest.approx(1, abs=1e-6)


def test_snapshots_that_stay_are_about_evenly_spaced():
    kept = []
    for step in range(10, 1001, 10):
        kept = thinned([*kept, step], 8)
        assert kept[-1] == step and len(kept) == min(8, step // 10)
    gaps = [b - a for a, b in zip([0, *kept], kept)]
    assert max(gaps) <= 3 * min(gaps[:-1]) and max(gaps) <= 240


# ---- runs --------------------------------------------------------------------------------------------------------------

FLAGS = ["--post_hoc_ema", 4, "--checkpoint_every", 2, "--lr_schedule", "constant", "--warmup_steps", 0]


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """A run of 12 steps, in two starts, and all its raw weights."""
    folder, thetas = tmp_path_factory.mktemp("runs") / "run", []
    update = EMA.update

    def recorded(ema, step=0):
        update(ema, step)
        thetas.append({name: weight.detach().clone() for name, weight in ema.weights.items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EMA, "update", recorded)
        for count in (4, 12):
            trained_here(tiny(folder, *FLAGS, "--max_steps", count))
    return folder, thetas


def test_the_snapshots_of_a_run_make_the_average_of_its_weights(averaged):
    folder, thetas = averaged
    there = steps(folder, 12)
    assert len(there) == 4 and there[-1] == 12 and sorted(path.name for path in (folder / FOLDER).iterdir())[-1] == "step-00000012"
    made, step = reconstructed(folder, 0.1)
    assert step == 12
    shares = weights_of_steps(torch.tensor([exponent(0.1)], dtype=torch.float64), torch.tensor([12]), torch.arange(1, 13))[0]
    for name, tensor in made.items():
        tracked = sum(share * theta[name].double() for share, theta in zip(shares, thetas))
        distance = (tracked - thetas[-1][name]).norm()
        assert (tensor - tracked).norm() <= 1e-3 * distance + 1e-6 * tracked.norm()
    kept = load(tensors(folder, 12)[POWERS[1]])
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, kept[name], rtol=1e-5, atol=1e-6)


def test_a_run_with_snapshots_resumes_with_the_same_bits(averaged, tmp_path):
    folder, _ = averaged
    trained_here(tiny(tmp_path / "whole", *FLAGS, "--max_steps", 12))
    same(folder, tmp_path / "whole", 12, more=POWERS)
    for step in steps(folder, 12):
        for name in POWERS:
            places = [each / FOLDER / f"step-{step:08d}" / name for each in (folder, tmp_path / "whole")]
            assert places[0].read_bytes() == places[1].read_bytes()


def test_a_step_whose_snapshot_has_no_room_is_saved(tmp_path, monkeypatch, capsys):
    def add(*_):
        raise CannotWriteError("no room")

    monkeypatch.setattr(ema_snapshots, "add", add)
    trained_here(tiny(tmp_path, *FLAGS, "--max_steps", 2))
    assert "no EMA snapshot at step 2: no room" in capsys.readouterr().err
    assert latest_valid(tmp_path / "checkpoints")[0].step == 2


def test_the_command_writes_a_pipeline_and_refuses_in_a_sentence(averaged, capsys):
    folder, _ = averaged
    assert cli.ema(["reconstruct", str(folder), "--sigma_rel", "0.08"]) == 0
    out = folder / "sigma_rel-0.08"
    assert f"step 12 of {folder} averaged with sigma_rel 0.08 is in {out}" in capsys.readouterr().err
    assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()  # by which sample.py knows size and chunks
    made = DDPMPipeline.from_pretrained(out)
    expected, _ = reconstructed(folder, 0.08)
    assert all(torch.equal(expected[name], tensor) for name, tensor in made.unet.state_dict().items())
    drawn = make_job(sample_config(out, out), "cpu").draw(range(2))
    assert torch.equal(drawn, make_job(sample_config(folder, out, weights="sigma_rel=0.08"), "cpu").draw(range(2)))
    for arguments, said in (
        (["reconstruct", str(folder), "--sigma_rel", "0.08"], "exists"),
        (["reconstruct", str(folder)], "sigma_rel is missing"),
        (["reconstruct", str(folder), "--sigma_rel", "0.5"], "sigma_rel is 0.5, but must be from 0.01 to 0.28"),
        (["reconstruct", str(folder), "--sigma_rel", "0.1", "--step", "1"], "no EMA snapshots up to step 1"),
        (["reconstruct", str(out), "--sigma_rel", "0.1"], "name a run directory that was trained with --post_hoc_ema"),
    ):
        assert cli.ema(arguments) == 2
        assert said in capsys.readouterr().err


def test_a_damaged_snapshot_is_named(averaged, tmp_path):
    copy = shutil.copytree(averaged[0], tmp_path / "copy")
    path = copy / FOLDER / "step-00000012" / POWERS[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"EMA snapshot .*step-00000012.* does not match its sha256"):
        reconstructed(copy, 0.08)


def test_snapshots_that_the_training_removes_meanwhile_are_not_needed(averaged, tmp_path, monkeypatch):
    copy = shutil.copytree(averaged[0], tmp_path / "copy")
    there, verify, seen = steps(copy, 12), checkpoints.verify, []

    def removing(path):  # as the training does at its next checkpoint: the first time just before, the second just after a snapshot is read
        seen.append(path)
        if len(seen) == 1:
            remove_folder(copy / FOLDER / checkpoints.folder_name(there[0]))
            return verify(path)
        found = verify(path)
        if len(seen) == 2:
            remove_folder(path)
        return found

    monkeypatch.setattr(checkpoints, "verify", removing)
    made, step = reconstructed(copy, 0.1)
    assert step == 12 and steps(copy, 12) == there[2:]
    monkeypatch.undo()
    assert all(torch.equal(made[name], tensor) for name, tensor in reconstructed(copy, 0.1)[0].items())


def test_the_average_ends_with_the_newest_snapshot(averaged, tmp_path, capsys):
    """A training makes that of a checkpoint after it, for seconds where the network is large, or has no room for it."""
    copy = shutil.copytree(averaged[0], tmp_path / "copy")
    *_, before, newest = steps(copy, 12)
    kept = load((copy / FOLDER / checkpoints.folder_name(before) / POWERS[1]).read_bytes())
    remove_folder(copy / FOLDER / checkpoints.folder_name(newest))
    made, step = reconstructed(copy, 0.1)
    assert step == before and not capsys.readouterr().err
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, kept[name], rtol=1e-5, atol=1e-6)
    reconstructed(copy, 0.1, step=12)
    assert re.search(r"miss the average of sigma_rel 0.1 at step 12 by [0-9]+%", capsys.readouterr().err)


def test_a_sweep_names_the_best_width(averaged, tmp_path, capsys, monkeypatch):
    folder, _ = averaged
    out = tmp_path / "sweep.json"
    flags = ["--ema", "sweep", "--metrics", "colour", "--num_images", 16, "--steps", 2, "--output", out]
    monkeypatch.setattr(score, "SWEEP", (0.05, 0.1, 0.15))
    assert cli.evaluate(["score", *map(str, (folder, *flags))]) == 0
    said, err = capsys.readouterr()
    result = json.loads(out.read_text())
    widths = {row["sigma_rel"]: abs(row["brightness_bias"]) for row in result["targets"]}
    assert sorted(widths) == [0.05, 0.1, 0.15]
    (best,) = result["best"]
    assert widths[best["sigma_rel"]] == min(widths.values())
    assert f"best brightness_bias of {folder}" in err and "| sigma rel" in said and out.with_suffix(".png").is_file()


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--post_hoc_ema", 2], "take --post_hoc_ema 32"),
        (["--post_hoc_ema", 32, "--checkpoint_every", 0], "checkpoint_every is 0"),
        (["--post_hoc_ema", 32, "--sharded_checkpoints"], "sharded_checkpoints is True, which does not go with post_hoc_ema"),
    ],
)
def test_snapshots_that_cannot_be_are_refused(flags, said, tmp_path):
    (problem,) = train_problems(tiny(tmp_path, *flags))
    assert said in problem
    assert TrainConfig().optimization.post_hoc_ema == 0


def test_a_sweep_of_one_kind_of_weights_is_refused():
    assert "leave one of the two out" in score_problems(ScoreConfig(targets=("x",), ema="sweep", weights="raw"))[0]
    assert "is a curve over sigma_rel" in score_problems(ScoreConfig(targets=("x",), ema="sweep", steps="5,10"))[0]
    assert "or sigma_rel=0.08" in score_problems(ScoreConfig(targets=("x",), weights="sigma_rel=0.5"))[0]
