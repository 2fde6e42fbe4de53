"""`train.py --resume RUN`: a run goes on without its command typed again, and changed on purpose where --allow_change says so."""

import json
import shutil
from contextlib import suppress

import pytest
import torch
from conftest import TINY, metrics, tensors
from here import trained_here
from safetensors.torch import load

from debias_diffusers.cli import train_config
from debias_diffusers.config.loading import (
    BEFORE_THE_FIELD,
    CHANGEABLE,
    NEVER,
    OF_ONE_COMMAND,
    ON_PURPOSE,
    flatten,
    stored,
    update,
)
from debias_diffusers.config.schema.training import TrainConfig
from debias_diffusers.config.validation.training import train_problems
from debias_diffusers.diffusion.timestep_samplers import TimestepSampler
from debias_diffusers.errors import InputError
from debias_diffusers.runs.run_directory import open_run, run_values
from debias_diffusers.training.setup import plan, state
from debias_diffusers.training.trainer import Trainer


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


def test_a_network_file_is_found_from_another_working_directory(tmp_path, monkeypatch):
    values = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "norm_num_groups": 8}
    (tmp_path / "unet.json").write_text(json.dumps(values))
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    trained_here(configured("--config", TINY, "--model_config", "unet.json", "--max_steps", 2, "--output_dir", "run"))
    assert configured("--resume", "run").model.model_config == "unet.json"
    monkeypatch.chdir(tmp_path / "other")
    trained_here(configured("--resume", "../run", "--max_steps", 3))
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()


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
    assert words >= ON_PURPOSE


# ---- --allow_change ---------------------------------------------------------------------------------------------------

CHANGED = {
    "learning_rate": ["0.0005"],
    "batch_size": ["5"],
    "ema_decay": ["0.5", "0.99"],
    "weighting": ["constant"],
    "timestep_sampler": ["stratified"],
    "dropout": ["0.2"],
}
FLAGS = [flag for name, values in CHANGED.items() for flag in (f"--{name}", *values)]
ALLOWED = ["--allow_change", *CHANGED]


