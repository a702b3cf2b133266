"""Log lines: one for one happening, in text and in JSON, whatever the values hold."""

import io
import itertools
import json
import logging
import os
import re
import shlex
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from web import logs

log = logging.getLogger("postback")

#: Values that try to end their line, to begin another, or to look like several.
AWKWARD = [
    "two\nlines",
    "a\r\n2026-01-02T03:04:05.678Z INFO postback job delivered job_id=forged",
    'say "hello" = x',
    "\x1b[31mred\x07",
    "line\u2028separator\x85",
    "",
    "half \ud800 of a pair",
]


@pytest.fixture(autouse=True)
def logging_as_before():
    """What `configure` changes is of the whole process."""
    root = logging.getLogger()
    handlers, level, raise_exceptions = root.handlers[:], root.level, logging.raiseExceptions
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.raiseExceptions = raise_exceptions
    logging.captureWarnings(capture=False)


def written(style: str, act, level: str = "info") -> str:
    """Return what is written while `act` is done."""
    stream = io.StringIO()
    logs.configure(level, style, stream)
    act()
    flush()
    return stream.getvalue()


def flush() -> None:
    logging.getLogger().handlers[0].flush()


def refuse() -> None:
    raise ValueError("first\n2026-01-02T03:04:05.678Z INFO postback forged")


def fail() -> None:
    try:
        refuse()
    except ValueError:
        log.exception("thread failed", extra={"job_id": "j1"})


def test_a_text_line_has_a_time_a_level_a_phrase_and_values():
    text = written("text", lambda: log.info("job accepted", extra={"job_id": "j1", "attempt": 2}))

    pattern = (
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO postback job accepted job_id=j1 attempt=2\n"
    )
    assert re.fullmatch(pattern, text)


def test_a_json_line_has_the_same():
    text = written("json", lambda: log.warning("attempt failed", extra={"status_code": 502}))

    line = json.loads(text)
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "warning",
        "logger": "postback",
        "message": "attempt failed",
        "status_code": 502,
    }


@pytest.mark.parametrize("value", AWKWARD, ids=ascii)
def test_a_value_stays_one_word_of_its_text_line(value):
    text = written("text", lambda: log.info("phrase", extra={"error": value, "last": 1}))

    assert text.endswith("\n")
    assert text[:-1].isprintable()
    _, _, shown = text.partition(" error=")
    assert json.loads(shown.removesuffix(" last=1\n")) == value


@pytest.mark.parametrize("value", AWKWARD, ids=ascii)
def test_a_value_comes_back_from_its_json_line(value):
    text = written("json", lambda: log.info("phrase", extra={"error": value}))

    assert len(text.splitlines()) == 1
    assert json.loads(text)["error"] == value


@given(st.text())
def test_no_text_makes_a_second_line(value):
    record = logging.makeLogRecord({"msg": value, "error": value})

    assert len(logs.TextFormatter().format(record).splitlines()) == 1
    assert len(logs.JSONFormatter().format(record).splitlines()) == 1


@pytest.mark.parametrize("value", ["plain", "/a/b?c", "naïve-☃", "404"])
def test_a_plain_value_needs_no_quotes(value):
    text = written("text", lambda: log.info("phrase", extra={"error": value}))

    assert shlex.split(text)[-1] == f"error={value}"


def test_a_phrase_of_another_library_cannot_forge_a_line():
    text = written("text", lambda: logging.getLogger("other").info("serving %s", "/a\nb"))

    assert text.endswith('INFO other "serving /a\\nb"\n')


def test_a_traceback_stands_indented_below_its_text_line():
    first, *rest = written("text", fail).splitlines()

    assert first.endswith("ERROR postback thread failed job_id=j1")
    assert rest[0] == "  Traceback (most recent call last):"
    assert all(line.startswith("  ") for line in rest)


def test_a_traceback_is_a_value_of_its_json_line():
    line = json.loads(written("json", fail))

    assert line["job_id"] == "j1"
    assert line["traceback"].startswith("Traceback (most recent call last):")


@pytest.mark.parametrize("style", ["text", "json"])
def test_a_value_that_is_none_is_left_out(style):
    text = written(style, lambda: log.info("phrase", extra={"status_code": None}))

    assert "status_code" not in text


def test_a_value_that_is_not_json_is_written_as_text():
    text = written("json", lambda: log.info("phrase", extra={"path": io}))

    assert json.loads(text)["path"].startswith("<module 'io'")


def test_lines_below_the_least_level_are_not_written():
    text = written("text", lambda: log.info("phrase"), level="warning")

    assert text == ""


def test_a_warning_is_a_line_like_any_other():
    def warn() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            logging.captureWarnings(capture=True)
            warnings.warn("old", DeprecationWarning, stacklevel=1)

    text = written("text", warn)

    assert "WARNING py.warnings" in text
    assert len(text.splitlines()) == 1


