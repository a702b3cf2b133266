"""The demonstration: one payload goes all the way, and each step is shown.

`./run demo` starts the real service as a child process, with a free port and a journal of its own,
and uses it as any caller would. EXECUTOR=process or EXECUTOR=dask shows that executor.
"""

import argparse
import base64
import contextlib
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
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import Any
from urllib.error import HTTPError

ROOT = Path(__file__).parent.parent
PAYLOAD_PATH = ROOT / "docs" / "examples" / "iris.json"

#: Seconds that each step may take: one answer, the postback.
STEP_SECONDS = 20.0

#: How many lines of a document are shown.
MAX_LINES = 30

#: Settings that would send the demo elsewhere. EXECUTOR is kept, so that each can be shown.
_DROPPED = re.compile(r"(POSTBACK|API_TOKEN|ANALYSIS|HOST|PORT|PUBLIC_URL|JOURNAL)(_|$)")

#: All traffic stays on this machine, so a proxy must not get it.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

#: A Dask cluster in one process.
_CLUSTER = """
import os, signal
from distributed import LocalCluster
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
options = {"n_workers": 1, "processes": False, "protocol": "tcp", "dashboard_address": None}
print(LocalCluster(host="127.0.0.1", **options).scheduler_address, flush=True)
signal.pause()
"""


def main() -> None:
    """Show every step. A failure ends the process with one message and status 1."""
    argparse.ArgumentParser(prog="./run demo", description=__doc__).parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit("The demo was interrupted."))
    with tempfile.TemporaryDirectory(prefix="postback-demo-") as name, contextlib.ExitStack() as up:
        env = environment(Path(name))
        if env.get("EXECUTOR", "").lower() == "dask" and not env.get("DASK_SCHEDULER"):
            line = up.enter_context(running("Dask cluster", ["-c", _CLUSTER], env))
            env["DASK_SCHEDULER"] = line.strip()
            print(f"A Dask scheduler listens on {line.strip()} and has one worker.")
        with running("service", [str(ROOT / "app.py")], env) as line:
            url = line.split()[-1]
            print(f"Postback listens on {url}, with a journal of its own.")
            show_steps(url, PAYLOAD_PATH.read_bytes())
    print("The service has stopped.")


def environment(directory: Path) -> dict[str, str]:
    """Return our environment, changed so that the service keeps to itself."""
    kept = {name: value for name, value in os.environ.items() if not _DROPPED.match(name)}
    return kept | {
        "HOST": "127.0.0.1",
        "PORT": "0",  # any free one
        "JOURNAL": str(directory / "journal.db"),
        "DASK_TEMPORARY_DIRECTORY": str(directory),
        "POSTBACK_SECRET": "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode(),
        "LOG_LEVEL": "warning",  # a warning is shown among our own lines
    }


@contextlib.contextmanager
def running(what: str, arguments: Sequence[str], env: Mapping[str, str]) -> Iterator[str]:
    """Run a Python program and yield the first line that it prints. Stop it at the end.

    Raises:
        SystemExit: It printed nothing, or did not end as it should.
    """
    command = [sys.executable, *arguments]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as child:  # noqa: S603 - our own
        try:
            if not (line := child.stdout.readline() if child.stdout else ""):
                sys.exit(f"The {what} ended with status {child.wait()} before it listened.")
            yield line
        finally:
            child.terminate()
        if status := child.wait():
            sys.exit(f"The {what} ended with status {status}, not 0.")


def show_steps(url: str, payload: bytes) -> None:
    """Send the payload, show the answer and the postback, and check that all is as it should be."""
    sent_at, sent = datetime.now(UTC), time.perf_counter()
    answer = call(f"{url}/process", payload)
    ms = (time.perf_counter() - sent) * 1000
    print(f"\nPOST /process with {len(payload)} bytes\n200 after {ms:.1f} ms\n{indented(answer)}")

    deadline = time.monotonic() + STEP_SECONDS
    while (state := call(f"{url}/jobs/{answer['id']}")["state"]) != "delivered":
        if time.monotonic() > deadline:
            sys.exit(f"The job is still {state} after {STEP_SECONDS:g} s.")
        Event().wait(0.01)
    (postback,) = call(f"{url}/postprocessed")["received"]
    waited = datetime.fromisoformat(postback["received_at"]) - sent_at
    print(f"\nPOST /postprocessed, {waited.total_seconds() * 1000:.1f} ms after the first")
    print(f"signature: {postback['signature']}\n{indented(postback['event'])}")
    if (postback["signature"], postback["event"]["type"]) != ("good", "job.succeeded"):
        sys.exit("Expected a good signature and job.succeeded.")
    print("\nThe job is delivered.")


def call(url: str, payload: bytes | None = None) -> dict[str, Any]:
    """Return the JSON of the answer to a GET, or to a POST of the payload.

    Raises:
        SystemExit: The answer is an error or no JSON, or there is none.
    """
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, data=payload, headers=headers)  # noqa: S310 - our own
    try:
        with _opener.open(request, timeout=STEP_SECONDS) as answer:
            document: dict[str, Any] = json.load(answer)
            return document
    except HTTPError as exc:
        sys.exit(f"{url} answered {exc.code}: {exc.read().decode(errors='replace')}")
    except (OSError, ValueError) as exc:
        sys.exit(f"{url} gave no answer: {exc}")


def indented(document: dict[str, Any]) -> str:
    """Return the document as indented JSON, cut to MAX_LINES."""
    lines = json.dumps(document, indent=2, ensure_ascii=False).splitlines()
    if len(lines) > MAX_LINES:
        lines[MAX_LINES:] = [f"… and {len(lines) - MAX_LINES} more lines"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
