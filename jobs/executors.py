"""Where the analysis runs: in the job's own thread, or in a child process kept warm for many jobs.

The runner decides when a job has timed out or was canceled, moves it, and then tells the executor
to stop it; the ending that still comes for that job is ignored. The third executor, for a Dask
cluster, is in `jobs/dask_executor.py`.
"""

import contextlib
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from typing import Protocol

from jobs import analysis, cores, errors, model
from jobs.analysis import Analyze, Progress, Report

#: How long a thread keeps the interpreter while others want it, in seconds. The 5 ms that Python
#: has by default make each answer wait 5 ms for each analysis (see bench/executors.py).
SWITCH_SECONDS = 0.0002

#: Each thread that waits for the interpreter asks for it once in that time. With more analyses than
#: this the time grows with them, or thousands that end together do nothing but ask.
CROWD = 8

#: Seconds until a worker that would not start is tried again.
RETRY_SECONDS = 1.0

#: What a worker is told to run. It finds modules where the service does, and only there.
_BOOT = (
    "import sys; arguments = [int(text) for text in sys.argv[1:3]]; sys.path[:] = sys.argv[3:]; "
    "del sys.argv[1:]; from jobs import worker; worker.serve(*arguments)"
)

log = logging.getLogger("postback")

#: Returns the analysis of a name such as `package.module:function`, or raises ConfigError.
Load = Callable[[str], Analyze]


class Executor(Protocol):
    """What the runner and the service ask of an executor.

    Every method may be called from any thread; `start` first, and `close` last.
    """

    def start(self) -> None:
        """Get ready to run.

        Raises:
            ConfigError: The analysis cannot be run here.
        """

    def run(self, job_id: str, body: bytes, report: Report) -> model.Ending:
        """Return how the analysis of a payload ends. Whatever happens, nothing is raised.

        Args:
            body: The payload as it was accepted.
            report: Is given what the analysis tells of its progress.
        """

    def stop(self, job_id: str) -> bool:
        """End the analysis of a job whose outcome is decided; return False if that cannot be."""

    def failure(self) -> str | None:
        """Return why no analysis can run now; None when one can."""

    def close(self) -> None:
        """End what still runs, without waiting for it."""


class ThreadExecutor:
    """Runs the analysis in the job's own thread: starts at once, shares memory, cannot be ended."""

    def __init__(self, analyze: Analyze) -> None:
        self._analyze = cores.Roaming(analysis.with_progress(analyze))
        self._running: set[str] = set()

    def start(self) -> None:
        """Have Python change threads more often, so that an analysis does not hold up answers."""
        self._give_way()

    def run(self, job_id: str, body: bytes, report: Report) -> model.Ending:
        """Return how the analysis of a payload ends."""
        self._running.add(job_id)
        self._give_way()
        try:
            return analysis.run(self._analyze, body, report)
        finally:
            self._running.discard(job_id)
            self._give_way()

    def stop(self, job_id: str) -> bool:
        """Do nothing: a thread cannot be ended. It keeps its place until its analysis returns."""
        return job_id not in self._running

    def failure(self) -> None:
        """Return None: there is always a thread."""

    def close(self) -> None:
        """Do nothing: the threads end with the process."""

    def _give_way(self) -> None:
        sys.setswitchinterval(SWITCH_SECONDS * max(1.0, len(self._running) / CROWD))


