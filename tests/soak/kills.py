"""Kills the real service and its workers at random under load, and holds it to its promises.

`./run soak [seconds] [seed]` sends jobs without a pause to a service that is ended by SIGKILL again
and again, also while it starts, and started anew on the same journal, with one executor or the
other. In between its workers are killed. A ledger is kept on this side: who was promised what, and
what came. The first broken promise ends the run with exit code 1. At the end the service is left
alone until everything promised has come.
"""

import contextlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import requests

from jobs import model
from tests.harness import ROOT, Caller, RealProcess, environment, executed, poll
from tests.receiver import Receiver, Recorded

#: Connections that send jobs, each the next as soon as the last is answered.
CALLERS = 12

#: Callers wait while so many jobs are on their way, or the end of a run would take long.
MAX_WAITING = 1500

#: Seconds from the ready line until something comes that an earlier process promised.
RESUME_SECONDS = 2.0

#: Of a hundred kills, those that come while the service starts.
WHILE_STARTING = 15

#: Seconds for the last process to end everything, and for any process to be ready.
PATIENCE_SECONDS = 60.0

SETTINGS = {
    "ANALYSIS": "tests.misbehaving:work",
    "POSTBACK_SCHEDULE": " ".join(["200ms"] * 20),
    "RETENTION": "20s",  # pruning goes on beside all this
    "LOG_LEVEL": "error",
}


@dataclass
class Ledger:
    """What was sent, promised and delivered, as seen from outside.

    Attributes:
        sent: The numbers that were sent as data.
        promised: The number behind each id that was answered 200.
        waiting: The promised ids that were not delivered yet.
        bodies: What came for each id, hashed.
        delivered: The ids whose postback was answered 200.
        owners: The id for each number.
        owed: What an earlier process promised, until the first of it comes.
        ready_at: When the process was ready (monotonic).
        violation: The first broken promise.
    """

    sent: set[float] = field(default_factory=set)
    promised: dict[str, float] = field(default_factory=dict)
    waiting: set[str] = field(default_factory=set)
    bodies: dict[str, int] = field(default_factory=dict)
    delivered: set[str] = field(default_factory=set)
    owners: dict[float, str] = field(default_factory=dict)
    owed: set[str] = field(default_factory=set)
    ready_at: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    violation: str = ""

    def promise(self, job_id: str, number: float) -> None:
        """Note an answer 200."""
        self.demand(job_id not in self.promised, f"{job_id} was given to two jobs")
        self._own(job_id, number)
        self.promised[job_id] = number
        if job_id not in self.delivered:
            self.waiting.add(job_id)

    def receive(self, job_id: str, body: bytes, *, answer: int) -> None:
        """Note a postback, and how it is answered."""
        event, is_new = json.loads(body)["data"], job_id not in self.bodies
        self.demand(event["id"] == job_id, f"{job_id} came with the event of {event['id']}")
        self.demand(self.bodies.setdefault(job_id, hash(body)) == hash(body), f"{job_id} changed")
        if event["outcome"] != "crashed":
            self.demand(event["outcome"] == "succeeded", f"{job_id} ended as {event['outcome']}")
            self.demand(event["result"] in self.sent, f"{job_id} was never sent")
            self._own(job_id, event["result"])
        elif is_new:
            self._explain_crash(job_id, event["error"]["message"])
        if answer == 200:
            self.counts["repeats"] += job_id in self.delivered
            self.delivered.add(job_id)
            self.waiting.discard(job_id)
        if job_id in self.owed:
            self.owed.clear()
            took = round(1000 * (time.monotonic() - self.ready_at))
            self.keep_largest(resumed_ms=took)
            self.demand(took < 1000 * RESUME_SECONDS, f"postbacks resumed after {took} ms")

    def demand(self, holds: bool, violation: str) -> None:  # noqa: FBT001 - reads like assert
        """Note a broken promise, unless the first argument holds."""
        if not holds:
            self.violation = self.violation or violation

    def keep_largest(self, **figures: int) -> None:
        for name, value in figures.items():
            self.counts[name] = max(self.counts[name], value)

    def line(self) -> str:
        """Return all counts in one line."""
        counts = {
            "accepted": len(self.promised),
            "delivered": len(self.delivered),
            "lost": len(self.waiting) - self.counts["undelivered"],
            "unanswered": len(self.sent) - len(self.promised),
            **self.counts,
        }
        return " ".join(f"{name}={value}" for name, value in counts.items())

    def _explain_crash(self, job_id: str, message: str) -> None:
        # With a killed worker at most one job crashes: the one that was alone in it.
        self.counts["crashed"] += 1
        possible = self.counts["worker_kills"]
        if "signal 9" not in message:  # it ran at so many kills of the service
            possible += self.counts["kills"] // model.MAX_INTERRUPTED * CALLERS
        is_explained = self.counts["crashed"] <= possible
        self.demand(is_explained, f"{job_id} crashed, which no kill explains")

    def _own(self, job_id: str, number: float) -> None:
        owner = self.owners.setdefault(number, job_id)
        self.demand(owner == job_id, f"{job_id} and {owner} are for the same payload")
        known = self.promised.get(job_id, number)
        self.demand(known == number, f"{job_id} came with another payload")


