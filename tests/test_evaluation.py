"""Figures against closed forms, plain implementations and torch-fidelity itself; what is read, cached and refused."""

import functools
import importlib.util
import json
import math
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch_fidelity
from accelerate import Accelerator
from conftest import HANG, ROOT, launched, run
from PIL import Image
from safetensors.torch import load, save, save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from debias_diffusers import cli
from debias_diffusers.cli import train_config
from debias_diffusers.config.schema.data import DataConfig
from debias_diffusers.config.schema.evaluation import BitsConfig, MeasureConfig, ScoreConfig, StatsConfig
from debias_diffusers.config.schema.training import RunConfig, TrainConfig
from debias_diffusers.config.validation.evaluation import score_problems, stats_problems
from debias_diffusers.config.validation.training import train_problems
from debias_diffusers.data.sources.opening import open_source
from debias_diffusers.data.sources.subset import RepeatedSource, folder_repeats
from debias_diffusers.data.validation_split import HELD_OUT
from debias_diffusers.diffusion.loss import make_objective
from debias_diffusers.errors import InputError
from debias_diffusers.evaluation import feature_extractors, measure, metrics, monitor, plots, reference, results, score, statistics
from debias_diffusers.evaluation.feature_extractors import Extractor
from debias_diffusers.evaluation.measure import Measure
from debias_diffusers.evaluation.metrics import Sample
from debias_diffusers.evaluation.statistics import ReferenceFeatures
from debias_diffusers.runs import checkpoints
from debias_diffusers.sampling.pixel_job import PixelJob
from debias_diffusers.training.hooks import Evaluation
from debias_diffusers.training.state_dicts import MetricHistory


def normal(count, mean, scale, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, len(mean), generator=generator, dtype=torch.float64) * torch.tensor(scale) + torch.tensor(mean)


# ---- the formulas ----------------------------------------------------------------------------------------------------


def test_the_distance_of_two_gaussians_is_the_closed_form():
    """Diagonal covariances: |difference of means|^2 + sum of (difference of standard deviations)^2."""
    statistics = [
        {"mu": np.array(mean), "sigma": np.diag(np.square(scale))}
        for mean, scale in (([0.0, 1.0, 2.0], [1.0, 2.0, 3.0]), ([1.0, 1.0, 0.0], [2.0, 2.0, 0.5]))
    ]
    assert metrics.frechet(*statistics) == pytest.approx(1 + 0 + 4 + 1 + 0 + 6.25, rel=1e-9)
    assert metrics.frechet(statistics[0], statistics[0]) == pytest.approx(0, abs=1e-9)


def test_the_distance_is_unchanged_by_a_rotation():
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    one, other = normal(500, [0.0, 1, 2, 3], [1.0, 2, 3, 1]), normal(500, [1.0, 1, 1, 1], [2.0, 2, 1, 1], seed=2)
    plain = metrics.frechet(Sample.of({"x": one}).moments("x"), Sample.of({"x": other}).moments("x"))
    turned = metrics.frechet(Sample.of({"x": one @ turn}).moments("x"), Sample.of({"x": other @ turn}).moments("x"))
    assert turned == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("count, other_count", [(12, 12), (12, 30), (30, 12), (12, 500), (500, 12), (2, 2)])
def test_the_distance_of_fewer_images_than_features_is_the_formula_without_the_large_matrix(count, other_count, monkeypatch):
    """The root's trace is the sum of the singular values of A B^T, where S1 = A^T A and S2 = B^T B."""
    scale = [0.9**k for k in range(40)]
    one, other = normal(count, [0.0] * 40, scale), normal(other_count, [0.5] * 40, scale, seed=5)
    A, B = (((x - x.mean(0)) / math.sqrt(len(x) - 1)).numpy() for x in (one, other))
    root = np.linalg.svd(A @ B.T, compute_uv=False).sum()
    expected = (one.mean(0) - other.mean(0)).square().sum().item() + np.square(A).sum() + np.square(B).sum() - 2 * root
    monkeypatch.setattr(metrics, "fid_statistics_to_metric", None)  # takes seconds for 2048 features
    found = metrics.figures(Sample.of({"x": one}), Sample.of({"x": other}), {"fid": "x"})["fid"]
    assert found == pytest.approx(expected, rel=1e-7)


def test_the_distance_from_given_statistics_is_theirs_and_not_that_of_the_few_images_beside_them():
    few, many = normal(12, [0.0] * 40, [1.0] * 40), normal(500, [0.5] * 40, [1.5] * 40, seed=5)
    given = Sample.of({"x": many}).moments("x")
    beside = Sample({"x": normal(9, [9.0] * 40, [1.0] * 40)}, {"x": given}, 9)
    by_few = metrics.figures(Sample.of({"x": few}), beside, {"fid": "x"})["fid"]
    assert by_few == pytest.approx(metrics.frechet(Sample.of({"x": few}).moments("x"), given), rel=1e-5)  # torch-fidelity's
    same = metrics.figures(Sample.of({"x": few}), Sample.of({"x": few}), {"fid": "x"})["fid"]
    assert same == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("count", [3, 50])
def test_features_of_different_extractors_are_not_compared(count):
    one, other = Sample.of({"x": normal(count, [0.0] * 5, [1.0] * 5)}), Sample.of({"x": normal(50, [0.0] * 4, [1.0] * 4)})
    with pytest.raises(InputError, match="features, so of different extractors"):
        metrics.figures(one, other, {"fid": "x"})


def plain_precision(generated, real, neighbours=3):
    """Share of generated points within the ball of a real point that reaches to its third neighbour, in loops (arXiv 1904.06991)."""
    radii = [sorted((real[i] - real[j]).norm().item() for j in range(len(real)))[neighbours] for i in range(len(real))]
    inside = [any((point - real[i]).norm().item() <= radii[i] for i in range(len(real))) for point in generated]
    return sum(inside) / len(inside)


def test_precision_and_recall_are_those_of_a_plain_implementation():
    generated, real = normal(60, [0.0, 0, 0], [1.0, 1, 1]), normal(70, [0.8, 0, 0], [1.0, 0.5, 1], seed=3)
    found = metrics.figures(Sample.of({"x": generated}), Sample.of({"x": real}), {"prc": "x"})
    assert found["precision"] == pytest.approx(plain_precision(generated, real))
    assert found["recall"] == pytest.approx(plain_precision(real, generated))
    assert 0.1 < found["precision"] < 0.95 and found["precision"] != found["recall"]


def test_colour_is_the_bias_and_the_spread_of_the_means_of_images():
    one, other = normal(4000, [100.0, 110, 120], [5.0, 5, 5]), normal(4000, [104.0, 112, 120], [8.0, 5, 5], seed=4)
    found = metrics.figures(Sample.of({"colour": one}), Sample.of({"colour": other}), {"colour": "colour"})
    assert found["brightness_bias"] == pytest.approx(-2, abs=0.3)
    assert found["colour_distance"] == pytest.approx(math.sqrt(16 + 4 + 9), rel=0.05)


def test_the_interval_of_a_figure_covers_what_another_draw_gives():
    reference = Sample.of({"x": normal(3000, [0.0, 0, 0], [1.0, 1, 1], seed=9)})
    found, inside = [], 0
    for seed in range(30):
        target = Sample.of({"x": normal(300, [0.3, 0, 0], [1.0, 1.2, 1], seed=seed)})
        found.append(metrics.figures(target, reference, {"fid": "x"})["fid"])
        rows = [metrics.redrawn(target, reference, {"fid": "x"}, 0, draw) for draw in range(100)]
        low, high = metrics.intervals({"fid": found[-1]}, rows)["fid"]
        assert low < found[-1] < high
        inside += low < 0.134 < high  # 0.3^2 + 0.2^2, and about 0.004 for the finite sample
    assert inside >= 24
    assert np.std(found) > 0.01


