"""The HTTP face and the wiring: routes, start, stop.

    POST /process ──> intake ──> runner ──> executor ──> postback ──> POST <postback_url>

`python app.py` starts the service. `--help` lists the settings, `--check` validates them.
"""

import _thread
import argparse
import contextlib
import dataclasses
import functools
import gc
import hmac
import json
import logging
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn

import bottle

import config
import postback
from config import Config
from jobs import model
from jobs.dask_executor import DaskExecutor
from jobs.errors import ConfigError, Refusal, invalid
from jobs.executor import WorkerExecutor
from jobs.journal import Journal
from jobs.model import State
from jobs.runner import Runner
from web import intake, logs, metrics, outbound
from web.receiver import Receiver
from web.server import Application, Server, is_local, json_answer

# Exit codes (sysexits.h).
EXIT_LOST = 74  # the journal was lost, or the service failed
EXIT_WAITING = 75  # jobs wait for the next start
EXIT_REFUSED = 78  # it cannot start as it is configured

#: Jobs, or received postbacks, on one page.
PAGE = 50
MAX_PAGE = 1000

#: Room in a posted event for all but its result.
ENVELOPE_BYTES = 64 * 1024

#: Each of them stops the service in order.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

#: The description of the routes.
OPENAPI_PATH = Path(__file__).with_name("web") / "openapi.json"

log = logging.getLogger("postback")


