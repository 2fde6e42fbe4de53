"""One piece of work at a time beside the training."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

T = TypeVar("T")


class BackgroundTask(Generic[T]):
    """Does a piece of work in a thread, whose result is asked for later.

    As a context, it ends when the work under way is done, and raises what that raised unless another error is raised already.
    """

    def __init__(self) -> None:
        self._future: Future[T] | None = None

    def start(self, work: Callable[[], T], beside: bool = True) -> None:
        """Begins; without `beside` it is done before this returns. The result of the work before must have been asked for."""
        assert self._future is None
        # A thread for each, so that none waits for work when the process forks or ends.
        pool = ThreadPoolExecutor(1)
        self._future = pool.submit(work)
        pool.shutdown(wait=not beside)

    def result(self) -> T | None:
        """What the work returned, once; None where there was none. Raises what it raised."""
        future, self._future = self._future, None
        return future.result() if future else None

    def check(self) -> None:
        """Raises what the work raised, if it has already."""
        if self._future and self._future.done() and self._future.exception():
            self.result()

    def wait(self) -> None:
        """Waits until no work is under way."""
        if self._future:
            wait([self._future])

    def __enter__(self) -> BackgroundTask[T]:
        return self

    def __exit__(self, error: object = None, *_: object) -> None:
        if error:  # which says more about the end than what it did to the work
            self.wait()
        else:
            self.result()
