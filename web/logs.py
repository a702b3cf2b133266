"""One happening, one log line: a time, a level, a fixed phrase, and values by name.

Lines go to standard error. No payload, result, token or secret is ever handed to a logger. Each
answer is such a happening, too: a line of the logger `postback.access`.
"""

import json
import logging
import os
import re
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, TextIO

from jobs import model

#: What a record has by itself; whatever else it has came in `extra`.
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


#: Colours of the levels that somebody should look at, as ANSI escapes.
_COLOURS = {"WARNING": "\033[33m", "ERROR": "\033[31m", "CRITICAL": "\033[31;1m"}

#: Characters of a path that are logged.
MAX_PATH = 200

#: Lines kept while the stream takes none; the oldest go first. A log that nobody reads must not
#: stop the service.
MAX_LINES = 10_000

#: Characters written at once: as many as a pipe takes that takes any (PIPE_BUF, pipe(7)).
PIECE = 1024

#: Seconds that the end of the process waits for the last lines.
FLUSH_SECONDS = 1.0

_PLAIN = re.compile(r'[^\s"=]+')

access_log = logging.getLogger("postback.access")

WSGI = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def configure(level: str, style: str, stream: TextIO | None = None) -> None:
    """Send every log line of the process to `stream`, standard error by default.

    Args:
        level: The least level that is written.
        style: "text" or "json".
    """
    stream = stream or sys.stderr
    handler = Handler(stream)
    text = TextFormatter(in_colour=_is_terminal(stream) and not os.environ.get("NO_COLOR"))
    handler.setFormatter(JSONFormatter() if style == "json" else text)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.raiseExceptions = False
    # Found out for each record, and written by none of our formats.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.captureWarnings(capture=True)


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError):  # it is missing, or closed
        return False


class Handler(logging.Handler):
    """Writes lines to a stream. Threads do not queue up for it: one writes for all who come.

    A write lets another thread run, so with a lock around it, as in logging's own handlers, each
    line made all threads that log wait for each other: a third of the jobs a second were left.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._lines: deque[str] = deque(maxlen=MAX_LINES)
        self._writing = threading.Lock()

    def handle(self, record: logging.LogRecord) -> bool:
        """Write a record, or leave it to the thread that is writing."""
        self.emit(record)
        return True

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, or leave it to the thread that is writing."""
        try:
            self._lines.append(self.format(record) + "\n")
        except Exception:  # noqa: BLE001 - a library's message that does not fit its values
            self.handleError(record)
        while self._lines and self._writing.acquire(blocking=False):
            if not self._write():
                return  # it goes with the next line

    def flush(self) -> None:
        """Wait until what was logged is written, but not for ever."""
        deadline = time.monotonic() + FLUSH_SECONDS
        while self._lines and self._writing.acquire(timeout=max(0, deadline - time.monotonic())):
            if not self._write(max(0.0, deadline - time.monotonic())):
                return

    def _write(self, patience_seconds: float = 0.0) -> bool:
        """Write as much as the stream takes; return whether that was something."""
        try:
            if not _takes_more(self._stream, patience_seconds):
                return False
            text = self._lines.popleft()
            while self._lines and len(text) + len(self._lines[0]) <= PIECE:
                text += self._lines.popleft()
            if text[PIECE:]:
                self._lines.appendleft(text[PIECE:])
            self._stream.write(text[:PIECE])
            self._stream.flush()
        except Exception:  # noqa: BLE001, S110 - no stream, a closed one, or a full disk
            pass  # must not stop the service
        finally:
            self._writing.release()
        return True


def _takes_more(stream: TextIO, patience_seconds: float) -> bool:
    """Tell whether a write would not wait; a pipe that nobody reads takes none."""
    try:
        descriptor = stream.fileno()
    except (AttributeError, OSError, ValueError):  # no file
        return True
    poller = select.poll()
    poller.register(descriptor, select.POLLOUT)
    return bool(poller.poll(patience_seconds * 1000))


