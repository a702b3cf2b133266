"""Small analyses, to be named as ANALYSIS=tests.analyses:name."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

#: How long anything waits here: a test that forgot to open a gate fails, it does not hang.
PATIENCE_SECONDS = 20


class Gate:
    """Holds analyses up until it is opened, and tells which have come to it."""

    def __init__(self) -> None:
        self.begun: list[Any] = []
        self.threads: list[threading.Thread] = []
        self._changed = threading.Condition()
        self._passes = 0

    def enter(self, data: Any) -> None:
        with self._changed:
            self.begun.append(data)
            self.threads.append(threading.current_thread())
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._passes, PATIENCE_SECONDS)
            self._passes -= 1

    def open(self, passes: int = 1_000_000) -> None:
        """Let so many analyses through."""
        with self._changed:
            self._passes += passes
            self._changed.notify_all()

    def wait_for(self, n: int) -> list[Any]:
        """Return what all analyses were given, as soon as `n` of them have begun."""
        with self._changed:
            came = self._changed.wait_for(lambda: len(self.begun) >= n, PATIENCE_SECONDS)
            assert came, f"{len(self.begun)} of {n} analyses began"
            return list(self.begun)


#: Replaced for each test by `gated`.
gate = Gate()


@contextlib.contextmanager
def gated():
    """Give the analyses a new gate, opened in the end whatever happens."""
    global gate  # noqa: PLW0603 - an analysis is named by its module, so the gate lies there too
    gate = Gate()
    try:
        yield gate
    finally:
        gate.open()


def echo(data: Any) -> Any:
    return data


def wait(data: Any) -> Any:
    """Wait at the gate, then echo."""
    gate.enter(data)
    return data


def sleep(data: float) -> float:
    """Take as many seconds as the data says."""
    threading.Event().wait(data)
    return data


def fail(data: Any) -> Any:
    raise ValueError(f"cannot analyze {data}")


def leave(data: Any) -> Any:
    """End the thread as a command line would its process."""
    sys.exit(f"left at {data}")


def interrupt(data: Any) -> Any:
    raise KeyboardInterrupt


def exhaust(data: Any) -> Any:
    raise MemoryError


def nan(data: Any) -> float:
    return float("nan")


def unserialisable(data: Any) -> Any:
    return {1, 2, 3}


def circular(data: Any) -> Any:
    ring: list[Any] = []
    ring.append(ring)
    return ring


def deep(data: Any) -> Any:
    """Return something nested 2,000 levels deep."""
    value: Any = 1
    for _ in range(2000):
        value = [value]
    return value


def large(data: int) -> str:
    """Return as many characters as the data says."""
    return "x" * data


def change(data: list[Any]) -> str:
    """Empty what it is given."""
    data.clear()
    return "emptied"


def end_process(data: Any) -> Any:
    """End the process in the way that the data names; anything else is echoed."""
    ways = {
        "segfault": lambda: ctypes.string_at(0),
        "exit 0": lambda: os._exit(0),
        "exit 3": lambda: os._exit(3),
        "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "segfault, a child lives": _leave_a_child,
    }
    return ways.get(data, lambda: data)()


def be_deaf(data: str) -> None:
    """Pass over every signal, write the ids of this process and of a child, and never return."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    child = subprocess.Popen(["sleep", str(PATIENCE_SECONDS)])
    note_down(data, f"{os.getpid()} {child.pid}")
    while True:
        pass


def pid(data: Any) -> int:
    return os.getpid()


def meet(data: dict[str, Any]) -> int:
    """Write this process's id down at `here`, wait until `there` exists, and return the id."""
    note_down(data["here"], str(os.getpid()))
    wait_for_file(data["there"])
    return os.getpid()


def report(data: list[Any], progress: Any) -> str:
    """Report each of the reports, then wait until the last path exists."""
    *reports, path = data
    for one in reports:
        progress(*one)
    wait_for_file(path)
    return "told"


def report_late(data: str, progress: Any) -> str:
    """Leave a thread that reports for this job while the next one runs."""
    if Path(data).exists():
        assert _reported.wait(PATIENCE_SECONDS)
        return "waited"

    def go_on() -> None:
        wait_for_file(data)
        progress(0.9, "late")
        _reported.set()

    threading.Thread(target=go_on).start()
    return "left"


_reported = threading.Event()


def note_down(path: str, text: str) -> None:
    """Write a file that is there as a whole, or not at all."""
    Path(f"{path}.new").write_text(text, encoding="ascii")
    Path(f"{path}.new").rename(path)


def wait_for_file(path: str) -> None:
    for _ in range(PATIENCE_SECONDS * 100):
        if Path(path).exists():
            return
        threading.Event().wait(0.01)
    raise TimeoutError(path)


def _leave_a_child() -> None:
    if os.fork() == 0:
        threading.Event().wait(PATIENCE_SECONDS)
        os._exit(0)
    ctypes.string_at(0)


def either(data: Any) -> Any:
    """Meet where the data names two paths, else end the process as it says."""
    return meet(data) if isinstance(data, dict) else end_process(data)


def start_child(data: str) -> int:
    """Start a child, and once the file `data`.go is there tell which signal could end it."""
    child = subprocess.Popen(["sleep", str(PATIENCE_SECONDS)])
    note_down(data, f"{os.getpid()} {child.pid}")
    wait_for_file(f"{data}.go")
    child.terminate()
    return child.wait()


def cores(data):
    """Return how many cores this thread may use."""
    return len(os.sched_getaffinity(0))
