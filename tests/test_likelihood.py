"""The bound of a Gaussian model against its closed form, and the command that computes it."""

import json
import math
from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import run, train_args
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image

from debias_diffusers.config.schema.evaluation import BitsConfig
from debias_diffusers.config.schema.objective import ObjectiveConfig
from debias_diffusers.diffusion.noise_schedule import make_schedule, prediction_of_x_0
from debias_diffusers.errors import InputError
from debias_diffusers.evaluation.likelihood import Bound, _result
from debias_diffusers.evaluation.reference import data_of_model, reference_data
from debias_diffusers.evaluation.results import as_json

MEAN, STD, T = 0.1, 0.2, 40
OBJECTIVE = ObjectiveConfig(noise_schedule="cosine", num_train_timesteps=T)
FINE = ObjectiveConfig(noise_schedule="cosine", num_train_timesteps=500)


class ExactUNet:
    """The best network for pixels of N(MEAN, STD^2)."""

    dtype = torch.float32

    def __init__(self, prediction_type, learned, objective):
        self.schedule, self.prediction_type, self.learned = make_schedule(objective), prediction_type, learned

    def __call__(self, x_t, level, labels, return_dict):
        a, s = self.schedule.a[level], self.schedule.s[level]
        x_0 = MEAN + a * STD**2 / (a**2 * STD**2 + s**2) * (x_t - a * MEAN)
        prediction = prediction_of_x_0(self.prediction_type, x_0, x_t, a, s).float()
        return (torch.cat([prediction, torch.full_like(prediction, -1.0)], 1) if self.learned else prediction,)


def bound_of(prediction_type="epsilon", variance_type="fixed_small", objective=OBJECTIVE):
    levels = objective.num_train_timesteps
    own = DDPMScheduler(levels, beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type, variance_type=variance_type)
    unet = ExactUNet(prediction_type, variance_type == "learned_range", objective)
    return Bound(SimpleNamespace(scheduler=own, unet=unet, device=torch.device("cpu")), clipping=False)


