"""One run of the analysis: from the payload's bytes to an ending, whatever happens in it.

The same few lines run in the job's thread, in a child process and on a Dask worker, so JSON is read
and written where the analysis is, and between processes go only bytes and text.
"""

import inspect
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jobs import model

#: Reports that follow another by less than this many seconds are dropped.
REPORT_SECONDS = 0.25

#: Characters of a note that are kept.
MAX_NOTE = 200

#: The user's function: it takes the data, and perhaps a way to report its progress.
Analyze = Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What a running analysis last said of itself.

    Attributes:
        fraction: From 0 to 1.
        at: When it said so.
    """

    fraction: float
    note: str
    at: datetime


Report = Callable[[Progress], None]


def with_progress(analyze: Analyze) -> Analyze:
    """Return a function of data and `progress`, which it hands on to an `analyze` that takes it.

    That is one whose second argument must be given, or is called `progress`.
    """
    return analyze if _takes_progress(analyze) else lambda data, _: analyze(data)


def run(analyze: Analyze, body: bytes, report: Report) -> model.Ending:
    """Return how the analysis of a payload ends; nothing is raised.

    Args:
        analyze: As `with_progress` returns it.
        body: The payload as it was accepted.
        report: Is given what the analysis tells of its progress.
    """
    try:
        return model.succeeded(analyze(json.loads(body)["data"], _Reporter(report)))
    except BaseException as exc:  # noqa: BLE001 - whatever the user's code raises is an outcome
        return model.failed(exc)


class _Reporter:
    """What an analysis calls as `progress(fraction, note="")`."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._next_at = -math.inf  # monotonic

    def __call__(self, fraction: float, note: str = "") -> None:
        now = time.monotonic()
        if now < self._next_at or math.isnan(fraction):
            return
        self._next_at = now + REPORT_SECONDS
        text = str(note)[:MAX_NOTE].encode(errors="replace").decode()  # no half surrogate pairs
        self._report(
            Progress(fraction=min(max(float(fraction), 0.0), 1.0), note=text, at=model.utc_now())
        )


def _takes_progress(analyze: Analyze) -> bool:
    try:
        parameters = inspect.signature(analyze).parameters.values()
    except (TypeError, ValueError):  # some builtins have none
        return False
    positional = [
        one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
    ]
    return any(one.default is one.empty or one.name == "progress" for one in positional[1:2])