class Soak:
    """The service, who calls it, who kills it, and a receiver that does not always answer well."""

    #: Of a hundred postbacks, those answered 500, and those whose connection is cut.
    failing, cut = 1, 1
    settings: Mapping[str, str] = SETTINGS

    def __init__(self, directory: Path, seed: int) -> None:
        self.ledger = Ledger()
        self._lock = threading.Lock()  # held by who reads or writes the ledger
        self._chance = random.Random(seed)  # of the kills alone, so that the seed repeats them
        self._luck = random.Random(seed + 1)  # of the receiver
        self._journal = directory / "journal.db"
        self._numbers = itertools.count(1)
        self._up, self._over = threading.Event(), threading.Event()
        self._receiver = Receiver(default=self._answer)

    def run(self, seconds: float, kills: int) -> None:
        """Kill and start for so long, and at least so often; then wait for what was promised."""
        deadline = time.monotonic() + seconds
        with self._receiver, ThreadPoolExecutor(CALLERS) as callers:
            calls = [callers.submit(self._call) for _ in range(CALLERS)]
            try:
                while time.monotonic() < deadline or self.ledger.counts["kills"] < kills:
                    self._live()
                    if self.ledger.violation:
                        return
            finally:
                self._over.set()
                self._up.set()
            for call in calls:
                call.result()
            self._leave_alone()

    def _live(self) -> None:
        """Start the service, kill some of its workers, and then itself, at some moments."""
        env = self._environment(**executed(self._chance.choice(("thread", "process")), workers=2))
        if self._chance.randrange(100) < WHILE_STARTING:
            command = [sys.executable, "app.py"]
            with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL) as one:
                self._over.wait(self._chance.uniform(0.0, 0.8))
                self._demand(one.poll() is None, f"the service ended with {one.poll()}")
                one.kill()
            self.ledger.counts["kills_while_starting"] += 1
        else:
            self._start(env)
            for _ in range(self._chance.randrange(3)):
                self._over.wait(self._chance.uniform(0.05, 0.8))
                self._kill_a_worker()
            self._over.wait(self._chance.uniform(0.05, 1.2))
            self._measure()
            code, log = self._service.process_.poll(), self._service.log()
            self._demand(code is None, f"the service ended with {code}: {log[-2000:]}")
            self._up.clear()
            self._service.kill()
        self.ledger.counts["kills"] += 1

    def _leave_alone(self) -> None:
        """Start the service a last time, and let it deliver all."""
        self._start(self._environment())
        try:
            poll(self._has_ended, "the end of all jobs", PATIENCE_SECONDS)
            for job_id in sorted(self.ledger.waiting):
                answer = self._service.get(f"/jobs/{job_id}")
                is_kept = answer.json().get("state") == "undelivered"
                self.ledger.counts["undelivered"] += is_kept
                self._demand(is_kept, f"{job_id} is lost: {answer.text[:200]}")
            code = self._service.end(timeout=PATIENCE_SECONDS)
            self._demand(code == 0, f"the last process exited with {code}")
        finally:
            self._service.process_.kill()

    def _has_ended(self) -> bool:
        """Whether all jobs have ended, also those whose answer never came."""
        return not self._service.is_busy() or bool(self.ledger.violation)

    # The process

    def _environment(self, **settings: str) -> dict[str, str]:
        more = {"JOURNAL": str(self._journal), "POSTBACK_URL": self._receiver.url, **settings}
        return environment({**self.settings, **more})

    def _start(self, env: Mapping[str, str]) -> None:
        with self._lock:
            owed = set(self.ledger.waiting)
        self._service = RealProcess(env)
        with self._lock:
            self.ledger.owed, self.ledger.ready_at = owed, time.monotonic()
        self._up.set()

    def _kill_a_worker(self) -> None:
        if workers := sorted(self._service.workers()):
            with self._lock:
                self.ledger.counts["worker_kills"] += 1
                self.ledger.owed = set()  # how soon it comes depends on the next worker now
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._chance.choice(workers), signal.SIGKILL)

    def _measure(self) -> None:
        """Keep the largest figures that any process came to."""
        with contextlib.suppress(OSError):  # it has ended
            rss_mib, threads, fds = usage(self._service.pid)
            wal_mib = Path(f"{self._journal}-wal").stat().st_size // 1024**2
            self.ledger.keep_largest(rss_mib=rss_mib, threads=threads, fds=fds, wal_mib=wal_mib)

    def _demand(self, holds: bool, violation: str) -> None:  # noqa: FBT001 - reads like assert
        with self._lock:
            self.ledger.demand(holds, violation)

    # Callers and the receiver

    def _call(self) -> None:
        """Send one job after the other, on a new connection whenever one breaks."""
        while not self._over.is_set():
            self._up.wait()
            caller = Caller(self._service.base_url)
            with contextlib.closing(caller), contextlib.suppress(requests.RequestException):
                while len(self.ledger.waiting) < MAX_WAITING and not self._over.is_set():
                    self._send(caller, next(self._numbers))
            self._over.wait(0.005)

    def _send(self, caller: Caller, number: float) -> int:
        """Send a job, and return the status of the answer."""
        with self._lock:
            self.ledger.sent.add(number)
        answer = caller.post("/process", json={"data": number})
        with self._lock:
            if answer.status_code == 200:
                self.ledger.promise(answer.json()["id"], number)
            is_right = answer.status_code in (200, 503)
            self.ledger.demand(is_right, f"a valid payload was answered {answer.status_code}")
        return answer.status_code

    def _answer(self, _: object, request: Recorded) -> int | None:
        """Note a postback, and answer it then, or cut the connection."""
        with self._lock:
            self._receiver.requests.clear()
            luck = self._luck.randrange(100)
            status = 500 if luck < self.failing else 0 if luck < self.failing + self.cut else 200
            self.ledger.receive(request.headers["webhook-id"], request.body, answer=status)
        return status or None


