"""One daemon thread a job, a bounded number of analyses at once; an orderly stop.

Knows who does what when. A job is begun as it is accepted if there is a place, and else waits in
the journal, until a thread claims it. Its thread runs the analysis, stores the event, gives up the
place, and makes the first attempt. One scheduler thread ends what takes too long, starts the
attempts that are due (`jobs/attempts.py`), and prunes.
"""

import contextlib
import functools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from jobs import cores, errors, model, waiting
from jobs.analysis import Progress
from jobs.attempts import Attempts, Postback
from jobs.executors import Executor
from jobs.journal import Journal
from jobs.model import Outcome, State
from jobs.threads import Threads
from jobs.waiting import Alarm

#: Jobs removed in one commit, so that nobody waits long for it.
PRUNE_BATCH = 100

#: Seconds between two commits that prune, while there is more.
PRUNE_PAUSE_SECONDS = 0.05

#: Seconds between two looks for jobs to prune, when there was none.
PRUNE_SECONDS = 60.0

log = logging.getLogger("postback")


class Observer:
    """Is told what happened, after it did. This one takes no notice; none may raise or wait."""

    def accepted(self, job: model.Job) -> None:
        """Hear of a job that was committed."""

    def finished(self, job: model.Job) -> None:
        """Hear of a job whose analysis ended: its outcome is stored."""

    def attempted(self, job: model.Job, attempt: model.Attempt, state: State) -> None:
        """Hear of an attempt, and of the state its job has now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much the runner does at once, and for how long.

    Attributes:
        max_running: Analyses at once.
        max_pending: Accepted jobs that wait for their analysis.
        job_timeout_seconds: None for no limit.
        retention_seconds: How long an ended job is kept.
        max_event_bytes: A larger event is posted without its result.
    """

    max_running: int
    max_pending: int
    job_timeout_seconds: float | None
    retention_seconds: float
    max_event_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Drained:
    """What an orderly stop leaves behind.

    Attributes:
        finished: Jobs that ended while the service stopped.
        waiting: Jobs that the next start takes up.
    """

    finished: int
    waiting: int


