"""Where the analysis runs: in worker processes, one with many threads or many with one job each.

The service's own process never runs the user's code. Each job has a connection of its own to a
worker, and the job's own thread talks over it (see jobs/worker.py). The kernel tells when a worker
has ended. The end of a connection does not, because a grandchild may hold it open.

A worker is stale when it can take no more jobs, or still runs one whose outcome was decided
elsewhere (timed out, canceled). Another one is loaded in its place, and it is killed as soon as no
other job needs it.
"""

import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from jobs import errors, model, worker

#: A result of more bytes counts as large. So many large ones are held in memory at once.
LARGE_BYTES, MAX_LARGE = 1024**2, 2

#: A large result is given up after so long without a byte. The kernel reads seconds and
#: microseconds.
RESULT_TIMEOUT = struct.pack("ll", 60, 0)

#: Seconds between log lines while the first worker loads.
LOADING_SECONDS = 10.0

#: Seconds until a worker is started again that could not load, at first and at most.
RETRY_SECONDS, MAX_RETRY_SECONDS = 1.0, 60.0

#: Seconds until a job runs again that could not begin.
PAUSE_SECONDS = 1.0

#: Signals that ask a process to end. The analysis that ran in it is not to blame.
POLITE = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})

#: Seconds until the news that the service is to stop, after a worker was asked to end, at most.
STOP_SECONDS = 0.5

#: Seconds until the end of a worker is told, at most.
TOLD_SECONDS = 0.1

#: Seconds that `close` waits for the workers to end.
CLOSE_SECONDS = 1.0

log = logging.getLogger("postback")


class Listener(NamedTuple):
    """What is called while an analysis runs, by the thread that called `run`.

    Attributes:
        started: The payload goes to a worker that is ready. The time limit counts from here.
        ended: The analysis has ended, but its result may wait for others. The limit counts no more.
            DaskExecutor does not call it, because no result waits there.
        progressed: Is given a fraction and a note.
        kept: Is given JSON text, and returns when it is on disk. A Refusal that it raises becomes
            a RuntimeError in the analysis.
    """

    started: Callable[[], None]
    ended: Callable[[], None]
    progressed: Callable[[float, str], None]
    kept: Callable[[str], None]


