"""What several tests use: the repository's root, the tiny configuration, and commands in processes of their own."""

import contextlib
import faulthandler
import fcntl
import gc
import io
import json
import logging
import math
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from functools import partial
from multiprocessing import forkserver
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "tiny.yaml"
SMALL = ["--channel_mult", 1, "--attention_resolutions", 8]  # of the tiny network two thirds of the modules
GOLDEN = ROOT / "tests" / "golden"
HANG = 600  # seconds after which what a test waits for is taken to hang; no test depends on them, however busy the machine is

# A shell that starts the tests in the background has SIGINT ignored, which commands would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No test may use the network; a library that tries gets an error at once.
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1"}
os.environ.update(OFFLINE)


# Their tests take longest. They go first, so that at the end the processes of pytest-xdist have small ones to share.
SLOW = ("test_publishing", "test_kills", "test_loop", "test_outputs", "test_training", "test_convert", "test_samples", "test_known_data")


@pytest.hookimpl(hookwrapper=True)
def pytest_collection():
    """What the modules of tests import is never garbage; to look through it again and again takes a fifth of their collection."""
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))


STARTED = []  # by the test at hand: what has a `kill`


@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    """A test that fails leaves no training behind that slows the others down."""
    yield
    while STARTED:
        STARTED.pop().kill()


def command(*args, **options):
    """Starts `python ARGS` in the repository's root, as a user would."""
    usual = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    STARTED.append(subprocess.Popen([sys.executable, *map(str, args)], **{**usual, **options}))
    return STARTED[-1]


# Most commands run in processes forked from one that has imported what they and the modules of tests need: seconds less for each.
# That one is itself forked from the process of the tests, as long as this has no threads, and not a Python anew that imports all again.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "debias_diffusers.cli",
        "debias_diffusers.training.setup.build",
        "debias_diffusers.training.start",
        "debias_diffusers.sampling.generate",
        "debias_diffusers.evaluation.score",
        "debias_diffusers.evaluation.likelihood",
        "debias_diffusers.hub.publish",
        "datasets",
        "debias_diffusers.evaluation.plots",
        "matplotlib.backends.backend_agg",
        "diffusers.guiders",
        "huggingface_hub.hf_api",
        "numpy.ctypeslib",
        "pytest",
        "typeguard",
    ]
)


def pytest_collection_finish(session):
    """Starts the server of forks."""
    if session.items and forkserver._forkserver._forkserver_pid is None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(multiprocessing.util, "spawnv_passfds", _fork)
            forkserver.ensure_running()


