"""Log lines: one for one happening, in text and in JSON, whatever the values contain."""

import io
import json
import logging
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from web import logs

log = logging.getLogger("postback")

ANSWER = logs.Answer("POST", "/jobs/x/cancel", "/jobs/<job_id>/cancel", 200, 0.0125)


@pytest.fixture(autouse=True)
def logging_as_before():
    """What `configure` changes is of the whole process."""
    root = logging.getLogger()
    before = root.handlers[:], root.level, logging.raiseExceptions
    yield
    root.handlers[:], level, logging.raiseExceptions = before
    root.setLevel(level)
    logging.captureWarnings(capture=False)


def written(style, act, level="info"):
    """Return what is written while `act` is done."""
    stream = io.StringIO()
    logs.configure(level, style, stream)
    act()
    return stream.getvalue()


def fail():
    try:
        int("first\n2026-01-02T03:04:05.678Z INFO postback forged")
    except ValueError:
        log.exception("thread failed", extra={"job_id": "j1"})


def test_a_text_line_has_a_time_a_level_a_phrase_and_values_that_are_not_none():
    extra = {"job_id": "naïve-☃", "attempt": 2, "status_code": None}

    text = written("text", lambda: log.info("job accepted", extra=extra))

    pattern = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO postback job accepted "
    assert re.fullmatch(pattern + r"job_id=naïve-☃ attempt=2\n", text)


def test_a_json_line_has_the_same():
    extra = {"status_code": 502, "path": io, "none": None}

    line = json.loads(written("json", lambda: log.warning("attempt failed", extra=extra)))

    assert line.pop("time").endswith("Z")
    assert line.pop("path").startswith("<module 'io'")
    assert line == {
        "level": "warning",
        "logger": "postback",
        "message": "attempt failed",
        "status_code": 502,
    }


@given(st.text(st.characters(exclude_categories=())))
@example("a\r\n2026-01-02T03:04:05.678Z INFO postback job delivered job_id=forged")
@example('say "hello" = x')
@example("\x1b[31mred\x07 \u2028\x85 half \ud800 of a pair")
def test_a_text_stays_in_one_line_and_a_value_one_word_of_it(value):
    record = logging.makeLogRecord({"msg": value, "error": value + " ", "last": 1})

    text, line = logs.TextFormatter().format(record), logs.JSONFormatter().format(record)

    assert text.isprintable()
    assert json.loads(text.rpartition(" error=")[2].removesuffix(" last=1")) == value + " "
    assert len(line.splitlines()) == 1
    assert json.loads(line)["error"] == value + " "


def test_a_traceback_is_indented_below_its_text_line_and_a_value_in_json():
    first, *rest = written("text", fail).splitlines()
    line = json.loads(written("json", fail))

    assert first.endswith("ERROR postback thread failed job_id=j1")
    assert rest[0] == "  Traceback (most recent call last):"
    assert all(one.startswith("  ") for one in rest)
    assert line["traceback"].startswith("Traceback (most recent call last):")


@pytest.mark.parametrize(
    ("change", "level"),
    [
        ({}, "INFO"),
        ({"method": "GET"}, "DEBUG"),
        ({"method": "GET", "status_code": 404}, "INFO"),
        ({"route": "/process"}, "DEBUG"),
        ({"route": "/process", "status_code": 503}, "INFO"),
    ],
)
def test_an_answer_has_a_line_and_the_frequent_ones_only_for_debug(change, level):
    def act():
        logs.answered(ANSWER._replace(**change))

    assert f" {level} postback.access answered " in written("text", act, "debug")
    assert (written("text", act) == "") is (level == "DEBUG")


def test_the_line_of_an_answer_has_its_facts_cut_short():
    answer = ANSWER._replace(path="/" + "x" * 999, reason="Wrong state", job_id="j1")

    line = json.loads(written("json", lambda: logs.answered(answer)))

    assert line["path"] == "/" + "x" * (logs.MAX_PATH - 1)
    facts = {name: line[name] for name in ("job_id", "method", "status_code", "reason", "ms")}
    assert list(facts.values()) == ["j1", "POST", 200, "Wrong state", 12.5]
