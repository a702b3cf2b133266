"""One happening, one log line: a time, a level, a fixed phrase, and values by name.

Lines go to standard error. No payload, result, token or secret is ever handed to a logger.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

from jobs import model

#: What a record has by itself; whatever else it has came in `extra`.
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def configure(level: str, style: str, stream: TextIO | None = None) -> None:
    """Send every log line of the process to `stream`, standard error by default.

    Args:
        level: The least level that is written.
        style: "text" or "json".
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JSONFormatter() if style == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # A stream that was closed, or a full disk, must not stop the service.
    logging.raiseExceptions = False
    logging.captureWarnings(capture=True)
    # It warns once for each request that waits for a thread: a flood under load.
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    logging.getLogger("urllib3").setLevel(logging.ERROR)


class TextFormatter(logging.Formatter):
    """`2026-01-02T03:04:05.678Z INFO postback job accepted job_id=4f1c…`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line; a traceback stands below it, indented."""
        values = "".join(f" {name}={_shown(value)}" for name, value in _values(record).items())
        message = record.getMessage()
        phrase = message if message.isprintable() else json.dumps(message)
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
    values = {name: value for name, value in vars(record).items() if name not in _OWN}
    return {name: value for name, value in values.items() if value is not None}


def _time(record: logging.LogRecord) -> str:
    return model.text_of(datetime.fromtimestamp(record.created, UTC))


def _shown(value: Any) -> str:
    """Return a value that is one word, whatever it holds: no line can be forged."""
    text = str(value)
    plain = text.isprintable() and not set(text) & set(' "=')
    return text if plain and text else json.dumps(text)
