"""The documents against the code: tables are compared, commands are run, links lead somewhere."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import requests

import app
import config
from jobs import model
from tests.harness import MOVES, ROOT
from web import outbound, signatures

README, REFERENCE, GUIDE = (
    (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "docs/reference.md", "docs/guide.md")
)
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def table(first: str) -> list[list[str]]:
    """Return the cells of every table of the reference whose first column has this heading."""
    heading = rf"^\| {re.escape(first)} \|.*\n\|[ |-]+\n((?:\|.*\n)+)"
    bodies = re.findall(heading, REFERENCE, re.MULTILINE)
    rows = "".join(bodies).splitlines()
    return [[cell.strip().replace("`", "") for cell in row.split("|")[1:-1]] for row in rows]


def column(first: str) -> set[str]:
    return {row[0] for row in table(first)}


def blocks(text: str, kind: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for of_kind, block in fenced if of_kind == kind]


def prose(path: Path) -> str:
    """Return a document without its code."""
    text = path.read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def shell(command: str, **env: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        ["sh", "-c", command],
        cwd=ROOT,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


# The tables of the reference


def test_the_routes_and_their_answers_are_those_of_openapi():
    paths = json.loads((ROOT / "web/openapi.json").read_bytes())["paths"]
    described = {
        f"{method.upper()} {path.replace('{', '<').replace('}', '>')}": set(operation["responses"])
        for path, operations in paths.items()
        for method, operation in operations.items()
    }

    assert {row[0]: set(row[2].split()) for row in table("route")} == described
    assert set().union(*described.values()) <= column("status")


def test_the_settings_are_those_of_the_code_with_their_defaults():
    written = [(name, default) for name, default, _ in table("variable")]

    assert written == [(name, default) for name, default, _ in config.table()]


def test_the_states_their_moves_and_the_outcomes_are_those_of_the_code():
    moves = {row[0]: set(row[2].split(", ")) for row in table("state")}

    assert moves == MOVES
    assert column("outcome") == set(model.Outcome)


def test_the_schedule_is_the_default_with_its_sums():
    schedule = config.load().postback_schedule_seconds
    first, *rows = table("attempt")

    assert first == ["1", "", ""]
    assert [config.duration(wait) for _, wait, _ in rows] == list(schedule)
    sums = [sum(map(config.duration, since.split())) for *_, since in rows]
    assert sums == [sum(schedule[: number + 1]) for number in range(len(schedule))]


def test_the_metrics_and_the_fields_of_a_job_are_those_of_the_service(service):
    job = service.wait_for(service.send(1))

    metrics = re.findall(r"^# TYPE postback_(\w+)", service.get("/metrics").text, re.MULTILINE)

    assert column("metric") == set(metrics)
    assert column("field of a job") == {*job, "result_url, …"}


def test_a_postback_has_the_headers_and_the_fields_that_are_listed(start_process, receiver):
    service = start_process(POSTBACK_URL=receiver.url, POSTBACK_SECRET=SECRET)
    forwarded = dict.fromkeys(("traceparent", "tracestate", "X-Request-ID"), "a-1")
    service.process({"data": 1}, headers=forwarded)

    [postback] = receiver.wait_for(1)

    by_http = {"host", "accept", "content-length"}
    assert {name.lower() for name in column("postback header")} == set(postback.headers) - by_http
    event = json.loads(postback.body)
    of_a_link = {"data.result_url", "data.result_bytes", "data.result_sha256"}
    fields = {"type", "timestamp", *(f"data.{name}" for name in event["data"])}
    assert column("field of an event") == fields | of_a_link


def test_the_log_lines_are_those_of_the_code():
    levels = {"debug", "info", "warning", "error", "critical", "exception", "log"}
    phrases = set()
    for path in (ROOT / "app.py", *ROOT.glob("jobs/*.py"), *ROOT.glob("web/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=ast.Name(id="log" | "access_log"), attr=level)
                ) if level in levels:
                    phrases.add(next(a.value for a in node.args if isinstance(a, ast.Constant)))

    phrases |= {"job delivered", "job undelivered"} if "job %s" in phrases else set()
    assert column("phrase") == phrases - {"job %s"}


def test_the_exit_codes_and_the_commands_are_those_of_the_code():
    helped = subprocess.run(
        ["sh", "run", "help"], check=True, cwd=ROOT, capture_output=True, text=True
    ).stdout.partition("usage:")[2]
    verbs = set(re.findall(r"^  ([a-z]+)", helped, re.MULTILINE)) | {"fuzz", "help"}

    codes = {app.EXIT_LOST, app.EXIT_WAITING, app.EXIT_REFUSED, 0}
    assert {int(code) for code in column("exit code")} == codes
    assert {command.split()[1] for command in column("command")} == verbs


# All documents


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_inside_the_checkout_leads_somewhere(path):
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", prose(path))
    targets = [((path.parent / name) if name else path, anchor) for name, anchor in links]

    lost = [target for target, anchor in targets if not target.exists()]
    lost += [anchor for target, anchor in targets if anchor and anchor not in anchors(target)]
    assert lost == []


@pytest.mark.parametrize("name", ["README", "docs/guide", "docs/deploy", "docs/reference"])
def test_prose_fits_in_100_columns(name):
    assert [line for line in prose(ROOT / f"{name}.md").splitlines() if len(line) > 100] == []


def test_the_readme_is_short():
    assert len(README.split()) <= 1300


@pytest.mark.parametrize("snippet", blocks(README + GUIDE, "python"))
def test_every_snippet_is_python(snippet):
    ast.parse(snippet)


# The commands of the README and the guide


def commands(start: str) -> list[str]:
    lines = "".join(blocks(README, "sh")).splitlines()
    return [line for line in lines if re.match(rf"([A-Z_]+=\S+ )*{re.escape(start)}", line)]


def test_every_command_of_the_readme_belongs_to_a_test():
    tested = [line for start in ("./run", "curl", "python3", "echo") for line in commands(start)]

    assert sorted(tested) == sorted("".join(blocks(README, "sh")).splitlines())


@pytest.mark.service
def test_the_demo_ends_well():
    assert commands("./run")[0] == "./run demo"

    with shell("./run demo") as demo:
        output, _ = demo.communicate(timeout=25)

    steps = [
        r"Postback listens on http://127\.0\.0\.1:\d+, with a journal of its own\.",
        r"POST /process with \d+ bytes",
        r"200 after \d+\.\d ms",
        r"POST /postprocessed, \d+\.\d ms after the first",
        r"signature: good",
        r'"type": "job\.succeeded"',
        r"The job is delivered\.",
        r"The service has stopped\.",
    ]
    assert demo.returncode == 0
    assert re.search(".*".join(steps), output, re.DOTALL)


@pytest.mark.service
def test_run_prints_the_lines_that_the_reader_will_see():
    promised = next(block for block in blocks(README, "") if block.startswith("Postback listens"))

    with shell(f"exec {commands('./run')[1]}") as service:
        lines = [service.stdout.readline() for _ in range(3)]
        service.send_signal(signal.SIGTERM)

    address = lines[0].split("//")[1].strip()
    assert "".join(lines).replace(address, "127.0.0.1:8080") == promised


@pytest.mark.service
def test_the_analysis_of_the_reader_is_run(tmp_path, receiver):
    snippet = next(one for one in blocks(README, "python") if one.startswith("# prices.py"))
    (tmp_path / "prices.py").write_text(snippet, encoding="utf-8")
    env = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    [once], [command] = commands("echo"), commands("./run")[2:]

    with shell(once, **env) as analyze:
        assert json.loads(analyze.stdout.read()) == {"total": 12.5}
    with shell(f"exec env {command}", **env, POSTBACK_URL=receiver.url) as service:
        url = service.stdout.readline().split()[-1]
        assert "[3, 1, 4" not in service.stdout.readline() + service.stdout.readline()
        payload = once.split("'")[1]
        requests.post(f"{url}/process", json=json.loads(payload), timeout=10).raise_for_status()
        [postback] = receiver.wait_for(1)
        service.send_signal(signal.SIGTERM)

    assert b'"result": {"total": 12.5}' in postback.body


@pytest.mark.service
@pytest.mark.parametrize("command", commands("curl"))
def test_each_curl_command_is_answered(service, tmp_path, command):
    command = command.replace("http://127.0.0.1:8080", service.base_url)

    ran: Any = subprocess.run(
        ["sh", "-c", command.replace("curl ", "curl -sS --fail --noproxy '*' ", 1)],
        check=False,
        cwd=ROOT,
        capture_output=True,
    )

    assert (ran.returncode, ran.stderr) == (0, b"")
    assert isinstance(json.loads(ran.stdout), dict)


@pytest.mark.service
def test_the_signed_event_of_the_guide_is_received(tmp_path):
    [snippet] = [one for one in blocks(GUIDE, "sh") if one.startswith("url=http://127.0.0.1:8081/")]
    start = f"exec {sys.executable} -m web.receiver --port 0 --journal {tmp_path}/received.db"

    with shell(start, POSTBACK_SECRET=SECRET) as receiver:
        address = receiver.stdout.readline().split("/")[2]
        sent, lost = (
            subprocess.run(
                ["sh", "-c", text.replace("127.0.0.1:8081", address)],
                env={**os.environ, "no_proxy": "*"},
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            for text in (snippet, snippet.replace("/postprocessed", "/results", 1))
        )
        receiver.send_signal(signal.SIGTERM)

    assert f"POSTBACK_SECRET={SECRET} ./run receiver\n" in blocks(GUIDE, "sh")
    assert sent.endswith('{"status": "received"}')
    assert "404 Not Found" in lost
    assert "Postbacks are received at /postprocessed." in lost


def test_the_printed_secrets_are_right():
    [command] = commands("python3")
    python = command.replace("python3", sys.executable, 1)

    printed = subprocess.run(["sh", "-c", python], capture_output=True, text=True, check=True)
    [origin] = re.findall(r"./run secret (\S+)", "".join(blocks(GUIDE, "sh")))

    assert len(signatures.read_secrets(printed.stdout)) == 1
    with pytest.raises(ValueError, match=re.escape(f". To make one: {command}")):
        signatures.read_secrets("changeme")
    derived = signatures.secret_for(SECRET, outbound.parts(origin).origin)
    assert f"\n{derived}\n" in GUIDE
