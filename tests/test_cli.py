"""What the command line says: help, version, its own name, and what was meant by what it does not know."""

import re
import sys

import pytest

from debias_diffusers import __version__, cli
from debias_diffusers.config import loading
from debias_diffusers.config.schema import TrainConfig

COMMANDS = (
    *(["train"], ["sample"], ["eval", "score"], ["eval", "compare"], ["eval", "stats"], ["eval", "bpd"], ["eval", "weights"]),
    *(["convert", "guided"], ["convert", "export"], ["hub", "push"]),
)


def said(capsys, *arguments):
    """What `python -m debias_diffusers` prints, without the boxes and on one line."""
    cli.main(arguments)
    printed = capsys.readouterr()
    return " ".join((printed.out + printed.err).replace("│", " ").split())


def default(text, flag):
    """The default that a help prints for a flag; None if none."""
    return re.search(rf" --{flag} (?:(?! --).)*?\(default: ([^)]*)\)", text)


def test_help_has_the_defaults_of_the_fields_or_of_a_configuration(capsys):
    plain, digits = said(capsys, "train", "--help"), said(capsys, "train", "--config", "digits", "--help")
    for name, neutral, of_digits in (("model_channels", "128", "32"), ("max_steps", "100000", "2500"), ("schedule_shift", "1.0", "64.0")):
        assert (default(plain, name)[1], default(digits, name)[1]) == (neutral, of_digits)
    assert said(capsys, "train", "-h", "--config", "digits") == digits
    assert "--resolution INTEGER image size in pixels: resize of the shorter side, then center crop --channels" in plain  # left out


def test_help_says_which_packaged_configuration_changes_what(capsys):
    text, defaults = said(capsys, "train", "--help"), loading.flatten(TrainConfig())
    assert "digits: dataset digits, resolution 8, num_workers 0, model_channels 32, channel_mult 1 2," in text
    changes = loading.preset_changes()
    assert sorted(name for names in changes for name in names.split(", ")) == loading.packaged_configs()
    for names, values in changes.items():
        assert f"{names}: {values}" in text
        for name in names.split(", "):
            changed = {key for key, value in loading.read_config(name).items() if value != defaults[key]} - {"output_dir"}
            assert {value.split()[0] for value in values.split(", ")} == changed


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_and_version_of_every_command(command, capsys):
    text = said(capsys, *command, "--help")
    assert text.startswith(f"usage: python -m debias_diffusers {' '.join(command)} [-h]")
    assert not re.search(r"None\||\{None|\[\[|\b(STR|INT|FLOAT)\b|default: (None|''|\))", text), text
    assert said(capsys, *command, "--version") == f"debias_diffusers {__version__}"


def test_version_of_what_has_commands(capsys):
    for command in ([], ["eval"], ["convert"], ["hub"]):
        assert said(capsys, *command, "--version") == f"debias_diffusers {__version__}"


@pytest.mark.parametrize(
    "entry, argv, name",
    [
        ("train", ["train.py", "--max_stepz", "1"], "train.py"),
        ("train", ["/opt/bin/debias-train", "--max_stepz", "1"], "debias-train"),
        ("main", ["/x/debias_diffusers/__main__.py", "train", "--max_stepz", "1"], "python -m debias_diffusers train"),
        ("main", ["/x/debias_diffusers/__main__.py", "eval", "bpd", "x", "--max_stepz"], "python -m debias_diffusers eval bpd"),
        ("evaluate", ["/opt/bin/debias-eval", "stats", "x", "y", "--max_stepz"], "debias-eval stats"),
        ("convert", ["/x/debias_diffusers/convert/__main__.py", "export", "x"], "python -m debias_diffusers.convert export"),
        ("push", ["/x/debias_diffusers/hub/__main__.py", "push"], "python -m debias_diffusers.hub push"),
    ],
)
def test_a_command_names_itself_as_it_was_called(entry, argv, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", argv)
    assert getattr(cli, entry)() == 2
    assert capsys.readouterr().err.endswith(f"; {name} --help lists all flags\n")
