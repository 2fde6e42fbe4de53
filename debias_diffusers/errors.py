"""What can go wrong, as few kinds of error, each with the exit code that the command line returns for it."""

from collections.abc import Iterable


class DebiasError(Exception):
    """Base of all errors that are said in a sentence instead of a traceback."""

    exit_code = 1


class InputError(DebiasError):
    """The configuration, a file or a data set cannot be used as given."""

    exit_code = 2


class RunInUseError(DebiasError):
    """Another process trains in the same run directory."""

    exit_code = 3


class CannotWriteError(DebiasError):
    """A file could not be written: disk full, read-only or not permitted."""

    exit_code = 4


class NotFiniteError(DebiasError):
    """A loss or gradient became NaN or infinite; the update was not made."""

    exit_code = 5


class NoUsableCheckpointError(DebiasError):
    """There are checkpoints, but every one of them is damaged."""

    exit_code = 6


class HubError(DebiasError):
    """The Hub refuses something, or cannot be reached; what is on this disk is complete."""

    exit_code = 7


class StoppedError(DebiasError):
    """A signal asked the run to stop; it saved first. The exit code is the shell's: 128 + signal."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


def reason(error: BaseException) -> str:
    """What an error of a library says, on one line; its kind where it says nothing."""
    return shortened(str(error)) or type(error).__name__


def shortened(text: str) -> str:
    """On one line, and no longer than a reader will read."""
    return " ".join(text.split())[:400]


def raise_all(problems: Iterable[str], where: str = "configuration") -> None:
    """Raises one InputError that lists all problems; does nothing where there are none."""
    problems = list(problems)
    if len(problems) == 1:
        raise InputError(f"{where}: {problems[0]}")
    if problems:
        raise InputError(f"{where}: {len(problems)} problems\n" + "\n".join(f"  - {problem}" for problem in problems))
