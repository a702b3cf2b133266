"""The systems that are measured: how each is started, and what is running of it.

Every system gets the same work: `POST /process` with `{"data": …}`, `bench.analyses` as analysis,
and the URL to post the result to. What is chosen for the peers, in this one place:

* FastAPI runs on one uvicorn process with uvloop and httptools. Its routes are `async def`,
  although they write to a queue: as `def`, each in a thread, they were up to a fifth slower.
* Every log is at its default level and goes to a file: that of Postback, uvicorn's access log, the
  workers' own.
* Workers are laid out as a load's `Shape` says. For the echo that is the default of Dramatiq and
  of Celery, which was also the fastest on 2 cores; Huey's single thread is made eight.
* Results are posted over a `requests.Session` that each thread keeps; only the bare threads use
  `requests.post`, as the approach is named for.
* Redis runs as it does without a configuration file: a snapshot now and then, no append-only file.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bench import proc

ROOT = Path(__file__).parent.parent

#: On the disk of the checkout: /tmp may be memory.
DATA = ROOT / "bench" / ".data"

PEERS_PYTHON = ROOT / "bench" / ".venv" / "bin" / "python"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is analyzed, and how the workers are laid out for it."""

    analysis: str
    huey: str
    dramatiq: str
    celery: str
    executor: str = "thread"


ECHO = Shape(
    analysis="bench.analyses:echo",
    huey="-k thread -w 8",
    dramatiq="--processes 2 --threads 8",
    celery="-P prefork -c 2",
)

#: An analysis that waits: 32 at once, as many as Postback runs unless told otherwise.
NAP = Shape(
    analysis="bench.analyses:nap",
    huey="-k thread -w 32",
    dramatiq="--processes 1 --threads 32",
    celery="-P threads -c 32",
)

