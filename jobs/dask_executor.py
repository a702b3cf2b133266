"""Runs the analysis on a Dask cluster: for those who outgrow one machine.

The cluster keeps everything in memory, so it may be lost at any time: the journal is what counts. A
job whose worker is lost is repeated by Dask; one whose scheduler is lost is submitted again, by the
job's own thread, as soon as there is a cluster. `distributed` is imported only here, and only when
this executor is chosen.
"""

import contextlib
import functools
import hashlib
import inspect
import logging
import secrets
import tempfile
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs import analysis, errors, model
from jobs.analysis import Progress, Report
from jobs.executors import RETRY_SECONDS, Load

#: Seconds that the scheduler has to answer a new connection, and to take leave of an old one.
CONNECT_SECONDS = 5.0
CLOSE_SECONDS = 1.0

#: Seconds between two looks at the connection.
LOOK_SECONDS = 0.5

log = logging.getLogger("postback")


class DaskExecutor:
    """Submits analyses to a Dask scheduler, and keeps a connection to it.

    Args:
        load: Is sent to the workers by name, together with the file that defines it.
        name: The analysis, which the workers load.
        scheduler_url: Such as `tcp://host:8786`; for `tls://` Dask's own configuration holds the
            certificates.
        upload_path: A .py, .zip or .egg file that every worker is given, for what is not installed
            there.
    """

    def __init__(
        self, load: Load, name: str, *, scheduler_url: str, upload_path: Path | None
    ) -> None:
        self._load = load
        self._name = name
        self._url = scheduler_url
        self._upload_path = upload_path
        self._topic = f"postback-{secrets.token_hex(8)}"
        self._closed = threading.Event()
        self._client: Any = None
        self._running: dict[str, _Run] = {}
        self._failure: str | None = f"The Dask scheduler at {scheduler_url} has not answered yet."
        self._logged: bool | None = None  # whether the last line told of a connection

    def start(self) -> None:
        """Begin to connect. A cluster that is away is waited for.

        Raises:
            ConfigError: `distributed` is not installed.
        """
        try:
            import distributed
        except ImportError as exc:
            text = "EXECUTOR='dask': it needs more: pip install -r requirements-dask.txt"
            raise errors.ConfigError([f"{text} ({exc})"]) from exc
        self._distributed = distributed
        _quieten()
        self._keeper = threading.Thread(target=self._keep_connected, name="dask", daemon=True)
        self._keeper.start()

    def run(self, job_id: str, body: bytes, report: Report) -> model.Ending:
        """Return how the analysis of a payload ends on the cluster."""
        run = self._running[job_id] = _Run(report)
        try:
            while client := self._wait_for_client(run):
                if ending := self._run_on(client, run, job_id, body):
                    return ending
            return model.canceled()  # it was stopped: nobody looks at this
        finally:
            del self._running[job_id]

    def stop(self, job_id: str) -> bool:
        """Give up a job: its thread is free at once; a worker that has begun it ends it in vain."""
        if run := self._running.get(job_id):
            run.stopped = True
            run.woken.set()
        return True

    def failure(self) -> str | None:
        """Return why no analysis can run now: the scheduler does not answer."""
        return self._failure

    def close(self) -> None:
        """Give up all jobs, and disconnect."""
        self._closed.set()
        for job_id in list(self._running):
            self.stop(job_id)
        self._keeper.join(CLOSE_SECONDS)

    # A job's thread

    def _wait_for_client(self, run: "_Run") -> Any:
        """Return the client as soon as it is connected; None once the job is stopped."""
        while not (run.stopped or self._closed.is_set()):
            client = self._client
            if client is not None and client.status == "running":
                return client
            run.wait()
        return None

    def _run_on(self, client: Any, run: "_Run", job_id: str, body: bytes) -> model.Ending | None:
        """Return how the analysis ends; None when the cluster was lost, or the job was stopped."""
        try:
            future = client.submit(
                analyze_on_worker,
                *(self._load, self._name, self._topic, job_id, body),
                key=f"postback-{job_id}-{secrets.token_hex(4)}",
                pure=False,
            )
            future.add_done_callback(lambda _: run.woken.set())
            while client.status == "running" and not (run.stopped or future.done()):
                run.wait()
            if client.status != "running":
                return None
            if run.stopped:
                future.cancel()
                return None
            ending: model.Ending = future.result()
            return ending
        except self._distributed.KilledWorker as exc:
            return model.crashed(f"The analysis ended its Dask workers: {exc}")
        except (self._distributed.CancelledError, OSError):
            self._closed.wait(LOOK_SECONDS)  # of the cluster: what the analysis raises is an ending
            return None
        except Exception as exc:  # noqa: BLE001 - of many kinds; what counts is what is left
            # Connected still: such as a worker that cannot read what it was sent.
            return model.failed(exc) if client.status == "running" else None

    def _hear(self, event: tuple[float, tuple[str, float, str]]) -> None:
        _, (job_id, fraction, note) = event
        if run := self._running.get(job_id):
            run.report(Progress(fraction=fraction, note=note, at=model.utc_now()))

    # The thread that keeps the connection

    def _keep_connected(self) -> None:
        # One loop for all clients: one that cannot connect leaves its own behind, with its thread.
        runner = self._distributed.utils.LoopRunner()
        runner.start()
        while not self._closed.is_set():
            try:
                client = self._connect(runner.loop)
            except Exception as exc:  # noqa: BLE001 - whatever its libraries raise, it is away
                self._tell(None, f"The Dask scheduler at {self._url} cannot be used: {exc}")
                self._closed.wait(RETRY_SECONDS)
                continue
            self._tell(client, None)
            while client.status == "running" and not self._closed.wait(LOOK_SECONDS):
                pass
            self._tell(None, f"The Dask scheduler at {self._url} was lost.")
            _close(client)
        runner.stop()

    def _connect(self, loop: Any) -> Any:
        """Return a client whose workers, also future ones, know the analysis."""
        client = self._distributed.Client(
            self._url, timeout=CONNECT_SECONDS, set_as_default=False, name="postback", loop=loop
        )
        try:
            self._upload(client)
            client.subscribe_topic(self._topic, self._hear)
        except BaseException:
            _close(client)
            raise
        # It must not connect again by itself: a new scheduler knows neither the files nor us.
        client._timeout = 0  # noqa: SLF001 - there is no other way
        return client

    def _tell(self, client: Any, failure: str | None) -> None:
        """Let all know of a change, and log it if it is one."""
        self._client, self._failure = client, failure
        for run in list(self._running.values()):
            run.woken.set()
        is_news = self._logged is not (failure is None) and not self._closed.is_set()
        self._logged = failure is None
        if is_news and failure:
            log.warning("cluster away", extra={"error": failure})
        elif is_news:
            log.info("cluster connected", extra={"scheduler": self._url})

    def _upload(self, client: Any) -> None:
        plugin = self._distributed.diagnostics.plugin
        with tempfile.TemporaryDirectory() as directory:
            bundle_path = _bundle(Path(directory), self._load)
            _register(client, plugin.SchedulerUploadFile, bundle_path)  # it reads what it hands on
            _register(client, plugin.UploadFile, bundle_path)
        if self._upload_path:
            _register(client, plugin.UploadFile, self._upload_path)


