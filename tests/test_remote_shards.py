"""Trainings on shards of a server: the same bits as from the disk, whatever the connection does."""

import json
import os
import pickle
import shutil
from functools import partial
from math import inf
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
from conftest import Forked, newest_step, same, train_args, wait_for
from here import tiny, trained_here
from test_remote_files import CDN, cleared, hub_with, put
from test_shards import samples_of, write_tar

from debias_diffusers import cli
from debias_diffusers.config import hub_names
from debias_diffusers.config.schema.data import DataConfig, TextConfig
from debias_diffusers.config.validation.training import train_problems
from debias_diffusers.data.buckets import Buckets
from debias_diffusers.data.captions import CaptionedSource
from debias_diffusers.data.dataset import TrainingData
from debias_diffusers.data.sources.opening import open_source
from debias_diffusers.data.text_dataset import TextData
from debias_diffusers.errors import FetchError, InputError
from debias_diffusers.hub import client
from debias_diffusers.remote import http

SHARDS, STEPS, WINDOW = 8, 10, 2  # of seven images, and batches of eight
PATTERN = f"{{0000..{SHARDS - 1:04d}}}.tar"
FLAGS = ["--shuffle_window", WINDOW, "--max_steps", STEPS, "--checkpoint_every", 4, "--class_conditional"]
FLAGS += ["--lr_schedule", "constant", "--warmup_steps", 0, "--check_images", "none", "--channels", 3]


def only_cached(folder):
    """The fetched files of a cache."""
    return sorted(path for path in folder.glob(".cache/debias_diffusers/shards/*-*.shard"))


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Shards on this disk, in a folder."""
    folder = tmp_path_factory.mktemp("local") / "shards"
    folder.mkdir()
    for shard in range(SHARDS):
        write_tar(folder / f"{shard:04d}.tar", samples_of(shard))
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory, local):
    with hub_with(tmp_path_factory.mktemp("hub"), {f"data/{path.name}": path.read_bytes() for path in local.iterdir()}) as server:
        yield server


@pytest.fixture
def server(hub, tmp_path, monkeypatch):
    """The same shards on a server, and an empty cache."""
    yield from cleared(hub, tmp_path / "home", monkeypatch)


def address(server):
    return f"{server.url}/datasets/alice/set/resolve/main/data/{PATTERN}"


@pytest.fixture(scope="module")
def whole(local, tmp_path_factory):
    """A run on the shards of this disk."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    trained_here(tiny(folder, "--dataset", f"{local}/{PATTERN}", *FLAGS))
    return folder


def two_windows(local):
    """Their bytes in GB."""
    return 2 * WINDOW * max(path.stat().st_size for path in local.glob("*.tar")) / 1e9


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.nightly), 2])
def test_the_bits_are_those_of_local_files_whatever_the_connection_does(server, local, whole, tmp_path, workers):
    assert not open_source(DataConfig(dataset=address(server), resolution=8, shuffle_window=WINDOW)).files()  # indexes them
    shutil.rmtree(tmp_path / "home" / ".cache")
    server.clear()
    for number in range(3):
        server.fault(path=CDN, action="status", status=503, skip=5 * number)
        server.fault(path=CDN, action="truncate", after_bytes=3000, skip=3 * number, times=2)
        server.fault(path=CDN, action="drop", skip=4 * number)
    flags = [*FLAGS, "--num_workers", workers, "--shard_cache_gb", two_windows(local)]
    trained_here(tiny(tmp_path / "run", "--dataset", address(server), *flags))
    assert server.faults.left == 0
    same(tmp_path / "run", whole, STEPS)
    kept = only_cached(tmp_path / "home")
    assert len(kept) <= 2 * WINDOW and sum(path.stat().st_size for path in kept) <= two_windows(local) * 1e9


