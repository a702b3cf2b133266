"""Where the analysis runs: in worker processes, one with many threads or many with one job each.

The service's own process never runs the user's code. Each job has a connection of its own to a
worker (see jobs/worker.py), and the loop reads and writes all of them. It never waits for a worker.
A worker has a thread here that starts it and waits for its end, which the kernel tells. The end of
a connection does not, because a grandchild may hold it open.

A worker is stale when it can take no more jobs, or still runs one whose outcome was decided
elsewhere (timed out, canceled). Another one is loaded in its place, and it is killed as soon as no
other job needs it.
"""

import _thread
import functools
import json
import logging
import os
import queue
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from jobs import errors, model, worker

#: A result of more bytes is large.
LARGE_BYTES = 1024**2

#: So many large results are read, or wait to be stored, at once. The others wait in their workers.
MAX_LARGE = 2

#: When nothing more of what a worker has begun to send comes for so long, it is killed.
SILENCE_SECONDS = 60.0

#: Bytes that are read from a worker at once, and of a large result.
READ_BYTES, READ_LARGE_BYTES = 64 * 1024, 1024**2

#: Connections that are read in one turn of the loop, and jobs in one worker that have not begun.
MAX_TURN = 64

#: Seconds between log lines while the first worker loads.
LOADING_SECONDS = 10.0

#: Seconds until a worker is started again that could not load, at first and at most.
RETRY_SECONDS, MAX_RETRY_SECONDS = 1.0, 60.0

#: Seconds until a job runs again that could not begin.
PAUSE_SECONDS = 1.0

#: Signals that ask a process to end. The analysis that ran in it is not to blame.
POLITE = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})

#: The end of a worker by SIGTERM and the like is told so many seconds later, in case the service is
#: told to stop as well.
STOP_SECONDS = 0.5

#: Seconds that `close` waits for the workers to end.
CLOSE_SECONDS = 1.0

#: In place of a payload that was sent. An empty part of one would keep all of it in memory.
NOTHING = memoryview(b"")

#: Of a job that could not begin.
NOT_BEGUN = model.Again(pause_seconds=PAUSE_SECONDS, has_started=False)

log = logging.getLogger("postback")


class Listener(NamedTuple):
    """What the loop calls while an analysis runs.

    Attributes:
        started: The payload goes to a worker that is ready. The time limit counts from here.
        returned: The limit counts no more, because the analysis has ended and its result may wait
            for others, or because its Dask worker was lost, and it will start again.
        progressed: Is given a fraction and a note.
        kept: Is given JSON text, and a function to call with "" when it is on disk, or with why it
            cannot be kept, which becomes a RuntimeError in the analysis.
        ended: How the analysis ended. Nothing follows.
    """

    started: Callable[[], None]
    returned: Callable[[], None]
    progressed: Callable[[float, str], None]
    kept: Callable[[str, Callable[[str], None]], None]
    ended: Callable[[model.Ending | model.Again], None]


@dataclass(eq=False, slots=True)
class _Worker:
    """One worker process, from the wish to have it until its end was handled.

    Attributes:
        slots: How many jobs at once it is given; 0 when a job has it for itself.
        is_stale: It gets no new job once another one serves, and ends when no job needs it. One
            that a job has for itself is stale from the start.
        runs: The jobs in it. A stopped one stays, since its thread may run for ever.
        started_at: By the monotonic clock.
        control: Takes the connections of jobs; None before it has loaded the analysis.
        pid: Its process and its process group; None before there is one. Its thread sets it.
        code: Its exit code, negative for a signal; None until it has ended. Its thread sets it.
    """

    slots: int
    is_stale: bool
    runs: "set[_Run]" = field(default_factory=set)
    started_at: float = field(default_factory=time.monotonic)
    control: socket.socket | None = None
    pid: int | None = None
    code: int | None = None

    @property
    def is_needed(self) -> bool:
        """Whether a job in it may still end well. One that has not begun can begin elsewhere."""
        bound = (run for run in self.runs if run.has_begun or run.job.alone)
        return not all(run.is_stopped for run in bound)

    def free(self) -> int:
        """Return how many jobs it can be given. One that is slow to begin them gets no more."""
        waiting = sum(not run.has_begun for run in self.runs)
        return min(self.slots - len(self.runs), MAX_TURN - waiting)

    def kill(self) -> None:
        """Kill it and what it started, but not when its id may be another's already."""
        if self.pid and self.code is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)