class Runner:
    """Takes accepted jobs to their end.

    Every method may be called from any thread; `start` and `drain` once each.
    """

    def __init__(
        self,
        *,
        journal: Journal,
        executor: Executor,
        postback: Postback,
        limits: Limits,
        result_url: Callable[[str], str],
        observer: Observer | None = None,
        clock: Callable[[], datetime] = model.utc_now,
    ) -> None:
        self._journal = journal
        self._executor = executor
        self._limits = limits
        self._result_url = result_url
        self._observer = observer or Observer()
        self._clock = clock
        self._threads = Threads()
        self._alarm = Alarm()  # of the scheduler
        self._stopped = threading.Event()
        self._attempts = Attempts(
            journal=journal,
            postback=postback,
            threads=self._threads,
            alarm=self._alarm,
            stopped=self._stopped,
            clock=clock,
            on_attempt=self._observer.attempted,
            on_left=self._look_if_idle,
        )
        self._of_thread = threading.local()  # jobs that a thread has accepted, and not started yet
        self._lock = threading.Lock()  # guards what follows, for a few lines at a time
        self._idle = threading.Condition(self._lock)
        self._accepting = 0  # jobs that are being committed
        self._waiting = 0  # jobs in the journal that need a thread
        self._starting = 0  # threads that have not begun their job yet
        self._running: dict[str, float] = {}  # job id: when it times out (monotonic)
        self._progress: dict[str, Progress] = {}  # of those that told any
        self._outlived: set[str] = set()  # ended by others; their threads have not come back yet
        self._suspects: deque[model.Job] = deque()  # not begun again yet
        self._alone: set[str] = set()  # suspects whose analysis has not ended
        self._draining = False
        self._prune_at = 0.0  # monotonic
        self._scheduler = threading.Thread(target=self._schedule, name="scheduler", daemon=True)

    # What the service asks for

    def start(self) -> None:
        """Take up what is unfinished, suspects first and alone, and begin to work."""
        self._attempts.advance()
        suspects, count = self._journal.resume(now=self._clock())
        for job in suspects:
            if job.starts < model.MAX_STARTS:
                self._suspects.append(job)
            else:
                message = f"The process ended {job.starts} times while it ran."
                self._end(job, model.crashed(message), due_now=True)
        self._alone = {job.id for job in self._suspects}
        self._waiting = count + len(self._suspects)
        if suspects or count:
            log.info("jobs resumed", extra={"waiting": count, "suspects": len(suspects)})
        self._scheduler.start()  # whose first round starts what waits

    def accept(
        self, job: model.Job, body: bytes, *, idempotency_key: str | None, body_sha256: str
    ) -> str:
        """Commit a job, and return its id. It is durable once the journal is settled.

        Returns:
            The id of the first job, when one was accepted with the same key.

        Raises:
            KeyReusedError: The key came with another body.
            UnavailableError: Full, draining, or the journal fails; nothing was accepted.
        """
        if idempotency_key:
            first = self._journal.accepted_before(idempotency_key, body_sha256=body_sha256)
            if first:
                return first
        if begins := self._admit():
            job = model.begun(job, now=self._clock())
        accepted = ""
        try:
            accepted = self._journal.accept(
                job, body, idempotency_key=idempotency_key, body_sha256=body_sha256
            )
        finally:
            self._admitted(job, body, begins=begins, accepted=accepted == job.id)
        if accepted == job.id:
            log.info("job accepted", extra=job.facts)
            self._observer.accepted(job)
        return accepted

    def start_accepted(self) -> None:
        """Start the jobs that this thread has accepted; call it once they are answered.

        Not before: their threads would hold up the answers.
        """
        begun: list[tuple[model.Job, bytes]] = vars(self._of_thread).pop("begun", [])
        for job, body in begun:
            self._start_begun(job, body)
        self._start_waiting()

    def cancel(self, job_id: str) -> None:
        """End a job with the outcome `canceled`.

        Raises:
            JobNotFoundError: There is none.
            MoveError: Its analysis has ended already.
        """
        try:
            job = self._journal.job(job_id)
            self._end(job, model.canceled(), due_now=True, source=State.ACCEPTED)
        except errors.MoveError:
            self._overtake(self._journal.job(job_id), model.canceled())
        else:
            self._count_waiting(-1)
            self._alarm.ring()

    def resend(self, job_id: str) -> None:
        """Post an ended job's event again, under the same webhook-id.

        Raises:
            JobNotFoundError: There is none.
            MoveError: It has not ended.
        """
        self._journal.resend(job_id, now=self._clock())
        self._alarm.ring()

    def progress(self, job_id: str) -> Progress | None:
        """Return what a running analysis last said of itself, if it did."""
        return self._progress.get(job_id)

    @property
    def outlived(self) -> int:
        """How many threads still run an analysis that has timed out or was canceled."""
        return len(self._outlived)

    def refusal(self) -> errors.UnavailableError | None:
        """Return why no job can be accepted now; None when one can."""
        with self._lock:
            if self._journal.failure:
                self._try_again()  # have it probed
            return self._refusal() or self._journal.failure

    def standstill(self) -> errors.UnavailableError | None:
        """Return why accepted jobs only wait; None when their analyses can run."""
        if failure := self._executor.failure():
            return errors.UnavailableError(f"{failure} Jobs are accepted, and wait.")
        return None

    def drain(self, seconds: float) -> Drained:
        """Stop: begin nothing more, let what runs end, leave the rest in the journal.

        Args:
            seconds: How long to wait for what is under way.
        """
        with self._lock:
            self._draining = True
            self._attempts.drain()
            before = self._attempts.finished
            self._idle.wait_for(self._is_idle, timeout=seconds)
            cut = list(self._running)
        self._stopped.set()
        self._alarm.ring()
        self._scheduler.join(waiting.RETRY_SECONDS)
        self._threads.close()
        self._journal.put_back(cut)
        return Drained(
            finished=self._attempts.finished - before, waiting=self._journal.count_unfinished()
        )

    # Accept

    def _refusal(self) -> errors.UnavailableError | None:
        if self._draining:
            return errors.DrainingError("The service is stopping: send it again later.")
        if self._waiting >= self._limits.max_pending:
            return errors.FullError(
                f"{self._waiting} jobs wait already, MAX_PENDING is {self._limits.max_pending}: "
                "send it again later."
            )
        return None

    def _admit(self) -> bool:
        """Make room for a job that is about to be accepted; return whether it can begin at once."""
        with self._lock:
            if refusal := self._refusal():
                raise refusal
            begins = not self._waiting and self._has_place()
            self._accepting += 1
            self._starting += begins
            self._waiting += not begins
            return begins

    def _admitted(self, job: model.Job, body: bytes, *, begins: bool, accepted: bool) -> None:
        with self._lock:
            self._accepting -= 1
            self._starting -= begins
            if begins and accepted:
                self._note_running(job.id)
                vars(self._of_thread).setdefault("begun", []).append((job, body))
            elif not accepted:  # refused, or another was first with this key
                self._waiting -= not begins
            self._notify_if_idle()

    def _start_begun(self, job: model.Job, body: bytes) -> None:
        if self._stopped.is_set():  # it is put back
            return
        if self._threads.start(job.id, self._work_on, job, body):
            return
        returned = 0
        with contextlib.suppress(errors.JournalError):  # the process is about to end
            returned = waiting.insist(lambda: self._journal.put_back([job.id]), self._stopped)
        with self._lock:  # it waits in the journal, as if it had not begun
            del self._running[job.id]
            self._outlived.discard(job.id)
            self._waiting += returned
            self._notify_if_idle()
        self._try_again()

    def _count_waiting(self, change: int) -> None:
        with self._lock:
            self._waiting += change

    # A job's thread

    def _start_waiting(self) -> None:
        """Start a thread for each waiting job that there is a place for."""
        while self._take_place():
            if not self._threads.start("job", self._work):  # the job waits in the journal
                with self._lock:
                    self._starting -= 1
                    self._notify_if_idle()
                self._try_again()
                return

    def _take_place(self) -> bool:
        with self._lock:
            free = self._waiting > self._starting and self._has_place() and not self._draining
            self._starting += free
            return free

    def _has_place(self) -> bool:
        """Tell whether one more analysis may run. The lock is held."""
        places = 1 if self._alone else self._limits.max_running
        running = self._alone & self._running.keys() if self._alone else self._running
        return self._starting + len(running) < places

    def _work(self) -> None:
        """Begin the next job, and take it to its first attempt."""
        begun = self._begin()
        if begun is None:  # it was canceled in the meantime
            self._start_waiting()
            return
        job, body = begun
        threading.current_thread().name = job.id
        self._work_on(job, body)

    def _work_on(self, job: model.Job, body: bytes) -> None:
        """Analyze, store the event, and make the first attempt."""
        try:
            job, event = self._analyze(job, body)
        finally:
            self._leave_place(job.id)
        if event:
            self._attempts.deliver(job, event)

    def _begin(self) -> tuple[model.Job, bytes] | None:
        """Begin the next job, a suspect first."""
        with self._lock:
            suspect = self._suspects.popleft() if self._suspects else None
        begun = waiting.insist(lambda: self._begin_in_journal(suspect), self._stopped)
        with self._lock:
            self._starting -= 1
            if begun or suspect:
                self._waiting -= 1
            if suspect and not begun:
                self._alone.discard(suspect.id)
                self._outlived.discard(suspect.id)
            if begun:
                self._note_running(begun[0].id)
            self._notify_if_idle()
        return begun

    def _note_running(self, job_id: str) -> None:
        """Keep a job that has begun in mind. The lock is held."""
        self._running[job_id] = times_out_at = self._times_out_at()
        self._alarm.ring_by(times_out_at)

    def _begin_in_journal(self, suspect: model.Job | None) -> tuple[model.Job, bytes] | None:
        if suspect:
            return self._journal.begin_again(suspect.id, now=self._clock())
        return self._journal.claim(now=self._clock())

    def _times_out_at(self) -> float:
        limit = self._limits.job_timeout_seconds
        return math.inf if limit is None else time.monotonic() + limit

    def _analyze(self, job: model.Job, body: bytes) -> tuple[model.Job, bytes | None]:
        """Return the job as it ended, and its event if this thread is to post it."""
        ending = self._executor.run(job.id, body, functools.partial(self._report, job.id))
        taken = self._attempts.take(job.receiver)
        try:
            end = functools.partial(self._end, job, ending, due_now=not taken)
            job, event = waiting.insist(end, self._stopped)
        except errors.Error as exc:
            if taken:
                self._attempts.leave(job.receiver)
            if not isinstance(exc, errors.MoveError | errors.JobNotFoundError):
                raise
            log.info("late result ignored", extra=job.facts)  # it was canceled, or timed out
            return job, None
        if not taken:  # a place may have come free before the attempt was due
            self._alarm.ring()
        return job, event.body if taken else None

    def _report(self, job_id: str, progress: Progress) -> None:
        with self._lock:
            if job_id in self._running:  # a thread of the analysis may outlive it
                self._progress[job_id] = progress

    def _end(
        self, job: model.Job, ending: model.Ending, *, due_now: bool, source: State = State.RUNNING
    ) -> tuple[model.Job, model.Event]:
        """Store how a job ended, and its event.

        Raises:
            MoveError: It is not in the state `source`; it ended in another way.
        """
        now = self._clock()
        event = model.event_of(
            job,
            ending,
            finished_at=now,
            max_bytes=self._limits.max_event_bytes,
            result_url=self._result_url(job.id),
        )
        due_at = now if due_now else None
        self._journal.end(job, ending.outcome, event, finished_at=now, due_at=due_at, source=source)
        job = job._replace(state=State.DELIVERING, outcome=ending.outcome, finished_at=now)
        level = logging.DEBUG if ending.outcome is Outcome.SUCCEEDED else logging.INFO
        log.log(level, "analysis ended", extra=job.facts | {"outcome": ending.outcome})
        self._observer.finished(job)
        return job, event

    def _overtake(self, job: model.Job, ending: model.Ending) -> None:
        """End a job that runs: what its thread still comes back with is ignored.

        Raises:
            MoveError: It does not run; it has ended in another way.
        """
        with self._lock:  # before the move, or its thread might come back in between
            is_first = job.id not in self._outlived
            self._outlived.add(job.id)
        try:
            self._end(job, ending, due_now=True)
        except errors.Error:
            with self._lock:
                self._outlived -= {job.id} if is_first else set()
            raise
        if not self._executor.stop(job.id):
            log.warning("thread outlived its job", extra=job.facts)
        with self._lock:
            self._forget_limit(job.id)
            self._alone.discard(job.id)  # the others need not wait for its thread
            self._notify_if_idle()
        self._start_waiting()
        self._alarm.ring()

    def _leave_place(self, job_id: str) -> None:
        with self._lock:
            del self._running[job_id]
            self._progress.pop(job_id, None)
            self._outlived.discard(job_id)
            self._alone.discard(job_id)
            self._notify_if_idle()
        self._start_waiting()

    # The scheduler's thread

    def _schedule(self) -> None:
        cores.keep_to_one()
        while not self._stopped.is_set():
            seconds = waiting.RETRY_SECONDS
            try:
                seconds = self._round()
            except errors.JournalError:
                pass  # logged where it was seen
            except Exception:
                log.exception("scheduler failed")
            self._alarm.sleep(seconds)

    def _round(self) -> float:
        """Do what is due, and return how many seconds there is nothing to do."""
        if self._journal.failure:
            self._journal.probe()
        self._start_waiting()
        return min(
            self._end_overdue(),
            self._stop_outlived(),
            self._attempts.start_due(),
            self._prune(),
        )

    def _end_overdue(self) -> float:
        """End the jobs that are over JOB_TIMEOUT; return the seconds until the next one is."""
        now = time.monotonic()
        with self._lock:
            overdue = [job_id for job_id, at in self._running.items() if at <= now]
        for job_id in overdue:
            self._time_out(job_id)
        with self._lock:
            return min(self._running.values(), default=math.inf) - now

    def _time_out(self, job_id: str) -> None:
        ending = model.timed_out(self._limits.job_timeout_seconds or 0)
        try:
            self._overtake(self._journal.job(job_id), ending)
        except errors.MoveError:  # it ended at the same moment
            with self._lock:
                self._forget_limit(job_id)

    def _forget_limit(self, job_id: str) -> None:
        if job_id in self._running:
            self._running[job_id] = math.inf

    def _stop_outlived(self) -> float:
        """Stop again what could not be stopped yet; return the seconds until the next time."""
        with self._lock:
            outlived = list(self._outlived)
        for job_id in outlived:
            self._executor.stop(job_id)
        return waiting.RETRY_SECONDS if outlived else math.inf

    def _prune(self) -> float:
        """Remove some jobs that ended before RETENTION; return the seconds until the next look."""
        if time.monotonic() >= self._prune_at:
            before = self._clock() - timedelta(seconds=self._limits.retention_seconds)
            more = self._journal.prune(before=before, limit=PRUNE_BATCH) >= PRUNE_BATCH
            self._prune_at = time.monotonic() + (PRUNE_PAUSE_SECONDS if more else PRUNE_SECONDS)
        return self._prune_at - time.monotonic()

    def _try_again(self) -> None:
        """Have the scheduler do soon what has just failed."""
        self._alarm.ring_by(time.monotonic() + waiting.RETRY_SECONDS)

    # The end of a drain

    def _is_idle(self) -> bool:
        # A job whose outcome is stored is not waited for, though its thread may go on.
        busy = self._accepting or self._starting or self._attempts.are_under_way
        return not busy and self._running.keys() <= self._outlived

    def _look_if_idle(self) -> None:
        with self._lock:
            self._notify_if_idle()

    def _notify_if_idle(self) -> None:
        if self._draining and self._is_idle():
            self._idle.notify_all()
