"""What happens between the 200 and the postback, in the loop that answers.

The server's loop also calls `Runner.work`. `work` claims accepted jobs while the executor has a
free worker and fewer than MAX_RUNNING analyses run, and has them analyzed. When an analysis has
ended, `work` stores its ending and begins an attempt to post it. When the attempt has ended, `work`
stores that, too. It also begins the attempts that are due, times out, and prunes. It never waits
for a worker or a receiver. All writes go through the writer, which puts many of them into one
commit and then calls each `then`.
"""

import contextlib
import functools
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from config import Config
from jobs import model
from jobs.dask_executor import DaskExecutor
from jobs.errors import JournalError, Refusal
from jobs.executor import Listener, WorkerExecutor
from jobs.journal import Journal
from jobs.model import Outcome, State
from jobs.writer import Writer
from postback import Sender
from web.metrics import Metrics

#: Attempts at once: for all receivers that are proven, because the last one succeeded, and for all
#: others, so that those that hang hold up no other; for one that is proven, and one that is not.
MAX_ATTEMPTS = 256
MAX_PER_RECEIVER = 128
MAX_PER_UNPROVEN_RECEIVER = 4

#: Receivers that are remembered as proven, until all are forgotten.
MAX_PROVEN = 10_000

#: Jobs at once that run alone because they shared a worker that died.
MAX_ALONE = 4

#: Seconds until something is tried again that failed: a write, or an attempt that could not begin.
RETRY_SECONDS = 1.0

#: An attempt that has no result so many seconds after POSTBACK_TIMEOUT was lost by an error, and is
#: made again.
LOST_SECONDS = 5.0

#: The loop looks at the journal at least once in so many seconds.
TICK_SECONDS = 1.0

#: Analyses started in one turn of the loop, and attempts for one receiver, so that answers need not
#: wait long.
MAX_STARTS, MAX_ATTEMPT_STARTS = 64, 16

#: After a look for due attempts, the next one waits so many times as long as this one took.
REST = 4

#: Jobs resent, or pruned with as many received postbacks, in one commit, so that nobody waits long
#: for it; and the pause after it.
BATCH = 100
BATCH_PAUSE_SECONDS = 0.02

#: Seconds between two looks for jobs to prune, when there was none.
PRUNE_SECONDS = 60.0

log = logging.getLogger("postback")


@dataclass(slots=True, kw_only=True)
class Run:
    """One job whose analysis, or attempt, is under way. The loop alone changes it.

    Attributes:
        is_posting: Its analysis has ended. While it has not, it takes one of MAX_RUNNING places.
        started_at: When its payload went to a worker that was ready; None before.
        times_out_at: By the monotonic clock, for its analysis or its attempt; infinite between.
        progress: What the analysis last reported: its `fraction`, its `note`, and when (`at`).
        event: What its attempt sends.
    """

    job: model.Job
    is_posting: bool = False
    started_at: datetime | None = None
    times_out_at: float = math.inf
    progress: Mapping[str, Any] | None = None
    event: bytes = b""


