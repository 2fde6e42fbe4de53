"""What is not finite stops a run before it spoils anything, and numbers are those of a table worked out by hand."""

import contextlib
import os

import numpy as np
import pytest
import torch
from conftest import HANG, ROOT, SMALL, command, metrics, newest_step, run, same, tensors, train_args
from here import tiny, trained_here
from safetensors.torch import load
from torch.utils._python_dispatch import TorchDispatchMode

from debias_diffusers.config.registry import WEIGHTINGS
from debias_diffusers.config.schema.objective import ObjectiveConfig
from debias_diffusers.config.validation.objective import objective_problems
from debias_diffusers.diffusion.loss import Terms, make_objective
from debias_diffusers.errors import InputError, NotFiniteError
from debias_diffusers.tasks.pixels import PixelTask
from debias_diffusers.training import state_dicts
from debias_diffusers.training.setup.network import SKIPS_IN_A_ROW
from debias_diffusers.training.trainer import Trainer

SPOILT = 3  # the step that is spoilt, counted from 0: steps 1 to 3 are made, the fourth is not


class Spoiler:
    """Puts a number that is not finite into one place of the training, at one step. Remembers the levels drawn there."""

    def __init__(self, patch, place, value):
        self.place, self.value, self.trainer, self.t = place, value, None, None
        for owner, name, spoilt in (
            (Trainer, "_gradients", self._gradients),
            (Trainer, "_terms", self._terms),
            (PixelTask, "x_0", self._clean),
        ):
            patch.setattr(owner, name, self._wrapped(getattr(owner, name), spoilt))

    @staticmethod
    def _wrapped(original, spoilt):
        return lambda owner, *args: spoilt(lambda: original(owner, *args), owner, *args)

    def _now(self, place):
        return self.place == place and self.trainer.step == SPOILT

    def _gradients(self, original, trainer, *_):
        self.trainer = trainer
        parameter = trainer.state.optimizer_step.parameters[0]
        if self._now("weight"):
            with torch.no_grad():
                parameter.view(-1)[0] = self.value
        hook = parameter.register_hook(lambda gradient: torch.full_like(gradient, self.value) if self._now("gradient") else gradient)
        found = original()
        hook.remove()
        return found

    def _terms(self, original, trainer, batch, t):
        terms = original()
        if trainer.step == SPOILT:
            self.t = t.tolist()
        if self._now("loss"):
            terms = Terms(terms.loss * torch.ones(8).index_fill(0, torch.tensor([5]), self.value), terms.mse, terms.bound)
        return terms

    def _clean(self, original, *_):
        x_0 = original()
        if self._now("image"):
            x_0[5, 0, 2, 3] = self.value
        return x_0


@pytest.mark.row(31, "a NaN or infinity stops the run before the optimizer step, and the message says where it is")
@pytest.mark.parametrize(
    "precision, values",
    [
        ("no", [torch.nan]),
        ("bf16", [torch.inf]),
        pytest.param("no", [torch.inf, -torch.inf], marks=pytest.mark.nightly),
        pytest.param("bf16", [torch.nan, -torch.inf], marks=pytest.mark.nightly),
    ],
)
@pytest.mark.parametrize("place", ["image", "weight", "gradient", "loss"])
def test_what_is_not_finite_stops_the_run_before_the_update(place, precision, values, tmp_path, trials):
    for value in values:
        trials()
        folder = tmp_path / str(value)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(NotFiniteError) as error:
            spoiler = Spoiler(patch, place, value)
            trained_here(tiny(folder, *SMALL, "--mixed_precision", precision, "--checkpoint_every", 1, "--max_steps", 6))
        said = str(error.value)
        assert error.value.exit_code == 5
        assert f"in step {SPOILT + 1} (positions {8 * SPOILT} to {8 * SPOILT + 7} of seed 0;" in said
        if place in ("image", "loss"):
            assert f"not finite: {8 * SPOILT + 5} at t = {spoiler.t[5]})" in said
        elif place == "weight":
            first = ", ".join(f"{8 * SPOILT + k} at t = {spoiler.t[k]}" for k in range(3))
            assert f"not finite: {first} and 5 more)" in said
        else:
            assert f"each loss finite, t from {min(spoiler.t)} to {max(spoiler.t)})" in said
        assert newest_step(folder) == SPOILT and metrics(folder)[-1]["step"] == SPOILT
        kept = load(tensors(folder, SPOILT)["model.safetensors"])
        weights = dict(spoiler.trainer.state.model.named_parameters())
        changed = sum((weights[key].detach() != kept[key]).sum().item() for key in kept)
        assert changed == (place == "weight")  # the one that was spoilt by hand
        assert all(torch.isfinite(weight).all() for weight in kept.values())