def gaussian_images(count):
    """Pixels of the 256 levels, (count, 1, 32, 32)."""
    x_0 = MEAN + STD * torch.randn(count, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    return ((x_0 / 2 + 0.5) * 255).round().clamp(0, 255) / 127.5 - 1


def test_the_progress_is_over_timesteps():
    seen = []
    bound_of().terms(gaussian_images(1), None, 0, range(1), SimpleNamespace(update=lambda: seen.append(1)))
    assert len(seen) == T


@pytest.mark.parametrize("space", ("epsilon", "sample", "v_prediction"))
@pytest.mark.parametrize("variance_type", ("fixed_small", "learned_range"))
def test_every_term_of_a_gaussian_is_the_closed_form(space, variance_type):
    """At the smallest variance a term is the variance of x_0 given x_t, as it moves the mean, over twice that of the step."""
    bound, schedule = bound_of(space, variance_type), make_schedule(OBJECTIVE)
    terms = bound.terms(gaussian_images(24), None, 0, range(24)).mean(0)
    acp = schedule.alphas_cumprod
    a_squared, before = acp, torch.cat([torch.ones(1, dtype=torch.float64), acp[:-1]])
    beta = 1 - acp / before
    left = STD**2 * (1 - acp) / (a_squared * STD**2 + 1 - acp)  # variance of x_0 given x_t
    moved = before * beta**2 / (1 - acp) ** 2 * left  # of the mean of the step
    expected = moved / (2 * beta * (1 - before) / (1 - acp)) / math.log(2)
    torch.testing.assert_close(terms[1:], expected[1:], rtol=0.03, atol=1e-5)


def test_the_large_variance_costs_what_the_divergence_of_two_gaussians_says():
    small, large = (bound_of(variance_type=kind) for kind in ("fixed_small", "fixed_large"))
    images = gaussian_images(8)
    schedule = make_schedule(OBJECTIVE)
    acp = schedule.alphas_cumprod
    before = torch.cat([torch.ones(1, dtype=torch.float64), acp[:-1]])
    ratio = (1 - before) / (1 - acp)  # of the small variance to the large
    at_small, at_large = (b.terms(images, None, 0, range(8)).mean(0) for b in (small, large))
    expected = at_small * ratio + (ratio - 1 - ratio.log()) / 2 / math.log(2)
    torch.testing.assert_close(at_large[1:], expected[1:], rtol=1e-4, atol=1e-7)
    assert at_large[0] == pytest.approx(at_small[0])  # the large variance of the last step is that of the first


def test_the_prior_is_the_closed_form():
    bound, schedule = bound_of(), make_schedule(OBJECTIVE)
    images = gaussian_images(4)
    a, s = schedule.a[-1], schedule.s[-1]
    normal = torch.distributions.Normal
    divergence = torch.distributions.kl_divergence(normal(a * images.double(), s), normal(torch.zeros(()).double(), 1))
    torch.testing.assert_close(bound.prior(images), divergence.flatten(1).mean(1) / math.log(2))


def test_the_total_is_near_the_entropy_of_the_data():
    """Of a Gaussian on a grid of 2/255: a bound from above, which more noise levels bring closer.

    A fixed variance is too small for the last step, which costs what is left.
    """
    entropy = (math.log(STD * math.sqrt(2 * math.pi * math.e)) - math.log(2 / 255)) / math.log(2)
    images = gaussian_images(8)
    gaps = []
    for objective in (OBJECTIVE, FINE):
        bound = bound_of(objective=objective)
        gaps.append((bound.terms(images, None, 0, range(8)).sum(1) + bound.prior(images)).mean() - entropy)
    assert 0 < gaps[1] < gaps[0] < 1


def test_the_bound_does_not_depend_on_batches():
    bound, images = bound_of(), gaussian_images(5)
    parts = [bound.terms(images[first:end], None, 3, range(first, end)) for first, end in ((0, 2), (2, 5))]
    torch.testing.assert_close(torch.cat(parts), bound.terms(images, None, 3, range(5)))


def test_models_without_random_steps_have_no_bound():
    for own in (FlowMatchEulerDiscreteScheduler(), DDPMScheduler(variance_type="learned")):
        with pytest.raises(InputError, match=r"whose steps have no bound here; eval\.py score measures any model"):
            Bound(SimpleNamespace(scheduler=own), clipping=True)


def test_weights_that_nobody_has_are_refused(tmp_path):
    code, _, err = run("eval.py", "bpd", tmp_path, "--weights", "best")
    assert code == 2 and "weights is 'best'" in err and "Traceback" not in err


def test_the_labels_are_read_from_the_column_that_the_run_was_trained_with(tmp_path):
    columns = {"image": datasets.Image(), "kind": datasets.ClassLabel(num_classes=3), "maker": datasets.ClassLabel(num_classes=2)}
    rows = {"image": [Image.new("L", (8, 8), k) for k in range(4)], "kind": [0, 1, 2, 0], "maker": [1, 0, 1, 0]}
    datasets.Dataset.from_dict(rows, features=datasets.Features(columns)).save_to_disk(tmp_path / "data")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    data = {"dataset": str(tmp_path / "data"), "split": "train", "image_column": None, "label_column": "kind"}
    (tmp_path / "run" / "config.json").write_text(json.dumps(data))

    def labels(classes, **given):
        unet = SimpleNamespace(config=SimpleNamespace(sample_size=8, in_channels=1))
        model, config = SimpleNamespace(num_classes=classes, class_names=None, unet=unet), BitsConfig(model=str(tmp_path / "run"), **given)
        found = data_of_model(config, reference_data(config, None, [config.model]), model, "the model has")
        return [found.decoded(k)[1] for k in range(4)]

    assert labels(3) == [0, 1, 2, 0]
    assert labels(2, label_column="maker") == [1, 0, 1, 0]


def test_a_bound_of_one_image_has_no_standard_error():
    written = as_json(_result(torch.ones(1, 3), torch.ones(1)))
    assert json.loads(written, parse_constant=pytest.fail)["standard_error"] is None


def test_the_command_bounds_a_run(tmp_path):
    few = ["--class_conditional", "--num_train_timesteps", 50, "--max_steps", 1, "--warmup_steps", 0]
    assert run(*train_args(tmp_path / "run", *few))[0] == 0
    flags = ["--num_images", 3, "--num_threads", 1, "--output", tmp_path / "out.json"]
    code, _, err = run("eval.py", "bpd", tmp_path / "run", *flags)
    assert code == 0 and "bits per dimension" in err, err
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["images"] == 3 and len(found["terms"]) == 50 and found["variance_type"] == "fixed_large"
    assert found["total"] == pytest.approx(sum(found["terms"]) + found["prior"]) and found["standard_error"] > 0
