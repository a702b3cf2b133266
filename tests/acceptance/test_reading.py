"""What is told about jobs, and where: pages, states, times, links, and the journal itself."""

import contextlib
import shutil
import sqlite3
import subprocess
from datetime import datetime, timedelta

import pytest

from tests.harness import events, free_port, poll, refusal
from tests.receiver import reply

# Lists


def test_jobs_are_listed_newest_first_in_pages(service):
    sent = [service.send(number) for number in range(1, 6)]

    pages = [service.ids("?limit=2")]
    pages += [service.ids(f"?limit=2&before={pages[0][-1]}")]
    pages += [service.ids(f"?limit=1&before={pages[1][-1]}")]

    assert pages == [[sent[4], sent[3]], [sent[2], sent[1]], [sent[0]]]


def test_jobs_are_listed_by_state_without_what_is_large(start_process, gate):
    service = start_process(MAX_RUNNING="1")
    running, waiting = service.send(gate.data), service.send(gate.data)
    gate.wait_for(1)

    (listed,) = service.get("/jobs?state=accepted").json()["jobs"]

    assert listed["id"] == waiting
    assert service.ids("?state=running") == [running]
    assert service.ids("?state=undelivered") == []
    assert not {"data", "result", "error", "attempts"} & set(listed)


@pytest.mark.parametrize(
    ("path", "status_code"),
    [
        *((f"/jobs?state={state}", 400) for state in ("done", "")),
        *((f"/jobs?limit={limit}", 400) for limit in ("0", "1001", "-1", "", "%C2%B2", "9" * 5000)),
        *((f"/jobs?before={job_id}", 404) for job_id in ("unknown", "", "%FF%00")),
        ("/postprocessed?limit=0", 400),
        ("/nothing", 404),
    ],
)
def test_a_question_of_nonsense_is_refused(service, path, status_code):
    assert refusal(service.get(path), status_code)


# One job


def test_everything_about_an_ended_job_is_told(service, mailbox):
    job_id = service.send({"a": 1}, mailbox, metadata={"order": "é"})

    job = service.wait_for(job_id)

    assert (job["state"], job["outcome"], job["starts"]) == ("delivered", "succeeded", 1)
    assert (job["data"], job["result"], job["error"]) == ({"a": 1}, {"a": 1}, None)
    assert job["postback_url"] == mailbox.url
    assert job["created_at"] <= job["started_at"] <= job["finished_at"] <= job["ended_at"]
    (attempt,) = job["attempts"]
    assert (attempt["number"], attempt["status_code"], attempt["error"]) == (1, 204, None)
    assert 0 <= attempt["duration_seconds"] < 5
    (event,) = events(mailbox.requests)
    told = ("id", "outcome", "result", "error", "metadata")
    times = ("created_at", "started_at", "finished_at")
    assert event.pop("data") == {name: job[name] for name in (*told, *times)}
    assert event == {"type": "job.succeeded", "timestamp": job["finished_at"]}


def test_a_job_that_has_ended_says_when_it_is_removed(service):
    job_id = service.send(1)
    job = service.wait_for(job_id)

    expires_at = datetime.fromisoformat(job["expires_at"])

    assert expires_at - datetime.fromisoformat(job["ended_at"]) == timedelta(hours=24)
    assert "Retry-After" not in service.get(f"/jobs/{job_id}").headers


def test_a_job_that_runs_has_no_outcome_and_says_when_to_look_again(service, gate):
    job_id = service.send(gate.data)
    gate.wait_for(1)

    answer = service.get(f"/jobs/{job_id}")

    job = answer.json()
    told = [job[name] for name in ("state", "outcome", "result", "error", "ended_at")]
    assert told == ["running", None, None, None, None]
    assert job["expires_at"] is None
    assert answer.headers["Retry-After"] == "2"
    assert "running" in refusal(service.get(f"/jobs/{job_id}/result"), 409)


