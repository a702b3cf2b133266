"""The HTTP face and the wiring: routes, start, stop.

    POST /process ──> intake ──> runner ──> executor ──> postback ──> POST <postback_url>

`python app.py` starts the service; `--help` lists the settings, `--check` validates them.
"""

import contextlib
import hashlib
import json
import logging
import os
import queue
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import bottle

import config
import postback
import processing
from config import Config
from jobs import errors, model
from jobs.dask_executor import DaskExecutor
from jobs.executors import Executor, ProcessExecutor, ThreadExecutor
from jobs.journal import Journal
from jobs.runner import Limits, Runner
from web import browser, intake, logs, metrics, outbound
from web.metrics import Metrics
from web.receiver import Receiver
from web.server import Application, Server

#: Exit codes (sysexits.h): the journal was lost; jobs wait for the next start; a refused start.
EXIT_LOST = 74
EXIT_WAITING = 75
EXIT_REFUSED = 78

#: Jobs, or received postbacks, on one page.
PAGE = 50
MAX_PAGE = 1000

#: Room in a posted event for all but its result.
ENVELOPE_BYTES = 64 * 1024

#: A signal is seen after this many seconds at the latest.
WAIT_SECONDS = 0.5

#: What stops the service in order.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

#: The description of the routes.
OPENAPI_PATH = Path(__file__).with_name("web") / "openapi.json"

log = logging.getLogger("postback")


