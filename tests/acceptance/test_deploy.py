"""The files of docs/deploy.md, checked by the tools that read them."""

import getpass
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

import config
from tests.harness import ROOT, RealProcess, environment, free_port, is_open, poll, refusal

DOCS = ROOT / "docs"
NGINX = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")

needs_nginx = pytest.mark.skipif(
    not (NGINX and shutil.which("openssl")), reason="apt install nginx-light openssl"
)
needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="apt install prometheus")

#: The longest that DRAIN, at its default, lets a stop take.
DRAIN_SECONDS = 25


def text_of(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


# nginx

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


class Proxied:
    """nginx in front of a service, which its callers know as https://localhost:<port>/postback."""

    def __init__(self, folder: Path, *, port: int, service_port: int) -> None:
        self._port = port
        self._certificate = folder / "postback.pem"
        (folder / "nginx.conf").write_text(AROUND.format(folder=folder, user=getpass.getuser()))
        (folder / "postback.conf").write_text(
            text_of("nginx.conf")
            .replace("listen 443", f"listen 127.0.0.1:{port}")
            .replace("127.0.0.1:8080;", f"127.0.0.1:{service_port};")
            .replace("/etc/ssl", str(folder))
        )
        _make_certificate(folder)
        command = [str(NGINX), "-p", str(folder), "-c", str(folder / "nginx.conf")]
        self._process = subprocess.Popen(command)
        poll(lambda: is_open(port) or self._process.poll(), "nginx to listen")
        assert self._process.poll() is None

    def request(self, method: str, path: str, **options: Any) -> requests.Response:
        url = path if "//" in path else f"https://localhost:{self._port}/postback{path}"
        options = {"verify": str(self._certificate), "timeout": 10, **options}
        with requests.Session() as session:
            session.trust_env = False
            return session.request(method, url, **options)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(10)


def _make_certificate(folder: Path) -> None:
    key, certificate = folder / "postback.key", folder / "postback.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(
        [*command, *names, "-keyout", key, "-out", certificate], check=True, capture_output=True
    )


@pytest.fixture
def proxied(tmp_path, start_process) -> Iterator[Callable[..., tuple[Proxied, RealProcess]]]:
    """Return a function that starts a service with these settings, and nginx in front of it."""
    started = []

    def start(**settings: str) -> tuple[Proxied, RealProcess]:
        port, service_port = free_port(), free_port()
        settings |= {"PUBLIC_URL": f"https://localhost:{port}/postback", "PORT": str(service_port)}
        service = start_process(ANALYSIS="processing:analyze", **settings)
        started.append(Proxied(tmp_path, port=port, service_port=service_port))
        return started[-1], service

    yield start

    for one in started:
        one.close()


@needs_nginx
def test_a_job_goes_through_nginx_at_a_path_and_its_links_lead_back(proxied, receiver):
    front, _ = proxied(POSTBACK_URL=receiver.url)

    answer = front.request("POST", "/process", json={"data": [1]})

    [postback] = receiver.wait_for(1)
    assert re.fullmatch("[0-9a-f]{32}", postback.headers["x-request-id"])
    job = front.request("GET", answer.json()["status_url"])
    assert job.json()["id"] == answer.json()["id"]
    assert answer.headers["Location"] == answer.json()["status_url"]


@needs_nginx
def test_nginx_shows_the_page_and_refuses_what_is_far_too_large_or_for_operators(proxied):
    front, _ = proxied()

    in_our_words = front.request("POST", "/process", json={"data": "x" * 1_100_000})
    codes = [
        front.request("GET", "/").status_code,
        front.request("GET", "", allow_redirects=False).status_code,
        front.request("POST", "/process", data="x" * 3_000_000).status_code,
        front.request("GET", "/metrics").status_code,
        front.request("GET", "/../process").status_code,
    ]

    assert "1048576 bytes" in refusal(in_our_words, 413)
    assert codes == [200, 308, 413, 403, 404]


@needs_nginx
def test_nginx_does_not_send_a_job_twice_to_a_service_that_is_gone(proxied):
    front, service = proxied()
    service.kill()

    assert front.request("POST", "/process", json={"data": 1}).status_code == 502


# systemd


def unit() -> dict[str, str]:
    return dict(re.findall(r"^(\w+)=(.*)$", text_of("postback.service"), re.MULTILINE))


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="apt install systemd")
def test_systemd_accepts_the_unit(tmp_path):
    path = tmp_path / "postback.service"
    text = text_of("postback.service")
    path.write_text(text.replace("/opt/postback/.venv/bin/python", sys.executable))

    check = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", path], check=False, capture_output=True, text=True
    )

    assert (check.returncode, check.stderr) == (0, "")


def test_the_unit_keeps_the_promise_in_a_crash_an_oom_kill_and_a_stop():
    settings = unit()

    kept = [settings[name] for name in ("StartLimitIntervalSec", "OOMPolicy", "KillMode")]
    assert kept == ["0", "continue", "mixed"]
    assert (settings["Restart"], settings["RestartPreventExitStatus"]) == ("always", "78")
    assert int(settings["TimeoutStopSec"]) > DRAIN_SECONDS


