"""Which images there are, and that what stands at a position follows from seed and position alone."""

import hashlib
import os

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from debias_diffusers.config.schema.data import DataConfig, TextConfig
from debias_diffusers.data.captions import CaptionedSource, read_captions
from debias_diffusers.data.dataset import PositionBatchSampler, TrainingData, micro_batches
from debias_diffusers.data.images import decode, to_array
from debias_diffusers.data.sources.opening import open_source
from debias_diffusers.data.sources.subset import RepeatedSource, SourceSubset, folder_repeats
from debias_diffusers.data.sources.summary import class_counts, summary, training_summary
from debias_diffusers.data.text_dataset import TextData
from debias_diffusers.errors import DebiasError, InputError
from debias_diffusers.utils import seeding

DIGITS = DataConfig(dataset="digits", resolution=8, num_workers=0)
EMOJI_SHA256 = "99f6da69c2406a664b50d676ad2388959b4e9e7fc16622712c4edb3a7b8d3826"  # of the pixels, (1906, 3, 16, 16)


def picture(value, size=(8, 8), mode="RGB"):
    return Image.new(mode, size, (value,) * 3 if mode == "RGB" else value)


@pytest.fixture
def folder(tmp_path):
    for k, name in enumerate(["cat/a.png", "cat/b.jpg", "dog/c.png"]):
        path = tmp_path / "pets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(k * 40).save(path)
    (tmp_path / "pets" / "notes.txt").write_text("no image")
    return tmp_path / "pets"


def test_the_digits_are_the_1797_of_the_collection():
    data = TrainingData(open_source(DataConfig(dataset="digits", resolution=8, class_conditional=True)), DIGITS, seed=0)
    assert len(data.source) == 1797 and data.channels == 1
    assert data.source.class_names == [str(k) for k in range(10)]
    counts = torch.bincount(torch.tensor([data.source.read(k)[1] for k in range(1797)]))
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # as the collection's description says


def test_the_emoji_are_those_of_noto_emoji():
    config = DataConfig(dataset="emoji", resolution=16, class_conditional=True)
    source = open_source(config)
    pixels = np.stack([to_array(decode(source.read(k)[0], source.read(k)[2])) for k in range(len(source))])
    assert pixels.shape == (1906, 3, 16, 16)
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == EMOJI_SHA256
    assert np.abs(pixels.mean((0, 2, 3)) - (209, 196, 181)).max() < 2  # the mean colour of the same images in 32x32
    counts = dict(zip(source.class_names, class_counts(source)))
    assert counts == {  # the numbers of emoji 16.0 without skin tones
        "Activities": 85, "Animals & Nature": 159, "Flags": 270, "Food & Drink": 131, "Objects": 264, "People & Body": 386,
        "Smileys & Emotion": 169, "Symbols": 224, "Travel & Places": 218,
    }  # fmt: skip
    names = dict(zip([caption for (caption,) in read_captions(source, None)], source.labels()))
    assert len(names) == 1905 and source.class_names[names["french fries"]] == "Food & Drink"


def test_every_epoch_shows_every_image_once_in_another_order():
    data = TrainingData(open_source(DIGITS), DIGITS, seed=5)
    first, second = ([data.index(p) for p in range(e * 1797, (e + 1) * 1797)] for e in range(2))
    assert sorted(first) == sorted(second) == list(range(1797))
    assert first != second
    other = TrainingData(open_source(DIGITS), DIGITS, seed=6)
    assert [other.index(p) for p in range(1797)] != first


def test_a_sample_does_not_depend_on_history():
    config = DataConfig(dataset="digits", resolution=8, class_conditional=True, random_flip=True)
    one, other = (TrainingData(open_source(config), config, seed=1) for _ in range(2))
    for position in (5000, 3, 1797):
        one[position + 1]
        for name, value in one[position].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[position][name])), name


def test_draws_of_neighbouring_seeds_and_positions_share_nothing():
    draws = {seeding.derive_seed(seed, purpose, p) for seed in range(20) for purpose in ("a", "b") for p in range(500)}
    assert len(draws) == 20 * 2 * 500
    u = torch.tensor([seeding.uniform(0, "timestep", p) for p in range(20_000)], dtype=torch.float64)
    assert abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.002 and u.min() >= 0 and u.max() < 1