class Api:
    """The routes. What is refused is raised, and becomes a problem in `web/server.py`.

    A handler that is to change a job checks the request, and leaves the rest in `postback.write`.
    The loop calls that inside the transaction that several requests share. It returns the answer.
    What is in `postback.after` is called once the answer was sent.
    """

    def __init__(self, service: "Service") -> None:
        self._config = service.config
        self._journal = service.journal
        self._runner = service.runner
        self._metrics = service.metrics
        self._base_url = service.base_url
        self._own_receiver = outbound.parts(service.postback_url).origin
        self._receiver = Receiver(
            service.journal,
            secrets=service.config.postback_secret,
            max_body_bytes=service.max_body_bytes,
            show=_print_to_terminal,
        )
        self._application = Application(self._config.api_token, _allowed_hosts(self._config))

    def application(self) -> Application:
        """Return the application with every route."""
        app = self._application
        app.serve("POST", "/process", self.process)
        app.serve("GET", "/jobs", self.jobs)
        app.serve("POST", "/jobs/resend", self.resend_undelivered)
        app.serve("GET", "/jobs/<job_id>", self.job)
        app.serve("DELETE", "/jobs/<job_id>", self.delete)
        app.serve("GET", "/jobs/<job_id>/result", self.result, open_to_all=True)
        app.serve("POST", "/jobs/<job_id>/cancel", self.cancel)
        app.serve("POST", "/jobs/<job_id>/resend", self.resend)
        app.serve("POST", "/postprocessed", self._receiver.receive, open_to_all=True)
        app.serve("GET", "/postprocessed", lambda: self._receiver.listing(limit=_limit()))
        app.serve("GET", "/livez", self.livez, open_to_all=True)
        app.serve("GET", "/readyz", self.readyz, open_to_all=True)
        app.serve("GET", "/stats", lambda: {"minutes": self._metrics.hour()})  # for the page
        app.serve("GET", "/metrics", self.metrics)
        app.serve("GET", "/openapi.json", self.openapi)
        app.serve_page()
        return app

    def process(self) -> None:
        """Answer POST /process."""
        environ = bottle.request.environ
        payload = intake.read_payload(environ, max_bytes=self._config.max_body_bytes)
        job = self._new_job(payload)
        environ["postback.write"] = functools.partial(self._accept, job, payload, environ)

    def _accept(
        self, job: model.Job, payload: intake.Payload, environ: dict[str, Any]
    ) -> bottle.HTTPResponse:
        job_id = self._runner.accept(job, payload.body, idempotency_key=payload.idempotency_key)
        if job_id == job.id:
            environ["postback.after"].append(functools.partial(self._accepted, job))
        status_url = f"{self._base_url}/jobs/{job_id}"
        answer = json_answer({"id": job_id, "state": State.ACCEPTED, "status_url": status_url})
        answer.set_header("Location", status_url)
        if intake.prefers_async(environ):  # RFC 7240, section 4.1
            answer.status = 202
            answer.set_header("Preference-Applied", "respond-async")
        return answer

    def _new_job(self, payload: intake.Payload) -> model.Job:
        receiver = ""
        if payload.postback_url is not None:
            self._config.postback_allow.check(payload.postback_url)
            origin = outbound.parts(payload.postback_url).origin
            receiver = "" if origin == self._own_receiver else origin
        now = model.utc_now()
        return model.Job(
            id=model.new_id(now),
            state=State.ACCEPTED,
            postback_url=payload.postback_url,
            receiver=receiver,
            metadata=payload.metadata,
            forwarded=payload.forwarded,
            created_at=now,
        )

    def _accepted(self, job: model.Job) -> None:
        self._metrics.accepted(job)
        log.info("job accepted", extra=job.facts)

    def jobs(self) -> dict[str, Any]:
        """Answer GET /jobs: newest first, without payloads and results."""
        query = bottle.request.query
        state, before = query.get("state"), query.get("before")
        if state is not None and state not in list(State):
            raise invalid(f"state must be one of {', '.join(State)}.")
        page = self._journal.page(state=state, limit=_limit(), before=before)
        return {"jobs": [self._summary(job) for job in page]}

    def job(self, job_id: str) -> dict[str, Any]:
        """Answer GET /jobs/<id>: everything about one job."""
        job, body, event, attempts = self._journal.detail(job_id)
        summary = self._summary(job)
        ending = json.loads(event)["data"] if event else {}
        links = {name: ending[name] for name in ending if name.startswith("result_")}
        if job.outcome and not event:  # the event is too large to be shown
            links = {"result_url": f"{self._base_url}/jobs/{job_id}/result"}
        if not job.ended_at:
            bottle.response.set_header("Retry-After", str(_retry_after(summary)))
        return {
            **summary,
            "data": json.loads(body)["data"],
            "result": ending.get("result"),
            "error": ending.get("error"),
            **links,
            "attempts": attempts,
        }

    def _summary(self, job: model.Job) -> dict[str, Any]:
        shown = {name: getattr(job, name) for name in _SHOWN} | {"attempts_made": job.attempts}
        run = self._runner.runs.get(job.id) if job.state is State.RUNNING else None
        shown["progress"] = run.progress if run else None
        if run:
            shown["started_at"] = run.started_at
        if job.next_attempt_at:  # a receiver that asked for a pause gets nothing before it ends
            held = timedelta(seconds=self._runner.held_seconds(job.receiver))
            shown["next_attempt_at"] = max(job.next_attempt_at, model.utc_now() + held)
        retention = timedelta(seconds=self._config.retention_seconds)
        shown["expires_at"] = job.ended_at and job.ended_at + retention
        return shown

    def delete(self, job_id: str) -> None:
        """Answer DELETE /jobs/<id>."""

        def write() -> bottle.HTTPResponse:
            self._journal.delete(job_id)
            return bottle.HTTPResponse(status=204)

        bottle.request.environ["postback.write"] = write

    def result(self, job_id: str) -> bytes:
        """Answer GET /jobs/<id>/result: the bytes that a `result_url` stands for."""
        key, expected = bottle.request.query.get("key", ""), self._journal.result_key(job_id)
        if not (expected and hmac.compare_digest(key.encode(), expected.encode())):
            self._application.check_token(bottle.request.environ)
        bottle.response.content_type = "application/json"
        return self._journal.result(job_id)

    def cancel(self, job_id: str) -> None:
        """Answer POST /jobs/<id>/cancel."""
        environ = bottle.request.environ

        def write() -> bottle.HTTPResponse:
            environ["postback.after"].append(self._runner.cancel(job_id))
            return json_answer(self._summary(self._journal.current(job_id)))

        environ["postback.write"] = write

    def resend(self, job_id: str) -> None:
        """Answer POST /jobs/<id>/resend."""

        def write() -> bottle.HTTPResponse:
            self._runner.resend(job_id)
            return json_answer(self._summary(self._journal.current(job_id)))

        bottle.request.environ["postback.write"] = write

    def resend_undelivered(self) -> dict[str, int]:
        """Answer POST /jobs/resend."""
        body = intake.read_body(bottle.request.environ, max_bytes=ENVELOPE_BYTES)
        wanted = intake.parse(body, max_depth=1)
        if not isinstance(wanted, dict) or wanted.keys() - {"state", "since"}:
            raise invalid('Send {"state": "undelivered"}, and perhaps "since".')
        if wanted.get("state") != State.UNDELIVERED:
            raise invalid('state must be "undelivered".')
        return {"resent": self._runner.resend_undelivered(_since(wanted.get("since")))}

    def livez(self) -> dict[str, str]:
        """Answer GET /livez: the process answers."""
        return {"status": "alive", "version": postback.VERSION}

    def readyz(self) -> dict[str, str]:
        """Answer GET /readyz: a job would be accepted now, and its analysis could run."""
        self._runner.refuse_unready()
        return {"status": "ready"}

    def metrics(self) -> bytes:
        """Answer GET /metrics, in Prometheus' text format."""
        bottle.response.content_type = metrics.CONTENT_TYPE
        return self._metrics.text(self._journal)

    def openapi(self) -> dict[str, Any]:
        """Answer GET /openapi.json: the description of these routes."""
        return {**json.loads(OPENAPI_PATH.read_bytes()), "servers": [{"url": self._base_url}]}


