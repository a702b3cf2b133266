"""Where the analysis runs: in worker processes, one with many threads or many with one job each.

The service's own process never runs the user's code. Each job has a connection of its own to a
worker, and the job's own thread talks over it (see jobs/worker.py). The kernel tells when a worker
has ended. The end of a connection does not, because a grandchild may hold it open.

A worker that still runs a job whose outcome was decided elsewhere (timed out, canceled) is stale.
Another one is loaded in its place, and it is killed as soon as no other job needs it.
"""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

from jobs import errors, model, worker

#: A result of more bytes counts as large. So many large ones are held in memory at once.
LARGE_BYTES, MAX_LARGE = 1024**2, 2

#: Seconds between log lines while the first worker loads.
LOADING_SECONDS = 10.0

#: Seconds until a worker is started again that could not load, at first and at most.
RETRY_SECONDS, MAX_RETRY_SECONDS = 1.0, 60.0

#: Seconds until a job runs again that could not begin.
PAUSE_SECONDS = 1.0

#: Seconds between the end of a connection and the news that its worker has ended, at most.
NEWS_SECONDS = 0.5

#: Signals that ask a process to end. The analysis that ran in it is not to blame.
POLITE = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})

#: Seconds that `close` waits for the workers to end.
CLOSE_SECONDS = 1.0

log = logging.getLogger("postback")


class Listener(NamedTuple):
    """What is called while an analysis runs, by the thread that called `run`.

    Attributes:
        started: The payload goes to a worker that is ready. The time limit counts from here.
        progressed: Is given a fraction and a note.
        kept: Is given JSON text, and returns when it is on disk. A Refusal that it raises becomes
            a RuntimeError in the analysis.
    """

    started: Callable[[], None]
    progressed: Callable[[float, str], None]
    kept: Callable[[str], None]


@dataclass(eq=False, slots=True)
class _Worker:
    """A worker process, from the wish to have one until it has ended.

    Attributes:
        slots: How many jobs it may run at once.
        runs: The jobs in it. A stopped one stays, since its thread may run for ever.
        is_ready: It has loaded the analysis, and it lives.
        is_stale: It does not count as one of the workers that there should be.
        control: Takes the connections of jobs.
        pid: Its process and its process group; None before there is one.
        code: Its exit code, negative for a signal; None until it has ended.
        suspects: How many jobs were in it when it ended.
        refusal: Why the analysis could not be loaded.
    """

    slots: int
    runs: "set[_Run]" = field(default_factory=set)
    is_ready: bool = False
    is_stale: bool = False
    control: socket.socket = field(init=False)
    pid: int | None = None
    code: int | None = None
    suspects: int = 0
    refusal: str | None = None

    @property
    def is_needed(self) -> bool:
        """Whether a job in it may still end well. One that has not begun can begin elsewhere."""
        begun = (run for run in self.runs if run.has_begun or self.slots == 1)
        return not all(run.is_stopped for run in begun)

    def kill(self) -> None:
        """Kill it and what it started, but not when its id may be another's already."""
        if self.pid and self.code is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)


@dataclass(eq=False, slots=True)
class _Run:
    """One job, from the call of `run` until its ending is known.

    Attributes:
        worker: Where it runs; None before.
        has_begun: The worker has said so, and from then on the job may be what ends it.
        is_stopped: Its outcome was decided elsewhere.
        is_large: Its result counts as large, and is held.
    """

    job: model.Job
    worker: _Worker | None = None
    connection: socket.socket | None = None
    has_begun: bool = False
    is_stopped: bool = False
    is_large: bool = False

    def hang_up(self) -> None:
        """Wake the thread that waits for the worker. What was sent already can still be read."""
        if self.connection:
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)


