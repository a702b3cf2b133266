"""Access lines, colours, and what no log line may hold."""

import io
import json
import logging
import os
import pty
import threading
from typing import Any

import pytest

from tests.harness import poll
from web import logs

SECRETS = {
    "API_TOKEN": "canary-token",
    "POSTBACK_SECRET": "whsec_Y2FuYXJ5Y2FuYXJ5Y2FuYXJ5Y2FuYXJ5",
    "POSTBACK_HEADERS": '{"Authorization": "Bearer canary-header"}',
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines(caplog: Any) -> list[Any]:
    return [one for one in caplog.records if one.name == "postback.access"]


def access_line(caplog: Any) -> Any:
    """Return the one access line: it is written after the answer."""
    return poll(lambda: lines(caplog), "an access line")[0]


@pytest.fixture
def at_debug(caplog) -> None:
    caplog.set_level(logging.DEBUG, "postback.access")


def test_an_answer_is_a_line_with_status_and_milliseconds(service, caplog, at_debug):
    job_id = service.process({"data": 1})

    line = access_line(caplog)

    assert (line.message, line.method, line.path) == ("answered", "POST", "/process")
    assert (line.status_code, line.job_id) == (200, job_id)
    assert 0 <= line.ms < 10_000


def test_the_milliseconds_of_an_answer_include_the_wait_for_the_disk(
    service, caplog, at_debug, monkeypatch
):
    sync = os.fdatasync
    slow = threading.Event()
    monkeypatch.setattr(os, "fdatasync", lambda fd: slow.wait(0.05) or sync(fd))

    service.process({"data": 1})

    assert access_line(caplog).ms >= 50


def test_the_query_is_in_no_line(service, caplog, at_debug):
    service.get("/jobs", params={"limit": "canary"})

    assert access_line(caplog).path == "/jobs"
    assert "canary" not in str(vars(access_line(caplog)))


def test_a_line_names_the_job_of_its_path(service, caplog, at_debug):
    service.post("/jobs/123/cancel")

    assert (access_line(caplog).job_id, access_line(caplog).status_code) == ("123", 404)


def test_a_long_path_is_cut(service, caplog, at_debug):
    service.get("/" + "x" * 5000)

    assert len(access_line(caplog).path) == logs.MAX_PATH


@pytest.mark.parametrize(
    ("method", "path", "level"),
    [("GET", "/livez", logging.DEBUG), ("GET", "/none", logging.INFO), ("POST", "/livez", 20)],
)
@pytest.mark.usefixtures("at_debug")
def test_a_get_that_went_well_is_quiet(service, caplog, method, path, level):
    service.request(method, path)

    assert access_line(caplog).levelno == level


@pytest.mark.parametrize(("payload", "level"), [({"data": 1}, 10), ({}, 20)])
@pytest.mark.usefixtures("at_debug")
def test_an_accepted_job_is_quiet_as_it_has_a_line_already(service, caplog, payload, level):
    service.post("/process", json=payload)

    assert access_line(caplog).levelno == level


def coloured(stream: io.StringIO, level: int) -> str:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    logs.configure("info", "text", stream)
    logging.getLogger("postback").log(level, "journal failed")
    (handler,) = root.handlers
    handler.flush()
    handler.close()
    root.handlers[:], root.level = before
    logging.captureWarnings(capture=False)
    return stream.getvalue()


def test_a_terminal_shows_what_needs_a_look_in_colour():
    assert "\033[31mERROR\033[0m" in coloured(Terminal(), logging.ERROR)


def test_a_terminal_shows_the_rest_plainly():
    assert "\033" not in coloured(Terminal(), logging.INFO)


def test_no_color_switches_colour_off(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")

    assert "\033" not in coloured(Terminal(), logging.ERROR)


def test_a_file_gets_no_colour():
    assert "\033" not in coloured(io.StringIO(), logging.ERROR)


@pytest.mark.service
def test_every_line_is_json_and_none_holds_what_is_secret(start_process, receiver):
    receiver.answers = [503]
    service = start_process(
        **SECRETS,
        POSTBACK_URL=receiver.url + "?canary-query",
        POSTBACK_SCHEDULE="50ms",
        LOG_FORMAT="json",
        LOG_LEVEL="debug",
    )
    headers = {"Authorization": "Bearer canary-token"}
    job_id = service.process({"data": ["canary-data"]}, headers)
    service.process({"data": "canary-more"}, headers)
    service.get("/jobs?limit=canary", headers={"Authorization": "Bearer canary-wrong"})
    service.post("/process", data=b'{"data": canary}', headers=headers)
    receiver.wait_for(3)
    service.wait_for_log('"message": "job delivered"')
    service.end()

    records = [json.loads(line) for line in service.log().splitlines()]

    assert "canary" not in service.log()
    ends = [one for one in records if one["message"] in ("job delivered", "job undelivered")]
    story = next(one for one in ends if one["job_id"] == job_id)
    assert {"outcome", "starts", "attempts", "seconds"} <= set(story)
    assert len(ends) == 2


def test_a_closed_stream_is_no_terminal():
    stream = io.StringIO()
    stream.close()

    assert not logs._is_terminal(stream)


def test_a_terminal_is_one():
    parent, child = pty.openpty()
    with os.fdopen(child, "w") as stream:
        assert logs._is_terminal(stream)
    os.close(parent)
