"""The real process: how it starts, what it refuses, how it stops, and what a kill -9 costs."""

import json
import os
import pty
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import requests

import config
from tests.harness import ROOT, Caller, events, poll
from tests.launcher import KILLED

pytestmark = pytest.mark.service

SECRET = "whsec_" + "QUJD" * 8
OTHER_SECRET = "whsec_" + "REVG" * 8

#: The analysis that waits for a fifo, and the one that returns what it is given.
READ = "tests.launcher:read"
ECHO = "tests.analyses:echo"


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the service, or what the arguments name, to its end."""
    return subprocess.run(
        [sys.executable, *(arguments or ("app.py",))],
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def send(service: Caller, payload: Any) -> str:
    """Send a payload; return the job's id, or "" when the connection breaks before the answer."""
    try:
        return service.process(payload)
    except requests.RequestException:
        return ""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    """What an analysis waits for."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


def becomes(path: Path, text: str) -> None:
    """Put a file in the place of a fifo: who reads it no longer waits."""
    path.unlink()
    path.write_text(text)


# How it starts


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_a_start_in_a_terminal_shows_a_command_to_paste_and_then_the_postback(monkeypatch):
    monkeypatch.setenv("API_TOKEN", "a-token")
    master, slave = pty.openpty()

    with (
        subprocess.Popen([sys.executable, "app.py"], cwd=ROOT, stdout=slave, stderr=slave) as child,
        os.fdopen(master) as terminal,
    ):
        os.close(slave)
        shown = [terminal.readline().strip() for _ in range(3)]
        command = shown[2].removeprefix("Try it: ")
        pasted = subprocess.run(
            ["/bin/sh", "-c", command],
            env=os.environ | {"NO_PROXY": "*"},
            capture_output=True,
            check=True,
        )
        received = next(line for line in terminal if line.startswith("postback received"))
        child.terminate()

    assert re.fullmatch(r"Postback listens on http://127\.0\.0\.1:\d+", shown[0])
    assert shown[1] == f"Results are posted to {shown[0].split()[-1]}/postprocessed"
    assert json.loads(pasted.stdout)["id"] in received
    assert child.returncode == 0


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_the_command_that_is_shown_is_answered_200_and_its_result_is_at_postprocessed(
    start_process,
):
    service = start_process()
    shown = [service.process_.stdout.readline() for _ in range(2)]

    command = shown[1].removeprefix("Try it: ").strip()
    status = subprocess.run(
        ["/bin/sh", "-c", f"{command} -o /dev/null -w '%{{http_code}}'"],
        env=os.environ | {"NO_PROXY": "*"},
        capture_output=True,
        check=True,
    )

    [job] = service.get("/jobs").json()["jobs"]
    result = service.wait_for(job["id"])["result"]
    [received] = service.get("/postprocessed").json()["received"]
    assert status.stdout == b"200"
    assert result["count"] == 8
    assert received["event"]["data"]["result"] == result


def test_the_help_lists_every_setting():
    done = run("app.py", "--help")

    assert done.returncode == 0
    listed = re.findall(r"^  ([A-Z_]+) ", done.stdout, re.MULTILINE)
    assert listed == [name for name, _, _ in config.table()]


def test_a_check_of_good_settings_exits_0_and_leaves_no_journal(tmp_path):
    done = run("app.py", "--check")

    assert (done.returncode, done.stdout) == (0, "The settings are fine.\n")
    assert not (tmp_path / "journal.db").exists()


def test_a_service_that_anyone_can_reach_without_a_token_is_warned_about(start_process):
    service = start_process(HOST="0.0.0.0")

    service.wait_for_log("anyone can send jobs: set API_TOKEN host=0.0.0.0")
    assert service.base_url.startswith("http://127.0.0.1:")
    assert service.end() == 0


def test_without_a_home_and_in_the_c_locale_text_stays_intact(monkeypatch, start_process, receiver):
    for name in ("HOME", "LC_ALL", "LC_CTYPE", "TZ", "PYTHONUTF8"):
        monkeypatch.delenv(name, raising=False)
    service = start_process(LANG="C", ANALYSIS=ECHO, POSTBACK_URL=receiver.url)

    job_id = service.process({"data": "naïve ☃ 😀"})

    [event] = events(receiver.wait_for(1))
    assert event["data"]["result"] == "naïve ☃ 😀"
    assert service.wait_for(job_id)["data"] == "naïve ☃ 😀"


# What it refuses


def refused(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return the lines of a refusal, which has an exit code and no traceback."""
    assert done.returncode == 78
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()


