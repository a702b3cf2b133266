"""The built-in receiver: verify postbacks, drop duplicates, store them, and list them.

`./run receiver` runs it alone, and prints what it receives. POSTBACK_SECRET verifies postbacks,
API_TOKEN protects their list, and RETENTION is how long they are stored. It answers 200 only after
its commit. It answers garbage with 401 or 400, never 500.
"""

import argparse
import contextlib
import hashlib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import bottle

import config
from jobs import errors, model, worker
from jobs.journal import Journal
from web import intake, logs, signatures
from web.server import Application, Server, is_local, json_answer

#: Characters of an event that are shown where it is printed.
MAX_SHOWN = 500

#: Levels of arrays and objects in an event. A deeper one could be read but not listed.
MAX_DEPTH = 200

#: The largest event that a receiver alone takes: as large as a result may be.
MAX_BODY_BYTES = 64 * 1024 * 1024

#: A receiver alone removes old postbacks so often at least, and at most so many each time.
PRUNE_SECONDS = 10.0
PRUNE_LIMIT = 100

SIGNALS = (signal.SIGTERM, signal.SIGINT)

log = logging.getLogger("postback")


@dataclass(frozen=True, slots=True)
class Receiver:
    """Takes postbacks in, each once.

    Attributes:
        secrets: Without one, every postback is taken.
        show: Is called with a line for each new postback.
    """

    journal: Journal
    secrets: Sequence[str]
    max_body_bytes: int
    show: Callable[[str], None] = lambda _: None

    def receive(self) -> None:
        """Answer POST /postprocessed: verify. Storing is left to the transaction of the turn."""
        environ, now = bottle.request.environ, model.utc_now()
        body = intake.read_body(environ, max_bytes=self.max_body_bytes)
        headers = {name: bottle.request.headers.raw(name, "") for name in signatures.HEADERS}
        if self.secrets:
            signatures.verify(self.secrets, headers, body, now=now)
        _check_event(body)
        webhook_id = headers["webhook-id"] or hashlib.sha256(body).hexdigest()

        def write() -> bottle.HTTPResponse:
            facts = {"received_at": now, "signature": "good" if self.secrets else "none"}
            if not self.journal.receive(webhook_id=webhook_id, body=body, **facts):
                return json_answer({"status": "duplicate"})
            # As ASCII, so that it cannot steer a terminal.
            shown = ascii(f"{webhook_id} {body[:MAX_SHOWN].decode(errors='replace')}")[1:-1]
            environ["postback.after"].append(lambda: self.show(f"postback received {shown}"))
            return json_answer({"status": "received"})

        environ["postback.write"] = write

    def listing(self, *, limit: int) -> dict[str, list[dict[str, Any]]]:
        """Answer GET /postprocessed: what was received, newest first."""
        received = self.journal.received(limit=limit)
        return {"received": [one | {"event": json.loads(one.pop("body"))} for one in received]}


def main() -> None:
    """Run a receiver alone, until a signal stops it."""
    parser = argparse.ArgumentParser(prog="./run receiver", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8081, help="0 is any free one")
    parser.add_argument("--journal", type=Path, default=Path("received.db"))
    options = parser.parse_args()
    # Before any other thread starts: threads inherit the mask, and `sigwait` needs it.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    journal = Journal(options.journal, on_lost=lambda: os._exit(74))
    try:
        settings = config.load()
        logs.configure(settings.log_level, settings.log_format)
        journal.open()
        server = Server(host=options.host, port=options.port, max_body_bytes=MAX_BODY_BYTES)
    except (errors.ConfigError, errors.JournalError) as exc:
        logs.say(exc, sys.stderr)
        sys.exit(78 if isinstance(exc, errors.ConfigError) else 74)
    application = _application(options.host, journal, settings)
    prune = _pruning(journal, settings)
    server.start(application, lambda: journal.transaction(durable=True), prune)
    url = f"{server.url}/postprocessed"
    logs.say(f"Receiver listens on {url}\nStart the service with POSTBACK_URL={url}")
    signal.sigwait(SIGNALS)
    server.stop()
    journal.close()


def _application(host: str, journal: Journal, settings: config.Config) -> Application:
    secrets, tokens = settings.postback_secret, settings.api_token
    if not (is_local(host) or secrets):
        log.warning("anyone can post results: set POSTBACK_SECRET", extra={"host": host})
    receiver = Receiver(journal, secrets=secrets, max_body_bytes=MAX_BODY_BYTES, show=logs.say)
    application = Application(tokens, frozenset() if is_local(host) and not tokens else None)
    application.serve("POST", "/postprocessed", receiver.receive, open_to_all=True)
    application.serve("GET", "/postprocessed", lambda: receiver.listing(limit=50))
    return application


def _pruning(journal: Journal, settings: config.Config) -> Callable[[], float]:
    """Return what removes postbacks that are older than any attempt that could repeat them."""
    seconds = max(settings.retention_seconds, sum(settings.postback_schedule_seconds))

    def prune() -> float:
        with contextlib.suppress(errors.JournalError), journal.transaction():
            before = model.utc_now() - timedelta(seconds=seconds)
            journal.prune_received(before=before, limit=PRUNE_LIMIT)
        return PRUNE_SECONDS

    return prune


def _check_event(body: bytes) -> None:
    """Refuse what could not be listed. Otherwise, an event is whatever an analysis returned."""
    with contextlib.suppress(ValueError, RecursionError):
        event = json.loads(body.decode())
        json.dumps(event, allow_nan=False)
        if isinstance(event, dict) and worker.is_sound(event, MAX_DEPTH):
            return
    detail = f"The event is not a JSON object in UTF-8, of at most {MAX_DEPTH} levels."
    raise errors.invalid(detail)


if __name__ == "__main__":
    main()