@pytest.fixture
def run_of_24(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def opened(*args):
    """The checkpoint from which a command would go on."""
    with open_run(configured(*args)) as run:
        return run.resume


def test_a_run_changed_on_purpose_goes_on_the_same_whether_it_is_killed_or_not(run_of_24, tmp_path, monkeypatch):
    killed, changed = shutil.copytree(run_of_24, tmp_path / "killed"), [*FLAGS, *ALLOWED, "--max_steps", 30]
    launch = Trainer._launch

    def until_26(trainer, *args):
        if trainer.step == 26:
            raise KeyboardInterrupt
        return launch(trainer, *args)

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(Trainer, "_launch", until_26)
        trained_here(configured("--resume", killed, *changed))
    with pytest.raises(InputError, match=r"is finished at step 24, .*; raise --max_steps, too"):
        opened("--resume", run_of_24, "--learning_rate", 1, "--allow_change", "learning_rate")
    with pytest.raises(InputError, match=r"learning_rate: the run has 0.0005, this command says 0.001 \(changed from 0.001 at step 24\)"):
        opened("--config", TINY, "--output_dir", killed, "--max_steps", 30)
    drawn, draw = [], TimestepSampler.draw
    monkeypatch.setattr(TimestepSampler, "draw", lambda sampler, u, places: drawn.append(places) or draw(sampler, u, places))
    for folder in (run_of_24, killed):
        trainer = trained_here(configured("--resume", folder, *changed))
    assert {places.start % 5 for places in drawn} == {0}  # the strata of a step begin with its first sample
    assert tensors(run_of_24, 30) == tensors(killed, 30) and metrics(run_of_24) == metrics(killed)
    assert [part for step in (24, 25) for part in trainer.positions.micro_batches(step)] == [range(192, 197), range(197, 202)]
    state = opened("--resume", run_of_24).state
    assert state["position"] == 24 * 8 + 6 * 5
    assert {change["name"]: change["step"] for change in state["changes"]} == dict.fromkeys(CHANGED, 24)
    assert json.loads((killed / "config.json").read_text())["changes"] == state["changes"]
    assert "- step 24: `learning_rate` from `0.001` to `0.0005`\n" in (killed / "README.md").read_text()
    # Typed again, it is no other change; and both configurations can be read.
    again = opened("--resume", run_of_24, *changed)
    assert again.state["changes"] == state["changes"] and not again.changing
    assert configured("--config", run_of_24 / "config.json").optimization.learning_rate == 0.0005


def test_a_new_ema_rate_starts_from_the_nearest_average_and_a_new_batch_size_at_the_next_position(run_of_24, monkeypatch):
    monkeypatch.setattr(Trainer, "train", lambda *_: 0)
    flags = ["--ema_decay", "0.5", "0.99", "0.999", "--batch_size", "6", "--allow_change", "ema_decay", "batch_size"]
    trainer = trained_here(configured("--resume", run_of_24, "--max_steps", 30, *flags))
    saved = {rate: load(tensors(run_of_24, 24)[f"ema_{rate}.safetensors"]) for rate in (0.9, 0.99)}
    for rate, nearest in ((0.5, 0.9), (0.99, 0.99), (0.999, 0.99)):
        average = trainer.state.optimizer_step.ema.averages[rate]
        assert all(torch.equal(average[name], saved[nearest][name]) for name in average)
    assert trainer.positions.first(24) == 192 and trainer.positions.first(25) == 198


def test_a_change_whose_checkpoint_is_lost_applies_at_the_one_before(run_of_24, capsys):
    change = {"step": 24, "name": "learning_rate", "before": 0.001, "after": 0.0005}
    values = json.loads((run_of_24 / "config.json").read_text())
    (run_of_24 / "config.json").write_text(json.dumps({**values, "learning_rate": 0.0005, "changes": [change]}))
    shutil.rmtree(run_of_24 / "checkpoints" / "step-00000024")
    found = opened("--resume", run_of_24)
    assert found.changing == {"learning_rate"} and found.state["changes"] == [{**change, "step": 18}]
    assert "learning_rate was changed at step 24, which is lost; it now changes at step 18" in capsys.readouterr().err


def test_a_data_set_of_the_hub_keeps_the_commit_with_which_it_was_changed(run_of_24, monkeypatch):
    commits = iter(["a" * 40, "b" * 40])
    monkeypatch.setattr(plan.client, "pinned", lambda name, kind: name if "@" in name else f"{name}@{next(commits)}")
    flags = ["--resume", run_of_24, "--dataset", "user/set", "--max_steps", 30, "--allow_change", "dataset"]
    for _ in range(2):  # typed again after a kill, the branch has moved on
        found = opened(*flags)
        config = plan._config_of_run(configured(*flags), found)
        assert config.data.dataset == f"user/set@{'a' * 40}"
        values = json.loads((run_of_24 / "config.json").read_text())
        noted = state._changes(config, found, found.state["data"])
        assert [(change["before"], change["after"]) for change in noted] == [("digits", config.data.dataset)]
        (run_of_24 / "config.json").write_text(json.dumps({**values, "dataset": config.data.dataset, "changes": noted}))


def test_the_refusal_counts_problems_alone_and_names_the_ways_to_go_on(run_of_24, tmp_path):
    with pytest.raises(InputError) as refused:
        opened("--resume", run_of_24, "--learning_rate", 1, "--batch_size", 4, "--dropout", 0, "--allow_change", "dropout")
    first, *problems, remedy = str(refused.value).splitlines()
    assert first.endswith("holds another run: 2 problems") and len(problems) == 2
    assert remedy == (
        f"go on with the values of the run: --resume {run_of_24}, or change them on purpose with --allow_change dropout batch_size "
        "learning_rate, or name another --output_dir"
    )
    # Not where something else cannot change.
    with pytest.raises(InputError, match=r"holds another run: 2 problems[^:]*: [^:]*: [^:]*: --resume \S+, or name another --output_dir$"):
        opened("--resume", run_of_24, "--seed", 5, "--learning_rate", 1)
    shutil.copytree(run_of_24, tmp_path / "a run")  # a path that a shell would read as two
    with pytest.raises(InputError, match=r"--resume '\S*/a run', or"):
        opened("--resume", tmp_path / "a run", "--seed", 5)


def test_every_field_changes_with_any_command_on_purpose_or_never():
    kinds = [CHANGEABLE, ON_PURPOSE, NEVER.keys()]
    assert sorted(name for kind in kinds for name in kind) == sorted(flatten(TrainConfig()))


@pytest.mark.parametrize(
    "name, said",
    [("seed", "cannot change in the middle of a run"), ("max_steps", "may change anyway"), ("learnin_rate", "such as learning_rate")],
)
def test_what_cannot_be_allowed_to_change_is_said(name, said):
    (problem,) = train_problems(configured("--config", TINY, "--output_dir", "x", "--allow_change", name))
    assert problem.startswith("allow_change names") and said in problem
