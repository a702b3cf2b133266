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
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import Any

import requests

ROOT = Path(__file__).parent.parent
PAYLOAD_PATH = ROOT / "docs" / "examples" / "iris.json"

#: Seconds that each step may take: one answer, the postback.
STEP_SECONDS = 20.0

#: How many lines of a document are shown.
MAX_LINES = 30

#: Settings that would send the demo elsewhere. EXECUTOR is kept, so that each can be shown.
_DROPPED = re.compile(r"(POSTBACK|API_TOKEN|ANALYSIS|HOST|PORT|PUBLIC_URL|JOURNAL)(_|$)")


def main() -> None:
    """Show every step. A failure ends the process with one message and status 1."""
    argparse.ArgumentParser(prog="./run demo", description=__doc__).parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit("The demo was interrupted."))
    with tempfile.TemporaryDirectory(prefix="postback-demo-") as name, contextlib.ExitStack() as up:
        env = environment(Path(name))
        if env.get("EXECUTOR", "").lower() == "dask" and not env.get("DASK_SCHEDULER"):
            env["DASK_SCHEDULER"] = up.enter_context(cluster(name))
            print(f"A Dask scheduler listens on {env['DASK_SCHEDULER']} and has one worker.")
        with service(env) as url:
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
        "POSTBACK_SECRET": "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode(),
        "LOG_LEVEL": "warning",  # a warning is shown among our own lines
    }


@contextlib.contextmanager
def cluster(directory: str) -> Iterator[str]:
    """Run a Dask cluster in this process and yield the address of its scheduler."""
    os.environ["DASK_TEMPORARY_DIRECTORY"] = directory  # Dask reads it when it is imported
    from distributed import LocalCluster  # an optional extra

    options = {"n_workers": 1, "processes": False, "protocol": "tcp", "dashboard_address": None}
    with LocalCluster(host="127.0.0.1", **options) as running:
        yield running.scheduler_address


@contextlib.contextmanager
def service(env: Mapping[str, str]) -> Iterator[str]:
    """Run the service and yield its URL. Stop it at the end.

    Raises:
        SystemExit: It did not listen, or did not end as it should.
    """
    command = [sys.executable, str(ROOT / "app.py")]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as child:  # noqa: S603 - our own
        try:
            if not (line := child.stdout.readline() if child.stdout else ""):
                sys.exit(f"The service ended with status {child.wait()} before it listened.")
            yield line.split()[-1]
        finally:
            child.terminate()
    if child.returncode:
        sys.exit(f"The service ended with status {child.returncode}, not 0.")


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


def call(url: str, payload: bytes | None = None) -> Any:
    """Return the JSON of the answer to a GET, or to a POST of the payload.

    Raises:
        SystemExit: The answer is an error or no JSON, or there is none.
    """
    send = requests.post if payload else requests.get
    # All traffic stays on this machine, so a proxy must not get it.
    headers, proxies = {"Content-Type": "application/json"}, {"http": ""}
    try:
        answer = send(url, data=payload, headers=headers, proxies=proxies, timeout=STEP_SECONDS)
        if not answer.ok:
            sys.exit(f"{url} answered {answer.status_code}: {answer.text}")
        return answer.json()
    except requests.RequestException as exc:
        sys.exit(f"{url} gave no answer: {exc}")


def indented(document: dict[str, Any]) -> str:
    """Return the document as indented JSON, cut to MAX_LINES."""
    lines = json.dumps(document, indent=2, ensure_ascii=False).splitlines()
    if len(lines) > MAX_LINES:
        lines[MAX_LINES:] = [f"… and {len(lines) - MAX_LINES} more lines"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
