"""Files on servers: of one version, whole or absent in the cache, fetched once, and no hang where a connection is lost."""

import dataclasses
import errno
import functools
import hashlib
import multiprocessing
import os
import pickle
import random
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import pytest
from conftest import HANG, gone, wait_for
from hub.server import HubServer
from hub.store import Commit, Repository

from debias_diffusers.errors import CannotWriteError, FetchError, InputError
from debias_diffusers.remote import http, shard_cache
from debias_diffusers.remote.http import FileRange
from debias_diffusers.remote.shard_cache import ShardCache

SIZE = 3_000_000
SHARDS = {f"{number:03}.tar": random.Random(number).randbytes(SIZE) for number in range(4)}
CDN = r"^/cdn/"  # where the Hub sends who asks for a large file
ON_THE_HUB = "hf://datasets/alice/set@main"


def put(server, files):
    """Commits large files."""
    store, repository = server.store, server.store.repositories["dataset", "alice/set"]
    tree = dict(repository.at("main").tree)
    for path, content in files.items():
        digest = hashlib.sha256(content).hexdigest()
        store.save([content], store.object_path(digest))
        tree[path] = store.large(digest, len(content))
    repository.add("main", Commit("files", "", "alice", repository.branches["main"], tree))


@contextmanager
def hub_with(folder, files, private=False):
    """A Hub with one data set, of these files."""
    with HubServer(folder) as server:
        server.store.repositories["dataset", "alice/set"] = Repository("dataset", "alice/set", private, Commit("", "", "alice", None, {}))
        put(server, files)
        yield server


def cleared(hub, home, monkeypatch):
    """For a fixture: a Hub without faults, waits that are short, and an empty cache in the home directory."""
    hub.clear()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(http, "FIRST_WAIT", 0.001)
    yield hub
    hub.clear()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with hub_with(tmp_path_factory.mktemp("hub"), SHARDS, private=True) as server:
        yield server


@pytest.fixture
def server(hub, monkeypatch):
    hub.clear()
    constants = huggingface_hub.constants
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    monkeypatch.setattr(http, "FIRST_WAIT", 0.001)
    yield hub
    hub.clear()


def found(number):
    return http.find(f"{ON_THE_HUB}/{number:03}.tar")


def content(number):
    return SHARDS[f"{number:03}.tar"]


def ranges(server):
    """What was asked for of large files, but for the question of `find`."""
    return [line["range"] for line in server.log if line["path"].startswith("/cdn/") and line["range"] != "bytes=0-0"]


def read(cache, file):
    with cache.open(file) as opened:
        return opened.read()


def test_a_file_of_the_hub_is_read_in_parts_and_fetched_once(server, tmp_path):
    file, cache = found(0), ShardCache(tmp_path, 10**9)
    assert (file.size, file.sha256) == (SIZE, hashlib.sha256(content(0)).hexdigest())
    assert http.read_range(file, 1000, 2000) == content(0)[1000:2000] and http.read_range(file, 5, 5) == b""
    server.clear()
    assert not cache.has(file) and read(cache, file) == read(pickle.loads(pickle.dumps(cache)), file) == content(0)
    assert ranges(server) == [f"bytes=0-{SIZE - 1}"] and cache.has(file)
    assert [path.suffix for path in tmp_path.iterdir() if path.name != ".lock"] == [".shard"]


@pytest.mark.parametrize("fin", [False, True], ids=["reset", "closed"])
def test_a_lost_connection_is_said_once_and_the_rest_is_fetched(server, tmp_path, fin, capsys):
    file = found(0)
    server.fault(path=CDN, action="status", status=503, times=3)
    server.fault(path=CDN, action="drop", fin=fin, times=2)
    server.fault(path=CDN, action="truncate", after_bytes=2_000_000, fin=fin)
    server.fault(path=CDN, action="truncate", after_bytes=500_000, fin=fin)
    server.log.clear()
    assert read(ShardCache(tmp_path, 10**9), file) == content(0)
    starts = [int(asked.split("=")[1].split("-")[0]) for asked in ranges(server)]
    assert starts[:6] == [0] * 6 and starts[5:] == sorted(starts[5:]) and len(starts) == 8
    assert starts[-1] > 1_000_000 or not fin  # a reset may take with it what the kernel had received and nobody had read
    said = capsys.readouterr().err
    assert said.count("trying again for 300 s") == 1 and "000.tar" in said and server.faults.left == 0


