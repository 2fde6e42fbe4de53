"""What several processes do where one of them meets an error, or has loaded something else: each ends, and the reason is said once."""

import math
import os
import re
import signal
import socket
from functools import partial

import pytest
import torch
from conftest import HANG, SERVER, TINY, Forked, as_ranks, sample_config, train_args, wait_for

from debias_diffusers.config.schema.evaluation import BitsConfig, MeasureConfig, ScoreConfig
from debias_diffusers.config.schema.training import TrainConfig
from debias_diffusers.data.dataset import TrainingData
from debias_diffusers.diffusion.loss import Terms
from debias_diffusers.errors import CannotWriteError, DebiasError, FetchError, InputError
from debias_diffusers.evaluation import likelihood, score
from debias_diffusers.runs.run_directory import Run
from debias_diffusers.sampling import generate, pixel_job
from debias_diffusers.tasks import pixel_data, precompute
from debias_diffusers.training.saver import Saver
from debias_diffusers.training.setup import build
from debias_diffusers.training.start import train
from debias_diffusers.training.trainer import Trainer
from debias_diffusers.utils.distributed import broadcast_from_first, inference_accelerator


def _failing(error):
    def work(*_):
        raise error

    return work


def first_decides(rank, model, folder):
    broadcast_from_first(_failing(InputError("it cannot be")), inference_accelerator(1))


def images_are_looked_at(rank, model, folder):
    pixel_data.check_images = _failing(FetchError("it cannot be")) if rank else lambda *_: ({}, 0)
    pixel_data._look(TrainConfig(), range(4), inference_accelerator(1))


def latents_are_computed(rank, model, folder):
    encode = _failing(InputError("it cannot be")) if rank else lambda entries: {"mean": torch.zeros(len(entries), 1)}
    list(precompute.encoded([([0, 1, 2, 3], 2)], encode, "latents", inference_accelerator(1)))


def bits_are_counted(rank, model, folder):
    if rank:
        TrainingData.decoded = _failing(InputError("it cannot be"))
    likelihood.bits_per_dimension(BitsConfig(model=model, num_images=2, batch_size=1, num_threads=1))


def too_few_are_scored(rank, model, folder):
    few = MeasureConfig(metrics="fid", cache_dir="", num_threads=1)
    score.score(ScoreConfig(targets=(model,), reference="digits", num_images=8, measure=few))


def there_are_no_such_weights(rank, model, folder):
    generate.sample(sample_config(model, folder / "samples", weights="0.5"))


def there_is_no_such_column(rank, model, folder):
    train(str(TINY), output_dir=str(folder / "run"), image_column="picture")


def memory_is_short(rank, model, folder):
    def full(*_):
        raise RuntimeError("can't allocate memory")

    if rank:
        build.make_network = full
    train(str(TINY), output_dir=str(folder / "run"))


def a_run_cannot_begin(rank, model, folder):
    Run.begin = _failing(CannotWriteError("it cannot be"))
    train(str(TINY), output_dir=str(folder / "run"))


def the_last_step_cannot_be_saved(rank, model, folder):
    Saver._write = lambda *_: "it cannot be"
    train(str(TINY), output_dir=str(folder / "run"), max_steps=5)


def a_loss_is_not_finite(rank, model, folder):
    terms = Trainer._terms

    def spoilt(trainer, batch, t):
        found = terms(trainer, batch, t)
        return Terms(found.loss * (math.inf if rank and trainer.step == 1 else 1), found.mse, found.bound)

    Trainer._terms = spoilt
    train(str(TINY), output_dir=str(folder / "run"))


def a_run_is_saved_while_it_is_loaded(rank, model, folder):
    load = pixel_job.load_pipeline

    def newer(*args):
        pipeline = load(*args)
        next(pipeline.unet.parameters()).data += rank
        return pipeline

    pixel_job.load_pipeline = newer
    generate.sample(sample_config(model, folder / "samples"))


def _rank(rank, port, work, model, folder):
    """In a forked process: one of two."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    try:
        work(rank, model, folder)
        said = "nothing"
    except DebiasError as error:
        said = f"{type(error).__name__}: {error}"
    except SystemExit as error:
        said = f"exit code {error.code}"
    except BaseException as error:
        said = repr(error)
    (folder / str(rank)).write_text(said)


@pytest.mark.parametrize(
    "work, first, second",
    [
        (first_decides, "InputError: it cannot be", "exit code 2"),
        (images_are_looked_at, "FetchError: it cannot be", "exit code 7"),
        (latents_are_computed, "InputError: it cannot be", "exit code 2"),
        (bits_are_counted, "InputError: it cannot be", "exit code 2"),
        (too_few_are_scored, "InputError: {} has 8 images, but metrics fid of these features need 65; .*", "exit code 2"),
        (there_are_no_such_weights, "InputError: weights is 0.5, but the run averages at .*", "exit code 2"),
        (there_is_no_such_column, "InputError: image_column is picture, but .*", "exit code 2"),
        (memory_is_short, "DebiasError: another process of this command has ended; .*", "InputError: out of memory with 4 images .*"),
        (a_run_cannot_begin, "CannotWriteError: it cannot be", "exit code 4"),
        (the_last_step_cannot_be_saved, "CannotWriteError: it cannot be", "exit code 4"),
        (a_loss_is_not_finite, "NotFiniteError: .*; not finite: 12 at t = .* and 1 more.*", "exit code 5"),
        (a_run_is_saved_while_it_is_loaded, "InputError: {} was saved anew while the processes loaded it; start again", "exit code 2"),
    ],
)
def test_both_end_and_the_first_says_why(trained, tmp_path, work, first, second):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    ranks = [SERVER.Process(target=_rank, args=(rank, port, work, str(trained), tmp_path)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(HANG)
    assert re.fullmatch(first.format(re.escape(str(trained))), (tmp_path / "0").read_text())
    assert re.fullmatch(second, (tmp_path / "1").read_text())
    assert not (tmp_path / "samples").exists()


def _waiting_for_the_first(folder):
    """In a forked process: the second of two, of which there is no first."""
    from debias_diffusers.training import device

    os.environ.update({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"})
    connect = device.make_accelerator

    def connecting(**options):
        (folder / "connecting").touch()
        return connect(**options)

    device.make_accelerator = connecting


def test_a_process_that_waits_for_the_first_one_ends_with_the_launcher(tmp_path):
    """As where the first one meets an error while it opens the run: else the launcher would wait half a minute."""
    second = Forked(*train_args(tmp_path / "run", "--ddp_timeout", 10), before=partial(_waiting_for_the_first, tmp_path))
    wait_for((tmp_path / "connecting").exists)
    second.send_signal(signal.SIGTERM)
    assert second.wait() == -signal.SIGTERM


def _stopped():
    """In each of two forked processes: a signal comes to the second one in its second step."""
    launch = Trainer._launch

    def launched(trainer, *args):
        if trainer.step == 1 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return launch(trainer, *args)

    Trainer._launch = launched


def test_a_signal_to_one_process_stops_all_which_is_said_once(tmp_path):
    code, err = as_ranks(2, *train_args(tmp_path / "run", "--max_steps", 100_000), before=_stopped)
    assert code == 128 + signal.SIGTERM
    assert [line for line in err.splitlines() if "stopped by SIGTERM" in line] == [
        "error: stopped by SIGTERM at step 3 of 100000, saved; the same command continues"
    ]
