"""Rows 64 to 69 of docs/reliability.md: ways out, launchers, averages, and work shared between processes."""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from conftest import ROOT, TINY, command, metrics, run, tensors, train_args, wait_for
from here import tiny, trained_here
from safetensors.torch import load

from debias_diffusers import checkpoint, cli, data, launcher, machine, training
from debias_diffusers.config import packaged_configs
from debias_diffusers.ema import EMA
from debias_diffusers.errors import DebiasError, InputError
from debias_diffusers.sources import open_source

# ---- 64: the ways out -------------------------------------------------------------------------------------------------

NO_WORKER = "however a training ends, no process that reads images is left, and the command ends"


class Stuck(data.TrainingData):
    """One worker never returns from an image."""

    def _sample(self, position):
        if position == 9:
            while True:
                time.sleep(1)
        return super()._sample(position)


def loaded(kind, steps=20):
    config = tiny("nowhere", "--num_workers", 2)
    source = kind(open_source(config.data), config.data, 0)
    return data.batches(source, data.PositionBatches(8, 8, 0, 1, range(steps)), pin_memory=False)


@pytest.fixture
def soon(monkeypatch):
    """torch waits five seconds for each worker that does not obey."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)


@pytest.mark.row(64, NO_WORKER)
@pytest.mark.parametrize("way", ["exhausted", "closed", "error of another kind", "killed", "stuck", "never begun"])
def test_on_every_way_out_no_worker_is_left(way, soon, trials):
    trials()
    before = set(multiprocessing.active_children())
    batches = loaded(Stuck if way == "stuck" else data.TrainingData, 2 if way == "exhausted" else 20)
    kept = None
    try:
        with contextlib.closing(batches):
            if way == "exhausted":
                assert len(list(batches)) == 2
            elif way != "never begun":
                next(batches)
                assert len(set(multiprocessing.active_children()) - before) == 2
            if way == "killed":
                (victim, *_) = set(multiprocessing.active_children()) - before
                os.kill(victim.pid, signal.SIGKILL)
                list(batches)
            if way == "error of another kind":
                raise ZeroDivisionError
    except (ZeroDivisionError, RuntimeError, DebiasError) as error:
        kept = error  # with its traceback, which holds the loader
    assert (kept is not None) == (way in ("error of another kind", "killed"))
    assert set(multiprocessing.active_children()) == before


BOOM = """
import sys, signal
from debias_diffusers import cli, training
original = training.Trainer._update
def boom(self, loss):
    if self.step == 2:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return original(self, loss)
