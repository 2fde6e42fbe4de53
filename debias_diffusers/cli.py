"""The command line: parses flags to configurations, prints errors as one sentence, returns exit codes. Imports torch only when needed."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import tyro
from tyro import _errors as tyro_errors  # of a private module, so that pyproject.toml bounds the version

from .config import loading as configuration
from .config import validation
from .config.hub_names import missing_models
from .config.ranges import field_types
from .config.schema import (
    DIGITS,
    BitsConfig,
    ExportConfig,
    GuidedConfig,
    PushConfig,
    SampleConfig,
    ScoreConfig,
    StatsConfig,
    TrainConfig,
    WeightsConfig,
)
from .errors import CannotWriteError, DebiasError, InputError, raise_all, shortened
from .runs.run_directory import model_problems
from .utils import console, launcher

T = TypeVar("T")

ERROR_GRACE_SECONDS = 10.0  # the other processes wait so long for the first one to print its error


def train(argv: Sequence[str] | None = None) -> int:
    """`python train.py`, `accelerate launch train.py`, `debias-train`: returns the exit code."""
    return _run_command(_train, argv)


def sample(argv: Sequence[str] | None = None) -> int:
    """`python sample.py`, `debias-sample`: returns the exit code."""
    return _run_command(_sample, argv)


def evaluate(argv: Sequence[str] | None = None) -> int:
    """`python eval.py`, `debias-eval`: returns the exit code."""
    return _run_command(_evaluate, argv)


def convert(argv: Sequence[str] | None = None) -> int:
    """`python -m debias_diffusers.convert`: returns the exit code."""
    return _run_command(_convert, argv)


def push(argv: Sequence[str] | None = None) -> int:
    """`python -m debias_diffusers.hub`: returns the exit code."""
    return _run_command(_hub, argv)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m debias_diffusers COMMAND`: returns the exit code."""
    return _run_command(_main, argv)


HELP = """usage: python -m debias_diffusers {train,sample,eval,convert,hub} ...

  train      train a model, or resume a run
  sample     draw images with a trained model
  eval       evaluate models and objectives
  convert    checkpoints of guided-diffusion to pipelines, and back
  hub        push a run to the Hub"""


def _main(argv: list[str]) -> None:
    _dispatch("debias_diffusers", {"train": _train, "sample": _sample, "eval": _evaluate, "convert": _convert, "hub": _hub}, HELP, argv)


def _dispatch(program: str, commands: Mapping[str, Callable[[list[str]], None]], usage: str, argv: list[str]) -> None:
    """Runs the sub-command that the first argument names.

    Raises:
        InputError: there is no such sub-command.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(usage)
        return
    if argv[0] not in commands:
        raise InputError(f"{program} {argv[0]} is not known; take one of {', '.join(commands)}")
    commands[argv[0]](argv[1:])


def _train(argv: list[str]) -> None:
    from .training.start import train as train_run

    train_run(train_config(argv, os.environ.get("ACCELERATE_MIXED_PRECISION")))


TRAIN_HELP = f"""Train a diffusion model with the debiased loss (arXiv 2310.08442).

--config NAME|FILE takes the values of a packaged configuration ({", ".join(configuration.packaged_configs())}) or of a YAML
or JSON file; flags win over it. Without --config and --dataset the embedded digits are trained. The same command resumes."""


def train_config(argv: list[str], launcher_precision: str | None) -> TrainConfig:
    """The training configuration. Precedence: flags, `--config`, the packaged configuration of the digits (for the digits), defaults."""
    file, flags = _take_flag("config", argv)
    dataset, _ = _take_flag("dataset", flags)
    chosen = configuration.read_config(file) if file else {}
    layers = [configuration.read_config(DIGITS)] if (dataset or chosen.get("dataset") or (not file and DIGITS)) == DIGITS else []
    defaults = configuration.layered(*layers, chosen)
    given = {flag.split("=")[0].lstrip("-").replace("-", "_") for flag in flags if flag.startswith("--")}
    if "model_config" in given:
        if twice := sorted(given & set(configuration.MODEL_NUMBERS)):
            raise InputError(f"model_config describes the whole network; leave out {', '.join(twice)}")
        defaults = configuration.layered(configuration.flatten(defaults), {"model_config": "given by a flag"})
    config = _parse(TrainConfig, flags, defaults, "train.py", TRAIN_HELP)
    typed = given | {name.removeprefix("no_") for name in given}
    config, notes = validation.yielded(config, defaults, typed, lambda each: configuration.resolved(each, launcher_precision))
    if notes and launcher.is_first_process():
        from .utils.console import say

        for sentence in notes:
            say(sentence)
    return configuration.resolved(config, launcher_precision)


def _take_flag(name: str, argv: list[str]) -> tuple[str | None, list[str]]:
    """The value of one flag, or None, and the other arguments. --config and --dataset decide the defaults of all other flags."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(f"--{name}")
    try:
        found, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise InputError(f"--{name} needs a value ({error.message})") from None
    return getattr(found, name), rest