class Runner:
    """Takes accepted jobs to their end.

    Once it works, only the loop changes what is kept here, so there is no lock. Other threads may
    look at it. What they want changed they hand over. Only a drain is noted at once.

    Attributes:
        runs: What is under way, by the id of its job.
    """

    def __init__(
        self,
        *,
        config: Config,
        journal: Journal,
        executor: WorkerExecutor | DaskExecutor,
        sender: Sender,
        metrics: Metrics,
        job_url: Callable[[str], str],
        wake: Callable[[], None],
    ) -> None:
        self._config = config
        self._journal = journal
        self._executor = executor
        self._sender = sender
        self._metrics = metrics
        self._job_url = job_url
        self._clock = model.utc_now
        self._writer = Writer(journal)
        self._wake = wake  # has the loop call `work`
        self.runs: dict[str, Run] = {}  # while a worker, an attempt or the writer has the job
        self._waiting = 0  # accepted jobs that may start
        self._proven = {""}  # receivers whose last attempt succeeded; at first the configured one
        self._held: dict[str, float] = {}  # receiver: no attempt before, by the monotonic clock
        self._is_draining = False
        self._is_crowded = False  # a due attempt waits until another one ends
        self._drained = threading.Event()  # the drain has ended
        self._resending = threading.Lock()  # held by the one that resends all
        # When the loop looks for each kind of work, by the monotonic clock.
        self._attempts_at = self._prune_at = self._tick_at = self._work_at = 0.0
        self._times_out_at, self._rests_until = math.inf, 0.0

    # What the service asks for

    def start(self) -> None:
        """Make what is unfinished ready to go on. Call it once, before the loop calls `work`."""
        now = self._clock()
        crashed = self._journal.resume(now=now)
        self._journal.advance(latest=self._latest(now))
        self._waiting = self._journal.release_due_starts(now=now)
        for job in crashed:
            text = f"The service ended {job.interrupted} times while the analysis ran."
            run = self.runs[job.id] = Run(job=job, started_at=job.started_at)
            self._store(run, model.without_result(Outcome.CRASHED, text))
        if crashed or self._waiting:
            log.info("jobs resumed", extra={"waiting": self._waiting, "crashed": len(crashed)})

    def accept(self, job: model.Job, body: bytes, *, idempotency_key: str | None = None) -> str:
        """Store a job, and return its id. It is durable when the open transaction is committed.

        Only the loop may call it.

        Returns:
            The id of the first job, when one was accepted with the same key.

        Raises:
            Refusal: The key came with another body (422); the queue is full, the service stops, or
                the journal fails (503). Nothing was accepted.
        """
        if idempotency_key and (first := self._journal.accepted_before(idempotency_key, body)):
            return first
        self._refuse()
        self._journal.accept(job, body, idempotency_key=idempotency_key)
        self._waiting += 1
        return job.id

    def cancel(self, job_id: str) -> Callable[[], None]:
        """End a job with the outcome `canceled`, in the open transaction.

        Only the loop may call it.

        Returns:
            What the loop must call after the commit.

        Raises:
            MoveError: Its analysis has ended already.
            Refusal: There is no such job (404).
        """
        job = self._journal.current(job_id)
        ending = self._dated(job, model.without_result(Outcome.CANCELED, "The job was canceled."))
        self._end(job, ending, due_at=ending.finished_at)

        def follow_up() -> None:
            self._executor.stop(job_id)
            self.runs.pop(job_id, None)
            self._tick_at = 0.0  # count those that wait: it may have been one of them
            self._ended(job, ending, is_due=True)

        return follow_up

    def resend(self, job_id: str) -> None:
        """Have an ended job's event posted again, under the same webhook-id.

        Only the loop may call it.

        Raises:
            MoveError: It has not ended.
            Refusal: There is no such job (404).
        """
        self._journal.resend(job_id, now=self._clock())
        self._look_for_attempts(0.0)

    def resend_undelivered(self, since: datetime) -> int:
        """Make the events of all undelivered jobs that ended from `since` on due; return how many.

        The loop must not call it, because it waits between two batches.
        """
        now, resent = self._clock(), 0
        if not self._resending.acquire(blocking=False):  # or they could take every thread
            raise _unavailable("Busy", "Another resend is under way: send it again later.")
        try:
            while count := self._journal.resend_undelivered(since=since, now=now, limit=BATCH):
                resent += count
                self._writer.hand_over(lambda: None, lambda _: self._look_for_attempts(0.0))
                self._wake()
                if self._drained.wait(BATCH_PAUSE_SECONDS):
                    raise _unavailable("Stopping", f"Resent so far: {resent}. Send it again later.")
            self._journal.probe(durable=True)
        finally:
            self._resending.release()
        return resent

    def refuse_unready(self) -> None:
        """Return when a job can be accepted now and can start.

        Raises:
            Refusal: Why not (503).
        """
        self._refuse()
        if failure := self._journal.failure or self._writer.failure:
            raise failure
        if text := self._executor.failure():
            raise _unavailable("No worker", f"{text.rstrip('.')}. Jobs are accepted, and wait.")

    def drain(self, seconds: float) -> None:
        """Stop: let what runs end and be posted once, and leave the rest in the journal.

        Args:
            seconds: How long to wait for what is under way.
        """
        self._executor.drain()  # at once: whoever stops the service may have ended the workers, too
        with contextlib.suppress(JournalError):  # it was logged; what runs may still end
            self._journal.plan_stop()  # before what takes time, because a kill may follow
        self._is_draining = True
        self._wake()
        self._drained.wait(seconds)
        self._drained.set()
        self._journal.plan_stop()  # again, because it may have failed

    def _refuse(self) -> None:
        limit = self._config.max_pending
        if self._is_draining:
            raise _unavailable("Stopping", "The service is stopping: send it again later.")
        if self._waiting >= limit:
            if failure := self._journal.failure:  # what it did not take was counted, too
                raise failure
            # Other threads call this, too.
            running = sum(not run.is_posting for run in self.runs.copy().values())
            free = max(0, self._config.max_running - running)
            if self._waiting >= limit + free:
                text = f"{limit} jobs are waiting, which is MAX_PENDING: send it again later."
                raise _unavailable("Queue full", text)

    # In the loop

    def work(self) -> float:
        """Do what there is to do; return after how many seconds to call it again at the latest.

        Call it also before each turn, and when `wake` was called.
        """
        now = time.monotonic()
        try:
            self._executor.listen()
            if now >= self._work_at:
                self._work_once(now)
            self._sender.transport.work()
        except Exception as exc:
            self._attempts_at = 0.0  # what was looked for may still be due
            self._work_at = time.monotonic() + RETRY_SECONDS
            if not isinstance(exc, JournalError):  # which was logged where it was seen
                with contextlib.suppress(MemoryError):
                    log.exception("runner failed")
        if self._is_draining and not self.runs:
            self._drained.set()
        times = [self._tick_at, self._times_out_at, 0.0 if self._writer.waiting else math.inf]
        if not self._is_draining:
            times += [max(self._attempts_at, self._rests_until), self._prune_at]
        next_at = min(max(self._work_at, min(times)), self._sender.transport.due_at())
        return max(0.0, next_at - time.monotonic())

    def _work_once(self, now: float) -> None:
        if now >= self._times_out_at:
            # The machine may have slept: what has ended is not lost.
            self._executor.listen(None)
            self._sender.transport.work()
            self._time_out(now)
        is_tick = now >= self._tick_at
        self._writer.write(retry=is_tick)
        if is_tick:
            self._tick()
        if self._is_draining:
            return
        if self._waiting:
            self._start_accepted()
        if now >= max(self._attempts_at, self._rests_until):
            self._start_attempts()
        if now >= self._prune_at:
            self._prune()

    def _look_for_attempts(self, seconds: float) -> None:
        """Look for due attempts after so many seconds."""
        self._attempts_at = min(self._attempts_at, time.monotonic() + seconds)

    def _tick(self) -> None:
        """Do what no event announces, once a second at least."""
        self._tick_at = time.monotonic() + TICK_SECONDS
        if self._journal.failure:  # which looks at its files, too
            self._journal.probe()
        # It is counted anew, because it is wrong after a commit that failed.
        self._waiting = self._journal.release_due_starts(now=self._clock())

    def _time_out(self, now: float) -> None:
        """End every analysis whose time is over, and make lost attempts again."""
        for run in [run for run in self.runs.values() if run.times_out_at <= now]:
            if run.is_posting:
                self._attempt(run)
            else:
                self._executor.stop(run.job.id)
                seconds = self._config.job_timeout_seconds
                text = f"The analysis took longer than JOB_TIMEOUT, {seconds:g} s."
                self._store(run, model.without_result(Outcome.TIMED_OUT, text))
        times = [run.times_out_at for run in self.runs.values()]
        self._times_out_at = min(times, default=math.inf)

    def _start_accepted(self) -> None:
        """Claim the jobs that there is a place for, and have each analyzed."""
        jobs = [run.job for run in self.runs.values() if not run.is_posting]
        # Endings that could not be written yet still hold their results in memory.
        taken = len(jobs) + len(self._writer.failed)
        limit = min(self._config.max_running - taken, self._executor.free(), MAX_STARTS)
        if limit <= 0:
            return
        max_shared = MAX_ALONE - sum(job.alone == model.Alone.SHARED for job in jobs)
        max_interrupted = 1 - any(job.alone == model.Alone.INTERRUPTED for job in jobs)
        limits = {"limit": limit, "max_shared": max_shared, "max_interrupted": max_interrupted}
        claim = functools.partial(self._journal.claim, now=self._clock(), **limits)
        claimed = self._take(claim, is_posting=False)
        self._waiting = max(0, self._waiting - len(claimed))
        for run, body, kept in claimed:
            self._analyze(run, body, kept)
        if len(claimed) == MAX_STARTS:
            self._wake()  # there may be more

    def _take(self, claim: Callable[[], list[tuple[Any, ...]]], *, is_posting: bool) -> list[Any]:
        """Claim jobs, and note that they are under way. Nothing is claimed when that fails."""
        with self._journal.transaction():
            taken = [(Run(job=job, is_posting=is_posting), *rest) for job, *rest in claim()]
        self.runs |= {run.job.id: run for run, *_ in taken}
        return taken

    def _start_attempts(self) -> None:
        """Start the attempts that are due, and find out when the next ones are."""
        self._attempts_at, self._is_crowded = math.inf, False
        now, next_seconds, began = self._clock(), PRUNE_SECONDS, time.monotonic()
        receivers = self._journal.earliest_attempts()
        self._held = {one: at for one, at in self._held.items() if at > time.monotonic()}
        for receiver, due_at in sorted(receivers, key=lambda one: one[0] not in self._proven):
            seconds = max((due_at - now).total_seconds(), self.held_seconds(receiver))
            if seconds > 0:
                next_seconds = min(next_seconds, seconds)
            elif room := self._room(receiver):
                limit = min(room, MAX_ATTEMPT_STARTS)
                claim = functools.partial(self._journal.claim_due, receiver, now=now, limit=limit)
                for run, event in self._take(claim, is_posting=True):
                    run.event = event
                    self._attempt(run)
                next_seconds = 0.0  # there may be more
        self._look_for_attempts(next_seconds)
        # With thousands of receivers it takes long, and the loop has more to do.
        self._rests_until = time.monotonic() + REST * (time.monotonic() - began)

    def held_seconds(self, receiver: str) -> float:
        """Return for how long this receiver wants no attempt."""
        return self._held.get(receiver, 0.0) - time.monotonic()

    def _room(self, receiver: str) -> int:
        """Return how many more attempts may be made for this receiver now."""
        is_proven = receiver in self._proven
        limit = MAX_PER_RECEIVER if is_proven else MAX_PER_UNPROVEN_RECEIVER
        taken = [run.job.receiver for run in self.runs.values() if run.is_posting]
        taken = [one for one in taken if (one in self._proven) is is_proven]
        own, free = taken.count(receiver), MAX_ATTEMPTS - len(taken)
        room = max(0, min(limit - own, (free - own + 1) // 2))  # each leaves some for others
        self._is_crowded |= not room
        return room

    def _prune(self) -> None:
        now = self._clock()
        keep = timedelta(seconds=self._config.retention_seconds)
        schedule = timedelta(seconds=sum(self._config.postback_schedule_seconds))
        removed = self._journal.prune(
            before=now - keep, received_before=now - max(keep, schedule), limit=BATCH
        )
        if removed < BATCH:
            self._journal.advance(latest=self._latest(now))
        seconds = PRUNE_SECONDS if removed < BATCH else BATCH_PAUSE_SECONDS
        self._prune_at = time.monotonic() + seconds

    def _latest(self, now: datetime) -> datetime:
        """Return when an attempt, or a start, can be due at the latest."""
        longest = max(self._sender.longest_wait_seconds, *self._config.analysis_schedule_seconds, 0)
        return now + timedelta(seconds=longest)

    def _leave(self, run: Run) -> None:
        if self.runs.get(run.job.id) is run:  # not when it was claimed anew meanwhile
            del self.runs[run.job.id]
        if self._is_crowded:
            self._attempts_at = 0.0

    # The analysis of a job

    def _analyze(self, run: Run, body: bytes, kept: str | None) -> None:
        """Have the analysis run."""
        try:
            listener = Listener(
                started=functools.partial(self._note_start, run),
                returned=functools.partial(setattr, run, "times_out_at", math.inf),
                progressed=functools.partial(self._note_progress, run),
                kept=functools.partial(self._keep, run),
                ended=functools.partial(self._note_end, run),
            )
            self._executor.run(run.job, body, kept=kept, listener=listener)
        except Exception as exc:
            log.exception("analysis not begun", extra=run.job.facts)
            self._give_up(run, exc)

    def _note_start(self, run: Run) -> None:
        run.started_at = now = self._clock()
        if timeout := self._config.job_timeout_seconds:
            self._limit(run, timeout)
        if run.job.alone:  # before the payload goes, because the job may end the service
            with contextlib.suppress(JournalError), self._journal.transaction():
                self._journal.begin(run.job.id, now=now)

    def _limit(self, run: Run, seconds: float) -> None:
        run.times_out_at = time.monotonic() + seconds
        self._times_out_at = min(self._times_out_at, run.times_out_at)

    def _note_progress(self, run: Run, fraction: float, note: str) -> None:
        run.progress = {"fraction": fraction, "note": note, "at": self._clock()}

    def _keep(self, run: Run, value: str, answer: Callable[[str], None]) -> None:
        def then(problem: Exception | None) -> None:
            answer((str(problem) or type(problem).__name__) if problem else "")

        write = functools.partial(self._journal.keep, run.job.id, value)
        self._writer.hand_over(write, then, may_fail=True)

    def _note_end(self, run: Run, given: model.Ending | model.Again) -> None:
        """Have stored how the analysis ended, or that it is to run again."""
        run.times_out_at = math.inf
        try:
            if isinstance(given, model.Again):
                self._run_again(run, given)
            elif again := self._again(run.job, given):
                self._run_again(run, again)
            else:
                self._store(run, given)
        except MemoryError as exc:
            self._give_up(run, exc)

    def _again(self, job: model.Job, given: model.Ending) -> model.Again | None:
        """Log that an analysis failed, and return whether and when it runs again."""
        if given.outcome is not Outcome.FAILED:
            return None
        error, schedule = given.error or {}, self._config.analysis_schedule_seconds
        # Never the message, which may contain data.
        facts = {"type": error.get("type"), "frames": "; ".join(given.frames) or None}
        log.warning("analysis failed", extra=job.facts | facts)
        if not given.may_run_again or job.failures >= len(schedule):
            return None
        return model.Again(pause_seconds=schedule[job.failures], error=error)

    def _run_again(self, run: Run, again: model.Again) -> None:
        """Let a job wait for its next start."""
        seconds = again.pause_seconds

        def then(answer: Any) -> None:
            self._leave(run)
            if isinstance(answer, Exception):  # it was canceled while this waited
                return
            self._tick_at = 0.0  # count it, unless it has to wait
            if again.error:
                self._metrics.retried()
            facts = {"seconds": seconds, "alone": again.is_alone or None}
            log.info("analysis to run again", extra=run.job.facts | facts)

        if run.started_at is None:
            again = replace(again, has_started=False)
        write = functools.partial(self._journal.run_again, run.job.id, again, now=self._clock())
        self._writer.hand_over(write, then)

    def _store(self, run: Run, given: model.Ending, *, may_fail: bool = True) -> None:
        """Store how the analysis ended. Then make the first attempt, unless it has to wait.

        Args:
            run: The job.
            given: How it ended.
            may_fail: If this cannot be stored, store that the job could not be handled.
        """
        run.times_out_at, ending = math.inf, self._dated(run.job, given)

        def write() -> bytes | None:
            is_late = self.held_seconds(run.job.receiver) > 0 or not self._room(run.job.receiver)
            run.is_posting = True  # its place is free
            due_at = ending.finished_at if is_late else None
            event = self._end(run.job, ending, due_at=due_at)
            return None if is_late else event

        def then(event: Any) -> None:
            self._executor.held.discard(run.job.id)
            if isinstance(event, Refusal):  # it was canceled while this waited
                self._leave(run)
            elif isinstance(event, Exception):
                self._give_up(run, event)
            else:
                run.job = replace(run.job, outcome=ending.outcome)
                if event:
                    run.event = event
                    self._attempt(run)
                else:
                    self._leave(run)
                self._ended(run.job, ending, is_due=event is None)

        self._writer.hand_over(write, then, may_fail=may_fail)

    def _give_up(self, run: Run, exc: Exception) -> None:
        """End a job as failed, because the service could not handle it."""
        self._executor.stop(run.job.id)
        self._store(run, model.not_handled(exc), may_fail=False)

    # An attempt

    def _attempt(self, run: Run) -> None:
        """Begin an attempt. If it cannot begin, or has no result in time, it is made again."""

        def then(attempt: model.Attempt) -> None:
            write = functools.partial(self._journal.record, run.job, attempt, now=self._clock())
            self._writer.hand_over(write, functools.partial(self._attempted, run, attempt))
            run.times_out_at, run.event = math.inf, b""

        self._limit(run, self._config.postback_timeout_seconds + LOST_SECONDS)
        try:
            self._sender.attempt(run.job, run.event, then)
        except Exception:
            self._limit(run, RETRY_SECONDS)
            with contextlib.suppress(MemoryError):  # others are still to be begun
                log.exception("attempt not begun", extra=run.job.facts)

    def _attempted(self, run: Run, attempt: model.Attempt, state: State | Exception) -> None:
        """Follow up on an attempt that was recorded."""
        job = run.job
        self._leave(run)
        if isinstance(state, Exception):
            log.error("attempt not recorded", exc_info=state, extra=job.facts)
            return
        if attempt.hold_seconds:
            until = time.monotonic() + attempt.hold_seconds
            self._held[job.receiver] = max(until, self._held.get(job.receiver, 0.0))
        if len(self._proven) > MAX_PROVEN:
            self._proven.clear()
        (self._proven.add if attempt.delivered else self._proven.discard)(job.receiver)
        self._metrics.attempted(job, attempt, state)
        if not attempt.delivered:
            facts: dict[str, Any] = {"attempt": attempt.number, "receiver": job.receiver or None}
            facts |= {"status_code": attempt.status_code, "error": attempt.error}
            facts |= {"next_in_seconds": attempt.seconds_until_next}
            log.warning("attempt failed", extra=job.facts | facts)
        if attempt.seconds_until_next is not None:
            self._look_for_attempts(attempt.seconds_until_next)
            return
        seconds = round((self._clock() - job.created_at).total_seconds(), 3)
        facts = {"outcome": job.outcome, "starts": job.starts, "attempts": attempt.number}
        level = logging.INFO if attempt.delivered else logging.WARNING
        log.log(level, "job %s", state, extra={**job.facts, **facts, "seconds": seconds})

    # Shared

    def _dated(self, job: model.Job, given: model.Ending) -> model.Ending:
        """Return an ending with its times."""
        run = self.runs.get(job.id)
        started_at = run.started_at if run else job.started_at  # of an earlier run, perhaps
        return replace(given, started_at=started_at, finished_at=self._clock())

    def _end(self, job: model.Job, ending: model.Ending, *, due_at: datetime | None) -> bytes:
        """Store an ending and its event, in the open transaction, and return what is posted."""
        max_bytes, job_url = self._config.postback_max_bytes, self._job_url(job.id)
        event = model.event_of(job, ending, max_bytes=max_bytes, job_url=job_url)
        self._journal.end(job, ending, event, due_at=due_at)
        return event.body

    def _ended(self, job: model.Job, ending: model.Ending, *, is_due: bool) -> None:
        """Tell how a job ended, once that is committed."""
        if is_due:
            self._look_for_attempts(0.0)
        self._metrics.ended_analysis(job, ending)
        level = logging.DEBUG if ending.outcome is Outcome.SUCCEEDED else logging.INFO
        log.log(level, "analysis ended", extra={**job.facts, "outcome": ending.outcome})


def _unavailable(title: str, detail: str) -> Refusal:
    return Refusal(503, title, detail, retry_after_seconds=5)
