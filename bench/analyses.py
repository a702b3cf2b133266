"""What the benchmarks have analyzed. PYTHONPATH names this folder, for Postback and its peers."""

import time
from typing import Any


def echo(data: Any) -> Any:
    return data


def nap(data: Any) -> Any:
    """Wait for 100 ms, as for another service or a database."""
    time.sleep(0.1)
    return data


def nap_long(data: Any) -> Any:
    """Wait for 1 s."""
    time.sleep(1)
    return data


def burn(data: Any) -> Any:
    """Take 50 ms of a processor, however long that lasts."""
    until = time.thread_time() + 0.05
    while time.thread_time() < until:
        pass
    return data


def spin(data: Any) -> Any:
    """Keep a processor busy for `data["seconds"]`; return at once when there are none."""
    until = time.monotonic() + data.get("seconds", 0)
    while time.monotonic() < until:
        pass
    return data


def grow(data: Any) -> Any:
    """Return 10 MB."""
    return {**data, "text": "x" * 10_000_000}
