"""Shards: tar files and row groups of parquet files, their index, the order of their images, and the commands that make them."""

import io
import json
import multiprocessing
import os
import pickle
import tarfile
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from conftest import HANG, command, computed, gone, same, wait_for
from here import tiny, trained_here
from PIL import Image

from debias_diffusers import cli
from debias_diffusers.config.schema.data import DataConfig
from debias_diffusers.config.shard_names import expand
from debias_diffusers.data import captions as captions_module
from debias_diffusers.data import images
from debias_diffusers.data.buckets import BucketOrder
from debias_diffusers.data.captions import CaptionedSource, captions_of
from debias_diffusers.data.dataset import PositionBatchSampler, TrainingData, micro_batches
from debias_diffusers.data.shards import commands, index
from debias_diffusers.data.shards import parquet as parquet_module
from debias_diffusers.data.shards.files import Columns
from debias_diffusers.data.shards.order import ShardOrder
from debias_diffusers.data.shards.source import ShardedSource
from debias_diffusers.data.sources.opening import open_source
from debias_diffusers.data.sources.subset import SourceSubset
from debias_diffusers.data.sources.summary import summary
from debias_diffusers.data.sources.table import ImageTable
from debias_diffusers.data.text_dataset import prompts_of_data
from debias_diffusers.data.validation_split import split_source
from debias_diffusers.errors import CannotWriteError, DebiasError, InputError
from debias_diffusers.tasks import precompute
from debias_diffusers.utils import seeding


def encoded(number, width=8, height=8, kind="PNG"):
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_tar(path, samples):
    """A tar file by the standard library: samples as (key, {rest of the name: bytes})."""
    with tarfile.open(path, "w") as archive:
        for key, members in samples:
            for rest, content in members.items():
                member = tarfile.TarInfo(f"{key}.{rest}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def samples_of(shard, count=7):
    names = ("cat", "dog", "cow")
    return [
        (
            f"{shard:02d}/{k:03d}",
            {"jpg" if k % 2 else "png": encoded(shard * count + k, 8 + k, 8, "JPEG" if k % 2 else "PNG")}
            | {"cls": names[k % 3].encode(), "txt": f"picture {k} of {shard}\nagain ".encode(), "json": b'{"other": 1}'},
        )
        for k in range(count)
    ]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Where locks and indices are written that are not beside the shards."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def shards(tmp_path, home):
    """Five shards of seven images."""
    (tmp_path / "shards").mkdir()
    for shard in range(5):
        write_tar(tmp_path / "shards" / f"{shard:04d}.tar", samples_of(shard))
    return tmp_path / "shards"


def opened(path, **fields):
    return open_source(DataConfig(dataset=str(path), resolution=8, **fields))


def contents(source):
    return [source.read(k)[:2] for k in range(len(source))]


# ---- readers ---------------------------------------------------------------------------------------------------------


def test_a_pattern_stands_for_files(tmp_path):
    assert expand("a/{08..11}-{x,y}.tar") == [f"a/{k}-{end}.tar" for k in ("08", "09", "10", "11") for end in "xy"]
    assert expand("a/b.tar") == ["a/b.tar"] and expand("user/{set}") == ["user/{set}"]
    for wrong in ("{3..1}.tar", "{a}.tar", "{0..9999999}.tar"):
        with pytest.raises(InputError, match=r"\{"):
            expand(wrong)
    (tmp_path / "{1..2}.tar").touch()
    assert expand(f"{tmp_path}/{{1..2}}.tar") == [f"{tmp_path}/{{1..2}}.tar"]


def test_a_tar_file_of_the_standard_library_is_read_unchanged(shards):
    source = opened(shards, class_conditional=True)
    expected = [(members, k) for shard in range(5) for k, (_, members) in enumerate(samples_of(shard))]
    assert source.class_names == ["cat", "cow", "dog"] and len(source) == 35
    label = {b"cat": 0, b"cow": 1, b"dog": 2}
    assert contents(source) == [(members.get("png") or members["jpg"], label[members["cls"]]) for members, _ in expected]
    assert source.labels() == [label[members["cls"]] for members, _ in expected]
    assert source.sizes().tolist() == [[8, 8 + k] for _, k in expected]
    captions = captions_of(CaptionedSource(source, None))
    assert [captions[k] for k in range(35)] == [(f"picture {k % 7} of {k // 7}", "again") for k in range(35)]
    assert source.read(8)[2] == f"01/001 of {shards}/0001.tar"
    pattern, one = opened(shards / "{0000..0004}.tar"), opened(shards / "0002.tar")
    assert pattern.fingerprint() == opened(shards).fingerprint() and contents(one) == contents(opened(shards))[14:21]
    assert summary(opened(shards), "x") == ["dataset x: 35 images"]  # its index and nothing else is beside the shards
    again = pickle.loads(pickle.dumps(source))
    assert contents(again) == contents(source) and again.index.path == source.index.path


def test_labels_and_captions_come_from_json_too(tmp_path, home):
    fields = [{"label": 2, "text": "one"}, {"label": 0, "text": ["two", "three"]}, {"label": 2}, {"class": 1, "alt": "four"}]
    write_tar(
        tmp_path / "a.tar", [(str(k), {"webp": encoded(k, kind="WEBP"), "json": json.dumps(f).encode()}) for k, f in enumerate(fields)]
    )
    source = opened(tmp_path / "a.tar", class_conditional=True)
    assert source.class_names == ["0", "1", "2"] and source.labels() == [2, 0, 2, 1]
    captions = captions_of(CaptionedSource(source, None))
    assert captions[:] == [("one",), ("two", "three"), (), ()]
    assert source.captions("alt")[3] == ("four",)
    assert opened(tmp_path / "a.tar", class_conditional=True, label_column="label").labels() == [2, 0, 2, None]
    with pytest.raises(InputError, match="label_column is nothing"):
        opened(tmp_path / "a.tar", label_column="nothing")


def test_a_tar_file_of_webdataset_is_read_unchanged(tmp_path, home):
    webdataset = pytest.importorskip("webdataset")
    expected = [(encoded(k), k % 3, f"caption {k}") for k in range(10)]
    with webdataset.ShardWriter(str(tmp_path / "%04d.tar"), maxcount=4, verbose=0) as writer:
        for k, (content, label, caption) in enumerate(expected):
            writer.write({"__key__": f"key.d/{k:05d}", "png": content, "cls": label, "txt": caption, "json": {"k": k}})
    source = opened(tmp_path / "{0000..0002}.tar", class_conditional=True)
    captions = captions_of(CaptionedSource(source, None))
    assert [(*each, *captions[k]) for k, each in enumerate(contents(source))] == expected
    assert source.shards().tolist() == [0, 4, 8, 10]


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """A folder of two parquet files by `datasets`, of row groups of three."""
    folder = tmp_path_factory.mktemp("parquet")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat", "cow"]), "text": datasets.Value("string")}
    )
    for part in range(2):
        rows = [
            {"image": {"bytes": encoded(10 * part + k, 9, 8), "path": None}, "label": k % 2, "text": f"{part} {k}"} for k in range(8 - part)
        ]
        path = folder / f"train-0000{part}-of-00002.parquet"
        datasets.Dataset.from_list(rows, features=features).to_parquet(path, batch_size=3)
    return folder


