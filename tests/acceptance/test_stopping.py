"""How the service starts, what it refuses to start with, and how it stops."""

import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.harness import ROOT, Caller, environment, events, is_open, poll, refusal

needs_curl = pytest.mark.skipif(not shutil.which("curl"), reason="install curl")


def run(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run the service to its end."""
    return subprocess.run(
        [sys.executable, "app.py", *arguments],
        cwd=ROOT,
        env=environment({"JOURNAL": os.environ["JOURNAL"], **settings}),
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


# How it starts


@needs_curl
def test_a_start_in_a_terminal_shows_a_command_to_paste_and_then_the_postback():
    env = environment({"JOURNAL": os.environ["JOURNAL"], "API_TOKEN": "a-token", "NO_PROXY": "*"})
    master, slave = pty.openpty()

    child = subprocess.Popen([sys.executable, "app.py"], cwd=ROOT, env=env, stdout=slave)
    with os.fdopen(master) as terminal:
        os.close(slave)
        shown = [terminal.readline().strip() for _ in range(3)]
        command = ["/bin/sh", "-c", shown[2].removeprefix("Try it: ")]
        pasted = subprocess.run(command, env=env, capture_output=True, check=False)
        received = terminal.readline()
        child.terminate()

    assert child.wait(10) == 0
    assert re.fullmatch(r"Postback listens on http://127\.0\.0\.1:\d+", shown[0])
    assert shown[1] == f"Results are posted to {shown[0].split()[-1]}/postprocessed"
    assert received.startswith("postback received")
    assert json.loads(pasted.stdout)["id"] in received


def test_a_check_of_good_settings_exits_0_and_leaves_no_journal(tmp_path):
    done = run("--check", PYTHONOPTIMIZE="2")  # docstrings are gone

    assert (done.returncode, done.stdout) == (0, "The settings are fine.\n")
    assert list(tmp_path.iterdir()) == []


def test_a_service_that_anyone_can_reach_without_a_token_is_warned_about(start_process):
    service = start_process(HOST="0.0.0.0")

    service.wait_for_log("anyone can send jobs: set API_TOKEN host=0.0.0.0")
    assert service.base_url.startswith("http://127.0.0.1:")


@pytest.mark.parametrize(
    ("settings", "lines"),
    [
        (
            {"PORT": "http", "DRAIN": "soon", "POSTBACK_URI": "x", "EXECUTOR": "dask"},
            ["POSTBACK_URI: there is no", "PORT='http':", "DRAIN='soon':", "DASK_SCHEDULER: EXEC"],
        ),
        ({"ANALYSIS": "nowhere:run"}, ["ANALYSIS='nowhere:run': there is no module 'nowhere'"]),
    ],
)
def test_what_cannot_work_stops_the_start_with_a_line_each(settings, lines):
    done = run(**settings)

    assert (done.returncode, done.stdout) == (78, "")
    told = done.stderr.splitlines()
    assert len(told) == len(lines)
    assert all(line.startswith(start) for line, start in zip(told, lines, strict=True)), told


def test_a_check_of_an_analysis_that_is_never_loaded_can_be_ended(tmp_path):
    source = "import pathlib, time; pathlib.Path(__file__ + '.x').touch(); time.sleep(60)"
    (tmp_path / "endless.py").write_text(source, encoding="ascii")
    env = environment({"ANALYSIS": "endless:run", "PYTHONPATH": str(tmp_path)})

    child = subprocess.Popen([sys.executable, "app.py", "--check"], cwd=ROOT, env=env)
    poll((tmp_path / "endless.py.x").exists, "an import")
    child.terminate()

    assert child.wait(10) == -signal.SIGTERM


def test_a_port_in_use_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        done = run(PORT=str(listener.getsockname()[1]))

    assert done.returncode == 78
    assert "cannot listen there: Address" in done.stderr


def test_a_second_instance_is_refused_and_the_first_goes_on(start_process):
    first = start_process()

    done = run()

    assert done.returncode == 78
    assert f"is in use by another instance, pid {first.pid} " in done.stderr
    assert first.wait_for(first.send(1))["state"] == "delivered"


# How it stops


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_idle_service_stops_at_a_signal(start_process, number):
    service = start_process()

    assert service.end(number) == 0
    assert "drain ended will_resume=0" in service.log()


def test_a_stop_lets_running_jobs_end_and_starts_no_other(start_process, receiver, gate):
    service = start_process(POSTBACK_URL=receiver.url, MAX_RUNNING="1", DRAIN="10s")
    running = service.send(gate.data)
    gate.wait_for(1)
    service.send(gate.data)

    service.process_.send_signal(signal.SIGTERM)
    poll(lambda: service.get("/readyz").status_code == 503, "not ready")
    refused = service.post("/process", json={"data": 1})
    alive = service.get("/livez")
    gate.open()
    code = service.wait()

    assert "stopping" in refusal(refused, 503)
    assert refused.headers["Retry-After"]
    assert alive.json()["status"] == "alive"
    assert code == 75
    assert [event["data"]["id"] for event in events(receiver.requests)] == [running]
    assert gate.begun() == [running]
    assert "drain ended will_resume=1" in service.log()


def test_a_job_that_does_not_end_in_time_is_left_to_the_next_start(start_process, gate):
    service = start_process(DRAIN="300ms")
    job_id = service.send(gate.data)
    gate.wait_for(1)

    assert service.end(timeout=3) == 75
    service.start()
    gate.open()

    job = service.wait_for(job_id)
    assert (job["outcome"], job["starts"], job["interrupted"]) == ("succeeded", 2, 0)


def test_a_second_signal_ends_it_at_once(start_process, gate):
    service = start_process(DRAIN="1h")
    service.send(gate.data)
    gate.wait_for(1)

    service.process_.send_signal(signal.SIGTERM)
    service.wait_for_log("drain begun")

    assert service.end(timeout=3) == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    "act", [Path.unlink, lambda path: shutil.copy(path.rename(f"{path}.old"), path)]
)
def test_a_lost_journal_ends_it_and_nothing_more_is_accepted(start_process, tmp_path, act):
    service = start_process()
    act(tmp_path / "journal.db")

    with pytest.raises((AssertionError, requests.RequestException)):
        service.send(1)

    assert service.wait() == 74
    assert service.log().count("journal lost") == 1


def test_a_hangup_that_was_ignored_stays_ignored(start_process):
    nohup = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); import app; app.main([])"
    service = start_process(command=("-c", nohup))

    service.process_.send_signal(signal.SIGHUP)

    assert service.wait_for(service.send(1))["state"] == "delivered"
    assert service.end() == 0


@pytest.mark.parametrize(
    "outputs", ["<&- >/dev/full 2>&-", "2>&1 | true", ">&-"], ids=["closed or full", "unread", "no"]
)
def test_outputs_that_take_nothing_do_not_stop_it(outputs):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    env = environment({"JOURNAL": os.environ["JOURNAL"], "PORT": str(port)})
    shell = ["/bin/sh", "-c", f'"$0" app.py {outputs}', sys.executable]
    service = Caller(f"http://127.0.0.1:{port}")

    options: dict[str, Any] = {"stderr": subprocess.PIPE, "start_new_session": True}
    with subprocess.Popen(shell, cwd=ROOT, env=env, **options) as child:
        try:
            poll(lambda: is_open(port), "the service")
            job = service.wait_for(service.send([1, 2]))
        finally:
            service.close()
            os.killpg(child.pid, signal.SIGTERM)
        assert b"Traceback" not in child.stderr.read()

    assert [attempt["status_code"] for attempt in job["attempts"]] == [200]
