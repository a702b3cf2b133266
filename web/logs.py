"""One happening, one log line: a time, a level, a fixed phrase, and values by name.

Lines go to standard error. No payload, result, token or secret is ever handed to a logger. Each
answer is such a happening, too: a line of the logger `postback.access`.
"""

import contextlib
import json
import logging
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple, TextIO

from jobs import cores, model

#: What a record has by itself; whatever else it has came in `extra`.
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


#: Colours of the levels that somebody should look at, as ANSI escapes.
_COLOURS = {"WARNING": "\033[33m", "ERROR": "\033[31m", "CRITICAL": "\033[31;1m"}

#: Characters of a path, and of what else a caller makes up, that are logged.
MAX_PATH = 200

#: Lines kept while the stream takes none; the oldest go first. A log that nobody reads must not
#: stop the service.
MAX_LINES = 10_000

#: Seconds between two writes.
PAUSE_SECONDS = 0.02

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
    logging._srcfile = None  # noqa: SLF001 - what its documentation advises
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.captureWarnings(capture=True)


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError):  # it is missing, or closed
        return False


class Handler(logging.Handler):
    """Writes lines to a stream, in a thread of its own: all that came meanwhile at once.

    So nobody who logs waits for the stream, whoever reads it, and the cost is that of a few writes
    a second. What the last lines tell is lost if the process is killed; the journal is not.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._waiting: deque[logging.LogRecord | str] = deque(maxlen=MAX_LINES)
        self._told = threading.Event()
        self._written = threading.Condition()
        self._closing = threading.Event()
        self._is_writing = False
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()
        self._is_fork = False
        os.register_at_fork(after_in_child=self._go_on_without_thread)

    def handle(self, record: logging.LogRecord) -> bool:
        """Have a record written soon."""
        # What may change until then is made text at once: all that is not of ours. And where lines
        # come faster than they are written, whoever brings them makes them.
        is_ours = record.name.startswith("postback") and not (record.args or record.exc_info)
        waits = is_ours and len(self._waiting) < MAX_LINES // 2
        self._waiting.append(record if waits else _line(self, record))
        if self._is_fork:
            self._write()
        elif not self._told.is_set():
            self._told.set()
        return True

    def flush(self) -> None:
        """Wait until what was logged is written, but not for ever."""
        with self._written:
            self._written.wait_for(
                lambda: not (self._waiting or self._is_writing), timeout=FLUSH_SECONDS
            )

    def close(self) -> None:
        """End the thread, once it has written what was logged."""
        self._closing.set()
        self._told.set()
        super().close()

    def _run(self) -> None:
        cores.keep_to_one()
        while not self._closing.is_set() or self._waiting:
            self._told.wait()
            self._told.clear()
            self._is_writing = True
            with contextlib.suppress(Exception):  # the next ones may be written
                self._write()
            with self._written:
                self._is_writing = False
                self._written.notify_all()
            if len(self._waiting) < MAX_LINES // 2:
                self._closing.wait(PAUSE_SECONDS)

    def _write(self) -> None:
        lines = []
        with contextlib.suppress(IndexError):  # in a fork another thread may take them, too
            for _ in range(len(self._waiting)):
                one = self._waiting.popleft()
                lines.append(one if isinstance(one, str) else _line(self, one))
        with contextlib.suppress(Exception):  # no stream, a closed one, a full disk
            self._stream.write("".join(lines))
            self._stream.flush()

    def _go_on_without_thread(self) -> None:
        """Write each line at once: a child that an analysis forks does not have the thread.

        The thread may have held the locks of this and of the stream.
        """
        self._is_fork, self._is_writing, self._written = True, False, threading.Condition()
        self._waiting.clear()  # the parent writes these
        with contextlib.suppress(Exception):  # it is no file
            number = self._stream.fileno()
            self._stream = open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def _line(handler: logging.Handler, record: logging.LogRecord) -> str:
    try:
        return handler.format(record) + "\n"
    except BaseException:  # noqa: BLE001 - a message that does not fit its values, or worse
        return ""


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


class Answer(NamedTuple):
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
            kept = vars(self._of_thread).setdefault("kept", [])
            kept.append((environ, int(status[:3]), dict(headers), began))
            return start_response(status, headers, exc_info)

        return self._application(environ, start)

    def tell(self) -> None:
        """Tell of what this thread has answered: it has left."""
        kept, self._of_thread.kept = vars(self._of_thread).get("kept", ()), []
        for environ, status_code, headers, began in kept:
            seconds = time.perf_counter() - began
            answer = _answer(environ, status_code, headers, seconds)
            _log(answer)
            self._on_answer(answer)


def _answer(
    environ: Mapping[str, Any], status_code: int, headers: Mapping[str, str], seconds: float
) -> Answer:
    route = environ.get("bottle.route")
    accepted = headers.get("Location", "").removeprefix("/jobs/")
    return Answer(
        method=environ["REQUEST_METHOD"],
        path=environ["PATH_INFO"],
        route=route.rule if route else "none",
        status_code=status_code,
        seconds=seconds,
        error=environ.get("postback.error"),
        job_id=accepted or environ.get("route.url_args", {}).get("job_id"),
    )


def _log(answer: Answer) -> None:
    # Probes, scrapes and the page ask every few seconds: when all is well, nobody looks for them.
    # A job that was accepted has a line of its own.
    went_well = answer.status_code < 400
    is_quiet = went_well and (answer.method in ("GET", "HEAD") or answer.route == "/process")
    level = logging.DEBUG if is_quiet else logging.INFO
    if not access_log.isEnabledFor(level):
        return
    access_log.log(
        level,
        "answered",
        extra={
            "job_id": answer.job_id and answer.job_id[:MAX_PATH],
            "method": answer.method[:MAX_PATH],
            "path": answer.path[:MAX_PATH],
            "status_code": answer.status_code,
            "ms": round(answer.seconds * 1000, 1),
        },
    )


def _values(record: logging.LogRecord) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(record).items()
        if name not in _OWN and value is not None
    }


def _time(record: logging.LogRecord) -> str:
    return model.text_of(datetime.fromtimestamp(record.created, UTC))


def _shown(value: Any) -> str:
    """Return a value that is one word, whatever it holds: no line can be forged."""
    text = str(value)
    return text if text.isprintable() and _PLAIN.fullmatch(text) else json.dumps(text)
