"""Rows 64 to 69 of docs/reliability.md: ways out, launchers, averages, and work shared between processes."""

import contextlib
import gc
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from conftest import HANG, ROOT, SERVER, SMALL, TINY, command, metrics, tensors, train_args, wait_for, writers
from datasets import Dataset, Features
from here import tiny, trained_here
from PIL import Image
from safetensors.torch import load

from debias_diffusers import cli
from debias_diffusers.config.loading import flatten, packaged_configs
from debias_diffusers.config.schema.data import DataConfig
from debias_diffusers.config.schema.training import RunConfig, TrainConfig
from debias_diffusers.config.validation.training import train_problems
from debias_diffusers.data import dataset
from debias_diffusers.data.sources.base import file_state_hash
from debias_diffusers.data.sources.folder import ImageFolder
from debias_diffusers.data.sources.opening import open_source
from debias_diffusers.data.sources.subset import SourceSubset
from debias_diffusers.data.sources.table import ImageTable
from debias_diffusers.errors import DebiasError, InputError, NotFiniteError
from debias_diffusers.evaluation import measure
from debias_diffusers.evaluation import metrics as metrics_of_images
from debias_diffusers.evaluation.monitor import Monitor
from debias_diffusers.runs import checkpoints
from debias_diffusers.sampling import pixel_job
from debias_diffusers.training import device, trainer
from debias_diffusers.training.ema import EMA
from debias_diffusers.training.saver import Saver
from debias_diffusers.utils import distributed, launcher, torch_errors

# ---- 64: the ways out -------------------------------------------------------------------------------------------------

NO_WORKER = "however a training ends, no data loader worker is left, and the command ends"


class Stuck(dataset.TrainingData):
    """One worker never returns from an image."""

    def _sample(self, position):
        if position == 9:
            while True:
                time.sleep(1)
        return super()._sample(position)


def loaded(kind, steps=20):
    config = tiny("nowhere", "--num_workers", 2)
    source = kind(open_source(config.data), config.data, 0)
    return dataset.micro_batches(source, dataset.PositionBatchSampler(8, 8, 0, 1, range(steps)), pin_memory=False)


@pytest.fixture
def soon(monkeypatch):
    """torch waits five seconds for each worker that does not obey."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)


@pytest.mark.row(64, NO_WORKER)
@pytest.mark.parametrize("way", ["exhausted", "closed", "error of another kind", "killed", "stuck", "never begun"])
def test_on_every_way_out_no_worker_is_left(way, soon, trials):
    trials()
    before = set(multiprocessing.active_children())
    batches = loaded(Stuck if way == "stuck" else dataset.TrainingData, 2 if way == "exhausted" else 20)
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


@pytest.mark.row(64, NO_WORKER)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torch's iterator, half made, cannot be deleted in silence
def test_where_a_worker_cannot_be_started_those_before_it_end(monkeypatch, trials):
    trials()
    before, original = set(multiprocessing.active_children()), multiprocessing.Process.start

    def start(process):
        if set(multiprocessing.active_children()) - before:
            raise OSError(11, "Resource temporarily unavailable")
        original(process)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", start)
    with pytest.raises(OSError, match="temporarily unavailable") as kept:
        next(loaded(dataset.TrainingData))
    assert set(multiprocessing.active_children()) == before and kept.tb
    del kept
    gc.collect()  # now, and not in some later test


BOOM = """
import sys, signal
from debias_diffusers import cli
from debias_diffusers.training.trainer import Trainer
original = Trainer._update
def boom(self, loss, rate):
    if self.step == 2:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return original(self, loss, rate)
