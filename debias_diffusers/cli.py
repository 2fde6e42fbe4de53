"""The command line: parses flags to configurations, prints errors as one sentence, returns exit codes. Imports torch only when needed."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .config import choices, hub_names
from .config import loading as configuration
from .config.ranges import field_types, range_problems
from .config.schema import (
    DIGITS,
    DIGITS_TEXT,
    EMBEDDED,
    BiasConfig,
    BitsConfig,
    ExportConfig,
    GuidedConfig,
    LoraFormatConfig,
    PlayConfig,
    PushConfig,
    ReconstructConfig,
    ReportConfig,
    SampleConfig,
    ScoreConfig,
    ShardsConfig,
    ShardsMakeConfig,
    SingleConfig,
    StatsConfig,
    TrainConfig,
    WeightsConfig,
)
from .config.validation.conversion import shards_data_problems, shards_problems, single_problems
from .config.validation.evaluation import bias_problems, bits_problems, report_problems, score_problems, stats_problems
from .config.validation.objective import weights_problems
from .config.validation.sampling import sample_problems
from .config.validation.yielding import yielded
from .errors import CannotWriteError, DebiasError, InputError, raise_all
from .parsing import field_name, parse
from .play import request, space
from .runs import ema_snapshots
from .runs.lora_folder import lora_problems
from .runs.model_folder import bias_model_problems, check_sampling, pixel_problems, task_of
from .runs.run_directory import kept_values, run_values, sampling_problems, shown_values
from .utils import console, launcher, text_libraries
from .utils.files import require_replaceable

HELP_FLAGS = {"-h", "--help"}
ERROR_GRACE_SECONDS = 10.0  # the other processes wait so long for the first one to print its error


def train(argv: Sequence[str] | None = None) -> int:
    """`python train.py`, `accelerate launch train.py`, `debias-train`: returns the exit code."""
    return _run_command(_train, argv, "train.py")


def sample(argv: Sequence[str] | None = None) -> int:
    """`python sample.py`, `debias-sample`: returns the exit code."""
    return _run_command(_sample, argv, "sample.py")


def evaluate(argv: Sequence[str] | None = None) -> int:
    """`python eval.py`, `debias-eval`: returns the exit code."""
    return _run_command(_evaluate, argv, "eval.py")


def convert(argv: Sequence[str] | None = None) -> int:
    """`python -m debias_diffusers.convert`: returns the exit code."""
    return _run_command(_convert, argv, "python -m debias_diffusers.convert")


def push(argv: Sequence[str] | None = None) -> int:
    """`python -m debias_diffusers.hub`: returns the exit code."""
    return _run_command(_hub, argv, "python -m debias_diffusers.hub")


def ema(argv: Sequence[str] | None = None) -> int:
    """`python -m debias_diffusers.ema`: returns the exit code."""
    return _run_command(_ema, argv, "python -m debias_diffusers.ema")


def cache(argv: Sequence[str] | None = None) -> int:
    """`python -m debias_diffusers.cache`, `accelerate launch -m debias_diffusers.cache`: returns the exit code."""
    return _run_command(_cache, argv, "python -m debias_diffusers.cache")


def play(argv: Sequence[str] | None = None) -> int:
    """`python -m debias_diffusers.play`: returns the exit code."""
    return _run_command(_play, argv, "python -m debias_diffusers.play")


def shards(argv: Sequence[str] | None = None) -> int:
    """`python -m debias_diffusers.shards`: returns the exit code."""
    return _run_command(_shards, argv, "python -m debias_diffusers.shards")


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m debias_diffusers COMMAND`: returns the exit code."""
    return _run_command(_main, argv, "python -m debias_diffusers")


HELP = """
--version prints the version, here and in every command.

  train      train a model, or resume a run
  sample     draw images with a trained model
  eval       evaluate models and objectives
  convert    checkpoints of guided-diffusion, single files and LoRAs to the format of diffusers, and back
  hub        push a run to the Hub
  cache      compute latents and text embeddings before a training
  ema        averaged weights of any width, from the snapshots of a run
  play       draw on a web page, and compare two models
  shards     make, index and verify shards, for data that do not fit"""


# A command gets its arguments and the name under which it was called.
Command = Callable[[list[str], str], None]


def _main(argv: list[str], program: str) -> None:
    commands = {"train": _train, "sample": _sample, "eval": _evaluate, "convert": _convert, "hub": _hub}
    commands |= {"cache": _cache, "ema": _ema, "play": _play, "shards": _shards}
    _dispatch(commands, HELP, argv, program)


