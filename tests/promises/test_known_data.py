"""Rows 79 and 80 of docs/reliability.md: what a look at all images tells at the start, and by what a data set is known again."""

import json
import shutil

import datasets
import numpy as np
import pytest
from conftest import Forked, as_ranks, newest_step, run, train_args, uncounted
from PIL import Image
from test_bad_data import encoded, noise

from debias_diffusers.config import hub_names
from debias_diffusers.config.hub_names import is_dataset_id
from debias_diffusers.config.schema.data import DataConfig
from debias_diffusers.config.schema.evaluation import BitsConfig, MeasureConfig
from debias_diffusers.data.dataset import TrainingData
from debias_diffusers.data.images import decode
from debias_diffusers.data.sources.checks import check_images
from debias_diffusers.data.sources.opening import open_source
from debias_diffusers.errors import InputError
from debias_diffusers.evaluation import reference
from debias_diffusers.evaluation.image_sets import images_of_source
from debias_diffusers.hub import client

ROW_79 = "grey or colour, and every label, are checked at the start for all images (from 100 000 on, with `--check_images all`)"
ROW_80 = "data are identified by their files and not by the text of their path, and the Hub is never asked for a local name"


def folder_of(path, modes):
    path.mkdir(parents=True)
    for k, mode in enumerate(modes):
        (path / f"{k}.png").write_bytes(encoded(noise(k, 8, mode)))
    return path


def table_of(path, labels, feature=None):
    feature = feature or datasets.ClassLabel(names=["a", "b"])
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    rows = {"image": [noise(k, 8) for k in range(len(labels))], "label": labels}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return path


def state(folder):
    return json.loads((folder / "checkpoints" / f"step-{newest_step(folder):08d}" / "state.json").read_text())


# ---- what the look tells ----------------------------------------------------------------------------------------------


@pytest.mark.row(79, ROW_79)
def test_one_image_in_colours_decides_and_resumes_keep_to_it(tmp_path):
    data, out = folder_of(tmp_path / "mixed", "LLL" + "C"), tmp_path / "run"
    args = train_args(out, "--dataset", data, "--warmup_steps", 0)
    code, _, err = run(*args, "--max_steps", 1)
    assert code == 0 and "1 of 4 images have colours, so the model learns 3 channels; --channels 1 converts them to grey" in err
    assert state(out)["network"]["in_channels"] == 3 and state(out)["config"]["channels"] is None
    for steps, flags in ((2, ["--channels", 3]), (3, [])):  # what was decided may be typed, and left out again
        code, _, err = run(*args, *flags, "--max_steps", steps)
        assert code == 0 and "so the model learns" not in err, err
    code, _, err = run(*args, "--channels", 1, "--max_steps", 7)
    assert code == 2 and "channels: the run has None, this command says 1" in err
    code, said, err = Forked(*train_args(tmp_path / "dry", "--dataset", data, "--dry_run"), before=uncounted).result()
    assert code == 0 and "1 of 4 images have colours" in err and "3 channel(s)" in said


@pytest.mark.row(79, ROW_79)
def test_two_processes_decide_the_same(tmp_path):
    data = folder_of(tmp_path / "mixed", "LCLL")  # the second process has the one in colours
    code, err = as_ranks(2, *train_args(tmp_path / "run", "--dataset", data, "--max_steps", 4))
    assert code == 0 and err.count("1 of 4 images have colours") == 1, err
    assert state(tmp_path / "run")["network"]["in_channels"] == 3


@pytest.mark.row(79, ROW_79)
def test_a_run_that_decided_for_grey_keeps_to_it_when_colours_come(tmp_path):
    data, out = folder_of(tmp_path / "grey", "LLLL"), tmp_path / "run"
    args = train_args(out, "--dataset", data)
    assert run(*args, "--max_steps", 4)[0] == 0
    (data / "4.png").write_bytes(encoded(noise(4, 8, "C")))
    code, _, err = run(*args, "--max_steps", 5, "--accept_changed_data")
    assert code == 2 and "1 of 5 images have colours, but this run learns grey ones; add --channels 1" in err
    code, _, err = run(*args, "--max_steps", 5, "--accept_changed_data", "--channels", 1)
    assert code == 0, err


