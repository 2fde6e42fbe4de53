"""Every code block of README.md, CONTRIBUTING.md and docs/: parsed always, run in nightly tests (`documented` finds them).

A page takes some files for granted, such as a folder of photographs or a run that an earlier page trained. They are made once, small, and
copied to the folder in which the page's blocks run, in their order. Names of the Hub are folders there, as a local path comes first.
"""

import ast
import contextlib
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

from debias_diffusers import cli, parsing
from debias_diffusers.config import loading, schema, validation
from debias_diffusers.errors import DebiasError

PAGES = documented.pages()
SHOWN = "the code and the commands of the README, of every page and of model cards run as shown"


@cache
def all_blocks():
    return [block for page in PAGES for block in documented.blocks(page)]


# ---- always -----------------------------------------------------------------------------------------------------------


def test_every_page_is_on_the_site():
    assert {path.name for path in (ROOT / "docs").glob("*.md")} == {Path(page).name for page in PAGES if page.startswith("docs/")}


def test_every_block_is_run_or_counted_among_those_that_cannot_be_run():
    assert [str(block) for block in all_blocks() if block.language not in documented.CODE + documented.OTHER] == []
    code = [block for block in all_blocks() if block.language in documented.CODE]
    assert Counter(block.reason or "run" for block in code) == {}
    assert {block.reason for block in code} <= {*documented.REASONS, ""}


PROBLEMS = {
    schema.SampleConfig: validation.sample_problems,
    schema.ScoreConfig: validation.score_problems,
    schema.StatsConfig: validation.stats_problems,
    schema.BitsConfig: validation.bits_problems,
    schema.BiasConfig: validation.bias_problems,
    schema.WeightsConfig: validation.weights_problems,
    schema.ShardsMakeConfig: validation.shards_problems,
    schema.SingleConfig: validation.single_problems,
}


class Parsed(Exception):
    """The configuration of a command, in place of its work."""


def stop(*args):
    raise Parsed(parsing.parse(*args))


def parse(name, arguments, monkeypatch):
    """Parses a command of the package as it does itself: what is wrong with it.

    Runs that are named need not be there.
    """
    if {"--help", "--version"} & {*arguments}:
        return []
    if name in ("train.py", "cache"):
        with monkeypatch.context() as patch:
            patch.setattr(cli, "run_values", lambda _: loading.read_config("digits"))
            patch.setattr(cli, "shown_values", lambda *_: {})
            patch.setattr(loading, "read_config", partial(read_config, loading.read_config))
            config = cli.train_config([*(["--dataset"] if name == "cache" else []), *arguments], None)
        return validation.train_problems(config)
    with monkeypatch.context() as patch:
        patch.setattr(cli, "parse", stop)
        try:
            getattr(cli, COMMANDS[name])(arguments)
        except Parsed as parsed:
            (config,) = parsed.args
            return PROBLEMS.get(type(config), lambda _: [])(config)
    return [f"{name} {arguments} is not parsed"]


def read_config(original, name):
    return original("digits" if Path(name).suffix == ".json" else name)


def others(name, arguments):
    """What is wrong with the call of another program."""
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
