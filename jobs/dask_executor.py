"""Runs the analysis on a Dask cluster, for those who outgrow one machine.

A cluster keeps everything in memory, so it may be lost at any time: the journal is what counts. A
job whose Dask worker is lost is run again by Dask, and one whose scheduler is lost is put back.
The service imports `distributed` only here, and only when this executor is chosen.
"""

import hashlib
import logging
import queue
import secrets
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jobs import errors, model, worker
from jobs.executor import PAUSE_SECONDS, Listener, ending_of

#: Seconds that the scheduler has to answer a new connection, and to take leave of an old one.
CONNECT_SECONDS, CLOSE_SECONDS = 5.0, 1.0

#: Seconds between two attempts to connect, and between two looks at a connection.
RETRY_SECONDS, LOOK_SECONDS = 1.0, 0.5

#: The file that holds the default analysis, which no Dask worker has.
DEFAULT_PATH = Path(__file__).parents[1] / "processing.py"

log = logging.getLogger("postback")


#: What the thread of a job is told: that its worker has begun (None and None), a fraction and a
#: note, or why there is nothing more to wait for: `ended`, `stopped` or `lost`.
_News = queue.SimpleQueue[tuple[Any, Any] | str]


class DaskExecutor:
    """Runs analyses on a Dask cluster. Its methods are those of `executor.WorkerExecutor`.

    Args:
        analysis: The user's function, as `package.module:function`.
        scheduler_url: Such as `tcp://host:8786`. For `tls://`, the certificates are in Dask's own
            configuration.
        upload_path: A .py, .zip or .egg file that every Dask worker is given.
        log_level: Is not used: Dask workers have a log of their own.
        on_change: Is called when `free` or `failure` may have changed.
    """

    def __init__(
        self,
        *,
        analysis: str,
        scheduler_url: str,
        upload_path: Path | None,
        log_level: str,  # noqa: ARG002 - as the other executor
        on_change: Callable[[], None],
    ) -> None:
        self._analysis = analysis
        self._url = scheduler_url
        self._upload_paths = [upload_path] if upload_path else []
        if analysis.startswith("processing:"):
            self._upload_paths.insert(0, DEFAULT_PATH)
        self._on_change = on_change
        self._topic = f"postback-{secrets.token_hex(8)}"
        self._closed = threading.Event()
        self._client: Any = None  # while it is connected
        self._failure: str | None = None
        self._keeper = threading.Thread(target=self._keep_connected, name="dask", daemon=True)
        self._news: dict[str, _News] = {}  # of each job, as long as its caller is inside of `run`

    def start(self) -> None:
        """Begin to connect. A cluster that is away does not hold up the start.

        Raises:
            ConfigError: `distributed` is not installed.
        """
        try:
            import distributed
        except ImportError as exc:
            text = "EXECUTOR='dask': install requirements-dask.txt, as ./run does with this setting"
            raise errors.ConfigError([f"{text} ({exc})"]) from exc
        self._distributed = distributed
        for name in ("distributed", "tornado"):  # our own log has one line for each change
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        self._keeper.start()

    def free(self) -> int:
        """Return how many jobs can be submitted: any number while the cluster is connected."""
        return sys.maxsize if self._client else 0

    def failure(self) -> str | None:
        """Return why no analysis can run now; None when one can."""
        return None if self._client else self._failure or f"{self._url} has not answered yet."

    @contextmanager
    def run(
        self, job: model.Job, body: bytes, *, kept: str | None, listener: Listener
    ) -> Iterator[model.Ending | model.Again | None]:
        """Run an analysis on the cluster, and yield how it ended; None when it was stopped."""
        facts = {"id": job.id, "start": max(job.starts, 1), "metadata": job.metadata, "kept": kept}
        news = self._news[job.id] = _News()
        try:
            yield self._run(news, facts, body, listener)
        finally:
            del self._news[job.id]

    def stop(self, job_id: str) -> None:
        """Give up a job. A Dask worker that has begun it goes on in vain."""
        if news := self._news.get(job_id):
            news.put("stopped")

    def drain(self) -> None:
        """Do nothing: no job is ever blamed for the end of the cluster."""

    def close(self) -> None:
        """Give up all jobs, and disconnect."""
        self._closed.set()
        for job_id in list(self._news):
            self.stop(job_id)
        if self._keeper.is_alive():
            self._keeper.join(CLOSE_SECONDS)

    # A job's thread

    def _run(
        self, news: _News, facts: dict[str, Any], body: bytes, listener: Listener
    ) -> model.Ending | model.Again | None:
        if (client := self._client) is None:
            return model.Again()
        key = f"postback-{facts['id']}-{secrets.token_hex(4)}"
        arguments = (self._analysis, self._topic, facts, body)
        try:
            future = client.submit(worker.analyze_on_dask, *arguments, key=key, pure=False)
            future.add_done_callback(lambda _: news.put("ended"))
            if _has_ended(news, listener):
                return ending_of(*future.result())
            future.cancel()  # it was stopped
            return None
        except self._distributed.KilledWorker as exc:
            return model.crashed(f"The analysis ended its Dask workers: {exc}")
        except Exception as exc:  # noqa: BLE001 - of many kinds; what counts is what is left
            lost = (self._distributed.CancelledError, OSError)
            if isinstance(exc, lost) or client.status != "running":
                return model.Again(pause_seconds=PAUSE_SECONDS)
            return model.without_result(model.Outcome.FAILED, type(exc).__name__, str(exc))

    def _hear(self, event: tuple[float, tuple[str, Any, Any]]) -> None:
        job_id, fraction, note = event[1]
        if news := self._news.get(job_id):
            news.put((fraction, note))

    # The thread that keeps the connection

    def _keep_connected(self) -> None:
        # One loop for all clients: one that cannot connect would leave its own behind.
        runner = self._distributed.utils.LoopRunner()
        runner.start()
        while not self._closed.is_set():
            try:
                with self._connection(runner.loop) as client:
                    self._tell(client, None)
                    while client.status == "running" and not self._closed.wait(LOOK_SECONDS):
                        pass
                    raise ConnectionError("its scheduler was lost")  # noqa: TRY301 - as below
            except Exception as exc:  # noqa: BLE001 - whatever its libraries raise, it is away
                text = f"The Dask cluster at {self._url} cannot be used: {str(exc).rstrip('.')}."
                if isinstance(exc, ModuleNotFoundError):
                    text += " Install it on each Dask worker."
                self._tell(None, text)
            self._closed.wait(RETRY_SECONDS)
        runner.stop()

    @contextmanager
    def _connection(self, loop: Any) -> Iterator[Any]:
        """Have a client whose workers, also later ones, have what the analysis needs."""
        client = self._distributed.Client(
            self._url, timeout=CONNECT_SECONDS, set_as_default=False, name="postback", loop=loop
        )
        try:
            self._upload(client)
            client.subscribe_topic(self._topic, self._hear)
            # It must not connect again by itself: a new scheduler knows neither the files nor us.
            client._timeout = 0  # noqa: SLF001 - there is no other way
            yield client
        finally:
            with suppress(Exception):  # it may be lost
                client.close(timeout=CLOSE_SECONDS)

    def _upload(self, client: Any) -> None:
        """Give our own module to all workers, under a name that no other version of it has."""
        text = Path(worker.__file__).read_bytes()
        name = f"postback_{hashlib.sha256(text).hexdigest()[:12]}"
        # Functions are sent as the name of their module and their own.
        sys.modules[name], worker.analyze_on_dask.__module__ = worker, name
        plugins = self._distributed.diagnostics.plugin
        with tempfile.TemporaryDirectory() as directory:
            ours = Path(directory, f"{name}.py")
            ours.write_bytes(text)
            uploads = [plugins.SchedulerUploadFile(str(ours))]  # it reads what it hands on
            uploads += [plugins.UploadFile(str(path)) for path in (ours, *self._upload_paths)]
            for one in uploads:  # one that was given before under this name is replaced
                client.register_plugin(one, name=f"postback-{Path(one.filename).name}")

    def _tell(self, client: Any, failure: str | None) -> None:
        """Note a change, and log it if it is one."""
        if client and not self._client:
            log.info("cluster connected", extra={"scheduler": self._url})
        elif failure and not self._failure and not self._closed.is_set():
            log.warning("cluster away", extra={"error": failure})
        self._client, self._failure = client, failure
        if failure:
            for news in list(self._news.values()):
                news.put("lost")
        self._on_change()


def _has_ended(news: _News, listener: Listener) -> bool:
    """Pass on what a job reports until it has ended; return whether it has, or was stopped.

    Raises:
        ConnectionError: The cluster was lost.
    """
    has_started = False
    while isinstance(one := news.get(), tuple):
        if one[0] is None:
            has_started = True
            listener.started()
        else:
            listener.progressed(*one)
    if one == "lost":
        raise ConnectionError
    if one == "ended" and not has_started:  # its reports may come later than its result
        listener.started()
    return one == "ended"