def test_kid_of_all_images_has_no_spread():
    one, other = (Sample.of({"x": normal(20, [0.0, 1], [1.0, 1], seed=seed)}) for seed in (0, 1))
    found = metrics.figures(one, other, {"kid": "x"})
    assert set(found) == {"kid", "kid_subset"} and found["kid_subset"] == 20
    assert "kid_std" in metrics.figures(one, Sample.of({"x": normal(21, [0.0, 1], [1.0, 1])}), {"kid": "x"})


def test_better_is_nearer_to_none_of_a_bias_and_more_of_a_score():
    assert metrics.as_loss("brightness_bias", -3.0) > metrics.as_loss("brightness_bias", 2.0)
    assert metrics.as_loss("is", 3.0) < metrics.as_loss("is", 2.0) and metrics.as_loss("fid", 2.0) < metrics.as_loss("fid", 3.0)


def test_features_that_are_not_finite_have_no_distance():
    broken = Sample.of({"x": torch.full((5, 2), math.nan)})
    with pytest.raises(InputError, match="the Frechet distance of these features cannot be computed"):
        metrics.figures(broken, Sample.of({"x": normal(9, [0.0, 1], [1.0, 1])}), {"fid": "x"})
    with pytest.raises(InputError, match="the Frechet distance of these features cannot be computed"):
        metrics.figures(Sample.of({"x": torch.full((5, 9), math.nan)}), Sample.of({"x": torch.zeros(5, 9)}), {"fid": "x"})
    with pytest.raises(InputError, match="need at least 2 images, but there is 1"):
        Sample.of({"x": torch.zeros(1, 2)}).moments("x")


def test_json_has_null_for_what_is_not_finite():
    assert json.loads(results.as_json({"a": [math.nan, 1.5], "b": {"c": -math.inf}})) == {"a": [None, 1.5], "b": {"c": None}}


class NotDrawn:
    name, count, side, batch_size = "target", 5, 8, 64


def test_too_few_images_are_refused_before_any_is_drawn(tmp_path):
    config = ScoreConfig(targets=("target",), measure=MeasureConfig(metrics="is,colour", feature_extractor="digits", cache_dir=""))
    measure = Measure(config.measure, "digits", "cpu")
    reference = ReferenceFeatures(str(folder_of(tmp_path / "reference", 5, 0)), measure, False)
    with pytest.raises(InputError, match="target has 5 images, but metrics is of these features need 10"):
        score._row(config, measure, reference, NotDrawn, {})


def test_statistics_are_refused_for_metrics_of_images_before_any_is_drawn(tmp_path):
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(3), sigma=np.eye(3))
    measure = Measure(MeasureConfig(metrics="kid", cache_dir=""), "digits", "cpu")
    with pytest.raises(InputError, match="metric kid compares images"):
        ReferenceFeatures(str(tmp_path / "statistics.npz"), measure, False).sample(8)


def test_halves_of_the_reference_are_measured_only_where_they_are_enough(tmp_path):
    one, other = folder_of(tmp_path / "one", 70, 0), folder_of(tmp_path / "other", 70, 1)
    options = {"metrics": "fid,kid,is,colour", "measure": {"feature_extractor": "digits"}}
    halves = scored(tmp_path, one, reference=other, **options)["halves_of_the_reference"]
    assert "fid" not in halves and {"kid", "is", "colour_distance"} <= set(halves)
    assert "fid" in scored(tmp_path, one, reference=other, allow_few_images=True, **options)["halves_of_the_reference"]


# ---- torch-fidelity --------------------------------------------------------------------------------------------------


def folder_of(root, count, seed, size=8, colour=False):
    """Random images of some structure."""
    root.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for k in range(count):
        shape = (4, 4, 3) if colour else (4, 4)
        small = Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8))
        small.resize((size, size), Image.Resampling.BICUBIC).save(root / f"{k:04d}.png")
    return root


def scored(tmp_path, *targets, reference, metrics="fid,is,kid,prc,colour", **options):
    """Features of the digits are computed once for all tests, those of other references in each."""
    cache = tmp_path.parent / "features-of-digits" if reference == "digits" else tmp_path / "cache"
    measure = MeasureConfig(metrics=metrics, cache_dir=str(cache), num_threads=1, **options.pop("measure", {}))
    return score.score(ScoreConfig(targets=tuple(map(str, targets)), reference=str(reference), measure=measure, **options))