@dataclass(eq=False, slots=True)
class _Worker:
    """One worker process, from the wish to have it until it has ended.

    Attributes:
        slots: How many jobs at once it is given; 0 when a job has it for itself.
        runs: The jobs in it, or those that were in it when it ended. A stopped one stays, since its
            thread may run for ever.
        is_stale: It gets no new job once another one serves, and ends when no job needs it.
        pid: Its process and its process group; None before there is one.
        control: Takes the connections of jobs; None before it has loaded the analysis.
        code: Its exit code, negative for a signal; None until it has ended.
    """

    slots: int
    runs: "set[_Run]" = field(default_factory=set)
    is_stale: bool = False
    pid: int | None = None
    control: socket.socket | None = None
    code: int | None = None

    @property
    def is_needed(self) -> bool:
        """Whether a job in it may still end well. One that has not begun can begin elsewhere."""
        bound = (run for run in self.runs if run.has_begun or run.job.alone)
        return not all(run.is_stopped for run in bound)

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
        self._workers: list[_Worker] = []  # the newest first, since others may be stale
        self._refusal: str | None = None  # why the analysis could not be loaded last
        self._is_started = self._is_draining = False
        self._closed = threading.Event()

    def start(self) -> None:
        """Start the workers, and return when the first one is ready.

        Raises:
            ConfigError: It cannot load the analysis.
        """
        with self._lock:
            for _ in range(self._count):
                _start_thread(self._keep)
            seconds = 0.0
            while not (self._serving() or self._refusal):
                if not self._changed.wait(LOADING_SECONDS):
                    seconds += LOADING_SECONDS
                    log.info("analysis loading", extra={"seconds": seconds})
        if problem := self.failure():
            self.close()
            raise errors.ConfigError([problem])
        self._is_started = True

    def free(self) -> int:
        """Return how many jobs can be given to workers that are ready."""
        with self._lock:
            return sum(one.slots - len(one.runs) for one in self._serving())

    def failure(self) -> str | None:
        """Return why no analysis can run now; None when one can."""
        with self._lock:
            reason = self._refusal or "No worker has loaded the analysis yet."
            return None if self._serving() else reason

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
        payload = worker.pack(facts, body)
        run = self._runs[job.id] = _Run(job)
        try:
            ending = self._run(run, payload, listener)
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
                self._replace(run)
                self._changed.notify_all()

    def drain(self) -> None:
        """From now on, give no job a worker, and blame none for the end of its worker."""
        with self._lock:
            self._is_draining = True
            self._changed.notify_all()

    def close(self) -> None:
        """Kill all workers."""
        self._closed.set()
        self.drain()
        with self._lock:
            for one in self._workers:
                one.kill()
            self._changed.wait_for(lambda: not self._workers, CLOSE_SECONDS)

    # A job's thread

    def _run(self, run: _Run, payload: bytes, listener: Listener) -> model.Ending | model.Again:
        try:
            return self._talk(run, payload, listener) or self._explain(run)
        except BaseException:  # of the listener: the analysis goes on, and nobody waits for it
            self.stop(run.job.id)
            raise
        finally:
            self._leave(run)

    def _talk(self, run: _Run, payload: bytes, listener: Listener) -> model.Ending | None:
        """Return how the analysis ended; None when its connection ended before that."""
        with suppress(OSError):  # of a socket, also when the worker has hung up
            control = self._take(run)
            if control is None:
                return None
            run.connection, theirs = socket.socketpair()
            with theirs:
                listener.started()  # first, because a worker that is busy may take long to receive
                socket.send_fds(control, [b"j"], [theirs.fileno()])
            run.connection.sendall(payload)
            return self._listen(run, run.connection, listener)
        return None

    def _listen(self, run: _Run, connection: socket.socket, listener: Listener) -> model.Ending:
        frames = worker.Reader(connection)
        run.has_begun = frames.read(1) == worker.START
        while True:
            kind, length = worker.FRAME.unpack(frames.read(worker.FRAME.size))
            if kind in (worker.RESULT, worker.ERROR):
                listener.ended()
            if kind == worker.RESULT and length > LARGE_BYTES:
                run.is_large = self._permits.acquire()
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, RESULT_TIMEOUT)
            payload = frames.read(length)
            if kind in (worker.RESULT, worker.ERROR):
                return ending_of(kind, payload)
            _hear(connection, payload, listener)

    def _take(self, run: _Run) -> socket.socket | None:
        """Return the control of a worker for a job, as soon as there is one; None to give up."""
        with self._lock:
            while not (run.is_stopped or self._is_draining):
                one = run.worker or self._find_worker(run)
                if one and (one.control or one not in self._workers):
                    return one.control
                self._changed.wait()
            return None

    def _find_worker(self, run: _Run) -> _Worker | None:
        if run.job.alone:
            run.worker = _Worker(slots=0, is_stale=True)
            _start_thread(self._live, run.worker)
            self._workers.append(run.worker)
        else:
            free = (one for one in self._serving() if len(one.runs) < one.slots)
            run.worker = next(free, None)
        if run.worker:
            run.worker.runs.add(run)
        return run.worker

    def _explain(self, run: _Run) -> model.Ending | model.Again:
        """Return what follows from a connection that ended before the analysis did."""
        with self._lock:
            if self._is_draining:
                return model.Again()
            one = run.worker
            if one and run.connection and not run.has_begun and not self._is_ending(one):
                self._replace(run)  # it can take no job: it has no descriptor or no thread left
            if run.is_stopped or one is None or not run.has_begun:
                return model.Again(pause_seconds=PAUSE_SECONDS, has_started=run.has_begun)
            one.kill()  # if it has not ended, the analysis has closed the connection
            self._changed.wait_for(lambda: one not in self._workers)
            is_polite = -(one.code or 0) in POLITE
            # Whoever ended it may be about to stop the service, too.
            if is_polite and self._changed.wait_for(lambda: self._is_draining, STOP_SECONDS):
                return model.Again()
            if not run.job.alone and (is_polite or len(one.runs) > 1):
                return model.Again(is_alone=True)
            return model.crashed(f"The analysis ended its process: {_how(one.code)}.")

    def _leave(self, run: _Run) -> None:
        if run.connection:
            run.connection.close()
        with self._lock:
            del self._runs[run.job.id]  # from now on, to stop it does nothing
            if one := run.worker:
                if not run.is_stopped and one in self._workers:
                    one.runs.discard(run)
                self._retire(one)
                self._changed.notify_all()
        if self._slots == 1:
            self._on_change()

    # With the lock held

    def _serving(self) -> list[_Worker]:
        """Return the workers that are ready for any job, now or after another one."""
        return [one for one in self._workers if one.control and one.slots]

    def _is_ending(self, one: _Worker) -> bool:
        """Return whether a worker is stale already, or has just ended."""
        return self._changed.wait_for(
            lambda: one.is_stale or one not in self._workers, TOLD_SECONDS
        )

    def _replace(self, run: _Run) -> None:
        """Have another worker loaded in place of the one that a job is in."""
        if (one := run.worker) and one in self._workers:
            log.info("worker retired", extra={"pid": one.pid, "job_id": run.job.id})
            with suppress(OSError):  # without a thread for another one, it goes on
                if one.slots > 1 and not one.is_stale:
                    _start_thread(self._keep)
                one.is_stale = True
            self._retire(one)

    def _retire(self, one: _Worker) -> None:
        if self._is_useless(one):
            one.kill()

    def _is_useless(self, one: _Worker) -> bool:
        """Return whether a worker may end: it is stale, no job needs it, and new ones have another.

        When the executor is closed, all may.
        """
        has_another = one.slots <= 1 or any(not other.is_stale for other in self._serving())
        return self._closed.is_set() or (one.is_stale and not one.is_needed and has_another)

    # A worker's thread

    def _keep(self) -> None:
        """Have one worker after another, until another thread has one in its place."""
        seconds = RETRY_SECONDS
        while not self._is_draining:
            started_at, one = time.monotonic(), _Worker(self._slots)
            with self._lock:
                self._workers.insert(0, one)
            has_served = self._live(one)
            if one.is_stale and one.slots > 1:
                return
            if has_served:
                seconds = started_at + RETRY_SECONDS - time.monotonic()
            if not (has_served and one.runs):
                self._closed.wait(seconds)
            seconds = RETRY_SECONDS if has_served else min(2 * seconds, MAX_RETRY_SECONDS)

    def _live(self, one: _Worker) -> bool:
        """Start a worker's process, wait for its end, and return whether it could serve."""
        try:
            problem = self._serve(one)
        except (OSError, MemoryError) as exc:
            problem = f"No worker can be started: {exc}."
        with self._lock:
            self._workers.remove(one)
            for run in one.runs:
                run.hang_up()
            if problem and not self._is_useless(one):
                self._refusal = problem
                if self._is_started:  # else `start` raises it
                    log.warning("worker refused", extra={"error": problem})
            self._changed.notify_all()
        self._on_change()
        return problem is None

    def _serve(self, one: _Worker) -> str | None:
        """Start a process, and wait for its end; say why it could not load the analysis."""
        process, control = self._start_process()
        with process, control, control.makefile("rb") as lines:
            with self._lock:
                one.pid = process.pid
                self._retire(one)
            line = lines.readline()
            if line == worker.READY:
                self._welcome(one, control)
            else:
                one.kill()
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            with self._lock:
                one.kill()  # what it started, while its id cannot be another's
                one.code = process.wait()
        if line != worker.READY:
            problem = line.decode().strip() or f"loading it ended its process: {_how(one.code)}"
            return f"ANALYSIS={self._arguments[-1]!r}: {problem}"
        level = logging.INFO if one.is_stale or self._is_draining else logging.WARNING
        log.log(level, "worker ended", extra={"pid": one.pid, "ending": _how(one.code)})
        return None

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

    def _welcome(self, one: _Worker, control: socket.socket) -> None:
        """Let a worker have jobs, in place of a stale one."""
        with self._lock:
            one.control, self._refusal = control, None
            for other in self._workers:
                self._retire(other)
            self._changed.notify_all()
        log.info("worker ready", extra={"pid": one.pid})
        self._on_change()


def _start_thread(work: Callable[..., object], *arguments: object) -> None:
    try:
        threading.Thread(target=work, args=arguments, name="worker", daemon=True).start()
    except (RuntimeError, MemoryError) as exc:  # there are too many threads
        raise OSError(str(exc)) from exc


def _how(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    return f"signal {-code} ({signal.strsignal(-code)})"


def _hear(connection: socket.socket, payload: bytes, listener: Listener) -> None:
    """Pass on progress, and what is to be kept if there is such a thing."""
    fraction, note, kept = json.loads(payload)
    if kept is not None:
        problem = ""
        try:
            listener.kept(kept)
        except errors.Refusal as exc:
            problem = exc.detail
        worker.send(connection, worker.KEPT, problem.encode())
    listener.progressed(fraction, note)


def ending_of(kind: bytes, payload: bytes) -> model.Ending:
    """Return what a RESULT or an ERROR frame says."""
    if kind == worker.RESULT:
        return model.Ending(outcome=model.Outcome.SUCCEEDED, result=payload)
    facts = json.loads(payload)
    ending = model.without_result(model.Outcome.FAILED, facts["kind"], facts["message"])
    return replace(ending, frames=tuple(facts["frames"]), may_run_again=facts["may_run_again"])
