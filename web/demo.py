"""The demonstration: one payload goes round the whole loop, and each step is shown.

`python -m web.demo` starts the real service as a child with a free port and a journal of its own,
and meets it as any caller would: by the lines it prints and the routes it answers.
"""

import base64
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import Any
from urllib.error import HTTPError

ROOT = Path(__file__).parent.parent
SERVICE = (sys.executable, str(ROOT / "app.py"))
PAYLOAD_PATH = ROOT / "docs" / "examples" / "iris.json"

#: Seconds that each step may take: one answer, the postback, the stop.
STEP_SECONDS = 20.0

#: How much of a document is shown, in lines.
MAX_LINES = 30

#: Settings that would send the demo elsewhere; EXECUTOR is kept, so that each can be seen at work.
_OVERRIDDEN = re.compile(r"(POSTBACK|API_TOKEN|ANALYSIS|HOST|PORT|PUBLIC_URL|JOURNAL)(_|$)")

#: Everything here is on this machine, so a proxy from the environment has no part in it.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

#: A Dask cluster in one process.
_CLUSTER = """
import signal
from distributed import LocalCluster
options = {"n_workers": 1, "processes": False, "protocol": "tcp", "dashboard_address": None}
print(LocalCluster(host="127.0.0.1", **options).scheduler_address, flush=True)
signal.pause()
"""

Child = subprocess.Popen[str]


def main(service: Sequence[str] = SERVICE) -> None:
    """Show the loop; what goes wrong ends the process with one message and status 1."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit("The demo was interrupted."))
    with needed_cluster() as settings, running(service, settings) as url:
        print(f"Postback listens on {url}, with a journal of its own.")
        show_loop(url, PAYLOAD_PATH.read_bytes())
    print("The service has stopped.")


def show_loop(url: str, payload: bytes) -> None:
    """Send the payload, show the answer and the postback, and check that all is as it should."""
    sent_at, sent = datetime.now(UTC), time.perf_counter()
    status_code, answer = call(f"{url}/process", payload)
    answered = time.perf_counter()
    print(f"\nPOST /process with {len(payload)} bytes")
    print(f"{status_code} after {(answered - sent) * 1000:.1f} ms\n{rendition(answer)}")

    wait_for_delivery(f"{url}/jobs/{answer['id']}")
    _, listing = call(f"{url}/postprocessed")
    receipt = next(item for item in listing["received"] if item["webhook_id"] == answer["id"])
    waited = datetime.fromisoformat(receipt["received_at"]) - sent_at
    print(f"\nPOST /postprocessed, {waited.total_seconds() * 1000:.1f} ms after the first")
    print(f"signature: {receipt['signature']}\n{rendition(receipt['event'])}")
    if (receipt["signature"], receipt["event"]["type"]) != ("good", "job.succeeded"):
        sys.exit("Expected a good signature and job.succeeded.")
    print("\nThe job is delivered.")


def wait_for_delivery(job_url: str, seconds: float = STEP_SECONDS) -> None:
    """Look at the job until it is delivered; after too many seconds exit with a message."""
    deadline = time.monotonic() + seconds
    while (state := call(job_url)[1]["state"]) != "delivered":
        if time.monotonic() > deadline:
            sys.exit(f"The job is still {state} after {seconds:g} s.")
        Event().wait(0.01)


def call(url: str, payload: bytes | None = None) -> tuple[int, dict[str, Any]]:
    """Return the status code and the JSON that a GET is answered with, or with a payload a POST.

    Raises:
        SystemExit: The answer is an error or no JSON, or there is none.
    """
    request = urllib.request.Request(  # noqa: S310 - the address that the service printed
        url, data=payload, headers={"Content-Type": "application/json"}
    )
    try:
        with _opener.open(request, timeout=STEP_SECONDS) as answer:
            return answer.status, json.load(answer)
    except HTTPError as exc:
        sys.exit(f"{url} answered {exc.code}: {exc.read().decode(errors='replace')}")
    except (OSError, ValueError) as exc:
        sys.exit(f"{url} gave no answer: {exc}")


def rendition(document: dict[str, Any]) -> str:
    """Return the document as indented JSON, cut to MAX_LINES."""
    lines = json.dumps(document, indent=2, ensure_ascii=False).splitlines()
    if len(lines) > MAX_LINES:
        lines[MAX_LINES:] = [f"… and {len(lines) - MAX_LINES} more lines"]
    return "\n".join(lines)


@contextmanager
def running(service: Sequence[str], settings: Mapping[str, str]) -> Iterator[str]:
    """Run the service with a journal of its own, and yield its address. It leaves no files.

    Raises:
        SystemExit: The service did not start, or did not stop as it should.
    """
    with (
        tempfile.TemporaryDirectory(prefix="postback-demo-") as name,
        running_child(service, environment(Path(name), settings)) as (child, line),
    ):
        if not line:
            sys.exit(f"The service ended with status {child.wait()} before it listened.")
        yield line.split()[-1]
        if status := stop(child):
            sys.exit(f"The service ended with status {status}, not 0.")


def environment(directory: Path, settings: Mapping[str, str]) -> dict[str, str]:
    """Return our environment, changed so that the service keeps to itself."""
    kept = {name: value for name, value in os.environ.items() if not _OVERRIDDEN.match(name)}
    return {
        **kept,
        "HOST": "127.0.0.1",
        "PORT": "0",  # any that is free
        "JOURNAL": str(directory / "journal.db"),
        "POSTBACK_SECRET": "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode(),
        "LOG_LEVEL": "warning",  # what goes wrong is shown among our own lines
        **settings,
    }


@contextmanager
def needed_cluster() -> Iterator[dict[str, str]]:
    """Yield the settings that lead to a Dask cluster of our own; none where none is needed."""
    if os.environ.get("EXECUTOR", "").lower() != "dask" or os.environ.get("DASK_SCHEDULER"):
        yield {}
        return
    with dask_cluster() as (url, _):
        print(f"A Dask scheduler listens on {url}, and has one worker.")
        yield {"DASK_SCHEDULER": url}


@contextmanager
def dask_cluster() -> Iterator[tuple[str, Child]]:
    """Start a Dask scheduler and one worker in a child; yield its address, and the child."""
    with tempfile.TemporaryDirectory(prefix="postback-dask-") as name:
        env = {**os.environ, "DASK_TEMPORARY_DIRECTORY": name}
        with running_child([sys.executable, "-c", _CLUSTER], env) as (child, line):
            if not line:
                sys.exit(f"The Dask cluster ended with status {child.wait()}.")
            yield line.strip(), child


@contextmanager
def running_child(command: Sequence[str], env: Mapping[str, str]) -> Iterator[tuple[Child, str]]:
    """Start a child, yield it with the first line it prints ("": it ended), and end it."""
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as child:  # noqa: S603 - our own
        try:
            yield child, child.stdout.readline() if child.stdout else ""
        finally:
            stop(child)


def stop(child: Child, seconds: float = STEP_SECONDS) -> int:
    """Stop the child, by force if it does not obey, and return its exit status."""
    child.terminate()
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


if __name__ == "__main__":
    main()
