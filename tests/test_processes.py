"""What several processes do where one of them meets an error, or has loaded something else: each ends, and the reason is said once."""

import os
import socket

import pytest
import torch
from conftest import HANG, SERVER, sample_config

from debias_diffusers.config.schema.evaluation import BitsConfig
from debias_diffusers.config.schema.training import TrainConfig
from debias_diffusers.data.dataset import TrainingData
from debias_diffusers.errors import DebiasError, FetchError, InputError
from debias_diffusers.evaluation import likelihood
from debias_diffusers.sampling import generate, pixel_job
from debias_diffusers.tasks import pixel_data, precompute
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
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == [first.format(trained), second]
    assert not (tmp_path / "samples").exists()
