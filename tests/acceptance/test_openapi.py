"""openapi.json against the code, and against the service as it answers."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

import app
import postback
from jobs import model
from tests.harness import ROOT, act, events

DOCUMENT = json.loads(app.OPENAPI_PATH.read_text(encoding="utf-8"))
SCHEMAS = DOCUMENT["components"]["schemas"]
OPERATIONS = [
    (method.upper(), path, operation)
    for path, item in DOCUMENT["paths"].items()
    for method, operation in item.items()
]
SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")
POSTBACK = DOCUMENT["components"]["pathItems"]["postback"]["post"]


def check(name: str, value: Any) -> None:
    """Refuse what does not fit one of the document's schemas."""
    jsonschema_rs.validate({**DOCUMENT, "$ref": f"#/components/schemas/{name}"}, value)


def test_every_route_is_described_and_no_other(start):
    described = {(method, path) for method, path, _ in OPERATIONS}

    application = start().service.server.application
    rules = {(one.method, one.rule) for one in application.routes}

    assert described == {(m, rule.replace("<", "{").replace(">", "}")) for m, rule in rules}


def test_only_routes_that_are_open_need_no_token(start_process):
    service = start_process(API_TOKEN="sesame")

    answers = {
        (method, path): service.request(method, path).status_code for method, path, _ in OPERATIONS
    }

    guarded = {key for key, status_code in answers.items() if status_code == 401}
    assert guarded == {
        (method, path) for method, path, op in OPERATIONS if op.get("security") != []
    }


@pytest.mark.parametrize(
    ("described", "coded"),
    [
        (SCHEMAS["State"]["enum"], list(model.State)),
        (SCHEMAS["Outcome"]["enum"], list(model.Outcome)),
        (SCHEMAS["Event"]["properties"]["type"]["enum"], [f"job.{one}" for one in model.Outcome]),
        (DOCUMENT["components"]["parameters"]["limit"]["schema"]["maximum"], app.MAX_PAGE),
        (DOCUMENT["components"]["parameters"]["limit"]["schema"]["default"], app.PAGE),
        (SCHEMAS["Attempt"]["properties"]["answer"]["maxLength"], postback.MAX_ANSWER),
        (DOCUMENT["info"]["version"], postback.VERSION),
    ],
)
def test_what_is_written_twice_is_the_same(described, coded):
    assert described == coded


def test_answers_have_every_field_that_is_described(service, mailbox):
    mailbox.answers = [500]
    job_id = service.send([1], mailbox, metadata={"order": 17})
    job = service.wait_for(job_id)
    (summary,) = [one for one in service.get("/jobs").json()["jobs"] if one["id"] == job_id]

    check("Job", job)
    check("JobSummary", summary)
    assert service.get(f"/jobs/{job_id}/result").json() == job["result"] == [1]

    links = {"result_url", "result_bytes", "result_sha256"}
    fields = set(SCHEMAS["JobFields"]["properties"])
    assert set(summary) == fields
    assert set(job) == fields | set(SCHEMAS["Job"]["properties"]) - links
    assert set(service.get("/stats").json()["minutes"][0]) == set(SCHEMAS["Minute"]["properties"])


def test_a_large_result_is_linked_as_described(start_process, receiver):
    service = start_process(POSTBACK_URL=receiver.url, POSTBACK_MAX_BYTES="300B")
    job = service.wait_for(service.send(act("large", 1000)))
    (event,) = events(receiver.requests)

    check("Job", job)
    check("Event", event)

    assert job["result_bytes"] == 1002
    assert event["data"]["result_url"] == job["result_url"]


@pytest.mark.parametrize("data", [1, act("fail"), act("nan")])
def test_the_receiver_gets_what_is_described(service, mailbox, data):
    headers = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    payload = {"data": data, "postback_url": mailbox.url, "metadata": {"order": 17}}
    service.wait_for(service.process(payload, headers))

    (request,) = mailbox.requests
    check("Event", json.loads(request.body))

    described = {one["name"] for one in POSTBACK["parameters"]} - {"webhook-signature"}
    ours = {name for name in request.headers if name.startswith(("webhook-", "trace"))}
    assert ours == described


def examples(place: Any) -> Iterator[tuple[Any, Any]]:
    """Find each example, with the schema beside it."""
    for child in place.values() if isinstance(place, dict) else place:
        if isinstance(child, dict | list):
            yield from examples(child)
    if isinstance(place, dict) and "schema" in place:
        named = [one["value"] for one in place.get("examples", {}).values() if "value" in one]
        for example in [*named, *([place["example"]] if "example" in place else [])]:
            yield place["schema"], example


@pytest.mark.parametrize(("schema", "example"), list(examples(DOCUMENT)))
def test_each_example_fits_its_schema(schema, example):
    jsonschema_rs.validate({**DOCUMENT, **schema}, example)


@pytest.mark.slow
@pytest.mark.timeout(180)  # seconds of work for one core; a busy machine takes its time
def test_a_live_service_keeps_to_the_document(start_process, receiver, tmp_path):
    service = start_process(API_TOKEN="sesame", POSTBACK_URL=receiver.url)
    command: list[str | Path] = [
        *(SCHEMATHESIS, "--config-file", ROOT / "tests/schemathesis.toml"),
        *("run", f"{service.base_url}/openapi.json", "-H", "Authorization: Bearer sesame"),
        *("--max-examples", "10", "--seed", "1", "--no-color"),
    ]

    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert run.returncode == 0, run.stdout[-5000:]
    assert "Stateful" in run.stdout