class TextFormatter(logging.Formatter):
    """`2026-01-02T03:04:05.678Z INFO postback job accepted job_id=4f1c…`."""

    def __init__(self, *, in_colour: bool = False) -> None:
        super().__init__()
        self._in_colour = in_colour

    def format(self, record: logging.LogRecord) -> str:
        """Return one line; a traceback stands below it, indented."""
        values = "".join(f" {name}={_shown(value)}" for name, value in _values(record).items())
        message = record.getMessage()
        phrase = message if message.isprintable() else json.dumps(message)
        level = self._painted(record.levelname)
        line = f"{_time(record)} {level} {record.name} {phrase}{values}"
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        return "\n  ".join([line, *trace.splitlines()])

    def _painted(self, level: str) -> str:
        colour = _COLOURS.get(level) if self._in_colour else None
        return f"{colour}{level}\033[0m" if colour else level


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """How a request was answered.

    Attributes:
        path: As it came, without the query, which may hold secrets.
        route: The rule that took it, such as `/jobs/<job_id>`; "none" where no rule did.
        seconds: From the request to the moment at which the answer has left.
        error: Why it was refused, if it was by an error of ours.
        job_id: The job that was accepted, or that the path names.
    """

    method: str
    path: str
    route: str
    status_code: int
    seconds: float
    error: Exception | None
    job_id: str | None


class Watched:
    """An application whose answers are told of once they have left: a log line for each.

    Args:
        application: Leaves its route in `bottle.route` and its error in `postback.error`.
        on_answer: Is told of each answer, too.
    """

    def __init__(
        self, application: WSGI, on_answer: Callable[[Answer], None] = lambda _: None
    ) -> None:
        self._application = application
        self._on_answer = on_answer
        self._of_thread = threading.local()

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        """Answer, and keep in mind what to tell."""
        began = time.perf_counter()

        def start(status: str, headers: Any, exc_info: Any = None) -> Any:
            answer = _answer(environ, int(status[:3]), dict(headers))
            vars(self._of_thread).setdefault("kept", []).append((answer, began))
            return start_response(status, headers, exc_info)

        return self._application(environ, start)

    def tell(self) -> None:
        """Tell of what this thread has answered: it has left."""
        kept, self._of_thread.kept = vars(self._of_thread).get("kept", ()), []
        for answer, began in kept:
            told = replace(answer, seconds=time.perf_counter() - began)
            _log(told)
            self._on_answer(told)


def _answer(environ: Mapping[str, Any], status_code: int, headers: Mapping[str, str]) -> Answer:
    route = environ.get("bottle.route")
    accepted = headers.get("Location", "").removeprefix("/jobs/")
    return Answer(
        method=environ["REQUEST_METHOD"],
        path=environ["PATH_INFO"],
        route=route.rule if route else "none",
        status_code=status_code,
        seconds=0.0,
        error=environ.get("postback.error"),
        job_id=accepted or environ.get("route.url_args", {}).get("job_id"),
    )


def _log(answer: Answer) -> None:
    # Probes, scrapes and the page ask every few seconds: when all is well, nobody looks for them.
    # A job that was accepted has a line of its own.
    went_well = answer.status_code < 400
    is_quiet = went_well and (answer.method in ("GET", "HEAD") or answer.route == "/process")
    access_log.log(
        logging.DEBUG if is_quiet else logging.INFO,
        "answered",
        extra={
            "job_id": answer.job_id,
            "method": answer.method,
            "path": answer.path[:MAX_PATH],
            "status_code": answer.status_code,
            "ms": round(answer.seconds * 1000, 1),
        },
    )


def _values(record: logging.LogRecord) -> dict[str, Any]:
    values = {name: value for name, value in vars(record).items() if name not in _OWN}
    return {name: value for name, value in values.items() if value is not None}


def _time(record: logging.LogRecord) -> str:
    return model.text_of(datetime.fromtimestamp(record.created, UTC))


def _shown(value: Any) -> str:
    """Return a value that is one word, whatever it holds: no line can be forged."""
    text = str(value)
    return text if text.isprintable() and _PLAIN.fullmatch(text) else json.dumps(text)
