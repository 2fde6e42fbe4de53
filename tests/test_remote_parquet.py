"""Parquet files on a server: read by row groups, each fetched once into the cache, and the bits of local files."""

import dataclasses
import pickle
import random
import re
from functools import partial
from math import inf

import datasets
import pyarrow.parquet
import pytest
import torch
from conftest import Forked, same, train_args, wait_for
from here import tiny, trained_here
from test_remote_files import CDN, cleared, hub_with, ranges
from test_remote_shards import FLAGS, STEPS, _at_home, only_cached
from test_shards import contents, encoded

from debias_diffusers.config.schema.data import DataConfig
from debias_diffusers.data.dataset import PositionBatchSampler, TrainingData, micro_batches
from debias_diffusers.data.shards.files import LocalFiles, Unit
from debias_diffusers.data.shards.remote_files import RemoteFiles
from debias_diffusers.data.sources.opening import open_source
from debias_diffusers.errors import FetchError, InputError
from debias_diffusers.remote import http

FILES, GROUPS, ROWS, WINDOW = 2, 4, 3, 2
NAMES = [f"{number}.parquet" for number in range(FILES)]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Two files by `datasets`, of four row groups of about 100 kB."""
    folder = tmp_path_factory.mktemp("local")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    for number, name in enumerate(NAMES):
        rows = [{"image": {"bytes": encoded(100 * number + k, 105, 104), "path": None}, "label": k % 2} for k in range(GROUPS * ROWS)]
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / name, batch_size=ROWS)
    # Of one image a row group, so that the footer is longer than what is fetched of it at first.
    many = pyarrow.table({"image": [b"x"] * 400, "label": range(400)})
    pyarrow.parquet.write_table(many, folder / "many.parquet", row_group_size=1)
    content = {
        "image": [{"bytes": encoded(k, 40, 40), "path": f"{k}.png"} for k in range(6)],
        "depth": [encoded(k, 200, 200) for k in range(6)],
    }
    content |= {"label": [0, 1] * 3, "embedding": [random.Random(k).randbytes(100_000) for k in range(6)], "caption": list("abcdef")}
    pyarrow.parquet.write_table(pyarrow.table(content), folder / "columns.parquet", row_group_size=3)
    (folder / "none.parquet").write_bytes(b"no parquet file" * 10_000)
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory, local):
    with hub_with(tmp_path_factory.mktemp("hub"), {path.name: path.read_bytes() for path in local.glob("*.parquet")}) as server:
        yield server


@pytest.fixture
def server(hub, tmp_path, monkeypatch):
    """The same files on a server, and an empty cache."""
    yield from cleared(hub, tmp_path / "home", monkeypatch)


def address(server, name="{0..1}.parquet"):
    return f"{server.url}/datasets/alice/set/resolve/main/{name}"


def opened(dataset, **fields):
    return open_source(DataConfig(dataset=str(dataset), resolution=8, shuffle_window=WINDOW, class_conditional=True, **fields))


def asked(server):
    """The first byte and the last of each range that was asked for."""
    return sorted(tuple(map(int, re.findall(r"\d+", line))) for line in ranges(server))


def count(server):
    """Bytes that were asked for."""
    return sum(last + 1 - first for first, last in asked(server))


def forget(home):
    for path in only_cached(home):
        path.unlink()


def window_of(source, units):
    """Fetches some row groups as the window of a training, and reads their images."""
    source.prefetch(units)
    starts = source.shards()
    return [source.read(k) for unit in units for k in range(starts[unit], starts[unit + 1])]


def test_a_window_takes_its_row_groups_from_the_server_and_no_more(server, local, tmp_path, monkeypatch):
    sizes = [(local / name).stat().st_size for name in NAMES]
    source = opened(address(server))  # indexes them, row group by row group, of which it reads both columns
    assert source.shards().tolist() == list(range(0, 25, ROWS)) and count(server) == sum(sizes)  # each byte once
    assert len(asked(server)) == FILES * 2 * GROUPS  # the last labels are fetched with the footer
    assert contents(source) == contents(opened(local / "{0..1}.parquet")) and count(server) == sum(sizes)

    forget(tmp_path / "home")
    server.log.clear()
    found = window_of(pickle.loads(pickle.dumps(source)), [1, 6])
    by_groups, largest = count(server), max(last - first for first, last in asked(server))
    assert len(asked(server)) == 4 and largest < 1.1e5 and by_groups < 3.5e5  # the images of two row groups, and two footers

    monkeypatch.setattr(http, "find", lambda name, find=http.find: dataclasses.replace(find(name), ranges=False))
    forget(tmp_path / "home")
    server.log.clear()
    whole = opened(address(server))
    assert window_of(whole, [1, 6]) == found  # of a server that does not answer ranges, files are fetched whole
    assert count(server) == sum(sizes) and len(asked(server)) == FILES and by_groups < 0.45 * sum(sizes)


def test_columns_that_nobody_reads_are_not_fetched(server, local, tmp_path):
    found = opened(address(server, "columns.parquet"))
    metadata = pyarrow.parquet.ParquetFile(local / "columns.parquet").metadata
    groups = [metadata.row_group(number).to_dict()["columns"] for number in range(2)]
    size = {
        name: sum(column["total_compressed_size"] for group in groups for column in group if column["path_in_schema"].startswith(name))
        for name in ("image", "depth", "label", "caption", "embedding")
    }
    rest = (1 << 16) + 4  # the end of the file, with the footer, and its first bytes
    assert count(server) <= size["image"] + size["label"] + size["caption"] + rest < 0.5 * (size["depth"] + size["embedding"])
    assert len(asked(server)) == 2 * 3  # the last captions are fetched with the footer

    forget(tmp_path / "home")
    server.log.clear()
    images = [found.read(k)[0] for k in range(6)]
    window_of(found, [0, 1])
    assert images == [encoded(k, 40, 40) for k in range(6)] and count(server) <= size["image"] + rest


def test_samples_are_those_of_local_files_whatever_the_connection_does(server, local, tmp_path, monkeypatch, capsys):
    opened(address(server))
    forget(tmp_path / "home")
    server.clear()
    for number in range(3):
        server.fault(path=CDN, action="status", status=503, skip=5 * number)
        server.fault(path=CDN, action="truncate", after_bytes=3000, skip=3 * number, times=2)
        server.fault(path=CDN, action="drop", skip=4 * number)
    two_windows = 2 * WINDOW * 1.7e5 / 1e9  # with a footer each
    batches = []
    for dataset, workers in ((address(server), 2), (local / "{0..1}.parquet", 0)):
        config = DataConfig(dataset=str(dataset), resolution=8, shuffle_window=WINDOW, class_conditional=True, num_workers=workers)
        config = dataclasses.replace(config, shard_cache_gb=two_windows, cache_images_mb=0)
        data = TrainingData(open_source(config), config, seed=0)
        batches.append(list(micro_batches(data, PositionBatchSampler(6, 6, 0, 1, range(6)), pin_memory=False)))
    assert server.faults.left == 0 and all(torch.equal(one[name], other[name]) for one, other in zip(*batches) for name in other)
    assert sum(path.stat().st_size for path in only_cached(tmp_path / "home")) <= two_windows * 1e9
    assert "more is taken" not in capsys.readouterr().err
    with pytest.raises(InputError, match=r"two windows of 2 shards take up to 0.000\d+ GB"):
        opened(address(server), shard_cache_gb=two_windows / 2)


def test_a_lost_server_is_told_by_who_reads_a_row_group(server, tmp_path, monkeypatch):
    source = opened(address(server))
    forget(tmp_path / "home")
    monkeypatch.setattr(http, "PATIENCE", 0.05)
    server.fault(path=CDN, action="drop", times=inf)
    with pytest.raises(FetchError, match=r"0.parquet cannot be fetched: the connection was lost .*; tried for 0.05 s"):
        source.read(4)


def test_a_long_footer_is_fetched_once_and_what_is_no_parquet_file_is_told(server, local, tmp_path):
    remote = RemoteFiles([address(server, "many.parquet")], tmp_path / "cache", 10**9, 1)
    assert len(asked(server)) == 2  # the footer, of more than 64 KiB
    with remote.open("many.parquet") as file, LocalFiles([local / "many.parquet"]).open("many.parquet") as whole:
        assert pyarrow.parquet.ParquetFile(file).read_row_group(300) == pyarrow.parquet.ParquetFile(whole).read_row_group(300)
        assert file.seek(-9, 2) == whole.seek(-9, 2) and file.read(20) == whole.read(20) and file.read(1) == b""
    assert len(asked(server)) == 4 and all(len(remote._ranges(Unit("many.parquet", group, 1))) == 2 for group in range(400))
    server.log.clear()
    remote.prefetch([Unit("many.parquet", 300, 1)], "image")
    RemoteFiles([address(server, "many.parquet")], tmp_path / "cache", 10**9, 1)
    assert not asked(server)
    with pytest.raises(InputError, match=r"none.parquet is no whole parquet file"):
        RemoteFiles([address(server, "none.parquet")], tmp_path / "cache", 10**9, 1)
    assert count(server) == 1 << 16


@pytest.mark.nightly
def test_a_run_that_was_killed_in_a_fetch_has_the_bits_of_local_files(server, local, tmp_path):
    home, arguments = tmp_path / "home", [*FLAGS, "--resolution", 8, "--num_workers", 1]
    trained_here(tiny(tmp_path / "whole", "--dataset", local / "{0..1}.parquet", *arguments))
    arguments += ["--dataset", address(server), "--shard_cache_gb", 2 * WINDOW * 1.7e5 / 1e9]
    opened(address(server))
    forget(home)
    server.clear()
    fetched = FILES + FILES + WINDOW  # after sizes and footers a window
    until = server.hold(path=CDN, skip=fetched + 1)
    process = Forked(*train_args(tmp_path / "run", *arguments), before=partial(_at_home, home))
    wait_for(lambda: len([line for line in server.log if line["path"].startswith("/cdn/")]) > fetched + 1)
    process.kill()
    process.process.join()
    until.set()
    server.clear()
    trained_here(tiny(tmp_path / "run", *arguments))
    same(tmp_path / "run", tmp_path / "whole", STEPS)