def test_a_range_goes_on_after_a_lost_connection(server):
    file = found(1)
    server.fault(path=CDN, action="truncate", after_bytes=1_000_000)
    assert http.read_range(file, 100, 2_500_000) == content(1)[100:2_500_000]


def test_a_connection_that_is_lost_again_and_again_brings_the_file_bit_by_bit(server, tmp_path, monkeypatch):
    file = found(0)
    monkeypatch.setattr(http, "PATIENCE", 1)
    server.fault(path=CDN, action="truncate", after_bytes=300_000, fin=True, times=20)
    assert read(ShardCache(tmp_path, 10**9), file) == content(0)
    starts = [int(asked.split("=")[1].split("-")[0]) for asked in ranges(server)]
    assert starts == sorted(set(starts)) and len(starts) >= SIZE // 300_000


def test_what_stays_lost_is_given_up_with_a_sentence_and_continued_by_who_comes_next(server, tmp_path, monkeypatch):
    file, cache = found(0), ShardCache(tmp_path, 10**9)
    monkeypatch.setattr(http, "PATIENCE", 0.05)
    server.fault(path=CDN, action="truncate", after_bytes=2_000_000, fin=True)
    server.fault(path=CDN, action="drop", times=1000)
    with pytest.raises(FetchError, match=r"000.tar cannot be fetched: the connection was lost .*; tried for 0.05 s") as error:
        cache.open(file)
    assert error.value.exit_code == 7 and not cache.has(file)
    server.clear()
    assert read(cache, file) == content(0) and int(ranges(server)[0].split("=")[1].split("-")[0]) > 0


def test_a_server_that_refuses_is_asked_once(server, tmp_path, monkeypatch):
    with pytest.raises(FetchError, match=r"nothing.tar cannot be fetched: there is no such file \(404\)"):
        http.find(f"{ON_THE_HUB}/nothing.tar")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(FetchError, match=r"asks who you are \(401\); set HF_TOKEN"):
        found(0)
    assert len(server.log) == 2
    for name in ("hf://models/alice/set/x.tar", "https:///x.tar"):
        with pytest.raises(InputError, match=r"is no(t the address of a)? file"):
            http.find(name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FetchError, match="HF_HUB_OFFLINE is set"):
        found(0)


def test_a_range_is_kept_as_a_file_is(server, tmp_path):
    file, cache = FileRange(found(0), 1000, SIZE - 500), ShardCache(tmp_path, 10**9)
    assert read(cache, file) == read(pickle.loads(pickle.dumps(cache)), file) == content(0)[1000:-500]
    assert ranges(server) == [f"bytes=1000-{SIZE - 501}"] and cache.has(file) and not cache.has(file.file)
    assert read(cache, FileRange(file.file, 0, SIZE)) == content(0) and cache.has(file.file)


def test_a_file_that_changes_in_the_middle_is_told(server, tmp_path, monkeypatch):
    put(server, {"changing.tar": content(0)})
    file, cache = http.find(f"{ON_THE_HUB}/changing.tar"), ShardCache(tmp_path, 10**9)
    monkeypatch.setattr(http.time, "sleep", lambda seconds: put(server, {"changing.tar": content(1)}))
    server.fault(path=CDN, action="truncate", after_bytes=2_000_000)
    with pytest.raises(FetchError, match=f"changing.tar has changed on its server: it had {SIZE} bytes and the version {file.version}"):
        cache.open(file)
    assert not cache.has(file)
    assert read(cache, http.find(f"{ON_THE_HUB}/changing.tar")) == content(1)


def test_bytes_with_another_hash_are_not_kept(server, tmp_path):
    file, cache = found(2), ShardCache(tmp_path, 10**9)
    path = server.store.object_path(file.sha256)
    path.write_bytes(content(3))
    with pytest.raises(FetchError, match=f"was fetched with the hash .* in place of {file.sha256}"):
        cache.open(file)
    path.write_bytes(content(2))
    assert read(cache, file) == content(2)


