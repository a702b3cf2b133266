"""The README against the code: its tables are compared, its commands are run, its snippets work."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import requests

import app
import config
from jobs import model
from tests.harness import ROOT, poll
from web import server, signatures

README = (ROOT / "README.md").read_text(encoding="utf-8")

#: Where the README's service listens; each test has a port of its own.
SERVICE = "127.0.0.1:8080"


def table(first: str) -> list[list[str]]:
    """Return the cells of the table whose first column has this heading, as they are written."""
    found = re.search(rf"^\| {first} \|.*\n\|[ |-]+\n((?:\|.*\n)+)", README, re.MULTILINE)
    assert found, f"the README has no table of {first}"
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in found[1].splitlines()]


def column(first: str, number: int = 0) -> list[str]:
    return [row[number].replace("`", "") for row in table(first)]


def words(cell: str) -> set[str]:
    """Return what is marked as code."""
    return set(re.findall(r"`([^`]+)`", cell))


def blocks(kind: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for of_kind, text in fenced if of_kind == kind]


def commands(start: str) -> list[str]:
    """Return the commands that call this program."""
    lines = "".join(blocks("sh")).splitlines()
    return [line for line in lines if re.match(rf"([A-Z_]+=\S+ )*{re.escape(start)}( |$)", line)]


def snippet(name: str) -> str:
    return next(block for block in blocks("python") if block.startswith(f"# {name}\n"))


def seconds_of(text: str) -> float:
    return sum(config.duration(word) for word in text.split())


@contextlib.contextmanager
def shell(command: str, env: dict[str, str]):
    """Run a command line of the README until the block ends; yield it."""
    child = subprocess.Popen(
        ["sh", "-c", f"exec env {command}"],
        cwd=ROOT,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield child
    finally:
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=20)


# Tables


def test_the_settings_are_those_of_the_code_with_their_defaults():
    written = list(zip(column("variable"), column("variable", 1), strict=True))

    assert written == [(name, default) for name, default, _ in config.table()]


def test_the_states_and_their_moves_are_those_of_the_code():
    written = {row[0].strip("`"): words(re.sub(r"\(.*?\)", "", row[2])) for row in table("state")}

    assert written == {state: set(targets) for state, targets in model.MOVES.items()}


def test_every_outcome_is_explained():
    explained = set(re.findall(r"`(\w+)`: ", README))

    assert explained == set(model.Outcome)


def test_the_routes_are_those_of_the_service():
    nothing: Any = None
    receiver: Any = type("Receiver", (), {"receive": None})
    api = app.Api(
        config=config.load(),
        journal=nothing,
        runner=nothing,
        receiver=receiver,
        metrics=nothing,
        base_url="",
    )

    served = [f"{route.method} {route.rule}" for route in api.application().routes]

    assert [route for row in table("route") for route in re.findall("`(.+?)`", row[0])] == served


def test_the_answers_of_process_are_those_of_the_code():
    of_jobs = {404, 409}
    of_errors = set(server.STATUS_CODES.values()) - of_jobs

    written = [int(code) for code in re.findall(r"\*\*(\d+)\*\*:", README)]
    assert written == sorted({200, 202, 405} | of_errors)


def test_the_schedule_is_the_default_with_its_sums():
    waits, sums = ([seconds_of(cell) for cell in row[2:]] for row in table("attempt"))
    schedule = config.load().postback_schedule_seconds

    assert waits == list(schedule)
    assert sums == [sum(schedule[: number + 1]) for number in range(len(schedule))]
    assert len(table("attempt")[0]) == len(schedule) + 2


def test_the_verbs_are_those_of_run():
    helped = subprocess.run(
        ["sh", "run", "help"], check=True, cwd=ROOT, capture_output=True, text=True
    )

    written = README.partition("The verbs of `./run`:")[2].partition("\n\n")[0]
    assert re.findall(r"`(\w+)", written) == re.findall(r"^  (\w+) ", helped.stdout, re.MULTILINE)


def test_every_file_of_the_product_is_in_the_layout():
    listed = set().union(*(words(row[0]) for row in table("files")))
    paths = [*ROOT.glob("*.py"), *ROOT.glob("jobs/*.*"), *ROOT.glob("web/*.*"), ROOT / "web/page"]
    product = {str(path.relative_to(ROOT)) for path in paths if path.name != "__init__.py"}

    assert listed == product


@pytest.mark.parametrize(
    "path",
    [ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md")],
    ids=lambda path: path.name,
)
def test_every_link_inside_the_checkout_leads_somewhere(path):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8"))

    assert [link for link in links if not (path.parent / link).exists()] == []


# Commands


def test_every_command_belongs_to_a_test():
    tested = [line for start in ("./run", "curl", "sqlite3", "python3") for line in commands(start)]

    assert sorted(tested) == sorted("".join(blocks("sh")).splitlines())


@pytest.mark.service
def test_the_demo_ends_well():
    assert "./run demo" in commands("./run")

    with shell("./run demo", {}) as demo:
        output, _ = demo.communicate(timeout=25)

    assert demo.returncode == 0, output
    assert "The job is delivered." in output


@pytest.mark.service
def test_run_prints_the_lines_that_the_reader_will_see():
    assert "./run" in commands("./run")
    promised = next(block for block in blocks("") if block.startswith("Postback listens"))

    with shell("./run", {}) as service:
        lines = [service.stdout.readline() for _ in range(3)]
    address = lines[0].split("//")[1].strip()

    assert "".join(lines).replace(address, SERVICE) == promised


@pytest.mark.service
def test_the_analysis_of_the_reader_is_run(tmp_path, receiver):
    (tmp_path / "prices.py").write_text(snippet("prices.py"), encoding="utf-8")
    (command,) = (line for line in commands("./run") if "ANALYSIS" in line)

    with shell(command, {"PYTHONPATH": str(tmp_path), "POSTBACK_URL": receiver.url}) as service:
        address = service.stdout.readline().split()[-1]
        payload = {"data": {"prices": [10, 2.5]}}
        requests.post(f"{address}/process", json=payload, timeout=10)
        (request,) = receiver.wait_for(1)

    assert b'"result": {"total": 12.5}' in request.body


@pytest.mark.service
@pytest.mark.skipif(not shutil.which("curl"), reason="install curl to run the README's commands")
@pytest.mark.parametrize("command", commands("curl"))
def test_each_curl_command_is_accepted(start_process, tmp_path, command):
    service = start_process()
    job_id = service.process({"data": 1})
    service.wait_for(job_id)
    (tmp_path / ".curlrc").write_text("fail\nsilent\nshow-error\nnoproxy = *\n", encoding="utf-8")

    ran = subprocess.run(
        ["sh", "-c", command.replace(f"http://{SERVICE}", service.base_url)],
        check=False,
        cwd=ROOT,
        env={**os.environ, "HOME": str(tmp_path), "CURL_HOME": str(tmp_path), "id": job_id},
        capture_output=True,
        text=True,
    )

    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith("{")


@pytest.fixture(scope="module")
def stopped_journal(tmp_path_factory) -> Path:
    """The journal of a service that delivered a job, failed at another, and stopped."""
    path: Path = tmp_path_factory.mktemp("stopped") / "journal.db"
    env = {
        "JOURNAL": str(path),
        "PORT": "0",
        "POSTBACK_URL": "",
        "POSTBACK_ALLOW": "http://127.0.0.1:9",
    }
    with shell(f"{sys.executable} app.py", env) as service:
        address = service.stdout.readline().split()[-1]
        payloads = {"data": 1}, {"data": 2, "postback_url": "http://127.0.0.1:9/"}
        for payload in payloads:
            requests.post(f"{address}/process", json=payload, timeout=10).raise_for_status()

        def both_attempted() -> bool:
            jobs = requests.get(f"{address}/jobs", timeout=10).json()["jobs"]
            return all(job["attempts_made"] for job in jobs)

        poll(both_attempted, "an attempt of each")
    return path


@pytest.mark.service
@pytest.mark.parametrize(("command", "rows"), list(zip(commands("sqlite3"), [2, 1], strict=True)))
def test_each_sqlite3_command_works_on_the_journal_of_a_stopped_service(
    stopped_journal, command, rows
):
    _, name, statement = shlex.split(command)

    with contextlib.closing(sqlite3.connect(stopped_journal.with_name(name))) as connection:
        assert len(connection.execute(statement).fetchall()) == rows


def test_the_printed_secret_is_fit_to_sign_with():
    (command,) = commands("python3")

    printed = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)

    assert len(signatures.read_secrets(printed.stdout)) == 1
