"""Rows 57 to 62 of docs/reliability.md: which images and which labels a data set has."""

import hashlib
import io
import json
import zipfile
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import datasets
import numpy as np
import pytest
from conftest import sample_config
from here import tiny, trained_here
from PIL import Image

from debias_diffusers.config.schema.data import DataConfig
from debias_diffusers.config.schema.evaluation import MeasureConfig, ScoreConfig
from debias_diffusers.data.labels import label_indices, order_class_names, proportional_labels
from debias_diffusers.data.sources.checks import unreadable_images
from debias_diffusers.data.sources.opening import open_source, reopen_source
from debias_diffusers.data.sources.summary import class_counts, summary
from debias_diffusers.errors import InputError
from debias_diffusers.evaluation import score
from debias_diffusers.hub.model_card import model_card
from debias_diffusers.pipelines.pixel_pipeline import load_pipeline
from debias_diffusers.sampling.generate import make_job, sample

SPLITS = "the folders train, validation and test are splits, and --split selects one"
EXTENSIONS = "every image is found whatever its extension, and ignored files are counted"
STRAY = "previews of samples, packed samples and files outside class folders are not data; folders of users are"
NAMES = "class names are saved in natural order with the model, and a run of the first version keeps its labels"
PROPORTION = "untrained labels are not sampled, and the labels of an evaluation have the proportions of the data"
TABLES = "a folder of parquet files is one table, and metadata files give labels"


