"""One daemon thread a job, a bounded number at once; attempts that are due; an orderly stop.

Knows who does what when. A job is begun as it is accepted if there is a place, and else waits in
the journal, until a thread claims it. Its thread runs the analysis, stores the event, gives up the
place, and makes the first attempt. One scheduler thread starts the attempts that are due, ends what
takes too long, and prunes.
"""

import contextlib
import functools
import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Protocol, TypeVar

from jobs import cores, errors, model
from jobs.analysis import Progress
from jobs.executors import Executor
from jobs.journal import Journal
from jobs.model import Outcome, State
from jobs.threads import Threads

#: Attempts under way at once, all receivers together and for one of them.
MAX_ATTEMPTS = 256
MAX_ATTEMPTS_PER_RECEIVER = 32

#: Jobs removed in one commit, so that nobody waits long for it.
PRUNE_BATCH = 100

#: Seconds between two commits that prune, while there is more.
PRUNE_PAUSE_SECONDS = 0.05

#: The longest sleep of the scheduler: it then looks for jobs to prune, and notices that the clock
#: was set or the machine suspended.
ROUND_SECONDS = 60.0

#: Seconds until something that failed (the journal, a thread that would not start) is tried again.
RETRY_SECONDS = 1.0

log = logging.getLogger("postback")

T = TypeVar("T")