def test_a_server_without_ranges_sends_the_whole_file_again(tmp_path, monkeypatch):
    """That of Python's standard library, whose version of a file is the time of its last change."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.tar").write_bytes(content(0))
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path / "data")
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as listener:
        threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        file, cache = http.find(f"http://127.0.0.1:{listener.server_port}/a.tar"), ShardCache(tmp_path / "cache", 10**9)
        with pytest.raises(FetchError, match="its server does not answer ranges"):
            http.read_range(file, 10, 20)
        monkeypatch.setattr(http, "PATIENCE", 0)
        with pytest.raises(FetchError, match="its server sent the whole file in place of a range; tried for"):
            http.read_range(dataclasses.replace(file, ranges=True), 10, 20)  # that has answered ranges before, and may again
        with cache._part(file, wait=True) as part:
            part.write(content(0)[:1000])
        assert read(cache, file) == content(0)
        listener.shutdown()


def test_processes_and_threads_fetch_a_file_once(server, tmp_path):
    file = found(0)
    until = server.hold(path=CDN)
    with ThreadPoolExecutor(8) as pool:
        readers = [pool.submit(ShardCache(tmp_path, 10**9).open, file) for _ in range(8)]
        wait_for(lambda: ranges(server))
        until.set()
        opened = [reader.result(HANG) for reader in readers]  # none waits for another to close it
        assert all(each.read() == content(0) for each in opened)
    for each in opened:
        each.close()
    assert len(ranges(server)) == 1


@pytest.mark.parametrize("cut", [0, 1000], ids=["file", "range"])
def test_a_killed_process_blocks_nobody_and_its_part_is_continued(server, tmp_path, cut):
    file, cache = FileRange(found(0), cut, SIZE - cut), ShardCache(tmp_path, 10**9)
    server.fault(path=CDN, action="truncate", after_bytes=2_000_000, fin=True)
    until = server.hold(path=CDN)
    fetching = multiprocessing.get_context("fork").Process(target=cache.open, args=(file,))
    fetching.start()
    wait_for(lambda: len(ranges(server)) == 2)
    os.kill(fetching.pid, signal.SIGKILL)
    wait_for(lambda: gone(fetching.pid))
    fetching.join()
    until.set()
    server.log.clear()
    assert read(cache, file) == content(0)[cut : SIZE - cut] and int(ranges(server)[0].split("=")[1].split("-")[0]) > cut


def test_files_go_by_their_last_use_but_none_that_is_open(server, tmp_path, capsys):
    cache, files = ShardCache(tmp_path, 2 * SIZE), [found(number) for number in range(4)]
    with closing(cache.open(files[0])) as used:
        for number in (1, 2):
            assert read(cache, files[number]) == content(number)
        assert [cache.has(file) for file in files] == [True, False, True, False]
        with closing(cache.open(files[2])):
            assert capsys.readouterr().err == ""
            assert read(cache, files[3]) == content(3)
            assert "the files in use fill shard_cache_gb 0.006" in capsys.readouterr().err
            assert [cache.has(file) for file in files] == [True, False, True, True]
        assert used.read() == content(0)
    assert read(cache, files[1]) == content(1) and sum(path.stat().st_size for path in tmp_path.iterdir()) == 2 * SIZE


def test_the_next_files_are_fetched_in_the_background_as_far_as_there_is_room(server, tmp_path, capsys):
    cache, files = ShardCache(tmp_path, 3 * SIZE), [found(number) for number in range(4)]
    server.fault(path=CDN, action="drop", times=2)
    with closing(cache.open(files[0])), closing(cache.open(files[1])):
        capsys.readouterr()
        cache.prefetch(files)
        wait_for(lambda: cache.has(files[2]))
        wait_for(lambda: not any(thread.name.endswith("(_prefetch)") for thread in threading.enumerate()))
        assert not cache.has(files[3]) and not list(tmp_path.glob("*.part"))
    assert capsys.readouterr().err == "" and read(cache, files[2]) == content(2)


def test_a_full_disk_is_told(server, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shard_cache.os, "fsync", full)
    with pytest.raises(CannotWriteError, match="No space left on device"):
        ShardCache(tmp_path, 10**9).open(found(0))