def test_the_example_environment_is_accepted(monkeypatch):
    lines = re.findall(r"^([A-Z_]+)=(.*)$", text_of("postback.env"), re.MULTILINE)
    for name, value in lines:
        monkeypatch.setenv(name, value)

    config.load()

    offered = re.findall(r"^#?([A-Z_]+)=", text_of("postback.env"), re.MULTILINE)
    assert set(offered) <= {name for name, *_ in config.table()}


# Containers


def instructions() -> list[list[str]]:
    text = re.sub(r"^#.*\n", "", text_of("Dockerfile"), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [line.split(maxsplit=1) for line in lines if line.strip()]


def instruction(name: str) -> str:
    return next(rest for word, rest in instructions() if word == name)


class Image:
    """The steps of the Dockerfile, one by one in an empty folder, with a pip that only logs."""

    def __init__(self, context: Path, folder: Path) -> None:
        self.folder, self._context = folder / "opt", context
        self.pip_log, self._tools = folder / "pip.log", folder / "tools"
        self.folder.mkdir()
        self._tools.mkdir()
        for tool in ("apt-get", "rm", "useradd", "install"):
            self._write_tool(tool, "")
        self._write_tool("pip", f'echo "$*" >>{self.pip_log}')
        self._write_tool("python", f'exec {sys.executable} "$@"')
        self.environment = environment({"PATH": f"{self._tools}:{os.environ['PATH']}"})
        for word, rest in instructions():
            getattr(self, f"_{word.lower()}", lambda _: None)(rest)

    def _write_tool(self, name: str, line: str) -> None:
        (self._tools / name).write_text(f"#!/bin/sh\n{line}\n")
        (self._tools / name).chmod(0o755)

    def _copy(self, rest: str) -> None:
        *sources, target = rest.split()
        for path in [path for source in sources for path in self._context.glob(source)]:
            if path.is_dir():
                shutil.copytree(path, self.folder / target)
            else:
                shutil.copy(path, self.folder / target)

    def _run(self, rest: str) -> None:
        subprocess.run(["sh", "-c", rest], cwd=self.folder, env=self.environment, check=True)

    def _env(self, rest: str) -> None:
        self.environment |= dict(word.split("=") for word in shlex.split(rest))


@pytest.fixture
def context(tmp_path: Path) -> Path:
    """What a user builds the image from: the checkout, and an analysis of their own."""
    folder = tmp_path / "context"
    ignored = shutil.ignore_patterns(".*", "tests", "bench", "docs", "*.db*", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=ignored)
    (folder / "prices.py").write_text("def total(data):\n    return {'price': data}\n")
    return folder


def test_the_image_takes_the_packages_of_the_user_if_there_are_any(context, tmp_path):
    (context / "requirements-local.txt").unlink(missing_ok=True)
    for folder in (tmp_path / "without", tmp_path / "with"):
        folder.mkdir()

    without = Image(context, tmp_path / "without").pip_log.read_text()
    (context / "requirements-local.txt").write_text("pandas\n")
    with_packages = Image(context, tmp_path / "with").pip_log.read_text()

    assert "-r requirements.txt" in without
    assert "local" not in without
    assert "-r requirements.txt -r requirements-local.txt" in with_packages


def test_the_image_runs_the_users_analysis_is_healthy_and_stops_in_order(context, tmp_path):
    image, port = Image(context, tmp_path), str(free_port())
    settings = {"ANALYSIS": "prices:total", "JOURNAL": f"{tmp_path}/journal.db", "PORT": port}
    env = image.environment | settings
    command = [shutil.which("tini") or "env", *json.loads(instruction("ENTRYPOINT"))[1:]]
    command += json.loads(instruction("CMD"))

    health = json.loads(instruction("HEALTHCHECK").partition("CMD ")[2])
    with subprocess.Popen(command, cwd=image.folder, env=env, stdout=subprocess.PIPE) as child:
        listens = child.stdout.readline()
        alive = subprocess.run(health, check=False, env=env, capture_output=True)
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=10)
    dead = subprocess.run(health, check=False, env=env, capture_output=True)

    assert b"listens on" in listens
    assert (alive.returncode, child.returncode, dead.returncode) == (0, 0, 1)


def test_the_image_runs_as_nobody_special_under_an_init():
    names = [word for word, _ in instructions()]

    assert instruction("USER") == "postback"
    assert names.index("USER") > max(at for at, name in enumerate(names) if name == "RUN")
    assert json.loads(instruction("ENTRYPOINT")) == ["tini", "--"]
    assert not instruction("FROM").endswith("alpine")


# Prometheus


@needs_promtool
@pytest.mark.parametrize(
    "arguments", [("check", "rules", "docs/alerts.yml"), ("test", "rules", "tests/alerts.yml")]
)
def test_the_alert_rules_load_and_fire_when_they_should(arguments):
    check = subprocess.run(
        ["promtool", *arguments], check=False, cwd=ROOT, capture_output=True, text=True
    )

    assert check.returncode == 0, check.stdout + check.stderr


def test_every_alert_is_explained():
    alerts = re.findall(r"alert: (\w+)", text_of("alerts.yml"))

    assert re.findall(r"^\| (Postback\w+)", text_of("deploy.md"), re.MULTILINE) == alerts
