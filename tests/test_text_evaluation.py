"""eval.py with text-to-image models and captioned images: prompts of the reference, prompt_accuracy, clip_score."""

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import as_ranks, metrics, run, writers
from PIL import Image
from safetensors.torch import save
from text_models import BASE, random_unet, text_args

pytest.importorskip("transformers")

from debias_diffusers import cli
from debias_diffusers.config.schema.data import DIGITS, DataConfig, TextConfig
from debias_diffusers.config.schema.evaluation import MeasureConfig, ScoreConfig
from debias_diffusers.config.schema.sampling import SampleConfig
from debias_diffusers.config.schema.training import RunConfig, TrainConfig
from debias_diffusers.config.validation.evaluation import score_problems, stats_problems
from debias_diffusers.data.sources.opening import open_source
from debias_diffusers.data.text_dataset import prompts_of_data
from debias_diffusers.errors import InputError
from debias_diffusers.evaluation import score as scoring
from debias_diffusers.evaluation.feature_extractors import PromptAccuracy, prompt_scorer
from debias_diffusers.evaluation.monitor import Monitor
from debias_diffusers.runs import checkpoints
from debias_diffusers.sampling.generate import make_job
from debias_diffusers.training.hooks import EmaImages
from debias_diffusers.utils import text_libraries

FEW = 12