training.Trainer._update = boom
sys.exit(cli.train(sys.argv[1:]))
"""


@pytest.mark.row(64, NO_WORKER)
def test_an_error_that_is_not_ours_ends_a_process_with_workers(tmp_path, trials):
    trials()
    process = command("-c", BOOM, *train_args(tmp_path / "run", "--num_workers", 2)[1:])
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "illegal memory access" in err.splitlines()[-1]


@pytest.mark.row(64, NO_WORKER)
def test_a_signal_ends_a_process_whose_training_has_ended(trials):
    """A thread of a library may keep it from ending by itself."""
    trials()
    script = (
        "import time; from debias_diffusers.run import StopSignal; stop = StopSignal(); stop.ended = True; print('there', flush=True);"
        "time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "there\n"
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM


@pytest.mark.row(64, NO_WORKER)
@pytest.mark.parametrize(
    "said",
    [
        "unable to allocate shared memory(shm) for file </torch_77_1>: No space left on device (28)",
        "unable to write to file </torch_77_1>: No space left on device (28)",
        "DataLoader worker (pid 9) is killed by signal: Bus error. It is possible that dataloader's workers are out of shared memory.",
    ],
)
def test_workers_without_shared_memory_are_explained(said, trials):
    trials()
    outer = RuntimeError("DataLoader worker (pid(s) 9) exited unexpectedly")
    outer.__cause__ = RuntimeError(said)
    for error in (RuntimeError(said), outer):
        sentence = str(machine.explained(error, "--micro_batch_size", 8))
        assert all(words in sentence for words in ("/dev/shm", "--shm-size", "--num_workers 0"))
    other = machine.explained(RuntimeError("DataLoader worker (pid(s) 9) exited unexpectedly"), "--micro_batch_size", 8)
    assert str(other) == data.LOST_WORKER
    assert machine.explained(RuntimeError("out of resource: shared memory, Required: 263168"), "--micro_batch_size", 8) is None


@pytest.mark.nightly
@pytest.mark.row(64, NO_WORKER)
def test_with_a_tiny_dev_shm_it_says_so_and_ends(tmp_path, trials):
    trials()
    script = 'mount -t tmpfs -o size=64k tmpfs /dev/shm || exit 77; exec "$@"'
    flags = ["--num_workers", 2, "--batch_size", 512, "--cache_images_mb", 0]
    inner = [sys.executable, *map(str, train_args(tmp_path / "run", *flags))]
    found = subprocess.run(["unshare", "-m", "bash", "-c", script, "-", *inner], cwd=ROOT, capture_output=True, text=True, timeout=120)
    if "unshare" in found.stderr or found.returncode == 77:
        pytest.skip("this user may not mount here")
    assert found.returncode == 1 and "Traceback" not in found.stderr and "--shm-size" in found.stderr.splitlines()[-1]


# ---- 65: what a launcher asks for -------------------------------------------------------------------------------------

LAUNCHER = "what a launcher's environment asks for is done, or refused by name before data and network are read"
ASKED = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_MEGATRON_LM": "true",
    "ACCELERATE_USE_FSDP": "True",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "1",
    "ACCELERATE_USE_SAGEMAKER": "true",
    "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
}


@pytest.mark.row(65, LAUNCHER)
@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize(
    "program, args", [("train", ["--dataset", "nowhere"]), ("sample", ["nowhere"]), ("evaluate", ["score", "nowhere"])]
)
def test_what_is_not_built_is_refused_by_name(name, program, args, monkeypatch, tmp_path, capfd, trials):
    trials()
    monkeypatch.setenv(name, ASKED[name])
    where = ["--config", str(TINY)] * (program == "train") + ["--output_dir", str(tmp_path / "out")] * (program != "evaluate")
    assert getattr(cli, program)([*args, *where]) == 2
    (sentence,) = capfd.readouterr().err.splitlines()
    assert sentence.startswith(f"error: launcher: {name} is {ASKED[name]}, but ") and not (tmp_path / "out").exists()


@pytest.mark.row(65, LAUNCHER)
def test_what_accelerate_launch_sets_by_itself_is_no_problem(trials):
    trials()
    usual = dict.fromkeys(launcher.REFUSED, "false") | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "ACCELERATE_DYNAMO_BACKEND": "NO"}
    assert launcher.problems(usual) == launcher.problems({}) == []
    assert len(launcher.problems(ASKED)) == len(ASKED) == len(launcher.REFUSED)


@pytest.mark.row(65, LAUNCHER)
def test_the_gradient_is_whole_whatever_the_environment_says(tmp_path, monkeypatch, trials):
    """The variable is refused by the command; a script of one's own may call the training all the same."""
    trials()
    flags = ["--max_steps", 1, "--log_every", 1]
    trained_here(tiny(tmp_path / "plain", *flags))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    trained_here(tiny(tmp_path / "four", *flags))
    assert metrics(tmp_path / "plain") == metrics(tmp_path / "four")


@pytest.mark.row(65, LAUNCHER)
@pytest.mark.parametrize("kind", [kind for kind in DistributedType if kind.value not in ("NO", "MULTI_CPU", "MULTI_GPU")])
@pytest.mark.parametrize("start", ["train", "sample"])
def test_every_other_kind_of_distribution_is_refused_by_name(kind, start, tmp_path, monkeypatch, trials):
    trials()
    config = tiny(tmp_path / "run")
    AcceleratorState._reset_state(True)
    monkeypatch.setattr(machine.Accelerator, "distributed_type", kind)
    try:
        with pytest.raises(InputError, match=f"configured for {kind.value}, but only one process"):
            machine.start_accelerator(config) if start == "train" else machine.start_processes(1)
    finally:
        AcceleratorState._reset_state(True)


@pytest.mark.row(65, LAUNCHER)
@pytest.mark.parametrize("name, value", [("ACCELERATE_DEBUG_MODE", "perhaps"), ("ACCELERATE_USE_CPU", "perhaps")])
def test_an_error_of_the_launchers_configuration_is_not_blamed_on_the_precision(name, value, tmp_path, monkeypatch, trials):
    trials()
    config = tiny(tmp_path / "run")
    AcceleratorState._reset_state(True)
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="configuration says: .*perhaps") as caught:
        machine.start_accelerator(config)
    assert "mixed_precision" not in str(caught.value)
    AcceleratorState._reset_state(True)
    PartialState._reset_state()


