"""Runs the analysis on a Dask cluster, for those who outgrow one machine.

A cluster keeps everything in memory, so it may be lost at any time: the journal is what counts. A
job whose Dask worker is lost is run again by Dask, and one whose scheduler is lost is put back.
The service imports `distributed` only here, and only when this executor is chosen.
"""

import hashlib
import logging
import secrets
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import errors, model, worker
from jobs.executor import PAUSE_SECONDS, Executor, Listener, ending_of

#: Seconds that the scheduler has to answer a new connection, and to take leave of an old one.
CONNECT_SECONDS, CLOSE_SECONDS = 5.0, 1.0

#: Seconds between two attempts to connect, and between two looks at a connection.
RETRY_SECONDS, LOOK_SECONDS = 1.0, 0.5

#: The file that holds the default analysis, which no Dask worker has.
DEFAULT_PATH = Path(__file__).parents[1] / "processing.py"

#: Of a job whose cluster was lost.
AGAIN = model.Again(pause_seconds=PAUSE_SECONDS)

log = logging.getLogger("postback")


@dataclass(slots=True)
class _Run:
    """One job on the cluster."""

    job_id: str
    listener: Listener
    future: Any
    has_started: bool = False


class DaskExecutor(Executor):
    """Runs analyses on a Dask cluster. Its methods are those of `executor.WorkerExecutor`.

    Args:
        analysis: The user's function, as `package.module:function`.
        scheduler_url: Such as `tcp://host:8786`. For `tls://`, the certificates are in Dask's own
            configuration.
        upload_path: A .py, .zip or .egg file that every Dask worker is given.
    """

    def __init__(self, *, analysis: str, scheduler_url: str, upload_path: Path | None) -> None:
        super().__init__()
        self._analysis = analysis
        self._url = scheduler_url
        self._upload_paths = [upload_path] if upload_path else []
        if analysis.startswith("processing:"):
            self._upload_paths.insert(0, DEFAULT_PATH)
        self._topic = f"postback-{secrets.token_hex(8)}"
        self._closed = threading.Event()
        self._client: Any = None  # while it is connected
        self._failure: str | None = None
        self._keeper = threading.Thread(target=self._keep_connected, name="dask", daemon=True)
        self._runs: dict[str, _Run] = {}  # the jobs that have not ended

    def start(self) -> None:
        """Begin to connect. A cluster that is away does not hold up the start.

        Raises:
            ConfigError: `distributed` is not installed.
        """
        try:
            import distributed
        except ImportError as exc:
            text = "EXECUTOR='dask': install requirements-dask.txt, as ./run does with this setting"
            raise errors.ConfigError(f"{text} ({exc})") from exc
        self._distributed = distributed
        # Our own log has one line for each change.
        for name in ("distributed", "distributed.client", "tornado"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        self._keeper.start()

    def free(self) -> int:
        """Return how many jobs can be submitted: any number while the cluster is connected."""
        return sys.maxsize if self._client else 0

    def failure(self) -> str | None:
        """Return why no analysis can run now; None when one can."""
        return self._failure or (None if self._client else f"{self._url} has not answered yet.")

    def run(self, job: model.Job, body: bytes, *, kept: str | None, listener: Listener) -> None:
        """Begin an analysis on the cluster."""
        facts = {"id": job.id, "start": max(job.starts, 1), "metadata": job.metadata, "kept": kept}
        arguments = (self._analysis, self._topic, facts, body)
        key = f"postback-{job.id}-{secrets.token_hex(4)}"
        if (client := self._client) is None:  # it was lost at this very moment
            listener.ended(AGAIN)
            return
        try:
            future = client.submit(worker.analyze_on_dask, *arguments, key=key, pure=False)
        except Exception as exc:  # noqa: BLE001 - of many kinds
            listener.ended(self._explain(exc, client))
            return
        run = self._runs[job.id] = _Run(job.id, listener, future)
        client.loop.add_callback(self._gather, run)

    def stop(self, job_id: str) -> None:
        """Give up a job. A Dask worker that has begun it goes on in vain."""
        if run := self._runs.pop(job_id, None):
            run.future.release()

    def drain(self) -> None:
        """Do nothing: no job is ever blamed for the end of the cluster."""

    def close(self) -> None:
        """Give up all jobs, and disconnect."""
        self._closed.set()
        for job_id in list(self._runs):
            self.stop(job_id)
        if self._keeper.is_alive():
            self._keeper.join(CLOSE_SECONDS)

    def _report(self, job_id: str, fraction: float | None, note: str) -> None:
        if run := self._runs.get(job_id):
            if fraction is None:
                run.has_started = True
                run.listener.started()
            else:
                run.listener.progressed(fraction, note)

    def _lose(self, keys: set[str]) -> None:
        """Stop the clock of the jobs whose Dask worker was lost. They begin again on another."""
        for run in [run for run in self._runs.values() if run.future.key in keys]:
            run.has_started = False
            run.listener.returned()

    def _finish(self, run: _Run, ending: model.Ending | model.Again) -> None:
        if self._runs.get(run.job_id) is not run:  # it was stopped
            return
        del self._runs[run.job_id]
        if isinstance(ending, model.Ending) and not run.has_started:  # its reports come later
            run.listener.started()
        run.listener.ended(ending)

    # In other threads

    def _hear(self, event: tuple[float, tuple[str, Any, Any]]) -> None:
        self._tell(self._report, *event[1])

    def _hear_of_workers(self, event: tuple[float, Any]) -> None:
        if isinstance(event[1], dict) and event[1].get("action") == "remove-worker":
            self._tell(self._lose, set(event[1]["processing-tasks"]))

    async def _gather(self, run: _Run) -> None:
        ending: model.Ending | model.Again
        try:
            ending = ending_of(*await run.future)
        except self._distributed.KilledWorker as exc:
            text = f"The analysis ended its Dask workers: {exc}"
            ending = model.without_result(model.Outcome.CRASHED, text)
        except Exception as exc:  # noqa: BLE001 - of many kinds; what counts is what is left
            ending = self._explain(exc, run.future.client)
        self._tell(self._finish, run, ending)

    def _explain(self, exc: Exception, client: Any) -> model.Ending | model.Again:
        """Return what follows from an error of Dask, whose kinds are many."""
        lost = (self._distributed.CancelledError, OSError)
        if isinstance(exc, lost) or client.status != "running":
            return AGAIN
        return model.without_result(model.Outcome.FAILED, str(exc), type(exc).__name__)

    # The thread that keeps the connection

    def _keep_connected(self) -> None:
        # One loop for all clients: one that cannot connect would leave its own behind.
        runner = self._distributed.utils.LoopRunner()
        runner.start()
        while not self._closed.is_set():
            client: Any = None
            try:
                options = {"timeout": CONNECT_SECONDS, "set_as_default": False, "name": "postback"}
                client = self._distributed.Client(self._url, loop=runner.loop, **options)
                self._upload(client)
                client.subscribe_topic(self._topic, self._hear)
                client.subscribe_topic("all", self._hear_of_workers)  # all that the scheduler tells
                # It must not connect again by itself: a new scheduler knows neither files nor us.
                client._timeout = 0  # noqa: SLF001 - there is no other way
                self._note(client, None)
                while client.status == "running" and not self._closed.wait(LOOK_SECONDS):
                    has_workers = client.scheduler_info().get("workers")
                    self._failure = None if has_workers else f"{self._url} has no worker."
                raise ConnectionError("its scheduler was lost")  # noqa: TRY301 - as below
            except Exception as exc:  # noqa: BLE001 - whatever its libraries raise, it is away
                text = f"The Dask cluster at {self._url} cannot be used: {str(exc).rstrip('.')}."
                if isinstance(exc, ModuleNotFoundError):
                    text += " Install it on each Dask worker."
                self._note(None, text)
            with suppress(Exception):  # there is none, or it may be lost
                client.close(timeout=CLOSE_SECONDS)
            self._closed.wait(RETRY_SECONDS)
        runner.stop()

    def _upload(self, client: Any) -> None:
        """Give our own module to all workers, under a name that no other version of it has."""
        text = Path(worker.__file__).read_bytes()
        name = f"postback_{hashlib.sha256(text).hexdigest()[:12]}"
        # Functions are sent as the name of their module and their own.
        sys.modules[name], worker.analyze_on_dask.__module__ = worker, name
        plugins = self._distributed.diagnostics.plugin
        # The scheduler has it as well, because it reads what it hands on.
        ours = [plugins.SchedulerUploadFile(worker.__file__), plugins.UploadFile(worker.__file__)]
        for one in ours:
            one.filename = f"{name}.py"
        for one in (*ours, *(plugins.UploadFile(str(path)) for path in self._upload_paths)):
            # One that was given before under this name is replaced.
            client.register_plugin(one, name=f"postback-{one.filename}")

    def _note(self, client: Any, failure: str | None) -> None:
        """Note a change, and log it if it is one."""
        if client and not self._client:
            log.info("cluster connected", extra={"scheduler": self._url})
        elif failure and (self._client or not self._failure) and not self._closed.is_set():
            log.warning("cluster away", extra={"error": failure})
        self._client, self._failure = client, failure
        if failure:
            for run in list(self._runs.values()):
                self._tell(self._finish, run, AGAIN)
        self.on_news()