class Api:
    """The routes. What is refused is raised, and becomes a problem in `web/server.py`."""

    def __init__(
        self,
        *,
        config: Config,
        journal: Journal,
        runner: Runner,
        receiver: Receiver,
        metrics: Metrics,
        base_url: str,
    ) -> None:
        self._config = config
        self._journal = journal
        self._runner = runner
        self._receiver = receiver
        self._metrics = metrics
        self._base_url = base_url

    def application(self) -> Application:
        """Return the application with every route."""
        app = Application(self._config.api_token)
        app.serve("POST", "/process", self.process)
        app.serve("GET", "/jobs", self.jobs)
        app.serve("GET", "/jobs/<job_id>", self.job)
        app.serve("GET", "/jobs/<job_id>/result", self.result)
        app.serve("POST", "/jobs/<job_id>/cancel", self.cancel)
        app.serve("POST", "/jobs/<job_id>/resend", self.resend)
        app.serve("POST", "/postprocessed", self._receiver.receive, open_to_all=True)
        app.serve("GET", "/postprocessed", self.received)
        app.serve("GET", "/livez", self.livez, open_to_all=True)
        app.serve("GET", "/readyz", self.readyz, open_to_all=True)
        app.serve("GET", "/stats", self.stats)
        app.serve("GET", "/metrics", self.metrics)
        app.serve("GET", "/openapi.json", self.openapi)
        browser.add_page(
            app, base_url=self._base_url, needs_token=self._config.api_token is not None
        )
        return app

    def process(self) -> dict[str, str]:
        """Answer POST /process: check, commit, start, answer."""
        environ = bottle.request.environ
        payload = intake.read_payload(environ, max_bytes=self._config.max_body_bytes)
        job_id = self._runner.accept(
            _new_job(payload, self._config.postback_allow),
            payload.body,
            idempotency_key=payload.idempotency_key,
            body_sha256=hashlib.sha256(payload.body).hexdigest() if payload.idempotency_key else "",
        )
        if intake.prefers_async(environ):  # RFC 7240, section 4.1
            bottle.response.status = 202
            bottle.response.set_header("Preference-Applied", "respond-async")
        bottle.response.set_header("Location", f"/jobs/{job_id}")
        return {
            "id": job_id,
            "state": model.State.ACCEPTED,
            "status_url": f"{self._base_url}/jobs/{job_id}",
        }

    def jobs(self) -> dict[str, Any]:
        """Answer GET /jobs: newest first, without payloads and results."""
        query = bottle.request.query
        state, before = query.get("state"), query.get("before")
        if state is not None and state not in list(model.State):
            raise errors.MalformedError(f"state must be one of {', '.join(model.State)}.")
        if before is not None:
            self._journal.job(before)
        page = self._journal.page(
            state=model.State(state) if state else None, limit=_limit(), before=before
        )
        return {"jobs": [self._summary(job) for job in page]}

    def job(self, job_id: str) -> dict[str, Any]:
        """Answer GET /jobs/<id>: everything about one job."""
        job, body, event, attempts = self._journal.detail(job_id)
        ending = json.loads(event.body)["data"] if event else {}
        links = {name: ending[name] for name in ending if name.startswith("result_")}
        return {
            **self._summary(job),
            "data": json.loads(body)["data"],
            "result": ending.get("result"),
            "error": ending.get("error"),
            **links,
            "attempts": attempts,
        }

    def _summary(self, job: model.Job) -> dict[str, Any]:
        return {**_summary(job), "progress": self._progress(job)}

    def _progress(self, job: model.Job) -> dict[str, Any] | None:
        progress = self._runner.progress(job.id)
        if progress is None or job.state is not model.State.RUNNING:
            return None
        at = model.text_of(progress.at)
        return {"fraction": progress.fraction, "note": progress.note, "at": at}

    def result(self, job_id: str) -> bytes:
        """Answer GET /jobs/<id>/result: the bytes that a `result_url` stands for."""
        job, _, event, _ = self._journal.detail(job_id)
        if event is None or job.outcome is not model.Outcome.SUCCEEDED:
            raise errors.MoveError(
                job_id, state=job.outcome or job.state, wanted="read as a result"
            )
        bottle.response.content_type = "application/json"
        if event.result is not None:
            return event.result.encode()
        return json.dumps(json.loads(event.body)["data"]["result"]).encode()

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Answer POST /jobs/<id>/cancel."""
        self._runner.cancel(job_id)
        return self._summary(self._journal.job(job_id))

    def resend(self, job_id: str) -> dict[str, Any]:
        """Answer POST /jobs/<id>/resend."""
        self._runner.resend(job_id)
        return self._summary(self._journal.job(job_id))

    def received(self) -> dict[str, Any]:
        """Answer GET /postprocessed."""
        return self._receiver.listing(limit=_limit())

    def livez(self) -> dict[str, str]:
        """Answer GET /livez: the process answers."""
        return {"status": "alive"}

    def readyz(self) -> dict[str, str]:
        """Answer GET /readyz: a job would be accepted now, and its analysis could run."""
        if reason := self._runner.refusal() or self._runner.standstill():
            raise reason
        return {"status": "ready"}

    def stats(self) -> dict[str, Any]:
        """Answer GET /stats: the last hour, minute by minute, for the page."""
        return {"minutes": self._metrics.hour()}

    def metrics(self) -> bytes:
        """Answer GET /metrics, in Prometheus' text format."""
        bottle.response.content_type = metrics.CONTENT_TYPE
        return self._metrics.text()

    def openapi(self) -> bytes:
        """Answer GET /openapi.json: the description of these routes."""
        bottle.response.content_type = "application/json"
        return OPENAPI_PATH.read_bytes()


