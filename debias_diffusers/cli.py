"""The command line: the entry points. Errors become one sentence and an exit code. Imports torch only when needed."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import __version__
from .commands.base import Command, dispatch
from .commands.cache import run_cache
from .commands.convert import run_convert
from .commands.ema import run_ema
from .commands.evaluate import run_evaluate
from .commands.hub import run_hub
from .commands.play import run_play
from .commands.sample import run_sample
from .commands.shards import run_shards
from .commands.train import run_train, train_command, train_config
from .config.hub_names import at_home
from .errors import DebiasError, InputError, StoppedError
from .utils import console, launcher, text_libraries

__all__ = [
    "cache",
    "convert",
    "ema",
    "evaluate",
    "main",
    "play",
    "push",
    "sample",
    "shards",
    "train",
    "train_command",
    "train_config",
]

ERROR_GRACE_SECONDS = 10.0  # the other processes wait so long for the first one to print its error


def train(argv: Sequence[str] | None = None) -> int:
    """`python train.py`, `accelerate launch train.py`, `debias-train`: returns the exit code."""
    return _run_command(run_train, argv, "train.py")


def sample(argv: Sequence[str] | None = None) -> int:
    """`python sample.py`, `debias-sample`: returns the exit code."""
    return _run_command(run_sample, argv, "sample.py")


def evaluate(argv: Sequence[str] | None = None) -> int:
    """`python eval.py`, `debias-eval`: returns the exit code."""
    return _run_command(run_evaluate, argv, "eval.py")


def convert(argv: Sequence[str] | None = None) -> int:
    """`python -m debias_diffusers.convert`: returns the exit code."""
    return _run_command(run_convert, argv, "python -m debias_diffusers.convert")


def push(argv: Sequence[str] | None = None) -> int:
    """`python -m debias_diffusers.hub`: returns the exit code."""
    return _run_command(run_hub, argv, "python -m debias_diffusers.hub")


def ema(argv: Sequence[str] | None = None) -> int:
    """`python -m debias_diffusers.ema`: returns the exit code."""
    return _run_command(run_ema, argv, "python -m debias_diffusers.ema")


def cache(argv: Sequence[str] | None = None) -> int:
    """`python -m debias_diffusers.cache`, `accelerate launch -m debias_diffusers.cache`: returns the exit code."""
    return _run_command(run_cache, argv, "python -m debias_diffusers.cache")


def play(argv: Sequence[str] | None = None) -> int:
    """`python -m debias_diffusers.play`: returns the exit code."""
    return _run_command(run_play, argv, "python -m debias_diffusers.play")


def shards(argv: Sequence[str] | None = None) -> int:
    """`python -m debias_diffusers.shards`: returns the exit code."""
    return _run_command(run_shards, argv, "python -m debias_diffusers.shards")


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


def _main(argv: list[str], program: str) -> None:
    commands = {"train": run_train, "sample": run_sample, "eval": run_evaluate, "convert": run_convert, "hub": run_hub}
    commands |= {"cache": run_cache, "ema": run_ema, "play": run_play, "shards": run_shards}
    dispatch(commands, HELP, argv, program)


def _run_command(main: Command, argv: Sequence[str] | None, program: str) -> int:
    """Runs a command and returns its exit code. Prints a DebiasError as the last line.

    Errors of the configuration, which all processes find, are printed by the first process only, as is that a signal stopped them all; a
    later error by its own process.

    Args:
        main: the command.
        argv: its arguments; those of the process if None.
        program: its name where it was not called from a shell.
    """
    console.ignore_stream_errors()
    _wait_for_threads_briefly()
    alone = True  # whether a process may have met this without the others
    try:
        if argv is None:
            argv, program = sys.argv[1:], _called(sys.argv[0], program)
            text_libraries.hide()  # of a process of its own: pixel models do not wait for them
        if "--version" in argv:
            print(f"debias_diffusers {__version__}")
            return 0
        main([at_home(argument) for argument in argv], program)
    except DebiasError as error:
        sentence, code, alone = str(error), error.exit_code, not isinstance(error, StoppedError)
    except OSError as error:  # for example, a path that is too long or not permitted
        sentence, code = f"{error.filename or 'a file'}: {error.strerror or error}", InputError.exit_code
    except KeyboardInterrupt:
        sentence, code, alone = "interrupted", 128 + signal.SIGINT, False
    except SystemExit as done:  # 0 for --help; else of a process that lets the first process print the error
        if done.code and _outlives_the_first() and isinstance(done.__cause__, DebiasError):
            console.say(f"error: {done.__cause__}")
        return int(done.code or 0)
    else:
        return 0
    if launcher.is_first_process() or (alone and ("torch" in sys.modules or _outlives_the_first())):
        console.say(f"error: {sentence}")
    return code


def _wait_for_threads_briefly() -> None:
    """Has GNU's OpenMP, as torch is built with, put threads to sleep that wait for others, unless the environment says how they wait.

    By default they wait at full speed for some milliseconds at each operation, and take the cores from those that they wait for where
    another process needs one. Read when torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _called(script: str, program: str) -> str:
    """The name under which a script was called; `program` for `python -m`, whose script is a `__main__.py`."""
    return program if Path(script).name == "__main__.py" else Path(script).name


def _outlives_the_first() -> bool:
    """Waits until the first process has printed its error: a launcher kills all processes as soon as one has failed.

    Returns:
        Whether this one is still there after that, so that the first has not failed.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    time.sleep(ERROR_GRACE_SECONDS)
    return True