def usage(pid: int) -> tuple[int, int, int]:
    """Return the resident MiB, the threads and the descriptors of a process.

    Raises:
        OSError: It has ended.
    """
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    found = re.search(r"VmRSS:\s+(\d+).*Threads:\s+(\d+)", text, re.DOTALL)
    if not found:
        raise ProcessLookupError(pid)
    return int(found[1]) // 1024, int(found[2]), len(list(Path(f"/proc/{pid}/fd").iterdir()))


def soak(seconds: float, seed: int, *, kills: int = 0) -> Ledger:
    """Run for so long, and for at least so many kills; return the ledger."""
    with tempfile.TemporaryDirectory(prefix="postback-soak-") as directory:
        one = Soak(Path(directory), seed)
        one.run(seconds, kills)
    return one.ledger


def main(arguments: list[str]) -> int:
    """Soak as long as asked, by default a minute; print the seed first and the counts last."""
    seconds = float(arguments[0]) if arguments else 60.0
    seed = int(arguments[1]) if arguments[1:] else random.SystemRandom().randrange(10**6)
    print(f"soak: {seconds:g} s, seed {seed}", flush=True)
    ledger = soak(seconds, seed)
    print(ledger.line())
    if ledger.violation:
        print(f"BROKEN: {ledger.violation}")
    return bool(ledger.violation)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
