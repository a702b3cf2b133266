"""Small analyses, to be named as ANALYSIS=tests.analyses:name, or in the data for `act`."""

import ctypes
import inspect
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

#: How long anything waits here: a test that forgot to open a gate fails, it does not hang.
PATIENCE_SECONDS = 20


def act(data: Any, job: Any) -> Any:
    """Call the function that the data names, as {"call": name, "with": data}; echo other data."""
    if not (isinstance(data, dict) and "call" in data):
        return data
    function = globals()[data["call"]]
    takes_job = "job" in inspect.signature(function).parameters
    return function(data["with"], job) if takes_job else function(data["with"])


def echo(data: Any) -> Any:
    return data


def wait(data: str, job: Any) -> str:
    """Leave a mark beside a file, and wait until the file is there."""
    note_down(f"{data}.{job.id}", "")
    wait_for_file(data)
    return "waited"


def sleep(data: float) -> float:
    """Take as many seconds as the data says."""
    threading.Event().wait(data)
    return data


def compute(data: float) -> int:
    """Keep the interpreter busy for as many seconds."""
    over = threading.Event()
    threading.Timer(data, over.set).start()
    rounds = 0
    while not over.is_set():
        rounds += sum(range(1000)) > 0
    return rounds


def pid(data: Any) -> int:
    return os.getpid()


# Ways to fail


def fail(data: Any) -> Any:
    raise ValueError(f"cannot analyze {data}")


def fail_at_first(data: int, job: Any) -> int:
    """Raise in as many runs as the data says."""
    if job.start <= data:
        raise ValueError(f"run {job.start}")
    return int(job.start)


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
    return {"rows": [{1, 2, 3}]}


def circular(data: Any) -> Any:
    ring: list[Any] = []
    ring.append(ring)
    return ring


def large(data: int) -> str:
    """Return as many characters as the data says."""
    return "x" * data


def change(data: list[Any]) -> str:
    """Empty what it is given."""
    data.clear()
    return "emptied"


# Ways to harm a process


def end_process(data: Any) -> Any:
    """End the process in the way that the data names; anything else is echoed."""
    ways = {
        "segfault": lambda: ctypes.string_at(0),
        "exit 0": lambda: os._exit(0),
        "exit 3": lambda: os._exit(3),
        "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    }
    return ways.get(data, lambda: data)()


def fork(data: str) -> str:
    """Fork; the child returns, raises, leaves, or fails to become another program."""
    if os.fork():
        return data
    if data == "raise":
        raise ValueError("in the child")
    if data == "exit":
        sys.exit(0)
    if data == "exec":
        os.execvp("no-such-tool-anywhere", ["no-such-tool-anywhere"])
    return data


def hang(data: str, job: Any) -> None:
    """Leave the process id beside a file, and never return."""
    note_down(f"{data}.{job.id}", str(os.getpid()))
    while True:
        threading.Event().wait(60)


def start_child(data: str, job: Any) -> None:
    """Start a process, leave its id beside a file, and wait for the file."""
    child = subprocess.Popen(["sleep", str(PATIENCE_SECONDS)])
    note_down(f"{data}.{job.id}", str(child.pid))
    wait_for_file(data)


# The job


def describe(data: Any, job: Any) -> dict[str, Any]:
    """Return all that the job says about itself."""
    return {"id": job.id, "start": job.start, "metadata": job.metadata, "kept": job.kept}


def report(data: list[Any], job: Any) -> None:
    """Report progress, and wait for a file."""
    fraction, note, path = data
    job.progress(fraction, note)
    wait_for_file(path)


def keep(data: list[Any], job: Any) -> Any:
    """Return what was kept; or keep a value, leave a mark beside a file, and do what it says."""
    value, path, then = data
    if job.kept is not None:
        return [job.start, job.kept]
    job.progress(0.5, keep=value)
    note_down(f"{path}.{job.id}", "")
    return act(then, job)


def count(data: list[Any], job: Any) -> list[int]:
    """Take steps, each noted down in a file; go on behind those that were kept."""
    steps, path = data
    done = job.kept or []
    for step in range(len(done), steps):
        with Path(path).open("a", encoding="ascii") as file:
            file.write(f"{step}\n")
        threading.Event().wait(0.02)
        done.append(step)
        job.progress(len(done) / steps, keep=done)
    return done


# Helpers


def note_down(path: str, text: str) -> None:
    """Write a file that is there as a whole, or not at all."""
    new = Path(path).with_name(f"new-{Path(path).name}")
    new.write_text(text, encoding="ascii")
    new.rename(path)


def wait_for_file(path: str) -> None:
    for _ in range(PATIENCE_SECONDS * 100):
        if Path(path).exists():
            return
        threading.Event().wait(0.01)
    raise TimeoutError(path)
