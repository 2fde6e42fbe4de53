"""`--precompute_dir`: latents and text embeddings on the disk. Nothing stale, nothing twice, and the bits of a run without it."""

import errno
import functools
import json
import os
import pickle
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import Forked, as_ranks, metrics, tensors, wait_for
from here import trained_here
from PIL import Image
from safetensors.torch import load_file, save_file
from text_models import make_base, text_args

from debias_diffusers import cli
from debias_diffusers.config.loading import resolved, update
from debias_diffusers.errors import CannotWriteError, StoppedError
from debias_diffusers.tasks import frozen_parts, precompute, tensor_store
from debias_diffusers.training.setup.plan import prepare
from debias_diffusers.utils.files import hash_of
from debias_diffusers.utils.signals import SignalHandler

NUMBERS = ("one", "two", "three", "four")


def pictures(folder, count=12):
    """Images with two captions each."""
    folder.mkdir(parents=True)
    for k in range(count):
        pixels = np.random.default_rng(k).integers(0, 255, (8 + k % 2 * 4, 8 + k % 3 * 2, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(f"a handwritten {NUMBERS[k % 4]}\nthe number {k}")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base") / "xl")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("data") / "pictures")


@functools.cache
def parsed(base):
    """The configuration of a training, and what its base model decides: parsed once."""
    config, chosen = cli.train_command([str(word) for word in text_args(base, "never/made")[1:]], None)
    return resolved(config, None), chosen


def configured(base, data, folder, **values):
    config, chosen = parsed(base)
    return update(config, {"dataset": str(data), "precompute_dir": folder and str(folder), **values}), chosen


def task_of(base, data, folder, **values):
    """A task before anything is computed."""
    config, chosen = configured(base, data, folder, **values)
    return prepare(config, None, Accelerator(), chosen).task


def prepared(base, data, folder, **values):
    task = task_of(base, data, folder, **values)
    task.prepare()
    return task


@pytest.fixture
def calls(monkeypatch):
    """The images and texts that are encoded from here on."""
    found = {"images": 0, "texts": 0}
    posterior, encode = frozen_parts.Latents.posterior, frozen_parts.encode_prompts

    def images(self, pixels):
        found["images"] += len(pixels)
        return posterior(self, pixels)

    def texts(pipeline, prompts, chunks=1):
        found["texts"] += len(prompts)
        return encode(pipeline, prompts, chunks)

    monkeypatch.setattr(frozen_parts.Latents, "posterior", images)
    monkeypatch.setattr(frozen_parts, "encode_prompts", texts)
    return found


def shards(folder):
    return sorted(folder.rglob("*.safetensors"))


# ---- keys ------------------------------------------------------------------------------------------------------------


def changed_base(base, folder, file, change):
    """A copy of a base model with a changed file: a value of a JSON, a tensor, or a byte at the end."""
    path = shutil.copytree(base, folder) / file
    if path.suffix == ".json":
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    elif path.suffix == ".safetensors":
        found = load_file(path)
        name = sorted(found)[0]
        save_file({**found, name: found[name] + 1e-3}, path, {"format": "pt"})
    else:
        path.write_bytes(path.read_bytes() + b"\n")
    return folder


def test_whatever_an_entry_depends_on_is_in_its_key(base, data, tmp_path, monkeypatch):
    """The keys of the same images and captions, with one change each."""
    random = {"crop": "random", "crop_per_image": True}

    def keys(base=base, data=data, **values):
        task = task_of(base, data, tmp_path / "never", **values)
        return set(task._latent_keys().values()), set(task._text_keys(task.data.texts()).values())

    latents, texts = keys()
    assert len(latents) == 12 and len(texts) == 4 + 12 + 1
    assert keys() == (latents, texts)
    at_random = keys(base, data, **random)
    other = {name: changed_base(base, tmp_path / name.replace("/", "-"), name, change) for name, change in (
        ("vae/diffusion_pytorch_model.safetensors", None),
        ("vae/config.json", {"scaling_factor": 0.5}),
        ("text_encoder/model.safetensors", None),
        ("text_encoder_2/config.json", {"projection_dim": 32, "hidden_act": "gelu"}),
        ("tokenizer/tokenizer_config.json", {"errors": "strict"}),
    )}  # fmt: skip
    of_latents = {
        "size": keys(base, data, resolution=16)[0],
        "precision": keys(base, data, mixed_precision="bf16")[0],
        "crop": at_random[0],
        "draft": keys(base, data, jpeg_draft=True)[0],
        **{name: keys(path)[0] for name, path in other.items() if name.startswith("vae")},
    }
    for name, found in of_latents.items():
        assert not found & latents, name
    assert not keys(base, data, seed=1, **random)[0] & at_random[0]
    assert keys(base, data, seed=1)[0] == latents  # a crop of the center is the same with any seed
    flipped = keys(base, data, random_flip=True)[0]
    assert len(flipped) == 24 and latents < flipped
    of_texts = {
        "chunks": keys(base, data, caption_chunks=2)[1],
        **{name: keys(path)[1] for name, path in other.items() if not name.startswith("vae")},
    }
    for name, found in of_texts.items():
        assert not found & texts, name
    assert len(keys(base, data, null_caption="empty")[1] - texts) == 1
    for found in (at_random, keys(base, data, resolution=16)):
        assert found[1] == texts
    copy = shutil.copytree(data, tmp_path / "copy")
    assert keys(base, copy) == (latents, texts)
    Image.open(copy / "3.png").transpose(Image.Transpose.ROTATE_180).save(copy / "3.png")
    (copy / "4.txt").write_text("another caption")
    found = keys(base, copy)
    assert len(found[0] - latents) == 1 and len(found[1] - texts) == 1
    monkeypatch.setattr(precompute, "FORMAT", precompute.FORMAT + 1)
    assert not keys()[0] & latents and not keys()[1] & texts


def test_a_key_is_of_values_and_their_names():
    assert precompute.key_of(a=1, b=2) != precompute.key_of(a=2, b=1)
    assert precompute.key_of(a="x", b="y") == precompute.key_of(b="y", a="x") and len(precompute.key_of()) == 32


# ---- what is computed, and what is read -------------------------------------------------------------------------------


def test_only_what_is_missing_is_computed_and_a_second_start_computes_nothing(base, data, tmp_path, calls, monkeypatch):
    folder = tmp_path / "computed"
    prepared(base, data, folder)
    assert calls == {"images": 64, "texts": 64}  # whole batches
    calls |= {"images": 0, "texts": 0}
    with monkeypatch.context() as patch:
        patch.setattr(frozen_parts, "_loaded", None)  # VAE and text encoders are not even loaded
        task = prepared(base, data, folder)
    assert calls == {"images": 0, "texts": 0}
    again = prepared(base, data, None)  # in memory
    for position in range(24):
        stored, index = task.data[position], again.data[position]
        assert torch.equal(stored["mean"], again.data.latents[0][0, index["index"]]), position
        assert torch.equal(stored["std"], again.data.latents[1][0, index["index"]])
        assert torch.equal(stored["time_ids"], again.data.latents[2][0, index["index"]])
    captions, dropped = [caption for each in task.data.captions for caption in each], [False, True] * 12
    one, other = task.texts.of(captions, dropped, "cpu"), again.texts.of(captions, dropped, "cpu")
    assert torch.equal(one.text, other.text) and torch.equal(one.pooled, other.pooled)
    # Another picture: its latents alone.
    copy = shutil.copytree(data, tmp_path / "copy")
    Image.open(copy / "3.png").transpose(Image.Transpose.ROTATE_180).save(copy / "3.png")
    made = precompute.Precomputation.filled
    missing = []
    monkeypatch.setattr(precompute.Precomputation, "filled", lambda self, *args: missing.append(self.missing) or made(self, *args))
    prepared(base, copy, folder)
    assert missing == [[], [(5, False)]]  # 0, 1, 10, 11, 2, 3


def bits(folder):
    return metrics(folder), tensors(folder, 2)


def run_of(base, data, output_dir, precompute_dir=None):
    values = {"random_flip": True, "max_steps": 2, "output_dir": str(output_dir), "prediction_type": "epsilon"}
    config, _ = configured(base, data, precompute_dir, **values)
    trained_here(config)
    return bits(output_dir)


def test_the_bits_are_those_of_a_run_without_the_folder(base, data, tmp_path, monkeypatch, capsys):
    """Where all was computed by the run, where other runs have computed a part of it, after a kill, and where a shard is damaged."""
    monkeypatch.setattr(tensor_store, "SHARD_BYTES", 4096)
    expected = run_of(base, data, tmp_path / "without")
    folder = tmp_path / "computed"
    # Another run: other images, of which some are the same, in another order and without flips.
    some = tmp_path / "some"
    some.mkdir()
    for k, name in enumerate((7, 2, 11)):
        for suffix in ("png", "txt"):
            shutil.copy(data / f"{name}.{suffix}", some / f"{k}.{suffix}")
    words = [str(w) for w in (some, "--base_model", base, "--resolution", 8, "--precompute_dir", folder, "--num_threads", 1)]
    assert cli.cache(words) == 0
    first = {path: path.stat().st_mtime_ns for path in shards(folder)}
    assert run_of(base, data, tmp_path / "with", folder) == expected
    assert first.items() <= {path: path.stat().st_mtime_ns for path in shards(folder)}.items()
    # A flipped bit and a file that ends early, in shards of both kinds.
    capsys.readouterr()
    for kind in ("latents", "text_embeddings"):
        one, other = shards(folder / kind)[:2]
        content = bytearray(one.read_bytes())
        content[-1] ^= 1
        one.write_bytes(content)
        other.write_bytes(other.read_bytes()[:-1])
    assert run_of(base, data, tmp_path / "damaged", folder) == expected
    assert capsys.readouterr().err.count("is damaged; what it held is computed anew") == 4
    prepared(base, data, folder, random_flip=True)
    assert "computing" not in capsys.readouterr().err
    # One that cannot be read now, as where a disk is lost for a moment, is computed anew and left alone.
    lost = shards(folder / "latents")[0]

    def failing(path):
        if path == lost:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return hash_of(path)

    monkeypatch.setattr(tensor_store, "hash_of", failing)
    prepared(base, data, folder, random_flip=True)
    assert f"{lost} cannot be read: Input/output error; what it held is computed anew" in capsys.readouterr().err and lost.is_file()


def slow(shard_bytes=1):
    """In a command of its own: writes two shards of the latents of one batch each, and then waits to be killed."""
    flush, left = tensor_store.ShardWriter.flush, [3]

    def counted(self):
        left[0] -= 1
        if not left[0]:
            signal.pause()
        flush(self)

    tensor_store.SHARD_BYTES, frozen_parts.MOST_IMAGES = shard_bytes, 4
    tensor_store.ShardWriter.flush = counted


def test_a_killed_command_has_kept_what_is_whole(base, data, tmp_path, monkeypatch):
    folder = tmp_path / "computed"
    words = ("cache", data, "--base_model", base, "--resolution", 8, "--precompute_dir", folder, "--num_threads", 1)
    process = Forked(*words, before=slow)
    wait_for(lambda: len(shards(folder)) == 2)
    process.kill()
    process.process.join()
    monkeypatch.setattr(frozen_parts, "MOST_IMAGES", 4)
    task = task_of(base, data, folder)
    found = precompute.Precomputation(folder / "latents", "latents", task._latent_keys(), task.accelerator)
    texts = precompute.Precomputation(folder / "text_embeddings", "texts", task._text_keys(task.data.texts()), task.accelerator)
    assert len(found.missing) + len(texts.missing) == 12 + 17 - 1 - 16  # "no caption", and the captions
    task.prepare()
    again = precompute.Precomputation(folder / "latents", "latents", task._latent_keys(), task.accelerator)
    assert again.missing == []


def test_a_signal_ends_the_computing_and_keeps_what_is_done(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr(frozen_parts, "MOST_IMAGES", 4)
    task, encode = task_of(base, data, tmp_path / "computed"), frozen_parts.ImageEncoder.__call__
    with SignalHandler():
        call = lambda self, entries: os.kill(os.getpid(), signal.SIGINT) or encode(self, entries)  # noqa: E731
        monkeypatch.setattr(frozen_parts.ImageEncoder, "__call__", call)
        with pytest.raises(StoppedError, match="stopped by SIGINT before the first step; the same command continues"):
            task.prepare()
    monkeypatch.undo()
    again = precompute.Precomputation(tmp_path / "computed" / "latents", "latents", task._latent_keys(), task.accelerator)
    assert len(again.missing) == 8  # of 12


def test_two_at_once_are_safe(base, data, tmp_path):
    """Both have looked before one of them has written."""
    folder, expected = tmp_path / "computed", None
    tasks = [task_of(base, data, folder) for _ in range(2)]
    looked = [precompute.Precomputation(folder / "latents", "latents", task._latent_keys(), task.accelerator) for task in tasks]
    for task, each in zip(tasks, looked):
        assert len(each.missing) == 12
        encoder = frozen_parts.ImageEncoder(task.data, task.latents)
        found = each.filled(encoder.groups(), encoder)
        means = torch.stack([found[entry]["mean"] for entry in found])
        expected = means if expected is None else expected
        assert torch.equal(means, expected)
    third = precompute.Precomputation(folder / "latents", "latents", tasks[0]._latent_keys(), tasks[0].accelerator)
    assert third.missing == []
    copy = pickle.loads(pickle.dumps(third.filled([], None)))  # as for a data loader worker that is not forked
    assert torch.equal(torch.stack([copy[entry]["mean"] for entry in copy]), expected)


@pytest.mark.nightly  # of a training: test_buckets
def test_processes_share_the_work(base, data, tmp_path, calls):
    folder = tmp_path / "computed"
    words = ("cache", data, "--base_model", base, "--resolution", 8, "--precompute_dir", folder, "--num_threads", 1, "--random_flip")
    code, err = as_ranks(2, *words, "--num_epochs", 3)
    assert code == 0 and err.count(": computing") == 1, err
    assert "max_steps" not in err  # of other steps than the training's
    prepared(base, data, folder, random_flip=True)
    assert calls == {"images": 0, "texts": 0}


@pytest.mark.nightly
def test_commands_at_once_are_safe(base, data, tmp_path, calls):
    folder = tmp_path / "computed"
    words = ("cache", data, "--base_model", base, "--resolution", 8, "--precompute_dir", folder, "--num_threads", 1)
    for process in [Forked(*words) for _ in range(3)]:
        code, _, err = process.result()
        assert code == 0, err
    prepared(base, data, folder)
    assert calls == {"images": 0, "texts": 0}


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_a_disk_without_enough_room_is_one_sentence_before_anything_is_encoded(base, data, tmp_path, monkeypatch, calls):
    monkeypatch.setattr(precompute, "free_bytes", lambda _: 10_000)
    with pytest.raises(CannotWriteError, match=r"would need 0\.1 MB more, for 17 text embeddings .* and 12 latents .* 0\.0 MB free"):
        prepared(base, data, tmp_path / "computed")
    assert calls["images"] == 0 and not shards(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWriteError, match="cannot be written"):
        prepared(base, data, tmp_path / "file")


def test_a_dry_run_writes_nothing(base, data, tmp_path):
    task = prepared(base, data, tmp_path / "computed", dry_run=True)
    assert task.data.latents is not None and not (tmp_path / "computed").exists()
    (line,) = [line for line in task.describe() if line.startswith("precompute_dir")]
    # 12 latents of 4x4x4, their deviations and six sizes; 16 captions of 16 tokens of 64 numbers, and 32 pooled.
    assert line.endswith(f"take {4 * (12 * (2 * 64 + 6) + 16 * (16 * 64 + 32)) / 1e6:.1f} MB"), line


def test_files_of_others_are_left_alone(base, data, tmp_path):
    folder = tmp_path / "computed"
    prepared(base, data, folder)
    theirs = {folder / "latents" / name: content for name, content in (("notes.txt", b"x"), ("model.safetensors", b"y"))}
    for path, content in theirs.items():
        path.write_bytes(content)
    prepared(base, data, folder)
    assert all(path.read_bytes() == content for path, content in theirs.items())


def test_an_error_of_the_command_is_one_sentence(base, data, tmp_path, capsys):
    usual = [str(word) for word in (data, "--base_model", base, "--resolution", 8)]
    for words, said in (
        (usual, "precompute_dir is missing"),
        ([*usual, "--precompute_dir", "x", "--dataset", "y"], "dataset is named twice"),
        ([*usual, "--precompute_dir", "x", "--dry_run"], "dry_run is on"),
        ([*usual, "--precompute_dir", "x", "--crop", "random", "--shuffle_caption"], "with shuffle_caption and crop random neither"),
    ):
        assert cli.cache(words) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1, err
    assert cli.cache(["--help"]) == 0 and "--precompute_dir DIR" in capsys.readouterr().out
    assert "torch" in sys.modules and not os.path.exists("x")