def test_normal_numbers_of_several_positions_are_those_of_a_generator_for_each():
    for shape in ((4, 8, 8), (3, 1, 1), (5,)):  # from 16 numbers on torch draws in blocks
        several = seeding.normal(shape, 3, "noise", [7, 0, 2**40])
        alone = [torch.randn(shape, generator=seeding.generator(3, "noise", position)) for position in (7, 0, 2**40)]
        assert torch.equal(several, torch.stack(alone))


def test_noise_is_standard_normal():
    data = TrainingData(open_source(DIGITS), DIGITS, seed=0)
    noise = torch.stack([data[p]["noise"] for p in range(500)])
    assert abs(noise.mean()) < 0.02 and abs(noise.var() - 1) < 0.02


def test_half_of_the_images_are_flipped_and_a_tenth_of_the_labels_dropped():
    config = DataConfig(dataset="digits", resolution=8, class_conditional=True, random_flip=True)
    source = open_source(config)
    data = TrainingData(source, config, seed=0)
    plain = TrainingData(source, DataConfig(dataset="digits", resolution=8), seed=0)
    samples = [data[p] for p in range(1000)]
    flipped = [torch.equal(s["image"], plain[p]["image"].flip(-1)) for p, s in enumerate(samples)]
    same = [torch.equal(s["image"], plain[p]["image"]) for p, s in enumerate(samples)]
    assert all(a or b for a, b in zip(flipped, same)) and 430 < sum(flipped) < 570
    assert 70 < sum(s["label"] == 10 for s in samples) < 130


@pytest.mark.parametrize("processes, micro, workers", [(1, 64, 0), (2, 5, 0), (4, 16, 2)])
def test_positions_are_the_same_however_they_are_split(processes, micro, workers):
    config = DataConfig(dataset="digits", resolution=8, num_workers=workers)
    data = TrainingData(open_source(config), config, seed=3)
    parts = []
    for rank in range(processes):
        positions = PositionBatchSampler(64, micro, rank, processes, range(4, 6))
        share = list(micro_batches(data, positions, pin_memory=False))
        assert len(share) == len(positions)
        parts.append({k: torch.cat([batch[k] for batch in share]).chunk(2) for k in share[0]})
    for name in ("image", "u", "noise"):
        together = torch.cat([part[name][step] for step in range(2) for part in parts])
        assert torch.equal(together, torch.stack([torch.as_tensor(data[p][name], dtype=together.dtype) for p in range(256, 384)]))


def test_a_folder_gives_labels_from_its_sub_folders(folder):
    source = open_source(DataConfig(dataset=str(folder), resolution=8, class_conditional=True))
    assert source.class_names == ["cat", "dog"]
    assert [source.read(k)[1] for k in range(3)] == [0, 0, 1]
    assert len(open_source(DataConfig(dataset=str(folder)))) == 3


def test_a_folder_gives_labels_from_file_names_as_the_reference_does(tmp_path):
    for name in ("cat_1.png", "dog_1.png", "cat_2.png"):
        picture(0).save(tmp_path / name)
    source = open_source(DataConfig(dataset=str(tmp_path), class_conditional=True))
    assert source.class_names == ["cat", "dog"] and [source.read(k)[1] for k in range(3)] == [0, 0, 1]
    picture(0).save(tmp_path / "bird.png")
    with pytest.raises(InputError, match=r"bird\.png has no label"):
        open_source(DataConfig(dataset=str(tmp_path), class_conditional=True))