def test_parquet_by_row_groups_is_what_datasets_reads(parquet, home, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "_places", lambda files, key: [tmp_path / "beside" / key.file_name, tmp_path / key.file_name])
    for name, of_model in ((parquet, "natural"), (parquet, ["cat", "cow", "dog"]), (parquet / "train-00001-of-00002.parquet", "natural")):
        config = DataConfig(dataset=str(name), class_conditional=True, resolution=8)
        table = open_source(config, of_model)
        groups = open_source(DataConfig(dataset=str(name), class_conditional=True, resolution=8, shuffle_window=2), of_model)
        assert isinstance(table, ImageTable) and isinstance(groups, ShardedSource)
        assert contents(groups) == contents(table) and groups.labels() == table.labels()
        assert groups.class_names == table.class_names
        assert captions_of(CaptionedSource(groups, None))[:] == captions_of(CaptionedSource(table, None))
        assert groups.sizes().tolist() == [[8, 9]] * len(table)
    assert opened(parquet, shuffle_window=2).shards().tolist() == [0, 3, 6, 8, 11, 14, 15]
    assert contents(pickle.loads(pickle.dumps(groups))) == contents(table)
    pattern = opened(parquet / "train-{00000..00001}-of-00002.parquet")
    assert contents(pattern) == contents(opened(parquet))


def test_each_row_group_of_a_window_is_read_once(tmp_path, home, monkeypatch):
    """150 row groups, more than a process keeps where they are large; images of a rare size read some of them again."""
    rows = {"image": [encoded(0)] * 450}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet", row_group_size=3)
    read, real = Counter(), parquet_module.RowGroupReader._read
    monkeypatch.setattr(parquet_module.RowGroupReader, "_read", lambda self, *group: read.update([group]) or real(self, *group))
    sizes = [((64, 64), (64, 96), (96, 64))[k] for k in np.random.default_rng(0).choice(3, 450, p=[0.6, 0.35, 0.05])]

    def reads(window, buckets):
        """How many row groups an epoch reads, and how many are then in memory."""
        source = opened(tmp_path / "a.parquet", shuffle_window=window)
        config = DataConfig(resolution=8, shuffle_window=window)
        data = TrainingData(source, config, seed=0, channels=3)
        order = BucketOrder(sizes, 8, 0, source.shards(), window)
        read.clear()
        for position in range(order.steps(1) * 8 if buckets else 450):
            image = order.index(position) if buckets else data.index(position)
            if buckets:
                data._prefetch(order.windows, order)
            source.read(image)
        return read.total(), len(source._reader._kept)

    assert [reads(window, False) for window in (8, 75)] == [(150, 8), (150, 109)]  # 34 are in the next window, too
    assert [reads(window, True)[0] for window in (8, 75)] == [168, 150]
    monkeypatch.setattr(parquet_module, "KEPT_BYTES", 0)
    again, kept = reads(75, False)
    assert again > 180 and kept == 64
    assert summary(opened(tmp_path / "a.parquet", shuffle_window=75), "x")[1].startswith(
        "warning: the row groups of shuffle_window 75 take up"
    )
    (few,), (many,) = (parquet_module.memory_warning(np.full(300, 10**8), window) for window in (50, 200))
    assert "50 take up to 5 GB of memory in each data loader worker; a smaller" in few and "keeps 0 GB, or 64 row groups, and reads" in many


def test_sizes_come_from_the_index_without_reading_images(shards, monkeypatch):
    source = CaptionedSource(opened(shards), None)
    monkeypatch.setattr(ShardedSource, "read", None)
    held = SourceSubset(source, [0, 20])
    assert precompute.image_sizes(held, None).tolist() == [[8, 8 + k % 7] for k in range(35) if k not in (0, 20)]
    captions = captions_of(held)
    assert len(captions) == 33 and captions[0] == ("picture 1 of 0", "again") and captions[-1] == ("picture 6 of 4", "again")
    listed = list(captions)
    assert list(captions_module.different_captions(captions)) == captions_module.different_captions(listed)
    assert captions_module.different_captions(captions)[3:5] == captions_module.different_captions(listed)[3:5]
    tokens = dict.fromkeys(captions_module.different_captions(listed), 3)
    assert captions_module.summary(captions, tokens, 2) == captions_module.summary(listed, tokens, 2)
    assert prompts_of_data(captions) == prompts_of_data(listed) != prompts_of_data(captions, 5) == prompts_of_data(listed)[:5]
    assert captions_module.first_captions(captions, 2) == ["picture 1 of 0", "picture 2 of 0"]


