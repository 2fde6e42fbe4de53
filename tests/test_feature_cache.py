"""The features that are kept between commands: what stays, what goes, and what is never touched."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from debias_diffusers.config.schema.evaluation import MeasureConfig
from debias_diffusers.evaluation.feature_cache import FeatureCache, cache_key, open_cache
from debias_diffusers.evaluation.image_sets import ImageSet
from debias_diffusers.evaluation.measure import Measure

FEATURES = {"64": torch.arange(640.0).view(10, 64), "colour": torch.ones(10, 3)}


def keys(folder):
    return {path.stem for path in folder.iterdir()}


def test_what_is_kept_is_read_again_also_where_the_first_version_kept_it(tmp_path):
    cache = FeatureCache(tmp_path / "new" / "folder")
    assert cache.get(cache_key("a")) is None and cache.get_json(cache_key("a")) is None
    cache.put(cache_key("a"), FEATURES)
    cache.put_json(cache_key("a"), {"size": 3, "key": None})
    assert torch.equal(cache.get(cache_key("a"))["64"], FEATURES["64"]) and cache.get_json(cache_key("a")) == {"size": 3, "key": None}
    save_file(FEATURES, tmp_path / "new" / "folder" / f"{cache_key('b')}.safetensors")
    assert torch.equal(cache.get(cache_key("b"))["colour"], FEATURES["colour"])


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"value": 1}', b"[" * 100_000, b"\xff"])
def test_a_damaged_entry_is_none(content, tmp_path):
    for suffix in ("json", "safetensors"):
        (tmp_path / f"{cache_key('a')}.{suffix}").write_bytes(content)
    assert FeatureCache(tmp_path).get(cache_key("a")) is None and FeatureCache(tmp_path).get_json(cache_key("a")) is None


def test_the_entries_that_were_not_used_for_longest_go_and_nothing_else(tmp_path):
    theirs = {cache_key("weights"): "safetensors", cache_key("settings"): "json", "model": "safetensors"}
    for name, suffix in theirs.items():
        path = tmp_path / f"{name}.{suffix}"
        save_file({"conv.weight": torch.ones(1000)}, path) if suffix == "safetensors" else path.write_text('{"a": 1}')
        os.utime(path, (1, 1))
    save_file(FEATURES, tmp_path / f"{cache_key('first version')}.safetensors")
    size = (tmp_path / f"{cache_key('first version')}.safetensors").stat().st_size
    cache = FeatureCache(tmp_path, max_bytes=3 * size + 500)  # metadata, too
    for age, name in enumerate(("first version", "a", "b")):
        if age:
            cache.put(cache_key(name), FEATURES)
        os.utime(tmp_path / f"{cache_key(name)}.safetensors", (age + 2, age + 2))
    assert cache.get(cache_key("first version"))  # which makes it the newest
    cache.put(cache_key("c"), FEATURES)
    assert keys(tmp_path) == {*theirs, *map(cache_key, ("first version", "b", "c"))}
    cache.put_json(cache_key("c"), "x" * 4 * size)
    assert keys(tmp_path) == {*theirs, cache_key("c")} and cache.get_json(cache_key("c"))


def test_what_a_model_draws_is_not_kept(tmp_path):
    for kept in (True, False):
        measure = Measure(MeasureConfig(metrics="colour", cache_dir=str(tmp_path / str(kept))), "digits", "cpu")
        images = ImageSet("some", 2, 8, "key" if kept else None, lambda *_: iter([(0, torch.zeros(2, 3, 8, 8, dtype=torch.uint8))]))
        assert measure.sample(images).count == 2
        assert len(list(tmp_path.glob(f"{kept}/*.safetensors"))) == kept


@pytest.mark.row(55, "a cache or home folder that cannot be written does not stop a command")
def test_a_cache_that_cannot_be_written_is_a_warning_said_once(tmp_path, capsys, trials):
    (tmp_path / "file").write_text("a file")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nowhere", "a\0b", tmp_path / ("n" * 300)):
        trials()
        cache = FeatureCache(folder) if isinstance(folder, os.PathLike) else open_cache(folder)
        for _ in range(2):
            cache.put(cache_key("a"), FEATURES)
            cache.put_json(cache_key("a"), 1)
            assert cache.get(cache_key("a")) is None and cache.get_json(cache_key("a")) is None
        err = capsys.readouterr().err
        assert err.count("warning: features are not kept") == 1 and "--cache_dir" in err and err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "a file"


@pytest.mark.row(55, "a cache or home folder that cannot be written does not stop a command")
def test_without_a_home_nothing_is_kept(monkeypatch, capsys):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", homeless)
    assert open_cache(None).get(cache_key("a")) is None
    assert "no home folder" in capsys.readouterr().err and open_cache("").get(cache_key("a")) is None


def test_an_entry_says_who_wrote_it(tmp_path):
    FeatureCache(tmp_path).put(cache_key("a"), FEATURES)
    assert load_file(tmp_path / f"{cache_key('a')}.safetensors").keys() == FEATURES.keys()
