"""The disk and the directory of a run: full, read-only, taken by another process, moved, or left in the middle of a pruning."""

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import HANG, ROOT, Forked, command, cpu_of_children, metrics, run, same, train_args, wait_for, writers
from here import tiny, trained_here
from recorder import Killed, kill_at

from debias_diffusers.errors import CannotWriteError, RunInUseError
from debias_diffusers.runs import checkpoints
from debias_diffusers.runs.metrics_file import MetricsFile
from debias_diffusers.runs.run_directory import open_run
from debias_diffusers.training import device, saver
from debias_diffusers.utils import files

HOST = socket.gethostname()
STEADY = ["--lr_schedule", "constant", "--checkpoint_every", 2, "--warmup_steps", 0]


def size_of(folder):
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def contents(folder):
    """Every path below a folder with its bytes and the time of its last change."""
    return {p: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else None) for p in sorted(folder.rglob("*"))}


class Mounts:
    """File systems of a test's own. A process holds them, with which they end; no other sees them but by way of it."""

    def __init__(self, folder):
        self.folder = folder
        hold = ["unshare", "--mount", "sh", "-c", "echo ready; exec cat"]
        self.holder = subprocess.Popen(hold, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.permitted = self.holder.stdout.readline() == b"ready\n"

    def mount(self, name, *options):
        """Mounts over a folder of this name; returns the way to what is mounted."""
        place = self.folder / name
        place.mkdir(exist_ok=True)
        subprocess.run(["nsenter", "-t", str(self.holder.pid), "-m", "mount", *map(str, options), place], check=True)
        return Path(f"/proc/{self.holder.pid}/root{place}")

    def disk(self, name, size):
        """A disk with so many bytes."""
        return self.mount(name, "-t", "tmpfs", "-o", f"size={size}", "none")

    def resize(self, name, size):
        self.mount(name, "-o", f"remount,size={size}")

    def end(self):
        self.holder.stdin.close()
        self.holder.wait()


@pytest.fixture
def mounts(tmp_path):
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        pytest.skip("needs unshare and nsenter")
    here = Mounts(tmp_path)
    if not here.permitted:
        here.end()
        pytest.skip("this user may not mount here")
    yield here
    here.end()


def used(disk):
    found = os.statvfs(disk)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


@pytest.fixture(scope="module")
def steady(tmp_path_factory):
    """Uninterrupted runs of 2 and of 6 steps."""
    folder = tmp_path_factory.mktemp("steady")
    for steps in (2, 6):
        code, _, err = run(*train_args(folder / f"{steps}", *STEADY, "--max_steps", steps))
        assert code == 0, err
    return folder


# ---- 19: a full disk --------------------------------------------------------------------------------------------------

FULL = r"No space left on device.* \((\d+\.\d) MB free\); a save needs about (\d+\.\d) MB"


@pytest.mark.row(19, "on a full disk the previous checkpoint stays whole, training continues, and the last save must succeed")
@pytest.mark.parametrize("points", [[1], pytest.param(range(8), marks=pytest.mark.nightly)])
def test_on_a_full_disk_the_checkpoint_before_stays_and_the_run_ends_with_the_same_bits(steady, mounts, points, trials):
    """Room for so many eighths, and a half, of a checkpoint."""
    checkpoint_size = size_of(steady / "2" / "checkpoints" / "step-00000002")
    for eighths in points:
        trials()
        disk = mounts.disk(f"disk-{eighths}", "64m")
        folder = shutil.copytree(steady / "2", disk / "run")
        size = used(disk) + checkpoint_size * (2 * eighths + 1) // 16
        mounts.resize(f"disk-{eighths}", size)
        code, _, err = run(*train_args(folder, *STEADY, "--max_steps", 6))
        assert code == 4 and "Traceback" not in err
        missed, last = re.findall(FULL, err)
        assert "step 4 was not saved" in err and "training goes on" in err and err.strip().splitlines()[-1].startswith("error: ")
        for free, needed in (missed, last):
            assert float(free) < float(needed) and 0.8 * checkpoint_size < 1e6 * float(needed) < 1.3 * checkpoint_size
        found, damaged = checkpoints.latest_valid(folder / "checkpoints")
        assert (found.step, damaged) == (2, []) and not list(folder.rglob(".draft*"))
        mounts.resize(f"disk-{eighths}", "64m")
        code, _, err = run(*train_args(folder, *STEADY, "--max_steps", 6))
        assert code == 0 and f"resuming {folder} at step 2" in err
        same(steady / "6", folder, 6)


@pytest.mark.row(19, "on a full disk the previous checkpoint stays whole, training continues, and the last save must succeed")
def test_wherever_the_disk_is_full_the_checkpoint_before_verifies_and_no_draft_stays(mounts, trials):
    """Files of 2, 3, 4 and 5 pages, with room for 0 to 15: it fails in every one of them, and succeeds with a page more."""
    draws = random.Random(0)
    content = writers({f"{pages}.safetensors": draws.randbytes(4096 * pages - 9) for pages in (2, 3, 4, 5)})
    disk = mounts.disk("disk", "16m")
    checkpoints.write(disk, 10, content, {}, keep=2)
    needed = used(disk)
    for pages in range(needed // 4096):
        trials()
        mounts.resize("disk", needed + 4096 * pages)
        said = rf"step-00000020 cannot be written: No space left on device \({4096 * pages / 1e6:.1f} MB free"
        with pytest.raises(CannotWriteError, match=said):
            checkpoints.write(disk, 20, content, {}, keep=2)
        assert checkpoints.latest_valid(disk)[0].step == 10 and [p.name for p in disk.iterdir()] == ["step-00000010"]
    mounts.resize("disk", 2 * needed)
    checkpoints.write(disk, 20, content, {}, keep=2)
    assert checkpoints.latest_valid(disk)[0].step == 20


@pytest.mark.row(19, "on a full disk the previous checkpoint stays whole, training continues, and the last save must succeed")
def test_when_there_is_room_again_the_next_save_succeeds(mounts, monkeypatch):
    """Somebody makes room when they read that a step was not saved."""
    folder = mounts.disk("disk", "4m") / "run"
    folder.mkdir()
    ballast = folder.parent / "ballast"
    ballast.write_bytes(bytes(3_500_000))
    said = []

    def make_room(sentence):
        said.append(sentence)
        ballast.unlink()

    monkeypatch.setattr(saver, "say", make_room)
    trained_here(tiny(folder, *STEADY, "--max_steps", 12))
    assert len(said) == 1 and "step 2 was not saved" in said[0] and "error" not in said[0]
    assert [found.step for found in map(checkpoints.verify, checkpoints.list_checkpoints(folder / "checkpoints"))] == [10, 12]
    assert [line["step"] for line in metrics(folder)] == list(range(1, 13))


LIMITED = """
import resource, signal, sys
from debias_diffusers.cli import train
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.exit(train())
"""


@pytest.mark.row(19, "on a full disk the previous checkpoint stays whole, training continues, and the last save must succeed")
@pytest.mark.nightly
def test_where_no_file_may_grow_the_run_ends_with_a_sentence(tmp_path):
    """As on a full disk, but for everybody: no file may grow beyond 20 kB, which the weights do."""
    folder = tmp_path / "run"
    process = command("-c", LIMITED, *train_args(folder)[1:])
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == 4 and "Traceback" not in err
    assert all(f"step {step} was not saved" in err for step in (6, 12, 18)) and "training goes on" in err
    assert not list(folder.rglob(".draft*")) and not list(folder.glob("checkpoints/step-*"))


@pytest.mark.row(19, "on a full disk the previous checkpoint stays whole, training continues, and the last save must succeed")
def test_metrics_that_cannot_be_written_wait_and_hold_up_the_checkpoint(tmp_path, monkeypatch):
    log = MetricsFile(tmp_path / "metrics.jsonl")
    log.append({"step": 1})
    with monkeypatch.context() as broken:
        broken.setattr(log, "path", tmp_path / "no" / "where.jsonl")
        log.append({"step": 2})  # is kept
        with pytest.raises(CannotWriteError):
            log.sync()
    log.append({"step": 3})
    log.sync()
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.row(18, "metrics.jsonl has every step exactly once; truncated lines and later steps are dropped")
def test_of_a_line_of_metrics_that_the_disk_has_no_room_for_nothing_stays(tmp_path):
    """The system writes as much of it as there is room for."""
    log = MetricsFile(tmp_path / "metrics.jsonl")
    log.append({"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 5, limits[1]))
    try:
        log.append({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.append({"step": 3})
    assert log.path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


# ---- 20: little space ------------------------------------------------------------------------------------------------


@pytest.mark.row(20, "a start with disk space for less than 2.5 checkpoints prints a warning")
@pytest.mark.parametrize("checkpoints, warned", [(2, True), (3, False)])
def test_less_space_than_two_and_a_half_checkpoints_is_said_at_the_start(steady, mounts, checkpoints, warned):
    size = size_of(steady / "2" / "checkpoints" / "step-00000002")
    folder = mounts.disk("disk", checkpoints * size) / "run"
    code, _, err = run(*train_args(folder, *STEADY, "--max_steps", 1))
    assert code == 0, err
    said = re.search(rf"warning: {folder} has (\d+\.\d) MB free, but checkpoints need about (\d+\.\d) MB", err)
    assert bool(said) == warned
    if said:
        # Names and shapes, which are not counted, are a tenth of so small a checkpoint.
        assert float(said[1]) == pytest.approx(2e-6 * size, abs=0.1) and float(said[2]) == pytest.approx(2.5e-6 * size, rel=0.15)


@pytest.mark.row(20, "a start with disk space for less than 2.5 checkpoints prints a warning")
@pytest.mark.parametrize("free, warned", [(2.49, True), (2.51, False)])
def test_the_limit_is_two_and_a_half_checkpoints(tmp_path, monkeypatch, capfd, free, warned):
    """A checkpoint holds weights, two moments and the averages."""
    tensors = {name: torch.zeros(25_000).numpy().tobytes() for name in ("weights", "moment", "other moment", "0.9", "0.99")}
    size = sum(len(content) for content in tensors.values())
    monkeypatch.setattr(device.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10 * size, 0, int(free * size)))
    device.warn_of_little_space(tmp_path, 500_000)
    assert ("warning" in capfd.readouterr().err) == warned


# ---- 21: a read-only disk --------------------------------------------------------------------------------------------

WITHOUT_TORCH = """
import sys
from debias_diffusers.cli import train
code = train()
assert "torch" not in sys.modules
sys.exit(code)
"""


@pytest.mark.row(21, "a read-only directory is an error at once, before data is read")
@pytest.mark.parametrize("name", ["run", "new/run"])
def test_a_read_only_directory_is_refused_before_anything_is_read(steady, mounts, tmp_path, name):
    shutil.copytree(steady / "2", tmp_path / "disk" / "run")
    mounts.mount("disk", "--bind", tmp_path / "disk")
    folder = mounts.mount("disk", "-o", "remount,bind,ro") / name
    before = contents(tmp_path / "disk")
    flags = [*STEADY, "--max_steps", 30, "--dataset", tmp_path / "missing.parquet"]
    with cpu_of_children() as cpu:
        process = command("-c", WITHOUT_TORCH, *train_args(folder, *flags)[1:])
        _, err = process.communicate(timeout=HANG)
        assert cpu() < 4  # 1 on a busy processor
    assert process.returncode == 4, err
    assert re.fullmatch(rf"error: {folder} cannot be written: Read-only file system \(\d+\.\d MB free\)", err.strip().splitlines()[-1])
    assert contents(tmp_path / "disk") == before


# ---- 22: two processes, one directory --------------------------------------------------------------------------------


@pytest.mark.row(22, "of two processes on a run directory exactly one runs; the other exits and names it")
@pytest.mark.parametrize("races", [5, pytest.param(50, marks=pytest.mark.nightly)])
def test_of_two_processes_on_one_directory_exactly_one_runs(tmp_path, races, trials):
    """Each race begins where the one that ran before was killed: its lock is free, though its name is still in it."""
    folder = tmp_path / "run"
    for _ in range(races):
        trials()
        pair = [Forked(*train_args(folder, "--max_steps", 100_000)) for _ in range(2)]
        wait_for(lambda pair=pair: any(not p.process.is_alive() for p in pair))
        loser, winner = sorted(pair, key=lambda p: p.process.is_alive())
        code, _, err = loser.result()
        assert code == 3 and err == f"error: {folder} is in use by process {winner.pid} on {HOST}\n"
        assert winner.process.is_alive() and (folder / ".lock").read_text() == f"process {winner.pid} on {HOST}"
        winner.send_signal(signal.SIGKILL)
        assert winner.wait() == -signal.SIGKILL


@pytest.mark.row(22, "of two processes on a run directory exactly one runs; the other exits and names it")
def test_the_process_that_comes_second_leaves_soon_and_writes_nothing(steady, tmp_path):
    folder = shutil.copytree(steady / "2", tmp_path / "run")
    (folder / ".draft-left").write_text("half")
    with files.acquire_lock(folder):
        before = contents(folder)
        process = Forked(*train_args(folder, *STEADY, "--max_steps", 30, "--seed", 1))
        code, _, err = process.result()
        assert code == 3 and process.cpu < 2
        assert f"{folder} is in use by process {os.getpid()} on {HOST}" in err
        assert contents(folder) == before
    assert run(*train_args(folder, *STEADY, "--max_steps", 3))[0] == 0


@pytest.mark.row(22, "of two processes on a run directory exactly one runs; the other exits and names it")
@pytest.mark.parametrize("left", ["", "process {ended} on {host}"])
def test_the_one_that_took_the_lock_is_named_also_before_it_wrote_its_name(tmp_path, monkeypatch, left):
    config = tiny(tmp_path)
    open_run(config).close()
    ended = subprocess.Popen(["true"])
    ended.wait()
    with files.acquire_lock(tmp_path):
        name = (tmp_path / ".lock").read_text()
        (tmp_path / ".lock").write_text(left.format(ended=ended.pid, host=HOST))
        slept = []

        def sleep(seconds):
            slept.append(seconds)
            if len(slept) == 6:
                (tmp_path / ".lock").write_text(name)

        monkeypatch.setattr(files.time, "sleep", sleep)
        with pytest.raises(RunInUseError, match=f"in use by process {os.getpid()} on {HOST}"):
            files.acquire_lock(tmp_path)
        assert len(slept) == 6


@pytest.mark.row(22, "of two processes on a run directory exactly one runs; the other exits and names it")
@pytest.mark.parametrize("name, said", [("", "another process"), ("process 7 on elsewhere", "process 7 on elsewhere")])
def test_a_process_of_another_machine_or_without_a_name_is_not_waited_for_long(tmp_path, monkeypatch, name, said):
    slept = []
    monkeypatch.setattr(files.time, "sleep", slept.append)
    with files.acquire_lock(tmp_path):
        (tmp_path / ".lock").write_text(name)
        with pytest.raises(RunInUseError, match=f"in use by {said}$"):
            files.acquire_lock(tmp_path)
    assert sum(slept) < 2


# ---- 23: pruning -----------------------------------------------------------------------------------------------------

CONTENT = {"model.safetensors": bytes(range(256)) * 4, "optimizer.safetensors": b"moments" * 30}


def write(folder, step, keep=9, best=None):
    return checkpoints.write(folder, step, writers(CONTENT), {"step": step}, keep, best)


def valid(folder):
    """The steps of the checkpoints that verify."""
    steps = []
    for path in checkpoints.list_checkpoints(folder):
        with contextlib.suppress(checkpoints.DamagedError):
            steps.append(checkpoints.verify(path).step)
    return steps


@pytest.mark.row(23, "killed while old checkpoints are removed, the checkpoints to keep are whole")
@pytest.mark.parametrize(
    "before, damaged, keep, best, kept",
    [
        ([10, 20, 30], [], 2, None, [20, 30]),
        ([10, 20, 30, 40, 50], [], 2, None, [40, 50]),
        ([10, 20, 30], [20], 2, None, [30]),
        ([10, 20], [], 1, None, [20]),
        ([10, 20, 30, 40], [], 2, 10, [10, 30, 40]),
    ],
)
def test_killed_at_any_removal_what_is_to_stay_is_whole(tmp_path, before, damaged, keep, best, kept, trials):
    for step in before:
        write(tmp_path / "before", step)
    for step in damaged:
        (tmp_path / "before" / checkpoints.folder_name(step) / "model.safetensors").write_bytes(b"")
    for k in range(1, 200):
        trials()
        folder = shutil.copytree(tmp_path / "before", tmp_path / f"{k}")
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, k)
            try:
                checkpoints.prune(folder, before[-1], keep, best)
                finished = True
            except Killed:
                finished = False
        assert set(kept) <= set(valid(folder))
        assert checkpoints.latest_valid(folder)[0].step == before[-1]
        checkpoints.prune(folder, before[-1], keep, best)  # as the next save does
        assert valid(folder) == kept
        if finished:
            assert k > 4
            return
    raise AssertionError("the pruning never came to its end")


@pytest.mark.row(23, "killed while old checkpoints are removed, the checkpoints to keep are whole")
@pytest.mark.parametrize(
    "keep, damaged",
    [(1, []), (2, [20]), *(pytest.param(*case, marks=pytest.mark.nightly) for case in ((1, [10]), (1, [20]), (2, []), (2, [10])))],
)
def test_killed_again_and_again_while_saving_one_checkpoint_is_always_whole(tmp_path, keep, damaged, trials):
    """Each save is killed one operation later than the one before, in the same folder, and begins again."""
    for step in (10, 20):
        write(tmp_path, step)
    for step in damaged:
        (tmp_path / checkpoints.folder_name(step) / "model.safetensors").write_bytes(b"")
    for k in range(1, 200):
        trials()
        step = valid(tmp_path)[-1] + 10  # where the run would be: 20 once more where 20 is damaged
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, k)
            try:
                write(tmp_path, step, keep)
                finished = True
            except Killed:
                finished = False
        assert len(valid(tmp_path)) >= 1
        files.remove_temporary_files(tmp_path)
        if finished:
            assert valid(tmp_path)[-1] == step and len(checkpoints.list_checkpoints(tmp_path)) == min(keep, len(valid(tmp_path)))
            return
    raise AssertionError("the save never came to its end")


def test_a_start_removes_what_a_killed_process_left_but_not_what_another_one_is_writing(tmp_path):
    """As `ema reconstruct` and `sample.py` write into a run directory without its lock."""
    config = tiny(tmp_path)
    open_run(config).close()
    ended = subprocess.Popen(["true"])
    ended.wait()
    writing, left = [f".draft-{process}-0123abcd-sigma_rel-0.08" for process in (os.getppid(), ended.pid)]
    of_days_ago, of_no_process = f".draft-{os.getppid()}-01234567-export", f".draft-{10**20}-01234567-export"
    for folder in (tmp_path, tmp_path / "samples"):
        for name in (writing, left, of_days_ago, of_no_process, files.temporary_path(folder / "own").name):
            (folder / name).mkdir(parents=True)
        os.utime(folder / of_days_ago, (0, 0))
    with open_run(config) as run:
        run.begin(config)
    assert set(tmp_path.rglob(".draft-*")) == {tmp_path / writing, tmp_path / "samples" / writing}


# ---- 24: moved and renamed -------------------------------------------------------------------------------------------

NAMES = ["наука/数学 with  spaces", "x" * 200]
MORE = ["100% {run} 'quoted' #1 \\ $HOME", "a" * 100 + "/" + "b" * 100 + "/ö", "*?[a]", ".hidden"]


@pytest.mark.row(24, "a run that is moved or renamed resumes with the same bits")
@pytest.mark.parametrize("name", [*NAMES, *(pytest.param(name, marks=pytest.mark.nightly) for name in MORE)], ids=ascii)
def test_a_run_that_was_moved_goes_on_with_the_same_bits(steady, tmp_path, name):
    folder = tmp_path / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(steady / "2", tmp_path / "first").rename(folder)
    code, _, err = run(*train_args(folder, *STEADY, "--max_steps", 6))
    assert code == 0 and f"resuming {folder} at step 2 of 6" in err
    same(steady / "6", folder, 6)
    left, right = ({p.relative_to(place) for p in place.rglob("*")} for place in (steady / "6", folder))
    assert left == right


@pytest.mark.row(24, "a run that is moved or renamed resumes with the same bits")
def test_a_run_that_began_in_a_strange_place_goes_on_in_another(steady, tmp_path):
    begun = tmp_path / NAMES[0] / NAMES[1]
    assert run(*train_args(begun, *STEADY, "--max_steps", 2))[0] == 0
    moved = begun.rename(tmp_path / "moved")
    code, _, err = run(*train_args(moved, *STEADY, "--max_steps", 6))
    assert code == 0 and f"resuming {moved} at step 2 of 6" in err
    same(steady / "6", moved, 6)


def strings(value):
    if isinstance(value, dict):
        yield from (text for pair in value.items() for item in pair for text in strings(item))
    elif isinstance(value, list):
        yield from (text for item in value for text in strings(item))
    elif isinstance(value, str):
        yield value


@pytest.mark.row(24, "a run that is moved or renamed resumes with the same bits")
def test_no_file_of_a_run_says_where_it_lies(steady, trials):
    read = [p for p in (steady / "6").rglob("*") if p.is_file()]
    assert {"config.json", "state.json", "README.md", "model_index.json"} <= {p.name for p in read}
    for path in read:
        trials()
        content = path.read_bytes()
        assert all(os.fsencode(place) not in content for place in (steady, ROOT)), path
        if path.suffix == ".json":
            assert not [text for text in strings(json.loads(content)) if Path(text).is_absolute()], path