@dataclass(eq=False, slots=True)
class _Run:
    """One job, from the call of `run` until its ending is known or it is stopped.

    Attributes:
        unsent: What the worker has still to be sent.
        received: What came from it and is not a whole frame yet.
        heard_at: When something came from it, by the monotonic clock.
        has_begun: The worker has said so, and from then on the job may be to blame for its end.
        is_stopped: Its outcome was decided elsewhere.
    """

    job: model.Job
    listener: Listener
    worker: _Worker
    unsent: memoryview
    connection: socket.socket | None = None
    received: bytearray = field(default_factory=bytearray)
    heard_at: float = 0.0
    has_begun: bool = False
    is_stopped: bool = False


class Executor:
    """What the executors have in common.

    Attributes:
        on_news: Is called by other threads when there is something for `listen`.
        selector: Can be read when a worker has sent something.
        held: The jobs whose large results are read or held. Whoever stores one takes it out.
    """

    def __init__(self) -> None:
        self.held: set[str] = set()
        self.on_news: Callable[[], None] = lambda: None
        self._news = queue.SimpleQueue[Callable[[], None]]()  # what `listen` is to call
        self.selector = selectors.DefaultSelector()

    def listen(self, most: int | None = MAX_TURN) -> None:  # noqa: ARG002 - for workers
        """Deal with what other threads have told."""
        with suppress(queue.Empty):
            while True:
                self._news.get_nowait()()

    def _tell(self, what: Callable[..., None], *arguments: Any) -> None:
        """Have `listen` do something."""
        self._news.put(functools.partial(what, *arguments))
        self.on_news()