class ProcessExecutor:
    """Runs the analysis in one of a few child processes, each kept warm from job to job.

    A worker has a connection of its own and serves one job at a time. So whatever ends it, at
    whatever moment, ends that job alone: workers share neither a queue nor a lock.
    """

    def __init__(self, load: Load, name: str, *, workers: int) -> None:
        self._load = load
        self._name = name
        self._count = workers
        self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()  # None: closed
        self._wanted = threading.Semaphore(0)  # counts the workers to be started
        self._lock = threading.Lock()  # guards what follows
        self._alive: set[_Worker] = set()
        self._running: dict[str, _Worker] = {}
        self._closed = threading.Event()
        self._failure: str | None = None

    def start(self) -> None:
        """Start the workers, and wait until one of them has loaded the analysis.

        Raises:
            ConfigError: It cannot be loaded.
        """
        threading.Thread(target=self._start_wanted, name="workers", daemon=True).start()
        self._wanted.release(self._count)
        worker = self._idle.get()
        if worker and (problems := self._problems(worker)):
            self.close()
            raise errors.ConfigError(problems)
        self._idle.put(worker)

    def run(self, job_id: str, body: bytes, report: Report) -> model.Ending:
        """Return how the analysis of a payload ends, or how it ended its process."""
        worker = self._take(job_id)
        if worker is None:  # the service stops: the job is put back
            return model.canceled()
        try:
            return worker.analyze(job_id, body, report)
        except Exception:  # noqa: BLE001 - the connection fails in many ways, all mean the same
            return model.crashed(f"The analysis ended its process: {worker.end()}.")
        finally:
            self._give_back(job_id, worker)

    def stop(self, job_id: str) -> bool:
        """Kill the worker of a job, whatever it is doing; another one takes its place."""
        with self._lock:
            if worker := self._running.get(job_id):
                worker.kill()
        return True

    def failure(self) -> str | None:
        """Return why no worker can be started; None when one can."""
        return self._failure

    def close(self) -> None:
        """Kill all workers."""
        self._closed.set()
        self._wanted.release()
        self._idle.put(None)
        with self._lock:
            workers, self._alive = self._alive, set()
        for worker in workers:
            worker.end()

    def _problems(self, worker: "_Worker") -> Sequence[str]:
        try:
            return worker.problems()
        except (EOFError, OSError):
            return [f"ANALYSIS={self._name!r}: loading it ended the process: {worker.end()}"]

    def _take(self, job_id: str) -> "_Worker | None":
        while worker := self._idle.get():
            with self._lock:
                self._running[job_id] = worker
            if not worker.has_ended:
                return worker
            self._give_back(job_id, worker)  # something ended it while it was idle
        self._idle.put(None)  # for the next one
        return None

    def _give_back(self, job_id: str, worker: "_Worker") -> None:
        with self._lock:
            del self._running[job_id]
        if not worker.has_ended:
            self._idle.put(worker)
            return
        worker.end()
        with self._lock:
            self._alive.discard(worker)
        self._wanted.release()

    def _start_wanted(self) -> None:
        """Start workers, all from this thread: the kernel kills them when the thread ends."""
        while self._wanted.acquire() and not self._closed.is_set():
            while not self._start_worker():
                self._closed.wait(RETRY_SECONDS)

    def _start_worker(self) -> bool:
        try:
            worker = _Worker(self._load, self._name)
        except OSError as exc:  # a limit of the machine
            if self._failure is None:
                log.warning("worker failed to start", extra={"error": str(exc)})
            self._failure = f"No worker can be started: {exc}."
            return False
        self._failure = None
        with self._lock:
            self._alive.add(worker)
        if self._closed.is_set():  # nobody else would end it
            worker.end()
        self._idle.put(worker)
        return True


class _Worker:
    """A child process and the connection to it; one thread at a time talks to it."""

    def __init__(self, load: Load, name: str) -> None:
        self._connection, there = Pipe()
        with there:
            numbers = map(str, (there.fileno(), os.getpid()))
            self._process = subprocess.Popen(  # noqa: S603 - our own
                [sys.executable, "-P", "-c", _BOOT, *numbers, *sys.path],
                stdin=subprocess.DEVNULL,
                pass_fds=[there.fileno()],
                start_new_session=True,  # a terminal's Ctrl-C is not for it
            )
        self._killed = False
        self._problems: Sequence[str] | None = None
        with contextlib.suppress(OSError):  # it has ended already, and whoever takes it will see
            self._connection.send((load, name))

    @property
    def has_ended(self) -> bool:
        """Whether it cannot serve another job."""
        return self._killed or self._process.poll() is not None

    def problems(self) -> Sequence[str]:
        """Return why the analysis cannot be loaded, as lines; raise when it ends the process."""
        if self._problems is None:
            self._problems = self._connection.recv()
        return self._problems or ()

    def analyze(self, job_id: str, body: bytes, report: Report) -> model.Ending:
        """Return how the analysis ends; raise when it ends the process."""
        if problems := self.problems():
            return model.failed(errors.ConfigError(problems))
        self._connection.send((job_id, body))
        while True:
            told_id, told = self._connection.recv()
            if isinstance(told, model.Ending):
                return told
            if isinstance(told, Progress) and told_id == job_id:  # not a thread left by another job
                report(told)

    def kill(self) -> None:
        """Kill it and all that it started."""
        if not self._killed and self._process.returncode is None:  # its id is still its own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._killed = True

    def end(self) -> str:
        """Kill what is left, and return how it ended."""
        self.kill()
        code = self._process.wait()
        return f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit code {code}"
