"""Rows 49, 50 and 70 of docs/reliability.md: which images are drawn, and what a kill leaves of them."""

import json
import os
import random
import shutil
import signal
from functools import partial

import numpy as np
import psutil
import pytest
from conftest import Forked, as_ranks, gone, launch, run, sample_config, wait_for
from PIL import Image

from debias_diffusers.errors import InputError, RunInUseError
from debias_diffusers.sampling.generate import image_seeds, sample
from debias_diffusers.sampling.image_writer import SampleFolder
from debias_diffusers.utils.files import acquire_lock

SAME_IMAGE = "image k of a seed is the same image for any batch size, number of processes, or earlier kill"
APART = "no generator seed repeats within a set, and sets of different seeds share none"
MISSING = "killed at any moment, the same command samples only the missing images, and changes no other files"


@pytest.mark.row(49, SAME_IMAGE)
def test_image_k_is_the_same_in_batches_of_any_size(trained, tmp_path, trials):
    drawn = {}
    for size in (1, 7, 64):
        folder = sample(sample_config(trained, tmp_path / str(size), num_images=64, batch_size=size, steps=2))
        drawn[size] = np.stack([np.asarray(Image.open(folder / f"{k:06d}.png")).astype(int) for k in range(64)])
    for size in (1, 7):
        for one, other in zip(drawn[size], drawn[64]):
            assert np.abs(one - other).max() <= 1
            trials()
    assert len({image.tobytes() for image in drawn[64]}) == 64


@pytest.mark.row(70, APART)
def test_sets_of_50_000_images_of_any_two_of_the_seeds_0_to_200_share_no_generator(trials):
    """A set is an interval on the circle of 2^32 seeds: neighbours, last and first among them, begin further apart than its length."""
    count, circle = 50_000, 2**32
    begins = sorted(image_seeds(seed, [0])[0] for seed in range(201))
    for one, other in zip(begins, [*begins[1:], begins[0] + circle]):
        assert other - one >= count
        trials()
    assert image_seeds(0, range(5)) == [0, 1, 2, 3, 4]  # as versions before


@pytest.mark.row(70, APART)
@pytest.mark.parametrize("seed", (0, 1, 200, 2**32 - 1))
def test_a_set_has_consecutive_seeds_of_32_bits(seed):
    """So none repeats, be it that they go on at 0 after 2^32 - 1."""
    found = image_seeds(seed, range(50_000))
    assert len(set(found)) == 50_000 and set(found) <= {(found[0] + k) % 2**32 for k in range(50_000)}


@pytest.mark.row(70, APART)
def test_sets_of_two_seeds_have_no_image_in_common(trained, tmp_path):
    folders = [sample(sample_config(trained, tmp_path / str(seed), seed=seed, num_images=32, batch_size=32)) for seed in (0, 1, 2)]
    assert len({path.read_bytes() for folder in folders for path in folder.glob("0*.png")}) == 3 * 32


@pytest.mark.row(70, APART)
@pytest.mark.parametrize("kind", ("png", "webp", "npz"))
def test_a_folder_that_the_version_before_drew_is_completed_for_seed_0_only(trained, tmp_path, kind):
    """It wrote no seed_factor, and all else as now."""
    for seed in (0, 5):
        folder = sample(sample_config(trained, tmp_path / str(seed), seed=seed, num_images=4, format=kind))
        path = folder / ".sampling.json"
        settings = json.loads(path.read_text())
        assert settings["seed"] == seed and ("seed_factor" in settings) == (seed > 0)
        settings.pop("seed_factor", None)
        path.write_text(json.dumps(settings, indent=2) + "\n")
    before = contents_of(tmp_path / "5")
    for seed in (0, 1, 5):  # whole or not, and whatever is asked for
        with pytest.raises(InputError, match="holds images of seed 5 by an older version"):
            sample(sample_config(trained, tmp_path / "5", seed=seed, num_images=4, format=kind))
    assert contents_of(tmp_path / "5") == before
    assert sample(sample_config(trained, tmp_path / "0", num_images=4, format=kind)) == tmp_path / "0"