class WorkerExecutor(Executor):
    """Runs analyses in worker processes.

    Only one thread at a time may call its methods, but for `failure` and `drain`.

    Args:
        analysis: The user's function, as `package.module:function`.
        workers: How many processes, with one job each; None for one process with many jobs.
        log_level: Of what the analysis logs.
    """

    def __init__(self, *, analysis: str, workers: int | None, log_level: str) -> None:
        super().__init__()
        self._arguments = (log_level, analysis)
        self._count = workers or 1
        self._slots = 1 if workers else sys.maxsize
        self._runs: dict[str, _Run] = {}
        self._waiting: deque[_Run] = deque()  # their large results wait in their workers
        self._workers: list[_Worker] = []
        self._refusal: str | None = None  # why the analysis could not be loaded last
        self._retry_seconds, self._retry_at = RETRY_SECONDS / 2, 0.0  # it is doubled first
        self._is_started = False
        self._draining = threading.Event()

    def start(self) -> None:
        """Start the workers, and return when the first one is ready.

        Raises:
            ConfigError: It cannot load the analysis.
            Refusal: There are too many processes, or too little memory, or the worker was killed,
                which may pass.
        """
        seconds = 0.0
        while not (self._serving() or self._refusal):
            self._keep_up()
            try:
                self._news.get(timeout=LOADING_SECONDS)()
            except queue.Empty:
                seconds += LOADING_SECONDS
                log.info("analysis loading", extra={"seconds": seconds})
        if problem := self.failure():
            self.close()
            if problem.startswith("ANALYSIS="):
                raise errors.ConfigError(problem)
            raise errors.Refusal(503, "No worker", problem)
        self._is_started = True

    def free(self) -> int:
        """Return how many jobs can be given to workers that are ready."""
        return sum(one.free() for one in self._serving())

    def failure(self) -> str | None:
        """Return why no analysis can run now; None when one can."""
        reason = self._refusal or "No worker has loaded the analysis yet."
        return None if self._serving() else reason

    def run(self, job: model.Job, body: bytes, *, kept: str | None, listener: Listener) -> None:
        """Begin an analysis, for which there is a place.

        Args:
            job: If `alone`, it gets a fresh worker for itself.
            body: The payload as it was accepted.
            kept: The JSON text that the job kept last.
            listener: Is told what happens until the ending, perhaps at once.
        """
        facts = {"id": job.id, "start": max(job.starts, 1), "metadata": job.metadata, "kept": kept}
        payload = memoryview(worker.pack(facts, body))
        if job.alone:
            one = self._start_worker(0)
        else:
            one = next((one for one in self._serving() if one.free() > 0), None)
        if one is None:
            listener.ended(NOT_BEGUN)
            return
        run = self._runs[job.id] = _Run(job, listener, one, payload)
        one.runs.add(run)
        if one.control:
            self._begin(run, one.control)

    def stop(self, job_id: str) -> None:
        """Give up a job whose outcome was decided elsewhere: its listener is told nothing more."""
        if run := self._runs.get(job_id):
            run.is_stopped = True
            self._leave(run)
            self.held.discard(job_id)
            self._replace(run)

    def listen(self, most: int | None = MAX_TURN) -> None:
        """Deal with what workers have sent, and with their ends. Call it at least once a second.

        Args:
            most: How many workers' messages to read; None for all that there are.
        """
        super().listen()
        for key, events in self.selector.select(0)[:most]:
            if events & selectors.EVENT_WRITE:
                self._send(key.data)
            if events & selectors.EVENT_READ:
                self._hear(key.data)
        silent_since = time.monotonic() - SILENCE_SECONDS
        for run in self._runs.values():
            if run.received and run.heard_at < silent_since and run not in self._waiting:
                run.worker.kill()  # the rest follows at its end
        while self._waiting and len(self.held) < MAX_LARGE:
            run = self._waiting[0]
            if run.connection:
                self.selector.register(run.connection, selectors.EVENT_READ, run)
                self.held.add(run.job.id)
                run.heard_at = time.monotonic()
            self._waiting.popleft()
        self._keep_up()

    def drain(self) -> None:
        """From now on, start no worker, and blame no job for the end of its worker."""
        self._draining.set()
        self._tell(self._put_back)

    def close(self) -> None:
        """Kill all workers."""
        self.drain()
        deadline = time.monotonic() + CLOSE_SECONDS
        with suppress(queue.Empty):
            while self._workers:
                for one in self._workers:  # also one that has a process only now
                    one.kill()
                self._news.get(timeout=max(0.0, deadline - time.monotonic()))()

    # A job

    def _begin(self, run: _Run, control: socket.socket) -> None:
        """Give a job to its worker, which is ready."""
        try:
            run.connection, theirs = socket.socketpair()
            with theirs:
                run.connection.settimeout(0)
                self.selector.register(run.connection, selectors.EVENT_READ, run)
                run.listener.started()
                self._send(run)
                socket.send_fds(control, [b"j"], [theirs.fileno()])
        except OSError:  # there are too many open files, or the worker has hung up
            self._finish(run, NOT_BEGUN)

    def _send(self, run: _Run) -> None:
        """Send as much of the payload as there is room for."""
        if not run.connection:  # it ended in this very turn
            return
        try:
            run.unsent = run.unsent[run.connection.send(run.unsent) :] or NOTHING
        except BlockingIOError:
            pass
        except OSError:  # what the worker has sent can still be read
            run.unsent = NOTHING
        also = selectors.EVENT_WRITE if run.unsent else 0
        self.selector.modify(run.connection, selectors.EVENT_READ | also, run)

    def _hear(self, run: _Run) -> bool:
        """Read what a worker has sent once, and return whether there may be more."""
        if not run.connection:  # it ended in this very turn
            return False
        try:
            is_large = run.job.id in self.held
            data = run.connection.recv(READ_LARGE_BYTES if is_large else READ_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._lose(run)
            return False
        try:
            run.received += data
            self._go_on(run)
        except Exception as exc:
            log.exception("worker not heard", extra=run.job.facts)
            if run.job.id in self._runs:
                self.stop(run.job.id)
                run.listener.ended(model.not_handled(exc))
        return True

    def _go_on(self, run: _Run) -> None:
        """Deal with the frames that are complete."""
        data, size, run.heard_at = run.received, worker.FRAME.size, time.monotonic()
        if not run.has_begun:
            run.has_begun = True
            del data[: len(worker.START)]
        while run.connection and len(data) >= size:
            kind, length = worker.FRAME.unpack_from(data)
            if kind != worker.PROGRESS:
                run.listener.returned()  # even if the service was held up, and the rest comes later
            if kind == worker.RESULT and length > LARGE_BYTES and run.job.id not in self.held:
                if run not in self._waiting:
                    self._waiting.append(run)
                    self.selector.unregister(run.connection)  # until there is room for it
                return
            if len(data) < size + length:
                return
            payload = bytes(memoryview(data)[size : size + length])
            del data[: size + length]
            if kind == worker.PROGRESS:
                self._report(run, *json.loads(payload))
            else:
                self._finish(run, ending_of(kind, payload))

    def _report(self, run: _Run, fraction: float, note: str, kept: str | None) -> None:
        """Pass on progress, and what is to be kept if there is such a thing."""
        run.listener.progressed(fraction, note)
        if kept is not None:
            run.listener.kept(kept, functools.partial(self._answer, run))

    def _answer(self, run: _Run, problem: str) -> None:
        """Tell a worker that a value is kept, or why it is not. It waits for that."""
        with suppress(OSError):  # there is room, since it waits for nothing else
            if run.connection:
                worker.send(run.connection, worker.KEPT, problem.encode())

    def _put_back(self) -> None:
        """Give up, in a drain, the jobs that wait for a worker of their own."""
        for run in [run for run in self._runs.values() if not run.connection]:
            self._finish(run, model.Again())

    def _lose(self, run: _Run) -> None:
        """Follow up on a connection that ended before the analysis did."""
        self._hang_up(run)
        self.held.discard(run.job.id)
        if run.has_begun:  # if its worker has not ended, the analysis has closed the connection
            run.worker.kill()  # the rest follows at its end
        else:  # if its worker has not ended, it has no descriptor or no thread left
            self._replace(run)
            self._finish(run, NOT_BEGUN)

    def _hang_up(self, run: _Run) -> None:
        if run.connection:
            with suppress(KeyError):  # the system had no room to register it
                self.selector.unregister(run.connection)
            run.connection.close()
            run.connection = None
        run.received, run.unsent = bytearray(), NOTHING  # a stopped run stays for long

    def _leave(self, run: _Run) -> None:
        self._hang_up(run)
        del self._runs[run.job.id]

    def _finish(self, run: _Run, ending: model.Ending | model.Again) -> None:
        self._leave(run)
        run.worker.runs.discard(run)
        run.listener.ended(ending)

    # A worker

    def _serving(self) -> list[_Worker]:
        """Return the workers that can be given jobs, now or later."""
        ready = [one for one in self._workers if one.control and one.slots and one.code is None]
        return [one for one in ready if not one.is_stale] or ready

    def _replace(self, run: _Run) -> None:
        """Have another worker loaded in place of the one that a job is in."""
        one = run.worker
        if one.code is None:
            log.info("worker retired", extra={"pid": one.pid, "job_id": run.job.id})
            one.is_stale = True

    def _keep_up(self) -> None:
        """Kill the workers that may end, and start as many as are missing.

        A stale one may end if no job needs it, and new ones have another.
        """
        has_another = any(not one.is_stale for one in self._serving())
        for one in [*self._workers]:
            if not one.pid and one.started_at < time.monotonic() - LOADING_SECONDS:
                self._bury(one, "No worker can be started: its thread did not begin.")
            elif one.is_stale and not one.is_needed and (has_another or one.slots <= 1):
                one.kill()
        for _ in range(self._count - sum(not one.is_stale for one in self._workers)):
            self._start_worker(self._slots)

    def _start_worker(self, slots: int) -> _Worker | None:
        """Start a worker, and return it; None while none may be started."""
        if self._draining.is_set() or time.monotonic() < self._retry_at:
            return None
        one = _Worker(slots, is_stale=not slots)
        self._workers.append(one)  # before its thread asks whether it is there
        try:
            # A threading.Thread could hold up the loop for ever: it waits until the thread runs.
            _thread.start_new_thread(self._live, (one,))
        except (RuntimeError, MemoryError) as exc:
            self._refusal = f"No worker can be started: {exc}."
            self._workers.remove(one)
            return None
        return one

    def _welcome(self, one: _Worker, control: socket.socket) -> None:
        """Let a worker have jobs."""
        one.control, self._refusal, self._retry_seconds = control, None, RETRY_SECONDS / 2
        for run in [run for run in one.runs if not run.is_stopped]:
            self._begin(run, control)
        log.info("worker ready", extra={"pid": one.pid})

    def _bury(self, one: _Worker, problem: str | None) -> None:
        """Follow up on the end of a worker, or on why it could not load the analysis."""
        self._workers.remove(one)
        for run in [*one.runs]:
            while self._hear(run):  # what it has sent before
                pass
        is_asked = self._draining.is_set() or (one.is_stale and not one.is_needed)
        if problem and not is_asked:
            self._refuse(problem)
        elif not problem:
            level = logging.INFO if is_asked else logging.WARNING
            ending = None if is_asked else _how(one.code)
            log.log(level, "worker ended", extra={"pid": one.pid, "ending": ending})
            if not one.runs:  # else a job has ended it
                self._retry_at = one.started_at + RETRY_SECONDS
        if one.control:
            one.control.close()
        several = len(one.runs) > 1
        for run in [run for run in one.runs if not run.is_stopped]:
            self._finish(run, self._explain(run, several=several))
        one.runs.clear()  # else each refers to the other until the garbage collector runs

    def _refuse(self, problem: str) -> None:
        self._refusal = problem
        if self._is_started:  # else `start` raises it
            log.warning("worker refused", extra={"error": problem})
        if time.monotonic() >= self._retry_at:  # several that are refused at once count once
            self._retry_seconds = min(2 * self._retry_seconds, MAX_RETRY_SECONDS)
            self._retry_at = time.monotonic() + self._retry_seconds

    def _explain(self, run: _Run, *, several: bool) -> model.Ending | model.Again:
        """Return what follows for a job from the end of its worker, in which perhaps others ran."""
        if self._draining.is_set():
            return model.Again()
        if not run.has_begun:
            return NOT_BEGUN
        if not run.job.alone and (several or -(run.worker.code or 0) in POLITE):
            return model.Again(is_alone=True)
        text = f"The analysis ended its process: {_how(run.worker.code)}."
        return model.without_result(model.Outcome.CRASHED, text)

    # A worker's thread

    def _live(self, one: _Worker) -> None:
        try:
            problem = self._serve(one)
        except (OSError, MemoryError) as exc:
            problem = f"No worker can be started: {exc}."
        # Whoever ended it may be about to stop the service.
        if -(one.code or 0) in POLITE:
            self._draining.wait(STOP_SECONDS)
        if one in self._workers:
            self._tell(self._bury, one, problem)

    def _serve(self, one: _Worker) -> str | None:
        """Start a process, and wait for its end; say why it could not load the analysis."""
        control, theirs = socket.socketpair()
        command = [sys.executable, "-P", "-X", "faulthandler", worker.__file__]
        with theirs:
            process = subprocess.Popen(  # noqa: S603 - our own
                [*command, str(theirs.fileno()), *self._arguments],
                stdin=subprocess.PIPE,  # its end tells the worker that the service has ended
                stdout=2,
                stderr=2,  # also when it is the null device, which is not inherited by itself
                pass_fds=[theirs.fileno()],
                process_group=0,  # a terminal's Ctrl-C is not for it
            )
        with process, control.makefile("rb") as lines:
            one.pid = process.pid
            self._tell(self._keep_up)  # it may be useless meanwhile
            line = lines.readline()
            if line == worker.READY and one in self._workers:  # it was not given up meanwhile
                self._tell(self._welcome, one, control)
            else:
                control.close()
                one.kill()
            end = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            one.kill()  # what it started, while its id cannot be another's
            if end:  # always, since it is waited for
                one.code = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
        if line == worker.READY:
            return None
        if not line and -(one.code or 0) in {signal.SIGKILL, *POLITE}:  # mostly for memory
            return f"No worker can be started: loading the analysis ended with {_how(one.code)}."
        problem = line.decode(errors="replace").strip()
        problem = problem or f"loading it ended its process: {_how(one.code)}"
        return f"ANALYSIS={self._arguments[-1]!r}: {problem}"


def _how(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    return f"signal {-code} ({signal.strsignal(-code)})"


def ending_of(kind: bytes, payload: bytes) -> model.Ending:
    """Return what a RESULT or an ERROR frame says."""
    if kind == worker.RESULT:
        return model.Ending(outcome=model.Outcome.SUCCEEDED, result=payload)
    facts = json.loads(payload)
    ending = model.without_result(model.Outcome.FAILED, facts["message"], facts["kind"])
    return replace(ending, frames=tuple(facts["frames"]), may_run_again=facts["may_run_again"])
