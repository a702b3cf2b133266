"""The systems that are measured: how each is started, and what is running of it.

Every system gets the same work: `POST /process` with `{"data": ...}`, a function of `analyses.py`,
and the URL to post the result to. What is chosen for the peers, in this one place:

* FastAPI runs on one uvicorn process with uvloop and httptools.
* Every log is at its default level and goes to a file: that of Postback, uvicorn's access log, the
  workers' own.
* Workers are laid out as a load's `Shape` says. For the echo that is the default of Dramatiq and
  of Celery, which was also the fastest on 2 cores; Huey's single thread is made eight.
* Results are posted over a `requests.Session` that each thread keeps. Only the bare threads use
  `requests.post`, as the approach is named for.
* Redis runs as it does without a configuration file: a snapshot now and then, no append-only file.

Postback has its default settings, but for MAX_PENDING: it must not refuse what its peers accept.
"""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path

from bench import proc

Settings = Mapping[str, str]

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent

#: On the disk of the checkout, because /tmp may be memory.
DATA = FOLDER / ".data"

PEERS_PYTHON = FOLDER / ".venv" / "bin" / "python"

#: Seconds that a system may take to start.
PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class Shape:
    """What is analyzed, how the workers are laid out for it, and settings of the service."""

    analysis: str
    huey: str = "-k thread -w 8"
    dramatiq: str = "--processes 2 --threads 8"
    celery: str = "-P prefork -c 2"
    settings: Settings = field(default_factory=dict, hash=False)
    receivers: int = 0
    dead: int = 0


ECHO = Shape("echo")
SPIN = Shape("spin")
NAP_LONG = Shape("nap_long")

#: An analysis that waits: 32 at once, as many as Postback runs by default.
NAP = Shape("nap", "-k thread -w 32", "--processes 1 --threads 32", "-P threads -c 32")

#: An analysis that computes: a process for each of two cores.
BURN = Shape(
    "burn", "-k process -w 2", "--processes 2 --threads 1", settings={"EXECUTOR": "process"}
)

#: Large results, which Postback is to post itself rather than a link to them.
GROW = Shape("grow", settings={"POSTBACK_MAX_BYTES": "16MiB"})

MANY_RECEIVERS = Shape("echo", receivers=150, dead=50)


@dataclass(frozen=True)
class System:
    """One row of the tables.

    Attributes:
        commands: Front first; all but Redis.
        peer: What `peers.py` is told to be; "" for the service.
        root: The checkout of the service.
        settings: Of the service, for all its starts.
        delivers: False for the route that does nothing.
        held_key: For those on Redis, where it keeps jobs of workers that are gone.
    """

    name: str
    commands: Callable[["Running"], list[list[str]]]
    peer: str = ""
    root: Path = ROOT
    settings: Settings = field(default_factory=dict)
    delivers: bool = True
    held_key: str = ""


def service(root: Path, settings: Settings) -> System:
    """Return the Postback of a checkout; another than this one is started by its own .venv."""
    python = sys.executable if root == ROOT else str(root / ".venv" / "bin" / "python")
    name = "Postback" if root == ROOT else f"Postback in {root}"
    return System(name, lambda _: [[python, "app.py"]], root=root, settings=settings)


def _python(*arguments: object) -> list[str]:
    return [str(PEERS_PYTHON), *map(str, arguments)]


def _bottle(server: str) -> Callable[["Running"], list[list[str]]]:
    return lambda at: [_python("-m", "peers", server, at.port)]


def _fastapi(*worker: object) -> Callable[["Running"], list[list[str]]]:
    """Return the commands of a front, and of a worker whose last argument is its layout."""

    def commands(at: "Running") -> list[list[str]]:
        front = _python("-m", "uvicorn", "peers:app", "--port", at.port)
        layout = getattr(at.shape, at.system.peer, "").split()
        return [front, _python(*worker, *layout)] if worker else [front]

    return commands