@pytest.mark.row(79, ROW_79)
def test_channels_convert_both_ways_by_itu_r_601(tmp_path):
    data = folder_of(tmp_path / "images", "CL")
    colour, grey = (np.asarray(decode((data / name).read_bytes(), name)).astype(float) for name in ("0.png", "1.png"))
    expected = {
        1: [colour @ [0.299, 0.587, 0.114], grey],
        3: [colour.transpose(2, 0, 1), np.stack([grey] * 3)],
    }
    for channels, wanted in expected.items():
        config = DataConfig(dataset=str(data), resolution=8, channels=channels)
        learned = TrainingData(open_source(config), config, seed=0)
        for k, array in enumerate(wanted):
            assert np.abs(learned.decoded(k)[0].numpy() - array).max() <= (0.51 if channels == 1 else 0)
    ((_, batch),) = images_of_source(open_source(config), "images", 8, channels=1).batches(2, 0, 1)
    for k, array in enumerate(expected[1]):  # what a model of one channel is compared with
        assert np.abs(batch[k].numpy() - array).max() <= 0.51
    keys = {images_of_source(open_source(config), "images", 8, channels=channels).key for channels in (None, 1, 3)}
    assert len(keys) == 2  # features that are kept of the one are not those of the other


LABELS = {"classes": datasets.ClassLabel(names=["a", "b"]), "numbers": datasets.Value("int64")}


@pytest.mark.row(79, ROW_79)
@pytest.mark.parametrize("feature", LABELS)
def test_a_label_of_no_class_is_a_bad_image(tmp_path, feature):
    path = table_of(tmp_path / "t.parquet", [0, 1] * 60 + [-1], LABELS[feature])
    config = DataConfig(dataset=str(path), class_conditional=True, label_column="label")
    bad, coloured = check_images(open_source(config), range(121))
    assert list(bad) == [120] and "has label -1, but there are 2 classes" in bad[120] and coloured == 0
    args = train_args(tmp_path / "run", "--dataset", path, "--class_conditional", "--label_column", "label", "--max_steps", 4)
    code, _, err = run(*args)
    assert code == 2 and "1 of 121 images cannot be read; remove them, or add --skip_bad" in err and "label -1" in err
    assert not (tmp_path / "run" / "checkpoints").exists()
    code, _, err = run(*args, "--skip_bad")
    assert code == 0 and "skipped: image 120" in err and state(tmp_path / "run")["data"]["skipped"] == [120]


@pytest.mark.row(79, ROW_79)
def test_an_image_that_changes_after_the_look_is_still_a_sentence(tmp_path):
    data = folder_of(tmp_path / "images", "LL")
    config = DataConfig(dataset=str(data), resolution=8)
    learned = TrainingData(open_source(config), config, seed=0, channels=1)
    (data / "1.png").write_bytes(encoded(noise(1, 8, "C")))
    (error,) = [sample for p in range(2) if isinstance(sample := learned[p], InputError)]
    assert "1.png has colours, but the model learns grey ones; add --channels 1" in str(error)


# ---- known again ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """A run on a folder, typed as a relative path; (the folder that holds both, as tests run in the repository's root)."""
    root = tmp_path_factory.mktemp("known")
    folder_of(root / "data" / "five", "LLLLL")
    code, _, err = run(*train_args(root / "run", "--dataset", root / "data" / "five", "--max_steps", 4))
    assert code == 0, err
    return root


@pytest.fixture
def again(known, tmp_path, monkeypatch):
    """A copy of the run, whose configuration has the data as typed from beside them; the working directory is another."""
    shutil.copytree(known, tmp_path / "copy")
    root = tmp_path / "copy"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return root


def retyped(root, dataset, path):
    """The run, as if it had been trained on that text, which lay there; without a path, as of a version that wrote none down."""
    values = json.loads((root / "run" / "config.json").read_text())
    (root / "run" / "config.json").write_text(json.dumps({**values, "dataset": dataset}))
    file = next((root / "run" / "checkpoints").glob("step-*/state.json"))
    told = json.loads(file.read_text())
    told["paths"] = {"dataset": str(path)}
    if path is None:
        del told["paths"]
    file.write_text(json.dumps(told))
    return str(root / "run")


