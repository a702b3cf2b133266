"""One line in the log for one happening: a time, a level, a fixed phrase, and values by name.

Lines go to standard error. No payload, result, token or secret is ever given to a logger. An answer
is a happening too: a line of the logger `postback.access`.
"""

import contextlib
import json
import logging
import re
from datetime import UTC, datetime
from typing import Any, NamedTuple, TextIO

from jobs import model

#: Attributes that every record has. Any other attribute came in `extra`.
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

#: Characters that are logged of a path, and of anything else that a caller chooses.
MAX_PATH = 200

_PLAIN = re.compile(r'[^\s"=]+')

access_log = logging.getLogger("postback.access")


class Answer(NamedTuple):
    """How a request was answered.

    Attributes:
        path: As it came, without the query, which may contain secrets.
        route: The rule of the route, such as `/jobs/<job_id>`; "none" when no route matched.
        seconds: From the arrival of the whole request until the answer was sent.
        reason: The title of the refusal, if there was one.
        job_id: The job that was accepted, or the one in the path.
    """

    method: str
    path: str
    route: str
    status_code: int
    seconds: float
    reason: str | None = None
    job_id: str | None = None


def configure(level: str, style: str, stream: TextIO | None = None) -> None:
    """Send every log line of the process to `stream`, by default standard error.

    Args:
        level: The lowest level that is written.
        style: "text" or "json".
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JSONFormatter() if style == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.raiseExceptions = False  # a stream that fails must not fail the service
    logging.captureWarnings(capture=True)
    # It has a warning for each request that waits for a thread.
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)


def say(text: object, stream: TextIO | None = None) -> None:
    """Print a text, by default to standard output, whether or not anybody reads it."""
    with contextlib.suppress(OSError, ValueError):  # it may be closed
        print(text, file=stream, flush=True)


def answered(answer: Answer) -> None:
    """Log an answer, once it was sent."""
    # Probes, scrapes and the page ask every few seconds, and an accepted job has its own line.
    is_quiet = answer.status_code < 400 and (
        answer.method in ("GET", "HEAD") or answer.route == "/process"
    )
    facts = {
        "job_id": answer.job_id and answer.job_id[:MAX_PATH],
        "method": answer.method[:MAX_PATH],
        "path": answer.path[:MAX_PATH],
        "status_code": answer.status_code,
        "reason": answer.reason,
        "ms": round(answer.seconds * 1000, 1),
    }
    access_log.log(logging.DEBUG if is_quiet else logging.INFO, "answered", extra=facts)


class TextFormatter(logging.Formatter):
    """`2026-01-02T03:04:05.678Z INFO postback job accepted job_id=4f1c…`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line, and below it the traceback, indented."""
        message = record.getMessage()
        phrase = message if message.isprintable() else json.dumps(message)
        values = "".join(f" {name}={_word(value)}" for name, value in _values(record).items())
        line = f"{_time(record)} {record.levelname} {record.name} {phrase}{values}"
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        return "\n  ".join([line, *trace.splitlines()])


class JSONFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line."""
        values = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_values(record),
        }
        if record.exc_info:
            values["traceback"] = self.formatException(record.exc_info)
        return json.dumps(values, default=str)


def _values(record: logging.LogRecord) -> dict[str, Any]:
    values = vars(record).items()
    return {name: value for name, value in values if name not in _OWN and value is not None}


def _time(record: logging.LogRecord) -> str:
    return model.text_of(datetime.fromtimestamp(record.created, UTC))


def _word(value: Any) -> str:
    """Return a value as one word, whatever it contains, so that no value can forge a line."""
    text = str(value)
    return text if text.isprintable() and _PLAIN.fullmatch(text) else json.dumps(text)
