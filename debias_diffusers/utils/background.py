"""A background thread that runs one function at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

T = TypeVar("T")


class BackgroundTask(Generic[T]):
    """Runs one function at a time in a background thread; the caller asks for the result later.

    As a context manager, it waits for the running function at the end and raises its error, unless another error is being raised.
    """

    def __init__(self) -> None:
        self._future: Future[T] | None = None

    def start(self, work: Callable[[], T], in_background: bool = True) -> None:
        """Starts `work`. Without `in_background`, waits until it is done. The result of the previous call must have been taken."""
        assert self._future is None
        # A new thread for each call, so that no idle thread exists when the process forks or ends.
        pool = ThreadPoolExecutor(1)
        self._future = pool.submit(work)
        pool.shutdown(wait=not in_background)

    def result(self) -> T | None:
        """Waits for the function and returns its result, once; None if none was started. Raises the error that the function raised."""
        future, self._future = self._future, None
        return future.result() if future else None

    def check(self) -> None:
        """Raises the function's error if it has failed; does not wait."""
        if self._future and self._future.done() and self._future.exception():
            self.result()

    def __enter__(self) -> BackgroundTask[T]:
        return self

    def __exit__(self, error: object = None, *_: object) -> None:
        if not error:
            self.result()
        elif self._future:  # the first error is the cause; a failure of the function may be its consequence
            wait([self._future])
