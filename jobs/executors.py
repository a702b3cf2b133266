"""Where the analysis runs. An executor is handed a value and returns the result, or raises.

The runner decides when a job has timed out or was canceled, moves it, and then tells the executor
to stop it; what the executor still returns or raises for that job is ignored.
"""

from collections.abc import Callable
from typing import Any, Protocol


class Executor(Protocol):
    """What the runner asks of an executor. Every method may be called from any thread."""

    def run(self, job_id: str, data: Any) -> Any:
        """Return what the analysis returns for `data`, or raise what it raises."""

    def stop(self, job_id: str) -> None:
        """End the analysis of a job whose outcome is decided, where that can be done."""


class ThreadExecutor:
    """Runs the analysis in the job's own thread: starts at once, shares memory, cannot be ended."""

    def __init__(self, analyze: Callable[[Any], Any]) -> None:
        self._analyze = analyze

    def run(self, job_id: str, data: Any) -> Any:  # noqa: ARG002 - the thread has the job's name
        """Return what the analysis returns for `data`, or raise what it raises."""
        return self._analyze(data)

    def stop(self, job_id: str) -> None:
        """Do nothing: a thread cannot be ended. It keeps its place until its analysis returns."""
