"""Whatever is wrong with the files of a run is found, named, and costs at most the steps since the checkpoint before."""

import hashlib
import json
import os
import random
import shutil
import signal
import stat
import time

import pytest
from conftest import HANG, SERVER, Forked, _command, metrics, newest_step, run, same, train_args, wait_for, writers

from debias_diffusers.runs import checkpoints
from debias_diffusers.runs.metrics_file import MetricsFile
from debias_diffusers.utils import files

FILES = [
    "model.safetensors", "ema_0.9.safetensors", "ema_0.99.safetensors", "optimizer.safetensors", "sampler.safetensors",
    "state.json", "manifest.json",
]  # fmt: skip
LEARNING = ["--timestep_sampler", "loss_second_moment", "--num_train_timesteps", 8, "--noise_schedule", "cosine", "--snr_floor", 1e-3]
FLIPS = 16


def tree(folder):
    """Every path below a folder but the lock, with its bytes and the time of its last change."""
    paths = sorted(p for p in folder.rglob("*") if p.name != files.LOCK)
    return {p: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else None) for p in paths}


def newest(folder):
    return checkpoints.list_checkpoints(folder / "checkpoints")[-1]


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """The checkpoints of steps 6 and 12 of a run that has every kind of file there is."""
    folder = tmp_path_factory.mktemp("learned") / "run"
    code, _, err = run(*train_args(folder, *LEARNING, "--max_steps", 12))
    assert code == 0, err
    return folder / "checkpoints"


@pytest.fixture
def copied(trained, tmp_path):
    """A run directory of 24 steps to damage."""
    return shutil.copytree(trained, tmp_path / "run")


def flipped(content, bit):
    return content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]