BARE = System("bare route, which does nothing", _bottle("waitress"), "bare", delivers=False)
BACKGROUND = System("FastAPI BackgroundTasks", _fastapi(), "background")
HUEY = _fastapi(PEERS_PYTHON.with_name("huey_consumer"), "peers.huey")
DRAMATIQ = _fastapi("-m", "dramatiq", "peers")
CELERY = _fastapi("-m", "celery", "-A", "peers:tasks", "worker")

PEERS = (
    System("bare thread, Bottle's server", _bottle("wsgiref"), "threads"),
    System("bare thread, waitress", _bottle("waitress"), "threads"),
    BACKGROUND,
    System("Huey on SQLite (durable)", HUEY, "huey"),
    System("Dramatiq + Redis", DRAMATIQ, "dramatiq", held_key="dramatiq:default.msgs"),
    System("Celery + Redis", CELERY, "celery", held_key="unacked"),
)


class Running:
    """A system that runs, from `start` to `stop`; it can be killed and started again.

    The first of the receivers' origins is that of POSTBACK_URL; the folder is for its files.
    """

    def __init__(
        self, system: System, shape: Shape, origins: list[str], settings: Settings, folder: Path
    ) -> None:
        self.system, self.shape, self.folder = system, shape, folder
        self.port, self.redis_port = free_port(), free_port()
        self._env = {"ANALYSIS": f"analyses:{shape.analysis}", "PYTHONPATH": str(FOLDER)}
        self._env["POSTBACK_URL"] = f"{origins[0]}/results"
        of_peer = {
            "PEER": system.peer,
            "REDIS_URL": f"redis://127.0.0.1:{self.redis_port}/0",
            "HUEY_FILE": f"{folder}/huey.db",
        }
        all_settings = {**shape.settings, **system.settings, **settings}
        of_service = {
            "PORT": str(self.port),
            "JOURNAL": f"{folder}/journal.db",
            "POSTBACK_ALLOW": " ".join(origins[1:]),
            "MAX_PENDING": "1000000",
            **all_settings,
        }
        self._env |= of_peer if system.peer else of_service
        self._children: list[subprocess.Popen[bytes]] = []
        self._redis: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        if self.system.held_key and not self._redis:
            options = ["--port", str(self.redis_port), "--dir", str(self.folder)]
            self._redis = [self._spawn(["redis-server", "--bind", "127.0.0.1", *options])]
            self.wait_for(port=self.redis_port)
        self._children = [self._spawn(one) for one in self.system.commands(self)]
        self.wait_for()

    def kill(self) -> None:
        """End all at once as kill -9 does; Redis goes on."""
        for pid in proc.below({child.pid for child in self._children}):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for child in self._children:
            child.wait()
        self._children = []

    def stop(self) -> None:
        self.kill()
        for child in self._redis:
            child.kill()
            child.wait()

    def usage(self) -> dict[str, float]:
        return proc.usage({child.pid for child in (*self._children, *self._redis)})

    def wait_for(self, path: str = "", *, port: int = 0) -> None:
        """Wait until somebody listens and, with a path, a GET of it is answered 200."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            if any(child.poll() is not None for child in self._children):
                break
            connection = HTTPConnection("127.0.0.1", port or self.port, timeout=PATIENCE_SECONDS)
            with contextlib.suppress(OSError), contextlib.closing(connection):
                connection.connect()
                if path:
                    connection.request("GET", path)
                if not path or connection.getresponse().status == 200:
                    return
            time.sleep(0.005)
        raise TimeoutError(f"{self.system.name} does not start: {self.log()}")

    def log(self) -> str:
        """Return the end of what it wrote."""
        return (self.folder / "log").read_text(errors="replace")[-2000:]

    def _spawn(self, command: list[str]) -> subprocess.Popen[bytes]:
        kept = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TZ")  # nothing that sets the service
        inherited = {name: os.environ[name] for name in kept if name in os.environ}
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=self.system.root,
                env=inherited | self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


@contextlib.contextmanager
def empty_folder() -> Iterator[Path]:
    DATA.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=DATA, ignore_cleanup_errors=True) as name:
        yield Path(name)


def free_port() -> int:
    """Return a port below those of outgoing connections, so that no caller connects to itself."""
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