class Service:
    """Everything wired together, from the start to the stop."""

    runner: Runner

    def __init__(self, config: Config) -> None:
        self.config = config
        self.max_body_bytes = max(config.max_body_bytes, config.postback_max_bytes + ENVELOPE_BYTES)
        self.metrics = metrics.Metrics()
        on_lost = functools.partial(_exit, EXIT_LOST)
        self.journal = Journal(
            config.journal_path, on_lost=on_lost, on_commit=self.metrics.committed
        )
        self._executor = _executor(config)
        self._is_running = self.is_stopping = False

    def start(self) -> None:
        """Open the journal, load the analysis, resume what is unfinished, and begin to answer.

        Raises:
            ConfigError: The journal, the address or the analysis cannot be used.
            Refusal: What is unfinished cannot be resumed, or no worker can be started.
        """
        config = self.config
        self.journal.open()
        self._executor.start()
        self.server = Server(host=config.host, port=config.port, max_body_bytes=self.max_body_bytes)
        self._executor.on_news = self.server.wake
        own_url = self.server.url
        self.base_url = config.public_url or own_url
        self.postback_url = config.postback_url or f"{own_url}/postprocessed"
        own = [f"{url}/postprocessed" for url in (self.base_url, own_url)]
        own_urls = frozenset(outbound.parts(url).url for url in own)
        sender = postback.Sender(config, url=self.postback_url, own_urls=own_urls)
        self.runner = Runner(
            config=config,
            journal=self.journal,
            executor=self._executor,
            sender=sender,
            metrics=self.metrics,
            job_url=lambda job_id: f"{self.base_url}/jobs/{job_id}",
            wake=self.server.wake,
        )
        self._is_running = True  # from here on a stop has something to drain
        self.runner.start()
        self.server.start(
            Api(self).application(),
            lambda: self.journal.transaction(durable=True),
            self.runner.work,
            self.metrics.answered,
            watched=[one.selector.fileno() for one in (self._executor, sender.transport)],
        )
        gc.freeze()  # what is there now stays: the collector need not look at it again

    def check(self) -> None:
        """Try what can be tried without the journal and the address.

        Raises:
            ConfigError: The analysis cannot be run.
        """
        self._executor.start()
        self._executor.close()

    def stop(self) -> int:
        """Drain and close; return the exit code."""
        log.info("drain begun", extra={"seconds": self.config.drain_seconds})
        self.is_stopping = True
        if not self._is_running:
            self._executor.close()
            return 0
        self.runner.drain(self.config.drain_seconds)
        self.server.stop()
        self._executor.close()
        waiting = sum(n for state, n, _ in self.journal.census() if state != State.UNDELIVERED)
        self.journal.close()
        log.info("drain ended", extra={"will_resume": waiting})
        return EXIT_WAITING if waiting else 0


def main(arguments: Sequence[str]) -> NoReturn:
    """Start the service, or do what the argument says."""
    options = _parser().parse_args(arguments)
    _open_standard_streams()
    try:
        settings = config.load()
        logs.configure("error" if options.check else settings.log_level, settings.log_format)
        service = Service(settings)
        if options.check:
            service.check()
            print("The settings are fine.")
            sys.exit(0)
    except (ConfigError, Refusal) as exc:
        _refuse(exc)
    # Before any other thread starts: threads inherit the mask, and `sigwait` needs it.
    signals = [one for one in STOP_SIGNALS if signal.getsignal(one) is not signal.SIG_IGN]
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    threading.Thread(target=_start, args=(service, settings), name="start", daemon=True).start()
    signal.sigwait(signals)
    _thread.start_new_thread(_stop, (service,))  # it does not wait until the thread runs
    # A second signal ends the process at once. The next start resumes what is in the journal.
    os._exit(128 + signal.sigwait(signals))


