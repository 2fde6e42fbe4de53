"""Every code block of README.md, CONTRIBUTING.md and docs/: parsed always, run in nightly tests (`documented` finds them).

A page takes some files for granted, such as a folder of photographs or a run that an earlier page trained. They are made once, small, and
copied to the folder in which the page's blocks run, in their order. Names of the Hub are folders there, as a local path comes first.
"""

import ast
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import cache, partial
from pathlib import Path

import documented
import pytest
from conftest import COMMANDS, GOLDEN, ROOT, Forked, launched
from PIL import Image

import debias_diffusers
from debias_diffusers import cli, parsing
from debias_diffusers.commands import train as train_command
from debias_diffusers.config import loading, registry
from debias_diffusers.config.schema.conversion import SingleConfig
from debias_diffusers.config.schema.data import ShardsMakeConfig
from debias_diffusers.config.schema.evaluation import BiasConfig, BitsConfig, ScoreConfig, StatsConfig
from debias_diffusers.config.schema.objective import WeightsConfig
from debias_diffusers.config.schema.sampling import SampleConfig
from debias_diffusers.config.validation import conversion, evaluation, objective, sampling, training
from debias_diffusers.errors import DebiasError

PAGES = documented.pages()
SHOWN = "the code and the commands of the README, of every page and of model cards run as shown"


@cache
def all_blocks():
    return [block for page in PAGES for block in documented.blocks(page)]


# ---- always -----------------------------------------------------------------------------------------------------------


def test_every_page_is_on_the_site():
    assert {path.name for path in (ROOT / "docs").glob("*.md")} == {Path(page).name for page in PAGES if page.startswith("docs/")}


def test_the_names_of_the_python_interface_are_those_of_the_package():
    named = re.findall(r"^::: debias_diffusers\.([\w.]+)\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.M)
    assert {name: module for module, name in named} == debias_diffusers._MODULES
    assert sorted(debias_diffusers._MODULES) == debias_diffusers.__all__


def test_the_page_on_changes_of_a_run_names_every_field_that_may_be_changed_on_purpose():
    page = (ROOT / "docs" / "reliability.md").read_text()
    named = {name for row in re.findall(r"^\| (`\w+`.*?) \|", page, re.M) for name in re.findall(r"`(\w+)`", row)}
    tables = (registry.WEIGHTINGS, registry.TIMESTEP_SAMPLERS, registry.TIMESTEP_BIASES)
    assert named == loading.ON_PURPOSE.difference(*map(registry.parameters_of, tables))


# How many blocks are run, and how many are not, and why: a new block is run, or has a mark that is counted here.
RUN_OR_NOT = {"run": 45, "network": 8, "GPU": 4, "a server": 1, "the tests themselves": 2, "several nodes": 1}


def test_every_block_is_run_or_counted_among_those_that_cannot_be_run():
    assert [str(block) for block in all_blocks() if block.language not in documented.CODE + documented.OTHER] == []
    code = [block for block in all_blocks() if block.language in documented.CODE]
    assert Counter(block.reason or "run" for block in code) == RUN_OR_NOT
    assert {block.reason for block in code} <= {*documented.REASONS, ""}


@pytest.mark.nightly
def test_the_site_is_built_without_a_warning_and_fetches_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for path in tmp_path.rglob("*.html"):
        assert re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"?(?:https?:)?//[^>]*>", path.read_text()) == [], path


PROBLEMS = {
    SampleConfig: sampling.sample_problems,
    ScoreConfig: evaluation.score_problems,
    StatsConfig: evaluation.stats_problems,
    BitsConfig: evaluation.bits_problems,
    BiasConfig: evaluation.bias_problems,
    WeightsConfig: objective.weights_problems,
    ShardsMakeConfig: conversion.shards_problems,
    SingleConfig: conversion.single_problems,
}


class Parsed(Exception):
    """The configuration of a command, in place of its work."""


def stop(original, *args):
    raise Parsed(original(*args))


def parse(name, arguments, monkeypatch):
    """Parses a command of the package as it does itself: what is wrong with it.

    Runs that are named need not be there.
    """
    if {"--help", "--version", "--tyro-print-completion"} & {*arguments}:
        return []
    if name in ("train.py", "cache"):
        with monkeypatch.context() as patch:
            patch.setattr(train_command, "run_values", lambda _: loading.read_config("digits"))
            patch.setattr(train_command, "shown_values", lambda *_: {})
            patch.setattr(loading, "read_config", partial(read_config, loading.read_config))
            words = ["--output_dir", "unused", "--dataset", *arguments] if name == "cache" else arguments
            config = cli.train_config(words, None)
        return training.train_problems(config)
    with monkeypatch.context() as patch:
        patch.setattr(parsing, "parse", partial(stop, parsing.parse))
        try:
            getattr(cli, COMMANDS[name])(arguments)
        except Parsed as parsed:
            (config,) = parsed.args
            return PROBLEMS.get(type(config), lambda _: [])(config)
    return [f"{name} {arguments} is not parsed"]