# ---- 66: averages -----------------------------------------------------------------------------------------------------

AVERAGES = "averages forget the initial weights within a short run, and a run that does not learn says so"


@pytest.mark.row(66, AVERAGES)
@pytest.mark.parametrize("rate", [0.0, 0.5, 0.99, 0.9999])
def test_the_warm_up_is_its_closed_form(rate, trials):
    trials()
    weight = torch.ones(2)
    ema = EMA({"w": weight}, (rate, 0.9), warmup=True)
    initial, expected = 1.0, 1.0
    for n in range(200):
        weight.fill_(float(n % 7))
        ema.update(n)
        now = min(rate, (1 + n) / (10 + n))
        expected, initial = now * expected + (1 - now) * (n % 7), now * initial
    torch.testing.assert_close(ema.averages[rate]["w"], torch.full((2,), expected))
    assert initial < 1e-3


@pytest.mark.row(66, AVERAGES)
def test_what_a_short_run_exports_is_what_it_learned(tmp_path, trials):
    """A linear recursion: begun from weights that are larger by 1, averages of the same steps differ by what is left of them."""
    trials()
    flags = ["--max_steps", 200, "--checkpoint_every", 0, "--ema_decay", 0.9999, "--log_every", 0]
    left = []
    for name, more in (("with", []), ("without", ["--no_ema_warmup"])):
        config = tiny(tmp_path / name, *flags, *more)
        trained_here(config)
        found = load(tensors(tmp_path / name, 200)["ema_0.9999.safetensors"])
        weights = load(tensors(tmp_path / name, 200)["model.safetensors"])
        left.append(max((found[key] - weights[key]).abs().max().item() for key in weights))
    assert left[0] < left[1] / 2


@pytest.mark.row(66, AVERAGES)
def test_a_run_that_began_before_the_warm_up_goes_on_without_it(tmp_path, trials):
    """Twice, with the same command; and what it learns is what a run without learns."""
    trials()
    old, plain = tmp_path / "old", tmp_path / "plain"
    trained_here(tiny(plain, "--max_steps", 12, "--no_ema_warmup", "--lr_schedule", "constant", "--checkpoint_every", 4))
    trained_here(tiny(old, "--max_steps", 4, "--no_ema_warmup", "--lr_schedule", "constant"))
    found, _ = checkpoint.latest_valid(old / "checkpoints")
    state = {**found.state, "config": {name: value for name, value in found.state["config"].items() if name != "ema_warmup"}}
    contents = [(name, (found.path / name).read_bytes()) for name in tensors(old, 4)]
    checkpoint.write(old / "checkpoints", 4, contents, state, 1, None)
    for steps in (8, 12):
        trained_here(tiny(old, "--max_steps", steps, "--lr_schedule", "constant"))
    assert tensors(old, 12) == tensors(plain, 12)
    assert json.loads((old / "config.json").read_text())["ema_warmup"] is False
    with pytest.raises(InputError, match="ema_warmup: the run has False, this command says True"):
        trained_here(tiny(plain, "--max_steps", 12, "--lr_schedule", "constant"))


@pytest.mark.row(66, AVERAGES)
def test_only_the_runs_of_others_have_no_warm_up(trials):
    for name in packaged_configs():
        trials()
        config = cli.train_config(["--config", name, "--dataset", "digits"] if name != "digits" else ["--config", name], None)
        assert config.optimization.ema_warmup == (name == "digits"), name


@pytest.mark.row(66, AVERAGES)
def test_a_gradient_of_zero_and_averages_that_do_not_move_are_said_once(tmp_path, monkeypatch, capfd, trials):
    trials()
    flags = ["--max_steps", 6, "--checkpoint_every", 3, "--lr_schedule", "constant"]
    trained_here(tiny(tmp_path / "sound", *flags))
    assert "warning" not in capfd.readouterr().err
    original = training.Trainer._terms

    def detached(trainer, batch, t):
        terms = original(trainer, batch, t)
        return type(terms)(**{**vars(terms), "loss": terms.loss * 0})

    monkeypatch.setattr(training.Trainer, "_terms", detached)
    trained_here(tiny(tmp_path / "still", *flags))
    said = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    assert [line for line in said if "gradient of step 1 is exactly 0" in line] == said[:1]
    assert "ema_decay 0.9, 0.99 have not changed from step 0 to 3" in said[1]
    assert len(said) == 2
