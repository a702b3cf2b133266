"""What each executor costs, and how fast the 200 is while four analyses keep the processor busy.

`./run bench executors`, or `executors.py [seconds]`, prints two Markdown tables. Everything runs on
loopback, in about a minute and a half.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PEERS = ROOT / "bench" / ".venv" / "bin" / "python"
sys.path.insert(0, str(ROOT))

import processing  # noqa: E402
from jobs.dask_executor import DaskExecutor  # noqa: E402
from jobs.executors import SWITCH_SECONDS, ProcessExecutor, ThreadExecutor  # noqa: E402
from web.demo import dask_cluster  # noqa: E402

#: Runs timed of each executor, after one that does not count.
RUNS = 1000

#: Seconds that requests are sent for, and how many a second.
SECONDS = float(sys.argv[1]) if sys.argv[1:] else 3.0
RATE = 100

#: Analyses that keep the processor busy meanwhile.
BUSY = 4

#: How long a thread keeps the interpreter, in seconds; 5 ms is what Python has by default.
INTERVALS = (0.005, 0.001, SWITCH_SECONDS, 0.00005)


def main() -> None:
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, one run.\n")
    print("| executor | start to first result | round trip p50 | p99 | memory of a worker |")
    print("| --- | --- | --- | --- | --- |")
    for name, measure in (("thread", threads), ("process", processes), ("dask", dask)):
        print(f"| `{name}` | {measure()} |", flush=True)
    print(f"\n| POST /process, {RATE} a second, {BUSY} CPU-bound analyses running | p50 | p99 |")
    print("| --- | --- | --- |")
    print(f"| nothing running, `thread` | {answers(postback('thread'), busy=0)} |", flush=True)
    for seconds in INTERVALS:
        figures = answers(postback("thread", switch_seconds=seconds))
        print(f"| `thread`, switch interval {seconds * 1000:g} ms | {figures} |", flush=True)
    print(f"| `process` | {answers(postback('process'))} |", flush=True)
    print(f"| FastAPI BackgroundTasks | {answers(fastapi())} |", flush=True)


# The first table


def threads() -> str:
    analyze = processing.load("bench.analyses:echo")
    before = sys.getswitchinterval()
    try:
        return cost(lambda: ThreadExecutor(analyze), lambda _: "none")
    finally:
        sys.setswitchinterval(before)


def processes() -> str:
    return cost(
        lambda: ProcessExecutor(processing.load, "bench.analyses:echo", workers=1),
        lambda executor: mebibytes(next(iter(executor._alive))._process.pid),
    )


def dask() -> str:
    upload = ROOT / "bench" / "analyses.py"
    with dask_cluster() as (url, worker):
        return cost(
            lambda: DaskExecutor(
                processing.load, "analyses:echo", scheduler_url=url, upload_path=upload
            ),
            lambda _: mebibytes(worker.pid),
            runs=RUNS // 5,
        )


def cost(make: Callable[[], Any], memory: Callable[[Any], str], *, runs: int = RUNS) -> str:
    begun = time.perf_counter()
    executor = make()
    executor.start()
    once(executor)
    start_ms = (time.perf_counter() - begun) * 1000
    times = sorted(once(executor) for _ in range(runs))
    text = memory(executor)
    executor.close()
    p50, p99 = times[runs // 2], times[runs * 99 // 100]
    return f"{start_ms:.0f} ms | {p50:.2g} ms | {p99:.2g} ms | {text}"


def once(executor: Any) -> float:
    begun = time.perf_counter()
    ending = executor.run("0" * 32, b'{"data": [1, 2, 3]}', lambda _: None)
    assert ending.result == "[1, 2, 3]", ending
    return (time.perf_counter() - begun) * 1000


def mebibytes(pid: int) -> str:
    status = Path(f"/proc/{pid}/status").read_text()
    return f"{int(status.partition('VmRSS:')[2].split()[0]) / 1024:.0f} MiB"


# The second table


def answers(server: AbstractContextManager[int], *, busy: int = BUSY) -> str:
    with server as port:
        for _ in range(busy):
            post(port, SECONDS * 10)
        time.sleep(0.5)
        connection = HTTPConnection("127.0.0.1", port)
        times = sorted(paced(connection))
        connection.close()
    return f"{statistics.median(times):.1f} ms | {times[len(times) * 99 // 100]:.1f} ms"


def paced(connection: HTTPConnection) -> Iterator[float]:
    """Yield the milliseconds of each answer to one caller, who asks at a steady rate, or slower."""
    begun = time.perf_counter()
    for number in range(int(SECONDS * RATE)):
        due = begun + number / RATE
        time.sleep(max(0.0, due - time.perf_counter()))
        asked = time.perf_counter()
        connection.request(
            "POST", "/process", b'{"data": 0.00001}', {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200, answer.status
        yield (time.perf_counter() - asked) * 1000


def post(port: int, seconds: float) -> None:
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    body = json.dumps({"data": seconds}).encode()
    connection.request("POST", "/process", body, {"Content-Type": "application/json"})
    assert connection.getresponse().status == 200
    connection.close()


@contextmanager
def postback(executor: str, *, switch_seconds: float = SWITCH_SECONDS) -> Iterator[int]:
    """The service; what is sent beyond the busy analyses waits in its journal."""
    code = (
        "import app, jobs.executors as executors; "
        f"executors.SWITCH_SECONDS = {switch_seconds}; app.main([])"
    )
    with tempfile.TemporaryDirectory() as directory:
        env = {
            "EXECUTOR": executor,
            "WORKERS": str(BUSY),
            "MAX_RUNNING": str(BUSY),
            "ANALYSIS": "bench.analyses:spin",
            "JOURNAL": f"{directory}/journal.db",
            "LOG_LEVEL": "warning",
        }
        with serving([sys.executable, "-c", code], env) as port:
            yield port


@contextmanager
def fastapi() -> Iterator[int]:
    command = [str(PEERS), "-m", "uvicorn", "bench.fastapi_app:app", "--log-level", "warning"]
    with serving(command, {}, "--port") as port:
        yield port


@contextmanager
def serving(command: list[str], env: dict[str, str], *option: str) -> Iterator[int]:
    port = free_port()
    arguments = [*option, str(port)] if option else []
    child = subprocess.Popen(
        [*command, *arguments],
        cwd=ROOT,
        env=os.environ | env | {"PORT": str(port)},
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_until_it_listens(port)
        yield port
    finally:
        child.kill()
        child.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


def wait_until_it_listens(port: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            time.sleep(0.02)
        else:
            return
    sys.exit(f"nothing listens on port {port}")


if __name__ == "__main__":
    main()
