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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import Any, TypeVar
from urllib.error import HTTPError

ROOT = Path(__file__).parent.parent
SERVICE = (sys.executable, str(ROOT / "app.py"))
PAYLOAD_PATH = ROOT / "docs" / "examples" / "iris.json"

#: Seconds that each step may take: the start, one answer, the postback, the stop.
STEP_SECONDS = 20.0

#: How much of a document is shown, in lines.
MAX_LINES = 30

#: Settings that would send the demo elsewhere; EXECUTOR is kept, so that each can be seen at work.
_OVERRIDDEN = re.compile(r"(POSTBACK|API_TOKEN|ANALYSIS|HOST|PORT|PUBLIC_URL|JOURNAL)(_|$)")

#: Everything here is on this machine, so a proxy from the environment has no part in it.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

NONE: Mapping[str, str] = {}

T = TypeVar("T")


def main(service: Sequence[str] = SERVICE) -> None:
    """Show the loop; what goes wrong ends the process with one message and status 1."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit("The demo was interrupted."))
    with needed_cluster() as settings, running(service, settings) as url:
        print(f"Postback listens on {url}, with a journal of its own.")
        show_loop(url, PAYLOAD_PATH.read_bytes())
    print("The service has stopped.")


def show_loop(url: str, payload: bytes) -> None:
    """Send the payload, show the answer and the postback, and check that the job is delivered."""
    sent_at, sent = datetime.now(UTC), time.perf_counter()
    status_code, answer = call(f"{url}/process", payload)
    answered = time.perf_counter()
    print(f"\nPOST /process with {len(payload)} bytes")
    print(f"{status_code} after {(answered - sent) * 1000:.1f} ms\n{rendition(answer)}")

    receipt = wait_for("The postback", lambda: find_receipt(url, answer["id"]))
    waited = datetime.fromisoformat(receipt["received_at"]) - sent_at
    print(f"\nPOST /postprocessed, {waited.total_seconds() * 1000:.1f} ms after the first")
    print(f"signature: {receipt['signature']}\n{rendition(receipt['event'])}")

    job = wait_for("The end of the job", lambda: find_ended(url, answer["id"]))
    facts = receipt["signature"], receipt["event"]["type"], job["state"]
    if facts != ("good", "job.succeeded", "delivered"):
        sys.exit("Expected a good signature, job.succeeded and delivered; got " + ", ".join(facts))
    print("\nThe job is delivered.")


def find_receipt(url: str, job_id: str) -> dict[str, Any] | None:
    """Return what the built-in receiver stored for the job, once it has."""
    _, stored = call(f"{url}/postprocessed")
    return next((item for item in stored["received"] if item["webhook_id"] == job_id), None)


def find_ended(url: str, job_id: str) -> dict[str, Any] | None:
    """Return the job once nothing more will happen to it."""
    _, job = call(f"{url}/jobs/{job_id}")
    return job if job["state"] in {"delivered", "undelivered"} else None


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
def dask_cluster() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Start a Dask scheduler and one worker on loopback; yield its address, and the worker."""
    with tempfile.TemporaryDirectory(prefix="postback-dask-") as name, ExitStack() as started:
        file = Path(name) / "scheduler.json"

        def launch(role: str, *options: str) -> subprocess.Popen[bytes]:
            command = [sys.executable, "-m", f"distributed.cli.dask_{role}", "--no-dashboard"]
            with (Path(name) / f"{role}.log").open("wb") as log:
                child = subprocess.Popen(  # noqa: S603 - our own
                    [*command, "--host", "127.0.0.1", "--scheduler-file", str(file), *options],
                    cwd=name,
                    env=os.environ | {"DASK_TEMPORARY_DIRECTORY": name},
                    stdout=log,
                    stderr=log,
                )
            started.callback(stop, child)
            return child

        launch("scheduler", "--port", "0")  # any that is free
        url = wait_for("The Dask scheduler", lambda: find_scheduler(file))
        yield url, launch("worker", "--no-nanny")


def find_scheduler(file: Path) -> str | None:
    """Return the address that the scheduler writes down, once it has."""
    try:
        return str(json.loads(file.read_text())["address"])
    except (OSError, ValueError):
        return None


@contextmanager
def running(service: Sequence[str], settings: Mapping[str, str] = NONE) -> Iterator[str]:
    """Run the service as a child and yield its address; it always ends, and leaves no files.

    Raises:
        SystemExit: The service did not start, or did not stop as it should. Its log is shown then.
    """
    with tempfile.TemporaryDirectory(prefix="postback-demo-") as name:
        log_path = Path(name) / "service.log"
        child = start(service, Path(name), log_path, settings)
        try:
            yield wait_for("The address", lambda: find_address(child, log_path))
            if status := stop(child):
                sys.exit(f"The service ended with status {status}, not 0.")
        except SystemExit:
            sys.stderr.write(log_path.read_text())
            raise
        finally:
            stop(child)


def start(
    service: Sequence[str], directory: Path, log_path: Path, settings: Mapping[str, str] = NONE
) -> subprocess.Popen[bytes]:
    """Start the service with a journal in the directory and a secret of its own."""
    env = {name: value for name, value in os.environ.items() if not _OVERRIDDEN.match(name)}
    env |= {
        "HOST": "127.0.0.1",
        "PORT": "0",  # any that is free
        "JOURNAL": str(directory / "journal.db"),
        "POSTBACK_SECRET": "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode(),
        **settings,
    }
    with log_path.open("wb") as log:
        return subprocess.Popen(service, env=env, stdout=log, stderr=log)  # noqa: S603 - our own


def stop(child: subprocess.Popen[bytes], seconds: float = STEP_SECONDS) -> int:
    """Stop the child, by force if it does not obey, and return its exit status."""
    child.terminate()
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


def find_address(child: subprocess.Popen[bytes], log_path: Path) -> str | None:
    """Return the address that the service prints first, once it has."""
    if child.poll() is not None:
        sys.exit(f"The service ended with status {child.returncode} before it listened.")
    found = re.search(r"^Postback listens on (http://\S+)$", log_path.read_text(), re.MULTILINE)
    return found and found[1]


def wait_for(what: str, find: Callable[[], T | None], seconds: float = STEP_SECONDS) -> T:
    """Look for something until it is there; after too many seconds exit with a message."""
    deadline = time.monotonic() + seconds
    while (found := find()) is None:
        if time.monotonic() > deadline:
            sys.exit(f"{what} did not come within {seconds:g} s.")
        Event().wait(0.01)
    return found


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


if __name__ == "__main__":
    main()