def read_config(original, name):
    return original("digits" if Path(name).suffix == ".json" else name)


def others(name, arguments):
    """What is wrong with the call of another program: a script of the repository, one that a block wrote, or a target of make."""
    if any(block.text.startswith(f"# {name}\n") for block in all_blocks()):
        return []
    if name.endswith(".py"):
        script = (ROOT / name).read_text()
        return [word for word in arguments if word.startswith("--") and f'"{word}"' not in script]
    if name == "make":
        return [word for word in arguments if not re.search(rf"^{word}:", (ROOT / "Makefile").read_text(), re.M)]
    return []


@pytest.mark.row(75, SHOWN)
def test_every_command_of_every_block_parses(tmp_path, monkeypatch, trials):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red fox\n")
    photographs(Path("photos"), 1)
    wrong, seen = {}, set()
    for block in all_blocks():
        if block.language == "python":
            ast.parse(block.text)
        for words in documented.commands(block, tmp_path) if block.language == "bash" else ():
            name, arguments = documented.entry(words)
            if (key := (name, *arguments)) in seen:
                continue
            seen.add(key)
            try:
                problems = parse(name, arguments, monkeypatch) if name in COMMANDS else others(name, arguments)
            except DebiasError as error:
                problems = [str(error)]
            if problems:
                wrong[f"{block}: {name} {' '.join(arguments)}"] = problems
            trials()
    assert wrong == {}


# ---- what the pages take for granted ---------------------------------------------------------------------------------------


def photographs(folder, count=64, captions=False):
    """Pictures of noise, whose files are large; with captions beside them."""
    noise = random.Random(str(folder))
    for k in range(count):
        path = folder / f"{k:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.frombytes("RGB", (96, 96), noise.randbytes(3 * 96 * 96)).save(path)
        if captions:
            path.with_suffix(".txt").write_text(f"a picture of {k}\n")


def packed(folder):
    """A single file of Stable Diffusion XL's layout."""
    assert cli.convert(["single", str(folder.parent / "user" / "sdxl-model"), str(folder)]) == 0


def lora(folder):
    """A LoRA of the stand-in for Stable Diffusion XL, in the names of diffusers."""
    trained = folder.parent / "trained"
    base = ["--base_model", str(folder.parent / "sdxl-model"), "--dataset", "digits", "--resolution", "8", "--num_workers", "0"]
    assert Forked("train.py", *base, *RUN, "--lora_rank", "2", "--output_dir", trained).result()[0] == 0
    shutil.move(trained, folder)


def clip_model(folder):
    """A CLIPModel of random weights."""
    from test_text_evaluation import random_clip

    random_clip(folder)


def text_model(folder):
    """A stand-in for Stable Diffusion XL: its classes, its layers per block, which kohya's names go by, and hardly any weights."""
    import text_models

    text_models.make_base(folder, layers_per_block=2)


RUN = ["--max_steps", "4", "--batch_size", "4", "--num_threads", "1"]
OF_PHOTOS = ["--dataset", "photos", "--resolution", "16", "--size", "tiny", "--prediction_type", "epsilon", "--schedule_shift", "1"]
RUNS = {
    "runs/digits": [],
    "user/digits": [],
    "runs/one": ["--seed", "1"],
    "runs/other": ["--weighting", "constant"],
    "runs/digits_text": ["--config", "digits_text"],
    "runs/faces": [*OF_PHOTOS],
    "runs/photos": [*OF_PHOTOS],
    "runs/constant": [*OF_PHOTOS, "--weighting", "constant"],
    "runs/debiased": [*OF_PHOTOS],
    **{f"runs/{name}-{seed}": ["--weighting", name, "--seed", str(seed)] for name in ("debiased", "constant") for seed in range(3)},
}
FILES = {
    **dict.fromkeys(("photos", "EMOJI"), photographs),
    **dict.fromkeys(("pictures", "more", "user/pictures"), partial(photographs, count=20, captions=True)),
    "prompts.txt": lambda path: path.write_text("a red fox\na blue fox\n"),
    **dict.fromkeys(("user/sdxl-model", "user/sdxl", "stabilityai/stable-diffusion-xl-base-1.0"), text_model),
    "madebyollin/sdxl-vae-fp16-fix": lambda folder: shutil.copytree(ROOT / "debias_diffusers/data/text_base/vae", folder),
    "model.safetensors": packed,
    "user/other": lora,
    "openai/clip-vit-large-patch14": clip_model,
    "ema_0.9999_500000.pt": partial(shutil.copy, GOLDEN / "unet_paper_32" / "model.pt"),
    "flags.json": partial(shutil.copy, GOLDEN / "unet_paper_32" / "flags.json"),
    "drawn": lambda folder: Forked(
        "sample.py", folder.parent / "runs/digits_text", "--prompt", "7", "--num_images", 4, "--output_dir", folder
    ).result(),
}
SDXL = ["pictures", "prompts.txt", "stabilityai/stable-diffusion-xl-base-1.0", "madebyollin/sdxl-vae-fp16-fix", "user/sdxl-model"]
TAKEN_FOR_GRANTED = {
    "README.md": ["photos", *SDXL],
    "docs/getting_started.md": ["photos"],
    "docs/training.md": ["photos"],
    "docs/sampling.md": ["runs/digits", "runs/digits_text", "user/sdxl-model", "prompts.txt"],
    "docs/evaluation.md": ["photos", "drawn", "openai/clip-vit-large-patch14", *(set(RUNS) - {"user/digits", "runs/photos", "runs/faces"})],
    "docs/text_to_image.md": [
        *SDXL,
        "user/pictures",
        "more",
        "model.safetensors",
        "user/sdxl",
        "user/other",
        "openai/clip-vit-large-patch14",
    ],
    "docs/large_data.md": ["photos"],
    "docs/hub.md": ["user/digits"],
    "docs/coming_from.md": [*SDXL, "user/pictures", "model.safetensors", "photos"],
    "docs/from_the_reference.md": ["ema_0.9999_500000.pt", "flags.json", "photos", "runs/faces"],
    "docs/reliability.md": ["photos", "runs/photos"],
    "docs/claim.md": ["EMOJI"],
}