class Postback(Protocol):
    """What the runner asks of whoever posts events."""

    #: No attempt is due later than this after another.
    longest_wait_seconds: float

    def attempt(self, job: model.Job, event: bytes) -> model.Attempt:
        """Make the job's next attempt; never raises."""


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
        self._postback = postback
        self._limits = limits
        self._result_url = result_url
        self._observer = observer or Observer()
        self._clock = clock
        self._threads = Threads()
        self._of_thread = threading.local()  # jobs that a thread has accepted, and not started yet
        self._lock = threading.Lock()  # guards what follows, for a few lines at a time
        self._idle = threading.Condition(self._lock)
        self._woken = threading.Condition(self._lock)
        self._wake_at = math.inf  # when the scheduler looks again (monotonic)
        self._accepting = 0  # jobs that are being committed
        self._waiting = 0  # jobs in the journal that need a thread
        self._starting = 0  # threads that have not begun their job yet
        self._running: dict[str, float] = {}  # job id: when it times out (monotonic)
        self._progress: dict[str, Progress] = {}  # of those that told any
        self._outlived: set[str] = set()  # ended by others; their threads have not come back yet
        self._suspects: deque[model.Job] = deque()  # not begun again yet
        self._alone: set[str] = set()  # suspects whose analysis has not ended
        self._attempts: Counter[str] = Counter()  # under way, by receiver
        self._backlog = False  # an attempt was due and found no place
        self._finished = 0
        self._draining = False
        self._stopped = threading.Event()
        self._prune_at = 0.0  # monotonic
        self._last_round_at = clock()
        self._scheduler = threading.Thread(target=self._schedule, name="scheduler", daemon=True)

    # What the service asks for

    def start(self) -> None:
        """Take up what is unfinished, suspects first and alone, and begin to work."""
        now = self._clock()
        self._journal.advance(latest=self._latest(now))
        suspects, waiting = self._journal.resume(now=now)
        for job in suspects:
            if job.starts < model.MAX_STARTS:
                self._suspects.append(job)
            else:
                message = f"The process ended {job.starts} times while it ran."
                self._end(job, model.crashed(message), due_now=True)
        self._alone = {job.id for job in self._suspects}
        self._waiting = waiting + len(self._suspects)
        if suspects or waiting:
            log.info("jobs resumed", extra={"waiting": waiting, "suspects": len(suspects)})
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
            log.info("job accepted", extra=_facts(job))
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
            self._wake()

    def resend(self, job_id: str) -> None:
        """Post an ended job's event again, under the same webhook-id.

        Raises:
            JobNotFoundError: There is none.
            MoveError: It has not ended.
        """
        self._journal.resend(job_id, now=self._clock())
        self._wake()

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
            if self._journal.failure:  # have it probed, at most once in this time
                self._wake_by(time.monotonic() + RETRY_SECONDS)
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
            before = self._finished
            self._idle.wait_for(self._is_idle, timeout=seconds)
            cut = list(self._running)
        self._stopped.set()
        self._wake()
        self._scheduler.join(RETRY_SECONDS)
        self._threads.close()
        self._journal.put_back(cut)
        waiting = self._journal.count_unfinished()
        return Drained(finished=self._finished - before, waiting=waiting)

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
        if self._start_thread(job.id, self._work_on, job, body):
            return
        returned = 0
        with contextlib.suppress(errors.JournalError):  # the process is about to end
            returned = self._insist(lambda: self._journal.put_back([job.id]))
        with self._lock:  # it waits in the journal, as if it had not begun
            del self._running[job.id]
            self._outlived.discard(job.id)
            self._waiting += returned
            self._notify_if_idle()

    def _count_waiting(self, change: int) -> None:
        with self._lock:
            self._waiting += change

    # A job's thread

    def _start_waiting(self) -> None:
        """Start a thread for each waiting job that there is a place for."""
        while self._take_place():
            if not self._start_thread("job", self._work):  # the job waits in the journal
                with self._lock:
                    self._starting -= 1
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

    def _start_thread(self, name: str, work: Callable[..., None], *args: Any) -> bool:
        try:
            self._threads.start(name, self._guard, work, *args)
        except RuntimeError as exc:  # a limit of the machine
            log.warning("thread failed to start", extra={"error": str(exc)})
            self._wake()
            return False
        return True

    def _guard(self, work: Callable[..., None], *args: Any) -> None:
        try:
            work(*args)
        except errors.JournalError:
            pass  # the process is about to end; the job is taken up by the next start
        except Exception:
            log.exception("thread failed", extra={"job_id": threading.current_thread().name})

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
            self._deliver(job, event)

    def _begin(self) -> tuple[model.Job, bytes] | None:
        """Begin the next job, a suspect first."""
        with self._lock:
            suspect = self._suspects.popleft() if self._suspects else None
        begun = self._insist(lambda: self._begin_in_journal(suspect))
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
        self._wake_by(times_out_at)

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
        with self._lock:
            taken = self._take_attempts(job.receiver, 1)
        try:
            job, event = self._insist(lambda: self._end(job, ending, due_now=not taken))
        except errors.MoveError:  # it was canceled, or timed out
            log.info("late result ignored", extra=_facts(job))
            self._leave_attempts(job.receiver, taken)
            return job, None
        if not taken:  # a place may have come free before the attempt was due
            self._wake()
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
        log.log(level, "analysis ended", extra=_facts(job) | {"outcome": ending.outcome})
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
            log.warning("thread outlived its job", extra=_facts(job))
        with self._lock:
            self._forget_limit(job.id)
            self._alone.discard(job.id)  # the others need not wait for its thread
            self._notify_if_idle()
        self._start_waiting()
        self._wake()

    def _leave_place(self, job_id: str) -> None:
        with self._lock:
            del self._running[job_id]
            self._progress.pop(job_id, None)
            self._outlived.discard(job_id)
            self._alone.discard(job_id)
            self._notify_if_idle()
        self._start_waiting()

    # Attempts

    def _take_attempts(self, receiver: str, wanted: int) -> int:
        """Take places for attempts, and return how many were free. The lock is held."""
        room = min(
            MAX_ATTEMPTS_PER_RECEIVER - self._attempts[receiver],
            MAX_ATTEMPTS - self._attempts.total(),
        )
        taken = max(0, min(room, wanted))
        self._backlog |= taken < wanted
        self._attempts[receiver] += taken
        return taken

    def _leave_attempts(self, receiver: str, count: int) -> None:
        with self._lock:
            self._attempts[receiver] -= count
            if not self._attempts[receiver]:
                del self._attempts[receiver]
            if self._backlog and count:
                self._backlog = False
                self._wake_by(0.0)
            self._notify_if_idle()

    def _deliver(self, job: model.Job, event: bytes) -> None:
        """Make one attempt, in a place that was taken, and store what follows from it."""
        try:
            attempt = self._postback.attempt(job, event)
            state = self._insist(lambda: self._journal.record(job, attempt, now=self._clock()))
            self._log_attempt(job, attempt, state)
            self._observer.attempted(job, attempt, state)
            self._note_next(attempt.seconds_until_next)
        finally:
            self._leave_attempts(job.receiver, 1)

    def _note_next(self, seconds: float | None) -> None:
        with self._lock:
            if seconds is None:
                self._finished += 1
            else:
                self._wake_by(time.monotonic() + seconds)

    def _log_attempt(self, job: model.Job, attempt: model.Attempt, state: State) -> None:
        if attempt.error:
            log.warning(
                "attempt failed",
                extra=_facts(job)
                | {
                    "attempt": attempt.number,
                    "status_code": attempt.status_code,
                    "error": attempt.error,
                    "seconds_until_next": attempt.seconds_until_next,
                },
            )
        if state is not State.DELIVERING:
            story = {
                "outcome": job.outcome,
                "starts": job.starts,
                "attempts": attempt.number,
                "seconds": round((self._clock() - job.created_at).total_seconds(), 3),
            }
            log.info("job %s", state, extra=_facts(job) | story)

    # The scheduler's thread

    def _schedule(self) -> None:
        cores.keep_to_one()
        while not self._stopped.is_set():
            seconds = RETRY_SECONDS
            try:
                seconds = self._round()
            except errors.JournalError:
                pass  # logged where it was seen
            except Exception:
                log.exception("scheduler failed")
            self._sleep(seconds)

    def _round(self) -> float:
        """Do what is due, and return how many seconds there is nothing to do."""
        if self._journal.failure:
            self._journal.probe()
        self._start_waiting()
        return min(
            self._end_overdue(),
            self._stop_outlived(),
            self._start_due(),
            self._prune(),
            self._until_next_start(),
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
        return RETRY_SECONDS if outlived else math.inf

    def _start_due(self) -> float:
        """Start the attempts that are due; return the seconds until the next one is."""
        soonest, now = ROUND_SECONDS, self._clock()
        if now < self._last_round_at:  # the clock was set back
            self._journal.advance(latest=self._latest(now))
        self._last_round_at = now
        for receiver, due_at in [] if self._draining else self._journal.earliest_attempts():
            seconds = (due_at - now).total_seconds()
            if seconds > 0:
                soonest = min(soonest, seconds)
            elif self._start_attempts(receiver, now):
                soonest = 0.0  # there may be more
        return soonest

    def _start_attempts(self, receiver: str, now: datetime) -> int:
        """Start attempts that are due for one receiver; return how many."""
        with self._lock:
            places = self._take_attempts(receiver, MAX_ATTEMPTS_PER_RECEIVER)
        claimed: list[tuple[model.Job, bytes]] = []
        try:
            if places:
                claimed = self._journal.claim_due(receiver, now=now, limit=places)
        finally:
            self._leave_attempts(receiver, places - len(claimed))
        for job, event in claimed:
            if not self._start_thread(job.id, self._deliver, job, event):
                self._journal.put_off(job.id, until=now + timedelta(seconds=RETRY_SECONDS))
                self._leave_attempts(receiver, 1)
        return len(claimed)

    def _prune(self) -> float:
        """Remove some jobs that ended before RETENTION; return the seconds until the next look."""
        if time.monotonic() >= self._prune_at:
            before = self._clock() - timedelta(seconds=self._limits.retention_seconds)
            more = self._journal.prune(before=before, limit=PRUNE_BATCH) >= PRUNE_BATCH
            self._prune_at = time.monotonic() + (PRUNE_PAUSE_SECONDS if more else ROUND_SECONDS)
        return self._prune_at - time.monotonic()

    def _until_next_start(self) -> float:
        with self._lock:
            stuck = self._waiting > self._starting and not self._running and not self._draining
        return RETRY_SECONDS if stuck else math.inf

    def _latest(self, now: datetime) -> datetime:
        return now + timedelta(seconds=self._postback.longest_wait_seconds)

    # Waiting and waking

    def _sleep(self, seconds: float) -> None:
        with self._lock:
            if self._wake_at > 0:
                self._wake_at = time.monotonic() + seconds
                self._woken.wait_for(lambda: self._wake_at == 0, timeout=max(0.0, seconds))
            self._wake_at = math.inf

    def _wake(self) -> None:
        with self._lock:
            self._wake_by(0.0)

    def _wake_by(self, moment: float) -> None:
        """Make the scheduler look again by a moment (monotonic). The lock is held."""
        if moment < self._wake_at:
            self._wake_at = 0.0
            self._woken.notify()

    def _insist(self, work: Callable[[], T]) -> T:
        """Return what a write returns, trying until the journal takes it: nothing else may follow.

        Raises:
            JournalError: It never will, or the service stops.
        """
        while True:
            try:
                return work()
            except errors.JournalLostError:
                raise
            except errors.JournalError:
                if self._stopped.wait(RETRY_SECONDS):
                    raise

    def _is_idle(self) -> bool:
        # A job whose outcome is stored is not waited for, though its thread may go on.
        busy = self._accepting or self._starting or self._attempts
        return not busy and self._running.keys() <= self._outlived

    def _notify_if_idle(self) -> None:
        if self._draining and self._is_idle():
            self._idle.notify_all()


def _facts(job: model.Job) -> dict[str, Any]:
    return {"job_id": job.id, **job.forwarded}
