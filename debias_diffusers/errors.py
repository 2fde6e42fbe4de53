"""The exceptions of this package, each with the exit code of the command line, and helpers for messages."""

from collections.abc import Iterable


class DebiasError(Exception):
    """Base of all errors that are printed as one sentence instead of a traceback."""

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
    """A loss or gradient became NaN or infinite; the optimizer step was not made."""

    exit_code = 5


class NoUsableCheckpointError(DebiasError):
    """There are checkpoints, but every one of them is damaged."""

    exit_code = 6


class HubError(DebiasError):
    """The Hub rejects a request or cannot be reached; the local files are complete."""

    exit_code = 7


class FetchError(HubError):
    """A file of the data cannot be fetched: its server refuses or cannot be reached, or the file has changed there."""


class StoppedError(DebiasError):
    """A signal asked the run to stop, and it has saved. The exit code is that of a shell: 128 + signal."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


def reason(error: BaseException) -> str:
    """The message of a library's error on one line; its type if the message is empty."""
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{error.filename} does not exist"
    return shortened(str(error)) or type(error).__name__


def no_client(error: BaseException) -> str:
    """The message of a library that cannot make an HTTP client, before anything is asked for: the environment says with what."""
    return f"no connection can be made as the environment has it (HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE and such): {reason(error)}"


def shortened(text: str) -> str:
    """A text on one line, cut to 400 characters."""
    return " ".join(text.split())[:400]


def raise_all(problems: Iterable[str], where: str = "configuration", remedy: str = "") -> None:
    """Raises one InputError that lists all problems, and one remedy for them; does nothing if there are none."""
    problems = list(problems)
    if len(problems) == 1:
        raise InputError(f"{where}: {problems[0]}" + (f"; {remedy}" if remedy else ""))
    if problems:
        lines = [f"{where}: {len(problems)} problems", *(f"  - {problem}" for problem in problems), *([remedy] if remedy else [])]
        raise InputError("\n".join(lines))
