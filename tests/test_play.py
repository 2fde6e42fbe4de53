"""The playground: requests to commands of sample.py, which draw the same images; limits; what is refused; the Space."""

import re
import shlex
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, Forked, forbid_torch
from PIL import Image

from debias_diffusers import cli
from debias_diffusers.config.schema.sampling import PlayConfig
from debias_diffusers.errors import InputError
from debias_diffusers.play import request as requests
from debias_diffusers.play import space
from debias_diffusers.play.engine import CancelledError, Engine
from debias_diffusers.play.request import PlayedModel, Request, command_line, commands

PIXELS = PlayedModel("runs/a", "pixels", False, ("cat", "dog"), True, 1.0, ("ddim", "unipc"), "unipc", ("ema", "raw"), 50)
TEXT = PlayedModel("user/b@1", "text_to_image", False, (), True, 5.0, ("ddim", "unipc"), "unipc", ("ema",), 4)


def asked(**changes):
    return Request(**{"scheduler": "unipc", "steps": 4, "seed": 0, "num_images": 3, **changes})


def nothing(*_):
    """Of the progress."""


@pytest.fixture(scope="module")
def run(trained_by_class, tmp_path_factory):
    return shutil.copytree(trained_by_class, tmp_path_factory.mktemp("play") / "run")


@pytest.fixture(scope="module")
def engine(run):
    """Of one run twice, to compare its weights."""
    return Engine(PlayConfig(models=(str(run), str(run)), num_threads=1))


def images_of(archive):
    with zipfile.ZipFile(archive) as file:
        return {name: file.read(name) for name in file.namelist() if re.fullmatch(r"\d{6}\.png|metadata\.jsonl", name)}


def repeated(command):
    """What the shown command draws."""
    words = shlex.split(command)
    assert words[0] == "debias-sample" and cli.sample(words[1:]) == 0
    return words


def require_same(archive, folder):
    drawn = images_of(archive)
    assert drawn == {name: (folder / name).read_bytes() for name in drawn} and len(drawn) > 3


def test_the_shown_command_draws_the_same_images_of_a_run(engine, run, tmp_path):
    request = asked(scheduler="ddim", num_images=4, seed=7, class_labels=["9", "2"], guidance_scale=2.5, weights=("raw", "0.99"))
    raw, averaged = engine.draw(request, "session", tmp_path, nothing)
    for drawn, folder in ((raw, "ddim-4-weights-raw"), (averaged, "ddim-4-weights-0.99")):
        repeated(drawn.command)
        (found,) = [path for path in (run / "samples").iterdir() if path.name.startswith(folder)]
        require_same(drawn.archive, found)
    assert images_of(raw.archive) != images_of(averaged.archive)
    # Of a request nothing stays but what the page shows, which it removes.
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["1.png", "1.zip", "2.png", "2.zip"]
    assert Image.open(raw.grid).width > 4 * 8
    assert [stage.name for stage in raw.stages] == [f"t = {t}, evaluation {k + 1} of 4" for k, t in enumerate((999, 666, 333, 0))]


def test_the_shown_command_draws_the_same_images_of_prompts(text_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    play = Engine(PlayConfig(models=(str(text_models["xl"]),), num_threads=1, batch_size=2))
    request = asked(prompt="a 'seven'\n\nthe digit nine", negative_prompt="zero", guidance_scale=3.0, steps=2, stages=False)
    (drawn,) = play.draw(request, "session", tmp_path / "drawn", nothing)
    words = repeated(drawn.command)
    require_same(drawn.archive, Path(words[words.index("--output_dir") + 1]))
    assert drawn.stages == () and "--batch_size 2" in drawn.command
    assert (play.models[0].guidance_scale, play.models[0].scheduler, play.models[0].classes) == (5.0, "unipc", ())


def test_a_request_is_cancelled_after_a_call_of_the_network_and_the_next_is_drawn(engine, tmp_path):
    seen = []

    def progress(share, done):
        seen.append(done)
        engine.cancel("another session")
        if len(seen) == 3:
            engine.cancel("session")

    with pytest.raises(CancelledError):
        engine.draw(asked(weights=("ema", "ema")), "session", tmp_path / "first", progress)
    assert seen == ["loading with model 1", *(f"{k} of 4 evaluations of the network with model 1" for k in (1, 2))]
    engine.cancel("session")  # while nothing is drawn
    assert len(engine.draw(asked(weights=("ema", "ema")), "session", tmp_path / "second", nothing)) == 2


@pytest.mark.parametrize(
    "model, changes, sentence",
    [
        (PIXELS, {"steps": None}, "steps is empty, but must be a whole number"),
        (PIXELS, {"steps": "many"}, "steps is 'many', but must be a number"),
        (PIXELS, {"num_images": 2.5}, "num_images is 2.5, but must be a whole number"),
        (PIXELS, {"seed": -1}, "seed is -1, but must be at least 0 and below 2^32"),
        (PIXELS, {"guidance_scale": float("nan")}, "guidance_scale is nan, but must be a number"),
        (PIXELS, {"class_labels": ["fish"]}, "class_labels is 'fish', but runs/a takes one of cat, dog"),
        (PIXELS, {"scheduler": "flow_heun"}, "scheduler is 'flow_heun', but runs/a takes one of ddim, unipc"),
        (PIXELS, {"weights": ["best"]}, "weights is 'best', but must be ema, raw, an EMA decay rate"),
        (PIXELS, {"num_images": 5, "steps": 21}, "5 images x 21 steps are 105 image steps, and this playground draws at most 100"),
        (TEXT, {"prompt": " \n"}, "prompt is empty; write what to draw"),
        (TEXT, {"prompt": "x" * 5000}, "prompt has 5000 characters"),
        (TEXT, {"prompt": "a cat\n--seed"}, "prompt '--seed' begins with a dash"),
        (TEXT, {"prompt": "a cat", "negative_prompt": " -blurry"}, "negative_prompt '-blurry' begins with a dash"),
        (TEXT, {"prompt": "\ud800"}, "is not Unicode"),
    ],
)
def test_bad_input_is_answered_in_words(model, changes, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)):
        commands(asked(**changes), [model], PlayConfig(models=(model.name,), max_image_steps=100))