@dataclass(slots=True)
class _Run:
    """One job on its way through the cluster.

    Attributes:
        woken: There is something to look at: its ending, the loss of the cluster, or a stop.
        stopped: Nobody waits for its ending.
    """

    report: Report
    woken: threading.Event = field(default_factory=threading.Event)
    stopped: bool = False

    def wait(self) -> None:
        """Wait until something may have changed: look at it before, and again after."""
        self.woken.wait(LOOK_SECONDS)  # a result that was lost again tells nobody
        self.woken.clear()


def analyze_on_worker(  # pragma: no cover - on the workers runs the copy that was uploaded
    load: Load, name: str, topic: str, job_id: str, body: bytes
) -> model.Ending:
    """Run the analysis on a Dask worker; its progress goes to the service as events of a topic."""
    from distributed import get_worker

    worker = get_worker()

    def report(progress: Progress) -> None:
        worker.log_event(topic, (job_id, progress.fraction, progress.note))

    def analyze(data: Any, progress: Callable[..., None]) -> Any:
        return _loaded(load, name)(data, progress)

    return analysis.run(analyze, body, report)


@functools.cache
def _loaded(load: Load, name: str) -> analysis.Analyze:  # pragma: no cover - as above
    return analysis.with_progress(load(name))


def _bundle(directory: Path, load: Load) -> Path:
    """Return a zip file of the modules that a worker needs of ours, named by what is in it."""
    here = Path(__file__).parent
    sources = {f"{here.name}/{path.name}": path for path in sorted(here.glob("*.py"))}
    loader = Path(inspect.getfile(load))
    sources[loader.name] = loader
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources.values())).hexdigest()
    bundle_path = directory / f"postback-{digest[:12]}.zip"
    with zipfile.ZipFile(bundle_path, "w") as bundle:
        for name, path in sources.items():
            bundle.write(path, name)
    return bundle_path


def _register(client: Any, kind: Any, path: Path) -> None:
    """Give a file to the scheduler, or to its workers; one that is there stays as it is."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    name = f"postback-{path.name}-{digest[:12]}"
    upload = kind(str(path))
    upload.idempotent = True
    try:
        client.register_plugin(upload, name=name)
    except Exception:
        with contextlib.suppress(Exception):  # or the next try would find it there
            client.unregister_worker_plugin(name)
        raise


def _close(client: Any) -> None:
    with contextlib.suppress(Exception):  # it is lost anyway
        client.close(timeout=CLOSE_SECONDS)


def _quieten() -> None:
    """Leave the telling to the lines of our own log: one at each change."""
    for name in list(logging.root.manager.loggerDict):
        if name.partition(".")[0] in ("distributed", "tornado"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