def contents_of(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.row(49, SAME_IMAGE)
def test_one_and_two_processes_draw_the_same_bytes_and_each_image_once(trained, tmp_path):
    flags = ["--num_images", 23, "--batch_size", 4, "--steps", 4, "--num_threads", 1]
    assert run("sample.py", trained, *flags, "--output_dir", tmp_path / "one")[0] == 0
    code, err = as_ranks(2, "sample.py", trained, *flags, "--output_dir", tmp_path / "two")
    assert code == 0, err
    names = sorted(p.name for p in (tmp_path / "one").rglob("*") if p.is_file() and p.name != ".lock")
    assert len([name for name in names if name.startswith("0000")]) == 23
    assert names == sorted(p.name for p in (tmp_path / "two").rglob("*") if p.is_file() and p.name != ".lock")
    for path in (p for p in (tmp_path / "one").rglob("*") if p.is_file() and p.name != ".lock"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes(), path


def be_killed_at(folder, least):
    """In a process that draws: a thread that writes images kills it when so many are there, wherever the others are."""
    write = SampleFolder.write

    def last(samples, k, array):
        write(samples, k, array)
        if len(list(folder.glob("0*.png"))) >= least:
            os.kill(os.getpid(), signal.SIGKILL)

    SampleFolder.write = last


def killed_and_finished(trained, folder, whole, moments, trials):
    """Kills a command when so many images are there, each time anew; then lets it finish and compares."""
    command = ["sample.py", trained, *FLAGS, "--output_dir", folder]
    for least in moments:
        process = Forked(*command, before=partial(be_killed_at, folder, least))
        assert process.wait() == -signal.SIGKILL
        trials()
        for path in folder.glob("0*.png"):
            Image.open(path).load()
    there = {p.name: p.stat().st_mtime_ns for p in folder.glob("0*.png")}
    assert run(*command)[0] == 0
    assert {p.name: p.read_bytes() for p in folder.glob("0*.png")} == {p.name: p.read_bytes() for p in whole.glob("0*.png")}
    whole_batches = [name for name in there if all(f"{5 * (int(name[:6]) // 5) + j:06d}.png" in there for j in range(5))]
    assert all((folder / name).stat().st_mtime_ns == there[name] for name in whole_batches)
    return len(there), whole_batches


FLAGS = ["--num_images", 60, "--batch_size", 5, "--steps", 4, "--num_threads", 1]


@pytest.mark.row(50, MISSING)
def test_killed_at_any_moment_the_same_command_draws_only_what_is_missing(trained, tmp_path, trials):
    assert run("sample.py", trained, *FLAGS, "--output_dir", tmp_path / "whole")[0] == 0
    there, whole_batches = killed_and_finished(trained, tmp_path / "killed", tmp_path / "whole", (1, 7, 23, 40), trials)
    assert 40 <= there < 60 and whole_batches


@pytest.mark.nightly
@pytest.mark.row(50, MISSING)
def test_killed_at_twenty_moments_the_same_command_draws_only_what_is_missing(trained, tmp_path, trials):
    assert run("sample.py", trained, *FLAGS, "--output_dir", tmp_path / "whole")[0] == 0
    moments = random.Random(0)
    for _ in range(5):
        killed_and_finished(trained, tmp_path / "killed", tmp_path / "whole", sorted(moments.sample(range(55), 4)), trials)
        shutil.rmtree(tmp_path / "killed")


@pytest.mark.row(50, MISSING)
def test_a_folder_is_completed_and_never_mixed(trained, tmp_path):
    folder = sample(sample_config(trained, tmp_path / "out"))
    whole = {p.name: p.read_bytes() for p in folder.glob("*.png")}
    for name in ("000002.png", "000009.png"):
        (folder / name).unlink()
    untouched = (folder / "000005.png").stat().st_mtime_ns
    sample(sample_config(trained, folder))
    assert {p.name: p.read_bytes() for p in folder.glob("*.png")} == whole
    assert (folder / "000005.png").stat().st_mtime_ns == untouched  # its batch was whole
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / ".draft-.sampling.json").write_bytes(b"{")  # as a kill leaves it at the very beginning
    assert len(list(sample(sample_config(trained, tmp_path / "begun", num_images=2)).glob("0*.png"))) == 2
    (folder / "000002.png").unlink()
    (folder / ".draft-000002.png").write_bytes(b"half")  # as a kill leaves it
    sample(sample_config(trained, folder))
    assert {p.name: p.read_bytes() for p in folder.glob("*.png")} == whole and not list(folder.glob(".draft*"))
    with pytest.raises(InputError, match="seed was 0, now 1"):
        sample(sample_config(trained, folder, seed=1))
    with pytest.raises(InputError, match="more than 5 images"):
        sample(sample_config(trained, folder, num_images=5))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match=r"holds other files, such as letter\.txt"):
        sample(sample_config(trained, tmp_path / "mine"))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["letter.txt"]


@pytest.mark.row(50, MISSING)
@pytest.mark.parametrize("kind", ("png", "webp"))
def test_damaged_images_are_drawn_again(trained, tmp_path, kind):
    folder = sample(sample_config(trained, tmp_path / "out", format=kind))
    whole = {p.name: p.read_bytes() for p in folder.glob(f"0*.{kind}")}
    for name, left in ((f"000001.{kind}", 0), (f"000004.{kind}", 40), (f"000009.{kind}", -1)):
        (folder / name).write_bytes(whole[name][:left])
    sample(sample_config(trained, folder, format=kind))
    assert {p.name: p.read_bytes() for p in folder.glob(f"0*.{kind}")} == whole


def _is_free(folder):
    """Whether nobody holds the lock of a folder; that of a process which is ending may last longer than its first thread."""
    try:
        acquire_lock(folder).close()
    except RunInUseError:
        return False
    return True


@pytest.mark.row(50, MISSING)
@pytest.mark.nightly
def test_when_the_launcher_dies_nobody_draws_on(trained, tmp_path):
    flags = ["--num_images", 5000, "--batch_size", 8, "--steps", 50, "--num_threads", 1, "--output_dir", tmp_path / "out"]
    process = launch(2, "sample.py", trained, *flags)
    wait_for(lambda: len(list((tmp_path / "out").glob("0*.png"))) >= 16)
    drawing = psutil.Process(process.pid).children(recursive=True)
    assert len(drawing) >= 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: all(gone(child.pid) for child in drawing))
    assert 16 <= len(list((tmp_path / "out").glob("0*.png"))) < 5000
    wait_for(lambda: _is_free(tmp_path / "out"))