@pytest.fixture(scope="module")
def granted(tmp_path_factory):
    """A function that makes a file or folder once, by its name in TAKEN_FOR_GRANTED."""
    root = tmp_path_factory.mktemp("granted")

    def make(name):
        path = root / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            for needed in {"model.safetensors": ["user/sdxl-model"], "user/other": ["user/sdxl-model"], "drawn": ["runs/digits_text"]}.get(
                name, []
            ):
                make(needed)
            if name in FILES:
                FILES[name](path)
            else:
                make("photos")
                done = Forked("train.py", *RUNS[name], *RUN, "--output_dir", path, before=partial(os.chdir, root)).result()
                assert done[0] == 0, done
        return path

    return make


# ---- in nightly tests -------------------------------------------------------------------------------------------------

GIVEN = """
from diffusers import DDPMScheduler
import torch
scheduler, timesteps, mse_per_sample = DDPMScheduler(), torch.tensor([1, 500]), torch.ones(2)
original = DDPMScheduler.set_timesteps
DDPMScheduler.set_timesteps = lambda self, steps, *more, **named: original(self, min(steps, {steps}), *more, **named)
"""


def run_python(block, folder, environment):
    """Runs a block of Python; one that begins with the name of a file is saved under it, for the commands that follow."""
    if named := re.match(r"# (\w+\.py)\n", block.text):
        (folder / named[1]).write_text(block.text)
        return 0, ""
    text = GIVEN.format(steps=documented.DENOISING_STEPS) + re.sub(r"max_steps=\d+", "max_steps=4, warmup_steps=0", block.text)
    done = subprocess.run([sys.executable, "-c", text], cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr


def run_command(words, folder, environment):
    """Runs one command of a block: (exit code, what it said)."""
    name, arguments = documented.entry(words)
    arguments = documented.smaller(name, arguments)
    if "--multi_gpu" in words:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            processes = min(2, int(words[words.index("--num_processes") + 1]))
            return launched(processes, ROOT / name, *arguments, cwd=folder, env=environment)
    if name in COMMANDS:
        code, out, err = Forked(name, *arguments, before=partial(os.chdir, folder)).result()
        return code, out + err
    program = [sys.executable, folder / name if (folder / name).exists() else ROOT / name] if name.endswith(".py") else [name]
    done = subprocess.run([*program, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.nightly
@pytest.mark.row(75, SHOWN)
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(block.language in documented.CODE and not block.reason for block in documented.blocks(page))]
)
def test_the_blocks_of_a_page_run(page, granted, tmp_path, trials):
    for name in TAKEN_FOR_GRANTED.get(page, ()):
        path = granted(name)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / name)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    failed = {}
    for block in documented.blocks(page):
        if block.reason or block.language not in documented.CODE:
            continue
        if block.language == "python":
            code, said = run_python(block, tmp_path, environment)
            failed |= {str(block): said} if code else {}
            trials()
            continue
        for words in documented.commands(block, tmp_path):
            code, said = run_command(words, tmp_path, environment)
            if code:
                failed[f"{block}: {' '.join(words)}"] = said[-1500:]
            trials()
    assert not failed, "\n\n".join(f"{where}\n{said}" for where, said in failed.items())
