"""Rows 1 to 11 of docs/reliability.md: killed, stopped and resumed."""

import contextlib
import json
import os
import random
import shutil
import signal
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import recorder
import torch
from conftest import (
    HANG,
    SMALL,
    Forked,
    as_ranks,
    command,
    computed,
    gone,
    launch,
    launched,
    metrics,
    newest_step,
    run,
    same,
    tensors,
    train_args,
    trained_once,
    wait_for,
)
from here import as_one_of_two, tiny
from PIL import Image

from debias_diffusers.errors import StoppedError
from debias_diffusers.pipelines.pixel_pipeline import load_pipeline
from debias_diffusers.runs import checkpoints
from debias_diffusers.runs.run_directory import open_run
from debias_diffusers.training import device, state_dicts
from debias_diffusers.training.setup.build import make_trainer, run_training
from debias_diffusers.utils.files import TEMPORARY_PREFIX
from debias_diffusers.utils.signals import SignalHandler

LONG = [*SMALL, "--max_steps", 36, "--checkpoint_every", 4]
SAME_AGAIN = "killed at any moment, the same command ends with the same bits"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    return trained_once(tmp_path_factory, "long", *LONG)


def kill_and_finish(folder, flags, moments, trials):
    """Kills a command after each of some CPU seconds, as far as it lives so long; then lets it finish."""
    for seconds in moments:
        process = Forked(*train_args(folder, *flags))
        wait_for(lambda process=process, seconds=seconds: computed(process.pid) >= seconds)
        if not process.process.is_alive():  # done before
            assert process.wait() == 0
            return
        process.send_signal(signal.SIGKILL)
        trials()
        process.wait()
    code, _, err = run(*train_args(folder, *flags))
    assert code == 0, err