def _fork(_, arguments, descriptors):
    """What `spawnv_passfds` of multiprocessing does with the command of its server, without a Python anew: the process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        faulthandler.disable()
        for number, name, errors in ((1, "stdout", "strict"), (2, "stderr", "backslashreplace")):  # not buffered, as OFFLINE has it
            stream = io.TextIOWrapper(io.FileIO(number, "w", closefd=False), errors=errors, write_through=True)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        for handler in [reference() for reference in logging._handlerList]:  # what was imported has those of pytest's captured stderr
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                handler.setStream(sys.stderr)
        logging.root.handlers.clear()  # of pytest
        nothing = os.open(os.devnull, os.O_RDWR)  # also in place of stdout and stderr: what commands say goes to files of their tests
        for descriptor in {int(name) for name in os.listdir("/proc/self/fd")} - {0, *descriptors}:
            with contextlib.suppress(OSError):  # that of the folder itself
                os.fstat(descriptor)
                os.dup2(nothing, descriptor)  # and not closed, as objects know it by its number
        exec(arguments[-1], {})  # which serves until the process of the tests has ended
    finally:
        os._exit(0)


COMMANDS = {
    "train.py": "train",
    "sample.py": "sample",
    "eval.py": "evaluate",
    "cache": "cache",
    "shards": "shards",
    "ema": "ema",
    "convert": "convert",
}
COMMANDS |= {"hub": "push", "debias_diffusers": "main", "play": "play"}


FORGOTTEN = []  # what is no longer imported, and still must not be garbage


class NoTorch:
    """A finder of modules for `sys.meta_path` that forbids what takes seconds."""

    HEAVY = ("torch", "diffusers", "accelerate", "datasets", "transformers")

    def find_spec(name, *_):
        assert name.split(".")[0] not in NoTorch.HEAVY, f"{name} is imported"


def forbid_torch():
    """In a forked process: the package is as if it were not imported yet, and an import of torch by it is an error."""
    for name in list(sys.modules):
        if name.split(".")[0] in (*NoTorch.HEAVY, "debias_diffusers"):
            FORGOTTEN.append(sys.modules.pop(name))
    sys.meta_path.insert(0, NoTorch)


def _command(name, args, out, err, before=None):
    """In the forked process: what `python NAME ARGS` does; leaves its CPU seconds beside what it says."""
    os.chdir(ROOT)
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    multiprocessing.set_start_method("fork", force=True)  # loaders start their workers as in a process of their own
    if before:
        before()
    from debias_diffusers import cli

    try:
        sys.exit(getattr(cli, COMMANDS[name])(args))
    finally:
        Path(err).with_name("cpu").write_text(f"{time.process_time()}")


class Forked:
    """A command in a forked process, with what the tests need of Popen; `before` is called in it before the command."""

    def __init__(self, name, *args, before=None):
        self.folder = tempfile.TemporaryDirectory()
        self.out, self.err = (Path(self.folder.name) / stream for stream in ("out", "err"))
        self.process = SERVER.Process(target=_command, args=(name, [str(a) for a in args], str(self.out), str(self.err), before))
        self.process.start()
        self.pid = self.process.pid
        STARTED.append(self)

    def wait(self, timeout=HANG):
        """The exit code; that of a signal is negative."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running after {timeout} s: {self.err.read_text()}"
        return self.process.exitcode

    def send_signal(self, signum):
        os.kill(self.pid, signum)

    def kill(self):
        self.process.kill()

    @property
    def cpu(self):
        """CPU seconds of a command that has ended by itself."""
        return float((Path(self.folder.name) / "cpu").read_text())

    def result(self, timeout=HANG):
        """(exit code, stdout, stderr) when it has ended."""
        return self.wait(timeout), self.out.read_text(), self.err.read_text()


def run(*args):
    """Runs train.py, sample.py or eval.py to its end; returns (exit code, stdout, stderr)."""
    return Forked(*args).result()


def launch(processes, *args, **options_of_process):
    """`accelerate launch` on the CPU."""
    many = ["--multi_gpu"] if processes > 1 else []
    options = ["--num_processes", processes, "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no"]
    return command("-m", "accelerate.commands.launch", *many, *options, "--main_process_port", 0, *args, **options_of_process)


def launched(processes, *args, **options):
    """The launcher's exit code and what was said."""
    process = launch(processes, *args, **options)
    _, err = process.communicate(timeout=HANG)
    return process.returncode, err


def _as_rank(variables, before):
    os.environ.update(variables)  # whose own method cannot be handed to another process
    if before:
        before()


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # what the launcher sets for it


def as_ranks(processes, *args, environment=None, before=None):
    """What `launched` gives, of processes forked as in `run` and told by the environment, as the launcher does it, which they are.

    `environment` adds variables; `before` is called in each process.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_MIXED_PRECISION": "no"}
    places = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
    environments = [{name: str(value) for name, value in place.items()} | (environment or {}) for place in places]
    ranks = [Forked(*args, before=partial(_as_rank, variables, before)) for variables in environments]
    results = [rank.result() for rank in ranks]
    return max(abs(code) for code, _, _ in results), "".join(err for _, _, err in results)


def uncounted():
    """In a process that does a dry run: its memory is not counted, which takes seconds."""
    from debias_diffusers.training import dry_run

    dry_run.estimated_memory = lambda *_: dry_run.MemoryEstimate({}, 0)


def train_args(output_dir, *flags):
    return ["train.py", "--config", TINY, "--output_dir", output_dir, *flags]


def metrics(run_dir):
    """Lines of metrics.jsonl without what depends on the time."""
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "images_per_second"} for line in lines]


def tensors(run_dir, step):
    """The bytes of every tensor file of a checkpoint."""
    folder = Path(run_dir) / "checkpoints" / f"step-{step:08d}"
    return {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}


def writers(contents):
    """Files of a checkpoint by name, as `checkpoints.write` takes them, from their bytes."""

    def write(data, path):
        with open(path, "wb") as file:
            file.write(data)

    return [(name, partial(write, data)) for name, data in contents.items()]


def sample_config(model, folder, **changes):
    from debias_diffusers.config.schema.sampling import SampleConfig

    options = {"steps": 5, "num_images": 10, "batch_size": 4, "num_threads": 1, **changes}
    return SampleConfig(model=str(model), output_dir=str(folder), **options)


def same(one, other, step, more=()):
    """Every tensor of network, averages and optimizer bit-equal, and the metrics equal."""
    assert metrics(one) == metrics(other)
    left, right = tensors(one, step), tensors(other, step)
    assert set(left) == {"model.safetensors", "ema_0.9.safetensors", "ema_0.99.safetensors", "optimizer.safetensors", *more}
    assert left == right


def newest_step(folder):
    return max((int(p.name[5:]) for p in (Path(folder) / "checkpoints").glob("step-*")), default=0)


def wait_for(condition, seconds=HANG):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.002)


def computed(pid):
    """CPU seconds of a process so far; infinite when it has ended."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return math.inf
    return times.user + times.system


