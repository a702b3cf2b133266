"""A long analysis goes on where it was: progress, kept values, and runs after a failure."""

import contextlib
import random
import signal
import sqlite3
from pathlib import Path

import pytest

from tests import wire
from tests.harness import act, events, poll

EXECUTORS = pytest.mark.parametrize("executor", ["thread", "process"])


def keep(tmp_path: Path, then: object) -> dict[str, object]:
    """Return data for an analysis that keeps [1, "ä"], then does something."""
    return act("keep", [[1, "ä"], str(tmp_path / "kept"), then])


def wait_until_kept(tmp_path: Path) -> None:
    poll(lambda: list(tmp_path.glob("kept.*")), "a kept value")


def test_the_job_tells_the_analysis_what_it_is(service):
    job_id = service.send(act("describe"), metadata={"a": 1})

    told = service.wait_for(job_id)["result"]

    assert told == {"id": job_id, "start": 1, "metadata": {"a": 1}, "kept": None}


def test_progress_is_shown_while_a_job_runs_and_not_after(either, tmp_path):
    path = tmp_path / "path"
    job_id = either.send(act("report", [0.25, "half of the half", str(path)]))

    progress = poll(lambda: either.job(job_id)["progress"], "progress")

    assert (progress["fraction"], progress["note"]) == (0.25, "half of the half")
    assert progress["at"] >= either.job(job_id)["started_at"]
    path.touch()
    assert either.wait_for(job_id)["progress"] is None


# Kept values


@pytest.mark.parametrize(("number", "interrupted"), [(signal.SIGKILL, 1), (signal.SIGTERM, 0)])
def test_a_kept_value_outlives_a_kill_and_a_stop(start_process, tmp_path, number, interrupted):
    service = start_process(DRAIN="50ms")
    job_id = service.send(keep(tmp_path, act("sleep", 20)))
    wait_until_kept(tmp_path)

    service.end(number)
    service.start()

    job = service.wait_for(job_id)
    assert (job["result"], job["interrupted"]) == ([2, [1, "ä"]], interrupted)


def test_a_kept_value_outlives_the_worker(service, tmp_path, gate):
    keeper = service.send(keep(tmp_path, gate.data))
    wait_until_kept(tmp_path)

    crashed = service.send(act("end_process", "segfault"))

    assert service.wait_for(crashed)["outcome"] == "crashed"
    assert service.wait_for(keeper)["result"] == [2, [1, "ä"]]


def test_a_kept_value_outlives_a_failure_that_is_run_again(start_process, tmp_path):
    service = start_process(ANALYSIS_SCHEDULE="50ms")

    job = service.wait_for(service.send(keep(tmp_path, act("fail", 1))))

    assert job["result"] == [2, [1, "ä"]]


def test_a_stop_that_waits_for_a_slow_reader_fails_no_job_that_keeps(start_process, tmp_path):
    service = start_process(DRAIN="50ms")
    large = service.send(act("large", 30_000_000))
    service.wait_for(large)
    steps = tmp_path / "steps"
    counting = service.send(act("count", [40, str(steps)]))
    poll(steps.exists, "a step")

    with wire.connected(service) as (conn, _):
        conn.sendall(wire.get(f"/jobs/{large}/result").replace(b": x", b": localhost"))
        conn.recv(1000)
        service.end()
    service.start()

    assert service.wait_for(counting)["result"] == list(range(40))


def test_a_kept_value_goes_when_the_job_ends(start_process, tmp_path):
    service = start_process()
    service.wait_for(service.send(act("count", [3, str(tmp_path / "steps")])))

    with contextlib.closing(sqlite3.connect(tmp_path / "journal.db")) as journal:
        assert journal.execute("SELECT count(*) FROM kept").fetchone() == (0,)


@pytest.mark.slow
@EXECUTORS
def test_100_steps_with_ten_kills_are_taken_a_few_times_at_most(start_process, tmp_path, executor):
    service = start_process(EXECUTOR=executor)
    steps, chance = tmp_path / "steps", random.Random(17)
    job_id = service.send(act("count", [100, str(steps)]))

    for number in range(10):
        taken = number * 8 + chance.randrange(8)
        poll(lambda: steps.exists() and len(steps.read_text().split()) > taken, "a step")  # noqa: B023
        service.kill()
        service.start()

    assert service.wait_for(job_id)["result"] == list(range(100))
    lines = [int(line) for line in steps.read_text().split()]
    assert max(map(lines.count, range(100))) <= 3
    assert len(lines) <= 110


# Run again after a failure


def test_an_analysis_that_raised_is_run_again_and_one_event_is_posted(start_process, receiver):
    service = start_process(ANALYSIS_SCHEDULE="10ms 10ms", POSTBACK_URL=receiver.url)
    mended, lost = (service.send(act("fail_at_first", runs)) for runs in (2, 3))

    jobs = service.wait_for_all([mended, lost])

    assert [(job["outcome"], job["starts"]) for job in jobs] == [("succeeded", 3), ("failed", 3)]
    assert (jobs[0]["result"], jobs[1]["error"]["message"]) == (3, "run 3")
    assert jobs[0]["last_error"] == {"type": "ValueError", "message": "run 2"}
    assert len(events(receiver.wait_for(2))) == 2
    assert "postback_analyses_retried_total 4" in service.get("/metrics").text.replace(".0", "")


def test_only_what_raised_is_run_again(start_process):
    service = start_process(ANALYSIS_SCHEDULE="10ms", JOB_TIMEOUT="300ms")
    ways = [act("nan"), act("end_process", "exit 0"), act("sleep", 20)]

    jobs = [service.wait_for(service.send(data)) for data in ways]

    assert [job["outcome"] for job in jobs] == ["failed", "crashed", "timed_out"]
    assert [(job["starts"], job["last_error"]) for job in jobs] == [(1, None)] * 3


def test_a_job_that_waits_to_run_again_is_shown_takes_no_place_and_can_be_canceled(start_process):
    service = start_process(ANALYSIS_SCHEDULE="1h", MAX_RUNNING="1", MAX_PENDING="1")
    job_id = service.send(act("fail", 1))
    poll(lambda: service.job(job_id)["last_error"], "a failure")

    answer = service.get(f"/jobs/{job_id}")

    job = answer.json()
    assert job["state"] == "accepted"
    assert job["next_start_at"] > job["started_at"]
    assert job["last_error"]["message"] == "cannot analyze 1"
    assert answer.headers["Retry-After"] == "60"
    assert service.wait_for_all([service.send(1), service.send(2)])
    service.post(f"/jobs/{job_id}/cancel")
    assert service.wait_for(job_id)["outcome"] == "canceled"


def test_the_wait_to_run_again_outlives_kill_9(start_process):
    service = start_process(ANALYSIS_SCHEDULE="800ms")
    job_id = service.send(act("fail_at_first", 1))
    before = poll(lambda: (j := service.job(job_id))["next_start_at"] and j, "a wait")

    service.kill()
    service.start()

    job = service.wait_for(job_id)
    assert (job["result"], job["interrupted"]) == (2, 0)
    assert job["started_at"] >= before["next_start_at"]