def _start(service: Service, settings: Config) -> None:
    try:
        service.start()
        _greet(service, settings)
    except (ConfigError, Refusal) as exc:
        if not service.is_stopping:
            _refuse(exc)
    except BaseException:
        log.exception("service not started")
        _exit(EXIT_LOST)


def _stop(service: Service) -> None:
    code = EXIT_LOST  # unless it stops in order
    try:
        code = service.stop()
    except Exception:
        log.exception("service not stopped in order")
    finally:
        _exit(code)


def _refuse(exc: Exception) -> NoReturn:
    logs.say(exc, sys.stderr)
    _exit(EXIT_REFUSED if isinstance(exc, ConfigError) else EXIT_LOST)


def _exit(code: int) -> NoReturn:
    """End the process. Nobody waits for threads, which may hang in a name look-up."""
    with contextlib.suppress(Exception):  # a stream may be closed, or missing
        logging.shutdown()
        sys.stdout.flush()
    os._exit(code)


def _open_standard_streams() -> None:
    """Open the null device where a standard stream is closed, or a socket would take its number."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def _executor(settings: Config) -> WorkerExecutor | DaskExecutor:
    analysis = settings.analysis
    if settings.executor == "dask":
        url = settings.dask_scheduler or ""
        return DaskExecutor(analysis=analysis, scheduler_url=url, upload_path=settings.dask_upload)
    workers = settings.max_running if settings.executor == "process" else None
    return WorkerExecutor(analysis=analysis, workers=workers, log_level=settings.log_level)


def _allowed_hosts(settings: Config) -> frozenset[str] | None:
    if settings.api_token or not is_local(settings.host):
        return None
    url = settings.public_url
    return frozenset([outbound.parts(url).host.strip("[]")] if url else [])


#: What is shown of a job, beside what only some routes show.
_SHOWN = (
    *("id", "state", "outcome", "postback_url", "metadata", "starts", "interrupted", "last_error"),
    *(field.name for field in dataclasses.fields(model.Job) if field.name.endswith("_at")),
)


def _retry_after(shown: Mapping[str, Any]) -> int:
    """Return the seconds after which another look at a job makes sense."""
    next_at = shown["next_start_at"] or shown["next_attempt_at"]
    seconds = (next_at - model.utc_now()).total_seconds() if next_at else 2
    return math.ceil(min(max(seconds, 1), 60))


def _since(value: Any) -> datetime:
    if value is None:
        return datetime(1970, 1, 1, tzinfo=UTC)
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        since = datetime.fromisoformat(value)
        return since.astimezone(UTC) if since.tzinfo else since.replace(tzinfo=UTC)
    raise invalid("since must be an instant such as 2026-01-02T03:04:05Z.")


def _limit() -> int:
    text = bottle.request.query.get("limit", str(PAGE))
    if not (re.fullmatch("[0-9]{1,4}", text) and 1 <= int(text) <= MAX_PAGE):
        raise invalid(f"limit must be a whole number from 1 to {MAX_PAGE}.")
    return int(text)


def _greet(service: Service, settings: Config) -> None:
    token = ' -H "Authorization: Bearer $API_TOKEN"' if settings.api_token else ""
    is_ours = settings.analysis.startswith("processing:")  # another one expects other data
    data = "[3, 1, 4, 1, 5, 9, 2, 6]" if is_ours else "..."
    hint = "" if is_ours else ", with your data in place of ..."
    text = (
        f"Postback listens on {service.base_url}\n"
        f"Results are posted to {config.without_password(service.postback_url)}\n"
        f"Try it{hint}: curl {service.base_url}/process{token} -H 'Content-Type: application/json' "
        f"""-d '{{"data": {data}}}'"""
    )
    logs.say(text)
    if is_local(settings.host):
        return
    if not settings.api_token:
        log.warning("anyone can send jobs: set API_TOKEN", extra={"host": settings.host})
    if not settings.postback_secret:
        log.warning("anyone can post results: set POSTBACK_SECRET", extra={"host": settings.host})


def _print_to_terminal(text: str) -> None:
    if sys.stdout and sys.stdout.isatty():  # it is None when descriptor 1 was closed
        logs.say(text)


def _parser() -> argparse.ArgumentParser:
    rows = [f"  {name:<20} {default:<26} {meaning}" for name, default, meaning in config.table()]
    parser = argparse.ArgumentParser(
        prog="./run",
        description="Start the service: answer at once, post the result back later.",
        epilog="\n".join(["settings, as environment variables:", *rows]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="validate the settings and end")
    parser.add_argument("--version", action="version", version=postback.VERSION)
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