@pytest.mark.parametrize("arguments", [(), ("--check",)])
def test_wrong_settings_are_refused_with_a_line_each(arguments):
    lines = refused(run("app.py", *arguments, PORT="http", DRAIN="soon", POSTBACK_URI="x"))

    assert [line.split("=")[0].split(":")[0] for line in lines] == ["POSTBACK_URI", "PORT", "DRAIN"]


def test_an_unknown_argument_is_refused():
    assert refused(run("app.py", "--port", "80")) == ["Unknown arguments: --port 80; try --help."]


def test_an_analysis_that_is_not_there_is_refused():
    [line] = refused(run("app.py", "--check", ANALYSIS="nowhere:run"))

    assert line.startswith("ANALYSIS='nowhere:run': there is no module 'nowhere'")


def test_a_port_in_use_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        [line] = refused(run(PORT=str(port)))

    assert line.startswith(f"HOST='127.0.0.1' PORT={port}: cannot listen there: Address")


def test_a_second_instance_is_refused_and_the_first_goes_on(start_process):
    first = start_process()

    [line] = refused(run())

    assert f"is in use by another instance, pid {first.pid} " in line
    assert first.wait_for(first.process({"data": 1}))["state"] == "delivered"


# Two processes: the service and a receiver of its own


def test_a_receiver_of_its_own_verifies_what_the_service_signs(start_process, tmp_path):
    command = ("-m", "web.receiver", "--port", "0", "--journal", str(tmp_path / "received.db"))
    receiver = start_process(command=command, POSTBACK_SECRET=SECRET)
    service = start_process(
        POSTBACK_URL=receiver.base_url, POSTBACK_SECRET=OTHER_SECRET, POSTBACK_SCHEDULE="none"
    )

    job_id = service.process({"data": 1})
    undelivered = service.wait_for(job_id)
    assert service.end() == 0
    mended = start_process(POSTBACK_URL=receiver.base_url, POSTBACK_SECRET=SECRET)
    mended.post(f"/jobs/{job_id}/resend")
    delivered = mended.wait_for(job_id)

    assert undelivered["state"] == "undelivered"
    assert [attempt["status_code"] for attempt in delivered["attempts"]] == [401, 200]
    [received] = receiver.get("").json()["received"]
    assert (received["webhook_id"], received["signature"]) == (job_id, "good")
    assert receiver.process_.stdout.readline().startswith("Start the service with POSTBACK_URL=")
    assert receiver.process_.stdout.readline().startswith(f"postback received {job_id}")
    assert receiver.end() == 0


def test_a_receiver_that_has_lost_its_journal_says_so_and_ends(start_process, tmp_path):
    command = ("-m", "web.receiver", "--port", "0", "--journal", str(tmp_path / "received.db"))
    receiver = start_process(command=command)
    service = start_process(POSTBACK_URL=receiver.base_url)
    (tmp_path / "received.db").unlink()

    service.process({"data": 1})

    assert receiver.wait() == 74
    assert "journal lost" in receiver.log()


@pytest.mark.parametrize("option", ["--host=nowhere.invalid", "--journal=/nowhere/received.db"])
def test_a_receiver_that_cannot_start_says_why_in_one_line(tmp_path, option):
    own = f"--journal={tmp_path / 'received.db'}"

    done = run("-m", "web.receiver", "--port=0", own, option)

    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1


def test_a_receiver_with_a_bad_secret_does_not_start_and_does_not_show_it():
    done = run("-m", "web.receiver", POSTBACK_SECRET="hunter2")

    assert done.returncode == 1
    assert done.stderr.startswith("POSTBACK_SECRET=***: expected whsec_")


# What a kill -9 costs