@pytest.mark.row(31, "a NaN or infinity stops the run before the optimizer step, and the message says where it is")
def test_after_a_step_that_was_not_finite_the_same_command_goes_on_as_if_nothing_had_been(trained, tmp_path):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(NotFiniteError):
        Spoiler(patch, "gradient", torch.nan)
        trained_here(tiny(tmp_path / "run", "--checkpoint_every", 1))
    trained_here(tiny(tmp_path / "run"))
    same(trained, tmp_path / "run", 24)


@pytest.mark.row(31, "a NaN or infinity stops the run before the optimizer step, and the message says where it is")
@pytest.mark.parametrize("place", ["gradient", "loss"])
def test_a_step_that_was_launched_before_this_was_read_makes_no_update_either(place, tmp_path):
    """Without lines of metrics each step is read when the next is launched."""
    flags = ["--checkpoint_every", 3, "--log_every", 0, "--max_grad_norm", 1]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(NotFiniteError, match=f"in step {SPOILT + 1} .positions {8 * SPOILT} to"):
        spoiler = Spoiler(patch, place, torch.nan)
        trained_here(tiny(tmp_path / "run", *flags))
    trainer = spoiler.trainer
    assert trainer.step == SPOILT + 2 and newest_step(tmp_path / "run") == SPOILT
    kept = {name: load(content) for name, content in tensors(tmp_path / "run", SPOILT).items()}
    left = state_dicts.gather(trainer.state)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert all(torch.equal(kept[name][key], left[name][key]) for key in kept[name]), name