def test_captions_of_an_index_are_in_the_order_of_python(tmp_path, home):
    texts = ["z", "\U0001f600", "\uffff", "é", "Z", "e\u0301", "", "zz"]
    write_tar(tmp_path / "a.tar", [(str(k), {"png": encoded(k), "txt": text.encode()}) for k, text in enumerate(texts)])
    captions = captions_of(CaptionedSource(opened(tmp_path / "a.tar"), None))
    assert list(captions_module.different_captions(captions)) == sorted({*texts} - {""})
    assert captions_module.caption_counts(captions).tolist() == [1, 1, 1, 1, 1, 1, 0, 1]


def test_an_image_without_a_size_is_named_or_skipped(tmp_path, home):
    write_tar(tmp_path / "a.tar", [("good", {"png": encoded(0, 9, 8)}), ("bad", {"png": b"no image"})])
    source = opened(tmp_path / "a.tar")
    assert source.sizes().tolist() == [[8, 9], [0, 0]]
    with pytest.raises(InputError, match=r"image bad of .*a.tar cannot be read"):
        precompute.image_sizes(source, None)
    assert precompute.image_sizes(source, None, skip_bad=True).tolist() == [[8, 9], [1, 1]]


def test_tokens_of_many_captions_are_counted_in_a_sample(monkeypatch):
    monkeypatch.setattr(captions_module, "MANY", 3)
    monkeypatch.setattr(captions_module, "SAMPLE", 2)
    counted = captions_module.counted_captions(["a", "b", "c", "d"])
    assert len(counted) == 2 and captions_module.counted_captions(["a", "b", "c"]) == ["a", "b", "c"]
    said = captions_module.summary([("a",), ("b",), ("c",), ("d",)], dict.fromkeys(counted, 9), 7, 4)
    assert said.startswith("captions: 4 different captions of 4 images; 2 of a sample of 2 have more than 7 tokens")


# ---- the index -------------------------------------------------------------------------------------------------------


def test_an_index_is_built_once_and_follows_shards_that_moved(shards, monkeypatch, tmp_path):
    before = opened(shards).fingerprint()
    read = Counter()
    real = index._read_one
    monkeypatch.setattr(index, "_read_one", lambda files, key, name: read.update([name]) or real(files, key, name))
    assert opened(shards).fingerprint() == before and not read
    os.utime(shards / "0003.tar", ns=(1, 1))
    assert opened(shards).fingerprint() == before and read == {"0003.tar": 1}
    assert opened(shards).fingerprint() == before and read == {"0003.tar": 1}
    moved = shards.rename(tmp_path / "elsewhere")
    assert opened(moved).fingerprint() == before and read == {"0003.tar": 1}
    (path,) = moved.glob("index-*.arrow")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert opened(moved).fingerprint() == before and read == {"0003.tar": 2, **{f"000{k}.tar": 1 for k in (0, 1, 2, 4)}}


def test_an_index_that_cannot_be_written_beside_the_shards_is_written_to_the_cache(shards, home, monkeypatch, capsys):
    real = index.atomic_write

    def refused(path):
        if path.parent == shards:
            raise CannotWriteError("read-only")
        return real(path)

    monkeypatch.setattr(index, "atomic_write", refused)
    assert len(opened(shards)) == 35 and len(opened(shards)) == 35
    assert not list(shards.glob("index-*")) and len(list((home / ".cache" / "debias_diffusers" / "shards").glob("*.arrow"))) == 1
    assert capsys.readouterr().err.count("indexing 5 shards") == 1


def test_many_shards_are_read_by_several_processes(shards, monkeypatch):
    whole = opened(shards).fingerprint()
    for path in shards.glob("index-*"):
        path.unlink()
    monkeypatch.setattr(index, "SMALL", 0)
    assert opened(shards).fingerprint() == whole
    for path in shards.glob("index-*"):
        path.unlink()
    monkeypatch.setattr(index.tar, "read_rows", lambda *_: os._exit(9))
    with pytest.raises(DebiasError, match="was killed"):
        opened(shards)


def test_of_several_processes_one_builds_the_index_and_a_killed_one_blocks_nobody(shards, monkeypatch, tmp_path):
    log, held, real = tmp_path / "log", tmp_path / "held", index.tar.read_rows
    whole = opened(shards).fingerprint()
    (path,) = shards.glob("index-*")
    content = path.read_bytes()

    def read_rows(*args):
        with open(log, "a") as file:
            file.write(f"{args[1]} {os.getpid()}\n")
        wait_for(lambda: not held.exists())
        return real(*args)

    def read():
        return [line.split() for line in log.read_text().splitlines()] if log.exists() else []

    monkeypatch.setattr(index, "SMALL", 0)
    monkeypatch.setattr(index.tar, "read_rows", read_rows)
    path.unlink()
    held.touch()
    processes = [multiprocessing.get_context("fork").Process(target=opened, args=(shards,)) for _ in range(3)]
    processes[0].start()
    wait_for(lambda: len(read()) >= 2)
    for process in processes[1:]:
        process.start()
    processes[0].kill()
    wait_for(lambda: all(gone(int(pid)) for _, pid in read()))  # its workers, too, which have its lock
    held.unlink()
    for process in processes[1:]:
        process.join(HANG)
    assert [process.exitcode for process in processes[1:]] == [0, 0]
    assert Counter(name for name, _ in read()[2:]) == dict.fromkeys(opened(shards).shard_files.names, 1)
    assert path.read_bytes() == content and opened(shards).fingerprint() == whole
    assert not list(shards.glob(".draft-*"))


def changed(path):
    write_tar(path, samples_of(9))