def _raise_all(problems: list[str]) -> None:
    """Raises InputError for an unsupported launcher environment, then for problems of a configuration."""
    raise_all(launcher.environment_problems(os.environ), "launcher")
    raise_all(problems)


def _sample(argv: list[str]) -> None:
    config = _parse(SampleConfig, argv, None, "sample.py", "Draw images with a trained model.")
    _raise_all(validation.sample_problems(config) + model_problems(config.model, config.output_dir))
    from .utils.signals import stop_with_launcher

    stop_with_launcher()  # else orphaned processes would write into a folder that a new command may lock
    from .sampling import generate

    generate.sample(config)


EVAL_HELP = """usage: eval.py {score,compare,stats,bpd,weights} ...

Evaluate diffusion models and their objectives. eval.py COMMAND --help lists the flags of each.

  score TARGET...    FID, sFID, IS, KID, precision, recall and colour shift of models or images against a reference
  compare RUN...     the same for runs side by side, with confidence intervals
  stats REF OUT      statistics of a reference, to score against
  bpd MODEL          variational bound in bits per dimension
  weights            the weights of an objective over t and log SNR in every prediction space, as a picture and as numbers"""

WEIGHTS_HELP = """Draw the weights of an objective, over t and over log SNR and in every prediction space: weights.png and weights.csv.

The flags of the objective are those of train.py. --prediction_type flow takes the noise schedule of rectified flow; all spaces are
drawn anyhow."""


def _evaluate(argv: list[str]) -> None:
    _dispatch("eval.py", EVALUATIONS, EVAL_HELP, argv)


def _score(argv: list[str]) -> None:
    _scored(_parse(ScoreConfig, argv, None, "eval.py score", ScoreConfig.__doc__ or ""))


def _compare(argv: list[str]) -> None:
    given = _parse(
        ScoreConfig, argv, None, "eval.py compare", "Score runs side by side, with confidence intervals (--bootstrap 200 if left out)."
    )
    _scored(dataclasses.replace(given, bootstrap=200 if given.bootstrap is None else given.bootstrap))


def _scored(config: ScoreConfig) -> None:
    _raise_all(validation.score_problems(config) + missing_models("target", *config.targets))
    from .evaluation import score

    score.score(config)
    if not config.output and (problem := console.stdout_error()):
        raise CannotWriteError(f"the figures cannot be printed: {problem.strerror}; write them to a file with --output scores.json")


def _stats(argv: list[str]) -> None:
    config = _parse(StatsConfig, argv, None, "eval.py stats", StatsConfig.__doc__ or "")
    _raise_all(validation.stats_problems(config))
    from .evaluation import statistics

    statistics.stats(config)


def _bits(argv: list[str]) -> None:
    config = _parse(BitsConfig, argv, None, "eval.py bpd", BitsConfig.__doc__ or "")
    _raise_all(validation.bits_problems(config) + missing_models("model", config.model))
    from .evaluation import likelihood

    likelihood.bits_per_dimension(config)


def _weights(argv: list[str]) -> None:
    config = _parse(WeightsConfig, argv, None, "eval.py weights", WEIGHTS_HELP)
    raise_all(validation.weights_problems(config))
    from .evaluation import plots

    plots.plot_weights(config)


EVALUATIONS = {"score": _score, "compare": _compare, "stats": _stats, "bpd": _bits, "weights": _weights}


CONVERT_HELP = """usage: python -m debias_diffusers.convert {guided,export} ...

  guided MODEL.pt OUT --flags FLAGS   a checkpoint of guided-diffusion (the paper's code, ADM, P2, Min-SNR) to a pipeline
  export MODEL OUT.pt                 the network of a run or pipeline to a checkpoint that guided-diffusion loads"""


def _convert(argv: list[str]) -> None:
    kinds: dict[str, type[Any]] = {"guided": GuidedConfig, "export": ExportConfig}
    if not argv or argv[0] in ("-h", "--help"):
        print(CONVERT_HELP)
        return
    command, *rest = argv
    if "--flags" in rest[:-1]:  # its value starts with dashes, so argparse needs "--flags=VALUE"
        place = rest.index("--flags")
        rest[place : place + 2] = [f"--flags={rest[place + 1]}"]
    if command not in kinds:
        raise InputError(f"convert {command} is not known; take guided or export")
    config: Any = _parse(kinds[command], rest, None, f"convert {command}", CONVERT_HELP)
    from .convert import guided_diffusion as module

    getattr(module, command)(**dataclasses.asdict(config))