@pytest.mark.row(51, "damaged, few or unusual images are named, and metrics equal those of a direct call of torch-fidelity")
def test_all_figures_are_those_of_a_direct_call_of_torch_fidelity(tmp_path):
    one, other = folder_of(tmp_path / "one", 90, 0), folder_of(tmp_path / "other", 80, 1)
    result = scored(tmp_path, one, reference=other, measure={"feature_extractor": "digits"})
    direct = torch_fidelity.calculate_metrics(
        input1=str(one), input2=str(other), feature_extractor="digits", isc=True, fid=True, kid=True, prc=True, kid_subset_size=80,
        samples_shuffle=True, rng_seed=0, cuda=False, cache=False, verbose=False,
    )  # fmt: skip
    (found,) = result["targets"]
    for ours, theirs in (
        ("fid", "frechet_inception_distance"), ("is", "inception_score_mean"), ("kid", "kernel_inception_distance_mean"),
        ("kid_std", "kernel_inception_distance_std"), ("precision", "precision"), ("recall", "recall"),
    ):  # fmt: skip
        assert found[ours] == pytest.approx(direct[theirs], rel=1e-6, abs=1e-6), ours
    assert found["kid_subset"] == 80 and found["images"] == 90


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """Weights of Inception-v3 drawn at random, as the file that a user would have downloaded, and as safetensors."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    empty = FeatureExtractorInceptionV3.__new__(FeatureExtractorInceptionV3)
    saved = {}

    class Stop(Exception):
        pass

    def take(path, **_):
        raise Stop

    original, torch.load = torch.load, take
    try:
        empty.__init__("inception-v3-compat", ["2048"], feature_extractor_weights_path="nowhere")
    except Stop:
        saved = {name: value.contiguous() for name, value in empty.state_dict().items()}
    finally:
        torch.load = original
    torch.save(saved, folder / "inception.pth")
    save_file(saved, folder / "inception.safetensors")
    return folder


@pytest.fixture
def loaded_once(monkeypatch):
    """Each extractor is loaded once in a test, which takes a second for Inception."""
    once = functools.cache(Extractor)
    monkeypatch.setattr(measure, "Extractor", lambda name, metrics, weights: once(name, tuple(metrics), weights))


def test_spatial_features_are_the_first_seven_channels_of_the_block_that_sfid_names(inception):
    """By running the blocks one after another, without the hook."""
    extractor = Extractor("inception-v3-compat", ["fid", "sfid"], str(inception / "inception.safetensors"))
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = extractor(images)
    assert found["spatial"].shape == (2, 7 * 17 * 17) and found["2048"].shape == (2, 2048)
    net = extractor.network
    x = feature_extractors.FeatureExtractorInceptionV3.forward.__globals__["interpolate_bilinear_2d_like_tensorflow1x"](
        images.float(), size=(299, 299), align_corners=False
    )
    x = (x - 128) / 128
    with torch.no_grad():
        for name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2",
                     "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c"):  # fmt: skip
            x = getattr(net, name)(x)
        expected = torch.stack([net.Mixed_6d.branch1x1(x)[:, c] for c in range(7)], dim=-1).flatten(1)
    torch.testing.assert_close(found["spatial"], expected)


def test_inception_with_local_weights_needs_no_network_and_serves_all_metrics(inception, tmp_path):
    one, other = folder_of(tmp_path / "one", 10, 0, size=16, colour=True), folder_of(tmp_path / "other", 6, 1, size=16, colour=True)
    options = {"metrics": "fid,sfid,kid,prc,is", "allow_few_images": True}
    result = scored(tmp_path, one, reference=other, measure={"feature_extractor_weights": str(inception / "inception.pth")}, **options)
    assert {"fid", "sfid", "is", "kid", "precision"} <= set(result["targets"][0])
    as_safetensors = Extractor("inception-v3-compat", ["fid"], str(inception / "inception.safetensors"))
    assert result["extractor"]["name"] == "inception-v3-compat"
    assert result["extractor"]["weights_sha256"] == as_safetensors.weights_sha256  # both kinds of file hold the same


def test_without_weights_and_network_it_says_what_to_do(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("Temporary failure in name resolution")

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", offline)
    with pytest.raises(InputError, match=r"cannot be fetched.*download them \(https://.*--feature_extractor_weights.*metrics colour"):
        Extractor("inception-v3-compat", ["fid"])


class Hostile:
    def __reduce__(self):
        return (exec, ("raise SystemExit('ran')",))


def test_weights_that_cannot_be_read_or_are_of_another_network_are_refused(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    for name, why in (("broken.safetensors", "is damaged, or holds more than tensors"), ("missing.pth", "does not exist")):
        with pytest.raises(InputError, match=f"{name} {why}"):
            Extractor("inception-v3-compat", ["fid"], str(tmp_path / name))
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"other\.pth are no weights of inception-v3-compat"):
        Extractor("inception-v3-compat", ["fid"], str(tmp_path / "other.pth"))


def test_the_digits_classifier_tells_digits_apart(tmp_path):
    from debias_diffusers.data.images import decode, to_array

    source = open_source(DataConfig(dataset="digits", resolution=8, class_conditional=True))
    read = [source.read(k) for k in range(0, len(source), 5)]  # those that it has not learned
    images = torch.stack([torch.from_numpy(to_array(decode(data, where))) for data, _, where in read]).expand(-1, 3, -1, -1)
    logits = Extractor("digits", ["is"])(images)["logits"]
    assert (logits.argmax(1) == torch.tensor([label for _, label, _ in read])).float().mean() > 0.97


def test_the_emoji_classifier_tells_categories_apart():
    from debias_diffusers.data.images import decode, to_array

    source = open_source(DataConfig(dataset="emoji", resolution=16, class_conditional=True))
    read = [source.read(k) for k in range(0, len(source), 5)]  # those that it has not learned
    images = torch.stack([torch.from_numpy(to_array(decode(data, where))) for data, _, where in read])
    logits = Extractor("emoji", ["is"])(images)["logits"]
    assert (logits.argmax(1) == torch.tensor([label for _, label, _ in read])).float().mean() > 0.65


def test_the_sliced_distance_and_the_bias_of_channels_of_images_that_are_shifted():
    """Of equal images that are d brighter every projection moves by d times the sum of its direction."""
    measure = Measure(MeasureConfig(metrics="swd,channel_bias", cache_dir=""), "emoji", "cpu")
    images = torch.randint(0, 200, (60, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shifted = images.flip(0) + torch.tensor([10, 20, 30], dtype=torch.uint8)[:, None, None]
    reference, target = (Sample.of(measure.features(each)) for each in (images, shifted))
    found = metrics.figures(target, reference, measure.layers)
    assert [found[name] for name in ("red_bias", "green_bias", "blue_bias")] == pytest.approx([10, 20, 30])
    moved = (target.features["projections"].flip(0) - reference.features["projections"]).square().mean().sqrt()
    assert found["swd"] == pytest.approx(moved.item(), rel=1e-4)
    assert found["swd"] == pytest.approx(math.sqrt((100 + 400 + 900) / 3), rel=0.2)  # on average over directions
    same = metrics.figures(reference, Sample.of(measure.features(images[:30])), measure.layers)["swd"]
    assert 0 < same < found["swd"]


# ---- what is compared ------------------------------------------------------------------------------------------------


def test_a_model_its_folder_and_its_npz_have_the_same_figures(trained, tmp_path):
    """Written by sample.py and read back, and drawn on the fly."""
    for kind in ("png", "npz"):
        code, _, err = run("sample.py", trained, "--format", kind, "--num_images", 80, "--steps", 5, "--output_dir", tmp_path / kind)
        assert code == 0, err
    result = scored(
        tmp_path,
        trained,
        tmp_path / "png",
        tmp_path / "npz" / "samples.npz",
        reference="digits",
        num_images=80,
        steps="5",
        metrics="fid,prc,colour",
    )
    rows = [{name: row[name] for name in ("fid", "precision", "recall", "brightness_bias")} for row in result["targets"]]
    assert rows[0] == pytest.approx(rows[1]) and rows[1] == pytest.approx(rows[2])
    assert result["reference"] == {"name": "digits", "images": 1797, "resolution": 8}
    assert result["targets"][0]["scheduler"] == "unipc" and "scheduler" not in result["targets"][1]
    assert result["halves_of_the_reference"]["fid"] < rows[0]["fid"]


DRAWN = {"resolution": 8, "images": 100, "steps": 20}
ROWS = [
    {**DRAWN, "target": "runs/a", "training_step": 400, "scheduler": "unipc", "network_evaluations": 20, "fid": 1.25},
    {**DRAWN, "target": "runs/flow", "training_step": 200, "scheduler": "flow_heun", "network_evaluations": 39, "fid": 10.5},
    {"target": "photos", "resolution": 16, "images": 90, "fid": 0.5, "intervals": {"fid": (0.25, 0.75)}},
]


def test_a_table_is_aligned_and_valid_markdown():
    result = {"targets": ROWS, "halves_of_the_reference": {"fid": 0.1}, "reference": {"images": 100}}
    head, line, *rows = results.table(result).split("\n")
    assert len({len(row) for row in (head, line, *rows)}) == 1
    assert [cell.strip() for cell in head.strip("|").split("|")] == ["target", "scheduler", "steps", "network evaluations", "images", "fid"]
    assert set(line) == set("| -") and all(set(cell.strip()) == {"-"} for cell in line.strip("|").split("|"))
    assert {row.count("|") for row in rows} == {7} and "| 0.5 (0.25 to 0.75) |" in rows[2] and rows[3].startswith("| two halves of")


def test_what_differs_between_targets_beside_the_model_is_said():
    assert results.unequal(ROWS) == [
        "the targets differ in training step: runs/a 400, runs/flow 200",
        "the targets differ in resolution: runs/a 8, runs/flow 8, photos 16",
        "the targets differ in scheduler: runs/a unipc, runs/flow flow_heun",
        "the targets differ in network evaluations: runs/a 20, runs/flow 39",
        "the targets differ in images: runs/a 100, runs/flow 100, photos 90; --num_images 90 takes as many of each",
    ]
    assert results.unequal(ROWS[:1]) == results.unequal([ROWS[0], {**ROWS[0], "target": "runs/b"}]) == []
    curves = [{**row, "steps": steps, "network_evaluations": steps} for steps in (5, 10) for row in (ROWS[0], {**ROWS[0], "target": "b"})]
    assert results.unequal(curves) == []  # of every target the same


def test_too_few_images_of_any_target_are_said_before_features_are_computed(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(Measure, "sample", lambda *_: pytest.fail("computed"))
    good, few = folder_of(tmp_path / "good", 70, 0), folder_of(tmp_path / "few", 20, 1)
    for targets, count, named in (((good, trained, few), None, "few has 20 images"), ((trained,), 50, "whole has 50 images")):
        with pytest.raises(InputError, match=f"{named}, but metrics fid of these features need 65"):
            scored(tmp_path, *targets, reference="digits", metrics="fid", num_images=count)
    with pytest.raises(InputError, match=r"few has 20 images, but metrics fid"):
        scored(tmp_path, good, reference=few, metrics="fid", measure={"feature_extractor": "digits"})


def test_statistics_stand_for_the_images_of_a_reference(tmp_path):
    target = folder_of(tmp_path / "target", 70, 5)
    measure = {"metrics": "fid,colour", "cache_dir": "", "num_threads": 1}
    statistics.stats(
        StatsConfig(reference="digits", out=str(tmp_path / "stats.safetensors"), measure=MeasureConfig(resolution=8, **measure))
    )
    by_images = scored(tmp_path, target, reference="digits", metrics="fid,colour")
    by_statistics = scored(tmp_path, target, reference=tmp_path / "stats.safetensors", metrics="fid,colour")  # knows its extractor
    assert by_statistics["targets"] == by_images["targets"] and by_statistics["halves_of_the_reference"] is None
    with pytest.raises(InputError, match="metric kid compares images, but the reference is statistics"):
        scored(tmp_path, target, reference=tmp_path / "stats.safetensors", metrics="kid", measure={"feature_extractor": "digits"})
    big = folder_of(tmp_path / "big", 70, 6, size=16)
    with pytest.raises(InputError, match="made with resolution 8, not 16"):
        scored(tmp_path, big, reference=tmp_path / "stats.safetensors", metrics="fid", measure={"feature_extractor": "digits"})


def test_reference_files_of_adm_are_read(inception, loaded_once, tmp_path):
    target, other = folder_of(tmp_path / "target", 2, 0, size=16, colour=True), folder_of(tmp_path / "other", 3, 1, size=16, colour=True)
    path = str(inception / "inception.safetensors")
    options = {"metrics": "fid,sfid", "measure": {"feature_extractor_weights": path}, "allow_few_images": True}
    by_images = scored(tmp_path, target, reference=other, **options)
    extractor = measure.Extractor("inception-v3-compat", ["fid", "sfid"], path)
    images = torch.stack([torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in sorted(other.iterdir())])
    found = {layer: value.double().numpy() for layer, value in extractor(images).items()}
    statistics = {
        f"{name}{suffix}": value
        for layer, suffix in (("2048", ""), ("spatial", "_s"))
        for name, value in (("mu", found[layer].mean(0)), ("sigma", np.cov(found[layer], rowvar=False)))
    }
    np.savez(tmp_path / "reference.npz", **statistics)
    by_statistics = scored(tmp_path, target, reference=tmp_path / "reference.npz", **options)
    for name in ("fid", "sfid"):
        assert by_statistics["targets"][0][name] == pytest.approx(by_images["targets"][0][name], rel=1e-5)
    # As ADM has them: statistics of a whole data set, and some images, here a single one of another set.
    np.savez(tmp_path / "both.npz", arr_0=np.array(Image.open(target / "0000.png"))[None], **statistics)
    by_both = scored(tmp_path, target, reference=tmp_path / "both.npz", **options)
    assert by_both["targets"][0]["sfid"] == by_statistics["targets"][0]["sfid"]
    np.savez(tmp_path / "images.npz", arr_0=np.array(Image.open(target / "0000.png"))[None])
    with pytest.raises(InputError, match=r"images\.npz has 1 images, but metrics fid,sfid"):
        scored(tmp_path, target, reference=tmp_path / "images.npz", **options)
    np.savez(tmp_path / "batch.npz", images.permute(0, 2, 3, 1).numpy())
    as_batch = scored(tmp_path, target, reference=tmp_path / "batch.npz", metrics="colour", allow_few_images=True)
    by_folder = scored(tmp_path, target, reference=other, metrics="colour", allow_few_images=True)
    assert as_batch["targets"] == by_folder["targets"]


def test_curves_over_checkpoints_solvers_and_steps(trained, tmp_path):
    result = scored(
        tmp_path, trained, reference="digits", metrics="fid,colour", num_images=80, checkpoints="all", steps="2,4", schedulers="ddim,unipc",
        output=str(tmp_path / "curves.json"),
    )  # fmt: skip
    rows = result["targets"]
    assert len(rows) == 2 * 2 * 2 and {row["checkpoint"] for row in rows} == {18, 24}
    assert len({row["fid"] for row in rows}) == 8
    assert json.loads((tmp_path / "curves.json").read_text())["targets"] == rows
    assert Image.open(tmp_path / "curves.png").size[0] > 500


def test_a_curve_is_of_one_sampling_seed(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(results, "plot_curves", lambda lines, along: drawn.update(lines) or b"")
    drawn_by = {"target": "a", "scheduler": "ddim"}
    rows = [{**drawn_by, "steps": steps, "sampling_seed": seed, "fid": 1.0 * seed} for seed in (0, 1) for steps in (2, 4)]
    results.draw_curves(rows, tmp_path / "curves.png")
    assert drawn["fid"] == {f"a ddim seed {seed}": [(2, seed), (4, seed)] for seed in (0, 1)}


def test_steps_are_along_the_curves_of_a_run_of_one_checkpoint_beside_images(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(results, "plot_curves", lambda lines, along: drawn.append((along, lines["fid"])) or b"")
    rows = [{"target": "a", "scheduler": "ddim", "checkpoint": 24, "steps": steps, "fid": 1.0} for steps in (2, 4)]
    results.draw_curves([*rows, {"target": "photos", "fid": 2.0}], tmp_path / "curves.png")
    assert drawn == [("steps of the solver", {"a ddim 24": [(2, 1.0), (4, 1.0)]})]


def test_names_are_shown_as_they_are_in_figures(monkeypatch):
    shown = []
    monkeypatch.setattr(plots, "png_of", lambda figure: shown.extend(figure.axes[0].get_legend().get_texts()) or b"")
    plots.plot_curves({"fid": {name: [(1, 1.0), (2, 2.0)] for name in ("_first", "a$b", r"$\x$")}}, "step")
    assert [text.get_text() for text in shown] == [" _first", r"a\$b", r"\$\x\$"]
    figure = shown[0].figure
    figure.canvas.draw()  # which fails of what is no formula


@pytest.mark.parametrize("flags", [{"channels": 1}, {"split": "test"}, {"image_column": "photo"}, {"skip_bad": True}])
@pytest.mark.parametrize("file", ["theirs.npz", "stats.safetensors"])
def test_flags_of_a_data_set_are_refused_for_a_reference_in_one_file(flags, file):
    (name,), config = flags, MeasureConfig(metrics="colour", **flags)
    (problem,) = score_problems(ScoreConfig(targets=("drawn",), reference=file, measure=config))
    assert problem.startswith(f"{name} is ") and f"reference {file} is a file" in problem
    assert stats_problems(StatsConfig(reference=file, out="s.safetensors", measure=config)) == [problem]
    for other in ("photos/", None):
        assert score_problems(ScoreConfig(targets=("drawn",), reference=other, measure=config)) == []


@pytest.mark.parametrize(
    "options, said",
    [
        ({"steps": "2,3000"}, "steps is 3000, but the model has 1000 timesteps"),
        ({"schedulers": "ddim,flow_euler"}, "scheduler is flow_euler, but the model is no rectified flow"),
        ({"checkpoints": "24,25"}, "has no checkpoint at step 25; take some of 18, 24"),
    ],
)
def test_what_cannot_be_drawn_is_said_before_anything_is(trained, tmp_path, monkeypatch, options, said):
    monkeypatch.setattr(score, "generated_images", lambda *_: pytest.fail("drawn"))
    with pytest.raises(InputError, match=said):
        scored(tmp_path, trained, reference="digits", metrics="colour", num_images=8, **options)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"class_labels": "balanced"}, "class_labels is balanced, but .*exported is unconditional"),
        ({"weights": "raw"}, "weights is raw, but .*exported has no checkpoints"),
        ({"guidance_scale": 2.0}, "exported: guidance_scale is 2.0, but the model was not trained with dropped labels"),
    ],
)
def test_a_flag_that_fits_the_first_model_alone_is_an_error_before_that_is_drawn(
    trained, trained_by_class, tmp_path, monkeypatch, options, said
):
    shutil.copytree(trained, tmp_path / "exported", ignore=shutil.ignore_patterns("checkpoints"))
    monkeypatch.setattr(PixelJob, "draw", lambda *_: pytest.fail("drawn"))
    photos = folder_of(tmp_path / "photos", 8, 0)
    with pytest.raises(InputError, match=said):
        scored(tmp_path, trained_by_class, photos, tmp_path / "exported", reference="digits", metrics="colour", num_images=8, **options)


def test_a_model_of_which_several_curves_are_drawn_is_loaded_once_for_each_checkpoint(trained, tmp_path, monkeypatch):
    load, loaded = score.load_model, []
    monkeypatch.setattr(score, "load_model", lambda config, device, step: loaded.append(step) or load(config, device, step))
    options = {"reference": "digits", "metrics": "colour", "num_images": 4}
    found = scored(tmp_path, trained, checkpoints="all", steps="2,3", sampling_seeds="0,1", **options)["targets"]
    assert loaded == [18, 24] and len(found) == 8
    (one,) = scored(tmp_path, trained, checkpoints="24", steps="3", seed=1, **options)["targets"]
    assert one["brightness_bias"] == found[7]["brightness_bias"] and (found[7]["steps"], found[7]["sampling_seed"]) == (3, 1)


def test_features_are_computed_once_and_a_damaged_cache_is_made_anew(tmp_path, monkeypatch):
    one, other = folder_of(tmp_path / "one", 70, 0), folder_of(tmp_path / "other", 70, 1)
    first = scored(tmp_path, one, reference=other, measure={"feature_extractor": "digits"})
    call = Extractor.__call__
    with monkeypatch.context() as patch:  # but for one black image, which says how many features there are
        patch.setattr(Extractor, "__call__", lambda self, batch: call(self, batch) if len(batch) == 1 else pytest.fail("computed again"))
        assert scored(tmp_path, one, reference=other, measure={"feature_extractor": "digits"}) == first
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert scored(tmp_path, one, reference=other, measure={"feature_extractor": "digits"}) == first
    sound = {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    for change in (
        lambda kept: {layer: value[:-1] for layer, value in kept.items()},
        lambda kept: {layer: value * math.nan for layer, value in kept.items()},
        lambda kept: {layer: value for layer, value in kept.items() if layer != "64"},
        lambda kept: {layer: value.flatten() for layer, value in kept.items()},
    ):
        for path, data in sound.items():
            path.write_bytes(save(change(load(data))))  # a whole file of something else
        assert scored(tmp_path, one, reference=other, measure={"feature_extractor": "digits"}) == first
    Image.new("L", (8, 8), 255).save(one / "0003.png")  # another image of the same name
    assert scored(tmp_path, one, reference=other, measure={"feature_extractor": "digits"}) != first


def test_a_folder_that_was_a_reference_is_still_looked_at_as_a_target(tmp_path):
    mixed = folder_of(tmp_path / "mixed", 6, 0)
    Image.new("L", (9, 9)).save(mixed / "0004.png")
    scored(tmp_path, folder_of(tmp_path / "target", 6, 1), reference=mixed, metrics="colour")
    with pytest.raises(InputError, match=r"0004\.png has 9x9 pixels"):
        scored(tmp_path, mixed, reference="digits", metrics="colour")


def test_an_npz_reference_keeps_its_size_and_is_read_once(trained, tmp_path, monkeypatch):
    np.savez(tmp_path / "eight.npz", np.random.default_rng(0).integers(0, 255, (9, 8, 8, 3), dtype=np.uint8))
    big = folder_of(tmp_path / "big", 6, 1, size=16)
    with pytest.raises(InputError, match=r"eight\.npz has images of 8 pixels.* the targets have 16.*--resolution 8"):
        scored(tmp_path, big, reference=tmp_path / "eight.npz", metrics="colour")
    result = scored(tmp_path, big, reference=tmp_path / "eight.npz", metrics="colour", measure={"resolution": 8})
    assert result["reference"]["resolution"] == 8
    seen = []
    original = Measure.sample
    monkeypatch.setattr(Measure, "sample", lambda self, images: seen.append(images.name) or original(self, images))
    result = scored(tmp_path, trained, reference=tmp_path / "eight.npz", metrics="colour", steps="1")
    assert sorted(seen) == sorted([str(tmp_path / "eight.npz"), str(trained)])
    assert result["targets"][0]["images"] == 9 and result["reference"]["resolution"] == 8


def test_targets_of_another_resolution_than_a_reference_in_one_file_are_refused_before_any_is_measured(tmp_path, monkeypatch):
    small, big = folder_of(tmp_path / "small", 9, 0), folder_of(tmp_path / "big", 9, 1, size=16)
    np.savez(tmp_path / "eight.npz", np.zeros((9, 8, 8, 3), dtype=np.uint8))
    np.savez(tmp_path / "sixteen.npz", np.zeros((9, 16, 16, 3), dtype=np.uint8))
    made = MeasureConfig(metrics="colour", resolution=8, cache_dir="", num_threads=1)
    statistics.stats(StatsConfig(reference="digits", out=str(tmp_path / "stats.safetensors"), measure=made))
    monkeypatch.setattr(Measure, "sample", lambda *_: pytest.fail("measured"))
    for target in (big, tmp_path / "sixteen.npz"):
        with pytest.raises(InputError, match=r"eight\.npz has images of 8 pixels"):
            scored(tmp_path, small, target, reference=tmp_path / "eight.npz", metrics="colour")
        with pytest.raises(InputError, match="made with resolution 8, not 16"):
            scored(tmp_path, small, target, reference=tmp_path / "stats.safetensors", metrics="colour")


@pytest.mark.nightly
def test_two_processes_measure_what_one_measures(tmp_path):
    one = folder_of(tmp_path / "one", 75, 0)
    flags = ["--reference", "digits", "--metrics", "fid,kid,prc,colour", "--batch_size", 16, "--num_threads", 1, "--cache_dir", ""]
    flags += ["--bootstrap", 21]
    code, err = launched(2, "eval.py", "score", one, *flags, "--output", tmp_path / "two.json")
    assert code == 0, err
    (alone,) = scored(tmp_path, one, reference="digits", metrics="fid,kid,prc,colour", bootstrap=21)["targets"]
    (shared,) = json.loads((tmp_path / "two.json").read_text())["targets"]
    for name, ends in alone.pop("intervals").items():
        assert shared["intervals"][name] == pytest.approx(ends), name
    del shared["intervals"]
    assert shared == pytest.approx(alone)


def run_on(root, **values):
    """A folder that looks like a run which was trained on some data."""
    (root / "checkpoints").mkdir(parents=True)
    data = {"dataset": "faces", "split": "train", "image_column": None, "label_column": None}
    (root / "config.json").write_text(json.dumps(data | values))
    return str(root)


def test_a_reference_that_is_left_out_is_the_data_of_the_run_but_flags_win(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faces").mkdir()
    one = run_on(tmp_path / "one", split="test", image_column="photo", label_column="kind")
    for given, split, column in (({}, "test", "photo"), ({"split": "train", "image_column": "sketch"}, "train", "sketch")):
        for config in (MeasureConfig(**given), BitsConfig(model=one, **given)):
            data = reference.reference_data(config, None, [str(tmp_path), one])
            assert (data.dataset, data.split, data.image_column, data.label_column) == ("faces", split, column, "kind")
            named = reference.reference_data(config, "other", [one])
            assert (named.dataset, named.split, named.image_column) == ("other", "train", given.get("image_column"))


def test_the_reference_of_a_run_with_labels_is_the_images_that_it_was_trained_on(tmp_path, monkeypatch):
    """A training with labels takes the images of a folder that have one, and others may lie beside these."""
    monkeypatch.chdir(tmp_path)
    for name in ("cat/0", "cat/1", "dog/0", "beside"):
        (tmp_path / "faces" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "faces" / f"{name}.png")
    with_labels, without = (run_on(tmp_path / str(on), class_conditional=on) for on in (True, False))
    for targets, images in (((with_labels,), 3), ((without,), 4), ((with_labels, without), 4)):
        config = score._completed(ScoreConfig(targets=targets), Accelerator(cpu=True))
        assert ReferenceFeatures(config.reference, Measure(config.measure, "digits", "cpu"), True).count() == images
    named = ScoreConfig(targets=(with_labels,), reference="faces")
    assert len(open_source(reference.reference_data(named.measure, named.reference))) == 4


@pytest.mark.parametrize("more", [{}, {HELD_OUT: "0"}, {"captions": "0"}, {"skipped": [1]}])
def test_data_that_moved_with_their_run_are_found_by_the_path_that_was_typed(more, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faces").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "faces" / "0.png")
    data = open_source(DataConfig(dataset="faces")).fingerprint() | more
    monkeypatch.setattr(checkpoints, "newest_state", lambda _: {"paths": {"dataset": str(tmp_path / "before" / "faces")}, "data": data})
    assert reference.reference_data(MeasureConfig(), None, [run_on(tmp_path / "one")]).dataset == "faces"


def test_runs_of_different_data_are_not_compared_with_the_data_of_the_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faces").mkdir()
    one, other, third = (run_on(tmp_path / name, split=split) for name, split in (("one", "a"), ("other", "b"), ("third", "a")))
    assert reference.reference_data(MeasureConfig(), None, [one, third]).split == "a"
    with pytest.raises(InputError, match=r"other was trained on split b, not a as .*one; add --reference"):
        score.score(ScoreConfig(targets=(one, other)))


def test_redrawn_sets_are_dealt_to_the_processes_and_take_few_subsets(monkeypatch):
    one, other = (Sample.of({"x": normal(30, [0.0, 1], [1.0, 1], seed=seed)}) for seed in (0, 1))
    config, layers = ScoreConfig(targets=(), bootstrap=20), {"fid": "x", "kid": "x"}
    asked = []
    kid = metrics.kid_features_to_metric
    monkeypatch.setattr(metrics, "KID_SUBSET", 25)
    monkeypatch.setattr(metrics, "kid_features_to_metric", lambda *a, **more: asked.append(more["kid_subsets"]) or kid(*a, **more))
    monkeypatch.setattr(score, "gather_object", lambda mine: mine)
    alone, first, second = (
        score._bootstrap(config, SimpleNamespace(process=k, processes=n, layers=layers), one, other, "one")
        for k, n in ((0, 1), (0, 2), (1, 2))
    )
    assert (alone[::2], alone[1::2]) == (first, second) and len({row["fid"] for row in alone}) == 20
    assert set(asked) == {10}
    metrics.figures(one, other, layers)
    assert asked[-1] == 100


def test_a_name_with_points_keeps_them(tmp_path):
    target = folder_of(tmp_path / "target", 5, 0)
    for given, stem in (("fid-0.995", "fid-0.995"), ("a.json", "a"), ("b.png", "b")):
        scored(tmp_path, target, reference=target, metrics="colour", output=str(tmp_path / "out" / given))
        assert (tmp_path / "out" / f"{stem}.json").is_file()


def test_compare_gives_intervals(trained, tmp_path):
    flags = [trained, "--num_images", 70, "--steps", 3, "--metrics", "fid,colour", "--bootstrap", 20, "--num_threads", 1]
    code, out, err = run("eval.py", "compare", *flags, "--cache_dir", tmp_path, "--output", tmp_path / "out.json")
    assert code == 0, err
    (row,) = json.loads((tmp_path / "out.json").read_text())["targets"]
    low, high = row["intervals"]["fid"]
    assert low < row["fid"] < high and f"({low:.4g} to {high:.4g})" in out


# ---- while training --------------------------------------------------------------------------------------------------


def measured_by(monitor):
    """What measures while training, in the first process, of images that nobody draws."""
    images = SimpleNamespace(batches=lambda *_: iter(()), task=SimpleNamespace(conditions=lambda *_, **__: []))
    return Evaluation(every=1, images=images, monitor=monitor, measured=MetricHistory(), run=SimpleNamespace())


def test_the_best_checkpoint_is_the_nearest_to_no_bias_and_starts_anew_with_another_metric():
    evaluation = measured_by(None)

    def best_after(step, figures, about):
        evaluation.monitor = SimpleNamespace(figures=lambda _: figures, about=about, count=1)
        evaluation.measure(step)
        return evaluation.measured.best["step"]

    dark, digits, other = {"brightness_bias": -9.0}, {"extractor": "digits"}, {"extractor": "other"}
    assert best_after(1, {"brightness_bias": 2.0}, digits) == 1
    assert best_after(2, dark, digits) == 1
    assert best_after(3, {"brightness_bias": math.nan}, digits) == 1
    assert best_after(4, dark, other) == 4
    assert best_after(5, {"fid": math.nan}, other) == 4
    assert best_after(6, {"fid": 99.0}, other) == 6
    assert best_after(7, {"fid": 98.0}, other) == 7
    evaluation.measured.best = {"step": 1, "value": 0.0}  # of a checkpoint from before it said what was measured
    assert best_after(8, {"fid": 99.0}, other) == 8


def test_a_measurement_that_fails_does_not_end_the_training():
    def broken(_):
        return metrics.figures(Sample.of({"x": torch.full((5, 2), math.nan)}), Sample.of({"x": torch.zeros(5, 2)}), {"fid": "x"})

    evaluation = measured_by(SimpleNamespace(figures=broken, count=1))
    assert evaluation.measure(1) == {} and evaluation.measured.best is None


def test_a_training_that_draws_too_few_images_is_refused_at_its_start(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # of the cache
    data = DataConfig(dataset=str(folder_of(tmp_path / "data", 12, 0)), resolution=8)
    for metric, least in (("prc", 4), ("is", 10), ("kid", 2), ("colour", 4)):
        run_config = RunConfig(eval_every=1, eval_metrics=metric, eval_images=least - 1, feature_extractor="digits")
        with pytest.raises(InputError, match=f"eval_metrics {metric} need {least} images, but there are {least - 1}"):
            monitor.Monitor(TrainConfig(data=data, run=run_config), open_source(data), "cpu")


def test_images_that_are_held_out_do_not_count_for_what_metrics_need(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # of the cache
    folder = str(folder_of(tmp_path / "data", 66, 0))
    run_config = RunConfig(eval_every=1, eval_metrics="fid", feature_extractor="digits")
    for share, trained in ((0.0, 66), (0.1, 59)):
        data = DataConfig(dataset=folder, resolution=8, validation_split=share)
        with pytest.raises(InputError, match=f"need 65 images, but there are {trained}") if share else nullcontext():
            monitor.Monitor(TrainConfig(data=data, run=run_config), open_source(data), "cpu")


def test_repeats_of_folders_are_part_of_what_names_the_features_of_the_training_images(tmp_path):
    """As many images with and without: two that do not count, and two that count twice."""
    for name, brightness in (("0_dark", 10), ("2_light", 200)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for k in range(2):
            Image.new("RGB", (8, 8), (brightness + k,) * 3).save(tmp_path / "data" / name / f"{k}.png")
    data = DataConfig(dataset=str(tmp_path / "data"), resolution=8)
    run_config = RunConfig(eval_every=1, eval_metrics="colour", eval_images=4, cache_dir=str(tmp_path / "cache"))
    plain = open_source(data)
    means = []
    for source in (plain, RepeatedSource(plain, folder_repeats(plain))):
        measured = monitor.Monitor(TrainConfig(data=data, run=run_config), plain, "cpu")
        measured.read(source)
        means.append(measured.reference.features["colour"].mean().item())
    assert means == [105.5, 200.5]


# ---- the claim -------------------------------------------------------------------------------------------------------


@pytest.fixture
def claim(monkeypatch):
    spec = importlib.util.spec_from_file_location("claim", ROOT / "benchmarks" / "claim.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "claim", module)  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


def test_a_run_of_the_claim_that_says_nothing_is_told_by_its_exit_code(claim):
    with pytest.raises(SystemExit, match="exit code 3"):
        claim.run("-c", "raise SystemExit(3)")


def test_a_failure_of_the_claim_ends_it_without_the_runs_that_wait(claim, tmp_path, monkeypatch):
    began, over = [], threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait=True, cancel_futures=False):
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            over.set()
            super().shutdown(wait)

    def run(*words):
        began.append(words)
        if len(began) == 2:
            raise SystemExit("of the second")
        if len(began) > 2:
            over.wait(HANG)

    monkeypatch.setattr(claim, "run", run)
    monkeypatch.setattr(claim, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(sys, "argv", ["claim.py", str(tmp_path), "--jobs", "1"])
    with pytest.raises(SystemExit, match="of the second"):
        claim.main()
    assert len(began) <= 3


def test_a_unit_of_the_claim_that_was_killed_goes_on_where_it_was(claim, tmp_path, monkeypatch):
    """The training resumes by its output directory; scores that are there are not computed again, and figures are written at the end."""
    plan, trained, asked = claim.PLANS["emoji"], [], []
    unit = plan.units[0]

    def train(words):
        trained.append(train_config(words, None))
        return 0

    def evaluate(words):
        asked.append(words[words.index("--weights") + 1])
        if len(asked) == 2:
            raise SystemExit("killed")
        row = {"target": words[1], "images": 1000, "steps": int(words[words.index("--steps") + 1].split(",")[0]), "fid": len(asked)}
        scores = {"targets": [row], "halves_of_the_reference": {"fid": 2.0}}
        (tmp_path / words[words.index("--output") + 1]).write_text(json.dumps(scores))
        return 0

    monkeypatch.setattr(cli, "train", train)
    monkeypatch.setattr(cli, "evaluate", evaluate)
    (tmp_path / "runs" / unit.name).mkdir(parents=True)
    with pytest.raises(SystemExit, match="killed"):
        claim.compute(unit, plan, "emoji", tmp_path, {"mixed_precision": "no"}, False)
    assert not claim.figures_of(unit, tmp_path).exists()
    claim.compute(unit, plan, "emoji", tmp_path, {"mixed_precision": "no"}, False)
    assert trained[0] == trained[1] and asked == ["ema", "raw", "raw", "ema"]
    optim = trained[0].optimization
    assert (optim.max_steps, optim.seed, trained[0].run.output_dir) == (2000, 0, str(tmp_path / "runs" / unit.name))
    found = json.loads(claim.figures_of(unit, tmp_path).read_text())
    assert [(row["kind"], row["fid"]) for row in found["rows"]] == [("training", 1), ("raw", 3), ("sampling", 4)]


@pytest.mark.parametrize("data", ["emoji", "digits", "digits_text"])
def test_the_trainings_of_the_claim_are_those_that_a_command_can_begin(claim, data):
    plan = claim.PLANS[data]
    for unit in (unit for unit in plan.units if unit.seed == 0):
        config = train_config(["--config", data, *claim.words_of(claim.USUAL | plan.flags | unit.flags)], None)
        assert train_problems(config) == [] and make_objective(config.objective).weights is not None
        checkpoints = range(config.run.checkpoint_every, config.optimization.max_steps + 1, config.run.checkpoint_every)
        assert {step for scores in unit.scores for step in scores.checkpoints} <= set(checkpoints)
        assert config.run.keep_checkpoints >= len(checkpoints) + 20  # those of interruptions push none of these out
        rates = {scores.weights for scores in unit.scores} - {"ema", "raw"}
        assert rates <= set(map(str, config.optimization.ema_decay))


def test_units_of_the_claim_are_merged_by_their_files(claim, tmp_path):
    """Planted figures: debiased is 2 nearer than constant, without a seed; min_snr is in four seeds, in one 0.1 farther; p2 is min_snr."""
    plan = claim.PLANS["emoji"]
    assert len({unit.name for unit in plan.units}) == len(plan.units) == 46
    (tmp_path / "units").mkdir()
    apart = {"constant": [0.0] * 5, "debiased": [-2.0] * 4, "min_snr": [-2.0, -2.0, 0.1, -2.0, -2.0], "p2": [-2.0, -2.0, 0.1]}
    for unit in plan.units:
        if unit.group != "shift 16" or unit.seed >= len(apart.get(unit.variant, ())):
            continue
        distance = 10 + unit.seed + apart[unit.variant][unit.seed]
        figures = {"fid": distance, "swd": 1, "colour_distance": 3, "brightness_bias": -2, "red_bias": -3, "green_bias": 2, "blue_bias": -1}
        rows = [
            {"kind": scores.kind, "checkpoint": step, "steps": steps} | figures
            for scores in unit.scores
            for step in scores.checkpoints
            for steps in scores.steps
        ]
        about = {
            "unit": unit.name,
            "seed": unit.seed,
            "trial": False,
            "device": "A",
            "torch": "2",
            "training_seconds": 1,
            "evaluation_seconds": 2,
            "halves_of_the_reference": {"fid": 2.06},
        }
        claim.figures_of(unit, tmp_path).write_text(json.dumps(about | {"rows": rows}))
    said = claim.report("emoji", tmp_path, False)
    assert said == (tmp_path / "claim-emoji.md").read_text() and (tmp_path / "claim-emoji.png").exists()
    assert said.startswith("17 of 46 units, on A, torch 2; 3 seconds") and "emoji-shift16-debiased-seed4" in said.splitlines()[0]
    assert "Two halves of the data are at a distance of 2.1." in said.splitlines()[0]
    # The plan decides at the end, and calls nothing a result that has not one sign in all seeds, whatever its interval.
    assert "| shift 16 | debiased | distance | -2.00 (-2.00 to -2.00), 4 seeds |" in said
    assert said.count("**-2.00 (-2.00 to -2.00), 4 seeds** |\n") == said.count("**") / 2 == 1
    assert "-1.58 (-2.75 to -0.41), 5 seeds |\n" in said
    assert "| shift 16 | constant | 5 | 12.0 (10.0 to 14.0), bias 2.0 |" in said
    decided = (
        "At the end, 1 of 8 comparisons are results by the plan's rule (p2 has the figures of min_snr and is not counted); if no weight "
    )
    assert decided + "made a difference, 0.4 would be." in said
    for path in (tmp_path / "units").glob("*-seed[234].json"):
        path.unlink()
    assert "Of fewer than three seeds the plan decides nothing." in claim.report("emoji", tmp_path, False)


@pytest.mark.parametrize("data", ["digits", "digits_text", "emoji"])
def test_the_tables_of_the_claim_are_those_of_its_units(claim, data, tmp_path):
    shutil.copytree(ROOT / "benchmarks" / "units", tmp_path / "units")
    page = (ROOT / "docs" / "claim.md").read_text()
    parts = claim.report(data, tmp_path, False).split("\n\n")
    tables = [part for part in parts if part.startswith("|")]
    assert len(tables) == 4 and all(table.strip() in page for table in tables)
    (decided,) = [part for part in parts if part.startswith("At the end, ")]
    assert decided in " ".join(page.split())


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.row(51, "damaged, few or unusual images are named, and metrics equal those of a direct call of torch-fidelity")
def test_bad_images_and_too_few_of_them_are_named(tmp_path):
    good = folder_of(tmp_path / "good", 20, 0)
    with pytest.raises(InputError, match=r"good has 20 images, but metrics fid of these features need 65; .*--allow_few_images"):
        scored(tmp_path, good, reference="digits", metrics="fid")
    many, digits = folder_of(tmp_path / "many", 70, 1), {"feature_extractor": "digits"}
    scored(tmp_path, good, reference=many, metrics="fid", allow_few_images=True, measure=digits)
    scored(tmp_path, good, reference=many, metrics="kid,prc,is,colour", measure=digits)
    for count, metric, least in ((1, "fid", 2), (1, "colour", 2), (1, "kid", 2), (3, "prc", 4), (9, "is", 10)):
        few = folder_of(tmp_path / f"{count} {metric}", count, 0)
        with pytest.raises(InputError, match=f"has {count} images, but metrics {metric} of these features need {least}; .*other metrics"):
            scored(tmp_path, few, reference=good, metrics=metric, allow_few_images=True, measure={"feature_extractor": "digits"})
    Image.new("L", (9, 9)).save(good / "0007.png")
    with pytest.raises(InputError, match=r"0007\.png has 9x9 pixels, the first 8x8"):
        scored(tmp_path, good, reference=many, metrics="colour")
    (good / "0007.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(InputError, match=r"image .*0007\.png cannot be read"):
        scored(tmp_path, good, reference=many, metrics="colour")


@pytest.mark.parametrize(
    "arrays, named",
    [
        ({"arr_0": np.zeros((4, 8, 8), np.uint8)}, "must have squares"),
        ({"arr_0": np.zeros((4, 8, 8, 3), np.float32)}, "must have squares"),
        ({"arr_0": np.zeros((4, 8, 9, 3), np.uint8)}, "must have squares"),
        ({"other": np.zeros(3)}, "neither arr_0"),
        ({"mu": np.array([Hostile()], dtype=object), "sigma": np.zeros(1)}, "cannot be read"),
        ({"mu": np.zeros(3)}, r"odd\.npz has for layer 2048 mu of \(3,\) and sigma of \(\)"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": np.zeros(3)}, r"odd\.npz has for layer spatial"),
        ({"mu": np.zeros(3), "sigma": np.zeros((3, 4))}, r"sigma of \(3, 4\)"),
        ({"mu": np.float64(0), "sigma": np.eye(1)}, r"mu of \(\)"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "must have finite numbers"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)}, "must have finite numbers"),
    ],
)
@pytest.mark.row(51, "damaged, few or unusual images are named, and metrics equal those of a direct call of torch-fidelity")
def test_odd_npz_files_are_refused(tmp_path, arrays, named):
    np.savez(tmp_path / "odd.npz", **arrays)
    target = folder_of(tmp_path / "target", 5, 0)
    with pytest.raises(InputError, match=named):
        scored(tmp_path, target, reference=tmp_path / "odd.npz", metrics="colour")


@pytest.mark.parametrize("mu, sigma", [(np.zeros(3), np.zeros((3, 4))), (np.full(3, np.nan), np.eye(3)), (np.zeros(()), np.eye(1))])
def test_odd_statistics_are_refused(tmp_path, mu, sigma):
    tensors = {"colour/mu": torch.from_numpy(mu), "colour/sigma": torch.from_numpy(sigma)}
    save_file(tensors, tmp_path / "odd.safetensors", {"images": "9", "resolution": "8"})
    with pytest.raises(InputError, match=r"odd\.safetensors has for layer colour"):
        scored(tmp_path, folder_of(tmp_path / "target", 5, 0), reference=tmp_path / "odd.safetensors", metrics="colour")


def test_a_damaged_npz_that_is_compressed_is_named(tmp_path):
    generator = np.random.default_rng(0)
    np.savez_compressed(tmp_path / "images.npz", generator.integers(0, 9, (50, 8, 8, 3), dtype=np.uint8))
    np.savez_compressed(tmp_path / "statistics.npz", mu=generator.integers(0, 9, 300).astype(float), sigma=np.eye(300))
    target = folder_of(tmp_path / "target", 5, 0)
    for name in ("images.npz", "statistics.npz"):
        data = bytearray((tmp_path / name).read_bytes())
        data[40:70] = bytes(255 - byte for byte in data[40:70])
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=name):
            scored(tmp_path, target, reference=tmp_path / name, metrics="colour")


@pytest.mark.row(51, "damaged, few or unusual images are named, and metrics equal those of a direct call of torch-fidelity")
def test_a_damaged_npz_is_named(tmp_path):
    np.savez(tmp_path / "cut.npz", np.random.default_rng(0).integers(0, 255, (50, 8, 8, 3), dtype=np.uint8))
    whole = (tmp_path / "cut.npz").read_bytes()
    for name, data in (("cut.npz", whole[: len(whole) // 2]), ("flipped.npz", whole[:3000] + bytes([whole[3000] ^ 1]) + whole[3001:])):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=name):
            scored(tmp_path, tmp_path / name, reference="digits", metrics="colour")


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--metrics", "fid,foo"], "metrics has foo"),
        (["--metrics", "fid,fid"], "each can be named once"),
        (["--steps", "5,x"], "steps is 5,x"),
        (["--schedulers", "ddim,foo"], "schedulers has foo"),
        (["--checkpoints", "last"], "checkpoints is last"),
        (["--checkpoints", "7"], "has no checkpoint at step 7; take some of 18, 24"),
        (["--feature_extractor", "foo"], "take one of digits, emoji, clip-rn101"),
        (["--metrics", "sfid"], "sfid is of inception-v3-compat, but feature_extractor is digits"),
        (["--reference", "nowhere"], "reference nowhere"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(trained, flags, named):
    code, _, err = run("eval.py", "score", trained, *flags)
    assert code == 2 and "Traceback" not in err and "error: " in err and named in err, err


def test_a_folder_without_a_reference_is_refused(tmp_path):
    target = folder_of(tmp_path / "target", 5, 0)
    code, _, err = run("eval.py", "score", target)
    assert code == 2 and "reference is missing" in err
