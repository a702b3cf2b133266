"""Who may call which route."""

import json
from collections.abc import Iterator

import pytest

from tests.conftest import ACT
from tests.harness import RealProcess, free_port, refusal


@pytest.fixture(scope="module")
def guarded(tmp_path_factory) -> Iterator[RealProcess]:
    """A service with two tokens, one of which is about to be taken out of use."""
    journal = tmp_path_factory.mktemp("guarded") / "journal.db"
    service = RealProcess({**ACT, "JOURNAL": str(journal), "API_TOKEN": "new old"})
    yield service
    assert service.end() == 0


@pytest.mark.parametrize("authorization", [None, "Bearer wrong", "Bearer new old", "Basic bmV3"])
def test_a_token_is_needed(guarded, authorization):
    """Which routes need one is held against openapi.json, in test_openapi.py."""
    answer = guarded.get("/jobs", headers={"Authorization": authorization})

    assert "Bearer" in refusal(answer, 401)
    assert answer.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize("authorization", ["Bearer new", "Bearer old", "bearer new"])
def test_each_token_opens_and_its_scheme_has_no_case(guarded, authorization):
    job_id = guarded.process({"data": 1}, {"Authorization": authorization})

    answer = guarded.get(f"/jobs/{job_id}", headers={"Authorization": authorization})

    assert answer.json()["id"] == job_id


@pytest.mark.parametrize(
    "host", ["evil.example:80", "localhost.evil.example", "user@localhost", "evil:127.0.0.1"]
)
@pytest.mark.parametrize(("method", "path"), [("GET", "/jobs"), ("POST", "/process")])
def test_a_page_elsewhere_cannot_reach_a_service_without_a_token(service, host, method, path):
    answer = service.request(method, path, json={"data": 1}, headers={"Host": host})

    assert host.partition(":")[0] in refusal(answer, 403)


@pytest.mark.parametrize("host", ["LocalHost", "127.0.0.1", "[::1]:8080", "127.1.2.3:99"])
def test_this_machine_can(service, host):
    assert service.get("/jobs", headers={"Host": host}).status_code == 200


def test_with_a_token_any_host_will_do(guarded):
    headers = {"Authorization": "Bearer new", "Host": "jobs.example"}

    assert guarded.get("/jobs", headers=headers).status_code == 200


def test_the_host_of_the_public_url_will_do(start_process):
    port = free_port()
    service = start_process(PUBLIC_URL="https://jobs.example/api", PORT=str(port))
    service.base_url = f"http://127.0.0.1:{port}"

    assert service.get("/jobs", headers={"Host": "jobs.example"}).status_code == 200
    assert service.get("/jobs", headers={"Host": "x.example"}).status_code == 403


def test_no_line_of_the_log_has_what_is_secret(start_process, receiver):
    receiver.answers = [503]
    service = start_process(
        API_TOKEN="canary-token",
        POSTBACK_SECRET="whsec_Y2FuYXJ5Y2FuYXJ5Y2FuYXJ5Y2FuYXJ5",
        POSTBACK_HEADERS='{"Authorization": "Bearer canary-header"}',
        POSTBACK_URL=receiver.url + "?canary-query",
        POSTBACK_SCHEDULE="50ms",
        LOG_FORMAT="json",
        LOG_LEVEL="debug",
    )
    headers = {"Authorization": "Bearer canary-token"}
    job_id = service.process({"data": ["canary-data"], "metadata": {"a": "canary"}}, headers)
    service.get("/jobs?limit=canary", headers={"Authorization": "Bearer canary-wrong"})
    service.post("/process", data=b'{"data": canary}', headers=headers)
    service.wait_for_log('"message": "job delivered"')
    assert service.end() == 0

    records = [json.loads(line) for line in service.log().splitlines()]

    (end,) = [one for one in records if one["message"] == "job delivered"]
    assert (end["job_id"], end["attempts"]) == (job_id, 2)
    assert "canary" not in service.log()