def config_of(*targets, metrics="prompt_accuracy", **options):
    measure = MeasureConfig(metrics=metrics, cache_dir="", num_threads=1, **options.pop("measure", {}))
    drawn = {"steps": "2"} if any(map(scoring._is_model, map(Path, targets))) else {}
    return ScoreConfig(targets=tuple(map(str, targets)), measure=measure, **{"num_images": FEW, **drawn, **options})


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder of 100 digits with captions, and one whose captions name the next digit."""
    root, source = tmp_path_factory.mktemp("digits"), open_source(DataConfig(dataset=DIGITS, class_conditional=True))
    for name, shift in (("right", 0), ("wrong", 1)):
        (root / name).mkdir()
        rows = []
        for k in range(100):
            content, label, _ = source.read(k)
            (root / name / f"{k:03d}.png").write_bytes(content)
            rows.append({"file_name": f"{k:03d}.png", "text": f"The digit {(label + shift) % 10}!"})
        (root / name / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def random_clip(folder):
    """Writes a random CLIPModel with the tokenizer of the packaged base."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    text = json.loads((BASE / "text_encoder" / "config.json").read_text())
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(
            CLIPConfig(text_config={**text, **sizes}, vision_config={**sizes, "image_size": 16, "patch_size": 8}, projection_dim=16)
        ).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    for file in (BASE / "tokenizer").iterdir():
        shutil.copy(file, folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The folder of a random CLIPModel."""
    folder = tmp_path_factory.mktemp("clip")
    random_clip(folder)
    return folder


def test_the_share_of_digits_that_their_captions_name(digits):
    result = scoring.score(config_of(digits / "right", digits / "wrong", num_images=None))
    right, wrong = result["targets"]
    assert right["prompt_accuracy"] >= 0.98 and wrong["prompt_accuracy"] <= 0.02 and right["images"] == 100
    assert result["reference"] is None and result["halves_of_the_reference"] is None
    assert len(result["of_prompts"]["prompt_accuracy"]["weights_sha256"]) == 64


def test_a_prompt_names_one_digit_as_a_word_or_a_figure():
    scorer = PromptAccuracy("cpu")
    scorer.check(["a handwritten Seven", "the digit 7", "7 (seven)"])
    for wrong in ("a cat", "seven or eight", "17", "someone", ""):
        with pytest.raises(InputError, match=f"1 of 2 do not, such as {wrong!r}"):
            scorer.check(["seven", wrong])


def test_the_clip_score_is_that_of_the_model_s_own_logits(digits, clip):
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    model, tokenizer, processor = (kind.from_pretrained(clip) for kind in (CLIPModel, CLIPTokenizer, CLIPImageProcessor))
    expected = []
    for line in (digits / "right" / "metadata.jsonl").read_text().splitlines():
        row = json.loads(line)
        pixels = processor(images=Image.open(digits / "right" / row["file_name"]).convert("RGB"), return_tensors="pt")
        tokens = tokenizer(row["text"], padding="max_length", max_length=16, truncation=True, return_tensors="pt")
        with torch.no_grad():
            expected.append(max(0.0, 100 * (model(**pixels, **tokens).logits_per_image / model.logit_scale.exp()).item()))
    result = scoring.score(config_of(digits / "right", metrics="clip_score", clip_model=str(clip), num_images=None))
    assert result["targets"][0]["clip_score"] == pytest.approx(np.mean(expected), abs=1e-3) and any(expected)
    assert result["of_prompts"]["clip_score"]["clip_model"] == str(clip)
    with pytest.raises(InputError, match="clip_model no/such cannot be loaded"):
        prompt_scorer("clip_score", "no/such", "cpu")


def test_figures_of_clip_are_kept_for_one_preparation_of_its_images(clip, tmp_path):
    other = shutil.copytree(clip, tmp_path / "other")
    prepared = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps(prepared | {"image_mean": [0.5, 0.5, 0.5]}))
    one, two = (prompt_scorer("clip_score", str(folder), "cpu") for folder in (clip, other))
    assert one.weights_sha256 == two.weights_sha256 and one.key != two.key
    assert one.key == prompt_scorer("clip_score", str(clip), "cpu").key


def test_a_text_model_is_scored_on_images_of_the_captions_of_the_reference(text_models, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(scoring, "make_job", lambda *args: drawn.append(make_job(*args)) or drawn[-1])
    config = config_of(text_models["xl"], metrics="fid,colour,prompt_accuracy", reference=DIGITS, num_images=70)
    result = scoring.score(config)
    (row,) = result["targets"]
    assert row["guidance_scale"] == 5.0 and row["images"] == 70 and row["fid"] > 10 and 0 <= row["prompt_accuracy"] <= 1
    prompts = drawn[0].prompts
    assert len(prompts) == 70 and len(set(prompts)) > 20  # not the first images' alone, and all three captions of each
    assert result["halves_of_the_reference"].keys() == {"fid", "brightness_bias", "colour_distance"}
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    again = scoring.score(config_of(text_models["xl"], num_images=None, prompts=str(tmp_path / "prompts.txt")))
    assert again["targets"][0]["images"] == 70
    assert again["targets"][0]["prompt_accuracy"] == row["prompt_accuracy"]
    same = make_job(SampleConfig(model=str(text_models["xl"]), prompts=str(tmp_path / "prompts.txt"), steps=2), "cpu")
    assert torch.equal(same.draw(range(5)), drawn[0].draw(range(5)))


def test_checkpoints_of_a_run_are_scored_on_the_captions_it_was_trained_on(text_models, tmp_path):
    run = shutil.copytree(text_models["xl"], tmp_path / "run")
    config = {"dataset": DIGITS, "split": "train", "image_column": None, "caption_column": None, "caption_dropout": 0.1}
    (run / "config.json").write_text(json.dumps(config))
    for step in (1, 2):
        files = {"model.safetensors": b"", "ema_0.9.safetensors": save(random_unet(seed=step).state_dict())}
        checkpoints.write(run / "checkpoints", step, writers(files), {"step": step, "config": {"ema_decay": [0.9]}}, keep=2)
    measure = {"skip_bad": True}
    result = scoring.score(config_of(run, metrics="prompt_accuracy,colour", checkpoints="all", guidance_scale=1.0, measure=measure))
    assert [(row["checkpoint"], row["guidance_scale"]) for row in result["targets"]] == [(1, 1.0), (2, 1.0)]
    assert result["targets"][0]["colour_distance"] != result["targets"][1]["colour_distance"]
    assert result["reference"]["name"] == DIGITS


def test_two_processes_measure_what_one_measures(text_models, digits, tmp_path):
    flags = ["--reference", digits / "right", "--metrics", "prompt_accuracy,colour", "--num_images", 11, "--batch_size", 4, "--steps", 2]
    flags = [*flags, "--num_threads", 1, "--cache_dir", "", "--bootstrap", 20]
    for processes in (1, 2):
        code, err = as_ranks(processes, "eval.py", "score", text_models["sd"], *flags, "--output", tmp_path / f"{processes}.json")
        assert code == 0, err
    one, two = (json.loads((tmp_path / f"{processes}.json").read_text())["targets"][0] for processes in (1, 2))
    assert one["prompt_accuracy"] == two["prompt_accuracy"] and one["intervals"] == two["intervals"]


def test_features_of_images_and_prompts_are_kept_by_both(digits, tmp_path):
    measure = {"cache_dir": str(tmp_path)}
    for name, expected in (("right", 1.0), ("right", 1.0), ("wrong", 0.0)):
        config = config_of(digits / name, num_images=None)
        config = ScoreConfig(targets=config.targets, measure=MeasureConfig(metrics="prompt_accuracy", num_threads=1, **measure))
        assert scoring.score(config)["targets"][0]["prompt_accuracy"] == pytest.approx(expected, abs=0.02)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_what_cannot_be_measured_is_refused_before_anything_is_drawn(text_models, trained, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "make_job", None)
    plain = shutil.copytree(digits / "right", tmp_path / "plain", ignore=shutil.ignore_patterns("*.jsonl"))
    (tmp_path / "cats.txt").write_text("a cat\n")
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    for config, named in (
        (config_of(tmp_path / "images.npz"), "needs the prompt of each image, which .*images.npz does not have"),
        (config_of(trained), "needs the prompt of each image, which .* does not have"),
        (config_of(plain), "none of 100 images has a caption"),
        (config_of(text_models["xl"], reference=str(plain)), "none of 100 images has a caption"),
        (config_of(text_models["xl"]), "images are drawn of the captions of the reference, and there are none"),
        (config_of(text_models["xl"], prompts=str(tmp_path / "cats.txt")), "1 of 1 do not, such as 'a cat'"),
        (config_of(digits / "right", prompts=str(tmp_path / "cats.txt")), "no target is a text-to-image model"),
        (config_of(digits / "right", guidance_scale=2.0), "guidance_scale is 2.0, but no target is a model"),
        (config_of(trained, metrics="colour", caption_column="text"), "no captions are needed"),
        (config_of(text_models["xl"], reference=DIGITS, class_labels="drawn"), "class_labels is drawn, but .* is a text-to-image model"),
    ):
        with pytest.raises(InputError, match=named):
            scoring.score(config)


def test_a_missing_library_is_said_before_anything_is_read(text_models, monkeypatch, capsys):
    monkeypatch.setattr(text_libraries.importlib.util, "find_spec", lambda _: None)
    for flags in ([str(text_models["xl"])], [str(BASE), "--metrics", "clip_score", "--clip_model", "x"]):
        assert cli.evaluate(["score", *flags, "--reference", DIGITS]) == 2
        assert "need transformers, which is not installed" in capsys.readouterr().err


def test_flags_of_metrics_of_prompts_go_together(capsys):
    (problem,) = score_problems(config_of("x", metrics="clip_score"))
    assert "clip_model is missing" in problem
    (problem,) = score_problems(config_of("x", clip_model="y"))
    assert "metrics has no clip_score" in problem
    from debias_diffusers.config.schema.evaluation import StatsConfig

    (problem,) = stats_problems(StatsConfig(reference="x", out="y.safetensors", measure=MeasureConfig(metrics="prompt_accuracy")))
    assert "take it in eval.py score" in problem
    for flags, named in (
        (["--eval_metrics", "prompt_accuracy"], "eval_metrics has prompt_accuracy"),
        (["--config", "digits_text", "--eval_metrics", "clip_score"], "clip_model is missing"),
        (["--config", "digits_text", "--clip_model", "y"], "eval_metrics has no clip_score"),
        (["--clip_model", "y"], "clip_model"),
    ):
        assert cli.train(["--eval_every", "10", *flags, "--output_dir", "x"]) == 2
        assert named in capsys.readouterr().err


# ---- while training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0, 1])
def test_images_are_judged_by_their_own_prompts_while_training(shift):
    """In batches of seven, where evaluations take more, and in the order of the data's prompts."""
    source = open_source(DataConfig(dataset=DIGITS, class_conditional=True))
    of_digit = [next(k for k, label in enumerate(source.labels()) if label == digit) for digit in range(10)]
    pixels = [torch.from_numpy(np.array(Image.open(io.BytesIO(source.read(k)[0])).convert("RGB"))).permute(2, 0, 1) for k in of_digit]
    prompts = [f"the digit {k % 10}" for k in range(0, 60, 7)]

    def draw(network, indices, conditions):
        return torch.stack([pixels[(int(conditions[k % len(conditions)][-1]) + shift) % 10] for k in indices])

    accelerator = SimpleNamespace(process_index=0, num_processes=1)
    images = EmaImages(SimpleNamespace(draw=draw), None, accelerator, batch_size=7)
    config = TrainConfig(
        data=DataConfig(dataset=DIGITS, resolution=8, task="text_to_image"),
        text=TextConfig(base_model=DIGITS),
        run=RunConfig(eval_every=1, eval_metrics="prompt_accuracy", cache_dir=""),
    )
    monitor = Monitor(config, source, "cpu")
    monitor.check(prompts)
    monitor.read(source)
    assert monitor.figures(images.batches(20, prompts)) == {"prompt_accuracy": float(shift == 0)}
    with pytest.raises(InputError, match="1 of 2 do not, such as 'a cat'"):
        monitor.check(["the digit 3", "a cat"])


def test_a_training_measures_how_images_fit_their_prompts(text_models, clip, digits, tmp_path):
    flags = ["--eval_every", 2, "--eval_metrics", "prompt_accuracy,clip_score", "--clip_model", clip, "--eval_images", 10, "--max_steps", 4]
    flags = [*flags, "--dataset", digits / "right", "--cache_dir", ""]
    code, _, err = run(*text_args(text_models["xl"], tmp_path / "run", *flags))
    assert code == 0, err
    figures = [line for line in metrics(tmp_path / "run") if "eval_prompt_accuracy" in line]
    assert [line["step"] for line in figures] == [2, 4]
    assert all(line["eval_prompt_accuracy"] in {k / 10 for k in range(11)} and 0 <= line["eval_clip_score"] <= 100 for line in figures)


def test_prompts_of_the_data_are_of_all_its_classes():
    """The first images of a folder may be of one class."""
    captions = [(f"class {k // 10}", f"the class {k // 10}") for k in range(100)]
    prompts = prompts_of_data(captions)
    assert len(set(prompts[:20])) > 10 and sorted(prompts) == sorted(each[k % 2] for k, each in enumerate(captions))
