"""Part `peers`: the same loads through the service and each of its peers in turn."""

import contextlib
import dataclasses
import itertools
import json
import operator
import socket
import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from bench import rounds, systems
from bench.load import Load, Row
from bench.systems import BARE, ECHO, MANY_RECEIVERS, Shape, System

PICTURE = "docs/bench.svg"


@dataclass(frozen=True)
class Case:
    """One load, and how long it lasts in proportion to the others.

    Attributes:
        beside: Who else gets it: "peers", "bare" or neither.
        half_sent: Connections that have sent a part of a request and wait meanwhile.
        against: The case of the same system, in the same round, that it is compared with.
    """

    name: str
    title: str
    load: Load
    part: float = 1.0
    shape: Shape = ECHO
    beside: str = "peers"
    half_sent: int = 0
    against: str = ""


def _waiting(clients: int, text_bytes: int = 0) -> Load:
    """Return the load of clients that wait for each result before they send the next payload."""
    extra = f'"text": "{"x" * text_bytes}"' if text_bytes else ""
    return Load(clients=clients, until_result=True, extra=extra)


STEADY = Load(clients=64, rate=100)
KB = (1, 10, 30, 100, 300, 900)  # of a payload
HALF_SENT = "100 jobs/s beside 2,000 requests that were sent in part; echo"
DEAD = "133 jobs/s to 200 receivers: 25 refuse, 25 never answer, 150 are well; echo"
TO_ALL = Load(receivers=150)
TO_150 = dataclasses.replace(STEADY, receivers=150)
TO_200 = dataclasses.replace(STEADY, receivers=200, rate=133.3, patience=5)

CASES = (
    Case("closed", "32 clients, each sends the next payload once it is answered; echo", Load()),
    Case("open", "100 jobs/s; echo", STEADY, beside="peers and bare"),
    Case("half-sent", HALF_SENT, STEADY, beside="", half_sent=2000, against="open"),
    *(Case(f"{n}KB", f"{n} KB, 8 clients that wait; echo", _waiting(8, n * 1000), 0.5) for n in KB),
    Case("10MB", "Results of 10 MB, 4 clients that wait", _waiting(4), shape=systems.GROW),
    Case("nap", "A sleep of 100 ms, 32 clients that wait", _waiting(32), shape=systems.NAP),
    Case("burn", "50 ms of CPU, 8 clients that wait", _waiting(8), shape=systems.BURN),
    Case("spread", "32 clients, 150 receivers; echo", TO_ALL, shape=MANY_RECEIVERS, beside=""),
    Case("live", "100 jobs/s to 150 receivers; echo", TO_150, shape=MANY_RECEIVERS, beside=""),
    Case("dead", DEAD, TO_200, part=3, shape=MANY_RECEIVERS, beside="", against="live"),
)

FIGURES = "answers_per_second answer_p50 answer_p99 jobs_per_second wait_p50 wait_p99 cpu_ms"
FIGURES += " rss_mib peak_mib processes"

#: What is put in ratio, and which peer of a round is the best for it. A peer that accepts few jobs
#: delivers them soon, so the wait is compared with that of the peer that delivers most.
RATIOS = {
    "jobs_per_second": (max, "jobs_per_second"),
    "cpu_ms": (min, "cpu_ms"),
    "wait_p50": (max, "jobs_per_second"),
    "answer_p99": (min, "answer_p99"),
}


def part(options: rounds.Options) -> Iterator[str]:
    cases = [one for one in CASES if not options.cases or one.name in options.cases]
    rows = measure(options, cases)
    for case in cases:
        if mine := rows[case.name]:
            yield from rounds.table(f"{case.title} (`{case.name}`)", mine, FIGURES)
            yield from _remarks(case, options.services, rows)
            yield from _faults(mine)
    if not (options.quick or options.only or options.cases):
        yield from _picture(rows["closed"])


def measure(options: rounds.Options, cases: Sequence[Case]) -> dict[str, rounds.Rows]:
    """Return the rows by case and system."""
    rows: dict[str, dict[str, list[Row]]] = {case.name: {} for case in cases}
    for shape in dict.fromkeys(case.shape for case in cases):
        every = {}
        for system in (*options.services, BARE, *options.peers):
            kind = "bare" if system is BARE else "peers"
            mine = [one for one in cases if one.shape == shape]
            mine = [one for one in mine if system in options.services or kind in one.beside]
            if mine:
                every[system.name] = partial(_round, system, mine, options.seconds)
        for name, found in rounds.collect(options.rounds, every).items():
            for case in found[0]:
                rows[case][name] = [one[case] for one in found]
    return rows


def _round(system: System, cases: Sequence[Case], seconds: float) -> dict[str, Row]:
    rows = {}
    with rounds.started(system, cases[0].shape) as (bench, one):
        for case in cases:
            load = dataclasses.replace(case.load, seconds=seconds * case.part)
            with contextlib.ExitStack() as waiting:
                for _ in range(case.half_sent):
                    address = ("127.0.0.1", one.port)
                    sock = waiting.enter_context(socket.create_connection(address, timeout=10))
                    sock.sendall(b"POST /process HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Len")
                rows[case.name] = rounds.run(bench, one, load)
    return rows


def _remarks(
    case: Case, services: Sequence[System], every: Mapping[str, rounds.Rows]
) -> Iterator[str]:
    """Yield the figures of each service in ratio to the best peer of a round, and to others."""
    rows, ours = every[case.name], [one.name for one in services]
    peers = [mine for name, mine in rows.items() if name not in (*ours, BARE.name)]
    for name, (figure, (best, by)) in itertools.product(ours, RATIOS.items()):
        others = {other: rows[other] for other in ours[1:] if name == ours[0]}
        if peers:
            key = operator.itemgetter(by)
            others["the best peer"] = [best(one, key=key) for one in zip(*peers, strict=True)]
        if BARE.name in rows and figure == "answer_p99":
            others["the bare route"] = rows[BARE.name]
        parts = [f"{rounds.ratios(rows[name], mine, figure)} x {o}" for o, mine in others.items()]
        if case.against in every and figure.endswith(("p50", "p99")):
            pairs = zip(rows[name], every[case.against][name], strict=True)
            more = rounds.span([one[figure] - other[figure] for one, other in pairs], "{:+.1f}")
            parts.append(f"{more} ms against `{case.against}`")
        if parts:
            yield f"* {name}, {figure.replace('_', ' ')}: {', '.join(parts)}."


def _faults(rows: rounds.Rows) -> Iterator[str]:
    for name, mine in rows.items():
        for word in ("missing", "refused", "broken", "repeats"):
            count = sum(row[word] for row in mine)
            if count and name != BARE.name:
                yield f"* {name}: {count:.0f} {word}."
    own = statistics.median(row["own_ms"] for mine in rows.values() for row in mine)
    yield f"* Callers and receivers cost {own:.3f} ms of CPU a job.\n"


def _picture(rows: rounds.Rows) -> Iterator[str]:
    figures = systems.DATA / "peers.json"
    figures.write_text(json.dumps(list(rows.items())[::-1]))  # the bars begin below
    command = [systems.PEERS_PYTHON, "bench/plot.py", figures, PICTURE]
    subprocess.run(command, cwd=systems.ROOT, check=True)
    yield f"The picture is {PICTURE}.\n"