def test_linked_classes_count_and_hidden_files_and_previews_do_not(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    picture(9).save(tmp_path / "elsewhere" / "d.png")
    (folder / "bird").symlink_to(tmp_path / "elsewhere")
    (folder / "dog" / "loop").symlink_to(folder)
    (folder / ".thumbs").mkdir()
    picture(1).save(folder / ".thumbs" / "t.png")
    (folder / "preview").mkdir()
    picture(1).save(folder / "preview" / "grid.png")
    (folder / "metadata.jsonl").write_text("")
    (folder / "cat" / "folder.png").mkdir()
    source = open_source(DataConfig(dataset=str(folder), class_conditional=True))
    assert source.names == ["bird/d.png", "cat/a.png", "cat/b.jpg", "dog/c.png"]


def test_a_link_to_a_folder_that_is_read_already_is_said(folder):
    """Its images are those of the other folder only, which a class of links would lack without a word."""
    (folder / "pet").mkdir()
    picture(9).save(folder / "pet" / "d.png")
    (folder / "pet" / "more").symlink_to(folder / "cat")
    source = open_source(DataConfig(dataset=str(folder), class_conditional=True))
    assert source.names == ["cat/a.png", "cat/b.jpg", "dog/c.png", "pet/d.png"]
    assert "1 link to a folder that is read already" in summary(source, "x")[1]


def test_names_that_are_no_text_are_read_like_others(folder):
    os.rename(folder / "cat" / "a.png", os.fsencode(folder / "cat") + b"/\xff\xfe.png")
    source = open_source(DataConfig(dataset=str(folder)))
    assert len(source) == 3 and source.fingerprint()["images"] == 3


@pytest.mark.parametrize("name, value", [("split", "test"), ("image_column", "image"), ("label_column", "label")])
def test_what_a_folder_does_not_have_is_refused(folder, name, value):
    with pytest.raises(InputError, match=f"{name} is {value}, but dataset .* is a folder"):
        open_source(DataConfig(dataset=str(folder), class_conditional=True, **{name: value}))


def test_a_caption_column_of_a_folder_without_metadata_is_refused(folder):
    (folder / "cat" / "a.txt").write_text("a cat")
    source = open_source(DataConfig(dataset=str(folder)))
    assert ("a cat",) in read_captions(source, None)
    with pytest.raises(InputError, match=r"caption_column is title, but dataset .* is a folder of images without a metadata file"):
        read_captions(source, "title")


def test_a_single_class_is_refused(folder):
    with pytest.raises(InputError, match="a single class, pets"):
        open_source(DataConfig(dataset=str(folder.parent), class_conditional=True))


def test_columns_of_other_kinds_are_refused(tmp_path):
    for name, options, named in (
        ("digits", {"image_column": "label"}, "image_column label holds .* no images"),
        ("digits", {"class_conditional": True, "label_column": "image"}, "label_column image holds .* no whole numbers"),
    ):
        with pytest.raises(InputError, match=named):
            open_source(DataConfig(dataset=name, **options))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    table = datasets.Dataset.from_dict({"image": [picture(0)] * 2, "label": [0, None]}, features=features)
    table.to_parquet(tmp_path / "null.parquet")
    config = DataConfig(dataset=str(tmp_path / "null.parquet"), resolution=8, class_conditional=True)
    data = TrainingData(open_source(config), config, seed=0)
    (error,) = [data[p] for p in range(2) if isinstance(data[p], InputError)]
    assert "has no label in column label" in str(error)
    wide = datasets.Dataset.from_dict(
        {"image": [picture(0)], "label": [10**9]}, features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    )
    wide.to_parquet(tmp_path / "wide.parquet")
    with pytest.raises(InputError, match="fewer than 100000"):
        open_source(DataConfig(dataset=str(tmp_path / "wide.parquet"), class_conditional=True, label_column="label"))


def test_without_dropped_labels_there_is_no_null_label():
    config = DataConfig(dataset="digits", resolution=8, class_conditional=True, label_dropout=0.0)
    assert TrainingData(open_source(config), config, seed=0).null_label is None


def test_tables_are_read_from_parquet_and_from_saved_datasets(tmp_path):
    rows = {"picture": [picture(k, mode="L") for k in range(4)], "kind": [0, 1, 1, 0], "id": list(range(4))}
    features = datasets.Features(
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["x", "y"]), "id": datasets.Value("int64")}
    )
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(tmp_path / "table.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(tmp_path / "splits")
    for name, split, images in (("table.parquet", "train", 4), ("saved", "train", 4), ("splits", "test", 1)):
        config = DataConfig(dataset=str(tmp_path / name), split=split, resolution=8, class_conditional=True, label_dropout=0.0)
        data = TrainingData(open_source(config), config, seed=0)
        assert len(data.source) == images and data.channels == 1 and data.num_classes == 2
    with pytest.raises(InputError, match=r"split is valid, but dataset .* has only: train, test"):
        open_source(DataConfig(dataset=str(tmp_path / "splits"), split="valid"))
    with pytest.raises(InputError, match="split valid cannot be loaded"):
        open_source(DataConfig(dataset=str(tmp_path / "table.parquet"), split="valid"))
    with pytest.raises(InputError, match="image_column is image, but the dataset has only: picture, kind, id"):
        open_source(DataConfig(dataset=str(tmp_path / "saved"), image_column="image"))
    labels = open_source(DataConfig(dataset=str(tmp_path / "saved"), class_conditional=True, label_column="id"))
    assert labels.class_names == ["0", "1", "2", "3"]


def test_a_hub_id_that_cannot_be_reached_is_a_sentence():
    with pytest.raises(InputError, match="dataset nobody/nothing with split train cannot be loaded"):
        open_source(DataConfig(dataset="nobody/nothing"))


@pytest.mark.parametrize("name", ["missing.parquet", "./missing", "/no/where", "a/b/c"])
def test_data_that_is_not_there_is_named(name):
    with pytest.raises(InputError, match=name):
        open_source(DataConfig(dataset=name))


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no images"):
        open_source(DataConfig(dataset=str(tmp_path)))


def test_a_broken_image_stops_with_its_name_also_from_a_worker(folder):
    (folder / "cat" / "b.jpg").write_bytes(b"broken")
    config = DataConfig(dataset=str(folder), resolution=8, num_workers=1)
    data = TrainingData(open_source(config), config, seed=0)
    with pytest.raises(InputError, match=r"cat/b\.jpg cannot be read") as error:
        list(micro_batches(data, PositionBatchSampler(3, 3, 0, 1, range(1)), pin_memory=False))
    assert "\n" not in str(error.value)


def test_colour_in_a_grey_data_set_is_refused_and_grey_in_a_coloured_one_is_taken(tmp_path):
    picture(1, mode="L").save(tmp_path / "a.png")
    picture(2).save(tmp_path / "b.png")
    config = DataConfig(dataset=str(tmp_path), resolution=8)
    data = TrainingData(open_source(config), config, seed=0)
    assert data.channels == 1
    refused = [data[p] for p in range(2) if isinstance(data[p], InputError)]
    assert len(refused) == 1 and "--channels 1, which converts it to grey" in str(refused[0])
    for channels in (1, 3):
        config = DataConfig(dataset=str(tmp_path), resolution=8, channels=channels)
        data = TrainingData(open_source(config), config, seed=0)
        assert {tuple(data[p]["image"].shape) for p in range(2)} == {(channels, 8, 8)}


def test_a_changed_folder_has_another_fingerprint(folder):
    before = open_source(DataConfig(dataset=str(folder))).fingerprint()
    assert open_source(DataConfig(dataset=str(folder))).fingerprint() == before
    picture(3, size=(9, 9)).save(folder / "cat" / "a.png")
    after = open_source(DataConfig(dataset=str(folder))).fingerprint()
    assert after != before and after["images"] == 3


def test_pixels_arrive_unchanged_at_their_own_resolution(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    config = DataConfig(dataset=str(tmp_path), resolution=8)
    assert (TrainingData(open_source(config), config, seed=0)[0]["image"].numpy() == array.transpose(2, 0, 1)).all()


@pytest.mark.parametrize("met", (ConnectionResetError(104, "Connection reset by peer"), EOFError()))
def test_a_worker_lost_while_it_hands_a_batch_over_is_said_in_words(monkeypatch, met):
    # The loader asks whether its workers live before it lets this out; one that is about to die can still answer yes.
    def lost(self):
        raise met

    monkeypatch.setattr("torch.utils.data.dataloader._SingleProcessDataLoaderIter.__next__", lost)
    data = TrainingData(open_source(DIGITS), DIGITS, seed=0)
    with pytest.raises(DebiasError, match="a process that reads images was killed"):
        next(micro_batches(data, PositionBatchSampler(8, 8, 0, 1, range(100)), pin_memory=False))


def test_an_unconditional_run_of_data_with_classes_says_so(tmp_path):
    for name in ("pets/train/cat/a", "pets/train/dog/b", "pets/test/dog/b", "plain/one/a", "plain/b", "rows/a", "rows/b"):
        (path := tmp_path / f"{name}.png").parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(path)
    (tmp_path / "rows" / "metadata.jsonl").write_text('{"file_name": "a.png", "label": "x"}\n{"file_name": "b.png", "label": "y"}\n')
    said = {}
    for name, flags in (("pets", {}), ("plain", {}), ("rows", {}), ("rows", {"class_conditional": True})):
        source = open_source(DataConfig(dataset=str(tmp_path / name), **flags))
        said[name, bool(flags)] = training_summary(source, name)[len(summary(source, name)) :]
    (sentence,) = said.pop(("pets", False))
    assert sentence.startswith("its 2 classes are not used") and "--class_conditional" in sentence
    assert said == {("plain", False): [], ("rows", False): [sentence], ("rows", True): []}
    (digits,) = training_summary(open_source(DataConfig(dataset="digits")), "digits")[1:]
    assert digits.startswith("its 10 classes are not used")


def test_images_of_a_folder_that_names_a_number_are_repeated(tmp_path):
    for name in ("10_cats/a.png", "10_cats/b.png", "2_dogs/c.png", "birds/d.png"):
        (tmp_path / "pets" / name).parent.mkdir(parents=True, exist_ok=True)
        picture(9).save(tmp_path / "pets" / name)
    config = DataConfig(dataset=str(tmp_path / "pets"), resolution=8, folder_repeats=True)
    source = open_source(config)
    assert folder_repeats(source) == [10, 10, 2, 1]
    subset = SourceSubset(source, [1])
    repeated = RepeatedSource(subset, folder_repeats(subset))
    assert len(repeated) == 13 and repeated.fingerprint() == subset.fingerprint()
    names = [repeated.read(index)[2].split("/")[-1] for index in range(13)]
    assert names == ["a.png"] * 10 + ["c.png"] * 2 + ["d.png"]
    with pytest.raises(InputError, match="no folder of images"):
        folder_repeats(open_source(DIGITS))


def test_a_draft_is_the_same_for_every_source_and_keeps_the_original_size(tmp_path):
    (tmp_path / "folder").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (2, 40, 64, 3), dtype=np.uint8)
    for number, array in enumerate(noise):
        Image.fromarray(array).resize((256, 160)).save(tmp_path / "folder" / f"{number}.jpg")
        (tmp_path / "folder" / f"{number}.txt").write_text("a picture")
    files = sorted((tmp_path / "folder").glob("*.jpg"))
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": [str(file) for file in files]}, features=features).to_parquet(tmp_path / "table.parquet")
    found = {}
    for name in ("folder", "table.parquet"):
        for draft in (False, True):
            config = DataConfig(dataset=str(tmp_path / name), resolution=40, num_workers=0, jpeg_draft=draft)
            found[name, draft] = TrainingData(open_source(config), config, 0).decoded(1)[0]
    assert found["folder", True].equal(found["table.parquet", True]) and found["folder", False].equal(found["table.parquet", False])
    assert not found["folder", True].equal(found["folder", False])
    direct = Image.open(files[1])
    direct.draft(None, (40, 40))
    assert direct.size == (64, 40) and torch.equal(found["folder", True], torch.tensor(np.asarray(direct)[:, 12:52].transpose(2, 0, 1)))
    config = DataConfig(dataset=str(tmp_path / "folder"), resolution=40, num_workers=0, jpeg_draft=True)
    data = TextData(CaptionedSource(open_source(config), None), config, TextConfig(), 0, (4, 5, 5))
    pixels, time_ids = data.pixels(1, False, 0)
    assert pixels.equal(found["folder", True]) and time_ids.tolist() == [160, 256, 0, 12, 40, 40]