Trainer._update = boom
sys.exit(cli.train(sys.argv[1:]))
"""


@pytest.mark.nightly
@pytest.mark.row(64, NO_WORKER)
def test_an_error_that_is_not_ours_ends_a_process_with_workers(tmp_path, trials):
    trials()
    process = command("-c", BOOM, *train_args(tmp_path / "run", "--num_workers", 2)[1:])
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == 1 and "illegal memory access" in err.splitlines()[-1]


@pytest.mark.row(64, NO_WORKER)
def test_a_signal_ends_a_process_whose_training_has_ended(trials):
    """A thread of a library may keep it from ending by itself."""
    trials()
    script = (
        "import time; from debias_diffusers.utils.signals import SignalHandler as Handler; stop = Handler(); stop.close();"
        "print('there', flush=True);"
        "time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "there\n"
    process.terminate()
    assert process.wait(timeout=HANG) == -signal.SIGTERM


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
        sentence = str(torch_errors.explain_error(error, "--micro_batch_size", 8))
        assert all(words in sentence for words in ("/dev/shm", "--shm-size", "--num_workers 0"))
    other = torch_errors.explain_error(RuntimeError("DataLoader worker (pid(s) 9) exited unexpectedly"), "--micro_batch_size", 8)
    assert str(other) == torch_errors.LOST_WORKER
    assert torch_errors.explain_error(RuntimeError("out of resource: shared memory, Required: 263168"), "--micro_batch_size", 8) is None


@pytest.mark.nightly
@pytest.mark.row(64, NO_WORKER)
def test_with_a_tiny_dev_shm_it_says_so_and_ends(tmp_path, trials):
    trials()
    script = 'mount -t tmpfs -o size=64k tmpfs /dev/shm || exit 77; exec "$@"'
    flags = ["--num_workers", 2, "--batch_size", 512, "--cache_images_mb", 0]
    inner = [sys.executable, *map(str, train_args(tmp_path / "run", *flags))]
    found = subprocess.run(["unshare", "-m", "bash", "-c", script, "-", *inner], cwd=ROOT, capture_output=True, text=True, timeout=HANG)
    if "unshare" in found.stderr or found.returncode == 77:
        pytest.skip("this user may not mount here")
    assert found.returncode == 1 and "Traceback" not in found.stderr and "--shm-size" in found.stderr.splitlines()[-1]


# ---- 65: what a launcher asks for -------------------------------------------------------------------------------------

LAUNCHER = "options in a launcher's environment take effect, or are an error that names them before data and network are read"
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


def told_once(error):
    """What `told_by_the_first` makes of an error in another process."""
    end = SystemExit(error.exit_code)
    end.__cause__ = error
    return end


@pytest.mark.row(65, LAUNCHER)
@pytest.mark.parametrize("error", [InputError("refused"), told_once(InputError("refused")), SystemExit(2)])
def test_another_process_does_not_end_before_the_first_has_said_it(error, monkeypatch, capfd, trials):
    """torchrun kills all processes when one has failed: the first, too, which alone says what all of them found.

    What another has found alone it says when it has not been killed by then.
    """

    def fail(*_):
        raise error

    trials()
    waits = []
    monkeypatch.setattr(cli.time, "sleep", waits.append)
    monkeypatch.setattr(cli, "run_train", fail)
    monkeypatch.setattr(cli.sys, "modules", {name: module for name, module in sys.modules.items() if name != "torch"})
    monkeypatch.setenv("RANK", "1")
    assert cli.train([]) == 2 and not waits  # without a launcher that kills there is nothing to wait for
    assert not capfd.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert cli.train([]) == 2 and waits == [cli.ERROR_GRACE_SECONDS]
    assert capfd.readouterr().err == ("error: refused\n" if error.args != (2,) or error.__cause__ else "")


@pytest.mark.row(65, LAUNCHER)
def test_what_accelerate_launch_sets_by_itself_is_no_problem(trials):
    trials()
    usual = dict.fromkeys(launcher.UNSUPPORTED, "false") | {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
        "ACCELERATE_DYNAMO_BACKEND": "NO",
    }
    assert launcher.environment_problems(usual) == launcher.environment_problems({}) == []
    assert len(launcher.environment_problems(ASKED)) == len(ASKED) == len(launcher.UNSUPPORTED)


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
    monkeypatch.setattr(distributed.Accelerator, "distributed_type", kind)
    try:
        with pytest.raises(InputError, match=f"configured for {kind.value}, but only one process"):
            device.start_accelerator(config) if start == "train" else distributed.inference_accelerator(1)
    finally:
        AcceleratorState._reset_state(True)


@pytest.mark.row(65, LAUNCHER)
@pytest.mark.parametrize("name, value", [("ACCELERATE_DEBUG_MODE", "perhaps"), ("ACCELERATE_USE_CPU", "perhaps")])
def test_an_error_of_the_launchers_configuration_is_not_blamed_on_the_precision(name, value, tmp_path, monkeypatch, trials):
    trials()
    config = tiny(tmp_path / "run")
    AcceleratorState._reset_state(True)
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"configuration says: .*perhaps") as caught:
        device.start_accelerator(config)
    assert "mixed_precision" not in str(caught.value)
    AcceleratorState._reset_state(True)
    PartialState._reset_state()


# ---- 66: averages -----------------------------------------------------------------------------------------------------

AVERAGES = "averages forget the initial weights within a short run, and a run that does not learn says so"


@pytest.mark.row(66, AVERAGES)
@pytest.mark.parametrize("rate", [0.5, 0.99, 0.9999])
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
    flags = [*SMALL, "--max_steps", 40, "--batch_size", 2, "--checkpoint_every", 0, "--ema_decay", 0.9999, "--log_every", 0]
    left = []
    for name, more in (("with", ["--ema_warmup"]), ("without", [])):
        config = tiny(tmp_path / name, *flags, *more)
        trained_here(config)
        found = load(tensors(tmp_path / name, 40)["ema_0.9999.safetensors"])
        weights = load(tensors(tmp_path / name, 40)["model.safetensors"])
        left.append(max((found[key] - weights[key]).abs().max().item() for key in weights))
    assert left[0] < left[1] / 2


@pytest.mark.row(66, AVERAGES)
def test_a_run_that_began_before_the_warm_up_goes_on_without_it(tmp_path, trials):
    """Twice, with the same command; and what it learns is what a run without learns."""
    trials()
    old, plain = tmp_path / "old", tmp_path / "plain"
    flags = [*SMALL, "--lr_schedule", "constant"]
    trained_here(tiny(plain, *flags, "--max_steps", 12, "--checkpoint_every", 4))
    trained_here(tiny(old, *flags, "--max_steps", 4))
    found, _ = checkpoints.latest_valid(old / "checkpoints")
    state = {**found.state, "config": {name: value for name, value in found.state["config"].items() if name != "ema_warmup"}}
    contents = writers({name: (found.path / name).read_bytes() for name in tensors(old, 4)})
    checkpoints.write(old / "checkpoints", 4, contents, state, 1, None)
    for steps in (8, 12):
        trained_here(tiny(old, *flags, "--max_steps", steps, "--ema_warmup"))
    assert tensors(old, 12) == tensors(plain, 12)
    assert json.loads((old / "config.json").read_text())["ema_warmup"] is False
    with pytest.raises(InputError, match="ema_warmup: the run has False, this command says True"):
        trained_here(tiny(plain, *flags, "--max_steps", 12, "--ema_warmup"))


@pytest.mark.row(66, AVERAGES)
def test_only_the_runs_of_others_have_no_warm_up(trials):
    for name in packaged_configs():
        trials()
        config = cli.train_config(["--config", name, "--dataset", "digits"] if name != "digits" else ["--config", name], None)
        assert config.optimization.ema_warmup == (name in ("digits", "digits_text", "emoji", "sdxl")), name


@pytest.mark.row(66, AVERAGES)
def test_a_gradient_of_zero_and_averages_that_do_not_move_are_said_once(tmp_path, monkeypatch, capfd, trials):
    trials()
    flags = ["--max_steps", 6, "--checkpoint_every", 3, "--lr_schedule", "constant"]
    trained_here(tiny(tmp_path / "sound", *flags))
    assert "warning" not in capfd.readouterr().err
    original = trainer.Trainer._terms

    def detached(trainer, batch, t):
        terms = original(trainer, batch, t)
        return type(terms)(**{**vars(terms), "loss": terms.loss * 0})

    monkeypatch.setattr(trainer.Trainer, "_terms", detached)
    trained_here(tiny(tmp_path / "still", *flags))
    said = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    assert [line for line in said if "gradient of step 1 is exactly 0" in line] == said[:1]
    assert "ema_decay 0.9, 0.99 have not changed from step 0 to 3" in said[1]
    assert len(said) == 2


# ---- 67: work shared between processes --------------------------------------------------------------------------------

SHARED = "processes share previews and evaluations, and none waits for a failed one, or longer than ddp_timeout"


def _slow(rank, folder):
    """Each batch takes a third of a second."""

    def draw(pipeline, indices, *args, **kwargs):
        time.sleep(1 / 3)
        return torch.randint(256, (len(indices), 1, 8, 8), dtype=torch.uint8)

    pixel_job.draw = draw


def _first_waits_for_the_second(rank, folder):
    original = metrics_of_images.figures

    def figures(*args, **kwargs):
        wait_for((folder / "second-has-ended").exists)
        return original(*args, **kwargs)

    metrics_of_images.figures = figures


def _slow_to_look_and_to_save(rank, folder):
    """The first process is not done before the others were told more often than it may last without that."""
    if rank:
        return
    told, broadcast = [], distributed.broadcast_object_list
    distributed.broadcast_object_list = lambda objects: told.append(objects) or broadcast(objects)

    def slow(function):
        def work(*args):
            before = len(told)
            wait_for(lambda: len(told) >= before + 5)
            return function(*args)

        return work

    ImageTable.fingerprint = slow(ImageTable.fingerprint)
    Saver._write = slow(Saver._write)


def _failing(error):
    original = pixel_job.draw

    def draw(pipeline, indices, *args, **kwargs):
        if 5 in indices:  # in one of the processes
            raise error
        return original(pipeline, indices, *args, **kwargs)

    pixel_job.draw = draw


def _not_finite(rank, folder):
    _failing(NotFiniteError("image 5 is not finite"))


def _out_of_memory(rank, folder):
    _failing(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"))


def _of_our_own_making(rank, folder):
    _failing(ZeroDivisionError("a mistake"))


def _nothing(rank, folder):
    pass


def _rank(rank, processes, port, patch, folder, args):
    """In a forked process: one of several that train together."""
    os.chdir(ROOT)
    descriptor = os.open(folder / f"err-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 2)
    os.environ.update(
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "HOME": str(folder), "HF_HOME": str(folder / "hf")}
    )
    multiprocessing.set_start_method("fork", force=True)
    patch(rank, folder)
    sys.exit(cli.train(args))


class Together:
    """Several processes that train together."""

    def __init__(self, processes, patch, folder, *flags):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.folder, args = folder, [str(arg) for arg in train_args(folder / "run", *flags)[1:]]
        self.ranks = [SERVER.Process(target=_rank, args=(k, processes, port, patch, folder, args)) for k in range(processes)]
        for rank in self.ranks:
            rank.start()

    def ended(self, rank):
        """(exit code, what it said)."""
        self.ranks[rank].join(300)
        return self.ranks[rank].exitcode, (self.folder / f"err-{rank}").read_text()


FEW_STEPS = ["--max_steps", 2, "--warmup_steps", 0, "--lr_schedule", "constant"]
MEASURING = [*FEW_STEPS, "--eval_every", 2, "--eval_images", 66, "--eval_metrics", "fid", "--feature_extractor", "digits"]


@pytest.mark.row(67, SHARED)
def test_a_measurement_that_takes_longer_than_the_limit_is_shared(tmp_path, trials):
    """33 batches of a third of a second: 11 seconds for one process, and more than the limit for each of two."""
    trials()
    data = pictures(tmp_path / "pictures")
    both = Together(2, _slow, tmp_path, *MEASURING, "--dataset", data, "--micro_batch_size", 2, "--ddp_timeout", 5)
    for rank in range(2):
        code, err = both.ended(rank)
        assert code == 0 and "Traceback" not in err, err
    assert "eval_fid" in metrics(tmp_path / "run")[-1]


@pytest.mark.row(67, SHARED)
@pytest.mark.nightly
def test_what_the_first_process_does_alone_may_take_longer_than_the_limit(tmp_path, trials):
    trials()
    both = Together(2, _slow_to_look_and_to_save, tmp_path, *FEW_STEPS, "--max_steps", 1, "--ddp_timeout", 5)
    for rank in range(2):
        code, err = both.ended(rank)
        assert code == 0 and "Traceback" not in err, err
    assert (tmp_path / "run" / "checkpoints" / "step-00000001").is_dir()


@pytest.mark.row(67, SHARED)
def test_a_process_that_waits_longer_than_the_limit_says_so(tmp_path, trials):
    trials()
    flags = [*MEASURING, "--batch_size", 66, "--max_steps", 4, "--ddp_timeout", 5]  # which are drawn at once
    both = Together(2, _first_waits_for_the_second, tmp_path, *flags, "--dataset", pictures(tmp_path / "pictures"))
    code, err = both.ended(1)
    assert code == 1 and "Traceback" not in err
    assert "waited longer for another process than --ddp_timeout allows (5 s)" in err.splitlines()[-1]
    (tmp_path / "second-has-ended").touch()
    code, err = both.ended(0)
    assert code == 1 and "Traceback" not in err and "another process of this command has ended" in err.splitlines()[-1]


@pytest.mark.row(67, SHARED)
@pytest.mark.parametrize(
    "patch, code, said",
    [
        (_not_finite, 0, "no figures at step 2: image 5 is not finite"),
        pytest.param(_out_of_memory, 2, "out of memory with 4 images per forward; add --micro_batch_size 2", marks=pytest.mark.nightly),
        pytest.param(_of_our_own_making, 1, "ZeroDivisionError: a mistake", marks=pytest.mark.nightly),
    ],
)
def test_no_process_waits_for_one_that_failed(tmp_path, trials, patch, code, said):
    """The limit, of half an hour, would be longer than this test may take."""
    trials()
    both = Together(2, patch, tmp_path, *MEASURING, "--dataset", pictures(tmp_path / "pictures"))
    ends = [both.ended(rank) for rank in range(2)]
    assert [end[0] for end in ends] == [code] * 2, ends
    assert any(said in err for _, err in ends)


@pytest.mark.row(67, SHARED)
def test_a_grid_does_not_depend_on_the_number_of_processes(tmp_path, trials):
    """Of the initial weights, which are the same."""
    pictures = []
    for processes in (1, 2):
        trials()
        folder = tmp_path / str(processes)
        folder.mkdir()
        together = Together(processes, _nothing, folder, *FEW_STEPS, "--sample_every", 2, "--learning_rate", 1e-12, "--batch_size", 64)
        assert [together.ended(rank)[0] for rank in range(processes)] == [0] * processes
        pictures.append(np.asarray(Image.open(folder / "run" / "samples" / "step-00000002.png")).astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1 and pictures[0].std() > 10


# ---- 68: the reference of a measurement -------------------------------------------------------------------------------

ONCE = "the reference images of an evaluation are read once, and again when one of their files has changed"


def pictures(root, count=70):
    root.mkdir()
    for k in range(count):
        Image.fromarray(np.random.default_rng(k).integers(0, 255, (8, 8), np.uint8)).save(root / f"{k:03d}.png")
    return root


def table_of(folder, root):
    files = sorted(folder.iterdir())
    content = {"image": [{"bytes": file.read_bytes(), "path": None} for file in files]}
    Dataset.from_dict(content, features=Features({"image": datasets.Image()})).save_to_disk(str(root))
    return root


@pytest.fixture
def reads(monkeypatch, tmp_path):
    """How many images were read since the last look."""
    monkeypatch.setenv("HOME", str(tmp_path))  # of the cache
    counted = []
    for kind in (ImageFolder, ImageTable):
        original = kind.read
        monkeypatch.setattr(kind, "read", lambda self, k, original=original: counted.append(k) or original(self, k))

    def since():
        count = len(counted)
        counted.clear()
        return count

    return since


def monitored(data, skipped=()):
    config = DataConfig(dataset=str(data), resolution=8)
    source = open_source(config)
    source = SourceSubset(source, skipped) if skipped else source
    run_config = RunConfig(eval_every=1, eval_metrics="fid,colour", feature_extractor="digits", eval_images=65)
    monitor = Monitor(TrainConfig(data=config, run=run_config), source, "cpu")
    monitor.read(source)
    return monitor.reference


@pytest.mark.row(68, ONCE)
@pytest.mark.parametrize("kind", ["folder", "table"])
def test_the_reference_is_read_once(kind, tmp_path, reads, trials):
    folder = pictures(tmp_path / "pictures")
    data = folder if kind == "folder" else table_of(folder, tmp_path / "table")
    first = monitored(data)
    assert reads() == 140  # for the hash, and for the features
    again = monitored(data)
    assert reads() == 0 and torch.equal(first.features["64"], again.features["64"])
    trials()
    (key,) = (tmp_path / ".cache").rglob("*.json")
    key.write_text("nonsense")
    monitored(data)
    assert reads() == 70
    trials()
    assert len(monitored(data, [3]).features["64"]) == 69
    assert reads() == 138
    trials()


@pytest.mark.row(68, ONCE)
@pytest.mark.parametrize("change", ["content", "time", "other file"])
def test_a_changed_file_is_read_again(change, tmp_path, reads, trials):
    trials()
    folder = pictures(tmp_path / "pictures")
    before = monitored(folder)
    reads()
    path = folder / "005.png"
    stat, content = path.stat(), path.read_bytes()
    if change == "content":  # of the same size, and with the same time of writing
        path.write_bytes(content[:-1] + b"?")
        path.write_bytes(content.replace(content[41:-16], content[41:-16]))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "time":
        os.utime(path, ns=(1, 1))
    else:
        path.unlink()
        path.write_bytes((folder / "006.png").read_bytes())
    after = monitored(folder)
    assert reads() >= 70
    assert torch.equal(before.features["64"], after.features["64"]) == (change != "other file")


@pytest.mark.row(68, ONCE)
def test_a_table_that_names_files_elsewhere_is_read_each_time(tmp_path, reads, trials):
    trials()
    cells = [{"bytes": None, "path": str(path)} for path in sorted(pictures(tmp_path / "pictures").iterdir())]
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    pyarrow.parquet.write_table(pyarrow.table({"image": pyarrow.array(cells, kind)}), tmp_path / "table.parquet")
    for _ in range(2):
        monitored(tmp_path / "table.parquet")
        assert reads() >= 70
    assert file_state_hash(open_source(DataConfig(dataset=str(tmp_path / "table.parquet")))) is None


@pytest.mark.row(68, ONCE)
def test_what_a_measurement_needs_is_said_before_an_image_is_read(tmp_path, reads, trials):
    """And how many are drawn where nothing is said follows from what the metrics need."""
    trials()
    folder = pictures(tmp_path / "pictures", 12)
    run_config = RunConfig(eval_every=1, eval_metrics="fid", feature_extractor="digits")
    with pytest.raises(InputError, match="eval_metrics fid need 65 images, but there are 12; no more are trained"):
        trained_here(
            tiny(tmp_path / "run", "--dataset", folder, "--eval_every", 1, "--eval_metrics", "fid", "--feature_extractor", "digits")
        )
    assert reads() == 0
    many = pictures(tmp_path / "many", 66)
    config = TrainConfig(data=DataConfig(dataset=str(many), resolution=8), run=run_config)
    assert Monitor(config, open_source(config.data), "cpu").count == 1000


@pytest.mark.row(68, ONCE)
def test_with_wide_features_more_are_drawn(tmp_path, reads, monkeypatch, trials):
    trials()
    monkeypatch.setattr(measure.Measure, "features", lambda self, batch: {"64": torch.zeros(len(batch), 2048)})
    config = TrainConfig(
        data=DataConfig(dataset="digits", resolution=8), run=RunConfig(eval_every=1, eval_metrics="fid", feature_extractor="digits")
    )
    with pytest.raises(InputError, match="need 2049 images, but there are 1797"):
        Monitor(config, open_source(config.data), "cpu")
    monkeypatch.setattr(ImageTable, "__len__", lambda self: 5000)
    assert Monitor(config, open_source(config.data), "cpu").count == 2049


# ---- 69: presets ------------------------------------------------------------------------------------------------------

GIVES_WAY = "a flag overrides a conflicting value of a preset, and prints a note; two conflicting flags are an error"


@pytest.mark.row(69, GIVES_WAY)
@pytest.mark.parametrize(
    "preset, flags, changed",
    [
        ({}, ["--max_steps", "12"], {"warmup_steps": 1}),
        ({}, ["--max_steps", "5"], {"warmup_steps": 0}),
        ({}, ["--resolution", "16"], {"attention_resolutions": (16, 8)}),
        ({"weighting": "p2", "p2_gamma": 0.5, "p2_k": 2.0}, ["--weighting", "debiased"], {"p2_gamma": 1.0, "p2_k": 1.0}),
        ({"weighting": "min_snr", "snr_gamma": 7.0}, ["--weighting", "constant"], {"snr_gamma": 5.0}),
        ({"class_conditional": True, "label_dropout": 0.0}, ["--no_class_conditional"], {"label_dropout": 0.1}),
        ({"learn_sigma": True, "noise_schedule": "linear"}, ["--prediction_type", "flow"], {"learn_sigma": False, "noise_schedule": None}),
        ({"eval_every": 100, "keep_best": True, "checkpoint_every": 100}, ["--eval_every", "0"], {"keep_best": False}),
        ({"eval_every": 100, "keep_best": True, "checkpoint_every": 100}, ["--checkpoint_every", "70"], {"keep_best": False}),
        ({"timestep_sampler": "logit_normal", "timestep_std": 0.5}, ["--timestep_sampler", "uniform"], {"timestep_std": 1.0}),
    ],
)
def test_a_value_of_a_preset_gives_way(preset, flags, changed, tmp_path, capfd, trials):
    trials()
    file = tmp_path / "preset.json"
    file.write_text(json.dumps({"dataset": "digits", **preset}))
    config = cli.train_config(["--config", str(file), *flags], None)
    values, said = flatten(config), capfd.readouterr().err.splitlines()
    assert {name: values[name] for name in changed} == changed and train_problems(config) == []
    assert len(said) == len(changed) and all(any(line.startswith(f"{name} is ") for line in said) for name in changed), said


@pytest.mark.row(69, GIVES_WAY)
@pytest.mark.parametrize(
    "preset, flags, named",
    [
        ({}, ["--max_steps", "12", "--warmup_steps", "100"], "warmup_steps is 100"),
        ({"max_steps": 12}, ["--seed", "1"], "warmup_steps is 100"),  # the file is wrong by itself
        ({}, ["--weighting", "constant", "--p2_k", "2"], "p2_k is 2.0"),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, ["--prediction_type", "epsilon"], "rescale_betas_zero_snr"),
    ],
)
def test_what_was_typed_or_defines_the_objective_does_not_give_way(preset, flags, named, tmp_path, capfd, trials):
    trials()
    file = tmp_path / "preset.json"
    file.write_text(json.dumps({"dataset": "digits", **preset}))
    config = cli.train_config(["--config", str(file), *flags], None)
    assert any(named in problem for problem in train_problems(config)) and capfd.readouterr().err == ""