def _dispatch(commands: Mapping[str, Command], summary: str, argv: list[str], program: str) -> None:
    """Runs the sub-command that the first argument names.

    Raises:
        InputError: there is no such sub-command.
    """
    if not argv or argv[0] in HELP_FLAGS:
        print(f"usage: {program} {{{','.join(commands)}}} ...\n{summary}")
        return
    if argv[0] not in commands:
        names = " or ".join(commands) if len(commands) <= 2 else f"one of {', '.join(commands)}"
        raise InputError(f"{program} {argv[0]} is not known; take {names}")
    commands[argv[0]](argv[1:], f"{program} {argv[0]}")


def _train(argv: list[str], program: str) -> None:
    from .training.start import train_run

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
    typed = {field_name(flag) for flag in flags if flag.startswith("--")}
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
    config = parse(TrainConfig, flags, defaults, program, _train_help(file) if asks_help else "")
    config, notes = yielded(config, defaults, typed, lambda each: configuration.resolved(each, launcher_precision))
    _say_first(notes)
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


def _say_first(sentences: list[str]) -> None:
    """Prints sentences in the first process only."""
    if sentences and launcher.is_first_process():
        from .utils.console import say

        for sentence in sentences:
            say(sentence)


def _values_of_run(run: str, typed: set[str]) -> dict[str, Any]:
    """What `--resume RUN` stands for.

    Raises:
        InputError: there is no such run, or a flag is typed that says the same.
    """
    if twice := sorted(typed & {"config", "output_dir"}):
        raise InputError(f"--resume takes configuration and directory of the run {run}; leave out --{' --'.join(twice)}")
    values = run_values(run)
    if values is None:
        wrong = f"is no run directory (it has no {configuration.CONFIG} of a training)" if os.path.exists(run) else "does not exist"
        raise InputError(f"resume {run!r} {wrong}; name the --output_dir of a training that began")
    return values | {"output_dir": run}


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


def _sample(argv: list[str], program: str) -> None:
    config = parse(SampleConfig, argv, None, program, "Draw images with a trained model.")
    _raise_all(sample_problems(config) + sampling_problems(config.model, config.output_dir))
    if hub_names.is_model_id(config.model):
        text_libraries.show()  # which it may need
    else:
        check_sampling(config, Path(config.model))
    from .utils.signals import stop_with_launcher

    stop_with_launcher()  # else orphaned processes would write into a folder that a new command may lock
    from .sampling import generate

    generate.sample(config)


EVAL_HELP = """
Evaluate diffusion models and their objectives. COMMAND --help lists the flags of each.

  score TARGET...    FID, sFID, IS, KID, precision, recall and colour shift of models or images against a reference
  compare RUN...     the same for runs side by side, with confidence intervals
  stats REF OUT      statistics of a reference, to score against
  bpd MODEL          bits per dimension: variational bound, or likelihood by the probability-flow ODE
  bias RUN...        errors, colour bias and estimates of x_0 over the timesteps, images over the steps of the solver; an HTML report
  report RUN...      curves, grids over time, metrics, weights and configuration of runs side by side, as one HTML file
  weights            the weights of an objective over t and log SNR in every prediction space, as a picture and as numbers"""

WEIGHTS_HELP = """Draw the weights of an objective, over t and over log SNR and in every prediction space: weights.png and weights.csv.

The flags of the objective are those of train.py. --prediction_type flow takes the noise schedule of rectified flow; all spaces are
drawn anyhow."""


def _evaluate(argv: list[str], program: str) -> None:
    _dispatch(EVALUATIONS, EVAL_HELP, argv, program)


def _score(argv: list[str], program: str) -> None:
    _scored(parse(ScoreConfig, argv, None, program, ScoreConfig.__doc__ or ""))


def _compare(argv: list[str], program: str = "eval.py compare") -> None:
    given = parse(ScoreConfig, argv, None, program, "Score runs side by side, with confidence intervals (--bootstrap 200 if left out).")
    _scored(dataclasses.replace(given, bootstrap=200 if given.bootstrap is None else given.bootstrap))


def _scored(config: ScoreConfig) -> None:
    absent = [problem for target in config.targets for problem in hub_names.target_problems(target)]
    _raise_all(score_problems(config) + absent + hub_names.data_problems("reference", config.reference))
    if "clip_score" in config.measure.metrics or any(task_of(Path(target)) == "text_to_image" for target in config.targets):
        text_libraries.require()
    elif any(map(hub_names.is_model_id, config.targets)):
        text_libraries.show()  # which they may need
    from .evaluation import score

    score.score(config)
    if not config.output and (problem := console.stdout_error()):
        raise CannotWriteError(f"the figures cannot be printed: {problem.strerror}; write them to a file with --output scores.json")