@pytest.mark.parametrize(
    ("point", "starts", "postbacks"),
    [
        pytest.param("Journal.accept:after", 2, 1, id="committed, not settled"),
        pytest.param("ThreadExecutor.run:before", 2, 1, id="begun"),
        pytest.param("ThreadExecutor.run:after", 2, 1, id="analysed, not stored"),
        pytest.param("Journal.end:after", 1, 1, id="stored, not posted"),
        pytest.param("Sender.attempt:after", 1, 2, id="posted, not marked"),
    ],
)
def test_a_job_outlives_a_kill_at_any_point(start_process, receiver, point, starts, postbacks):
    command = ("-m", "tests.launcher")
    killed = start_process(command=command, KILL_AT=point, POSTBACK_URL=receiver.url)
    answered = send(killed, {"data": [1, 2, 3]})
    assert killed.wait() == KILLED

    restarted = start_process(POSTBACK_URL=receiver.url)
    [job] = restarted.get("/jobs").json()["jobs"]
    ended = restarted.wait_for(job["id"])

    assert (ended["state"], ended["outcome"]) == ("delivered", "succeeded")
    assert ended["starts"] == starts
    assert answered in ("", job["id"])
    received = receiver.wait_for(postbacks)
    assert {one.headers["webhook-id"] for one in received} == {job["id"]}
    assert len(received) == postbacks
    assert len({one.body for one in received}) == 1


def test_a_kill_before_the_commit_leaves_no_answer_and_no_job(start_process):
    killed = start_process(command=("-m", "tests.launcher"), KILL_AT="Journal.accept:before")

    answered = send(killed, {"data": 1})

    assert killed.wait() == KILLED
    assert answered == ""
    assert start_process().get("/jobs").json() == {"jobs": []}


def test_a_running_and_a_waiting_job_outlive_a_kill(start_process, receiver, fifo):
    service = start_process(ANALYSIS=READ, MAX_RUNNING="1", POSTBACK_URL=receiver.url)
    running, waiting = (service.process({"data": str(fifo)}) for _ in range(2))
    service.wait_for(running, "running")

    service.kill()
    becomes(fifo, "done")
    service.start()

    jobs = [service.wait_for(job_id) for job_id in (running, waiting)]
    assert [(job["state"], job["result"]) for job in jobs] == [("delivered", "done")] * 2
    assert [job["starts"] for job in jobs] == [2, 1]


def test_mere_restarts_do_not_use_up_the_starts_of_a_job(start_process, fifo):
    service = start_process(ANALYSIS=READ)
    job_id = service.process({"data": str(fifo)})
    service.wait_for(job_id, "running")
    service.kill()

    codes = [run("-m", "tests.launcher", KILL_AT="Journal.resume:after") for _ in range(4)]
    becomes(fifo, "done")
    service.start()

    assert [done.returncode for done in codes] == [KILLED] * 4
    assert service.wait_for(job_id)["starts"] == 2


def test_a_job_that_kills_the_process_is_found_out_and_its_neighbours_are_delivered(
    start_process, receiver, fifo, tmp_path
):
    settings = {"ANALYSIS": READ, "POSTBACK_URL": receiver.url}
    (tmp_path / "fine").write_text("fine")
    service = start_process(MAX_RUNNING="2", **settings)
    # One neighbour runs beside the poison, another waits behind it.
    os.mkfifo(tmp_path / "beside")
    paths = (tmp_path / "beside", fifo, tmp_path / "fine")
    job_ids = [service.process({"data": str(path)}) for path in paths]
    service.wait_for(job_ids[0], "running")
    fifo.write_text("poison")

    codes = [service.wait()]
    becomes(fifo, "poison")
    becomes(tmp_path / "beside", "fine")
    codes += [run(**settings).returncode for _ in range(2)]
    service.start()

    jobs = [service.wait_for(job_id) for job_id in job_ids]
    assert codes == [KILLED] * 3
    assert [job["state"] for job in jobs] == ["delivered"] * 3
    assert [job["outcome"] for job in jobs] == ["succeeded", "crashed", "succeeded"]
    posted = {event["data"]["id"]: event["type"] for event in events(receiver.wait_for(3))}
    assert posted[job_ids[1]] == "job.crashed"


# How it stops


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_an_idle_service_stops_at_a_signal(start_process, number):
    service = start_process()

    code = service.end(number)

    assert code == 0
    assert "drain ended finished=0 will_resume=0" in service.log()


