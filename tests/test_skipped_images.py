"""Images that turn out unreadable in a training: replaced by position with `--skip_bad`, else the end of the run, saved."""

import json

import numpy as np
import pytest
import torch
from conftest import FSDP, as_ranks, metrics, newest_step, same, tensors, train_args
from here import as_one_of_two, tiny, trained_here
from PIL import Image

from debias_diffusers.config.schema.data import DataConfig
from debias_diffusers.data import dataset
from debias_diffusers.data.dataset import PositionBatchSampler, TrainingData, micro_batches
from debias_diffusers.data.sources.opening import open_source
from debias_diffusers.errors import FetchError, InputError
from debias_diffusers.tasks import pixel_data

COUNT, BATCH, STEPS = 240, 8, 22  # of which two images may be skipped
FLAGS = ["--check_images", "none", "--channels", 1, "--max_steps", STEPS, "--checkpoint_every", 10, "--lr_schedule", "constant"]
BAD = (17, 200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Grey images, two of which are damaged."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for number in range(COUNT):
        path = folder / f"{number:03}.png"
        Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
        if number in BAD:
            path.write_bytes(path.read_bytes()[:50])
    return folder


def opened(folder, **options):
    config = DataConfig(dataset=str(folder), resolution=8, **{"num_workers": 0, **options})
    return TrainingData(open_source(config), config, seed=0)


@pytest.fixture(scope="module")
def positions(folder):
    """Those of the damaged images up to the end of the run."""
    data = opened(folder)
    return [position for position in range(BATCH * STEPS) if data.index(position) in BAD]


def test_a_replacement_follows_from_the_position_alone(folder, positions):
    data = opened(folder, skip_bad=True, cache_images_mb=0)
    expected, noise = [data.sample(position) for position in range(2 * COUNT)], data.drawn(range(2 * COUNT))["noise"]
    assert [position for position, sample in enumerate(expected) if sample["skipped"]][: len(positions)] == positions
    for position in positions:
        sample, following = expected[position], expected[position + 1]
        assert sample["image"].equal(following["image"]) and not noise[position].equal(noise[position + 1])
        assert f"{data.index(position):03}.png cannot be read" in sample["skipped"] and not following["skipped"]
    for workers, processes in ((0, 3), (2, 2)):
        for rank in range(processes):
            sampler = PositionBatchSampler(6 * processes, 4, rank, processes, range(2 * COUNT // (6 * processes)))
            loaded = micro_batches(opened(folder, skip_bad=True, num_workers=workers), sampler, pin_memory=False)
            for places, batch in zip(sampler, loaded, strict=True):
                assert batch["image"].equal(torch.stack([expected[place]["image"] for place in places]))
                assert list(batch["skipped"]) == [expected[place]["skipped"] for place in places]


def test_only_an_image_that_cannot_be_read_is_replaced(folder, positions, monkeypatch):
    assert isinstance(opened(folder)[positions[0]], InputError)
    data = opened(folder, skip_bad=True)
    with pytest.raises(InputError, match="3 of 240 samples could not be read, and no more than 1% are skipped; --check_images all"):
        data.require_few_skipped(3, COUNT)
    data.require_few_skipped(2, 8), data.require_few_skipped(3, 300)
    Image.new("RGB", (8, 8), (1, 2, 3)).save(folder / "colour.png")
    try:
        coloured = opened(folder, skip_bad=True)
        place = next(place for place in range(COUNT) if coloured.index(place) == COUNT)
        assert "has colours, but the model learns grey ones" in str(coloured[place])
    finally:
        (folder / "colour.png").unlink()

    def lost(index):
        raise FetchError("000.tar cannot be fetched")

    monkeypatch.setattr(data.source, "read", lost)
    assert isinstance(data[0], FetchError)


@pytest.fixture(scope="module")
def skipping(folder, tmp_path_factory):
    """A whole run with `--skip_bad`."""
    where = tmp_path_factory.mktemp("runs") / "skipping"
    trained_here(tiny(where, "--dataset", folder, *FLAGS, "--skip_bad"))
    return where


def test_a_run_without_it_ends_saved_and_goes_on_with_it_to_the_same_bits(folder, positions, skipping, tmp_path):
    last = positions[0] // BATCH  # steps before the one with the first damaged image
    arguments = ["--dataset", folder, *FLAGS]
    with pytest.raises(InputError, match=rf"png cannot be read: .*; step {last} is saved, and the same command goes on .* --skip_bad past"):
        trained_here(tiny(tmp_path / "run", *arguments))
    assert newest_step(tmp_path / "run") == last
    trained_here(tiny(tmp_path / "run", *arguments, "--skip_bad", "--num_workers", 1))
    same(tmp_path / "run", skipping, STEPS)


def test_what_was_skipped_is_counted(positions, skipping):
    state = json.loads((skipping / "checkpoints" / f"step-{STEPS:08}" / "state.json").read_text())
    assert state["skipped_images"] == len(positions) >= 2 and "skipped" not in state["data"]
    for line in metrics(skipping):
        assert line.get("skipped_images", 0) == sum(position < BATCH * line["step"] for position in positions)


def test_where_too_many_are_skipped_the_step_that_is_saved_has_its_line(folder, positions, tmp_path, monkeypatch):
    """It was launched before the one with the damaged image was read."""
    monkeypatch.setattr(dataset, "MAX_SKIPPED_SHARE", 0)
    saved = positions[0] // BATCH + 2
    with pytest.raises(InputError, match=f"the images of 1 of .*; step {saved} is saved"):
        trained_here(tiny(tmp_path / "run", "--dataset", folder, *FLAGS, "--skip_bad", "--log_every", saved))
    assert newest_step(tmp_path / "run") == saved and [line["step"] for line in metrics(tmp_path / "run")] == [saved]


def test_the_check_is_of_all_images_of_a_sample_or_of_none(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pixel_data, "MANY_IMAGES", 100)
    monkeypatch.setattr(pixel_data, "SAMPLE", 30)
    base = ["--dataset", folder, "--max_steps", 1, "--skip_bad"]
    trainer = trained_here(tiny(tmp_path / "sample", *base))
    assert "30 of 240 images were checked; --check_images all checks all" in capsys.readouterr().err
    assert len(trainer.task.data.source) == COUNT and trainer.task.data.channels == 1
    trainer = trained_here(tiny(tmp_path / "all", *base, "--check_images", "all"))
    assert len(trainer.task.data.source) == COUNT - len(BAD) and capsys.readouterr().err.count("skipped: image") == len(BAD)
    trainer = trained_here(tiny(tmp_path / "none", *base, "--check_images", "none"))
    assert len(trainer.task.data.source) == COUNT and "checked" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"))]
)
def test_no_step_without_its_images_is_averaged(folder, positions, tmp_path, monkeypatch, device):
    """Several processes learn of it in time, on a GPU, too."""
    last, flags = positions[0] // BATCH, ["--dataset", folder, *FLAGS]
    if device == "cuda":
        monkeypatch.delenv("ACCELERATE_USE_CPU")
        flags.append("--deterministic")
    trained_here(tiny(tmp_path / "whole", *flags, "--max_steps", last))
    as_one_of_two(monkeypatch)
    with pytest.raises(InputError, match=f"step {last} is saved"):
        trained_here(tiny(tmp_path / "run", *flags))
    assert tensors(tmp_path / "run", last) == tensors(tmp_path / "whole", last)


@pytest.mark.nightly
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp"])
def test_several_processes_end_at_one_step_saved_and_go_on_to_the_same_bits(folder, positions, tmp_path, sharded):
    environment = FSDP if sharded else None
    arguments = ["--dataset", folder, *FLAGS]
    code, err = as_ranks(2, *train_args(tmp_path / "whole", *arguments, "--skip_bad"), environment=environment)
    assert code == 0 and err.count("skipped: image") >= len(BAD) and f"{len(positions)} samples had an image" in err
    code, err = as_ranks(2, *train_args(tmp_path / "run", *arguments), environment=environment)
    last = positions[0] // BATCH
    assert code == 2 and err.count(f"; step {last} is saved") == 1 and "Traceback" not in err, err
    assert newest_step(tmp_path / "run") == last
    code, err = as_ranks(2, *train_args(tmp_path / "run", *arguments, "--skip_bad"), environment=environment)
    assert code == 0, err
    same(tmp_path / "run", tmp_path / "whole", STEPS)
