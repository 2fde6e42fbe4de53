"""The command `train`: layers of values to the configuration of a training."""

from __future__ import annotations

import argparse
import os
import textwrap
from typing import Any

from .. import parsing
from ..config import choices
from ..config import loading as configuration
from ..config.ranges import field_types
from ..config.schema.data import DIGITS, DIGITS_TEXT, EMBEDDED
from ..config.schema.training import TrainConfig
from ..config.validation.objective import named_problems
from ..config.validation.yielding import yielded
from ..errors import InputError, raise_all
from ..runs.run_directory import kept_values, no_run, run_values, shown_values
from ..utils import launcher
from ..utils.console import say
from .base import HELP_FLAGS


def run_train(argv: list[str], program: str) -> None:
    """Trains, or resumes a run."""
    from ..training.start import train_run

    train_run(*train_command(argv, os.environ.get("ACCELERATE_MIXED_PRECISION"), program))


TRAIN_HELP = """Train a diffusion model with the debiased loss (arXiv 2310.08442). The same command resumes a run.

--config NAME or --config FILE.yaml takes the values of a packaged configuration or of a YAML or JSON file; flags win over it.
With --dataset and without --config, what is left out is chosen to suit the data, and printed: it may differ from the defaults below.

--base_model MODEL trains a text-to-image model, whose noise schedule and prediction type are those of the base model if left out.

--resume RUN resumes a run directory with everything as it was, to its max_steps. Beside it may be typed:
{changeable}.

With --allow_change NAME these change on purpose, from the newest checkpoint on, and the optimizer's state is kept:
{on_purpose}.
"""


def _train_help(file: str | None) -> str:
    """The text above the flags: which configuration changes which defaults, or whose values are shown as defaults."""
    names = {"changeable": configuration.CHANGEABLE - {"output_dir", "size"}, "on_purpose": configuration.ON_PURPOSE}
    lists = {key: ", ".join(name for name in field_types(TrainConfig) if name in found) for key, found in names.items()}
    text = TRAIN_HELP.format(**{key: textwrap.fill(value, 120) for key, value in lists.items()})
    if file:
        return f"{text}\nThe defaults below are those of --config {file}."
    changes = [
        textwrap.fill(f"  {names}: {values}", 120, subsequent_indent="      ") for names, values in configuration.preset_changes().items()
    ]
    said = "Without --config and --dataset, it is --config digits. What the packaged configurations change of the defaults below:"
    return "\n".join((text, said, *changes))


def train_config(argv: list[str], launcher_precision: str | None, program: str = "train.py") -> TrainConfig:
    """The training configuration of `train_command`, with field defaults where the data decide."""
    return train_command(argv, launcher_precision, program)[0]


def train_command(argv: list[str], launcher_precision: str | None, program: str = "train.py") -> tuple[TrainConfig, frozenset[str]]:
    """The training configuration, and the fields that are chosen as soon as the data are known.

    Precedence: flags, `--config`, the packaged configuration of an embedded data set (for that), defaults. With `--resume RUN`: flags, the
    configuration of the run. A plain command, without both, chooses what was left out (`config.choices`); in the directory
    of a run it keeps what the run has chosen.
    `--help` prints the field defaults, or with `--config` the values of that configuration.
    """
    file, flags = _take_flag("config", argv)
    run, flags = _take_flag("resume", flags)
    dataset, _ = _take_flag("dataset", flags)
    values = configuration.read_config(file) if file else {}
    base = _take_flag("base_model", flags)[0] or values.get("base_model")
    asks_help = not HELP_FLAGS.isdisjoint(flags)
    typed = {parsing.field_name(flag) for flag in flags if flag.startswith("--")}
    typed |= {name.removeprefix("no_") for name in typed}
    chosen: frozenset[str] = frozenset()
    if run is not None:
        defaults = configuration.layered(_values_of_run(run, typed | ({"config"} if file else set())))
    elif base:
        values = configuration.read_config(DIGITS_TEXT) if base == DIGITS and not file else values
        chosen = choices.of_base(typed | values.keys())
        kept = kept_values(_take_flag("output_dir", flags)[0] or values.get("output_dir"), chosen)
        defaults = configuration.layered(values, kept)
        chosen = frozenset() if kept else chosen
    elif file or dataset is None or dataset in EMBEDDED:
        named = dataset or values.get("dataset") or (None if file or asks_help else DIGITS)
        defaults = configuration.layered(configuration.read_config(named) if named in EMBEDDED else {}, values)
    else:
        chosen, of_init = choices.left_out(typed), choices.of_init(typed)
        kept = kept_values(_take_flag("output_dir", flags)[0], chosen | of_init)
        init, _ = _take_flag("init", flags)
        defaults = configuration.layered(kept or (shown_values(init, of_init) if init else {}))
        chosen = frozenset() if kept else chosen
    defaults = _replaced(defaults, typed)
    config = parsing.parse(TrainConfig, flags, program, _train_help(file) if asks_help else "", defaults)
    raise_all(named_problems(config.objective, typed))
    config, notes = yielded(config, defaults, typed, lambda each: configuration.resolved(each, launcher_precision))
    for note in notes if launcher.is_first_process() else ():
        say(note)
    return configuration.resolved(config, launcher_precision), chosen


def _replaced(defaults: TrainConfig, typed: set[str]) -> TrainConfig:
    """The defaults without what a flag replaces.

    Raises:
        InputError: both are typed.
    """
    neutral = configuration.flatten(TrainConfig())
    for name in configuration.REPLACING.keys() & typed:
        if twice := sorted(typed & set(configuration.REPLACING[name])):
            what = "decides the length of the run" if "num_epochs" in (name, *twice) else "describes the whole network"
            raise InputError(f"{name} {what}; leave out {', '.join(twice)}")
        defaults = configuration.update(defaults, {number: neutral[number] for number in configuration.REPLACING[name]})
    return defaults


def _values_of_run(run: str, typed: set[str]) -> dict[str, Any]:
    """What `--resume RUN` stands for.

    Raises:
        InputError: there is no such run, or a flag is typed that says the same.
    """
    if twice := sorted(typed & {"config", "output_dir"}):
        raise InputError(f"--resume takes configuration and directory of the run {run}; leave out --{' --'.join(twice)}")
    values = run_values(run)
    if values is None:
        raise InputError(no_run("resume", run))
    return values | {"output_dir": run}


def _take_flag(name: str, argv: list[str]) -> tuple[str | None, list[str]]:
    """The value of one flag, or None, and the other arguments. --config and --dataset decide the defaults of all other flags."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}")  # as for all other flags, either will do
    try:
        found, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise InputError(f"--{name} needs a value ({error.message})") from None
    return getattr(found, name), rest
