"""Several processes that write the same file."""

import multiprocessing

import pytest
import torch

from debias_diffusers.evaluation import feature_cache
from debias_diffusers.utils import files

PROCESSES, WRITES = 4, 40


def _write_a_file(folder, own):
    files.write_file(folder / "file", bytes([own]) * 10_000)


def _write_an_entry(folder, own):
    feature_cache.FeatureCache(folder).put(feature_cache.cache_key("a"), {"colour": torch.full((100, 3), float(own))})


def _write_often(write, folder, own, start):
    start.wait()
    for _ in range(WRITES):
        write(folder, own)


@pytest.mark.row(53, "several processes can write the same file; each succeeds, and the file is whole at any moment")
@pytest.mark.parametrize("write", [_write_a_file, _write_an_entry])
def test_processes_that_write_the_same_file_all_succeed(write, tmp_path, trials, capfd):
    fork = multiprocessing.get_context("fork")
    start = fork.Barrier(PROCESSES)
    writers = [fork.Process(target=_write_often, args=(write, tmp_path, own, start)) for own in range(PROCESSES)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        for path in tmp_path.iterdir():
            if not path.name.startswith(files.TEMPORARY_PREFIX):
                content = path.read_bytes()
                assert len(set(content)) == 1 or content[8:].startswith(b"{")
    for writer in writers:
        writer.join()
        trials()
    assert [writer.exitcode for writer in writers] == [0] * PROCESSES
    assert "warning" not in capfd.readouterr().err and len(list(tmp_path.iterdir())) == 1