def put(root, *names, kind=None):
    """An image at each of these paths; their pixels differ."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        value = sum(name.encode()) % 256
        Image.new("L", (8, 8), value).save(path, kind or "PNG")
    return root


def opened(root, order="natural", **config):
    return open_source(DataConfig(dataset=str(root), **config), order)


def labels_of(source):
    """The class of each image by its path."""
    return {name: source.class_names[source.read(k)[1]] for k, name in enumerate(source.names)}


# ---- splits ----------------------------------------------------------------------------------------------------------


@pytest.mark.row(57, SPLITS)
@pytest.mark.parametrize(
    "folders, split, chosen",
    [
        (("train", "validation", "test"), "train", "train"),
        (("train", "validation", "test"), "test", "test"),
        (("Training", "val"), "train", "Training"),
        (("Training", "val"), "validation", "val"),
        (("train", "dev", "eval"), "valid", "dev"),
        (("train", "dev", "eval"), "test", "eval"),
        (("TRAIN",), "train", "TRAIN"),
        (("train", "training"), "train", "train"),
    ],
)
def test_split_folders_are_splits(tmp_path, folders, split, chosen):
    put(tmp_path, *(f"{folder}/{name}" for folder in folders for name in ("cat/a.png", "dog/b.png", "dog/c.png")), "contact.png")
    (tmp_path / "notes.txt").write_text("x")
    source = opened(tmp_path, split=split, class_conditional=True)
    assert labels_of(source) == {f"{chosen}/cat/a.png": "cat", f"{chosen}/dog/b.png": "dog", f"{chosen}/dog/c.png": "dog"}
    assert opened(tmp_path, split=split).names == source.names  # without labels, too
    said = summary(source, "pets")
    assert said[0] == f"dataset pets: 3 images, 2 classes (cat 1, dog 2), split {chosen} of {', '.join(sorted(folders))}"
    assert said[1] == "passed over: 1 beside the split folders, 1 .txt (no image)"


@pytest.mark.row(57, SPLITS)
def test_a_split_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    put(tmp_path, "train/a.png", "test/b.png")
    with pytest.raises(InputError, match=r"split is validation, but dataset .* has the splits test, train"):
        opened(tmp_path, split="validation")
    put(tmp_path, "Test/b.png")
    with pytest.raises(InputError, match="has the splits Test, test, train; name one of them"):
        opened(tmp_path, split="testing")


@pytest.mark.row(57, SPLITS)
@pytest.mark.parametrize(
    "folders, why", [(("test", "other"), "other is no split"), (("test", "dev"), "none is named train"), (("a", "b"), "a is no")]
)
def test_other_folders_are_no_splits(tmp_path, folders, why):
    put(tmp_path, *(f"{folder}/a.png" for folder in folders))
    assert opened(tmp_path, class_conditional=True).class_names == sorted(folders)
    with pytest.raises(InputError, match=f"split is test, but dataset .* is a folder of images .*{why}"):
        opened(tmp_path, split="test")


# ---- which files are images ------------------------------------------------------------------------------------------


@pytest.mark.row(58, EXTENSIONS)
def test_images_are_found_by_any_extension_or_none_and_the_rest_is_counted(tmp_path, trials):
    kinds = {
        "a.jfif": "JPEG", "b.jpe": "JPEG", "c.avif": "AVIF", "d.JPG": "JPEG", "e.Jp2": "JPEG2000", "f.dib": "DIB", "g.tga": "TGA",
        "h.pbm": "PPM",
        "none": "PNG", "photo.of.2019": "JPEG", "picture.dat": "WEBP", "Katze und Hund.png": "PNG", "猫.jpeg": "JPEG",
    }  # fmt: skip
    for name, kind in kinds.items():
        trials()
        put(tmp_path / "all", name, kind=kind)
    (tmp_path / "all" / "link.jfif").symlink_to(tmp_path / "all" / "a.jfif")
    for name in ("notes.txt", "list.TXT", "Thumbs.db", "paper.pdf", "half"):
        (tmp_path / "all" / name).write_bytes(b"%PDF-1.4 no image")
    with zipfile.ZipFile(tmp_path / "all" / "more.zip", "w") as archive:
        archive.writestr("x.png", b"")
    put(tmp_path / "all", "._a.png", ".DS_Store", "__MACOSX/a.png", ".cache/b.png")
    (tmp_path / "all" / "broken.avif").write_bytes(b"no image")  # by its name it is one, and damage is not passed over
    source = opened(tmp_path / "all")
    assert source.names == sorted([*kinds, "link.jfif", "broken.avif"])
    assert list(unreadable_images(source, range(len(source)))) == [source.names.index("broken.avif")]
    (said,) = summary(source, "x")[1:]
    counted = dict(reversed(part.split(" ", 1)) for part in said.removeprefix("passed over: ").split(", "))
    assert counted == {
        "hidden": "4", ".txt (no image)": "2",
        ".db (no image)": "1", ".pdf (no image)": "1", "without extension (no image)": "1", ".zip (no image)": "1",
    }  # fmt: skip


@pytest.mark.row(58, EXTENSIONS)
def test_a_folder_without_images_says_what_it_has(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match=r"holds no images; passed over: 1 \.txt \(no image\)"):
        opened(tmp_path)


# ---- what is no data -------------------------------------------------------------------------------------------------


@pytest.mark.row(59, STRAY)
def test_a_file_beside_class_folders_is_no_class(tmp_path):
    put(tmp_path, "cat/a.png", "dog/b.png", "contact_sheet.png", "grid.png")
    source = opened(tmp_path, class_conditional=True)
    assert labels_of(source) == {"cat/a.png": "cat", "dog/b.png": "dog"}
    assert summary(source, "x")[1] == "passed over: 2 beside the class folders"
    assert len(opened(tmp_path)) == 4  # without labels nothing tells it from other images


@pytest.mark.row(59, STRAY)
def test_a_preview_is_hidden_only_where_it_is_ours(tmp_path):
    theirs = put(tmp_path / "theirs", "preview/0.png", "preview/grid.png", "more/1.png")
    (theirs / "metadata.jsonl").write_text('{"file_name": "preview/0.png", "text": "x"}\n')
    assert opened(theirs).names == ["more/1.png", "preview/0.png", "preview/grid.png"]
    ours = put(tmp_path / "ours", "0.png", "preview/grid.png", "preview/trajectory.png", "parts/1.png")
    (ours / ".sampling.json").write_text("{}")
    assert opened(ours).names == ["0.png"]
    alone = put(tmp_path / "alone", "preview/0.png", "preview/grid.png")  # nothing of samples beside it
    assert len(opened(alone)) == 2


@pytest.mark.row(59, STRAY)
def test_packed_samples_are_scored_and_for_training_it_is_said_how_to_draw_them(trained, tmp_path):
    drawn = {kind: sample(sample_config(trained, tmp_path / kind, format=kind, num_images=20, steps=2)) for kind in ("png", "npz")}
    with pytest.raises(InputError, match="packed in one file; draw them with --format png"):
        opened(drawn["npz"])
    measure = MeasureConfig(metrics="colour", cache_dir="", num_threads=1)
    figures = []
    for target, reference in ((drawn["png"], drawn["npz"]), (drawn["npz"], drawn["png"]), (drawn["npz"], drawn["npz"])):
        result = score.score(ScoreConfig(targets=(str(target),), reference=str(reference), measure=measure))
        figures.append((result["targets"][0]["brightness_bias"], result["targets"][0]["images"], result["reference"]["images"]))
    assert figures == [(0, 20, 20)] * 3


# ---- names of classes ------------------------------------------------------------------------------------------------


@pytest.mark.row(60, NAMES)
def test_class_names_are_in_natural_order_and_an_empty_folder_keeps_its_label(tmp_path):
    put(tmp_path / "num", *(f"{k}/a.png" for k in range(12)))
    assert opened(tmp_path / "num", class_conditional=True).class_names == [str(k) for k in range(12)]
    assert order_class_names(["b10", "b9", "B1", "a", "b09", "10", "9"], (), "natural", "x") == ["9", "10", "B1", "a", "b09", "b9", "b10"]
    put(tmp_path / "gap", "a/1.png", "c/1.png", "c/2.png", "d/1.png")
    (tmp_path / "gap" / "b").mkdir()
    source = opened(tmp_path / "gap", class_conditional=True)
    assert [source.read(k)[1] for k in range(4)] == [0, 2, 2, 3] and class_counts(source) == [1, 0, 2, 1]
    assert summary(source, "x") == ["dataset x: 4 images, 4 classes (a 1, b 0, c 2, d 1), without images: b"]
    (tmp_path / "single" / "empty").mkdir(parents=True)
    with pytest.raises(InputError, match="a single class, a"):
        opened(put(tmp_path / "single", "a/1.png"), class_conditional=True)


@pytest.mark.row(60, NAMES)
def test_images_for_a_model_have_its_labels(tmp_path):
    put(tmp_path, "dog/a.png", "cat/b.png")
    source = opened(tmp_path, ["wolf", "dog", "cat"], class_conditional=True)
    assert source.class_names == ["wolf", "dog", "cat"] and labels_of(source) == {"cat/b.png": "cat", "dog/a.png": "dog"}
    with pytest.raises(InputError, match="has class cat, but the model has only dog, wolf"):
        opened(tmp_path, ["dog", "wolf"], class_conditional=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "cow", "dog"])})
    rows = {"image": [Image.new("L", (8, 8))] * 2, "label": [2, 0]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "t.parquet")
    table = opened(tmp_path / "t.parquet", ["wolf", "dog", "cat"], class_conditional=True)
    assert [table.read(k)[1] for k in range(2)] == [1, 2]


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    """Twelve classes, of which 3 has no images and 7 has most, and a run of two steps on them."""
    root = tmp_path_factory.mktemp("pets")
    put(root / "data", *(f"{k}/{n}.png" for k in range(12) if k != 3 for n in range(9 if k == 7 else 1)))
    (root / "data" / "3").mkdir()
    trained_here(tiny(root / "run", "--dataset", root / "data", "--class_conditional", "--max_steps", 2))
    return root


@pytest.mark.row(60, NAMES)
def test_names_and_counts_are_written_down_with_the_model_and_accepted(pets, tmp_path):
    counts = [0 if k == 3 else 9 if k == 7 else 1 for k in range(12)]
    state = json.loads((pets / "run" / "checkpoints" / "step-00000002" / "state.json").read_text())
    assert state["class_names"] == [str(k) for k in range(12)] and state["class_counts"] == counts
    pipeline = load_pipeline(str(pets / "run"))
    assert pipeline.class_names == state["class_names"] and pipeline.class_counts == counts
    assert "| 10 | `10` | 1 |" in (pets / "run" / "README.md").read_text()
    pipeline.save_pretrained(tmp_path)
    assert load_pipeline(str(tmp_path)).class_counts == counts
    named, by_number = (
        pipeline(2, class_labels=labels, num_inference_steps=2, generator=Generators(), output_type="np").images
        for labels in (["10", "7"], [10, 7])
    )
    assert np.array_equal(named, by_number)


def Generators():
    import torch

    return [torch.Generator().manual_seed(k) for k in range(2)]


@pytest.mark.row(60, NAMES)
def test_names_with_spaces_and_of_other_alphabets_go_all_the_way(tmp_path):
    """From the folders of classes, one of them linked, over a run to samples of a class and their figures."""
    names = ["big dog", "кошка", "犬"]
    put(tmp_path / "elsewhere", *(f"a {k}.png" for k in range(5)))
    put(tmp_path / "mes données", *(f"{name}/é {k}.png" for name in names[:2] for k in range(5)))
    (tmp_path / "mes données" / names[2]).symlink_to(tmp_path / "elsewhere")
    run = tmp_path / "läufe" / "one more"
    trained_here(tiny(run, "--dataset", tmp_path / "mes données", "--class_conditional", "--max_steps", 2))
    assert load_pipeline(str(run)).class_names == names
    for kind in ("png", "npz"):
        folder = sample(sample_config(run, tmp_path / f"цвет {kind}", class_labels=("犬", "кошка"), num_images=4, steps=1, format=kind))
        measure = MeasureConfig(metrics="colour", cache_dir="", num_threads=1)
        found = score.score(ScoreConfig(targets=(str(folder),), reference=str(tmp_path / "mes données"), measure=measure))
        assert (found["targets"][0]["images"], found["reference"]["images"]) == (4, 15)
    rows = (tmp_path / "цвет png" / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(line)["label"] for line in rows] == [2, 1, 2, 1]


@pytest.mark.row(60, NAMES)
def test_labels_are_asked_for_by_name_or_number():
    assert label_indices(["dog", "0", 1], ["cat", "dog"]) == [1, 0, 1]
    assert label_indices(["2", 2], ["1", "2", "3"]) == [1, 2]  # text is a name first
    assert label_indices(["2"], None) == [2]
    for names, said in ((["cat", "dog"], "class_labels has cow, but the model's classes are cat, dog"), (None, "by numbers only")):
        with pytest.raises(InputError, match=said):
            label_indices(["cow"], names)


@pytest.mark.row(60, NAMES)
def test_a_name_in_the_card_is_text():
    card = model_card(tiny("x"), 1, 2, classes={"a | `b`\n# c": 1, "d": 2})
    assert "| 0 | `a \\| 'b' # c` | 1 |" in card


@pytest.mark.row(60, NAMES)
def test_a_run_of_the_version_before_keeps_the_labels_that_it_was_trained_with(pets, tmp_path, monkeypatch):
    """It had the plain order, no label for an empty folder, and wrote down no names."""
    flags = ("--dataset", pets / "data", "--class_conditional", "--lr_schedule", "constant", "--warmup_steps", 0, "--max_steps")
    from debias_diffusers.tasks import pixel_data, pixels

    with monkeypatch.context() as before:
        before.setattr(pixel_data, "open_source", lambda config: open_source(config, "plain"))
        whole = trained_here(tiny(tmp_path / "whole", *flags, 4))
        state = pixels.PixelTask.state
        before.setattr(pixels.PixelTask, "state", lambda self: {k: v for k, v in state(self).items() if not k.startswith("class_")})
        trained_here(tiny(tmp_path / "old", *flags, 2))
    resumed = trained_here(tiny(tmp_path / "old", *flags, 4))
    plain = ["0", "1", "10", "11", "2", "4", "5", "6", "7", "8", "9"]
    assert resumed.task.class_names == whole.task.class_names == plain
    files = [sorted((tmp_path / name / "checkpoints" / "step-00000004").glob("*.safetensors")) for name in ("whole", "old")]
    assert all(one.read_bytes() == other.read_bytes() for one, other in zip(*files, strict=True)) and files[0]
    assert load_pipeline(str(tmp_path / "old")).class_names == plain


@pytest.mark.row(60, NAMES)
@pytest.mark.parametrize(
    "names, labelled",
    [
        (("train/1.png", "train/2.png", "test/3.png"), True),  # no class folders in the split
        (("train/1.png", "train/2.png", "test/3.png"), False),
        (("10/1.png", "2/1.png", "2/2.jfif", "a_1.png"), True),
        (("a.png", "b.avif", "c"), False),
    ],
)
def test_a_run_of_the_version_before_keeps_the_images_that_it_was_trained_with(tmp_path, names, labelled):
    """It took every folder for a class, knew ten extensions, and hashed names and sizes."""
    put(tmp_path, *names, kind="PNG")
    known = sorted(name for name in names if name.endswith(".png"))
    text = "".join(f"{name}\0{(tmp_path / name).stat().st_size}\n" for name in known)
    state = {"images": len(known), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    config = DataConfig(dataset=str(tmp_path), class_conditional=labelled)
    source = reopen_source(config, "plain", state)
    assert source.names == known and source.fingerprint() == state
    if labelled:
        assert labels_of(source) == {name: name.split("/" if "/" in name else "_")[0] for name in known}
        assert source.class_names == sorted(set(labels_of(source).values()))
        assert reopen_source(config, source.class_names, state).fingerprint() == state  # as it is after the first resume
    changed = state | {"images": 7}  # neither way of reading it
    if labelled and "train/1.png" in names:
        with pytest.raises(InputError, match="has no label"):
            reopen_source(config, "plain", changed)
    else:
        assert reopen_source(config, "plain", changed).fingerprint() == opened(tmp_path, "plain", class_conditional=labelled).fingerprint()


# ---- which labels are drawn ------------------------------------------------------------------------------------------


def seats(counts, num_images):
    """The method of Sainte-Lague as it is defined: one seat after the other to the greatest quotient."""
    given, labels = [0] * len(counts), []
    for _ in range(num_images):
        best = max(range(len(counts)), key=lambda k: (Fraction(counts[k], 2 * given[k] + 1), -k))
        given[best] += 1
        labels.append(best)
    return labels


@pytest.mark.row(61, PROPORTION)
@pytest.mark.parametrize("counts", [[180, 20], [1, 0, 3], [5], [7, 11, 13, 0, 1], [1] * 10, [1000, 1, 1], [3, 9, 27]])
def test_labels_are_in_proportion_for_any_number_of_images(counts, trials):
    total = sum(counts)
    for num_images in (1, 7, total - 1, total, total + 3, 2 * total):
        trials()
        assert proportional_labels(counts, num_images) == seats(counts, num_images)
    found = Counter(proportional_labels(counts, 3 * total))
    assert [found[k] for k in range(len(counts))] == [3 * count for count in counts]


@pytest.mark.row(61, PROPORTION)
def test_labels_without_images_are_not_drawn_and_an_evaluation_has_those_of_the_data(pets, tmp_path, capsys):
    def labels(folder, count, **options):
        sample(sample_config(pets / "run", tmp_path / folder, num_images=count, steps=1, **options))
        return [json.loads(line)["label"] for line in (tmp_path / folder / "metadata.jsonl").read_text().splitlines()]

    trained = [k for k in range(12) if k != 3]
    assert labels("balanced", 22) == trained * 2
    drawn = labels("drawn", 60, class_labels="drawn")
    assert 3 not in drawn and len(set(drawn)) > 8
    first, more = (labels("data", count, class_labels="data") for count in (10, 19))
    assert more[:10] == first and Counter(more) == {k: 9 if k == 7 else 1 for k in trained}
    capsys.readouterr()
    assert labels("given", 4, class_labels=("3", "7")) == [3, 7, 3, 7]
    assert "trained on no images of class 3" in capsys.readouterr().err
    for wanted, seen in ((None, Counter(more)), ("balanced", Counter((trained * 2)[:19]))):
        config = ScoreConfig(targets=(str(pets / "run"),), num_images=19, steps="1")
        config = replace(config, **({"class_labels": wanted} if wanted else {}))
        assert Counter(drawn_by(config)) == seen


def drawn_by(config):
    """Labels of all images that a scoring command draws of its one model."""
    from accelerate import Accelerator

    jobs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score, "generated_images", lambda job, count, name: jobs.append(job))
        list(score._drawn(config, config.targets[0], None, None, Accelerator()))
    return jobs[0].labels(range(config.num_images))


@pytest.mark.row(61, PROPORTION)
def test_a_measurement_while_training_has_the_labels_of_the_data(pets, tmp_path, monkeypatch):
    from debias_diffusers.sampling import pixel_job

    seen, draw = [], pixel_job.draw
    monkeypatch.setattr(
        pixel_job, "draw", lambda pipeline, indices, seed, labels, **o: seen.extend(labels) or draw(pipeline, indices, seed, labels, **o)
    )
    every = ("--eval_every", 1, "--eval_metrics", "colour", "--eval_images", 19)
    trained_here(tiny(tmp_path, "--dataset", pets / "data", "--class_conditional", "--max_steps", 1, *every))
    assert Counter(seen) == {k: 9 if k == 7 else 1 for k in range(12) if k != 3}


@pytest.mark.row(61, PROPORTION)
def test_a_model_that_does_not_know_its_counts_is_drawn_in_balance_and_it_is_said(pets, trained, tmp_path, capsys):
    index = json.loads((pets / "run" / "model_index.json").read_text())
    for part in ("unet", "scheduler"):
        (tmp_path / part).symlink_to(pets / "run" / part)
    (tmp_path / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if not k.startswith("class_")}))
    assert drawn_by(ScoreConfig(targets=(str(tmp_path),), num_images=13, steps="1")) == [*range(12), 0]
    assert "does not say how many images of each class" in capsys.readouterr().err
    with pytest.raises(InputError, match="class_labels is data, but the model does not say"):
        sample(sample_config(tmp_path, tmp_path / "x", class_labels="data"))
    assert make_job(sample_config(tmp_path, "x"), "cpu").settings["class_labels"] == "balanced"  # as folders of the version before have it
    with pytest.raises(InputError, match=r"class_labels is balanced, but .* is unconditional"):
        drawn_by(ScoreConfig(targets=(str(trained),), class_labels="balanced", num_images=4, steps="1"))


# ---- tables and metadata ---------------------------------------------------------------------------------------------


def table(*labels, **features):
    rows = {"image": [Image.new("L", (8, 8), 9 * k) for k in range(len(labels))], "label": list(labels)}
    return datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image(), **features}) if features else None)


@pytest.mark.row(62, TABLES)
def test_a_folder_of_parquet_files_is_one_table(tmp_path):
    (tmp_path / "shards" / "data").mkdir(parents=True)
    (tmp_path / "x.parquet").mkdir()
    for k, name in enumerate(("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001")):
        table(k, k, label=datasets.Value("int64")).cast_column("image", datasets.Image()).to_parquet(
            tmp_path / "shards" / "data" / f"{name}.parquet"
        )
        table(k, label=datasets.Value("int64")).to_parquet(tmp_path / "x.parquet" / f"part-{k}.parquet")
    (tmp_path / "x.parquet" / "_SUCCESS").write_text("")
    (tmp_path / "shards" / "README.md").write_text("x")
    put(tmp_path / "shards", "assets/logo.png")
    train, test = (opened(tmp_path / "shards", split=split, class_conditional=split == "train") for split in ("train", "test"))
    assert [train.read(k)[1] for k in range(len(train))] == [0, 0, 1, 1] and len(test) == 2
    assert summary(train, "x") == [
        "dataset x: 4 images, 2 classes (0 2, 1 2), split train of train, test",
        "passed over: 1 beside the parquet files, 1 .md (no image)",
    ]
    assert len(opened(tmp_path / "x.parquet")) == 3
    with pytest.raises(InputError, match="with split valid cannot be loaded"):
        opened(tmp_path / "shards", split="valid")


@pytest.mark.row(62, TABLES)
def test_a_table_beside_images_is_no_data(tmp_path):
    put(tmp_path, "a.png", "b.png")
    table(0, label=datasets.Value("int64")).to_parquet(tmp_path / "metadata.parquet")
    assert summary(opened(tmp_path), "x") == ["dataset x: 2 images", "passed over: 1 .parquet (no image)"]


@pytest.mark.row(62, TABLES)
def test_a_parquet_file_is_known_by_its_extension_in_any_case(tmp_path):
    table(0, 1, label=datasets.Value("int64")).to_parquet(tmp_path / "T.PARQUET")
    assert len(opened(tmp_path / "T.PARQUET", class_conditional=True)) == 2


@pytest.mark.row(62, TABLES)
def test_what_cannot_be_opened_is_told(tmp_path):
    put(tmp_path, "a.png")
    with pytest.raises(InputError, match=r"a\.png is neither digits, emoji, a folder, a \.tar or \.parquet file nor a Hub id$"):
        opened(tmp_path / "a.png")
    (tmp_path / "unlike").mkdir()
    for k, label in enumerate((1, "x")):
        table(label, label=datasets.Value("string" if k else "int64")).to_parquet(tmp_path / "unlike" / f"{k}.parquet")
    with pytest.raises(InputError, match="cannot be loaded: Failed to parse"):
        opened(tmp_path / "unlike")


@pytest.mark.row(62, TABLES)
def test_text_labels_of_a_table_are_class_names(tmp_path):
    table("b10", "b9", None, "b10").to_parquet(tmp_path / "t.parquet")
    source = opened(tmp_path / "t.parquet", class_conditional=True)
    assert source.class_names == ["b9", "b10"] and class_counts(source) == [1, 2]
    assert [source.read(k)[1] for k in (0, 1, 3)] == [1, 0, 1]
    with pytest.raises(InputError, match="has no label in column label"):
        source.read(2)


@pytest.mark.row(62, TABLES)
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize(
    "labels, names, found", [(["dog", "cat", "dog"], ["cat", "dog"], [1, 0, 1]), ([2, 0, 2], ["0", "1", "2"], [2, 0, 2])]
)
def test_a_metadata_file_gives_labels(tmp_path, kind, labels, names, found):
    put(tmp_path, "a.png", "deep/b.png", "deep/c.png", "without.png")
    rows = [{"file_name": name, "kind": label, "text": 'a "b", c'} for name, label in zip(("a.png", "deep/b.png", "deep/c.png"), labels)]
    rows.append({"file_name": "../gone.png", "kind": labels[0], "text": ""})
    (tmp_path / f"metadata.{kind}").write_text(written(rows, kind))
    source = opened(tmp_path, class_conditional=True, label_column="kind")
    assert source.class_names == names and [source.read(k)[1] for k in range(3)] == found
    said = summary(source, "x")[1]
    assert f"1 without a row in metadata.{kind}" in said and f"1 in metadata.{kind} without an image" in said
    # As the library reads the rows that have a file.
    (tmp_path / f"metadata.{kind}").write_text(written(rows[:3], kind))
    theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), split="train", cache_dir=str(tmp_path / ".cache"))
    assert sorted(map(str, theirs["kind"])) == sorted(map(str, labels)) and len(theirs) == len(source)
    with pytest.raises(InputError, match=r"label_column is maker, but .*metadata.* has only: file_name, kind, text"):
        opened(tmp_path, class_conditional=True, label_column="maker")
    before = source.fingerprint()
    (tmp_path / f"metadata.{kind}").write_text(written([{**row, "kind": labels[1 - k % 2]} for k, row in enumerate(rows[:3])], kind))
    assert opened(tmp_path, class_conditional=True, label_column="kind").fingerprint() != before
    assert len(opened(tmp_path)) == 4


def written(rows, kind):
    if kind == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows)
    import csv

    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


@pytest.mark.row(62, TABLES)
def test_labelled_samples_are_a_data_set(pets, tmp_path):
    folder = sample(sample_config(pets / "run", tmp_path / "drawn", num_images=11, steps=1))
    source = opened(folder, class_conditional=True)
    assert [source.read(k)[1] for k in range(11)] == [k for k in range(12) if k != 3] and len(source.class_names) == 12


@pytest.mark.row(62, TABLES)
@pytest.mark.parametrize(
    "text", ["{", '{"label": 1}', "[1]", '{"file_name": "a.png", "label": 1.5}', '{"file_name": "a.png", "label": -1}']
)
def test_a_damaged_metadata_file_is_named(tmp_path, text):
    put(tmp_path, "a.png")
    (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(InputError, match=r"metadata\.jsonl"):
        opened(tmp_path, class_conditional=True)


@pytest.mark.row(62, TABLES)
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_rows_are_of_the_paths_that_they_mean(tmp_path, kind):
    put(tmp_path, "train/a.png", "train/b.png")

    def given(*names):
        rows = [{"file_name": name, "label": label} for name, label in zip(names, "xyx")]
        (tmp_path / f"metadata.{kind}").write_text(written(rows, kind))
        return opened(tmp_path, class_conditional=True)

    assert labels_of(given("./train//a.png", "train/./b.png", "train/a.png")) == {"train/a.png": "x", "train/b.png": "y"}
    with pytest.raises(InputError, match=rf"metadata\.{kind} has two labels for \./train/a\.png, 'x' and 'y'; keep one row"):
        given("train/a.png", "./train/a.png")
    with pytest.raises(
        InputError, match=rf"metadata\.{kind} has no row for any image of dataset .*; its file_name must be a path relative to"
    ):
        given("a.png", r"train\b.png")


@pytest.mark.row(62, TABLES)
def test_a_label_of_no_class_is_none_of_the_classes(tmp_path):
    """With -1 and 1 there is a single class with images, but what is wrong is the -1."""
    put(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\na.png,-1\nb.png,1\n")
    (told,) = unreadable_images(opened(tmp_path, class_conditional=True), range(2)).values()
    assert "a.png has label -1, but there are 2 classes, from 0 on" in told