class WorkerExecutor:
    """Runs analyses in worker processes. Its methods may be called from any thread.

    Args:
        analysis: The user's function, as `package.module:function`.
        workers: How many processes, with one job each; None for one process with many jobs.
        log_level: Of what the analysis logs.
        on_change: Is called when `free` or `failure` may have changed.
    """

    def __init__(
        self, *, analysis: str, workers: int | None, log_level: str, on_change: Callable[[], None]
    ) -> None:
        self._arguments = (log_level, analysis)
        self._count = workers or 1
        self._slots = 1 if workers else sys.maxsize
        self._on_change = on_change
        self._permits = threading.BoundedSemaphore(MAX_LARGE)
        self._runs: dict[str, _Run] = {}
        # Guards what follows and all records. The condition tells each change that is waited for.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._workers: list[_Worker] = []
        self._is_started = self._is_draining = False
        self._is_closed = False

    def start(self) -> None:
        """Start the workers, and return when the first one is ready.

        Raises:
            ConfigError: It cannot load the analysis.
        """
        with self._lock:
            self._fill()
            seconds = 0.0
            while not self._changed.wait_for(self._has_tried, LOADING_SECONDS):
                seconds += LOADING_SECONDS
                log.info("analysis loading", extra={"seconds": seconds})
        if problem := self.failure():
            self.close()
            raise errors.ConfigError([problem])
        self._is_started = True

    def free(self) -> int:
        """Return how many jobs can be given to workers that are ready."""
        with self._lock:
            return min(sum(one.slots - len(one.runs) for one in self._serving()), sys.maxsize)

    def failure(self) -> str | None:
        """Return why no analysis can run now; None when one can."""
        with self._lock:
            if self._serving():
                return None
            refusals = (one.refusal for one in self._workers if one.refusal)
            return next(refusals, "No worker has loaded the analysis yet.")

    @contextmanager
    def run(
        self, job: model.Job, body: bytes, *, kept: str | None, listener: Listener
    ) -> Iterator[model.Ending | model.Again | None]:
        """Run an analysis, and yield how it ended; None when it was stopped.

        A large result counts as held as long as the block runs, and others wait for that.

        Args:
            job: If `alone`, it gets a fresh worker for itself.
            body: The payload as it was accepted.
            kept: The JSON text that the job kept last.
            listener: Is told what happens until the ending.
        """
        facts = {"id": job.id, "start": max(job.starts, 1), "metadata": job.metadata, "kept": kept}
        run = self._runs[job.id] = _Run(job)
        try:
            try:
                ending = self._run(run, worker.pack(facts, body), listener)
            except OSError:  # of a socket
                ending = self._explain(run)
            except BaseException:  # of the listener: the analysis goes on, and nobody waits for it
                self.stop(job.id)
                raise
            finally:
                self._leave(run)
            yield None if run.is_stopped else ending
        finally:
            if run.is_large:
                self._permits.release()

    def stop(self, job_id: str) -> None:
        """Give up a job whose outcome was decided elsewhere: `run` yields None."""
        with self._lock:
            if run := self._runs.get(job_id):
                run.is_stopped = True
                run.hang_up()
                if one := run.worker:
                    log.info("worker retired", extra={"pid": one.pid, "job_id": job_id})
                    one.is_stale = True
                    with suppress(OSError):  # the stale one serves until there is another one
                        self._fill()
                    self._retire(one)
                self._changed.notify_all()

    def drain(self) -> None:
        """From now on, blame no job for the end of its worker, and start no other."""
        with self._lock:
            self._is_draining = True
            self._changed.notify_all()

    def close(self) -> None:
        """Kill all workers."""
        with self._lock:
            self._is_draining = self._is_closed = True
            for one in self._workers:
                one.kill()
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._workers, CLOSE_SECONDS)

    # A job's thread

    def _run(
        self, run: _Run, payload: bytes, listener: Listener
    ) -> model.Ending | model.Again | None:
        one = self._take(run)
        if one is None:
            return model.Again()
        run.connection, theirs = socket.socketpair()
        with theirs:
            listener.started()  # first, because a worker that is busy may take long to receive
            socket.send_fds(one.control, [b"j"], [theirs.fileno()])
        if run.is_stopped:
            return None
        run.connection.sendall(payload)
        return self._listen(run, run.connection, listener) or self._explain(run)

    def _take(self, run: _Run) -> _Worker | None:
        """Return a worker with a slot for a job, as soon as there is one; None to give up."""
        with self._lock:
            if run.job.alone and not self._is_over(run):
                # It is full, so nobody else gets it, and stale, so nobody else counts on it.
                run.worker = _Worker(slots=1, runs={run}, is_stale=True)
                self._start_soon(run.worker)
            self._changed.wait_for(lambda: self._is_over(run) or self._has_slot(run))
            return None if self._is_over(run) else run.worker

    def _is_over(self, run: _Run) -> bool:
        return run.is_stopped or self._is_draining

    def _has_slot(self, run: _Run) -> bool:
        if run.worker is None:
            free = (one for one in self._serving() if len(one.runs) < one.slots)
            run.worker = min(free, key=lambda one: one.is_stale, default=None)
            if run.worker:
                run.worker.runs.add(run)
        return run.worker is not None and run.worker.is_ready

    def _listen(
        self, run: _Run, connection: socket.socket, listener: Listener
    ) -> model.Ending | None:
        """Return how the analysis ended; None when the connection ended before that."""
        run.has_begun = connection.recv(1) == worker.START
        while len(head := worker.exactly(connection, worker.FRAME.size)) == worker.FRAME.size:
            kind, length = worker.FRAME.unpack(head)
            if kind == worker.RESULT and length > LARGE_BYTES:
                run.is_large = self._permits.acquire()
            payload = worker.exactly(connection, length)
            if len(payload) < length:
                break
            if kind in (worker.RESULT, worker.ERROR):
                return ending_of(kind, payload)
            _hear(connection, payload, listener)
        return None

    def _explain(self, run: _Run) -> model.Ending | model.Again | None:
        """Return what follows from a connection that ended before the analysis did."""
        with self._lock:
            one = run.worker
            if run.is_stopped or one is None or not run.has_begun:
                return model.Again(pause_seconds=PAUSE_SECONDS)
            if not self._changed.wait_for(lambda: one.code is not None, NEWS_SECONDS):
                one.kill()  # the analysis has closed the connection
                self._changed.wait_for(lambda: one.code is not None)
            if self._is_draining:
                return model.Again()
            if not run.job.alone and (-(one.code or 0) in POLITE or one.suspects > 1):
                return model.Again(is_alone=True)
            return model.crashed(f"The analysis ended its process: {_how(one.code)}.")

    def _leave(self, run: _Run) -> None:
        if run.connection:
            run.connection.close()
        with self._lock:
            del self._runs[run.job.id]  # from now on, to stop it does nothing
            if one := run.worker:
                if not run.is_stopped:
                    one.runs.discard(run)
                self._retire(one)
                self._changed.notify_all()
        if self._slots == 1:
            self._on_change()

    # With the lock held

    def _serving(self) -> list[_Worker]:
        """Return the workers that may be given a job when they have a free slot."""
        ready = (one for one in self._workers if one.is_ready)
        return [one for one in ready if one.slots > 1 or not one.is_stale]

    def _has_tried(self) -> bool:
        return any(one.is_ready or one.refusal for one in self._workers)

    def _is_unwanted(self, one: _Worker) -> bool:
        return self._is_closed or (one.is_stale and not one.is_needed)

    def _fill(self) -> None:
        """Start as many workers as are missing."""
        for _ in range(sum(not one.is_stale for one in self._workers), self._count):
            self._start_soon(_Worker(self._slots))

    def _start_soon(self, one: _Worker) -> None:
        try:
            threading.Thread(target=self._keep, args=(one,), name="worker", daemon=True).start()
        except (RuntimeError, MemoryError) as exc:  # there are too many threads
            raise OSError(str(exc)) from exc
        self._workers.append(one)

    def _retire(self, one: _Worker) -> None:
        """Kill a stale worker that no job needs, once there is another one for new jobs."""
        if not one.is_stale or one.is_needed:
            return
        if one.slots == 1 or any(not other.is_stale for other in self._serving()):
            one.kill()

    # A worker's thread

    def _keep(self, one: _Worker) -> None:
        """Have a worker as long as one is wanted."""
        seconds = RETRY_SECONDS
        while not self._is_unwanted(one):
            has_served = self._live(one)
            with self._lock:
                if not has_served:
                    self._changed.wait_for(partial(self._is_unwanted, one), seconds)
                    seconds = min(2 * seconds, MAX_RETRY_SECONDS)
                elif one.is_stale and sum(not it.is_stale for it in self._workers) >= self._count:
                    break
                else:
                    self._workers.remove(one)
                    one, seconds = _Worker(self._slots), RETRY_SECONDS
                    self._workers.append(one)
        with self._lock:
            self._workers.remove(one)
            self._changed.notify_all()

    def _live(self, one: _Worker) -> bool:
        """Start a worker's process, wait for its end, and return whether it was of any use."""
        try:
            process, control = self._start_process()
        except (OSError, MemoryError) as exc:
            self._tell(one, f"No worker can be started: {exc}.")
            return False
        with process, control, control.makefile("rb") as lines:
            with self._lock:
                one.control, one.pid, one.code = control, process.pid, None
                if self._is_unwanted(one):
                    one.kill()
            line = lines.readline()
            ready_at = time.monotonic()
            if is_ready := line == worker.READY:
                self._tell(one, None)
            else:
                one.kill()
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            one.kill()  # and what it started, while its id cannot be another's
            code = process.wait()
        self._bury(one, code)
        if is_ready:
            level = logging.INFO if one.is_stale or self._is_draining else logging.WARNING
            log.log(level, "worker ended", extra={"pid": one.pid, "ending": _how(code)})
            self._on_change()
        elif not self._is_unwanted(one):
            problem = line.decode().strip() or f"loading it ended its process: {_how(code)}"
            self._tell(one, f"ANALYSIS={self._arguments[-1]!r}: {problem}")
        return is_ready and (bool(one.suspects) or time.monotonic() - ready_at > RETRY_SECONDS)

    def _start_process(self) -> tuple["subprocess.Popen[bytes]", socket.socket]:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-P", "-X", "faulthandler", worker.__file__]
        with theirs:
            process = subprocess.Popen(  # noqa: S603 - our own
                [*command, str(theirs.fileno()), *self._arguments],
                stdin=subprocess.PIPE,  # its end tells the worker that the service has ended
                stdout=2,
                stderr=2,  # also when it is the null device, which is not inherited by itself
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a terminal's Ctrl-C is not for it
            )
        return process, ours

    def _tell(self, one: _Worker, refusal: str | None) -> None:
        with self._lock:
            one.refusal, one.is_ready = refusal, refusal is None
            for other in self._workers:
                self._retire(other)
            self._changed.notify_all()
        if refusal and self._is_started:  # else `start` raises it
            log.warning("worker refused", extra={"error": refusal})
        elif not refusal:
            log.info("worker ready", extra={"pid": one.pid})
        self._on_change()

    def _bury(self, one: _Worker, code: int) -> None:
        """Wake the jobs that were in a worker."""
        with self._lock:
            one.is_ready, one.code, one.suspects = False, code, len(one.runs)
            for run in one.runs:
                run.hang_up()
            self._changed.notify_all()


def _how(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    return f"signal {-code} ({signal.strsignal(-code)})"


def _hear(connection: socket.socket, payload: bytes, listener: Listener) -> None:
    """Pass on progress, and what is to be kept if there is such a thing."""
    report, _, kept = payload.partition(b"\n")
    if kept:
        problem = ""
        try:
            listener.kept(kept.decode())
        except errors.Refusal as exc:
            problem = exc.detail
        worker.send(connection, worker.KEPT, problem.encode())
    listener.progressed(*json.loads(report))


def ending_of(kind: bytes, payload: bytes) -> model.Ending:
    """Return what a RESULT or an ERROR frame says."""
    if kind == worker.RESULT:
        return model.Ending(outcome=model.Outcome.SUCCEEDED, result=payload)
    facts = json.loads(payload)
    ending = model.without_result(model.Outcome.FAILED, facts["kind"], facts["message"])
    frames, may_run_again = tuple(facts["frames"]), facts["may_run_again"]
    return replace(ending, frames=frames, may_run_again=may_run_again)