@pytest.mark.row(80, ROW_80)
def test_the_same_files_are_the_same_data_whatever_they_are_called(again, trials):
    five = again / "data" / "five"
    (again / "job2").symlink_to(five)
    shutil.copytree(five, again / "scratch" / "copied")
    spellings = [f"{five}/", f"{again}/./data/../data/five", again / "job2", again / "scratch" / "copied"]
    for step, name in enumerate(spellings, start=5):
        code, _, err = run(*train_args(again / "run", "--dataset", name, "--max_steps", step))
        assert code == 0 and newest_step(again / "run") == step, err
        trials()
    (again / "scratch" / "copied" / "0.png").write_bytes(encoded(noise(9, 8, "C")))
    args = train_args(again / "run", "--dataset", again / "scratch" / "copied", "--max_steps", 11)
    code, _, err = run(*args)
    assert code == 2 and "is not the one this run began with (5 images then, 5 now)" in err and "--accept_changed_data" in err
    for other in ("digits", "user/five@main"):
        code, _, err = run(*train_args(again / "run", "--dataset", other, "--max_steps", 11))
        assert code == 2 and "dataset: the run has" in err


@pytest.mark.row(80, ROW_80)
def test_a_run_writes_where_its_data_are_into_what_is_not_pushed(known):
    assert state(known / "run")["paths"] == {"dataset": str(known / "data" / "five")}
    assert "paths" not in json.loads((known / "run" / "config.json").read_text())


def data_of(target):
    return reference.reference_data(MeasureConfig(), None, [target]).dataset


@pytest.mark.row(80, ROW_80)
def test_data_of_a_run_are_found_from_another_folder(again, monkeypatch):
    five = str(again / "data" / "five")
    target = retyped(again, "data/five", five)
    assert data_of(target) == five
    assert reference.reference_data(BitsConfig(model=target), None, [target]).dataset == five
    folder_of(again / "other" / "data" / "five", "CC")  # of the same name, and other images
    monkeypatch.chdir(again / "other")
    assert data_of(target) == five
    (again / "moved").mkdir()
    shutil.move(again / "data", again / "moved" / "data")
    with pytest.raises(InputError, match=r"was trained on .*five, which does not exist; name the data with --reference"):
        data_of(target)
    monkeypatch.chdir(again / "moved")  # as typed, where the same files are
    assert data_of(target) == "data/five"
    target = retyped(again, "data/five", None)
    assert data_of(target) == "data/five"


@pytest.mark.row(80, ROW_80)
@pytest.mark.parametrize("typed", ("five", "d/five", "five/", "./five", "../five", "~/none/five"))
@pytest.mark.parametrize("recorded", (True, False))
def test_the_hub_is_not_asked_for_what_a_run_took_from_a_disk(again, typed, recorded, monkeypatch):
    monkeypatch.setattr(client, "api", lambda: pytest.fail("the Hub was asked"))
    target = retyped(again, typed, again / "gone" if recorded else None)
    with pytest.raises(InputError, match=r"was trained on .*, which does not exist; name the data with --reference"):
        data_of(target)


@pytest.mark.row(80, ROW_80)
def test_runs_of_the_same_files_are_compared_and_others_are_not(again):
    one = str(again / "run")
    shutil.copytree(again / "run", again / "second")
    shutil.copytree(again / "data" / "five", again / "scratch")
    values = json.loads((again / "second" / "config.json").read_text())
    (again / "second" / "config.json").write_text(json.dumps({**values, "dataset": str(again / "scratch")}))
    both = [one, str(again / "second")]
    assert reference.reference_data(MeasureConfig(), None, both).dataset == str(values["dataset"])
    (again / "scratch" / "6.png").write_bytes(encoded(Image.new("L", (8, 8))))
    (again / "second" / "checkpoints").rename(again / "aside")
    (again / "second" / "checkpoints").mkdir()
    with pytest.raises(InputError, match=r"second was trained on dataset .*scratch, not"):
        reference.reference_data(MeasureConfig(), None, both)


@pytest.mark.row(80, ROW_80)
def test_a_name_that_means_a_path_is_none_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    for name in ("five", "d/five", "d/five/", "user/set/", "./five", "../five", "/no/five", "~/five", "a/b/c", "my images", "x.parquet"):
        assert not is_dataset_id(name) and not hub_names.is_model_id(name), name
    for name in ("user/set", "user/set@main", "d/five@main", f"user/set@{'a' * 40}"):
        assert is_dataset_id(name) and hub_names.is_model_id(name), name
    assert is_dataset_id("mnist@main")
    with pytest.raises(InputError, match=r"d/five is neither .*: /.*/d/five does not exist; d/five@main asks the Hub for it"):
        open_source(DataConfig(dataset="d/five"))
