"""What happens between the 200 and the postback: one daemon thread a job, and one scheduler.

The scheduler thread claims accepted jobs while the executor has a free worker and fewer than
MAX_RUNNING analyses run, and starts a thread for each. A job's thread has the analysis run, gives
up its place, has the event stored, makes the first attempt, hands what came of it to the scheduler,
and ends. The scheduler writes for all of them, so that they share commits, and goes on from there:
each function named `then` runs in it. It also starts the attempts that are due, times out, and
prunes. It is the only thread that claims.
"""

import contextlib
import functools
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from config import Config
from jobs import model
from jobs.dask_executor import DaskExecutor
from jobs.errors import JournalError, JournalLost, MoveError, Refusal
from jobs.executor import Listener, WorkerExecutor
from jobs.journal import Claimed, Journal
from jobs.model import Outcome, State
from jobs.writer import Writer
from postback import Sender
from web.metrics import Metrics

#: Attempts at once: in all, to one receiver, and to one whose last attempt failed.
MAX_ATTEMPTS = 512
MAX_PER_RECEIVER = 128
MAX_PER_FAILING_RECEIVER = 4

#: Jobs at once that run alone because they shared a worker that died.
MAX_ALONE = 4

#: Seconds until something is tried again that failed: a write, or a thread that did not start.
RETRY_SECONDS = 1.0

#: Accepting pauses while more jobs than this are behind: for ten times as long as the scheduler had
#: to wait for its turn, and at most for so many seconds.
MAX_BEHIND = 16
PAUSE_FACTOR = 10
MAX_PAUSE_SECONDS = 0.1

#: The scheduler looks at the journal and at idle connections at least once in so many seconds.
TICK_SECONDS = 1.0

#: Jobs pruned, or resent, in one commit, so that nobody waits long for it; and the pause after it.
BATCH = 100
BATCH_PAUSE_SECONDS = 0.02

#: Seconds between two looks for jobs to prune, when there was none.
PRUNE_SECONDS = 60.0

log = logging.getLogger("postback")


@dataclass(slots=True, kw_only=True)
class Run:
    """One job that a thread works for.

    Attributes:
        is_posting: Its analysis has ended; until then it holds one of MAX_RUNNING places.
        outcome: None until its analysis has ended, here or from outside.
        started_at: When its analysis began; None until the worker has said so.
        times_out_at: By the monotonic clock; infinite until its analysis has begun.
        progress: What the analysis last reported: its `fraction`, its `note`, and when (`at`).
    """

    job: model.Job
    is_posting: bool = False
    outcome: Outcome | None = None
    started_at: datetime | None = None
    times_out_at: float = math.inf
    progress: Mapping[str, Any] | None = None