def test_a_stop_waits_for_a_running_job_and_accepts_no_other(start_process, receiver, fifo):
    service = start_process(ANALYSIS=READ, POSTBACK_URL=receiver.url)
    job_id = service.process({"data": str(fifo)})
    service.wait_for(job_id, "running")

    service.process_.send_signal(signal.SIGTERM)
    poll(lambda: service.get("/readyz").status_code == 503, "not ready")
    refusal = service.post("/process", json={"data": 1})
    alive = service.get("/livez")
    fifo.write_text("done")
    code = service.wait()

    assert (refusal.status_code, "Retry-After" in refusal.headers) == (503, True)
    assert alive.status_code == 200
    assert code == 0
    assert [event["data"]["result"] for event in events(receiver.requests)] == ["done"]
    assert "drain ended finished=1 will_resume=0" in service.log()


def test_a_job_that_is_not_done_in_time_is_left_to_the_next_start(start_process, receiver, fifo):
    service = start_process(ANALYSIS=READ, POSTBACK_URL=receiver.url, DRAIN="500ms")
    job_id = service.process({"data": str(fifo)})
    service.wait_for(job_id, "running")

    before = monotonic()
    code = service.end(signal.SIGTERM)
    seconds = monotonic() - before
    becomes(fifo, "done")
    service.start()

    assert code == 75
    assert 0.5 <= seconds < 5
    job = service.wait_for(job_id)
    assert (job["state"], job["result"], job["starts"]) == ("delivered", "done", 1)


def test_a_second_signal_ends_it_at_once(start_process, fifo):
    service = start_process(ANALYSIS=READ, DRAIN="1h")
    service.wait_for(service.process({"data": str(fifo)}), "running")

    service.process_.send_signal(signal.SIGTERM)
    service.wait_for_log("drain begun")

    assert service.end(signal.SIGTERM) == 128 + signal.SIGTERM


def test_a_journal_that_is_removed_ends_it_and_nothing_more_is_accepted(start_process, tmp_path):
    service = start_process()
    (tmp_path / "journal.db").unlink()

    with pytest.raises((AssertionError, requests.RequestException)):
        service.process({"data": 1})

    assert service.wait() == 74
    assert service.log().count("journal lost") == 1


# What it does without


def assert_it_serves(child: subprocess.Popen[bytes], port: int) -> None:
    """A job goes round the whole loop in one attempt, and the child stops in order."""
    service = Caller(f"http://127.0.0.1:{port}")

    def is_up() -> bool:
        assert child.poll() is None
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        poll(is_up, "the service")
        job = service.wait_for(service.process({"data": 1}))
        assert [attempt["status_code"] for attempt in job["attempts"]] == [200]
        child.terminate()
        assert child.wait(10) == 0
    finally:
        service.close()
        child.kill()
        child.wait()


@pytest.mark.parametrize("outputs", [">&-", "2>&-", ">&- 2>&-", ">/dev/full 2>&1"])
def test_closed_or_full_outputs_do_not_stop_it(outputs):
    port = free_port()
    shell = ["/bin/sh", "-c", f'exec "$0" app.py {outputs}', sys.executable]

    child = subprocess.Popen(shell, cwd=ROOT, env=os.environ | {"PORT": str(port)})

    assert_it_serves(child, port)


def test_outputs_that_nobody_reads_any_more_do_not_stop_it():
    port = free_port()
    reading, writing = os.pipe()
    os.close(reading)

    child = subprocess.Popen(
        [sys.executable, "app.py"],
        cwd=ROOT,
        env=os.environ | {"PORT": str(port)},
        stdout=writing,
        stderr=writing,
    )
    os.close(writing)

    assert_it_serves(child, port)


@pytest.mark.skipif(os.geteuid() == 0, reason="limits of processes do not hold for root")
def test_a_job_whose_thread_cannot_start_is_accepted_and_runs_later(start_process):
    service = start_process()
    _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    resource.prlimit(service.pid, resource.RLIMIT_NPROC, (1, hard))

    job_id = service.process({"data": 1})
    service.wait_for_log("thread failed to start")
    resource.prlimit(service.pid, resource.RLIMIT_NPROC, (hard, hard))

    assert service.wait_for(job_id)["state"] == "delivered"


def test_a_hangup_that_was_ignored_stays_ignored(start_process, receiver):
    nohup = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); import app; app.main([])"
    service = start_process(command=("-c", nohup), POSTBACK_URL=receiver.url)

    service.process_.send_signal(signal.SIGHUP)

    job_id = service.process({"data": 1})
    assert service.wait_for(job_id)["state"] == "delivered"
    assert service.end() == 0
