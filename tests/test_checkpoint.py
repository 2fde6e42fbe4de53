"""A checkpoint is whole or absent, at any moment and whatever happens to its files."""

import builtins
import itertools
import os

import pytest

from debias_diffusers import checkpoint, files

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


class Killed(BaseException):
    """The process ends here: nothing after it runs, not even the handling of errors."""


OPERATIONS = [(builtins, "open"), (os, "fsync"), (os, "rename"), (os, "mkdir"), (os, "unlink"), (os, "rmdir")]


def kill_at(monkeypatch, k):
    """Ends the process at its k-th operation on files."""
    count = itertools.count(1)
    for module, name in OPERATIONS:
        original = getattr(module, name)

        def counted(*args, original=original, **kwargs):
            if next(count) >= k:
                raise Killed
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)


@pytest.mark.parametrize("before", [[], [10], [10, 20]])
def test_killed_at_any_operation_the_old_or_the_new_checkpoint_is_whole(tmp_path, before):
    for k in range(1, 200):
        folder = tmp_path / f"{len(before)}-{k}"
        folder.mkdir()
        for step in before:
            write(folder, step)
        with pytest.MonkeyPatch.context() as monkeypatch:
            kill_at(monkeypatch, k)
            try:
                write(folder, 30)
                finished = True
            except Killed:
                finished = False
        found, damaged = checkpoint.latest_valid(folder) if not before or finished else _older_at_least(folder, before[-1])
        assert found is None or found.step in (*before[-1:], 30)
        assert all("step-00000010" in d for d in damaged)  # only one that was being pruned
        files.remove_drafts(folder)
        write(folder, 30) if found is None or found.step != 30 else checkpoint.prune(folder, 30, 2)
        assert [p.name for p in checkpoint.checkpoints(folder)] == [checkpoint.name_of(s) for s in [*before, 30][-2:]]
        assert not list(folder.glob(".draft*"))
        if finished:
            assert k > 10
            return
    raise AssertionError("the write never came to its end")


def _older_at_least(folder, step):
    found, damaged = checkpoint.latest_valid(folder)
    assert found is not None and found.step >= step
    return found, damaged


def test_every_file_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(("sync", os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append(("rename", str(b))), rename(a, b)))
    write(tmp_path, 10)
    renamed = events.index(("rename", str(tmp_path / "step-00000010")))
    synced = {os.path.basename(path) for kind, path in events[:renamed] if kind == "sync"}
    assert synced == {*CONTENT, "state.json", "manifest.json", ".draft-step-00000010"}
    assert ("sync", str(tmp_path)) in events[renamed:]
