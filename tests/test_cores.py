"""Which cores a thread may use."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from jobs import cores
from jobs.threads import Threads
from tests.harness import poll

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system has no affinity"
)

EVERY = os.sched_getaffinity(0)


def in_a_thread(work):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(5)


def allowed() -> set[int]:
    return os.sched_getaffinity(0)


def test_a_thread_that_serves_keeps_to_one_core_and_leaves_the_others_theirs():
    def work():
        cores.keep_to_one()
        return allowed()

    assert len(in_a_thread(work)) == 1
    assert allowed() == EVERY


def test_an_analysis_and_what_it_starts_may_use_every_core():
    def analyze():
        child = [sys.executable, "-c", "import os; print(len(os.sched_getaffinity(0)))"]
        count = subprocess.run(child, capture_output=True, check=True).stdout
        return allowed(), int(count)

    def work():
        cores.keep_to_one()
        return *cores.Roaming(analyze)(), len(allowed())

    assert in_a_thread(work) == (EVERY, len(EVERY), 1)


def test_an_analysis_whose_last_runs_were_short_keeps_to_the_core_of_its_thread(monkeypatch):
    monkeypatch.setattr(cores, "SHORT_SECONDS", 60.0)
    roaming = cores.Roaming(allowed)

    def work():
        cores.keep_to_one()
        return [len(roaming()) for _ in range(cores.RUNS + 2)]

    assert in_a_thread(work) == [len(EVERY)] * cores.RUNS + [1, 1]

    monkeypatch.setattr(cores, "SHORT_SECONDS", 0.0)
    assert in_a_thread(work)[:2] == [1, len(EVERY)]


def test_all_threads_of_one_process_keep_to_the_same_core():
    def work():
        cores.keep_to_one()
        return allowed()

    assert in_a_thread(work) == in_a_thread(work)


def test_threads_of_jobs_keep_to_one_core():
    found: list[set[int]] = []
    threads = Threads()

    threads.start("job", lambda: found.append(allowed()))

    poll(lambda: found, "the thread")
    threads.close()
    assert len(found[0]) == 1


def test_where_there_is_no_affinity_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(cores, "_CAN", False)

    def work():
        cores.keep_to_one()
        return cores.Roaming(allowed)()

    assert in_a_thread(work) == EVERY


def test_what_the_system_forbids_fails_nobody(monkeypatch):
    def forbid(*_):
        raise PermissionError

    monkeypatch.setattr(os, "sched_setaffinity", forbid)

    def work():
        cores.keep_to_one()
        return cores.Roaming(allowed)()

    assert in_a_thread(work) == EVERY


def test_the_workers_of_a_service_may_use_every_core(start):
    service = start(EXECUTOR="process", ANALYSIS="tests.analyses:cores", WORKERS="1")

    job_id = service.process({"data": 1})
    service.wait_for(job_id)

    assert service.job(job_id)["result"] == len(EVERY)


def test_an_analysis_of_a_service_may_use_every_core(start):
    service = start(ANALYSIS="tests.analyses:cores")

    job_id = service.process({"data": 1})
    service.wait_for(job_id)

    assert service.job(job_id)["result"] == len(EVERY)