class Asked(TorchDispatchMode):
    """Counts how often the value of a tensor is asked for, which on a GPU waits for everything that was launched."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)
        return function(*args, **(kwargs or {}))


def test_a_step_is_launched_without_waiting_for_any_of_its_numbers(tmp_path, monkeypatch):
    original, asked = Trainer._launch, Asked()

    def launch(trainer, *args):
        with asked if trainer.step else contextlib.nullcontext():  # in the first step the loader seeds itself, from a number of the CPU
            return original(trainer, *args)

    monkeypatch.setattr(Trainer, "_launch", launch)
    flags = ["--max_grad_norm", 1, "--learn_sigma", "--ema_decay", 0.9, 0.99, "--timestep_sampler", "logit_normal"]
    trainer = trained_here(tiny(tmp_path / "run", *flags, "--max_steps", 6, "--log_every", 0))
    assert trainer.step == 6 and asked.count == 0
    with asked:
        trainer.state.optimizer_step.skips.item()
    assert asked.count == 1


@pytest.mark.row(31, "a NaN or infinity stops the run before the optimizer step, and the message says where it is")
def test_a_learning_rate_that_is_too_large_ends_with_exit_code_5(tmp_path):
    folder = tmp_path / "run"
    code, _, err = run(*train_args(folder, "--learning_rate", 1e30, "--checkpoint_every", 1, "--keep_checkpoints", 9))
    last = err.strip().splitlines()[-1]
    assert code == 5 and last.startswith("error: loss") and "Traceback" not in err
    step = newest_step(folder)
    assert f"in step {step + 1} (positions {step * 8} to {step * 8 + 7}" in last and " at t = " in last
    weights = load(tensors(folder, step)["model.safetensors"])
    assert all(torch.isfinite(w).all() for w in weights.values())
    assert metrics(folder)[-1]["step"] == step


# ---- the search for fp16's loss scale --------------------------------------------------------------------------------


class Overflowing:
    """Makes the gradients of some steps (counted from 0) infinite, as fp16 does where its scale is too large."""

    def __init__(self, patch, steps):
        self.seen = {}  # step: (the weights before it, how many were skipped in a row by then)
        original = Trainer._gradients

        def gradients(trainer, *args):
            weights = torch.cat([parameter.detach().flatten() for parameter in trainer.state.optimizer_step.parameters])
            self.seen[trainer.step] = weights.clone(), int(trainer.state.optimizer_step.skips)
            spoilt = trainer.step in steps
            hook = trainer.state.optimizer_step.parameters[0].register_hook(lambda g: torch.full_like(g, torch.inf) if spoilt else g)
            found = original(trainer, *args)
            hook.remove()
            return found

        patch.setattr(Trainer, "_gradients", gradients)


def scaler_of_fp16():
    return torch.amp.GradScaler("cpu", init_scale=2.0**60)


@pytest.mark.row(32, "fp16 may skip steps while its loss scale settles, but not 20 in a row")
def test_steps_that_overflow_in_fp16_are_skipped_and_counted(tmp_path, trials):
    most = SKIPS_IN_A_ROW - 1
    runs = [range(1, 1 + most), range(2 + most, 2 + 2 * most)]  # 19 in a row, one sound step, 19 in a row
    scaler = scaler_of_fp16()
    with pytest.MonkeyPatch.context() as patch:
        spoilt = Overflowing(patch, {step for skipped in runs for step in skipped})
        trainer = trained_here(tiny(tmp_path / "run", "--max_steps", 2 * most + 4, "--checkpoint_every", 0), scaler=scaler)
    assert trainer.step == 2 * most + 4 and trainer.state.optimizer_step.skips == 0
    for step in range(trainer.step - 1):
        trials()
        in_a_row = next((step - skipped.start for skipped in runs if step in skipped), None)
        weights, skips = spoilt.seen[step]
        after, _ = spoilt.seen[step + 1]
        if in_a_row is not None:
            assert skips == in_a_row and torch.equal(weights, after), step
        else:
            assert not torch.equal(weights, after), step
    assert scaler.get_scale() == 2.0 ** (60 - 2 * most)
    assert torch.isfinite(after).all()


@pytest.mark.row(32, "fp16 may skip steps while its loss scale settles, but not 20 in a row")
def test_the_twentieth_step_in_a_row_that_overflows_ends_the_run(tmp_path):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(NotFiniteError, match=r"in step 25 .*each loss finite"):
        spoilt = Overflowing(patch, range(5, 60))
        trained_here(tiny(tmp_path / "run", "--max_steps", 60), scaler=scaler_of_fp16())
    assert max(spoilt.seen) == 5 + SKIPS_IN_A_ROW - 1 == 24
    assert torch.equal(spoilt.seen[24][0], spoilt.seen[5][0])


@pytest.mark.row(32, "fp16 may skip steps while its loss scale settles, but not 20 in a row")
def test_steps_in_a_row_are_counted_over_a_resume(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        Overflowing(patch, range(5, 60))
        trained_here(tiny(tmp_path / "run", "--max_steps", 10), scaler=scaler_of_fp16())
        with pytest.raises(NotFiniteError, match="in step 25 "):
            trained_here(tiny(tmp_path / "run", "--max_steps", 60), scaler=scaler_of_fp16())


@pytest.mark.row(32, "fp16 may skip steps while its loss scale settles, but not 20 in a row")
def test_a_loss_that_is_not_finite_is_no_search_for_a_scale(tmp_path):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(NotFiniteError, match=f"in step {SPOILT + 1} "):
        Spoiler(patch, "loss", torch.nan)
        trained_here(tiny(tmp_path / "run"), scaler=scaler_of_fp16())


# ---- weights ---------------------------------------------------------------------------------------------------------


def snr_by_hand(schedule, T=1000):
    """SNR of every noise level in numpy: DDPM's betas (arXiv 2006.11239), or the cosine (arXiv 2102.09672, equation 17)."""
    if schedule == "linear":
        betas = np.linspace(0.1 / T, 20 / T, T, dtype=np.float64)
    else:
        f = np.cos((np.arange(T + 1, dtype=np.float64) / T + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    alphas_cumprod = np.cumprod(1 - betas)
    return alphas_cumprod / (1 - alphas_cumprod)


# The debiased weight 1/sqrt(SNR) on the noise's error, as it stands on the errors of x_0 and v.
BY_HAND = {
    "epsilon": lambda snr: snr**-0.5,
    "sample": lambda snr: snr**0.5,
    "v_prediction": lambda snr: snr**0.5 / (snr + 1),
}


@pytest.mark.row(33, "the debiased weights are those of the paper at every timestep, for every prediction type")
@pytest.mark.parametrize("space", BY_HAND)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_debiased_weights_are_those_of_a_table_worked_out_by_hand(schedule, space, trials):
    for T in (100, 1000, 4000):
        found = make_objective(ObjectiveConfig(noise_schedule=schedule, prediction_type=space, num_train_timesteps=T)).weights.numpy()
        expected = BY_HAND[space](snr_by_hand(schedule, T))
        assert found.shape == (T,)
        for ours, theirs in zip(found, expected):
            trials()
            assert abs(ours - theirs) <= 1e-6 * theirs


@pytest.mark.row(33, "the debiased weights are those of the paper at every timestep, for every prediction type")
def test_how_a_weight_is_brought_to_other_spaces_is_said_where_it_is_chosen():
    said = (ROOT / "debias_diffusers" / "config" / "schema" / "objective.py").read_text()
    assert "one objective whatever the prediction type" in said
    assert "1/sqrt(SNR)" in (ROOT / "README.md").read_text()


UNBOUNDED = sorted(name for name, spec in WEIGHTINGS.items() if spec.unbounded)
ENDLESS = [
    *({"noise_schedule": "cosine", "weighting": name} for name in UNBOUNDED),
    *({"rescale_betas_zero_snr": True, "weighting": name} for name in UNBOUNDED),
    *({"rescale_betas_zero_snr": True, "prediction_type": space, "weighting": "debiased_as_is"} for space in ("sample", "v_prediction")),
]


@pytest.mark.row(34, "weights that grow without bound as the SNR falls to 0 are an error")
def test_a_schedule_that_ends_in_noise_is_refused_where_its_weights_have_no_bound(trials):
    for change in ENDLESS:
        trials()
        objective = ObjectiveConfig(**{"noise_schedule": "linear", **change})
        assert any(
            "--snr_floor 1e-3" in problem or "--prediction_type v_prediction" in problem for problem in objective_problems(objective)
        )
        if objective.rescale_betas_zero_snr:  # for those who do not ask the rules first
            with pytest.raises(InputError, match=r"at t = 999, where the SNR is 0"):
                make_objective(objective)


@pytest.mark.row(34, "weights that grow without bound as the SNR falls to 0 are an error")
def test_a_run_with_weights_without_bound_ends_before_it_begins(tmp_path):
    code, _, err = run(*train_args(tmp_path / "run", "--rescale_betas_zero_snr"))
    assert code == 2 and "rescale_betas_zero_snr is on, but prediction_type is epsilon" in err
    assert not (tmp_path / "run").exists()


# ---- what must not matter --------------------------------------------------------------------------------------------

SURROUNDINGS = [
    {"PYTHONHASHSEED": "1", "LANG": "tr_TR.UTF-8", "LC_ALL": "tr_TR.UTF-8", "TZ": "Asia/Kathmandu"},
    {"PYTHONHASHSEED": "4294967295", "LANG": "C", "LC_ALL": "C", "TZ": "UTC"},
    {"PYTHONHASHSEED": "0", "LANG": "de_DE.ISO-8859-1", "LC_ALL": "", "TZ": "America/St_Johns", "HOME": "/"},
    {"PYTHONHASHSEED": "random", "LANG": "", "LC_ALL": "C.UTF-8", "TZ": "Pacific/Kiritimati", "PYTHONUTF8": "1"},
]


@pytest.mark.row(35, "the same seed gives the same bits whatever the environment of the process")
@pytest.mark.parametrize("surroundings", [SURROUNDINGS[0], *(pytest.param(each, marks=pytest.mark.nightly) for each in SURROUNDINGS[1:])])
def test_language_time_zone_hash_seed_and_folder_do_not_matter(surroundings, trained_by_class, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    _, *flags = train_args("../run", "--class_conditional", "--max_steps", 6)
    process = command(ROOT / "train.py", *flags, env={**os.environ, **surroundings}, cwd=tmp_path / "elsewhere")
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == 0, err
    same(trained_by_class, tmp_path / "run", 6)
