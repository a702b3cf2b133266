"""docs/clients, each against the real service and its real postbacks."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import ROOT, free_port, is_open, poll

CLIENTS = ROOT / "docs" / "clients"
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"

needs = {
    name: pytest.mark.skipif(not shutil.which(name), reason=f"apt install {package}")
    for name, package in (("curl", "curl"), ("openssl", "openssl"), ("npm", "nodejs npm"))
}

SUBMITTERS = [
    pytest.param(("sh", "submit.sh"), marks=needs["curl"]),
    (sys.executable, "submit.py"),
    pytest.param(("node", "submit.mjs"), marks=needs["npm"]),
]
RECEIVERS = [
    (sys.executable, "receive.py"),
    pytest.param(("node", "receive.mjs"), marks=needs["npm"]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A copy of the clients, with what Node needs."""
    folder: Path = tmp_path_factory.mktemp("clients") / "clients"
    shutil.copytree(CLIENTS, folder)
    if npm := shutil.which("npm"):
        command = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts"]
        subprocess.run(command, cwd=folder, check=False, capture_output=True, timeout=25)
    return folder


@pytest.fixture(params=RECEIVERS)
def receiving(request, folder) -> Iterator[Any]:
    """Return a function that starts one of the receivers, and returns it with its URL."""
    command, name = request.param
    if name.endswith(".mjs") and not (folder / "node_modules").exists():
        pytest.skip("npm could not install standardwebhooks: it needs the registry of npm")
    started = []

    def receiving(port: int, secret: str) -> tuple[str, Any]:
        env = os.environ | {"PORT": str(port), "POSTBACK_SECRET": secret}
        child = subprocess.Popen(
            [command, name], cwd=folder, env=env, stdout=subprocess.PIPE, text=True
        )
        started.append(child)
        poll(lambda: is_open(port), f"{name} to listen")
        return f"http://127.0.0.1:{port}/results", child

    yield receiving

    for child in started:
        child.kill()
        child.wait()
        child.stdout.close()


@pytest.mark.parametrize("command", SUBMITTERS)
def test_a_payload_is_sent_and_a_refusal_is_a_failure(service, folder, command):
    options = {"cwd": folder, "env": os.environ | {"POSTBACK": service.base_url}}

    sent, refused = (
        subprocess.run([*command, payload], **options, check=False, capture_output=True, text=True)
        for payload in ('{"data": [3, 1, 4]}', "{}")
    )

    (job_id,) = service.ids("?limit=1")
    assert (sent.returncode, job_id in sent.stdout) == (0, True)
    assert refused.returncode != 0


def test_our_postback_is_verified_and_taken_once(start_process, receiving):
    url, child = receiving(free_port(), SECRET)
    service = start_process(POSTBACK_URL=url, POSTBACK_SECRET=SECRET, POSTBACK_SCHEDULE="none")
    first = service.send("naïve ☃")
    service.wait_for(first)
    service.post(f"/jobs/{first}/resend")
    again = service.wait_for(first)
    second = service.send(2)
    service.wait_for(second)

    printed = [child.stdout.readline().split() for _ in range(2)]

    assert again["state"] == "delivered"
    assert printed == [["job.succeeded", first], ["job.succeeded", second]]


def test_a_receiver_that_callers_choose_verifies_with_its_own_secret(start_process, receiving):
    port = free_port()
    origin = f"http://127.0.0.1:{port}"
    env = os.environ | {"POSTBACK_SECRET": SECRET}
    command = [sys.executable, "-m", "web.signatures", origin]
    printed = subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True)
    url, child = receiving(port, printed.stdout.strip())
    service = start_process(POSTBACK_SECRET=SECRET, POSTBACK_ALLOW=origin)

    job_id = service.process({"data": 1, "postback_url": url})

    assert service.wait_for(job_id)["state"] == "delivered"
    assert child.stdout.readline().split() == ["job.succeeded", job_id]


def test_a_postback_with_another_secret_is_refused(start_process, receiving):
    url, _ = receiving(free_port(), SECRET)
    other = "whsec_" + "QUJD" * 8
    service = start_process(POSTBACK_URL=url, POSTBACK_SECRET=other, POSTBACK_SCHEDULE="none")

    job = service.wait_for(service.send(1))

    assert job["attempts"][0]["status_code"] == 401


@needs["openssl"]
@pytest.mark.parametrize("shell", [one for one in ("sh", "bash") if shutil.which(one)])
def test_a_timestamp_is_not_run_by_the_shell(tmp_path, shell):
    run = subprocess.run(
        [shell, CLIENTS / "verify.sh", "id", f"x[$(touch {tmp_path}/ran)]", "v1,x"],
        env=os.environ | {"POSTBACK_SECRET": SECRET},
        input=b"{}",
        check=False,
        capture_output=True,
    )

    assert run.returncode == 1
    assert not (tmp_path / "ran").exists()


@needs["openssl"]
@pytest.mark.parametrize(("change", "verdict"), [(b"", 0), (b" ", 1)])
def test_a_shell_can_verify(start_process, receiver, change, verdict):
    service = start_process(POSTBACK_URL=receiver.url, POSTBACK_SECRET=SECRET)
    service.send("naïve ☃")
    (postback,) = receiver.wait_for(1)
    values = [postback.headers[f"webhook-{name}"] for name in ("id", "timestamp", "signature")]

    run = subprocess.run(
        ["sh", CLIENTS / "verify.sh", *values],
        env=os.environ | {"POSTBACK_SECRET": SECRET},
        input=postback.body + change,
        check=False,
        capture_output=True,
    )

    assert run.returncode == verdict
