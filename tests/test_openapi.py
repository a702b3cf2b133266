"""openapi.json against the code, and against the service as it answers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

import app
import config
import postback
from jobs import model
from tests.harness import ROOT
from web import server
from web.receiver import Receiver

DOCUMENT = json.loads(app.OPENAPI_PATH.read_text(encoding="utf-8"))
SCHEMAS = DOCUMENT["components"]["schemas"]
OPERATIONS = [
    (method.upper(), path, operation)
    for path, item in DOCUMENT["paths"].items()
    for method, operation in item.items()
]
SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")
WEBHOOK = DOCUMENT["webhooks"]["postback"]["post"]


def check(name: str, value: Any) -> None:
    """Refuse what does not fit one of the document's schemas."""
    schema = {**DOCUMENT, "$ref": f"#/components/schemas/{name}"}
    jsonschema_rs.validate(schema, value)


def routes() -> list[Any]:
    nothing: Any = None  # routes are only listed here
    api = app.Api(
        config=config.load(),
        journal=nothing,
        runner=nothing,
        receiver=Receiver(nothing, secrets=(), max_body_bytes=1),
        metrics=nothing,
        base_url="",
    )
    return list(api.application().routes)


def test_every_route_is_described_and_no_other():
    described = {(method, path) for method, path, _ in OPERATIONS}

    served = {(one.method, one.rule.replace("<", "{").replace(">", "}")) for one in routes()}

    assert described == served


def test_only_routes_that_are_open_need_no_token(start):
    service = start(API_TOKEN="sesame")

    answers = {
        (method, path): service.request(method, path).status_code for method, path, _ in OPERATIONS
    }

    guarded = {key for key, status_code in answers.items() if status_code == 401}
    assert guarded == {(method, path) for method, path, op in OPERATIONS if "security" not in op}


def test_every_status_code_of_an_error_is_described_and_no_other():
    described = {
        response["content"]["application/problem+json"]["example"]["status"]
        for response in DOCUMENT["components"]["responses"].values()
    }

    assert described == set(server.STATUS_CODES.values())


@pytest.mark.parametrize(
    ("described", "coded"),
    [
        (SCHEMAS["State"]["enum"], list(model.State)),
        (SCHEMAS["Outcome"]["enum"], list(model.Outcome)),
        (SCHEMAS["Event"]["properties"]["type"]["enum"], [f"job.{one}" for one in model.Outcome]),
        (DOCUMENT["components"]["parameters"]["limit"]["schema"]["maximum"], app.MAX_PAGE),
        (DOCUMENT["components"]["parameters"]["limit"]["schema"]["default"], app.PAGE),
        (DOCUMENT["info"]["version"], postback.VERSION),
    ],
)
def test_what_is_written_twice_is_the_same(described, coded):
    assert described == coded


def test_an_answer_has_every_field_that_is_described(service, receiver):
    receiver.answers = [500]
    job_id = service.process({"data": [1]})
    job = service.wait_for(job_id)

    check("Job", job)

    links = {"result_url", "result_bytes", "result_sha256"}
    assert set(job) == set(SCHEMAS["Job"]["properties"]) - links
    assert set(service.get("/jobs").json()["jobs"][0]) == set(SCHEMAS["JobSummary"]["properties"])
    assert set(service.get("/stats").json()["minutes"][0]) == set(SCHEMAS["Minute"]["properties"])


def test_a_large_result_is_linked_as_described(start, receiver):
    service = start(POSTBACK_URL=receiver.url, POSTBACK_MAX_BYTES="300B", ANALYSIS="builtins:str")
    job = service.wait_for(service.process({"data": "x" * 1000}))

    check("Job", job)
    check("Event", json.loads(receiver.requests[0].body))

    assert job["result_bytes"] == 1002


@pytest.mark.parametrize("analysis", ["builtins:abs", "math:sqrt"])
def test_the_receiver_gets_what_is_described(start, receiver, analysis):
    service = start(
        POSTBACK_URL=receiver.url,
        POSTBACK_SECRET="whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        ANALYSIS=analysis,
    )
    headers = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    service.wait_for(service.process({"data": -1}, headers))

    (request,) = receiver.requests
    check("Event", json.loads(request.body))

    described = {parameter["name"] for parameter in WEBHOOK["parameters"]}
    ours = {name for name in request.headers if name.startswith(("webhook-", "trace"))}
    assert ours == described


EXAMPLES = [
    (response["content"]["application/json"]["schema"], response["content"]["application/json"])
    for _, _, operation in OPERATIONS
    for response in operation["responses"].values()
    if "example" in response.get("content", {}).get("application/json", {})
]


@pytest.mark.parametrize(("schema", "content"), EXAMPLES)
def test_each_example_fits_its_schema(schema, content):
    jsonschema_rs.validate({**DOCUMENT, **schema}, content["example"])


@pytest.mark.slow
@pytest.mark.timeout(120)  # seconds of work for one core; a busy machine takes its time
def test_a_live_service_keeps_to_the_document(start, receiver, tmp_path):
    service = start(API_TOKEN="sesame", POSTBACK_URL=receiver.url)
    command: list[str | Path] = [
        *(SCHEMATHESIS, "--config-file", ROOT / "tests/schemathesis.toml"),
        *("run", f"{service.base_url}/openapi.json", "-H", "Authorization: Bearer sesame"),
        *("--checks", "all", "--max-examples", "10", "--seed", "1", "--no-color"),
    ]

    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert run.returncode == 0, run.stdout[-5000:]
    assert "Stateful" in run.stdout
