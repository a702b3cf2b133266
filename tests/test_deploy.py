"""The files of docs/deploy.md, checked by the tools that read them."""

import getpass
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.harness import ROOT, InProcess, poll

DOCS = ROOT / "docs"
NGINX = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")
DEPLOY = (DOCS / "deploy.md").read_text(encoding="utf-8")

needs_nginx = pytest.mark.skipif(
    not (NGINX and shutil.which("openssl")), reason="apt install nginx-light openssl"
)

#: All that nginx needs beside our file, to run as anybody and anywhere.
AROUND = """
user {user}; daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log; worker_processes 1;
events {{ worker_connections 64; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/postback.conf;
}}
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Proxied:
    """nginx in front of a service."""

    def __init__(self, folder: Path, service: InProcess) -> None:
        self.port = free_port()
        self.certificate = folder / "postback.pem"
        (folder / "nginx.conf").write_text(AROUND.format(folder=folder, user=getpass.getuser()))
        (folder / "postback.conf").write_text(
            (DOCS / "nginx.conf")
            .read_text()
            .replace("listen 443", f"listen 127.0.0.1:{self.port}")
            .replace("127.0.0.1:8080;", f"127.0.0.1:{service.service._server.port};")
            .replace("/etc/ssl", str(folder))
        )
        make_certificate(folder)
        self.command = [str(NGINX), "-p", str(folder), "-c", str(folder / "nginx.conf")]
        self.process = subprocess.Popen(self.command, stderr=subprocess.DEVNULL)
        poll(lambda: self._is_open() or self.process.poll(), "nginx to listen")
        assert self.process.poll() is None, (folder / "error.log").read_text()

    def request(self, method: str, path: str, **options: Any) -> requests.Response:
        url = f"https://localhost:{self.port}{path}"
        return requests.request(method, url, verify=str(self.certificate), timeout=10, **options)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(10)

    def _is_open(self) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0


def make_certificate(folder: Path) -> None:
    key, certificate = folder / "postback.key", folder / "postback.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(
        [*command, *names, "-keyout", key, "-out", certificate], check=True, capture_output=True
    )


@pytest.fixture
def proxied(tmp_path) -> Iterator[Callable[[InProcess], Proxied]]:
    started = []

    def start(service: InProcess) -> Proxied:
        started.append(Proxied(tmp_path, service))
        return started[-1]

    yield start

    for one in started:
        one.close()


@needs_nginx
def test_a_job_goes_through_nginx_with_a_request_id(start, receiver, proxied):
    service = start(POSTBACK_URL=receiver.url, PUBLIC_URL="https://postback.example.com")
    front = proxied(service)

    answer = front.request("POST", "/process", json={"data": [1]})

    assert answer.json()["status_url"].startswith("https://postback.example.com/jobs/")
    (postback,) = receiver.wait_for(1)
    assert re.fullmatch("[0-9a-f]{32}", postback.headers["x-request-id"])


@needs_nginx
def test_nginx_leaves_a_slightly_large_body_to_our_own_words(service, proxied):
    answer = proxied(service).request("POST", "/process", json={"data": "x" * 1_100_000})

    assert answer.status_code == 413
    assert "send at most 1048576 bytes" in answer.json()["detail"]


@needs_nginx
def test_nginx_refuses_what_is_far_too_large_and_what_is_for_operators(service, proxied):
    front = proxied(service)

    codes = [
        front.request("POST", "/process", data="x" * 3_000_000).status_code,
        front.request("GET", "/metrics").status_code,
        front.request("GET", "/").status_code,
    ]

    assert codes == [413, 403, 200]


@needs_nginx
def test_nginx_does_not_send_a_job_twice_to_a_service_that_vanished(start, proxied):
    service = start()
    front = proxied(service)
    service.service.stop()

    answer = front.request("POST", "/process", json={"data": 1})

    service.service.start()
    assert answer.status_code == 502


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="apt install systemd")
def test_systemd_accepts_the_unit(tmp_path):
    unit = tmp_path / "postback.service"
    text = (DOCS / "postback.service").read_text(encoding="utf-8")
    unit.write_text(text.replace("/opt/postback/.venv/bin/python", sys.executable))

    check = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit], check=False, capture_output=True, text=True
    )

    assert (check.returncode, check.stderr) == (0, "")


def instruction(name: str) -> list[str]:
    text = (DOCS / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(rf"^{name} (.*)$", text, re.MULTILINE)


def test_the_image_has_every_file_of_the_service():
    copied = set(" ".join(instruction("COPY")).split())

    modules = {path.name for path in ROOT.glob("*.py")}
    assert copied >= modules | {"jobs", "web", "requirements.txt"}


def test_the_image_runs_as_nobody_special_and_gets_signals_itself():
    assert instruction("USER") == ["postback"]
    assert json.loads(instruction("CMD")[0]) == ["python", "app.py"]


def test_the_health_check_of_the_image_tells_alive_from_dead(service):
    command = json.loads(instruction("HEALTHCHECK")[0].partition("CMD ")[2])
    port = service.base_url.rpartition(":")[2]
    script = command[-1].replace("8080", port)

    alive = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True)
    dead = subprocess.run(
        [sys.executable, "-c", script.replace(port, str(free_port()))],
        check=False,
        capture_output=True,
    )

    assert (alive.returncode, dead.returncode) == (0, 1)


def test_every_alert_is_explained():
    alerts = re.findall(r"alert: (\w+)", (DOCS / "alerts.yml").read_text(encoding="utf-8"))

    assert re.findall(r"^\| (Postback\w+)", DEPLOY, re.MULTILINE) == alerts


def test_every_metric_is_explained(service):
    text = service.get("/metrics").text

    types = dict(re.findall(r"^# TYPE postback_(\w+) (\w+)$", text, re.MULTILINE))
    explained = set(re.findall(r"^\| `(\w+)` \|", DEPLOY, re.MULTILINE))
    assert explained == set(types)


def test_the_stop_is_given_more_time_than_the_drain():
    unit = (DOCS / "postback.service").read_text(encoding="utf-8")

    assert int(re.findall(r"TimeoutStopSec=(\d+)", unit)[0]) > 25
    assert "--stop-timeout 35" in DEPLOY
