"""Row 71 of docs/reliability.md: which images are taken where fewer are asked for than there are."""

import hashlib
import json
from collections import Counter
from math import comb

import numpy as np
import pytest
import torch
from PIL import Image

from debias_diffusers.config.schema.data import DataConfig
from debias_diffusers.config.schema.evaluation import BitsConfig, MeasureConfig, ScoreConfig
from debias_diffusers.data.sources.opening import open_source
from debias_diffusers.errors import InputError
from debias_diffusers.evaluation import score
from debias_diffusers.evaluation.image_sets import images_of_folder, images_of_npz, images_of_source
from debias_diffusers.evaluation.likelihood import Bound, bits_per_dimension
from debias_diffusers.utils import seeding

row = pytest.mark.row(71, "a smaller number of images is a random subset, a function of the seed, of a folder, a data set or an `.npz`")
SAVES = {"stored": np.savez, "compressed": np.savez_compressed}


@row
def test_every_subset_is_equally_likely():
    found = Counter(tuple(seeding.subset(seed, 7, 3)) for seed in range(35 * 60))
    assert len(found) == comb(7, 3) and all(list(chosen) == sorted(set(chosen)) and 0 <= chosen[0] <= chosen[2] < 7 for chosen in found)
    assert (
        sum((times - 60) ** 2 / 60 for times in found.values()) < 66
    )  # chi-square of 34 degrees of freedom: one in a thousand is above 66


@row
def test_a_subset_is_all_in_order_where_there_are_no_more_and_takes_no_memory_of_the_total():
    assert list(seeding.subset(5, 4, 4)) == list(seeding.subset(5, 4, 9)) == [0, 1, 2, 3]
    assert len({*seeding.subset(0, 2**40, 5), *seeding.subset(1, 2**40, 5)}) == 10


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory):
    """40 dark images, then 40 light ones, by path: image k has no pixel that another has."""
    folder = tmp_path_factory.mktemp("data") / "images"
    pixels = np.random.default_rng(0).integers(0, 2, (80, 8, 8), dtype=np.uint8) + 2 * np.arange(80, dtype=np.uint8)[:, None, None]
    for k, array in enumerate(pixels + 90 * (np.arange(80) >= 40).astype(np.uint8)[:, None, None]):
        path = folder / ("a_dark" if k < 40 else "b_light") / f"{k:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
    return folder


def arrays_of(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.rglob("*.png"))])


def indices_of(images, folder, batch_size=7, parts=1):
    """Which images of the folder a set has, in its order."""
    there = {array.tobytes(): k for k, array in enumerate(arrays_of(folder))}
    batches = sorted((pair for part in range(parts) for pair in images.batches(batch_size, part, parts)), key=lambda pair: pair[0])
    return [there[image[0].numpy().tobytes()] for _, batch in batches for image in batch]


def kinds_of_sets(folder, tmp_path):
    """Functions of (count, seed)."""
    source = open_source(DataConfig(dataset=str(folder)))
    packed = {}
    for name, save in SAVES.items():
        packed[name] = tmp_path / f"{name}.npz"
        save(packed[name], arrays_of(folder)[..., None])
    return {
        "data set": lambda count, seed: images_of_source(source, "some", 8, count, seed=seed),
        "folder": lambda count, seed: images_of_folder(source, "some", count, seed=seed),
        **{name: lambda count, seed, path=path: images_of_npz(path, count, seed) for name, path in packed.items()},
    }


@row
def test_sets_of_all_kinds_are_the_same_subset_in_batches_and_parts_of_any_number(two_classes, tmp_path, trials):
    for images_of in kinds_of_sets(two_classes, tmp_path).values():
        for count, seed in ((1, 0), (10, 0), (10, 1), (79, 3), (80, 3), (None, 3), (500, 3)):
            images, wanted = images_of(count, seed), list(seeding.subset(seed, 80, count or 80))
            assert (images.count, images.total) == (len(wanted), 80)
            for batch_size, parts in ((7, 1), (3, 2), (100, 3)):
                assert indices_of(images, two_classes, batch_size, parts) == wanted
                trials()