def _stats(argv: list[str], program: str) -> None:
    config = parse(StatsConfig, argv, None, program, StatsConfig.__doc__ or "")
    _raise_all(stats_problems(config) + hub_names.data_problems("reference", config.reference))
    from .evaluation import statistics

    statistics.stats(config)


def _bits(argv: list[str], program: str) -> None:
    config = parse(BitsConfig, argv, None, program, BitsConfig.__doc__ or "")
    absent = hub_names.model_problems("model", config.model) + hub_names.data_problems("reference", config.reference)
    _raise_all(bits_problems(config) + absent + pixel_problems(config.model, "bpd"))
    from .evaluation import likelihood

    likelihood.bits_per_dimension(config)


def _bias(argv: list[str], program: str) -> None:
    config = parse(BiasConfig, argv, None, program, BiasConfig.__doc__ or "")
    absent = [problem for run in config.runs for problem in hub_names.model_problems("run", run)]
    local = {run: Path(run) for run in config.runs if Path(run).is_dir()}
    if len(local) == len(config.runs):
        absent += bias_model_problems(config, local)
    _raise_all(bias_problems(config) + absent + hub_names.data_problems("reference", config.reference))
    if any(task_of(folder) == "text_to_image" for folder in local.values()):
        text_libraries.require()
    elif len(local) < len(config.runs):
        text_libraries.show()  # which those of the Hub may need
    from .analysis import bias

    bias.measure_bias(config)


def _report(argv: list[str], program: str) -> None:
    config = parse(ReportConfig, argv, None, program, ReportConfig.__doc__ or "")
    from .analysis.report_page import is_our_page
    from .analysis.run_files import run_problems

    raise_all(report_problems(config) + run_problems(config.runs))
    require_replaceable("output", Path(config.output), is_our_page)
    from .analysis import run_report

    run_report.write_report(config)


def _weights(argv: list[str], program: str) -> None:
    config = parse(WeightsConfig, argv, None, program, WEIGHTS_HELP)
    raise_all(weights_problems(config))
    from .evaluation import plots

    plots.plot_weights(config)


EVALUATIONS = {"score": _score, "compare": _compare, "stats": _stats, "bpd": _bits, "bias": _bias, "report": _report, "weights": _weights}


CONVERT_HELP = """
  guided MODEL.pt OUT --flags FLAGS   a checkpoint of guided-diffusion (the paper's code, ADM, P2, Min-SNR) to a pipeline
  export MODEL OUT.pt                 the network of a run or pipeline to a checkpoint that guided-diffusion loads
  single MODEL.safetensors OUT        a single file of Stable Diffusion XL, 2.x or 1.x to a pipeline folder
  single MODEL OUT.safetensors        a run or pipeline of them to a single file, which other programs load
  lora LORA OUT --format FORMAT       a LoRA to the names of kohya's scripts (sd-scripts), or from these to those of diffusers"""


def _convert(argv: list[str], program: str) -> None:
    _dispatch({"guided": _guided, "export": _export, "single": _single, "lora": _lora}, CONVERT_HELP, argv, program)


def _guided(argv: list[str], program: str) -> None:
    if "--flags" in argv[:-1]:  # its value starts with dashes, so the parser needs "--flags=VALUE"
        place = argv.index("--flags")
        argv = [*argv[:place], f"--flags={argv[place + 1]}", *argv[place + 2 :]]
    config = parse(GuidedConfig, argv, None, program, GuidedConfig.__doc__ or "")
    from .convert import guided_diffusion

    guided_diffusion.guided(**dataclasses.asdict(config))


def _export(argv: list[str], program: str) -> None:
    config = parse(ExportConfig, argv, None, program, ExportConfig.__doc__ or "")
    from .convert import guided_diffusion

    guided_diffusion.export(**dataclasses.asdict(config))


def _single(argv: list[str], program: str) -> None:
    config = parse(SingleConfig, argv, None, program, SingleConfig.__doc__ or "")
    raise_all(single_problems(config))
    from .convert import single_file

    if Path(config.out).suffix == ".safetensors":
        single_file.pack(config.model, config.out, config.dtype)
    else:
        single_file.unpack(config.model, config.out, config.config)


def _lora(argv: list[str], program: str) -> None:
    config = parse(LoraFormatConfig, argv, None, program, LoraFormatConfig.__doc__ or "")
    raise_all(lora_problems("lora", config.lora))
    from .convert import lora

    lora.convert(**dataclasses.asdict(config))


EMA_HELP = """
  reconstruct RUN --sigma_rel 0.08    averaged weights of any width, of a run that trained with --post_hoc_ema"""


def _ema(argv: list[str], program: str) -> None:
    _dispatch({"reconstruct": _reconstruct}, EMA_HELP, argv, program)