def gone(pid):
    """Whether a process has ended, be it that nobody has asked how."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@contextlib.contextmanager
def cpu_of_children():
    """Gives a function: CPU seconds of the processes that this one has started and waited for within the block."""

    def used():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = used()
    yield lambda: used() - before


def trained_once(tmp_path_factory, name, *flags):
    """A copy of a tiny run that one of the processes of pytest-xdist trains for all; the others wait for its lock."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / f"trained-{name}"
    with open(root / f"trained-{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            code, _, err = run(*train_args(root / f"training-{name}", *flags))
            assert code == 0, err
            (root / f"training-{name}").rename(folder)
    return Path(shutil.copytree(folder, tmp_path_factory.mktemp("runs") / name))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """An uninterrupted tiny run of 24 steps."""
    return trained_once(tmp_path_factory, "whole")


@pytest.fixture(scope="session")
def trained_by_class(tmp_path_factory):
    """A tiny class-conditional run."""
    return trained_once(tmp_path_factory, "classes", "--class_conditional", "--max_steps", 6)


@pytest.fixture(scope="session")
def text_models(tmp_path_factory):
    """Folders of tiny text-to-image models by name: `xl`, `sd`, and `v` (an `sd` of v_prediction with zero terminal SNR)."""
    pytest.importorskip("transformers")
    import text_models as models

    root = tmp_path_factory.mktemp("text_models")
    return {
        "xl": models.save_xl(root / "xl"),
        "sd": models.save_sd(root / "sd"),
        "v": models.save_sd(root / "v", "v_prediction", rescale_betas_zero_snr=True),
    }


@pytest.fixture(scope="module")
def browser():
    """Chromium, without a window. A test that needs it fails where there is none."""
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    assert path, f"none of {', '.join(names)} is installed"
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


# ---- the table of docs/reliability.md ---------------------------------------------------------------------------------
# A test of tests/promises has the mark `row(number, promise)` and counts its trials, if they are more than one, with the
# fixture `trials`. `pytest -m row --table FILE` writes what was tried and what failed.


@pytest.fixture
def trials(record_property):
    """To be called once for each trial."""
    count = 0

    def one_more():
        nonlocal count
        count += 1

    yield one_more
    record_property("trials", count)


def pytest_addoption(parser):
    parser.addoption("--table", help="write the table of promises, trials and failures to this file")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    report.rows = [mark.args for mark in item.iter_markers("row")]


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("--table"):
        return
    promises, tried, failed = {}, defaultdict(int), defaultdict(int)
    for outcome in ("passed", "failed", ""):
        for report in terminalreporter.stats.get(outcome, []):
            for number, promise in getattr(report, "rows", ()):
                promises.setdefault(number, promise)
                if report.when == "teardown":
                    tried[number] += dict(report.user_properties).get("trials", 1)
                failed[number] += report.outcome == "failed"
    lines = ["| row | promise | trials | failures |", "|---|---|---|---|"]
    lines += [f"| {number} | {promises[number]} | {tried[number]} | {failed[number]} |" for number in sorted(promises)]
    Path(config.getoption("--table")).write_text("\n".join(lines) + "\n")
