"""A checkpoint is whole or absent, at any moment and whatever happens to its files."""

import errno
import shutil
import tracemalloc
from pathlib import Path

import torch
from conftest import writers
from here import tiny, trained_here

from debias_diffusers.runs import checkpoints
from debias_diffusers.training import state_dicts
from debias_diffusers.utils import files

CONTENT = {"model.safetensors": bytes(range(256)) * 40, "optimizer.safetensors": b"moments" * 300}


def content(step):
    return {name: data + b"%d" % step for name, data in CONTENT.items()}


def write(folder, step, keep=2):
    return checkpoints.write(folder, step, writers(content(step)), {"step": step, "config": {}}, keep)


def test_what_was_written_is_read_back(tmp_path):
    write(tmp_path, 10)
    found, damaged = checkpoints.latest_valid(tmp_path)
    assert (found.step, found.state["step"], damaged) == (10, 10, [])
    assert {name: found.verified(name).read_bytes() for name in CONTENT} == content(10)


def test_only_the_newest_are_kept(tmp_path):
    for step in (5, 10, 15, 100_000_000):
        write(tmp_path, step)
    assert [p.name for p in checkpoints.list_checkpoints(tmp_path)] == ["step-00000015", "step-100000000"]


def test_damaged_newer_checkpoints_do_not_push_out_sound_ones(tmp_path):
    for step in (10, 20, 30):
        write(tmp_path, step, keep=3)
    for step in (20, 30):
        (tmp_path / f"step-000000{step}" / "model.safetensors").write_bytes(b"")
    write(tmp_path, 11, keep=1)
    assert checkpoints.latest_valid(tmp_path)[0].step == 11
    for step in (20, 30):  # trained again, the damaged are replaced
        write(tmp_path, step, keep=2)
    assert checkpoints.latest_valid(tmp_path)[0].step == 30 and len(checkpoints.list_checkpoints(tmp_path)) == 2


def test_a_damaged_checkpoint_that_a_resume_passed_is_none_of_those_that_are_kept(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run") / "checkpoints"
    (folder / "step-00000024" / "model.safetensors").write_bytes(b"")
    trained_here(tiny(folder.parent, "--max_steps", 25, "--checkpoint_every", 5))  # from step 18 on
    assert [checkpoints.verify(path).step for path in checkpoints.list_checkpoints(folder)] == [20, 25]


def test_a_checkpoint_is_written_and_verified_without_its_files_in_memory(tmp_path):
    tensors = {"model.safetensors": {"weight": torch.zeros(1 << 24)}}  # 67 MB
    tracemalloc.start()
    checkpoints.write(tmp_path, 10, state_dicts.writers(tensors), {"step": 10}, keep=2)
    checkpoints.latest_valid(tmp_path)[0].verified("model.safetensors")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * files.BLOCK


def test_a_disk_that_refuses_modes_does_not_refuse_checkpoints(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    tensors = {"model.safetensors": {"weight": torch.zeros(4)}}  # in a file that only its owner may read
    monkeypatch.setattr(Path, "chmod", refuse)
    checkpoints.write(tmp_path, 10, state_dicts.writers(tensors), {"step": 10}, keep=2)
    assert checkpoints.latest_valid(tmp_path)[0].step == 10


def test_a_file_that_is_linked_from_elsewhere_keeps_its_mode(tmp_path):
    """As the VAE of a base model that a reconstructed pipeline links to."""
    theirs = tmp_path / "theirs"
    theirs.write_bytes(bytes(files.LINKED_FROM))
    theirs.chmod(0o444)
    with files.filled_folder(tmp_path / "out", "model_index.json") as folder:
        files.link_or_copy(theirs, folder / "vae.safetensors")
    assert (tmp_path / "out" / "vae.safetensors").samefile(theirs) and theirs.stat().st_mode & 0o777 == 0o444