PUSH_HELP = """usage: python -m debias_diffusers.hub push RUN ...

  push RUN    push a run to the Hub, or what is missing of it"""


def _hub(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(PUSH_HELP)
        return
    if argv[0] != "push":
        raise InputError(f"hub {argv[0]} is not known; take push")
    config = _parse(PushConfig, argv[1:], None, "hub push", PushConfig.__doc__ or "")
    from .hub import publish

    publish.push(config)


def _parse(kind: type[T], argv: list[str], default: T | None, program: str, description: str) -> T:
    """Parses flags to a dataclass. An error of tyro becomes an InputError of one sentence.

    Raises:
        InputError: an unknown flag (names the nearest known one) or an invalid value.
    """

    def refuse(event: tyro_errors.ParseErrorEvent) -> None:
        raise InputError(f"{_sentence(event, kind)}; {program} --help lists all flags")

    markers = (tyro.conf.OmitArgPrefixes, tyro.conf.PositionalRequiredArgs)
    options: dict[str, Any] = {} if default is None else {"default": default}
    with tyro_errors.on_parse_error(refuse):
        parsed: T = tyro.cli(kind, args=argv, prog=program, description=description, use_underscores=True, config=markers, **options)
    return parsed


BOLD = r"\[/?bold\]"  # markup of tyro


def _sentence(event: tyro_errors.ParseErrorEvent, kind: type[Any]) -> str:
    """An error of tyro as one sentence."""
    if isinstance(event, tyro_errors.UnrecognizedArgs):
        return f"Unrecognized options: {', '.join(event.tokens)}{_nearest(event.tokens, kind)}"
    if isinstance(event, tyro_errors.MissingArgs):
        fields = [argument.arg.field for argument in event.missing_arguments]
        helptexts = [field.helptext() if callable(field.helptext) else field.helptext for field in fields]
        return "; ".join(f"{field.intern_name} is missing: {text}" for field, text in zip(fields, helptexts))
    argument = getattr(event, "argument", None)
    flag = argument.display_name() if argument else "the arguments"
    if isinstance(event, tyro_errors.InvalidChoice):
        choices = ", ".join(sorted(set(event.choices) - {"None"}))
        return f"invalid choice {event.value!r} for argument {flag!r}. Expected one of {choices}."
    if isinstance(event, tyro_errors.InstantiationFailure):
        return f"Error parsing {flag}: {shortened(re.sub(BOLD, '', event.message))}"
    if isinstance(event, tyro_errors.BadValue):
        if not flag.startswith("-"):
            return f"{flag} is missing: it stands without a flag, before the options"
        return f"Missing value for argument {flag!r}. Expected {event.argument.lowered.nargs} values."
    return "the arguments cannot be read"


def _nearest(tokens: Sequence[str], kind: Any) -> str:
    """A suggestion for the first unknown flag that is similar to a known one."""
    known = list(field_types(kind))
    for name in (token.split("=")[0].lstrip("-").replace("-", "_") for token in tokens if token.startswith("--")):
        if near := difflib.get_close_matches(name, known, n=1) or [flag for flag in known if flag.startswith(name)]:
            return f"; did you mean --{near[0]}?"
    return ""


def _run_command(main: Callable[[list[str]], None], argv: Sequence[str] | None) -> int:
    """Runs a command and returns its exit code. Prints a DebiasError as the last line.

    Errors of the configuration, which all processes find, are printed by the first process only; a later error by its own process.
    """
    console.ignore_stream_errors()
    try:
        main(list(sys.argv[1:] if argv is None else argv))
    except DebiasError as error:
        sentence, code = str(error), error.exit_code
    except OSError as error:  # for example, a path that is too long or not permitted
        sentence, code = f"{error.filename or 'a file'}: {error.strerror or error}", InputError.exit_code
    except KeyboardInterrupt:
        sentence, code = "interrupted", 128 + signal.SIGINT
    except SystemExit as done:  # 0 for --help; else of a process that lets the first process print the error
        if done.code:
            _wait_for_the_first()
        return int(done.code or 0)
    else:
        return 0
    if launcher.is_first_process() or "torch" in sys.modules:
        from .utils.console import say

        say(f"error: {sentence}")
    else:
        _wait_for_the_first()
    return code


def _wait_for_the_first() -> None:
    """Waits until the first process has printed its error: a launcher kills all processes as soon as one has failed."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(ERROR_GRACE_SECONDS)
