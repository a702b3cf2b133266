"""docs/clients, each against the real service and its real postbacks."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import ROOT, poll

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


@pytest.fixture
def listening(request, folder, free_port) -> Iterator[Any]:
    """One of the receivers, listening at `free_port`."""
    command, name = request.param
    if name.endswith(".mjs") and not (folder / "node_modules").exists():
        pytest.skip("npm could not install standardwebhooks: it needs the registry of npm")
    env = os.environ | {"PORT": str(free_port), "POSTBACK_SECRET": SECRET}
    child = subprocess.Popen(
        [command, name], cwd=folder, env=env, stdout=subprocess.PIPE, text=True
    )
    poll(lambda: is_open(free_port), f"{name} to listen")
    yield child
    child.kill()
    child.wait()
    child.stdout.close()


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def is_open(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("command", SUBMITTERS)
def test_a_payload_is_sent(service, folder, command):
    env = os.environ | {"POSTBACK": service.base_url}

    sent = subprocess.run(
        [*command, '{"data": [3, 1, 4]}'],
        cwd=folder,
        env=env,
        check=True,
        capture_output=True,
        text=True,
    )

    (job,) = service.get("/jobs").json()["jobs"]
    assert job["id"] in sent.stdout


@pytest.mark.parametrize("command", SUBMITTERS)
def test_a_refusal_is_a_failure(service, folder, command):
    env = os.environ | {"POSTBACK": service.base_url}

    sent = subprocess.run([*command, "{}"], cwd=folder, env=env, check=False, capture_output=True)

    assert sent.returncode != 0
    assert service.get("/jobs").json() == {"jobs": []}


@pytest.mark.parametrize("listening", RECEIVERS, indirect=True)
def test_our_postback_is_verified_and_taken_once(start, listening, free_port):
    url = f"http://127.0.0.1:{free_port}/results"
    service = start(POSTBACK_URL=url, POSTBACK_SECRET=SECRET, POSTBACK_SCHEDULE="none")
    first = service.process({"data": "naïve ☃"})
    service.wait_for(first)
    service.post(f"/jobs/{first}/resend")
    again = poll(lambda: (j := service.job(first))["attempts_made"] == 2 and j, "the resend")
    second = service.process({"data": 2})
    service.wait_for(second)

    printed = [listening.stdout.readline().split() for _ in range(2)]

    assert again["state"] == "delivered"
    assert printed == [["job.succeeded", first], ["job.succeeded", second]]


@pytest.mark.parametrize("listening", RECEIVERS, indirect=True)
def test_a_postback_with_another_secret_is_refused(start, listening, free_port):
    url = f"http://127.0.0.1:{free_port}/results"
    other = "whsec_" + "QUJD" * 8
    service = start(POSTBACK_URL=url, POSTBACK_SECRET=other, POSTBACK_SCHEDULE="none")

    job = service.wait_for(service.process({"data": 1}))

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
def test_a_shell_can_verify(start, receiver, change, verdict):
    service = start(POSTBACK_URL=receiver.url, POSTBACK_SECRET=SECRET)
    service.process({"data": "naïve ☃"})
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
