"""Your code never runs in the service: whatever an analysis does, each job has its outcome."""

import contextlib
import os
import signal
import sqlite3
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from tests.harness import act, events, executed, poll, refusal

EXECUTORS = pytest.mark.parametrize("executor", ["thread", "process"])


# Outcomes


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("fail", "ValueError", "cannot analyze 7"),
        ("leave", "SystemExit", "left at 7"),
        ("interrupt", "KeyboardInterrupt", ""),
        ("exhaust", "MemoryError", ""),
        ("nan", "not_serialisable", "result is nan"),
        ("unserialisable", "not_serialisable", 'result["rows"][0] is a set'),
        ("circular", "not_serialisable", "contains itself"),
    ],
)
def test_an_analysis_that_fails_is_posted_with_its_error(service, mailbox, name, kind, message):
    job_id = service.send(act(name, 7), mailbox)

    (event,) = events(mailbox.wait_for(1))
    assert event["type"] == "job.failed"
    assert event["data"]["error"]["type"] == kind
    assert message in event["data"]["error"]["message"]
    assert "Traceback" not in str(event)
    assert service.wait_for(job_id)["error"] == event["data"]["error"]
    assert "failed" in refusal(service.get(f"/jobs/{job_id}/result"), 409)


@pytest.mark.parametrize(("name", "said"), [("fail", "ValueError"), ("nan", "not_serialisable")])
def test_the_log_says_how_an_analysis_failed_and_never_on_what(service, mailbox, name, said):
    job_id = service.send(act(name, "canary-17"), mailbox)
    mailbox.wait_for(1)

    service.wait_for_log(f"job_id={job_id}")

    begin = f"WARNING postback analysis failed job_id={job_id} type={said}"
    (line,) = [one for one in service.log().splitlines() if begin in one]
    assert ("tests/analyses.py:" in line) is (name == "fail")
    assert "worker.py" not in line
    assert "canary" not in service.log()


def test_an_analysis_that_changes_its_input_does_not_change_the_payload(service):
    job = service.wait_for(service.send(act("change", [1, 2])))

    assert (job["data"]["with"], job["result"]) == ([1, 2], "emptied")


def test_no_more_than_max_running_analyses_run_and_they_start_in_order(start_process, gate):
    service = start_process(MAX_RUNNING="2")
    sent = [service.send(gate.data) for _ in range(6)]

    assert set(gate.wait_for(2)) == set(sent[:2])
    states = Counter(job["state"] for job in service.get("/jobs").json()["jobs"])
    assert states == {"accepted": 4, "running": 2}
    gate.open()
    jobs = service.wait_for_all(sent)
    started = [job["started_at"] for job in jobs]
    assert max(started[:2]) <= min(started[2:])


# What ends a process, or forks one


def test_a_job_that_ends_its_worker_crashes_alone(either, mailbox):
    ways = [act("sleep", 0.1)] * 6 + [act("end_process", "segfault")] + [act("sleep", 0.1)] * 6

    jobs = either.wait_for_all([either.send(data, mailbox) for data in ways])

    outcomes = [job["outcome"] for job in jobs]
    assert outcomes == ["succeeded"] * 6 + ["crashed"] + ["succeeded"] * 6
    assert "signal 11 (Segmentation fault)" in jobs[6]["error"]["message"]
    assert len(mailbox.requests) == 13
    poll(lambda: either.get("/readyz").status_code == 200, "ready")


def test_a_worker_that_is_told_to_stop_crashes_no_job(service, gate):
    job_id = service.send(gate.data)
    gate.wait_for(1)

    os.kill(service.workers()[0], signal.SIGTERM)

    service.wait_for_log("worker ended")
    gate.open()
    assert service.wait_for(job_id)["outcome"] == "succeeded"