def test_without_a_stream_lines_go_to_standard_error(capsys):
    logs.configure("info", "text")

    log.info("phrase")
    flush()

    assert capsys.readouterr().err.endswith("INFO postback phrase\n")


def test_a_broken_stream_stops_nobody(capsys):
    stream = io.StringIO()
    stream.close()
    logs.configure("info", "text", stream)

    log.info("phrase")
    flush()

    assert capsys.readouterr() == ("", "")


class Held(io.StringIO):
    """A stream that takes nothing until it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.let = threading.Event(), threading.Event()

    def write(self, text: str) -> int:
        self.entered.set()
        assert self.let.wait(10)
        return super().write(text)


def held() -> Held:
    """Return a stream to which the line `first` is being written."""
    stream = Held()
    logs.configure("info", "text", stream)
    log.info("first")
    assert stream.entered.wait(5)
    return stream


def test_nobody_waits_for_what_is_being_written_and_no_line_is_lost():
    stream = held()

    log.info("second")
    log.info("third")

    assert stream.getvalue() == ""
    stream.let.set()
    flush()
    assert re.findall(r"postback (\w+)", stream.getvalue()) == ["first", "second", "third"]


def test_of_what_nobody_reads_the_oldest_lines_go(monkeypatch):
    monkeypatch.setattr(logs, "MAX_LINES", 2)
    stream = held()

    for word in ("second", "third", "fourth"):
        log.info(word)

    stream.let.set()
    flush()
    assert re.findall(r"postback (\w+)", stream.getvalue()) == ["first", "third", "fourth"]


def test_a_flush_waits_for_what_is_being_written_but_not_for_ever(monkeypatch):
    stream = held()

    with monkeypatch.context() as patched:
        patched.setattr(logs, "FLUSH_SECONDS", 0.05)
        flush()
    assert stream.getvalue() == ""

    threading.Timer(0.05, stream.let.set).start()
    flush()
    assert "first" in stream.getvalue()


def test_a_handler_that_is_closed_ends_its_thread_once_all_is_written():
    stream = held()
    (handler,) = logging.getLogger().handlers
    assert isinstance(handler, logs.Handler)
    log.info("second")

    handler.close()
    stream.let.set()
    handler._thread.join(5)

    assert not handler._thread.is_alive()
    assert "second" in stream.getvalue()


def test_lines_of_many_threads_are_whole():
    stream = io.StringIO()
    logs.configure("info", "text", stream)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda number: log.info("line %d", number), range(1000)))
    flush()

    found = re.findall(r'"?line (\d+)"?\n', stream.getvalue())

    assert sorted(map(int, found)) == list(range(1000))
    assert stream.getvalue().count("\n") == 1000


def test_no_line_is_lost_because_lines_come_faster_than_they_are_written():
    def act() -> None:
        for number in range(3 * logs.MAX_LINES):
            log.info("phrase", extra={"number": number})

    numbers = re.findall(r" number=(\d+)\n", written("text", act))

    assert list(map(int, numbers)) == list(range(3 * logs.MAX_LINES))


def test_a_line_tells_what_was_so_when_it_was_logged():
    def act() -> None:
        state = [1]
        log.info("it is %s", state)
        state.append(2)

    assert "it is [1]\n" in written("text", act)


def test_a_value_of_a_logger_that_is_not_ours_may_change_later():
    def act() -> None:
        counts = {"a": 1}
        logging.getLogger("theirs").info("phrase", extra={"counts": counts})
        counts["b"] = 2

    assert json.loads(written("json", act))["counts"] == {"a": 1}


def test_what_an_analysis_forks_logs_too(tmp_path):
    path = tmp_path / "log"
    with path.open("w", encoding="utf-8") as stream:
        logs.configure("info", "text", stream)
        log.info("parent")
        flush()
        if not (child := os.fork()):
            log.info("child")
            os._exit(0)
        os.waitpid(child, 0)

    assert re.findall(r"postback (\w+)", path.read_text("utf-8")) == ["parent", "child"]


def test_a_message_that_does_not_fit_its_values_stops_nobody():
    assert written("text", lambda: log.info("%d", "no number")) == ""


def test_a_pipe_that_nobody_reads_holds_up_nobody(monkeypatch):
    monkeypatch.setattr(logs, "FLUSH_SECONDS", 0.05)
    reading, writing = os.pipe()
    with open(reading, encoding="ascii") as end, open(writing, "w", encoding="ascii") as stream:  # noqa: PTH123 - descriptors
        logs.configure("info", "text", stream)
        for number in range(5000):  # far more than a pipe holds
            log.info("line %d", number)
        flush()

        lines = list(itertools.takewhile(lambda line: "line 4999" not in line, end))

    assert lines[0].endswith("line 0\n")
    assert len(lines) == 4999