def test_a_command_has_what_is_not_left_out_and_is_quoted():
    config = PlayConfig(models=("user/b",), dtype="bfloat16")
    (command,) = commands(asked(prompt="it's $HOME\na cat", guidance_scale=5.0, num_images=6), [TEXT], config)
    shown = "debias-sample user/b@1 --prompt 'it'\"'\"'s $HOME' 'a cat' --scheduler unipc --steps 4 --num_images 6"
    assert command_line(command, "unipc-4") == f"{shown} --dtype bfloat16 --output_dir samples/unipc-4"


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ([], "models are missing; name one model, or two to compare"),
        (["{run}", "{run}", "{run}"], "models are 3; name one model, or two to compare"),
        (["{run}/nothing"], "does not exist; name a run directory"),
        (["{run}/unet"], "holds no model"),
        (["{run}", "{text}"], "models are a pixel model and a text-to-image model"),
        (["{run}", "--port", "70000"], "port is 70000, but must be from 1 to 65535"),
        (["{run}"], 'the playground needs gradio, which is not installed; run pip install "debias_diffusers[play]"'),
        (["{run}", "--space", "{run}"], "already exists; name a new or empty folder"),
    ],
)
def test_a_wrong_command_is_answered_in_one_sentence(arguments, sentence, run, text_models, monkeypatch, capsys):
    monkeypatch.setattr(requests.importlib.util, "find_spec", lambda name: None)
    assert cli.play([argument.format(run=run, text=text_models["xl"]) for argument in arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_models_without_a_scheduler_in_common_are_refused_before_the_page_opens(monkeypatch):
    models = {"a": PIXELS, "b": replace(PIXELS, name="b", schedulers=("flow_euler", "flow_heun"))}
    monkeypatch.setattr(Engine, "_describe", lambda self, name: models[name])
    with pytest.raises(InputError, match="no scheduler is for both"):
        Engine(PlayConfig(models=("a", "b"), num_threads=1))
    assert Engine(PlayConfig(models=("b", "b"), num_threads=1)).models == [models["b"]] * 2


def test_help_and_mistakes_need_no_torch():
    code, out, _ = Forked("play", "--help", before=forbid_torch).result()
    assert code == 0 and "MODELS ..." in out
    code, _, err = Forked("play", "runs/none/at/all", before=forbid_torch).result()
    assert code == 2 and "does not exist" in err


def test_a_space_is_a_folder_with_the_package_and_what_it_needs(run, tmp_path, monkeypatch, capsys):
    lines = [*listed("dependencies"), *(f'{line} ; extra == "{extra}"' for extra in ("text", "play", "test") for line in listed(extra))]
    monkeypatch.setattr(space.importlib.metadata, "requires", lambda name: lines)
    flags = ["--dtype", "bfloat16", "--max_image_steps", "100"]
    assert cli.play(["user/model@main", "--space", str(tmp_path / "space"), *flags]) == 0
    folder = tmp_path / "space"
    compile((folder / "app.py").read_text(), "app.py", "exec")
    assert (
        "play([*['user/model@main'], \"--host\", HOST, '--max_image_steps', '100', '--dtype', 'bfloat16'])"
        in (folder / "app.py").read_text()
    )
    front = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    assert front["sdk"] == "gradio" and front["app_file"] == "app.py" and front["models"] == ["user/model"]
    needed = {re.split(r"[^\w-]", line)[0] for line in (folder / "requirements.txt").read_text().splitlines()}
    assert {"torch", "diffusers", "tyro", "transformers", "peft"} <= needed and not {"gradio", "pytest"} & needed
    assert (folder / "debias_diffusers" / "play" / "page.py").is_file() and not [*folder.rglob("__pycache__")]
    assert "warning" not in capsys.readouterr().err
    for local in ([str(run)], ["user/lora", "--base_model", str(run)]):
        assert cli.play([*local, "--space", str(tmp_path / f"local {len(local)}")]) == 0
        assert "a Space has no files of this disk" in capsys.readouterr().err


def listed(name):
    """What pyproject.toml requires under a name."""
    (found,) = re.findall(rf"^{name} = \[(.*?)\]$", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    return re.findall(r'"([^"]+)"', found)


def test_a_space_has_a_version_of_gradio_that_the_extra_takes():
    assert listed("play") == ["gradio>=6.0,<7"] and space.GRADIO.startswith("6.")