def damages(name, content, of_another_step):
    """What may happen to a file: its new content, None where it is gone."""
    chance = random.Random(name)
    yield from (None, b"", content[: len(content) // 2], content[:-1], content + b"x", bytes(len(content)), of_another_step)
    yield from (flipped(content, chance.randrange(8 * len(content))) for _ in range(FLIPS))


@pytest.mark.row(12, "a damaged file of a checkpoint is named, and the previous checkpoint is used")
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(learned, tmp_path, name, trials):
    folder = shutil.copytree(learned, tmp_path / "checkpoints")
    older, newer = checkpoints.list_checkpoints(folder)
    assert sorted(FILES) == sorted(p.name for p in newer.iterdir())
    whole = (newer / name).read_bytes()
    for damage in damages(name, whole, (older / name).read_bytes()):
        trials()
        if damage is None:
            (newer / name).unlink()
        else:
            (newer / name).write_bytes(damage)
        found, damaged = checkpoints.latest_valid(folder)
        assert found.path == older
        assert len(damaged) == 1 and f"{newer}: {name}" in damaged[0]
    (newer / name).write_bytes(whole)
    assert checkpoints.latest_valid(folder)[0].path == newer  # so it was the damage


@pytest.mark.row(12, "a damaged file of a checkpoint is named, and the previous checkpoint is used")
@pytest.mark.parametrize("name", ["ema_0.9.safetensors", "manifest.json"])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(trained, copied, name):
    file = newest(copied) / name
    file.write_bytes(flipped(file.read_bytes(), 8 * 300))
    code, _, err = run(*train_args(copied))
    assert code == 0 and "Traceback" not in err
    assert f"{file.parent}: {name} does not match" in err and f"resuming {copied} at step 18 of 24" in err
    same(trained, copied, 24)


@pytest.mark.row(12, "a damaged file of a checkpoint is named, and the previous checkpoint is used")
def test_a_manifest_without_a_hash_of_its_own_is_read_as_before(learned, tmp_path):
    """The first checkpoints had none; what it says of the other files still counts."""
    folder = shutil.copytree(learned, tmp_path / "checkpoints")
    manifest = newest(tmp_path) / "manifest.json"
    values = json.loads(manifest.read_text())
    del values["sha256"]
    manifest.write_text(json.dumps(values, indent=2) + "\n")
    assert checkpoints.latest_valid(folder)[0].step == 12
    manifest.write_text(json.dumps(values | {"shc256": ""}, indent=2) + "\n")
    assert checkpoints.latest_valid(folder)[0].step == 6


@pytest.mark.row(13, "if all checkpoints are damaged, nothing is trained and nothing is deleted")
@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_when_all_checkpoints_are_damaged_nothing_is_trained_and_nothing_deleted(copied, name):
    for path in checkpoints.list_checkpoints(copied / "checkpoints"):
        (path / name).write_bytes(b"")
    (copied / "checkpoints" / ".draft-step-00000030").mkdir()
    before = tree(copied)
    code, _, err = run(*train_args(copied, "--max_steps", 30))
    assert code == 6 and "Traceback" not in err
    assert all(f"step-000000{step}: {name}" in err for step in (18, 24))
    assert tree(copied) == before


STRAYS = [
    "step-5-bak", "step-abc", "step-7", "step-00000030 (copy)", "step-00000030.bak", "Step-00000030", "step--0000030", "step-+0000030",
    "step-0000000000000030", "step-٠٠٠٠٠٠٣٠", ".tmp-step-00000030", "tmp", "draft-step-00000030",
]  # fmt: skip


@pytest.mark.row(14, "only folders that this package wrote count as checkpoints or are removed")
def test_stray_folders_files_and_links_are_neither_checkpoints_nor_removed(trained, copied, tmp_path, trials):
    folder = copied / "checkpoints"
    real = shutil.copytree(newest(copied), tmp_path / "elsewhere" / "step-00000030")
    for name in STRAYS:
        trials()
        shutil.copytree(real, folder / name)
    for name in ("step-00000088", ".tmp-file"):
        trials()
        (folder / name).write_text("a file")
    for name, target in (("step-00000030", real), ("step-00000099", tmp_path / "nowhere")):
        trials()
        (folder / name).symlink_to(target)
    drafts = [folder / ".draft-step-00000040", folder / ".draft-link", copied / ".draft-export"]
    drafts[0].mkdir()
    drafts[1].symlink_to(real)
    drafts[2].write_text("half")
    shutil.rmtree(folder / "step-00000024")
    strays = {p: os.lstat(p).st_mtime_ns for p in folder.iterdir() if p.name != "step-00000018" and p not in drafts}
    assert len(strays) == len(STRAYS) + 4
    code, _, err = run(*train_args(copied, "--keep_checkpoints", 2))
    assert code == 0 and f"resuming {copied} at step 18" in err
    same(trained, copied, 24)
    assert strays == {p: os.lstat(p).st_mtime_ns for p in strays}
    assert not any(os.path.lexists(p) for p in drafts) and (real / "model.safetensors").exists()
    assert {p.name for p in checkpoints.list_checkpoints(folder)} == {"step-00000018", "step-00000024"}


@pytest.mark.row(15, "a checkpoint of a newer version and another configuration are an error that lists the differences")
def test_a_checkpoint_of_a_newer_version_is_refused(copied, monkeypatch):
    path = newest(copied)
    content = writers({p.name: p.read_bytes() for p in path.glob("*.safetensors")})
    with monkeypatch.context() as newer:
        newer.setattr(checkpoints, "FORMAT", checkpoints.FORMAT + 1)
        checkpoints.write(path.parent, 30, content, json.loads((path / "state.json").read_text()), keep=9)
    before = tree(copied)
    code, _, err = run(*train_args(copied, "--max_steps", 40))
    assert code == 2 and f"step-00000030 has format {checkpoints.FORMAT + 1}, but this version reads {checkpoints.FORMAT}" in err
    assert tree(copied) == before


@pytest.mark.row(15, "a checkpoint of a newer version and another configuration are an error that lists the differences")
def test_another_configuration_is_refused_field_by_field(trained):
    before = tree(trained)
    flags = ["--max_steps", 12, "--weighting", "p2", "--seed", 5, "--ema_decay", 0.9, "--model_channels", 16]
    code, _, err = run(*train_args(trained, *flags))
    differences = [
        "weighting: the run has debiased, this command says p2",
        "seed: the run has 0, this command says 5",
        "ema_decay: the run has [0.9, 0.99], this command says [0.9]",
        "model_channels: the run has 8, this command says 16",
        "max_steps is 12, but the run is at step 24",
    ]
    assert code == 2 and all(f"  - {text}" in err for text in differences) and "dropout" not in err
    assert tree(trained) == before


@pytest.mark.row(16, "a checkpoint is verified in a second per GB, and always before it is used")
def test_verifying_costs_a_second_of_one_core_per_gigabyte(tmp_path):
    """By the time of the processor, which others that are at work do not change much; where it hashes slowly, by that."""
    content = os.urandom(1 << 24) * 4
    path = checkpoints.write(tmp_path, 10, writers({"model.safetensors": content}), {"step": 10}, keep=2)

    def median(work):
        times = []
        for _ in range(3):
            began = time.process_time()
            work()
            times.append(time.process_time() - began)
        return sorted(times)[1]

    hashed = median(lambda: hashlib.sha256(content))
    assert median(lambda: checkpoints.verify(path)) <= max(1.0 * len(content) / 1e9, 1.5 * hashed)


@pytest.mark.row(17, "files have the mode that the umask allows")
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_every_file_of_a_run_directory_has_the_mode_that_the_umask_allows(tmp_path, umask, trials):
    folder = tmp_path / "run"
    args = train_args(folder, *LEARNING, "--max_steps", 4, "--checkpoint_every", 2, "--sample_every", 4, "--batch_size", 64)
    process = SERVER.Process(target=_under_umask, args=(umask, args[0], [str(a) for a in args[1:]], *(str(tmp_path / n) for n in "oe")))
    process.start()
    process.join(HANG)
    assert process.exitcode == 0, (tmp_path / "e").read_text()
    assert {p.name for p in folder.iterdir()} > {"samples", "unet", "checkpoints", "metrics.jsonl", ".lock"}
    for path in folder.rglob("*"):
        trials()
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask, path


def _under_umask(umask, *command):
    os.umask(umask)
    _command(*command)


@pytest.mark.row(18, "metrics.jsonl has every step exactly once; truncated lines and later steps are dropped")
@pytest.mark.parametrize("apart", [5, pytest.param(1, marks=pytest.mark.nightly)])
def test_metrics_cut_anywhere_keep_their_whole_lines_up_to_the_step(tmp_path, apart, trials):
    lines = [(json.dumps({"step": step, "loss": 0.5}) + "\n").encode() for step in range(1, 6)]
    for end in range(0, len(b"".join(lines)) + 1, apart):
        for step in range(0, 6, 2):
            trials()
            log = MetricsFile(tmp_path / "metrics.jsonl")
            log.path.write_bytes(b"".join(lines)[:end])
            log.begin_after(step)
            assert log.path.read_bytes() == b"".join(lines[: min(step, end // len(lines[0]))])
            log.append({"step": "next"})
            assert log.path.read_bytes().splitlines()[-1] == b'{"step": "next"}'


@pytest.mark.row(18, "metrics.jsonl has every step exactly once; truncated lines and later steps are dropped")
@pytest.mark.parametrize("between", [b"{}\n", b"[3]\n", b'{"step": "x"}\n', b"\x00\xff\n", b'{"step": 2, "lo\n', b"\n"])
def test_a_torn_line_between_whole_ones_is_dropped(tmp_path, between):
    log = MetricsFile(tmp_path / "metrics.jsonl")
    log.path.write_bytes(b'{"step": 1}\n' + between + b'{"step": 2}\n')
    log.begin_after(2)
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2]


@pytest.mark.row(18, "metrics.jsonl has every step exactly once; truncated lines and later steps are dropped")
def test_metrics_that_fit_are_not_written_again(tmp_path):
    log = MetricsFile(tmp_path / "metrics.jsonl")
    log.append({"step": 1})
    before = log.path.stat()
    log.begin_after(1)
    assert (log.path.stat().st_mtime_ns, log.path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


@pytest.mark.row(18, "metrics.jsonl has every step exactly once; truncated lines and later steps are dropped")
@pytest.mark.parametrize("kills", [2, pytest.param(5, marks=pytest.mark.nightly)])
def test_killed_again_and_again_each_step_is_in_the_metrics_once(tmp_path, kills, trials):
    folder, flags = tmp_path / "run", ["--checkpoint_every", 5, "--lr_schedule", "constant"]
    for _ in range(kills):
        trials()
        goal = newest_step(folder) + 5
        process = Forked(*train_args(folder, *flags, "--max_steps", 100_000))
        wait_for(lambda goal=goal: newest_step(folder) >= goal and metrics_beyond(folder))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        with open(folder / "metrics.jsonl", "ab") as file:
            file.write(b'{"step": 7, "lo')  # a line that was being written
    last = newest_step(folder) + 5
    code, _, err = run(*train_args(folder, *flags, "--max_steps", last))
    assert code == 0, err
    assert [line["step"] for line in metrics(folder)] == list(range(1, last + 1))


def metrics_beyond(folder):
    """Whether the metrics have a line of a step after the newest checkpoint."""
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    return lines[-1].endswith(b"\n") and json.loads(lines[-1])["step"] > newest_step(folder)