def test_a_job_whose_attempt_failed_says_when_the_next_one_is(start_process, receiver):
    receiver.answers = [reply(503, headers={"Retry-After": "600"})]
    service = start_process(POSTBACK_URL=receiver.url, POSTBACK_SCHEDULE="30s")
    job_id = service.send(1)
    job = poll(lambda: (one := service.job(job_id))["attempts"] and one, "an attempt")
    held = service.wait_for(service.send(2), "delivering")  # the receiver asked for a pause

    assert (job["state"], job["attempts_made"]) == ("delivering", 1)
    assert "503" in job["attempts"][0]["error"]
    for one in (job, held):
        assert one["next_attempt_at"] > one["finished_at"]
        assert service.get(f"/jobs/{one['id']}").headers["Retry-After"] == "60"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/jobs/nobody"),
        ("GET", "/jobs/nobody/result"),
        ("POST", "/jobs/nobody/cancel"),
        ("POST", "/jobs/nobody/resend"),
        ("DELETE", "/jobs/nobody"),
        ("GET", "/jobs/%00%C3%A4"),
    ],
)
def test_an_unknown_job_is_404(service, method, path):
    assert "No job has the id" in refusal(service.request(method, path), 404)


@pytest.mark.parametrize(("operation", "word"), [("cancel", "canceled"), ("resend", "resent")])
def test_what_the_state_does_not_allow_is_409_with_the_state(service, gate, operation, word):
    job_id = service.send(gate.data)
    gate.wait_for(1)
    state = "running"
    if operation == "cancel":
        gate.open()
        state = service.wait_for(job_id)["state"]

    detail = refusal(service.post(f"/jobs/{job_id}/{operation}"), 409)

    assert detail == f"Job {job_id} is {state}, so it cannot be {word}."


def test_ended_jobs_are_removed_after_retention(start_process, gate):
    service = start_process(DRAIN="50ms")
    running = service.send(gate.data)
    service.wait_for_all([service.send(number) for number in range(105)])  # more than a batch
    assert service.end() == 75

    later = start_process(RETENTION="1ms")

    poll(lambda: later.ids() == [running], "all that ended removed")


# Links, and the file


def test_every_link_begins_with_the_public_url(start_process, receiver):
    url, port = "https://jobs.example/api", free_port()
    service = start_process(
        PUBLIC_URL=url, PORT=str(port), POSTBACK_URL=receiver.url, POSTBACK_MAX_BYTES="100B"
    )
    service.base_url = f"http://127.0.0.1:{port}"

    answer = service.post("/process", json={"data": "x" * 200})

    status_url = f"{url}/jobs/{answer.json()['id']}"
    assert answer.headers["Location"] == answer.json()["status_url"] == status_url
    (request,) = receiver.wait_for(1)
    assert f'"{status_url}/result?key='.encode() in request.body
    assert service.get("/openapi.json").json()["servers"] == [{"url": url}]


@pytest.mark.skipif(not shutil.which("sqlite3"), reason="install sqlite3")
def test_sqlite3_reads_and_copies_the_journal_while_the_service_runs(start_process, tmp_path):
    service = start_process()
    job_ids = [service.send(number) for number in range(1, 4)]
    service.wait_for_all(job_ids)
    question = ["sqlite3", "-readonly", tmp_path / "journal.db", "SELECT id FROM jobs ORDER BY seq"]

    read = subprocess.run(question, check=True, capture_output=True, text=True).stdout.split()
    copy = ["sqlite3", tmp_path / "journal.db", f".backup {tmp_path / 'copy.db'}"]
    subprocess.run(copy, check=True)

    assert read == job_ids
    assert service.wait_for(service.send(4))["state"] == "delivered"
    with contextlib.closing(sqlite3.connect(tmp_path / "copy.db")) as connection:
        assert connection.execute("SELECT count(*) FROM jobs").fetchone() == (3,)