@pytest.mark.slow
@pytest.mark.timeout(90)
@EXECUTORS
@pytest.mark.parametrize("is_killed", [False, True])
def test_of_1500_jobs_20_fork_and_none_is_lost(start_process, receiver, executor, is_killed):
    service = start_process(EXECUTOR=executor, POSTBACK_URL=receiver.url)
    ways = ["return", "raise", "exit", "exec"]
    data = [act("fork", ways[n // 75 % 4]) if n % 75 == 0 else n for n in range(1, 1501)]

    def try_to_send(one):
        with contextlib.suppress(requests.ConnectionError):  # it is being killed
            return service.send(one)

    def posted() -> list[str]:
        return [request.headers["webhook-id"] for request in list(receiver.requests)]

    with ThreadPoolExecutor(16) as callers:
        sending = callers.map(lambda one: poll(lambda: try_to_send(one), "an answer"), data)
        if is_killed:
            receiver.wait_for(400)
            service.kill()
            service.start()
        sent = set(sending)
    poll(lambda: sent <= set(posted()), "all postbacks", timeout=50)
    assert is_killed or len(posted()) == len(sent) == 1500
    assert {event["type"] for event in events(receiver.requests)} == {"job.succeeded"}
    poll(lambda: service.ids("?state=delivering") == [], "all recorded")
    assert service.end() == 0
    with contextlib.closing(sqlite3.connect(os.environ["JOURNAL"])) as journal:
        assert journal.execute("PRAGMA integrity_check").fetchone() == ("ok",)


# Time-outs


@EXECUTORS
def test_jobs_that_hang_time_out_and_free_their_places(start_process, tmp_path, executor):
    settings = {**executed(executor, workers=2), "MAX_RUNNING": "2", "JOB_TIMEOUT": "500ms"}
    service = start_process(**settings)
    hung = [service.send(act("hang", str(tmp_path / "hung"))) for _ in range(4)]
    after = service.send(1)

    jobs = service.wait_for_all([*hung, after])

    assert [job["outcome"] for job in jobs] == ["timed_out"] * 4 + ["succeeded"]
    assert "0.5 s" in jobs[0]["error"]["message"]
    hosts = {int(mark.read_text()) for mark in tmp_path.glob("hung.*")}
    poll(lambda: not hosts & set(service.workers()), "the workers with hung jobs are killed")
    assert service.get("/readyz").status_code == 200


def test_the_time_that_a_worker_takes_to_load_is_not_counted(start_process, tmp_path):
    slow = "import threading; threading.Event().wait(0.4); from tests.analyses import act"
    (tmp_path / "slow.py").write_text(slow, encoding="ascii")
    service = start_process(
        EXECUTOR="process",
        WORKERS="1",
        JOB_TIMEOUT="200ms",
        ANALYSIS="slow:act",
        PYTHONPATH=str(tmp_path),
    )
    ways = [act("hang", str(tmp_path / "hung")), 1, act("end_process", "exit 3"), 2]

    jobs = service.wait_for_all([service.send(data) for data in ways])

    outcomes = [job["outcome"] for job in jobs]
    assert outcomes == ["timed_out", "succeeded", "crashed", "succeeded"]


# Cancel


def test_a_job_that_waits_can_be_canceled_and_never_runs(start_process, gate, receiver):
    service = start_process(POSTBACK_URL=receiver.url, MAX_RUNNING="1", MAX_PENDING="1")
    running = service.send(gate.data)
    gate.wait_for(1)
    waiting = service.send(gate.data)

    answer = service.post(f"/jobs/{waiting}/cancel")

    (event,) = events(receiver.wait_for(1))
    assert (answer.status_code, answer.json()["outcome"]) == (200, "canceled")
    assert (event["type"], event["data"]["id"]) == ("job.canceled", waiting)
    assert event["data"]["error"] == {"type": "canceled", "message": "The job was canceled."}
    last = service.send(gate.data)  # its place among the waiting is free
    gate.open()
    assert [job["starts"] for job in service.wait_for_all([running, waiting, last])] == [1, 0, 1]
    assert gate.begun() == [running, last]


def test_a_canceled_job_that_hangs_frees_its_place_and_delays_no_stop(start_process, tmp_path):
    service = start_process(MAX_RUNNING="1", DRAIN="1h")
    hung = service.send(act("hang", str(tmp_path / "hung")))
    poll(lambda: list(tmp_path.glob("hung.*")), "a job that hangs")
    after = service.send(1)

    service.post(f"/jobs/{hung}/cancel")

    jobs = service.wait_for_all([hung, after])
    assert [job["outcome"] for job in jobs] == ["canceled", "succeeded"]
    assert service.end(timeout=5) == 0


def test_of_cancel_and_end_exactly_one_is_posted(service, mailbox, gate):
    sent = [service.send(gate.data, mailbox) for _ in range(20)]
    gate.wait_for(20)

    with ThreadPoolExecutor(21) as callers:
        cancels = [callers.submit(service.post, f"/jobs/{one}/cancel") for one in sent]
        callers.submit(gate.open)

    jobs = service.wait_for_all(sent)
    canceled = [{200: "canceled", 409: "succeeded"}[one.result().status_code] for one in cancels]
    assert [job["outcome"] for job in jobs] == canceled
    posted = {event["data"]["id"]: event["data"]["outcome"] for event in events(mailbox.requests)}
    assert len(mailbox.requests) == 20
    assert posted == {job["id"]: job["outcome"] for job in jobs}
