"""The built-in receiver: verify, drop duplicates, store, list. Alone by `python -m web.receiver`.

It answers 200 only after its commit, and 401 or 400, never 500, to garbage.
"""

import argparse
import contextlib
import hashlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import bottle

from jobs import errors, model
from jobs.journal import Journal, Received
from web import intake, logs, server, signatures

#: Characters of an event that are shown where it is printed.
MAX_SHOWN = 500

#: The largest event that a receiver alone takes: as large as a result may be.
MAX_BODY_BYTES = 64 * 1024 * 1024

#: A signal is seen after this many seconds at the latest.
WAIT_SECONDS = 0.5

#: Levels of arrays and objects in an event, or it could be read but not be listed.
MAX_DEPTH = 200


@dataclass(frozen=True, slots=True)
class Receiver:
    """Takes postbacks in, each once.

    Attributes:
        secrets: With none, any postback is taken.
        show: Is given a line for each postback.
    """

    journal: Journal
    _: KW_ONLY
    secrets: Sequence[str]
    max_body_bytes: int
    show: Callable[[str], None] = lambda _: None

    def receive(self) -> dict[str, str]:
        """Answer POST /postprocessed: verify, commit, answer."""
        body = intake.read_body(bottle.request.environ, max_bytes=self.max_body_bytes)
        headers = {name: bottle.request.headers.raw(name, "") for name in signatures.HEADERS}
        now = model.utc_now()
        if self.secrets:
            signatures.verify(self.secrets, headers, body, now=now)
        _check_event(body)
        postback = Received(
            webhook_id=headers["webhook-id"] or hashlib.sha256(body).hexdigest(),
            received_at=now,
            signature="good" if self.secrets else "none",
            body=body,
        )
        if not self.journal.receive(postback):
            return {"status": "duplicate"}
        with contextlib.suppress(Exception):  # a closed terminal must not undo what is committed
            # By ascii(): what is shown must not steer the terminal.
            shown = ascii(body[:MAX_SHOWN].decode(errors="replace"))[1:-1]
            self.show(f"postback received {ascii(postback.webhook_id)[1:-1]} {shown}")
        return {"status": "received"}

    def listing(self, *, limit: int) -> dict[str, list[dict[str, Any]]]:
        """Answer GET /postprocessed: what was received, newest first."""
        return {
            "received": [
                {
                    "webhook_id": postback.webhook_id,
                    "received_at": model.text_of(postback.received_at),
                    "signature": postback.signature,
                    "event": json.loads(postback.body),
                }
                for postback in self.journal.received(limit=limit)
            ]
        }


def main() -> None:
    """Run a receiver alone, until it is told to stop."""
    parser = argparse.ArgumentParser(
        prog="python -m web.receiver",
        description="Receive postbacks and print them. POSTBACK_SECRET, when set, is verified.",
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8081, help="0 for any that is free")
    parser.add_argument("--journal", type=Path, default=Path("received.db"))
    options = parser.parse_args()
    logs.configure("info", "text")
    try:
        _serve(options.host, options.port, options.journal, _secrets(os.environ))
    except errors.ConfigError as exc:
        sys.exit(f"{exc}")


def _leave() -> None:  # pragma: no cover - it ends the process, and what was measured with it
    """End the process because the journal is lost, once the log tells it."""
    logging.shutdown()
    os._exit(74)


def _serve(host: str, port: int, journal_path: Path, secrets: Sequence[str]) -> None:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    journal = Journal(journal_path, on_lost=_leave)
    journal.open()
    receiver = Receiver(
        journal,
        secrets=secrets,
        max_body_bytes=MAX_BODY_BYTES,
        show=lambda text: print(text, flush=True),
    )
    application = server.Application()
    application.serve("POST", "/postprocessed", receiver.receive)
    application.serve("GET", "/postprocessed", lambda: receiver.listing(limit=50))
    listening = server.Server(host=host, port=port, max_body_bytes=MAX_BODY_BYTES)
    listening.start(application, settle=journal.settle)
    url = f"http://{host}:{listening.port}/postprocessed"
    print(f"Receiver listens on {url}\nStart the service with POSTBACK_URL={url}", flush=True)
    while not stop.wait(WAIT_SECONDS):
        pass  # a signal that reaches another thread is seen only when this one runs
    listening.stop()
    journal.close()


def _secrets(environment: Mapping[str, str]) -> tuple[str, ...]:
    path = environment.get("POSTBACK_SECRET_FILE")
    try:
        text = Path(path).read_text() if path else environment.get("POSTBACK_SECRET", "")
        secrets = signatures.read_secrets(text)
    except (OSError, ValueError) as exc:
        raise errors.ConfigError([f"POSTBACK_SECRET=***: {exc}"]) from exc
    if path and not secrets:
        raise errors.ConfigError([f"POSTBACK_SECRET_FILE={path!r}: the file holds no secret"])
    return secrets


def _check_event(body: bytes) -> None:
    # Not as strict as for callers: what a sender's analysis returns is not ours to judge.
    try:
        event = json.loads(
            body.decode(), parse_constant=intake.refuse_constant, parse_float=intake.finite
        )
    except (ValueError, RecursionError) as exc:
        raise errors.MalformedError(f"The event is not JSON in UTF-8: {exc}.") from exc
    if not isinstance(event, dict):
        raise errors.MalformedError("The event is not a JSON object.")
    if model.depth_of(event) > MAX_DEPTH:
        raise errors.MalformedError(f"The event is nested deeper than {MAX_DEPTH} levels.")


if __name__ == "__main__":
    main()