def test_a_lost_server_ends_the_run_saved_and_the_same_command_goes_on(server, local, whole, tmp_path, monkeypatch):
    flags = ["--dataset", address(server), *FLAGS, "--shard_cache_gb", two_windows(local)]
    monkeypatch.setattr(http, "PATIENCE", 0.05)
    opened = open_source(DataConfig(dataset=address(server), resolution=8, shuffle_window=WINDOW))
    assert len(opened) == 7 * SHARDS
    shutil.copytree(tmp_path / "home" / ".cache", tmp_path / "index", ignore=lambda _, names: [n for n in names if n.endswith(".shard")])
    shutil.rmtree(tmp_path / "home" / ".cache")
    shutil.copytree(tmp_path / "index", tmp_path / "home" / ".cache")
    server.clear()
    # Each start asks for sizes; then a window and the next are fetched, and what follows fails.
    server.fault(path=CDN, action="drop", skip=SHARDS + 2 * WINDOW, times=inf)
    with pytest.raises(
        FetchError, match=r"\.tar cannot be fetched: the connection was lost .* step \d+ is saved, and the same command goes"
    ):
        trained_here(tiny(tmp_path / "run", *flags))
    last = newest_step(tmp_path / "run")
    assert 0 < last < STEPS
    server.clear()
    trained_here(tiny(tmp_path / "run", *flags))
    same(tmp_path / "run", whole, STEPS)


def _at_home(home):
    os.environ["HOME"] = str(home)


@pytest.mark.nightly
def test_a_kill_in_the_middle_of_a_fetch_is_no_loss(server, local, whole, tmp_path):
    home = tmp_path / "home"
    arguments = ["--dataset", address(server), *FLAGS, "--shard_cache_gb", two_windows(local), "--num_workers", 1]
    open_source(DataConfig(dataset=address(server), resolution=8, shuffle_window=WINDOW))  # the index
    for path in only_cached(home):
        path.unlink()
    server.clear()
    until = server.hold(path=CDN, skip=SHARDS + 2 * WINDOW + 1)
    process = Forked(*train_args(tmp_path / "run", *arguments), before=partial(_at_home, home))
    wait_for(lambda: len([line for line in server.log if line["path"].startswith("/cdn/")]) > SHARDS + 2 * WINDOW + 1)
    process.kill()
    process.process.join()
    until.set()
    server.clear()
    trained_here(tiny(tmp_path / "run", *arguments))
    same(tmp_path / "run", whole, STEPS)


def test_the_index_beside_the_shards_of_a_server_is_taken(server, local, tmp_path):
    """Made by `debias_diffusers.shards index` of a folder, and uploaded with it: no shard is fetched to begin."""
    before = {*local.glob("index-*.arrow")}
    assert cli.shards(["index", str(local)]) == 0
    (index,) = {*local.glob("index-*.arrow")} - before
    put(server, {f"data/{index.name}": index.read_bytes()})
    server.clear()
    source = open_source(DataConfig(dataset=address(server), resolution=8, shuffle_window=WINDOW))
    assert len(source) == 7 * SHARDS and not only_cached(tmp_path / "home")
    assert source.read(9)[0] == open_source(DataConfig(dataset=str(local), resolution=8)).read(9)[0]
    assert len(only_cached(tmp_path / "home")) == 1
    index.unlink()


def test_what_a_server_does_not_permit_beside_the_shards_is_not_there(server):
    """Storage that does not let its files be listed answers 403 for one that is not there."""
    server.fault(path=r"classes.json|index-", action="status", status=403, times=inf)
    source = open_source(DataConfig(dataset=address(server), resolution=8, shuffle_window=WINDOW))
    assert len(source) == 7 * SHARDS and source.key.class_names is None
    server.clear()
    server.fault(path=r"0003.tar", action="status", status=403, times=inf)
    with pytest.raises(FetchError, match=r"0003.tar cannot be fetched: its server does not permit it \(403\)"):
        open_source(DataConfig(dataset=address(server), resolution=8, shuffle_window=WINDOW))