def damaged(path):
    """One byte of an image, without a trace."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 40] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def truncated(path):
    path.write_bytes(path.read_bytes()[:3000])


def cut_between_members(path):
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    path.write_bytes(path.read_bytes()[: last.offset])


def compressed(path):
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))


def appended(path):
    path.write_bytes(path.read_bytes() * 2)


def linked(path, kind):
    """A link to an image, of which no bytes are in the file."""
    write_tar(path, [("a", {"jpg": b"1"})])
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = kind, "a.jpg"
        archive.addfile(link)


def sparse(path):
    """An old GNU header of a file of one megabyte, of which a block is stored."""
    write_tar(path, [("a", {"bmp": b"1" * 512})])
    content = bytearray(path.read_bytes())
    content[156:157], content[257:265] = b"S", b"ustar  \0"
    content[386:410], content[482], content[483:495] = b"00000000000\000000001000\0", 0, b"00004000000\0"
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    path.write_bytes(content)


BEFORE_THE_INDEX = [
    (truncated, "no whole, uncompressed tar"), (cut_between_members, "truncated"), (compressed, "no whole, uncompressed tar"),
    (appended, "another file was appended"), (lambda path: write_tar(path, [("a", {"txt": b"no image"})]), "holds no images"),
    (lambda path: write_tar(path, [("a", {"jpg": b"1", "png": b"2"})]), "several images of a: jpg, png"),
    (lambda path: write_tar(path, [("a", {"jpg": b"1"})] * 2), "two members a.jpg"),
    (lambda path: write_tar(path, [("a", {"jpg": b"1", "json": b"[]"})]), "no JSON object"),
    (lambda path: write_tar(path, [("a", {"jpg": b"1", "txt": b"\xff"})]), "not Unicode"),
    (lambda path: write_tar(path, [("photo.v2", {"jpg": b"1"})]), "holds no images, only v2.jpg; name one with --image_column"),
    (lambda path: linked(path, tarfile.LNKTYPE), "b.jpg as a link"), (lambda path: linked(path, tarfile.SYMTYPE), "b.jpg as a link"),
    (lambda path: sparse(path), "a.bmp as a link or with holes"),
]  # fmt: skip
AFTER_THE_INDEX = [
    (truncated, "no whole, uncompressed tar"), (changed, "has changed since it was indexed (7 images then, 7 now)"),
    (Path.unlink, "0003.tar is missing"), (lambda path: path.rename(path.with_name("0007.tar")), "0007.tar is new"),
]  # fmt: skip


@pytest.mark.parametrize(("indexed", "cases"), [(False, BEFORE_THE_INDEX), (True, AFTER_THE_INDEX)])
def test_a_shard_that_is_not_as_it_should_be_is_named(shards, indexed, cases, capsys):
    whole = (shards / "0003.tar").read_bytes()
    for spoil, said in cases:
        (shards / "0003.tar").write_bytes(whole)
        if indexed:
            (shards / "0007.tar").unlink(missing_ok=True)
            opened(shards)
        spoil(shards / "0003.tar")
        assert cli.shards(["verify", str(shards)]) == 2
        err = capsys.readouterr().err
        assert said in err and "000" in err and len(err.strip().splitlines()[-1]) > 20, err
        with pytest.raises(InputError):
            opened(shards)
    if indexed:  # the command takes the shards as they are
        assert cli.shards(["index", str(shards)]) == 0 and len(opened(shards)) == 35


def test_names_of_data_that_cannot_be_are_refused_at_once(shards):
    (shards / "a.tar.gz").write_bytes(b"")
    for name, said in (
        (f"{shards}/{{0007..0009}}.tar", "0007.tar and 2 more do not exist"),
        (f"{shards}/*.tar", "several files are written as {0000..0127}"),
        ("s3://bucket/{0..3}.tar", "begin with https://, http:// or hf://"),
        ("HTTPS://host/0.tar", "begin with https://, http:// or hf://"),
        ("https://host/0.tar?token=secret", "dataset https://host/0.tar has a query"),
        ("https://me:secret@host/0.tar", "dataset https://host/0.tar has a user name"),
        (f"{shards}/a.tar.gz", "is compressed"),
    ):
        with pytest.raises(InputError) as error:
            opened(name)
        assert said in str(error.value) and "secret" not in str(error.value)
    for argv in (["index", ""], ["verify", ""], ["make", "", "out"], ["make", str(shards), str(shards / "out")]):
        assert cli.shards(argv) == 2
    assert not (shards / "out").exists()


def test_class_names_must_differ(shards):
    for content in ('["a", "a"]', "[]", '{"a": 1}'):
        (shards / "classes.json").write_text(content)
        with pytest.raises(InputError, match="no list of different class names"):
            opened(shards)


def test_upper_case_names_and_empty_labels_of_parquet_are_read_as_by_datasets(tmp_path, home):
    rows = {"image": [encoded(k) for k in range(3)], "label": ["x", "", "y"]}
    (tmp_path / "data").mkdir()
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "data" / "A.PARQUET")
    table, groups = (opened(tmp_path / "data", class_conditional=True, shuffle_window=window) for window in (None, 1))
    assert table.class_names == groups.class_names == ["", "x", "y"] and table.labels() == groups.labels() == [1, 0, 2]


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_folder_has_all_its_shards_whatever_is_beside_them_and_however_it_is_named(kind, tmp_path, home, capsys):
    folder, elsewhere = tmp_path / "photos[1]", tmp_path / "another disk"

    def write(name, number):
        if kind == "tar":
            return write_tar(folder / name, samples_of(number, 1))
        return pyarrow.parquet.write_table(pyarrow.table({"image": [encoded(number)]}), folder / name)

    folder.mkdir()
    elsewhere.mkdir()
    (folder / "more").symlink_to(elsewhere)
    (folder / "__old__").mkdir()
    for number, name in enumerate((f"0.{kind}", f"more/1.{kind}", f"__old__/2.{kind}")):
        write(name, number)
    for name in ("train_stats.json", "test.txt", f"0.{kind}.sha256", f"._0.{kind}"):
        (folder / name).write_text("of another kind")
    images_of = {number: (samples_of(number, 1)[0][1]["png"] if kind == "tar" else encoded(number)) for number in range(2)}
    for window in (None, 1):
        source = opened(folder, shuffle_window=window)
        assert [source.read(k)[0] for k in range(len(source))] == [images_of[0], images_of[1]]
        assert {why for name, why in source.passed_over if name.endswith(f".{kind}")} == {"in no split", "hidden"}
        assert [opened(folder / f"0.{kind}", shuffle_window=window).read(0)[0]] == [images_of[0]]
    (folder / f"0.{kind}").unlink()
    (folder / "more").unlink()
    with pytest.raises(InputError, match=r"the names of the files of dataset .*photos\[1\] give no splits"):
        opened(folder)


def test_a_missing_file_of_a_pattern_is_named_before_torch_is_needed(shards, capsys):
    (shards / "0003.tar").unlink()
    flags = ["--resolution", "8", "--output_dir", str(shards / "run"), "--max_steps", "1"]
    assert cli.train(["--dataset", f"{shards}/{{0000..0004}}.tar", *flags]) == 2
    assert f"{shards}/0003.tar does not exist" in capsys.readouterr().err
    assert cli.train(["--dataset", f"{shards}/{{0000-0004}}.tar", *flags]) == 2
    assert "such as {0000..0127}" in capsys.readouterr().err


def test_a_damaged_image_is_named_where_it_is_read(shards, capsys):
    source = opened(shards)
    damaged(shards / "0003.tar")
    assert opened(shards).fingerprint() == source.fingerprint()  # which nothing but its bytes tells
    with pytest.raises(InputError, match=r"image 03/000 of .*0003.tar is not as it was when the shard was indexed"):
        contents(opened(shards))
    assert cli.shards(["verify", str(shards)]) == 2
    assert "0003.tar has changed since it was indexed" in capsys.readouterr().err


def test_a_damaged_parquet_file_is_named(parquet, tmp_path, home):
    for spoil in (lambda content: content[:-20], lambda content: content[:300] + b"\0" * 40 + content[340:]):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for path in parquet.glob("*.parquet"):
            (folder / path.name).write_bytes(path.read_bytes())
        last = folder / "train-00001-of-00002.parquet"
        last.write_bytes(spoil(last.read_bytes()))
        with pytest.raises(InputError, match=r"train-00001-of-00002.parquet"):
            source = opened(folder, shuffle_window=2)
            contents(source)


# ---- order -----------------------------------------------------------------------------------------------------------


def shard_starts(generator, shards):
    return np.concatenate([[0], generator.integers(1, 9, shards).cumsum()])


def test_empty_row_groups_are_passed_over(tmp_path, home):
    rows = pyarrow.table({"image": [encoded(k) for k in range(4)]})
    with pyarrow.parquet.ParquetWriter(tmp_path / "a.parquet", rows.schema) as writer:
        for first, stop in ((0, 0), (0, 3), (3, 3), (3, 4), (4, 4)):
            writer.write_table(rows.slice(first, stop - first))
    source = opened(tmp_path / "a.parquet", shuffle_window=2)
    assert [source.read(k)[0] for k in range(4)] == rows["image"].to_pylist()


def test_shards_whose_columns_are_of_other_types_than_in_the_first_are_named(tmp_path, home):
    first = {"image": [encoded(0)], "label": [0], "text": ["a"]}
    for column, value, said in (
        ("text", b"a", "2.parquet has binary in place of captions in column text"),
        ("text", [1], "2.parquet has list<.*int64> in place of captions in column text"),
        ("label", "dog", "label_column of .* holds whole numbers in the first shard, but not in all"),
        ("label", 0.5, "label_column of .* holds whole numbers in the first shard, but not in all"),
    ):
        for number, rows in ((1, first), (2, {**first, column: [value]})):
            pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / f"{number}.parquet")
        with pytest.raises(InputError, match=said):
            opened(tmp_path / "{1..2}.parquet", shuffle_window=1, class_conditional=column == "label")
        (tmp_path / "2.parquet").unlink()
        for path in tmp_path.glob("index*"):
            path.unlink()


def test_row_groups_of_more_than_2_gb_are_read_in_chunks():
    """An array of bytes has 2 GB at most, and pyarrow reads more as several."""
    empty = pyarrow.py_buffer(np.zeros(2**30, np.uint8))  # of pages that nobody touches
    offsets = pyarrow.py_buffer(np.array([0, 2**30], np.int32))
    large = pyarrow.Array.from_buffers(pyarrow.binary(), 1, [None, offsets, empty])
    cells = parquet_module._cells(pyarrow.table({"image": pyarrow.chunked_array([large, large, [b"x"]])}), "image")
    assert len(cells) == 3 and cells.nbytes > 2**31 and cells[2].as_py() == b"x"


def test_columns_that_cannot_be_read_are_named_before_the_shards_are(tmp_path, home):
    rows = {"image": [encoded(0)], "label": ["dog"], "number": [1]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    source = opened(tmp_path / "a.parquet", shuffle_window=1)
    for column, said in (
        ("txt", r"a.parquet has only: image, label, number"),
        ("number", r"a.parquet holds Value\('int64'\) and no texts"),
    ):
        with pytest.raises(InputError, match=f"caption_column (is )?{column}.*{said}"):
            source.captions(column)
    pairs = pyarrow.array([[("a", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    pyarrow.parquet.write_table(pyarrow.table({**rows, "pairs": pairs}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b.parquet has a column that cannot be read \(.*map<string, int64"):
        opened(tmp_path / "b.parquet", shuffle_window=1)


def test_a_field_named_label_that_holds_no_class_matters_only_to_who_trains_classes(tmp_path, home):
    for number, label in enumerate((0.5, ["a", "b"], {"a": 1}, True)):
        path = tmp_path / f"{number}.tar"
        write_tar(path, [(f"{k}", {"png": encoded(k), "json": json.dumps({"label": label}).encode()}) for k in range(2)])
        assert len(opened(path)) == 2 and opened(path).unused_labels() is None
        with pytest.raises(InputError, match=r"no image of .* has a label, a whole number or text; name their column"):
            opened(path, class_conditional=True)
        with pytest.raises(InputError, match=r"0 has label .*, but labels must be whole numbers or text"):
            opened(path, class_conditional=True, label_column="label")


def test_a_column_named_label_that_holds_no_classes_matters_only_to_who_trains_classes(tmp_path, home):
    for number, labels in enumerate(([0.5, 0.25], [[1, 2], [3]], [True, False])):
        path = tmp_path / f"{number}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"image": [encoded(0), encoded(1)], "label": labels}), path)
        for window in (None, 1):
            assert len(opened(path, shuffle_window=window)) == 2
            with pytest.raises(InputError, match=r"label_column label holds .* and no whole numbers or text"):
                opened(path, shuffle_window=window, class_conditional=True)


def test_footers_of_other_writers_and_damaged_ones(tmp_path):
    """A file without columns, one with names that are no UTF-8, and columns whose dictionary page is said to be at 0, and is not there."""
    with pyarrow.parquet.ParquetWriter(tmp_path / "none.parquet", pyarrow.schema([])) as writer:
        writer.write_table(pyarrow.table({}))
    with open(tmp_path / "none.parquet", "rb") as file:
        assert parquet_module.row_groups(file, "none") == [{}]
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"imagefield": [b"x"]}), content, store_schema=False)
    damaged = io.BytesIO(content.getvalue().replace(b"imagefield", b"\xb8magefield"))
    with pytest.raises(InputError, match="shard damaged is no whole parquet file"):
        parquet_module.read_rows(damaged, "damaged", "damaged", Columns("imagefield"))
    column = SimpleNamespace(dictionary_page_offset=0, data_page_offset=500, total_compressed_size=100, path_in_schema="image.bytes")
    assert parquet_module._places(SimpleNamespace(num_columns=1, column=lambda _: column)) == {"image": (500, 600)}


def test_an_epoch_has_every_image_once_and_windows_are_whole_shards():
    generator = np.random.default_rng(0)
    for _ in range(60):
        starts = shard_starts(generator, int(generator.integers(1, 20)))
        count, window, seed, epoch = int(starts[-1]), int(generator.integers(1, 22)), int(generator.integers(9)), int(generator.integers(3))
        order = ShardOrder(starts, window, seed)
        found = [order.index(epoch, place) for place in range(count)]
        assert sorted(found) == list(range(count))
        shuffled = generator.permutation(count)
        other = ShardOrder(starts, window, seed)
        assert [other.index(epoch, int(place)) for place in shuffled] == [found[place] for place in shuffled]
        of_image = np.searchsorted(starts, found, "right") - 1
        places = [np.flatnonzero(of_image == shard) for shard in range(len(starts) - 1)]
        largest = np.sort(np.diff(starts))[::-1][:window].sum()
        assert all(np.ptp(place) < largest for place in places)  # no image is farther from another of its shard than a window is long
        if window >= len(starts) - 1:
            full = torch.randperm(count, generator=seeding.generator(seed, "order", epoch))  # as without shards
            assert found == full.tolist()


def test_a_window_of_all_shards_is_the_order_without_shards(shards):
    configs = [DataConfig(resolution=8, shuffle_window=window) for window in (None, 5, 3)]
    orders = [[data.index(p) for p in range(70)] for data in (TrainingData(opened(shards), config, 4) for config in configs)]
    assert orders[0] == orders[1] != orders[2] and all(sorted(o[:35]) == sorted(o[35:]) == list(range(35)) for o in orders)


def test_what_is_held_out_leaves_the_shards_as_they_are(shards):
    source = opened(shards)
    trained, held_out = split_source(source, 0.2, seed=1)
    assert trained.shards()[-1] == 28 and held_out.shards()[-1] == 7
    names = [trained.read(k)[2] for k in range(28)]
    assert np.flatnonzero([a[-8:] != b[-8:] for a, b in pairwise(names)]).tolist() == (trained.shards()[1:-1] - 1).tolist()
    assert sorted([*trained.indices, *held_out.indices]) == list(range(35)) and trained.indices[3:5] == list(trained.indices)[3:5]


def test_every_bucket_goes_through_the_shards_together():
    generator = np.random.default_rng(3)
    starts = np.arange(0, 1201, 60)
    sizes = [((64, 64), (64, 96), (96, 64))[k] for k in generator.integers(0, 3, 1200)]
    order = BucketOrder(sizes, 8, 0, starts, 2)
    steps = order.steps(1)
    found = [order.index(p) for p in range(steps * 8)]
    assert set(found) == set(range(1200))
    assert all(len({sizes[k] for k in found[8 * step : 8 * step + 8]}) == 1 for step in range(steps))
    spans = [len({k // 60 for k in found[first : first + 120]}) for first in range(0, len(found) - 120, 40)]
    assert np.mean(spans) < 6 and max(spans) <= 9, spans  # of twenty; a window has two
    covering, plain = BucketOrder(sizes, 8, 0, starts, 20), BucketOrder(sizes, 8, 0)
    assert [covering.index(p) for p in range(2000)] == [plain.index(p) for p in range(2000)]


@pytest.mark.parametrize(("processes", "workers"), [(1, 1), (2, 0), (3, 3)])
def test_samples_are_the_same_over_any_number_of_processes_and_workers(shards, processes, workers):
    config = DataConfig(dataset=str(shards), resolution=8, num_workers=workers, cache_images_mb=0, class_conditional=True, shuffle_window=2)
    data, steps = TrainingData(open_source(config), config, seed=3), range(3, 7)  # with the end of an epoch
    alone = [data[p] for p in range(steps.start * 6, steps.stop * 6)]
    parts = []
    for rank in range(processes):
        batches = list(micro_batches(data, PositionBatchSampler(6, 2, rank, processes, steps), pin_memory=False))
        parts.append({name: torch.cat([batch[name] for batch in batches]).chunk(len(steps)) for name in batches[0]})
    for name in ("image", "label", "noise"):
        together = torch.cat([part[name][step] for step in range(len(steps)) for part in parts])
        assert torch.equal(together, torch.stack([torch.as_tensor(sample[name], dtype=together.dtype) for sample in alone]))


def test_a_run_that_was_stopped_within_a_window_goes_on_with_the_same_bits(shards, tmp_path):
    flags = ["--dataset", shards, "--shuffle_window", 2, "--channels", 3, "--checkpoint_every", 3, "--num_workers", 0]
    flags += ["--warmup_steps", 0, "--lr_schedule", "constant"]
    for name, stops in (("whole", [6]), ("stopped", [3, 6])):
        for steps in stops:  # of 8 images: an epoch is 35
            trained_here(tiny(tmp_path / name, *flags, "--max_steps", steps))
    same(tmp_path / "whole", tmp_path / "stopped", 6)
    write_tar(shards / "0003.tar", samples_of(8))
    with pytest.raises(InputError, match=r"0003.tar has changed"):
        trained_here(tiny(tmp_path / "whole", *flags, "--max_steps", 8))
    assert cli.shards(["index", str(shards)]) == 0
    with pytest.raises(InputError, match="is not the one this run began with"):
        trained_here(tiny(tmp_path / "whole", *flags, "--max_steps", 8))


def test_saved_data_are_shuffled_within_record_batches_and_folders_are_not(tmp_path, home):
    digits = opened("digits")
    assert digits.shards().tolist() == [*range(0, 1797, 100), 1797]
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    config = DataConfig(dataset=str(tmp_path), resolution=8, shuffle_window=3)
    with pytest.raises(InputError, match="are no shards"):
        TrainingData(open_source(config), config, seed=0)


# ---- make ------------------------------------------------------------------------------------------------------------


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith("index-")}


def test_shards_of_a_data_set_have_its_images_labels_and_captions(parquet, tmp_path, home, monkeypatch, capsys):
    assert cli.shards(["make", str(parquet), str(tmp_path / "made")]) == 0
    made = opened(tmp_path / "made", class_conditional=True)
    table = opened(parquet, class_conditional=True)
    assert contents(made) == contents(table) and made.class_names == table.class_names == ["dog", "cat", "cow"]
    assert captions_of(CaptionedSource(made, None))[:] == captions_of(CaptionedSource(table, None))
    assert cli.shards(["verify", str(tmp_path / "made")]) == 0
    assert cli.shards(["make", str(tmp_path / "made"), str(tmp_path / "again")]) == 0  # of shards, too
    assert files_of(tmp_path / "again")["000000.tar"] == files_of(tmp_path / "made")["000000.tar"]
    assert cli.shards(["make", str(parquet), str(tmp_path / "made"), "--shard_mb", "3"]) == 2
    assert "has shards of other images, labels or captions, or of another size" in capsys.readouterr().err
    assert cli.shards(["make", str(parquet), str(parquet)]) == cli.shards(["make", str(parquet), str(tmp_path)]) == 2


def test_making_shards_goes_on_after_a_kill_with_the_same_bytes(tmp_path, home, monkeypatch):
    for k in range(30):
        path = tmp_path / "data" / ("cat", "dog")[k % 2] / f"{k}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(k, 200, 170, "BMP"))
    command = ["make", str(tmp_path / "data"), "--shard_mb", "1"]
    assert cli.shards([*command, str(tmp_path / "whole")]) == 0
    whole = files_of(tmp_path / "whole")
    assert sorted(whole) == ["000000.tar", "000001.tar", "000002.tar", "000003.tar", "classes.json", "made_from.json"]
    assert all(len(content) <= 1_000_000 for content in whole.values())
    real, read = commands._members, []

    def killed(source, captions, number):
        read.append(number)
        if number == 15:
            raise KeyboardInterrupt
        return real(source, captions, number)

    monkeypatch.setattr(commands, "_members", killed)
    assert cli.shards([*command, str(tmp_path / "killed")]) == 130
    assert "000000.tar" in files_of(tmp_path / "killed") and "000001.tar" not in files_of(tmp_path / "killed")
    monkeypatch.setattr(commands, "_members", lambda *args: read.append(args[2]) or real(*args))
    read.clear()
    assert cli.shards([*command, str(tmp_path / "killed")]) == 0
    assert files_of(tmp_path / "killed") == whole and read[0] == 9


@pytest.mark.parametrize("column", ["text", "label"])
def test_shards_are_not_taken_for_those_of_captions_or_labels_that_were_corrected(column, tmp_path, home, capsys):
    (tmp_path / "data").mkdir()
    values = {"text": ("a cat", "a dog", "a cow"), "label": ("cat", "dog", "dog")}[column]
    rows = [{"file_name": f"{k}.png", column: value} for k, value in enumerate(values)]
    for k, row in enumerate(rows):
        (tmp_path / "data" / row["file_name"]).write_bytes(encoded(k))
    metadata = tmp_path / "data" / "metadata.jsonl"
    metadata.write_text("".join(json.dumps(row) + "\n" for row in rows))
    make = ["make", str(tmp_path / "data"), str(tmp_path / "made")]
    assert cli.shards(make) == cli.shards(make) == 0
    before = files_of(tmp_path / "made")
    metadata.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]) + json.dumps({**rows[2], column: values[0]}) + "\n")
    assert cli.shards(make) == 2
    assert "has shards of other images, labels or captions" in capsys.readouterr().err and files_of(tmp_path / "made") == before


@pytest.mark.parametrize("given", ["folders", "rows"])
def test_captions_stay_with_their_images_where_some_have_no_class(given, tmp_path, home, capsys):
    names = {"folders": ["beside.png", "cat/0.png", "dog/1.png"], "rows": ["0.png", "1.png", "2.png"]}[given]
    for k, name in enumerate(names):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(k))
        path.with_suffix(".txt").write_text(f"image {k}")
    flags, why = [], "1 beside the class folders"
    if given == "rows":
        rows = [{"file_name": f"{k}.png", "kind": kind, "text": f"image {k}"} for k, kind in ((1, "a"), (2, "b"), (3, "c"))]
        (tmp_path / "data" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags, why = ["--label_column", "kind"], "1 without a row in metadata.jsonl, 1 in metadata.jsonl without an image"
    assert cli.shards(["make", str(tmp_path / "data"), str(tmp_path / "made"), *flags]) == 0
    assert why in capsys.readouterr().err
    made = CaptionedSource(opened(tmp_path / "made", class_conditional=True), None)
    assert [(image, caption) for (image, _, _), (caption,) in zip(map(made.read, range(2)), made.captions)] == [
        (encoded(1), "image 1"),
        (encoded(2), "image 2"),
    ]


def test_captions_that_cannot_be_read_are_not_left_out_of_shards(tmp_path, home, capsys):
    (tmp_path / "data").mkdir()
    for k, text in enumerate((b"a cat", "a café".encode("latin-1"))):
        (tmp_path / "data" / f"{k}.png").write_bytes(encoded(k))
        (tmp_path / "data" / f"{k}.txt").write_bytes(text)
    assert cli.shards(["make", str(tmp_path / "data"), str(tmp_path / "made")]) == 2
    assert "1.txt is not UTF-8" in capsys.readouterr().err and not (tmp_path / "made").exists()


def test_labels_of_which_something_is_wrong_are_not_left_out_of_shards(tmp_path, home, capsys):
    (tmp_path / "data").mkdir()
    for k in range(2):
        (tmp_path / "data" / f"{k}.png").write_bytes(encoded(k))
    rows = [{"file_name": "0.png", "label": "cat"}, {"file_name": "1.png", "label": "dog"}, {"file_name": "1.png", "label": "cow"}]
    (tmp_path / "data" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.shards(["make", str(tmp_path / "data"), str(tmp_path / "made")]) == 2
    assert "two labels for 1.png" in capsys.readouterr().err and not (tmp_path / "made").exists()


def test_shards_in_a_folder_named_as_embedded_data_are_what_was_made(tmp_path, home, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "0.png").write_bytes(encoded(0))
    monkeypatch.chdir(tmp_path)
    assert cli.shards(["make", "data", "digits"]) == 0
    assert "1 images are in 1 shard in digits; train with --dataset ./digits" in capsys.readouterr().err
    assert len(opened("./digits")) == 1


@pytest.mark.nightly
def test_shards_are_whole_after_a_kill_at_any_time(tmp_path, home):
    (tmp_path / "data").mkdir()
    for k in range(300):
        (tmp_path / "data" / f"{k:03d}.bmp").write_bytes(encoded(k, 300, 300, "BMP"))
    make = ["make", str(tmp_path / "data"), "--shard_mb", "5"]
    assert cli.shards([*make, str(tmp_path / "whole")]) == 0
    for sign in ("made_from.json", "000003.tar", "000008.tar", "000016.tar"):
        process = command("-m", "debias_diffusers.shards", *make, tmp_path / "killed")
        wait_for(lambda sign=sign: (tmp_path / "killed" / sign).exists())
        process.kill()
        process.wait()
    assert cli.shards([*make, str(tmp_path / "killed")]) == 0
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
    for path in (tmp_path / "killed").glob("index-*"):
        path.unlink()
    for moment in (0.0, 0.2, 0.4):  # seconds after the lock, while the shards are read by several processes
        process = command("-m", "debias_diffusers.shards", "index", tmp_path / "killed")
        wait_for(lambda process=process, moment=moment: computed(process.pid) > 1 + moment)
        process.kill()
        process.wait()
    assert opened(tmp_path / "killed").fingerprint() == opened(tmp_path / "whole").fingerprint()


def test_text_to_image_trains_shards_as_the_folder_that_they_were_made_of(tmp_path, home):
    pytest.importorskip("transformers")
    from test_text_to_image import batch_of, plan_of
    from text_models import make_base

    base = make_base(tmp_path / "base")
    for k in range(24):
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / f"{k:02d}.png").write_bytes(encoded(k, *((40, 40), (60, 32))[k % 3 == 0]))
        (tmp_path / "folder" / f"{k:02d}.txt").write_text(f"picture {k}\nthe same again" * (k != 5))
    assert cli.shards(["make", str(tmp_path / "folder"), str(tmp_path / "made")]) == 0
    flags = ("--resolution", 32, "--aspect_ratio_buckets", "--crop", "random")
    folder, made = (plan_of(base, tmp_path / "run", "--dataset", tmp_path / name, *flags).task.data for name in ("folder", "made"))
    assert folder.buckets.sizes == made.buckets.sizes and list(folder.captions) == list(made.captions) and len(set(made.buckets.sizes)) == 2
    one, other = (batch_of(data, range(16, 24)) for data in (folder, made))
    assert one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) if torch.is_tensor(one[name]) else one[name] == other[name] for name in one
    )


def test_a_caption_with_lines_is_kept_whole(tmp_path, home):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jpg").write_bytes(encoded(1, kind="JPEG"))
    (tmp_path / "folder" / "b").write_bytes(encoded(2, kind="BMP"))
    rows = [{"file_name": "a.jpg", "text": "one\ntwo"}, {"file_name": "b", "text": ["three", "four"]}]
    (tmp_path / "folder" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.shards(["make", str(tmp_path / "folder"), str(tmp_path / "made")]) == 0
    made = opened(tmp_path / "made")
    assert captions_of(CaptionedSource(made, None))[:] == [("one\ntwo",), ("three", "four")]
    with tarfile.open(tmp_path / "made" / "000000.tar") as archive:
        assert archive.getnames() == ["000000000.jpg", "000000000.json", "000000001.bmp", "000000001.txt"]


def test_an_image_has_the_extension_of_its_content():
    assert {images.extension_of(encoded(0, kind=kind), "x") for kind in ("PNG", "JPEG", "WEBP")} == {"png", "jpg", "webp"}
    with pytest.raises(InputError, match="image x cannot be read"):
        images.extension_of(b"no image", "x")
