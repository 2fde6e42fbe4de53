"""`train.py --resume RUN`: a run goes on without its command typed again."""

import json
import shutil

import pytest
from conftest import TINY

from debias_diffusers.cli import train_config
from debias_diffusers.config.loading import BEFORE_THE_FIELD, CHANGEABLE, OF_ONE_COMMAND, flatten, run_values, stored, update
from debias_diffusers.config.schema import TrainConfig
from debias_diffusers.errors import InputError


def configured(*args):
    return train_config([str(arg) for arg in args], None)


def test_resume_takes_configuration_and_directory_from_the_run(trained):
    assert configured("--resume", trained) == configured("--config", TINY, "--output_dir", trained)
    assert configured("--resume", trained, "--max_steps", 48, "--log_every", 2) == update(
        configured("--config", TINY, "--output_dir", trained), {"max_steps": 48, "log_every": 2}
    )


def run_with(folder, values, paths=None):
    """A run directory as far as its configuration is read: config.json and two checkpoints, the newer of which has the paths."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    for step, where in ((6, {"dataset": "/old"}), (12, paths)):
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.json").write_text(json.dumps({"paths": where or {}}))
    return folder


def test_a_run_of_an_older_version_has_the_defaults_of_its_time(tmp_path):
    values = stored(configured("--config", TINY))
    older = {name: value for name, value in values.items() if name not in (*BEFORE_THE_FIELD, "schedule_shift", "cache_images_mb")}
    run = run_with(tmp_path / "run", {**older, "accept_changed_data": True, "dry_run": True})
    found = flatten(configured("--resume", run))  # no value of the digits' packaged configuration
    assert found["schedule_shift"] == 1 and found["cache_images_mb"] == 1024 and found["ema_warmup"] is False
    assert not any(found[name] for name in OF_ONE_COMMAND)  # what another command permitted


def test_local_data_are_found_from_another_working_directory(tmp_path, monkeypatch):
    for name in ("photos", "other"):
        (tmp_path / name).mkdir()
    values = {**stored(configured("--config", TINY)), "dataset": "photos"}
    run = run_with(tmp_path / "run", values, {"dataset": str(tmp_path / "photos")})
    monkeypatch.chdir(tmp_path / "other")
    assert run_values(run)["dataset"] == str(tmp_path / "photos")
    assert configured("--resume", run, "--dataset", "elsewhere").data.dataset == "elsewhere"
    monkeypatch.chdir(tmp_path)
    assert run_values(run)["dataset"] == "photos"
    shutil.rmtree(tmp_path / "photos")
    assert run_values(run)["dataset"] == "photos"  # gone: the message is about what was typed


@pytest.mark.parametrize("content", [None, "{}", "[", '{"_class_name": "UNet2DModel"}'])
def test_what_is_no_run_is_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert run_values(tmp_path) is None
    with pytest.raises(InputError, match="is no run directory"):
        configured("--resume", tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        configured("--resume", tmp_path / "missing")


@pytest.mark.parametrize("flag", ["--config", "--output_dir"])
def test_what_the_run_says_is_not_typed_again(flag, trained):
    with pytest.raises(InputError, match=f"leave out {flag}"):
        configured("--resume", trained, flag, TINY)


def test_help_lists_what_may_be_typed_beside_resume(capsys):
    with pytest.raises(SystemExit):
        configured("--help")
    words = set(capsys.readouterr().out.split("options")[0].replace(",", " ").replace(".", " ").replace("│", " ").split())
    assert {name for name in flatten(TrainConfig()) if name in words} >= CHANGEABLE - {"output_dir", "size"}
