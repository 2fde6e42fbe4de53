"""A checkpoint is whole or absent, at any moment and whatever happens to its files."""

import json
import os
import shutil
import stat

import pytest

from debias_diffusers import checkpoint, files
from debias_diffusers.errors import CannotWriteError, InputError, NoUsableCheckpointError
from debias_diffusers.run import Metrics

CONTENT = {"model.safetensors": bytes(range(256)) * 40, "optimizer.safetensors": b"moments" * 300}


def content(step):
    return {name: data + b"%d" % step for name, data in CONTENT.items()}


def write(folder, step, keep=2):
    return checkpoint.write(folder, step, content(step).items(), {"step": step, "config": {}}, keep)


def test_what_was_written_is_read_back(tmp_path):
    write(tmp_path, 10)
    found, damaged = checkpoint.latest_valid(tmp_path)
    assert (found.step, found.state["step"], damaged) == (10, 10, [])
    assert {name: found.read(name) for name in CONTENT} == content(10)


def test_only_the_newest_are_kept(tmp_path):
    for step in (5, 10, 15, 100_000_000):
        write(tmp_path, step)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-00000015", "step-100000000"]


def test_damaged_newer_checkpoints_do_not_push_out_sound_ones(tmp_path):
    for step in (10, 20, 30):
        write(tmp_path, step, keep=3)
    for step in (20, 30):
        (tmp_path / f"step-000000{step}" / "model.safetensors").write_bytes(b"")
    write(tmp_path, 11, keep=1)
    assert checkpoint.latest_valid(tmp_path)[0].step == 11
    for step in (20, 30):  # trained again, the damaged are replaced
        write(tmp_path, step, keep=2)
    assert checkpoint.latest_valid(tmp_path)[0].step == 30 and len(checkpoint.checkpoints(tmp_path)) == 2


DAMAGES = {
    "deleted": lambda p: p.unlink(),
    "empty": lambda p: p.write_bytes(b""),
    "half": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    "a byte less": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "a byte more": lambda p: p.write_bytes(p.read_bytes() + b"x"),
    "zeros": lambda p: p.write_bytes(bytes(p.stat().st_size)),
    "a flipped bit": lambda p: p.write_bytes(bytes([p.read_bytes()[0] ^ 4]) + p.read_bytes()[1:]),
    "another step's": lambda p: p.write_bytes((p.parent.parent / "step-00000010" / p.name).read_bytes()),
}


@pytest.mark.parametrize("name", [*CONTENT, "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_an_older_checkpoint_used(tmp_path, name, damage):
    write(tmp_path, 10)
    newest = write(tmp_path, 20)
    DAMAGES[damage](newest / name)
    found, damaged = checkpoint.latest_valid(tmp_path)
    assert found.step == 10
    assert len(damaged) == 1 and "step-00000020" in damaged[0] and name in damaged[0]


def test_when_all_are_damaged_nothing_is_used_and_nothing_deleted(tmp_path):
    for step in (10, 20):
        (write(tmp_path, step) / "model.safetensors").write_bytes(b"")
    with pytest.raises(NoUsableCheckpointError, match="step-00000010"):
        checkpoint.latest_valid(tmp_path)
    assert len(checkpoint.checkpoints(tmp_path)) == 2


def test_a_checkpoint_of_a_newer_version_is_refused(tmp_path):
    manifest = write(tmp_path, 10) / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    with pytest.raises(InputError, match="format 99"):
        checkpoint.latest_valid(tmp_path)


def test_other_names_files_and_links_are_no_checkpoints(tmp_path):
    real = write(tmp_path / "elsewhere", 30)
    folder = tmp_path / "checkpoints"
    write(folder, 10)
    for name in ("step-5-bak", "step-abc", "step-7", ".draft-step-00000040"):
        (folder / name).mkdir()
    (folder / "step-00000099").write_text("a file")
    (folder / "step-00000030").symlink_to(real)
    assert checkpoint.latest_valid(folder)[0].step == 10
    files.remove_drafts(folder)
    assert not (folder / ".draft-step-00000040").exists() and (folder / "step-5-bak").exists()


def test_a_full_disk_is_a_sentence_and_leaves_no_draft(tmp_path, monkeypatch):
    write(tmp_path, 10)

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_durably", full)
    with pytest.raises(CannotWriteError, match=r"No space left on device .*MB free"):
        write(tmp_path, 20)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000010"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_have_the_mode_that_the_umask_allows(tmp_path, umask):
    old = os.umask(umask)
    try:
        path = write(tmp_path, 10)
        files.write_file(tmp_path / "one.txt", b"x")
    finally:
        os.umask(old)
    modes = {stat.S_IMODE(p.stat().st_mode) for p in [*path.iterdir(), tmp_path / "one.txt"]}
    assert modes == {0o666 & ~umask}


def test_metrics_drop_a_cut_line_and_the_steps_that_will_come_again(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        metrics.append({"step": step, "loss": 0.5})
    with open(metrics.path, "a") as file:
        file.write('{"step": 6, "lo')
    metrics.begin_after(4)
    assert [json.loads(line)["step"] for line in metrics.path.read_text().splitlines()] == [1, 2, 3, 4]
    untouched = metrics.path.stat().st_mtime_ns
    metrics.begin_after(4)
    assert metrics.path.stat().st_mtime_ns == untouched


def test_metrics_that_cannot_be_written_wait_and_hold_up_the_checkpoint(tmp_path, monkeypatch):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.append({"step": 1})
    with monkeypatch.context() as broken:
        broken.setattr(metrics, "path", tmp_path / "no" / "where.jsonl")
        metrics.append({"step": 2})  # is kept
        with pytest.raises(CannotWriteError):
            metrics.sync()
    metrics.append({"step": 3})
    metrics.sync()
    assert [json.loads(line)["step"] for line in metrics.path.read_text().splitlines()] == [1, 2, 3]


def test_a_moved_folder_is_still_a_checkpoint(tmp_path):
    write(tmp_path / "old", 10)
    new = tmp_path / ("über " + "x" * 150)
    shutil.move(tmp_path / "old", new)
    assert checkpoint.latest_valid(new)[0].step == 10
