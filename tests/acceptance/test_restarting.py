"""What a kill -9 costs: no accepted job, and at most one run of an analysis."""

import signal
import subprocess
import sys
from typing import Any

import pytest
import requests

from tests.faults.launch import KILLED
from tests.harness import ROOT, RealProcess, act, environment, is_alive, poll


def send(service: RealProcess, data: Any) -> str:
    """Send data; return the job's id, or "" when the connection breaks before the answer."""
    try:
        return service.send(data)
    except requests.RequestException:
        return ""


@pytest.mark.parametrize(
    ("point", "starts", "postbacks"),
    [
        pytest.param("WorkerExecutor.run:before", 2, 1, id="started"),
        pytest.param("Journal.end:before", 2, 1, id="analyzed, not stored"),
        pytest.param("Sender.attempt:before", 1, 1, id="stored, not posted"),
        pytest.param("Journal.record:before", 1, 2, id="posted, not recorded"),
    ],
)
def test_a_job_survives_a_kill_at_any_point(start_process, receiver, point, starts, postbacks):
    command = ("-m", "tests.faults.launch")
    killed = start_process(command=command, KILL_AT=point, POSTBACK_URL=receiver.url)
    answered = send(killed, [1, 2, 3])
    assert killed.wait() == KILLED

    restarted = start_process(POSTBACK_URL=receiver.url)
    (job_id,) = restarted.ids()
    job = restarted.wait_for(job_id)

    assert (job["state"], job["outcome"], job["result"]) == ("delivered", "succeeded", [1, 2, 3])
    assert (job["starts"], job["interrupted"]) == (starts, starts - 1)
    assert answered in ("", job_id)
    received = receiver.wait_for(postbacks)
    assert len(received) == postbacks
    assert {one.headers["webhook-id"] for one in received} == {job_id}
    assert len({one.body for one in received}) == 1


def test_a_kill_before_the_commit_leaves_no_answer_and_no_job(start_process):
    killed = start_process(command=("-m", "tests.faults.launch"), KILL_AT="Journal.accept:after")

    answered = send(killed, 1)

    assert killed.wait() == KILLED
    assert answered == ""
    assert start_process().ids() == []


def test_jobs_that_ran_start_again_at_once_and_a_new_one_does_not_wait(start_process, gate):
    service = start_process()
    running = [service.send(gate.data) for _ in range(6)]
    gate.wait_for(6)

    kill_and_start_again(service, gate)
    gate.wait_for(6)  # all at once, since none of them can end
    new = service.wait_for(service.send(1))
    gate.open()

    assert new["outcome"] == "succeeded"
    jobs = service.wait_for_all(running)
    assert [(job["starts"], job["interrupted"]) for job in jobs] == [(2, 1)] * 6


def test_a_key_and_a_waiting_job_are_remembered(start_process, gate):
    service = start_process(MAX_RUNNING="1")
    service.send(gate.data)
    gate.wait_for(1)
    waiting = service.process({"data": 2}, {"Idempotency-Key": "key"})

    service.kill()
    service.start()
    gate.open()

    assert service.process({"data": 2}, {"Idempotency-Key": "key"}) == waiting
    job = service.wait_for(waiting)
    assert (job["result"], job["starts"], job["interrupted"]) == (2, 1, 0)


# Unclean ends, counted


def kill_and_start_again(service, gate) -> None:
    service.kill()
    gate.forget()
    service.start()


def test_a_job_runs_alone_from_its_third_kill_and_is_crashed_after_the_fifth(start_process, gate):
    service = start_process()
    job_id, workers = service.send(gate.data), []

    for _ in range(5):
        gate.wait_for(1)
        workers.append(len(service.workers()))
        kill_and_start_again(service, gate)

    job = service.wait_for(job_id)
    assert (job["outcome"], job["starts"], job["interrupted"]) == ("crashed", 5, 5)
    assert "5 times" in job["error"]["message"]
    assert workers == [1, 1, 1, 2, 2]
    assert service.wait_for(service.send(1))["outcome"] == "succeeded"


def test_a_job_that_kills_the_service_whenever_it_runs_alone_is_counted_each_time(start_process):
    service = start_process(ANALYSIS="tests.misbehaving:act")
    job_id = service.send(act("kill_service", 0.3))
    for _ in range(5):
        assert service.wait() == -signal.SIGKILL
        service.start()

    job = service.wait_for(job_id)
    assert (job["outcome"], job["starts"], job["interrupted"]) == ("crashed", 5, 5)


def test_a_kill_during_a_planned_stop_is_held_against_nobody(start_process, gate):
    service = start_process(DRAIN="1h")
    job_id = service.send(gate.data)
    gate.wait_for(1)
    service.process_.send_signal(signal.SIGTERM)
    poll(lambda: service.get("/readyz").status_code == 503, "a stop")

    kill_and_start_again(service, gate)
    gate.open()

    job = service.wait_for(job_id)
    assert (job["outcome"], job["starts"], job["interrupted"]) == ("succeeded", 2, 0)


def test_mere_restarts_are_not_counted(start_process, gate, tmp_path):
    service = start_process()
    job_id = service.send(gate.data)
    gate.wait_for(1)
    service.kill()

    env = environment({"KILL_AT": "Journal.resume:after", "JOURNAL": str(tmp_path / "journal.db")})
    command = [sys.executable, "-m", "tests.faults.launch"]
    while_it_resumes = subprocess.run(command, cwd=ROOT, env=env, check=False)
    gate.open()
    service.start()

    job = service.wait_for(job_id)
    assert while_it_resumes.returncode == KILLED
    assert (job["outcome"], job["starts"], job["interrupted"]) == ("succeeded", 2, 1)


# What the service leaves


def test_workers_and_their_children_die_with_the_service(start_process, tmp_path):
    service = start_process()
    service.send(act("start_child", str(tmp_path / "child")))
    (mark,) = poll(lambda: list(tmp_path.glob("child.*")), "a child")
    pids = [*service.workers(), int(mark.read_text())]

    service.kill()

    poll(lambda: not any(map(is_alive, pids)), "their end")