def test_files_of_the_hub_are_named_by_a_commit(server, tmp_path, monkeypatch, whole, local):
    name = f"hf://datasets/alice/set/data/{PATTERN}"
    commit = server.store.repositories["dataset", "alice/set"].branches["main"]
    constants = huggingface_hub.constants
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    info = SimpleNamespace(repo_info=lambda repo, revision, repo_type: SimpleNamespace(sha=commit))
    monkeypatch.setattr(client, "api", lambda: info)
    trained_here(tiny(tmp_path / "run", "--dataset", name, *FLAGS, "--max_steps", 4))
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert state["config"]["dataset"] == f"hf://datasets/alice/set@{commit}/data/{PATTERN}" and "dataset" not in state["paths"]
    put(server, {"data/0003.tar": (local / "0004.tar").read_bytes()})  # a newer commit is not that of the run
    trained_here(tiny(tmp_path / "run", "--dataset", name, *FLAGS))
    same(tmp_path / "run", whole, STEPS)
    put(server, {"data/0003.tar": (local / "0003.tar").read_bytes()})


def test_names_that_cannot_be_are_refused_at_once(server, tmp_path):
    for name, sentence in (
        ("hf://models/alice/set/x.tar", "names no files of a data set on the Hub; write hf://datasets/user/name/{0000..0127}.tar"),
        ("https://host/folder", "ends in neither .tar nor .parquet"),
    ):
        assert sentence in hub_names.data_problems("dataset", name)[0]
    (problem,) = train_problems(tiny(tmp_path / "run", "--dataset", address(server)))
    assert f"shuffle_window is missing: dataset {address(server)} is fetched in windows of so many shards" in problem
    with pytest.raises(InputError, match=r"shard_cache_gb is 1e-05, but two windows of 2 shards take up to .* GB"):
        open_source(DataConfig(dataset=address(server), resolution=8, shuffle_window=2, shard_cache_gb=1e-5))
    missing = address(server).replace("0007", "0008")
    with pytest.raises(FetchError, match=r"0008.tar cannot be fetched: there is no such file \(404\)"):
        open_source(DataConfig(dataset=missing, resolution=8, shuffle_window=2))
    assert hub_names.split_revision("hf://datasets/a/b@c/d/{0..1}.tar") == ("hf://datasets/a/b/d/{0..1}.tar", "c")


def test_the_next_window_is_fetched_while_one_is_read(server, tmp_path):
    config = DataConfig(dataset=address(server), resolution=8, shuffle_window=WINDOW)
    source = open_source(config)
    for path in only_cached(tmp_path / "home"):
        path.unlink()
    data = TrainingData(pickle.loads(pickle.dumps(source)), config, seed=0, channels=3)
    data.index(0)
    wait_for(lambda: len(only_cached(tmp_path / "home")) == 2 * WINDOW)
    place = next(place for place in range(7 * SHARDS) if data.index(place) is not None and data._order.window == (0, 1))
    wait_for(lambda: len(only_cached(tmp_path / "home")) == 3 * WINDOW)
    server.clear()
    data.sample(place)
    assert not [line for line in server.log if line["path"].startswith("/cdn/")]
    data.index(7 * SHARDS - 1)  # in the last window, after which the first of the next epoch comes
    soon = data._order.soon().tolist()
    following = {int(source.shards().searchsorted(data.index(7 * SHARDS + place), "right")) - 1 for place in range(7 * WINDOW)}
    assert set(soon[WINDOW:]) == following


def test_the_next_windows_of_all_buckets_are_fetched_while_one_is_read(server, tmp_path):
    config = DataConfig(dataset=address(server), resolution=8, shuffle_window=WINDOW)
    source = CaptionedSource(open_source(config), None)
    for path in only_cached(tmp_path / "home"):
        path.unlink()
    buckets = Buckets(source.sizes(), 8, 1)
    data = TextData(source, config, TextConfig(), 0, (4, 1, 1), buckets=buckets, batch_size=2)
    assert len(set(buckets.sizes)) > 2 and data.index(0) >= 0
    wait_for(lambda: len(only_cached(tmp_path / "home")) == 2 * WINDOW)
    for position in range(7 * SHARDS):
        data.index(position)
    wait_for(lambda: len(only_cached(tmp_path / "home")) == SHARDS)
