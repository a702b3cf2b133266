"""Many jobs, callers and large results at once: answers stay fast, and each job is posted once."""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.harness import act, events, executed


def seconds_to_answer(service, data) -> tuple[str, float]:
    began = time.perf_counter()
    job_id = service.send(data)
    return job_id, time.perf_counter() - began


@pytest.mark.parametrize(
    ("jobs", "seconds"), [(200, 1), pytest.param(1000, 5, marks=pytest.mark.slow)]
)
def test_many_jobs_are_answered_at_once_and_posted_once(start_process, receiver, jobs, seconds):
    service = start_process(MAX_RUNNING="1000", POSTBACK_URL=receiver.url)
    began = time.monotonic()

    with ThreadPoolExecutor(16) as callers:
        data = [act("sleep", seconds)] * jobs
        answered = list(callers.map(lambda one: seconds_to_answer(service, one), data))

    assert max(took for _, took in answered) < 1
    posted = Counter(event["data"]["id"] for event in events(receiver.wait_for(jobs, timeout=25)))
    assert time.monotonic() - began < seconds + jobs / 50
    assert posted == dict.fromkeys((job_id for job_id, _ in answered), 1)


@pytest.mark.soak
@pytest.mark.parametrize("executor", ["thread", "process"])
def test_answers_stay_fast_while_analyses_compute(start_process, executor):
    service = start_process(**executed(executor, workers=4))
    computing = [service.send(act("compute", 4)) for _ in range(4)]
    service.wait_for(computing[-1], "running")

    took = []
    for _ in range(100):
        took.append(seconds_to_answer(service, 1)[1])
        time.sleep(0.02)  # noqa: TID251 - 50 jobs/s

    assert sorted(took)[-2] < 0.025
    assert {job["outcome"] for job in service.wait_for_all(computing)} == {"succeeded"}


def test_large_results_are_kept_whole_beside_each_other(start_process):
    service = start_process()

    jobs = service.wait_for_all([service.send(act("large", 3_000_000)) for _ in range(6)])

    assert {job["outcome"] for job in jobs} == {"succeeded"}
    sizes = {len(service.get(f"/jobs/{job['id']}/result").content) for job in jobs}
    assert sizes == {3_000_002}