class Runner:
    """Takes accepted jobs to their end.

    Every method may be called from any thread; `start` and `drain` once each.
    """

    def __init__(
        self,
        *,
        config: Config,
        max_running: int,
        journal: Journal,
        executor: WorkerExecutor | DaskExecutor,
        sender: Sender,
        metrics: Metrics,
        job_url: Callable[[str], str],
        clock: Callable[[], datetime] = model.utc_now,
    ) -> None:
        self._config = config
        self._max_running = max_running
        self._journal = journal
        self._executor = executor
        self._sender = sender
        self._metrics = metrics
        self._job_url = job_url
        self._clock = clock
        self._writer = Writer(journal, on_write=self.wake)
        self._stopped = threading.Event()
        self._woken = threading.Event()  # the scheduler has something to do
        self._woken_at = 0.0  # by the monotonic clock
        self._lag_seconds = 0.0  # how long the scheduler had to wait for its turn when last woken
        self._has_caught_up = threading.Event()  # accepting need not wait any more
        # A job is in `_runs` exactly while somebody works for it. Whoever changes what is below
        # holds the lock. Who needs a transaction of the journal, too, begins that first.
        self._lock = threading.Lock()
        self._left = threading.Condition(self._lock)  # notified when a job leaves during a drain
        self._runs: dict[str, Run] = {}
        self._waiting = 0  # accepted jobs that may start and have no thread
        self._failing: set[str] = set()  # receivers whose last attempt failed
        self._held: dict[str, float] = {}  # receiver: no attempt before, by the monotonic clock
        self._is_crowded = False  # a due attempt waits until another one ends
        self._is_draining = False
        # When the scheduler looks for each kind of work, by the monotonic clock.
        self._attempts_at = self._starts_at = self._prune_at = self._tick_at = 0.0
        self._times_out_at = math.inf
        self._scheduler = threading.Thread(target=self._schedule, name="scheduler", daemon=True)

    # What the service asks for

    def start(self) -> None:
        """Resume what is unfinished, and begin to work."""
        now = self._clock()
        crashed, self._waiting = self._journal.resume(now=now, latest=self._latest(now))
        for job in crashed:
            text = f"The service ended {job.interrupted} times while the analysis ran."
            self._end_from_outside(job, model.crashed(text))
        if crashed or self._waiting:
            log.info("jobs resumed", extra={"waiting": self._waiting, "crashed": len(crashed)})
        name, before = self._config.analysis, self._journal.set_analysis(self._config.analysis)
        if self._waiting and before not in (None, name):
            facts = {"before": before, "now": name, "waiting": self._waiting}
            log.warning("analysis changed", extra=facts)
        self._scheduler.start()

    def accept(self, job: model.Job, body: bytes, *, idempotency_key: str | None = None) -> str:
        """Store a job, and return its id. It is durable when the open transaction is committed.

        Call `wake` after the answer has left.

        Returns:
            The id of the first job, when one was accepted with the same key.

        Raises:
            Refusal: The key came with another body (422); the queue is full, the service stops, or
                the journal fails (503). Nothing was accepted.
        """
        with self._journal.transaction(durable=True):
            if idempotency_key:
                first = self._journal.accepted_before(idempotency_key, body)
                if first:
                    return first
            self._refuse()
            self._journal.accept(job, body, idempotency_key=idempotency_key)
            with self._lock:
                self._waiting += 1
        return job.id

    def wake(self) -> None:
        """Have the scheduler look for what there is to do."""
        if not self._woken.is_set():
            self._woken_at = time.monotonic()
            self._woken.set()

    def let_catch_up(self) -> None:
        """Wait a little if accepting would outrun delivering.

        That is when more than MAX_BEHIND jobs could start or wait for the scheduler, and the
        scheduler itself had to wait for its turn.
        """
        seconds = min(PAUSE_FACTOR * self._lag_seconds, MAX_PAUSE_SECONDS)
        if self._count_behind() > MAX_BEHIND:
            self._has_caught_up.clear()
            self._has_caught_up.wait(seconds)

    def _count_behind(self) -> int:
        with self._lock:
            is_free = self._count(is_posting=False) < self._max_running
            return self._writer.count() + (self._waiting if is_free else 0)

    def cancel(self, job_id: str) -> None:
        """End a job with the outcome `canceled`. It is durable when this returns.

        Raises:
            MoveError: Its analysis has ended already.
            Refusal: There is no such job (404).
        """
        self._end_from_outside(self._journal.job(job_id), model.canceled(), durable=True)
        with contextlib.suppress(JournalError):  # it is counted once a second, too
            self._count_waiting()

    def resend(self, job_id: str) -> None:
        """Post an ended job's event again, under the same webhook-id.

        Raises:
            MoveError: It has not ended.
            Refusal: There is no such job (404).
        """
        self._journal.resend(job_id, now=self._clock())
        self._look_for_attempts(0.0)

    def resend_undelivered(self, since: datetime) -> int:
        """Post the events of all undelivered jobs that ended from `since` on; return how many."""
        now, resent = self._clock(), 0
        while count := self._journal.resend_undelivered(since=since, now=now, limit=BATCH):
            resent += count
            self._look_for_attempts(0.0)
            if self._stopped.wait(BATCH_PAUSE_SECONDS):
                break
        self._journal.probe(durable=True)
        return resent

    def run_of(self, job_id: str) -> Run | None:
        """Return what a thread does for this job now, if one does."""
        return self._runs.get(job_id)

    def refuse_unready(self) -> None:
        """Return when a job can be accepted now and can start.

        Raises:
            Refusal: Why not (503).
        """
        self._refuse()
        if failure := self._journal.failure or self._writer.failure:
            raise failure
        if text := self._executor.failure():
            raise _unavailable("No worker", f"{text} Jobs are accepted, and wait.")

    def drain(self, seconds: float) -> int:
        """Stop: start nothing more, let what runs end, leave the rest in the journal.

        Args:
            seconds: How long to wait for what is under way.

        Returns:
            How many jobs wait for the next start.
        """
        self._executor.drain()  # at once: whoever stops the service may have ended the workers, too
        with contextlib.suppress(JournalError):  # it was logged; what runs may still end
            self._journal.plan_stop()  # before all else, because a kill may follow
        with self._lock:
            self._is_draining = True
            self._left.wait_for(lambda: not self._runs, timeout=seconds)
        self._stopped.set()
        self.wake()
        if self._scheduler.is_alive():
            self._scheduler.join(RETRY_SECONDS)
        self._journal.put_back()
        return self._journal.count_unfinished()

    def _refuse(self) -> None:
        limit = self._config.max_pending
        is_full = self._waiting >= limit
        if is_full:
            with self._lock:
                free = max(0, self._max_running - self._count(is_posting=False))
                is_full = self._waiting >= limit + free
        if self._is_draining:
            raise _unavailable("Stopping", "The service is stopping: send it again later.")
        if is_full:
            text = f"{limit} jobs are waiting, which is MAX_PENDING: send it again later."
            raise _unavailable("Queue full", text)

    def _count(self, *, is_posting: bool, receiver: str | None = None) -> int:
        runs = [run for run in self._runs.values() if run.is_posting is is_posting]
        return len([run for run in runs if receiver in (None, run.job.receiver)])

    # In the scheduler's thread, mostly

    def _look_for_attempts(self, seconds: float) -> None:
        """Have the scheduler look for due attempts after so many seconds."""
        with self._lock:
            at = time.monotonic() + seconds
            if at < self._attempts_at:
                self._attempts_at = at
                self.wake()

    def _schedule(self) -> None:
        while not self._stopped.is_set():
            try:
                self._schedule_once()
                if not self._has_caught_up.is_set() and self._count_behind() <= MAX_BEHIND:
                    self._has_caught_up.set()
                self._wait()
            except JournalLost:
                break  # the process is about to end
            except Exception as exc:
                self._attempts_at = 0.0  # what was looked for may still be due
                with contextlib.suppress(MemoryError):
                    if not isinstance(exc, JournalError):  # which was logged where it was seen
                        log.exception("scheduler failed")
                    self._stopped.wait(RETRY_SECONDS)
        with contextlib.suppress(Exception):  # what is not written now is done again
            self._writer.write()
        self._writer.close()

    def _wait(self) -> None:
        times = (self._attempts_at, self._starts_at, self._prune_at, self._times_out_at)
        seconds = min(min(times) - time.monotonic(), TICK_SECONDS)
        if self._woken.wait(max(0.0, seconds)):
            self._lag_seconds = time.monotonic() - self._woken_at
        self._woken.clear()

    def _schedule_once(self) -> None:
        now = time.monotonic()
        is_tick = now >= self._tick_at
        self._writer.write(retry=is_tick)
        if is_tick:
            self._tick()
        if now >= self._times_out_at:
            self._time_out(now)
        if self._is_draining:
            return
        if now >= self._starts_at:
            self._release_due_starts()
        if self._waiting:
            self._start_accepted()
        if now >= self._attempts_at:
            self._start_attempts()
        if now >= self._prune_at:
            self._prune()

    def _tick(self) -> None:
        """Look once a second at what nobody tells."""
        self._tick_at = time.monotonic() + TICK_SECONDS
        self._sender.close_idle()
        if self._journal.failure:  # which looks at its files, too
            self._journal.probe()
        self._count_waiting()  # a commit that failed may have left jobs

    def _time_out(self, now: float) -> None:
        """End every analysis whose time is over."""
        with self._lock:
            late = [run for run in self._runs.values() if run.times_out_at <= now]
        for run in late:
            ending = model.timed_out(self._config.job_timeout_seconds or 0)
            try:
                self._end_from_outside(run.job, ending)
            except MoveError:
                log.debug("analysis ended in time", extra=run.job.facts)
            run.times_out_at = math.inf
        with self._lock:
            times = (run.times_out_at for run in self._runs.values())
            self._times_out_at = min(times, default=math.inf)

    def _release_due_starts(self) -> None:
        now = self._clock()
        released, next_at = self._journal.release_due_starts(now=now)
        seconds = (next_at - now).total_seconds() if next_at else math.inf
        with self._lock:
            self._waiting += released
            self._starts_at = time.monotonic() + min(max(seconds, 0.0), PRUNE_SECONDS)

    def _start_accepted(self) -> None:
        """Claim the jobs that there is a place for, and start a thread for each."""
        with self._lock:
            jobs = [run.job for run in self._runs.values() if not run.is_posting]
        places = self._max_running - len(jobs) - self._writer.count_failed()  # they are in memory
        limit = min(places, self._executor.free())
        if limit <= 0:
            return
        shared = sum(job.alone == model.Alone.SHARED for job in jobs)
        interrupted = any(job.alone == model.Alone.INTERRUPTED for job in jobs)
        runs: dict[str, Run] = {}
        try:
            with self._journal.transaction():
                claimed = self._journal.claim(
                    now=self._clock(),
                    limit=limit,
                    max_shared=MAX_ALONE - shared,
                    max_interrupted=0 if interrupted else 1,
                )
                runs = {one.job.id: Run(job=one.job) for one in claimed}
                # When the claim comes back short, few or none wait, and to count them is cheap.
                left = self._journal.count_waiting() if len(claimed) < limit else None
                with self._lock:  # before the commit: a cancel may follow it at once
                    self._runs |= runs
                    self._waiting = max(0, self._waiting - len(claimed)) if left is None else left
        except BaseException:
            for run in runs.values():
                self._leave(run)
            raise
        for one in claimed:
            self._start_thread(runs[one.job.id], self._work, one)

    def _start_attempts(self) -> None:
        """Start the attempts that are due, and find out when the next ones are."""
        with self._lock:
            self._attempts_at, self._is_crowded = math.inf, False
        now, next_seconds = self._clock(), PRUNE_SECONDS
        receivers = self._journal.earliest_attempts()
        with self._lock:  # what is known of others is of no use any more
            self._failing.intersection_update(receiver for receiver, _ in receivers)
            self._held = {one: at for one, at in self._held.items() if at > time.monotonic()}
        for receiver, due_at in receivers:
            seconds = max((due_at - now).total_seconds(), self._held_seconds(receiver))
            if seconds > 0:
                next_seconds = min(next_seconds, seconds)
                continue
            with self._lock:
                room = self._room(receiver)
            if room:
                for job, event in self._journal.claim_due(receiver, now=now, limit=room):
                    run = Run(job=job, is_posting=True, outcome=job.outcome)
                    with self._lock:
                        self._runs[job.id] = run
                    self._start_thread(run, self._post, event)
                next_seconds = 0.0  # there may be more
        self._look_for_attempts(next_seconds)

    def _held_seconds(self, receiver: str) -> float:
        """Return for how long this receiver wants no attempt."""
        return self._held.get(receiver, 0.0) - time.monotonic()

    def _room(self, receiver: str) -> int:
        """Return how many more attempts may be made for this receiver now. The lock is held."""
        failing = receiver in self._failing
        limit = MAX_PER_FAILING_RECEIVER if failing else MAX_PER_RECEIVER
        limit -= self._count(is_posting=True, receiver=receiver)
        room = max(0, min(limit, MAX_ATTEMPTS - self._count(is_posting=True)))
        self._is_crowded |= not room
        return room

    def _start_thread(
        self, run: Run, work: Callable[[Run, Any], bool], given: Claimed | bytes
    ) -> None:
        """Start a thread that works for a job. If the system has none, the job waits a second."""
        arguments, name = (run, work, given), run.job.id
        try:
            threading.Thread(target=self._guard, args=arguments, name=name, daemon=True).start()
        except (RuntimeError, MemoryError) as exc:  # can't start new thread
            if run.is_posting:
                self._put_off(run)
            else:
                self._run_again(run, model.Again(pause_seconds=RETRY_SECONDS))
            with contextlib.suppress(MemoryError):  # others are still to be started
                log.warning("thread not started", extra={**run.job.facts, "error": str(exc)})

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

    # In a job's thread, mostly

    def _guard(self, run: Run, work: Callable[[Run, Any], bool], given: Claimed | bytes) -> None:
        """Do the work, and whatever happens leave no job without a thread or a next step."""
        try:
            if work(run, given):
                return
        except JournalError:
            log.debug("job left to the next start", extra=run.job.facts)
        except BaseException as exc:
            while not self._stopped.is_set():
                with contextlib.suppress(Exception):
                    self._give_up(run, type(exc).__name__)
                    break
                self._stopped.wait(RETRY_SECONDS)
            log.exception("job's thread failed", extra=run.job.facts)
            return
        self._leave(run)

    def _give_up(self, run: Run, kind: str) -> None:
        """End the analysis as failed; if it has ended, have the attempt made again."""
        given = model.without_result(Outcome.FAILED, kind, "The result could not be handled.")
        ending, event = self._prepare(run.job, given)

        def then(answer: Any) -> None:
            if isinstance(answer, MoveError):
                self._put_off(run)
                return
            self._leave(run)
            if answer is None:
                run.outcome = ending.outcome
                self._ended(run.job, ending, is_due=True)

        due_at = ending.finished_at
        write = functools.partial(self._journal.end, run.job, ending, event, due_at=due_at)
        self._writer.hand_over(write, then)

    def _put_off(self, run: Run) -> None:
        """Make an attempt that was taken, but not made, due again."""
        if self._runs.get(run.job.id) is not run:  # another thread makes it
            return
        until = self._clock() + timedelta(seconds=RETRY_SECONDS)

        def then(_: Any) -> None:
            self._look_for_attempts(RETRY_SECONDS)
            self._leave(run)

        self._writer.hand_over(lambda: self._journal.put_off(run.job.id, until=until), then)

    def _leave(self, run: Run) -> None:
        with self._lock:
            if self._runs.get(run.job.id) is run:  # not when it was claimed anew meanwhile
                del self._runs[run.job.id]
            if self._is_crowded:
                self._attempts_at = 0.0
            if self._is_crowded or (self._waiting and not run.is_posting):
                self.wake()
            if self._is_draining:
                self._left.notify_all()

    def _work(self, run: Run, claimed: Claimed) -> bool:
        """Have the analysis run, store the event, and make the first attempt.

        Returns:
            Whether the scheduler goes on with the job.
        """
        if run.outcome:  # it was canceled just now
            return False
        listener = Listener(
            started=lambda: self._note_start(run),
            progressed=lambda fraction, note: self._note_progress(run, fraction, note),
            kept=lambda value: self._journal.keep(run.job.id, value),
        )
        job, body, kept = run.job, claimed.body, claimed.kept
        event = None
        with self._executor.run(job, body, kept=kept, listener=listener) as ending:
            again = self._again(job, ending)
            if isinstance(ending, model.Ending) and not again:
                event = self._store(run, ending)
        if again:
            self._run_again(run, again)
            return True
        return event is not None and self._post(run, event)

    def _note_start(self, run: Run) -> None:
        run.started_at = self._clock()
        if run.outcome:  # it was canceled just before
            self._executor.stop(run.job.id)
        if timeout := self._config.job_timeout_seconds:
            run.times_out_at = time.monotonic() + timeout
            with self._lock:
                if run.times_out_at < self._times_out_at:
                    self._times_out_at = run.times_out_at
                    self.wake()

    def _note_progress(self, run: Run, fraction: float, note: str) -> None:
        run.progress = {"fraction": fraction, "note": note, "at": self._clock()}

    def _again(
        self, job: model.Job, ending: model.Ending | model.Again | None
    ) -> model.Again | None:
        """Return whether and when an analysis runs again; None when it has ended."""
        if not isinstance(ending, model.Ending):
            return ending
        if ending.outcome is not Outcome.FAILED:
            return None
        error, schedule = ending.error or {}, self._config.analysis_schedule_seconds
        # Never the message, which may contain data.
        facts = {"type": error.get("type"), "frames": "; ".join(ending.frames) or None}
        if log.isEnabledFor(logging.DEBUG):
            facts["error"] = error.get("message")
        log.warning("analysis failed", extra=job.facts | facts)
        if not ending.may_run_again or job.failures >= len(schedule):
            return None
        return model.Again(pause_seconds=schedule[job.failures], error=error)

    def _run_again(self, run: Run, again: model.Again) -> None:
        """Let a job wait for its next start."""
        seconds = again.pause_seconds
        next_start_at = self._clock() + timedelta(seconds=seconds) if seconds else None
        write = functools.partial(
            self._journal.run_again,
            run.job.id,
            next_start_at=next_start_at,
            has_started=run.started_at is not None,
            is_alone=again.is_alone,
            error=again.error,
        )

        def then(answer: Any) -> None:
            self._leave(run)
            if isinstance(answer, Exception):  # it was canceled at this very moment
                return
            with self._lock:
                self._waiting += not seconds
                self._starts_at = min(self._starts_at, time.monotonic() + seconds)
            if again.error:
                self._metrics.retried()
            facts = {"seconds": seconds, "alone": again.is_alone or None}
            log.info("analysis to run again", extra=run.job.facts | facts)

        self._writer.hand_over(write, then)

    def _store(self, run: Run, given: model.Ending) -> bytes | None:
        """Store how the analysis ended; return the event if this thread is to post it now."""
        posts_now = self._begin_to_post(run)
        ending, event = self._prepare(run.job, given)
        answer = queue.SimpleQueue[Any]()

        def then(exc: Any) -> None:
            answer.put(exc)
            if exc is None:
                run.outcome = ending.outcome
                self._ended(run.job, ending, is_due=not posts_now)

        due_at = None if posts_now else ending.finished_at
        write = functools.partial(self._journal.end, run.job, ending, event, due_at=due_at)
        self._writer.hand_over(write, then, may_fail=True)
        exc = answer.get()
        if exc and not isinstance(exc, MoveError):  # else it was canceled, or timed out, just now
            raise exc
        return event.body if posts_now and not exc else None

    def _begin_to_post(self, run: Run) -> bool:
        """Give up the place of a job; return whether its thread may make the first attempt now."""
        receiver = run.job.receiver
        with self._lock:
            posts_now = self._held_seconds(receiver) <= 0 and self._room(receiver) > 0
            run.is_posting = True
            run.times_out_at = math.inf
            if self._waiting:
                self.wake()
            return posts_now

    def _post(self, run: Run, event: bytes) -> bool:
        """Make one attempt, and hand over what came of it."""
        attempt = self._sender.attempt(run.job, event)
        write = functools.partial(self._journal.record, run.job, attempt, now=self._clock())
        self._writer.hand_over(write, functools.partial(self._attempted, run, attempt))
        return True

    def _attempted(self, run: Run, attempt: model.Attempt, state: State | Exception) -> None:
        """Follow up on an attempt that was recorded."""
        job = run.job
        if isinstance(state, Exception):
            if not isinstance(state, JournalError):
                log.error("attempt not recorded", exc_info=state, extra=job.facts)
            self._leave(run)
            return
        with self._lock:
            if attempt.hold_seconds:
                self._held[job.receiver] = time.monotonic() + attempt.hold_seconds
            (self._failing.discard if attempt.delivered else self._failing.add)(job.receiver)
        self._leave(run)
        if attempt.seconds_until_next is not None:
            self._look_for_attempts(attempt.seconds_until_next)
        self._metrics.attempted(job, attempt, state)
        if not attempt.delivered:
            facts: dict[str, Any] = {"attempt": attempt.number, "status_code": attempt.status_code}
            facts |= {"error": attempt.error, "next_in_seconds": attempt.seconds_until_next}
            log.warning("attempt failed", extra=job.facts | facts)
        if attempt.seconds_until_next is not None:
            return
        seconds = round((self._clock() - job.created_at).total_seconds(), 3)
        facts = {"outcome": run.outcome, "starts": job.starts, "attempts": attempt.number}
        level = logging.INFO if attempt.delivered else logging.WARNING
        log.log(level, "job %s", state, extra={**job.facts, **facts, "seconds": seconds})

    # Shared by all threads

    def _count_waiting(self) -> None:
        with self._journal.transaction(), self._lock:
            self._waiting = self._journal.count_waiting()

    def _end_from_outside(
        self, job: model.Job, ending: model.Ending, *, durable: bool = False
    ) -> None:
        """End a job while its analysis may run: what it returns later counts for nothing.

        Raises:
            MoveError: It has ended already.
        """
        ending, event = self._prepare(job, ending)
        with self._journal.transaction(durable=durable):
            self._journal.end(job, ending, event, due_at=ending.finished_at)
            run = self._runs.get(job.id)  # before an attempt can take its place
        if run:
            run.outcome = ending.outcome
        self._executor.stop(job.id)
        self._ended(job, ending, is_due=True)

    def _prepare(self, job: model.Job, given: model.Ending) -> tuple[model.Ending, model.Event]:
        """Return an ending with its times, and its event."""
        run = self._runs.get(job.id)
        started_at = run.started_at if run else job.started_at  # of an earlier run, perhaps
        ending = replace(given, started_at=started_at, finished_at=self._clock())
        max_bytes, job_url = self._config.postback_max_bytes, self._job_url(job.id)
        return ending, model.event_of(job, ending, max_bytes=max_bytes, job_url=job_url)

    def _ended(self, job: model.Job, ending: model.Ending, *, is_due: bool) -> None:
        """Tell how a job ended, once that is committed."""
        if is_due:
            self._look_for_attempts(0.0)
        self._metrics.ended_analysis(job, ending)
        level = logging.DEBUG if ending.outcome is Outcome.SUCCEEDED else logging.INFO
        log.log(level, "analysis ended", extra={**job.facts, "outcome": ending.outcome})


def _unavailable(title: str, detail: str) -> Refusal:
    return Refusal(503, title, detail, retry_after_seconds=5)