class Service:
    """Everything wired together, from the start to the stop."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._happened: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._executor = _executor(config)
        self._metrics = Metrics()
        self._journal = Journal(
            config.journal_path,
            on_lost=lambda: self._happened.put(EXIT_LOST),
            on_settled=self._metrics.settled,
        )
        self._metrics.watch(self._journal, lambda: self.runner.outlived)

    def start(self) -> None:
        """Open the journal, take up what is unfinished, and begin to answer.

        Raises:
            ConfigError: The journal, the address or the analysis cannot be used.
            JournalError: What is unfinished cannot be taken up.
        """
        settings = self._config
        self._executor.start()
        self._journal.open()
        max_body_bytes = max(settings.max_body_bytes, settings.postback_max_bytes + ENVELOPE_BYTES)
        self._server = Server(host=settings.host, port=settings.port, max_body_bytes=max_body_bytes)
        self.base_url = settings.public_url or _own_url(settings.host, self._server.port)
        self.postback_url = (
            settings.postback_url or _own_url(settings.host, self._server.port) + "/postprocessed"
        )
        self._sender = self._make_sender()
        self.runner = self._make_runner()
        receiver = Receiver(
            self._journal,
            secrets=settings.postback_secret,
            max_body_bytes=max_body_bytes,
            show=_print_to_terminal,
        )
        api = Api(
            config=settings,
            journal=self._journal,
            runner=self.runner,
            receiver=receiver,
            metrics=self._metrics,
            base_url=self.base_url,
        )
        self.runner.start()
        watched = logs.Watched(api.application(), self._metrics.answered)

        def on_answered() -> None:
            self.runner.start_accepted()
            watched.tell()

        self._server.start(watched, settle=self._journal.settle, on_answered=on_answered)

    def check(self) -> None:
        """Try what can be tried without the journal and the address.

        Raises:
            ConfigError: The analysis cannot be run.
        """
        self._executor.start()
        self._executor.close()

    def catch_signals(self) -> None:
        """Let a signal stop the service in order, also one that comes while it starts."""
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wants it
                signal.signal(number, self._on_signal)
        signal.signal(signal.SIGUSR1, lambda number, _: self._happened.put(number))

    def run(self) -> int:
        """Wait for a signal, then stop in order; return the exit code. SIGUSR1 backs up."""
        while (happened := self._wait()) == signal.SIGUSR1:
            self._back_up()
        if happened == EXIT_LOST:
            return EXIT_LOST
        log.info("drain begun", extra={"seconds": self._config.drain_seconds})
        try:
            return EXIT_WAITING if self.stop() else 0
        except errors.JournalError:  # logged where it was seen; the next start reads the disk
            return EXIT_LOST

    def stop(self) -> int:
        """Drain and close; return how many jobs wait for the next start."""
        drained = self.runner.drain(self._config.drain_seconds)
        self._executor.close()
        self._server.stop()
        self._sender.close()
        self._journal.close()
        log.info(
            "drain ended", extra={"finished": drained.finished, "will_resume": drained.waiting}
        )
        return drained.waiting

    def _wait(self) -> int:
        # Not one long wait: a signal that comes just before it, or reaches another thread, is seen
        # only when this thread runs on (measured: 4 of 40 right after a request).
        while True:
            with contextlib.suppress(queue.Empty):
                return self._happened.get(timeout=WAIT_SECONDS)

    def _back_up(self) -> None:
        # By a signal, not by a route: whoever may send jobs need not fill the disk.
        try:
            copy = self._journal.backup()
        except errors.JournalError as exc:
            log.error("journal not backed up", extra={"error": str(exc)})  # noqa: TRY400 - expected
        else:
            log.info("journal backed up", extra={"path": copy, "bytes": copy.stat().st_size})

    def _on_signal(self, number: int, _: Any) -> None:
        # The second one ends at once: what is in the journal is taken up by the next start.
        for again in STOP_SIGNALS:
            if signal.getsignal(again) is not signal.SIG_IGN:  # as nohup wants it
                signal.signal(again, lambda number, _: os._exit(128 + number))
        self._happened.put(number)

    def _make_sender(self) -> postback.Sender:
        settings = self._config
        return postback.Sender(
            url=self.postback_url,
            policy=settings.postback_allow,
            secrets=settings.postback_secret,
            headers=settings.postback_headers,
            timeout_seconds=settings.postback_timeout_seconds,
            schedule=settings.postback_schedule_seconds,
        )

    def _make_runner(self) -> Runner:
        settings = self._config
        return Runner(
            journal=self._journal,
            executor=self._executor,
            postback=self._sender,
            limits=Limits(
                max_running=_places(settings),
                max_pending=settings.max_pending,
                job_timeout_seconds=settings.job_timeout_seconds,
                retention_seconds=settings.retention_seconds,
                max_event_bytes=settings.postback_max_bytes,
            ),
            result_url=lambda job_id: f"{self.base_url}/jobs/{job_id}/result",
            observer=self._metrics,
        )


def main(arguments: Sequence[str]) -> NoReturn:
    """Start the service, or do what the one argument says."""
    if list(arguments) in (["--help"], ["-h"]):
        _print_help()
        sys.exit(0)
    if list(arguments) not in ([], ["--check"]):
        print(f"Unknown arguments: {' '.join(arguments)}; try --help.", file=sys.stderr)
        sys.exit(EXIT_REFUSED)
    try:
        settings = config.load()
        logs.configure(settings.log_level, settings.log_format)
        service = Service(settings)
        if arguments:
            service.check()
            print("The settings are fine.")
            sys.exit(0)
        service.catch_signals()
        service.start()
    except (errors.ConfigError, errors.JournalError) as exc:
        logging.shutdown()  # what was logged stands above the reason
        print(exc, file=sys.stderr)
        sys.exit(EXIT_REFUSED)
    _greet(service, settings)
    code = service.run()
    logging.shutdown()
    os._exit(code)  # daemon threads may hold on to an analysis: nobody waits for them


def _executor(settings: Config) -> Executor:
    load, name = processing.load, settings.analysis
    if settings.executor == "process":
        return ProcessExecutor(load, name, workers=_places(settings))
    if settings.executor == "dask":
        return DaskExecutor(
            load,
            name,
            scheduler_url=settings.dask_scheduler or "",
            upload_path=settings.dask_upload,
        )
    return ThreadExecutor(load(name))


def _places(settings: Config) -> int:
    """Return how many analyses may run at once."""
    if settings.executor == "process":
        return min(settings.workers or os.cpu_count() or 1, settings.max_running)
    return settings.max_running


def _new_job(payload: intake.Payload, policy: outbound.Policy) -> model.Job:
    receiver = ""
    if payload.postback_url is not None:
        policy.check(payload.postback_url)
        receiver = outbound.parts(payload.postback_url).origin
    return model.new_job(
        postback_url=payload.postback_url, receiver=receiver, forwarded=payload.forwarded
    )


def _summary(job: model.Job) -> dict[str, Any]:
    def text(name: str) -> str | None:
        instant = getattr(job, name)
        return instant and model.text_of(instant)

    return {
        "id": job.id,
        "state": job.state,
        "outcome": job.outcome,
        "postback_url": job.postback_url,
        "starts": job.starts,
        "attempts_made": job.attempts,
        **{
            name: text(name)
            for name in ("created_at", "started_at", "finished_at", "next_attempt_at", "ended_at")
        },
    }


def _limit() -> int:
    text = bottle.request.query.get("limit", str(PAGE))
    if not (re.fullmatch("[0-9]{1,4}", text) and 1 <= int(text) <= MAX_PAGE):
        raise errors.MalformedError(f"limit must be a whole number from 1 to {MAX_PAGE}.")
    return int(text)


def _own_url(host: str, port: int) -> str:
    """Return the URL under which this machine reaches the service."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - it is replaced
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _greet(service: Service, settings: Config) -> None:
    token = ' -H "Authorization: Bearer $API_TOKEN"' if settings.api_token else ""
    text = (
        f"Postback listens on {service.base_url}\n"
        f"Results are posted to {service.postback_url}\n"
        f"Try it: curl {service.base_url}/process{token} -H 'Content-Type: application/json' "
        """-d '{"data": [3, 1, 4, 1, 5, 9, 2, 6]}'"""
    )
    with contextlib.suppress(OSError):  # whoever started it may no longer listen
        print(text, flush=True)
    if settings.host in ("127.0.0.1", "::1", "localhost"):
        return
    if not settings.api_token:
        log.warning("anyone can send jobs: set API_TOKEN", extra={"host": settings.host})
    if not settings.postback_secret:
        log.warning("anyone can post results: set POSTBACK_SECRET", extra={"host": settings.host})


def _print_to_terminal(text: str) -> None:
    if sys.stdout.isatty():
        print(text, flush=True)


def _print_help() -> None:
    print(f"{__doc__}\nSettings, as environment variables:\n")
    for name, default, meaning in config.table():
        print(f"  {name:<20} {default:<26} {meaning}")


if __name__ == "__main__":
    main(sys.argv[1:])