@pytest.mark.row(1, SAME_AGAIN)
def test_killed_three_times_the_run_ends_with_the_same_bits(whole, tmp_path, trials):
    killed, steps = tmp_path / "killed", []
    for _ in range(3):
        goal = newest_step(killed) + 4
        process = Forked(*train_args(killed, *LONG))
        wait_for(lambda goal=goal: newest_step(killed) >= goal)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        steps.append(newest_step(killed))
        trials()
    assert 4 <= steps[0] < steps[1] < steps[2] < 36
    code, _, err = run(*train_args(killed, *LONG))
    assert code == 0 and f"resuming {killed} at step" in err
    same(whole, killed, 36)
    for name in ("unet/diffusion_pytorch_model.safetensors", "model_index.json", "README.md", "config.json"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
    assert not list(killed.rglob(".draft*"))


@pytest.mark.row(1, SAME_AGAIN)
@pytest.mark.nightly
@pytest.mark.parametrize("trial", range(4))
def test_killed_five_times_at_random_moments_the_run_ends_with_the_same_bits(whole, tmp_path, trials, trial):
    moments = random.Random(trial)
    kill_and_finish(tmp_path / "run", LONG, [moments.uniform(0.3, 1) for _ in range(5)], trials)
    same(whole, tmp_path / "run", 36)


@pytest.mark.nightly
@pytest.mark.row(1, SAME_AGAIN)
@pytest.mark.parametrize("part", range(6))
def test_three_hundred_runs_killed_up_to_five_times_end_with_the_same_bits(tmp_path, trials, part):
    """Saved at each second of 24 steps, so that many kills fall into a save."""
    flags = ["--checkpoint_every", 2]
    plain = tmp_path / "plain"
    assert run(*train_args(plain, *flags))[0] == 0
    moments = random.Random(part)
    for k in range(50):
        folder = tmp_path / f"run{k}"
        kill_and_finish(folder, flags, [moments.uniform(0.1, 1.2) for _ in range(moments.randint(1, 5))], trials)
        same(plain, folder, 24)
        shutil.rmtree(folder)


# ---- every operation of a save ----------------------------------------------------------------------------------------


def trainer_at(folder, step, *flags):
    """A training in this process that has saved at some steps and stands at one that it has not."""
    config = tiny(folder, *flags)

    class StopAt:
        @property
        def signum(self):
            return signal.SIGTERM if trainer.step >= step - 1 else 0

    trainer, _ = make_trainer(config, open_run(config), device.start_accelerator(config))
    save, trainer.checkpointer.save = trainer.checkpointer.save, lambda at, final=False: None if at == step else save(at, final)
    with contextlib.suppress(StoppedError):
        trainer.train(StopAt())
    assert trainer.step == step
    trainer.checkpointer.save = save
    return trainer


OFTEN = ["--checkpoint_every", 2]
SAVES = {"the first": (2, OFTEN), "one that prunes": (8, [*OFTEN, "--max_steps", 10]), "the last": (8, [*OFTEN, "--max_steps", 8])}


def killed_in_save(trainer, k):
    """Saves in a child that ends at its k-th operation on files; whether it came to the end."""
    child = os.fork()
    if not child:
        with pytest.MonkeyPatch.context() as patch:
            recorder.kill_at(patch, k)
            try:
                trainer.checkpointer.save(trainer.step, final=True)
            except BaseException:
                os._exit(9)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.row(2, "killed at any operation on files of a save, the old or the new checkpoint is whole")
@pytest.mark.parametrize(
    "save, stride",
    [("one that prunes", 4), *(pytest.param(save, 1, marks=pytest.mark.nightly) for save in SAVES)],
)
def test_killed_at_any_operation_of_a_save_the_old_or_the_new_checkpoint_is_whole(tmp_path, monkeypatch, trials, save, stride):
    """At every fourth operation, and nightly at every one; power cuts, below, are tried at every one."""
    step, flags = SAVES[save]
    folder, before = tmp_path / "run", tmp_path / "before"
    trainer = trainer_at(folder, step, *flags)
    tensors = state_dicts.gather(trainer.state)
    monkeypatch.setattr(state_dicts, "gather", lambda *_: tensors)  # once for all saves: it has no operation on files
    shutil.copytree(folder, before)
    old = newest_step(before)
    for k in range(1, 400, stride):
        finished = killed_in_save(trainer, k)
        found, damaged = checkpoints.latest_valid(folder / "checkpoints")
        assert (found.step if found else 0) in ((step,) if finished else (old, step)) and not [d for d in damaged if f"{step:08d}" in d]
        trainer.checkpointer.run.begin(trainer.config)  # as the next start does
        assert not list(folder.rglob(".draft*"))
        trials()
        if finished:
            break
        shutil.rmtree(folder)
        shutil.copytree(before, folder)
    assert finished and k > 40


@pytest.mark.nightly
@pytest.mark.row(2, "killed at any operation on files of a save, the old or the new checkpoint is whole")
@pytest.mark.parametrize("save", SAVES)
def test_killed_at_any_operation_of_a_save_the_run_ends_with_the_same_bits(tmp_path, trials, save):
    step, flags = SAVES[save]
    folder, before, plain = tmp_path / "run", tmp_path / "before", tmp_path / "plain"
    assert run(*train_args(plain, *flags))[0] == 0
    trainer = trainer_at(folder, step, *flags)
    trainer.checkpointer.run._lock.close()
    shutil.copytree(folder, before)
    for k in range(1, 400, 3):
        finished = killed_in_save(trainer, k)
        assert run(*train_args(folder, *flags))[0] == 0
        same(plain, folder, {"the first": 24, "one that prunes": 10, "the last": 8}[save])
        assert not list(folder.rglob(".draft*"))
        trials()
        if finished:
            return
        shutil.rmtree(folder)
        shutil.copytree(before, folder)
    raise AssertionError("the save never came to its end")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A save that prunes, every operation of it, and the folder before."""
    tmp_path = tmp_path_factory.mktemp("recorded")
    step, flags = SAVES["one that prunes"]
    trainer = trainer_at(tmp_path / "run", step, *flags)
    shutil.copytree(tmp_path / "run", tmp_path / "before")
    with pytest.MonkeyPatch.context() as patch:
        log = recorder.Recorder(patch, tmp_path / "run")
        trainer.checkpointer.save(trainer.step, final=True)
    return log, tmp_path / "before", tmp_path / "run"


@pytest.mark.row(3, "a file is synced before it is renamed, and its folder before anything older is removed")
def test_content_is_synced_before_its_name_and_the_folder_after(recorded, trials):
    log, _, folder = recorded
    kinds = [(kind, path) for kind, path, _ in log.log]
    renames = [
        (place, path, target)
        for place, (kind, path, target) in enumerate(log.log)
        if kind == "rename" and not target.name.startswith(TEMPORARY_PREFIX)  # which is the first half of a removal
    ]
    (saved,) = [place for place, _, target in renames if target.name == "step-00000008"]
    for place, path, target in renames:
        trials()
        files_of_it = sorted(p.name for p in target.iterdir()) if target.is_dir() else [path.name]
        drafts = [path / name for name in files_of_it] if target.is_dir() else [path]
        assert all(("sync", draft) in kinds[:place] for draft in drafts), target
        assert ("sync", target.parent) in kinds[place:], target
    removed = [place for place, (kind, path) in enumerate(kinds) if kind in ("remove", "rename") and path.name == "step-00000004"]
    assert removed and min(removed) > kinds.index(("sync", folder / "checkpoints"), saved)
    assert len(renames) >= 6


@pytest.mark.row(11, "after a power cut at any moment a checkpoint loads")
def test_after_a_power_cut_the_old_or_the_new_checkpoint_loads(recorded, tmp_path, trials):
    """What was not synced is lost; the names are there."""
    log, before, _ = recorded
    for prefix in range(len(log.log) + 1):
        folder = tmp_path / "found"
        log.after_power_cut(prefix, before, folder)
        found, damaged = checkpoints.latest_valid(folder / "checkpoints")
        assert found and found.step in (6, 8) and not [d for d in damaged if "step-00000008" in d]
        assert found.step == 8 or prefix < len(log.log)
        shutil.rmtree(folder)
        trials()


# ---- signals ----------------------------------------------------------------------------------------------------------

STOPS = "SIGTERM at any time: the run saves after the current step, exit code 143, and the same command resumes"


def stopped(folder, flags, seconds, signum):
    """A signal so many CPU seconds after the first step; (exit code, steps that it was not obeyed for, what was said)."""
    process = Forked(*train_args(folder, *flags))
    wait_for(lambda: (folder / "metrics.jsonl").exists())
    end = computed(process.pid) + seconds
    wait_for(lambda: computed(process.pid) >= end)
    process.send_signal(signal.SIGSTOP)  # nothing is done between the look at its steps and the signal
    wait_for(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
    step = max((line["step"] for line in metrics(folder)), default=0)
    process.send_signal(signum)
    process.send_signal(signal.SIGCONT)
    code, _, err = process.result()
    return code, metrics(folder)[-1]["step"] - step, err


# The step at hand, and before it one that is done and not yet written down.
AT_HAND = 2


@pytest.mark.row(4, STOPS)
@pytest.mark.parametrize("count", (1, pytest.param(50, marks=pytest.mark.nightly)))
def test_terminated_at_any_moment_it_saves_and_the_same_command_continues(tmp_path, trials, count):
    """With three forwards in a step and a save at each second one, signals fall into all of them."""
    flags = [*SMALL, "--max_steps", 12, "--checkpoint_every", 2, "--micro_batch_size", 3]
    plain, moments = tmp_path / "plain", random.Random(count)
    assert run(*train_args(plain, *flags))[0] == 0
    for k in range(count):
        folder = tmp_path / f"run{k}"
        code, steps, err = stopped(folder, flags, moments.uniform(0, 0.4), signal.SIGTERM)
        step = newest_step(folder)
        assert code == 143 and steps <= AT_HAND and metrics(folder)[-1]["step"] == step
        assert err.strip().splitlines()[-1].startswith(f"error: stopped by SIGTERM at step {step} of 12, saved")
        assert run(*train_args(folder, *flags))[0] == 0
        same(plain, folder, 12)
        trials()


@pytest.mark.row(4, STOPS)
def test_a_signal_to_the_whole_group_saves_too_when_workers_read(tmp_path):
    folder = tmp_path / "run"
    flags = ["--max_steps", 100_000, "--checkpoint_every", 0, "--num_workers", 2]
    process = Forked(*train_args(folder, *flags), before=os.setsid)
    wait_for(lambda: (folder / "metrics.jsonl").exists())
    os.killpg(process.pid, signal.SIGTERM)
    code, _, err = process.result()
    assert code == 143 and "Traceback" not in err and newest_step(folder) > 0


@pytest.mark.row(4, STOPS)
def test_when_its_parent_dies_a_launched_training_saves_and_stops(tmp_path):
    folder = tmp_path / "run"
    launcher = Forked(*train_args(folder, "--max_steps", 100_000, "--checkpoint_every", 0), before=go_on_in_a_child)
    wait_for(lambda: (folder / "metrics.jsonl").exists())
    (pid,) = children(launcher.pid)
    launcher.kill()
    wait_for(lambda: gone(pid))
    assert 0 < newest_step(folder) < 100_000
    assert "error: stopped by SIGTERM" in launcher.err.read_text()


def go_on_in_a_child():
    """In a forked process: it waits, as the launcher of one process does, for a child that has its environment."""
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    if os.fork():
        os.wait()
        os._exit(0)


@pytest.mark.nightly
@pytest.mark.row(4, STOPS)
@pytest.mark.parametrize("signum", (signal.SIGTERM, signal.SIGKILL))
def test_when_the_launcher_dies_the_training_saves_and_stops(tmp_path, signum):
    folder = tmp_path / "run"
    launcher = launch(1, *train_args(folder, "--max_steps", 100_000, "--checkpoint_every", 0))
    wait_for(lambda: (folder / "metrics.jsonl").exists())
    pid = int((folder / ".lock").read_text().split()[1])
    assert pid != launcher.pid
    launcher.send_signal(signum)
    wait_for(lambda: gone(pid))
    launcher.communicate()
    assert 0 < newest_step(folder) < 100_000


@pytest.mark.row(5, "one SIGINT: the run saves, exit code 130; two: it stops at once, and the last checkpoint is whole")
def test_interrupted_once_it_saves_and_the_same_command_continues(whole, tmp_path):
    code, steps, err = stopped(tmp_path / "run", LONG, 0.3, signal.SIGINT)
    assert code == 130 and steps <= AT_HAND and "error: stopped by SIGINT at step" in err
    assert run(*train_args(tmp_path / "run", *LONG))[0] == 0
    same(whole, tmp_path / "run", 36)


def note_interrupts(path, held):
    """In a process that trains: makes a file when a signal is noted; `held` saves, from step 5 on, write a file and never end."""
    write, obey = checkpoints.write, SignalHandler._on_signal

    def begun(tensors):
        yield next(iter(tensors))
        threading.Event().wait()

    def held_write(folder, step, tensors, *rest):
        return write(folder, step, begun(tensors) if held and step > 4 else tensors, *rest)

    def noted(stop, signum, frame):
        obey(stop, signum, frame)
        path.touch()

    checkpoints.write, SignalHandler._on_signal = held_write, noted


@pytest.mark.row(5, "one SIGINT: the run saves, exit code 130; two: it stops at once, and the last checkpoint is whole")
@pytest.mark.parametrize("count", (2, pytest.param(8, marks=pytest.mark.nightly)))
def test_interrupted_twice_it_stops_at_once(whole, tmp_path, trials, count):
    """In the step, in the save, or behind it; and, what is not left to chance, in a save that never ends."""
    for k in range(count):
        folder, noted = tmp_path / f"run{k}", tmp_path / f"noted{k}"
        process = Forked(*train_args(folder, *LONG), before=partial(note_interrupts, noted, held=k == count - 1))
        wait_for(lambda folder=folder: newest_step(folder) >= 4)
        process.send_signal(signal.SIGINT)
        wait_for(lambda noted=noted, process=process: noted.exists() or not process.process.is_alive())
        time.sleep(0.005 * k)
        with contextlib.suppress(ProcessLookupError):  # the save may be done
            process.send_signal(signal.SIGINT)
        code, _, err = process.result()
        assert code == 130 and "Traceback" not in err
        found, damaged = checkpoints.latest_valid(folder / "checkpoints")
        assert found.step >= 4 and not damaged
        trials()
    assert "stopped at once; the last checkpoint is untouched" in err and found.step == 4
    assert run(*train_args(folder, *LONG))[0] == 0
    same(whole, folder, 36)


@pytest.mark.row(5, "one SIGINT: the run saves, exit code 130; two: it stops at once, and the last checkpoint is whole")
@pytest.mark.parametrize("seconds", (0.15, pytest.param(1.5, marks=pytest.mark.nightly)))
def test_interrupted_while_it_starts_it_says_so(tmp_path, seconds):
    process = command(*train_args(tmp_path / "run", "--max_steps", 100_000))
    wait_for(lambda: computed(process.pid) >= seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=HANG)
    if process.returncode == 1:  # on a slow machine, before Python has started
        assert "Failed to import the site module" in err
        return
    assert process.returncode in (130, -signal.SIGINT)  # the latter while the modules of the command line are imported
    if process.returncode == 130:
        assert "Traceback" not in err and err.strip().splitlines()[-1].startswith("error: ")


ORPHANS = "a killed data loader worker ends the run with a clear error, and a killed run leaves no process behind"


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.row(6, ORPHANS)
def test_a_killed_worker_ends_the_run_with_a_sentence(tmp_path):
    folder = tmp_path / "run"
    process = Forked(*train_args(folder, "--max_steps", 100_000, "--num_workers", 1))
    wait_for(lambda: (folder / "metrics.jsonl").exists())
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    code, _, err = process.result()
    assert code == 1 and "Traceback" not in err
    assert "error: a process that reads images was killed" in err


def look_often():
    """In a process that trains: its workers look for it as often as this, and not each five seconds."""
    torch.utils.data._utils.worker.MP_STATUS_CHECK_INTERVAL = 0.1


@pytest.mark.row(6, ORPHANS)
def test_a_killed_run_leaves_no_worker_and_a_free_directory(tmp_path):
    folder = tmp_path / "run"
    flags = ["--max_steps", 100_000, "--checkpoint_every", 0, "--num_workers", 2]
    process = Forked(*train_args(folder, *flags), before=look_often)
    wait_for(lambda: (folder / "metrics.jsonl").exists())
    workers = children(process.pid)
    process.kill()
    process.wait()
    assert run(*train_args(folder, "--max_steps", 5))[0] == 0
    assert len(workers) >= 2
    wait_for(lambda: all(gone(pid) for pid in workers))


# ---- resumed under all conditions -------------------------------------------------------------------------------------


class StopAfter:
    """Asks to stop when so many steps were looked at."""

    def __init__(self, steps):
        self.left = steps

    def record(self):
        pass

    @property
    def signum(self):
        self.left -= 1
        return signal.SIGTERM if self.left < 0 else 0


def train_here(folder, flags, stop=None):
    """Trains in this process; with a step to stop at, saves there."""
    config = tiny(folder, *flags)
    held = open_run(config)
    try:
        run_training(config, held, StopAfter(stop - 1) if stop else SimpleNamespace(signum=0, record=lambda: None))
    except StoppedError:
        assert newest_step(folder) == stop
    finally:
        held._lock.close()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """24 images: an epoch of three steps."""
    folder = tmp_path_factory.mktemp("images")
    for k in range(24):
        Image.new("L", (8, 8), 10 * k).save(folder / f"{k:02d}.png")
    return folder


@pytest.mark.row(7, "resumed at an epoch's end, in the middle, before the first and after the last save: the same bits")
@pytest.mark.parametrize(
    "micro_batch_size, dropout",
    [(4, 0.2), *(pytest.param(*more, marks=pytest.mark.nightly) for more in ((4, 0), (8, 0), (2, 0), (2, 0.2), (8, 0.2)))],
)
def test_resumed_at_any_step_with_any_accumulation_and_dropout(images, tmp_path, trials, micro_batch_size, dropout):
    flags = [*SMALL, "--dataset", images, "--micro_batch_size", micro_batch_size, "--dropout", dropout, "--max_steps", 9, "--log_every", 2]
    train_here(tmp_path / "whole", flags)
    for stop in (None, 3, 5, 8):
        folder = tmp_path / f"stop{stop}"
        if stop is None:  # killed before it had saved anything: what it wrote is trained again
            train_here(folder, flags, stop=2)
            shutil.rmtree(folder / "checkpoints")
            (folder / "checkpoints").mkdir()
        else:
            train_here(folder, flags, stop)
        train_here(folder, flags)
        same(tmp_path / "whole", folder, 9)
        trials()


def test_of_several_processes_all_stop_with_the_step_in_which_one_is_asked_to(tmp_path, monkeypatch):
    as_one_of_two(monkeypatch)
    train_here(tmp_path / "run", [*SMALL, "--max_steps", 9, "--log_every", 9, "--checkpoint_every", 9], stop=3)
    assert newest_step(tmp_path / "run") == 3


@pytest.mark.row(8, "a finished run is not changed")
def test_a_finished_run_is_left_as_it_is(trained):
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in trained.rglob("*") if p.is_file() and p.name != ".lock"}
    process = Forked(*train_args(trained))
    code, _, err = process.result()
    assert code == 0 and "is finished at step 24" in err and process.cpu < 5
    assert before == {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in trained.rglob("*") if p.is_file() and p.name != ".lock"}


def test_what_a_kill_left_in_a_finished_run_is_removed(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    (older, *_, _newest) = checkpoints.list_checkpoints(folder / "checkpoints")
    ended = 2**22 + 1  # no process has this number
    older.rename(older.with_name(f"{TEMPORARY_PREFIX}{ended}-0123abcd-{older.name}"))  # as a save does before it removes it
    code, _, err = Forked(*train_args(folder)).result()
    assert code == 0 and "is finished at step 24" in err and not list(folder.rglob(".draft*"))


NUMBERS = "other numbers of processes, workers or micro-batches: the same samples, losses to 1e-5"


WITHOUT_DROPOUT = [*SMALL, "--dropout", 0, "--max_steps", 8]


@pytest.fixture(scope="module")
def without_dropout(tmp_path_factory):
    return trained_once(tmp_path_factory, "without-dropout", *WITHOUT_DROPOUT)


@pytest.mark.row(9, NUMBERS)
@pytest.mark.parametrize(
    "flags", [["--micro_batch_size", 3], ["--num_workers", 2], pytest.param(["--num_workers", 1], marks=pytest.mark.nightly)]
)
def test_pieces_and_workers_change_no_sample(without_dropout, tmp_path, flags):
    """With workers the bits are the same; in pieces the sums round differently."""
    assert run(*train_args(tmp_path / "run", *WITHOUT_DROPOUT, *flags))[0] == 0
    if "--num_workers" in flags:
        same(without_dropout, tmp_path / "run", 8)
    losses_agree(without_dropout, tmp_path / "run")


def losses_agree(one, other):
    assert len(metrics(one)) == len(metrics(other))
    for left, right in zip(metrics(one), metrics(other)):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-5)


def networks_agree(one, other):
    """The exported ones, so the averages of the weights are in this too."""
    x_t, t = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 300, 700, 999])
    with torch.no_grad():
        outputs = [load_pipeline(str(folder)).unet(x_t, t).sample for folder in (one, other)]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)


@pytest.mark.row(9, NUMBERS)
@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.nightly)])
def test_several_processes_train_what_one_trains_and_resume_with_the_same_bits(tmp_path, processes):
    one, several, resumed = tmp_path / "one", tmp_path / "several", tmp_path / "resumed"
    flags = [*SMALL, "--dropout", 0, "--lr_schedule", "constant", "--batch_size", 4 * processes, "--checkpoint_every", 4]
    assert run(*train_args(one, *flags, "--max_steps", 8))[0] == 0
    for folder, steps in ((several, 8), (resumed, 4), (resumed, 8)):
        code, err = as_ranks(processes, *train_args(folder, *flags, "--max_steps", steps))
        assert code == 0, err
    same(several, resumed, 8)
    state = json.loads((several / "checkpoints" / "step-00000008" / "state.json").read_text())
    assert state["num_processes"] == processes and state["position"] == 8 * 4 * processes
    losses_agree(one, several)
    networks_agree(one, several)


@pytest.mark.nightly
@pytest.mark.row(9, NUMBERS)
def test_a_run_goes_from_one_process_to_two_to_three_and_back(tmp_path):
    plain, changed = tmp_path / "plain", tmp_path / "changed"
    flags = ["--dropout", 0, "--lr_schedule", "constant", "--batch_size", 12]
    assert run(*train_args(plain, *flags))[0] == 0
    assert run(*train_args(changed, *flags, "--max_steps", 6))[0] == 0
    for processes, steps in ((2, 12), (3, 18)):
        code, err = launched(processes, *train_args(changed, *flags, "--max_steps", steps))
        assert code == 0 and f"num_processes was {processes - 1}, now it is {processes}" in err
    code, _, err = run(*train_args(changed, *flags))
    assert code == 0 and "num_processes was 3, now it is 1" in err
    losses_agree(plain, changed)
    networks_agree(plain, changed)


@pytest.mark.nightly
@pytest.mark.row(9, NUMBERS)
@pytest.mark.parametrize("processes, flags", [(3, []), (3, ["--dropout", 0.1]), (2, ["--micro_batch_size", 5])])
def test_a_resume_over_several_processes_has_the_same_bits(tmp_path, processes, flags):
    flags = ["--batch_size", 24, "--lr_schedule", "constant", *flags]
    one, other = tmp_path / "whole", tmp_path / "resumed"
    for folder, steps in ((one, 12), (other, 6), (other, 12)):
        code, err = launched(processes, *train_args(folder, *flags, "--max_steps", steps))
        assert code == 0, err
    same(one, other, 12)


@pytest.mark.row(10, "a resume with another number of threads or another version prints both values")
def test_another_number_of_threads_is_said(tmp_path):
    assert run(*train_args(tmp_path / "run", "--max_steps", 6, "--lr_schedule", "constant"))[0] == 0
    code, _, err = run(*train_args(tmp_path / "run", "--max_steps", 7, "--lr_schedule", "constant", "--num_threads", 2))
    assert code == 0 and "warning: num_threads was 1, now it is 2; the run goes on, but not bit for bit as before" in err


@pytest.mark.row(10, "a resume with another number of threads or another version prints both values")
@pytest.mark.parametrize("name", device.versions())
def test_another_version_is_said(trained, capsys, name):
    before = json.loads((trained / "checkpoints" / "step-00000024" / "state.json").read_text())
    now = before | {"versions": before["versions"] | {name: "99.9"}}
    device.say_what_changed(before, now)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"the version of {name} was {before['versions'][name]}, now it is 99.9" in line
    device.say_what_changed(before, before)
    assert capsys.readouterr().err == ""


def test_the_bytes_that_are_compared_are_those_of_a_training(trained):
    """So that `same` cannot pass on nothing: steps differ, and so do seeds."""
    assert tensors(trained, 18)["model.safetensors"] != tensors(trained, 24)["model.safetensors"]
    assert len(metrics(trained)) == 24 and len({line["loss"] for line in metrics(trained)}) == 24


@pytest.mark.row(18, "metrics.jsonl has every step exactly once; truncated lines and later steps are dropped")
def test_the_last_step_has_its_line_which_goes_when_the_run_goes_on(tmp_path):
    """Lines at 4 and 8; the end at 6 has one, too, but leaves the sums open for that of 8."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    flags = ["--log_every", 4, "--warmup_steps", 0, "--lr_schedule", "constant"]
    train_here(whole, [*flags, "--max_steps", 9])
    for steps, lines in ((2, [2]), (6, [4, 6]), (9, [4, 8, 9])):
        train_here(resumed, [*flags, "--max_steps", steps])
        assert [line["step"] for line in metrics(resumed)] == lines
    assert metrics(resumed) == metrics(whole)
    train_here(resumed, [*flags, "--max_steps", 9])  # finished
    assert metrics(resumed) == metrics(whole)