#: An analysis that computes: a process for each core.
BURN = Shape(
    analysis="bench.analyses:burn",
    huey="-k process -w 2",
    dramatiq="--processes 2 --threads 1",
    celery="-P prefork -c 2",
    executor="process",
)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one start of a system has its files and its ports."""

    directory: Path
    port: int
    redis_port: int
    shape: Shape
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class System:
    """One row of the tables.

    Attributes:
        commands: Front first; all but Redis, which `redis` asks for.
        durable: Whether a job is on disk before the answer.
        delivers: False for the route that does nothing.
        held_key: The hash where Redis keeps jobs of workers that are gone; the note tells how long.
    """

    name: str
    commands: Callable[[Place], list[list[str]]]
    durable: str
    redis: bool = False
    delivers: bool = True
    service: bool = False
    held_key: str = ""
    note: str = ""


def _python(*arguments: object) -> list[str]:
    return [str(PEERS_PYTHON), *map(str, arguments)]


def _uvicorn(module: str, at: Place) -> list[str]:
    return _python("-m", "uvicorn", f"bench.peers.{module}:app", "--port", at.port)


def _huey(at: Place) -> list[list[str]]:
    consumer = PEERS_PYTHON.with_name("huey_consumer")
    options = at.shape.huey.split()
    return [_uvicorn("on_huey", at), _python(consumer, "bench.peers.on_huey.huey", *options)]


def _dramatiq(at: Place) -> list[list[str]]:
    options = at.shape.dramatiq.split()
    worker = _python("-m", "dramatiq", "bench.peers.on_dramatiq", *options)
    return [_uvicorn("on_dramatiq", at), worker]


def _celery(at: Place) -> list[list[str]]:
    options = at.shape.celery.split()
    worker = _python("-m", "celery", "-A", "bench.peers.on_celery:tasks", "worker", *options)
    return [_uvicorn("on_celery", at), worker]


POSTBACK = System(
    name="Postback",
    commands=lambda _: [[sys.executable, "app.py"]],
    durable="yes",
    service=True,
)

BARE = System(
    name="bare route (Bottle on waitress, does nothing)",
    commands=lambda at: [_python("-m", "bench.peers.bare", at.port)],
    durable="no",
    delivers=False,
)

PEERS = (
    System(
        name="bare thread, Bottle's server",
        commands=lambda at: [_python("-m", "bench.peers.seed", "wsgiref", at.port)],
        durable="no",
    ),
    System(
        name="bare thread, waitress",
        commands=lambda at: [_python("-m", "bench.peers.seed", "waitress", at.port)],
        durable="no",
    ),
    System(
        name="FastAPI BackgroundTasks",
        commands=lambda at: [_uvicorn("background", at)],
        durable="no",
    ),
    System(name="Huey on SQLite", commands=_huey, durable="yes"),
    System(
        name="Dramatiq + Redis",
        commands=_dramatiq,
        durable="no",
        redis=True,
        held_key="dramatiq:default.msgs",
        note="a worker counts as gone after a minute; one command in a thousand then looks for it",
    ),
    System(
        name="Celery + Redis",
        commands=_celery,
        durable="no",
        redis=True,
        held_key="unacked",
        note="given out again after the visibility time-out, by default an hour",
    ),
)


class Running:
    """A system that runs, from `start` to `stop`; it can be killed and started again."""

    def __init__(self, system: System, place: Place, receiver_url: str) -> None:
        self.system = system
        self.place = place
        self._receiver_url = receiver_url
        self._children: list[subprocess.Popen[bytes]] = []
        self._redis: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self.system.redis and self._redis is None:
            options = ["--port", str(self.place.redis_port), "--dir", str(self.place.directory)]
            self._redis = self._spawn(["redis-server", "--bind", "127.0.0.1", *options])
            wait_until_it_listens(self.place.redis_port)
        self._children = [self._spawn(one) for one in self.system.commands(self.place)]
        wait_until_it_listens(self.place.port)

    def kill(self) -> None:
        """End all at once as kill -9 does; Redis goes on."""
        for pid in proc.members(self._sessions(redis=False)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for child in self._children:
            child.wait()
        self._children = []

    def stop(self) -> None:
        self.kill()
        if self._redis is not None:
            self._redis.kill()
            self._redis.wait()

    def usage(self) -> proc.Usage:
        return proc.usage(self._sessions())

    def log(self) -> str:
        return (self.place.directory / "log").read_text(errors="replace")

    @property
    def pid(self) -> int:
        return self._children[0].pid

    def _sessions(self, *, redis: bool = True) -> set[int]:
        sessions = {child.pid for child in self._children}
        return sessions | {self._redis.pid} if redis and self._redis else sessions

    def _spawn(self, command: list[str]) -> subprocess.Popen[bytes]:
        directory = self.place.directory
        env = {
            "ANALYSIS": self.place.shape.analysis,
            "POSTBACK_URL": self._receiver_url,
            "PYTHONPATH": str(ROOT),
        }
        if self.system.service:
            env |= {"PORT": str(self.place.port), "JOURNAL": f"{directory}/journal.db"}
            env |= {
                "MAX_PENDING": "1000000",
                "EXECUTOR": self.place.shape.executor,
                **self.place.settings,
            }
        else:
            env["HUEY_FILE"] = f"{directory}/huey.db"
            env["REDIS_URL"] = f"redis://127.0.0.1:{self.place.redis_port}/0"
        with (directory / "log").open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=ROOT,
                env=_environment() | env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


@contextlib.contextmanager
def running(
    system: System, shape: Shape, receiver_url: str, *, settings: Mapping[str, str] | None = None
) -> Iterator[Running]:
    """Start a system on free ports and an empty directory, and end it with all it started."""
    DATA.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=DATA, ignore_cleanup_errors=True) as directory:
        place = Place(
            directory=Path(directory),
            port=free_port(),
            redis_port=free_port(),
            shape=shape,
            settings=settings or {},
        )
        one = Running(system, place, receiver_url)
        try:
            one.start()
            yield one
        finally:
            one.stop()


def missing(system: System) -> str:
    """Return why a system cannot be measured here; "" when it can."""
    if system.redis and not shutil.which("redis-server"):
        return f"{system.name} is left out: install redis-server (Debian's package of that name)"
    return ""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


def wait_until_it_listens(port: int, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            time.sleep(0.005)
        else:
            return
    raise TimeoutError(f"nothing listens on port {port} after {seconds} s")


def _environment() -> dict[str, str]:
    """What is inherited: nothing that sets the service."""
    kept = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TZ")
    return {name: os.environ[name] for name in kept if name in os.environ}
