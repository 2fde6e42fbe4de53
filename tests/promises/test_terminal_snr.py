"""Row 72 of docs/reliability.md: a schedule that cannot be sampled from pure noise is refused."""

import dataclasses
import itertools
import json
import re
import shutil

import numpy as np
import pytest
from conftest import metrics, sample_config
from here import tiny, trained_here

from debias_diffusers import cli
from debias_diffusers.config.loading import packaged_configs
from debias_diffusers.config.schema.objective import ObjectiveConfig
from debias_diffusers.diffusion import noise_schedule
from debias_diffusers.diffusion.noise_schedule import make_schedule, require_noise_at_the_end, terminal_snr_problem
from debias_diffusers.errors import InputError
from debias_diffusers.sampling import generate
from debias_diffusers.training import dry_run
from debias_diffusers.training.setup import plan

END = "a noise schedule without zero terminal SNR is an error that names the largest possible shift"


def last_snr(name, T, shift=1.0):
    """By the definition of the betas, in plain numpy."""
    ends = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "sigmoid": (1e-4, 0.02)}.get(name)
    if name == "cosine":
        f = [np.cos((i / T + 0.008) / 1.008 * np.pi / 2) ** 2 for i in range(T + 1)]
        betas = np.array([min(1 - after / before, 0.999) for before, after in itertools.pairwise(f)])
    else:
        start, end = (1000 / T * beta for beta in ends)
        betas = {
            "linear": lambda: np.linspace(start, end, T),
            "scaled_linear": lambda: np.linspace(start**0.5, end**0.5, T) ** 2,
            "sigmoid": lambda: start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, T))),
        }[name]()
    acp = np.prod(1 - betas)
    return shift * acp / (1 - acp)


@pytest.mark.row(72, END)
@pytest.mark.parametrize("T", [25, 100, 1000, 4000])
@pytest.mark.parametrize("name", ["linear", "scaled_linear", "sigmoid", "cosine"])
def test_every_schedule_shift_and_number_of_timesteps_is_judged_by_its_last_snr(name, T, trials):
    bound = 0.01 / last_snr(name, T)  # the shift from which on it is refused
    for shift in (0.99 * bound, 1.01 * bound):
        config = ObjectiveConfig(noise_schedule=name, num_train_timesteps=T, schedule_shift=float(shift))
        try:
            made = make_schedule(config)
        except InputError as error:  # the shift is too large for the other end already
            assert "SNR of the first timestep" in str(error)
            continue
        trials()
        assert made.snr[-1].item() == pytest.approx(last_snr(name, T, shift), rel=1e-6)
        if shift < bound:
            require_noise_at_the_end(config, made)
            continue
        with pytest.raises(InputError, match=rf"ends at timestep {T - 1} with an SNR of 0.01, above 0.01") as refused:
            require_noise_at_the_end(config, made)
        advised = float(re.search(r"--schedule_shift (\S+) ", str(refused.value))[1])
        assert 0.8 * bound < advised < bound
        zero = dataclasses.replace(config, rescale_betas_zero_snr=True, prediction_type="v_prediction")
        assert terminal_snr_problem(make_schedule(zero)) is None


@pytest.mark.row(72, END)
def test_flow_and_the_packaged_configurations_end_in_noise(trials):
    for shift in (1e-4, 1.0, 64.0):
        trials()
        assert terminal_snr_problem(make_schedule(ObjectiveConfig(prediction_type="flow", schedule_shift=shift))) is None
    for name in packaged_configs():
        trials()
        objective = cli.train_config(["--config", name], None).objective
        require_noise_at_the_end(objective, make_schedule(objective))


FLAGS = ["--noise_schedule", "scaled_linear", "--schedule_shift", 64]


@pytest.mark.row(72, END)
def test_a_new_run_is_refused_before_its_data_are_read_and_one_that_began_before_ends(tmp_path, monkeypatch, capsys, trials):
    config = tiny(tmp_path / "run", *FLAGS, "--max_steps", 4)
    with monkeypatch.context() as unread:
        unread.setattr(plan, "open_data", lambda *_, **__: pytest.fail("the data were read"))
        for start in (trained_here, dry_run.dry_run):
            trials()
            with pytest.raises(InputError, match=r"SNR of 0.3, above 0.01: sampling starts from pure noise"):
                start(config)
    with monkeypatch.context() as before:
        before.setattr(noise_schedule, "MAX_TERMINAL_SNR", 1.0)
        trained_here(config)
    assert "warning" not in capsys.readouterr().err
    trained_here(tiny(tmp_path / "run", *FLAGS, "--max_steps", 8))
    assert "warning: the noise schedule ends at timestep 999 with an SNR of 0.3" in capsys.readouterr().err
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 9))


@pytest.mark.row(72, END)
def test_drawing_with_such_a_model_warns_once(trained, tmp_path, capsys, trials):
    trials()
    model = tmp_path / "run"
    shutil.copytree(trained, model)
    path = model / "scheduler" / "scheduler_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "trained_betas": None, "beta_schedule": "linear", "beta_start": 1e-5, "beta_end": 1e-3}))
    for _ in range(2):
        generate.make_job(sample_config(model, tmp_path / "drawn"), "cpu")
    assert capsys.readouterr().err.count("sampling starts from pure noise") == 1