def _reconstruct(argv: list[str], program: str) -> None:
    config = parse(ReconstructConfig, argv, None, program, ReconstructConfig.__doc__ or "")
    raise_all(range_problems(ReconstructConfig, dataclasses.asdict(config)))
    if config.sigma_rel is None:
        raise InputError("sigma_rel is missing; name the width of the average, such as --sigma_rel 0.08")
    if not (Path(config.run) / ema_snapshots.FOLDER).is_dir():
        raise InputError(f"{config.run} has no {ema_snapshots.FOLDER}; name a run directory that was trained with --post_hoc_ema 32")
    from .sampling import post_hoc_ema

    post_hoc_ema.reconstruct(config.run, config.sigma_rel, config.out, config.step)


def _play(argv: list[str], program: str) -> None:
    config = parse(PlayConfig, argv, None, program, PlayConfig.__doc__ or "")
    raise_all(request.play_problems(config))
    if config.space is not None:
        space.write(config)
        return
    if any(hub_names.is_model_id(model) or task_of(Path(model)) == "text_to_image" for model in config.models):
        text_libraries.show()
    from .play import page

    page.serve(config)


PUSH_HELP = """
  push RUN    push a run to the Hub, or what is missing of it"""


def _hub(argv: list[str], program: str) -> None:
    _dispatch({"push": _push}, PUSH_HELP, argv, program)


def _push(argv: list[str], program: str) -> None:
    config = parse(PushConfig, argv, None, program, PushConfig.__doc__ or "")
    from .hub import publish

    publish.push(config)


CACHE_HELP = """
Compute the latents and text embeddings of a text-to-image training before it starts, or what is missing of them:

  DATA --base_model MODEL --resolution R --precompute_dir DIR ...

DATA is what train.py has as --dataset. The other flags are those of the training (train.py --help), and mean the same. The training
reads DIR with --precompute_dir DIR; several trainings may share it. With accelerate launch the processes share the work."""


def _cache(argv: list[str], program: str) -> None:
    if not argv or not HELP_FLAGS.isdisjoint(argv):
        print(f"usage: {program} ...\n{CACHE_HELP}")
        return
    if not argv[0].startswith("-"):
        if any(field_name(flag) == "dataset" for flag in argv if flag.startswith("--")):
            raise InputError(f"dataset is named twice, {argv[0]} and --dataset; leave one of them out")
        argv = ["--dataset", *argv]
    from .training.start import precompute

    precompute(*train_command(argv, os.environ.get("ACCELERATE_MIXED_PRECISION"), program))


SHARDS_HELP = """
  make DATA OUT    write a data set as .tar shards of --shard_mb, with an index
  index DATA       index shards as they are
  verify DATA      compare shards with their index, and decode every image"""


def _shards(argv: list[str], program: str) -> None:
    _dispatch({"make": _make_shards, "index": _index_shards, "verify": _verify_shards}, SHARDS_HELP, argv, program)


def _make_shards(argv: list[str], program: str) -> None:
    config = parse(ShardsMakeConfig, argv, None, program, ShardsMakeConfig.__doc__ or "")
    raise_all(shards_problems(config))
    from .data.shards import commands

    commands.make(config)


def _index_shards(argv: list[str], program: str) -> None:
    config = parse(ShardsConfig, argv, None, program, "Index shards as they are; those that have not changed are not read again.")
    raise_all(shards_data_problems(config.data))
    from .data.shards import commands

    commands.index(config)


def _verify_shards(argv: list[str], program: str) -> None:
    config = parse(ShardsConfig, argv, None, program, "Compare shards with their index, and decode every image.")
    raise_all(shards_data_problems(config.data))
    from .data.shards import commands

    commands.verify(config)


def _run_command(main: Command, argv: Sequence[str] | None, program: str) -> int:
    """Runs a command and returns its exit code. Prints a DebiasError as the last line.

    Errors of the configuration, which all processes find, are printed by the first process only; a later error by its own process.

    Args:
        main: the command.
        argv: its arguments; those of the process if None.
        program: its name where it was not called from a shell.
    """
    console.ignore_stream_errors()
    try:
        if argv is None:
            argv, program = sys.argv[1:], _called(sys.argv[0], program)
            text_libraries.hide()  # of a process of its own: pixel models do not wait for them
        if "--version" in argv:
            print(f"debias_diffusers {__version__}")
            return 0
        main(list(argv), program)
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


def _called(script: str, program: str) -> str:
    """The name under which a script was called; `program` for `python -m`, whose script is a `__main__.py`."""
    return program if Path(script).name == "__main__.py" else Path(script).name


def _wait_for_the_first() -> None:
    """Waits until the first process has printed its error: a launcher kills all processes as soon as one has failed."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(ERROR_GRACE_SECONDS)