@row
@pytest.mark.parametrize("channels", (1, 3))
@pytest.mark.parametrize("name", SAVES)
def test_an_npz_of_every_layout_is_read(name, channels, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (9, 8, 8, channels), dtype=np.uint8)
    SAVES[name](tmp_path / "positional.npz", noise)
    SAVES[name](tmp_path / "named.npz", labels=np.arange(9), arr_0=noise)
    for path in tmp_path.glob("*.npz"):
        batches = [batch for _, batch in images_of_npz(path).batches(4, 0, 1)]
        assert [len(batch) for batch in batches] == [4, 4, 1]
        assert np.array_equal(torch.cat(batches).permute(0, 2, 3, 1).numpy(), np.broadcast_to(noise, (9, 8, 8, 3)))


@row
def test_the_key_of_a_subset_is_its_own_and_that_of_a_whole_set_as_before(two_classes, tmp_path):
    by_images = hashlib.sha256(b"8")
    for path in sorted(two_classes.rglob("*.png")):
        by_images.update(hashlib.sha256(path.read_bytes()).digest())
    for name, images_of in kinds_of_sets(two_classes, tmp_path).items():
        assert images_of(None, 0).key == images_of(80, 1).key == images_of(99, 2).key
        keys = [images_of(count, seed).key for count in (10, 11) for seed in (0, 1)]
        assert len({*keys, images_of(None, 0).key}) == 5
        if name == "data set":
            assert images_of(None, 4).key == by_images.hexdigest()
        if name in SAVES:
            file = hashlib.sha256((tmp_path / f"{name}.npz").read_bytes()).hexdigest()
            assert images_of(None, 4).key == hashlib.sha256(f"80 {file}".encode()).hexdigest()


@row
@pytest.mark.parametrize("name", SAVES)
def test_an_npz_that_is_damaged_behind_the_chosen_images_is_named(name, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), dtype=np.uint8)
    SAVES[name](tmp_path / "images.npz", noise)
    data = bytearray((tmp_path / "images.npz").read_bytes())
    data[-500] ^= 1  # in the last images: the directory at the end has some 100 bytes
    (tmp_path / "images.npz").write_bytes(data)
    seed = next(seed for seed in range(100) if max(seeding.subset(seed, 50, 2)) < 25)
    with pytest.raises(InputError, match=r"images\.npz is damaged"):
        list(images_of_npz(tmp_path / "images.npz", 2, seed).batches(8, 0, 1))


@row
def test_half_of_a_set_is_near_the_whole_and_the_figures_say_what_was_taken(two_classes, tmp_path):
    """The first half by path is 85 grey levels darker than the whole."""
    np.savez(tmp_path / "images.npz", arrays_of(two_classes)[..., None])
    measure = MeasureConfig(metrics="colour", cache_dir=str(tmp_path / "cache"), num_threads=1)
    distances = set()
    for seed in range(5):
        config = ScoreConfig(
            targets=(str(two_classes), str(tmp_path / "images.npz")), reference=str(two_classes), num_images=40, seed=seed, measure=measure,
            output=str(tmp_path / "out.json"),
        )  # fmt: skip
        score.score(config)
        found = json.loads((tmp_path / "out.json").read_text())
        one, other = found["targets"]
        assert found["seed"] == seed and all(row["images"] == 40 and row["total_images"] == 80 for row in (one, other))
        assert one["colour_distance"] == pytest.approx(other["colour_distance"]) and one["colour_distance"] < 40
        distances.add(one["colour_distance"])
    assert len(distances) == 5  # none is that of the seed before, out of the cache


@row
@pytest.mark.parametrize("seed", (0, 1))
def test_bits_per_dimension_are_of_images_of_both_classes(two_classes, trained, tmp_path, monkeypatch, seed):
    seen = []

    def terms(self, x_0, labels, noise_seed, indices, progress):
        seen.extend((k, round(float(image.min() * 127.5 + 127.5))) for k, image in zip(indices, x_0))
        return torch.zeros(len(x_0), 1)

    monkeypatch.setattr(Bound, "terms", terms)
    config = BitsConfig(model=str(trained), reference=str(two_classes), num_images=20, batch_size=8, seed=seed, num_threads=1)
    found = bits_per_dimension(config)
    assert (found["images"], found["total_images"], found["seed"]) == (20, 80, seed)
    least = arrays_of(two_classes).min((1, 2))
    assert [k for k, _ in seen] == list(seeding.subset(seed, 80, 20)) and all(least[k] == value for k, value in seen)
    assert 4 <= sum(k < 40 for k, _ in seen) <= 16
    seen.clear()
    assert bits_per_dimension(BitsConfig(**{**vars(config), "num_images": 500}))["images"] == 80
    assert [k for k, _ in seen] == list(range(80))
