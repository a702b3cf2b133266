"""What the benchmarks have analyzed."""

import time
from typing import Any


def echo(data: Any) -> Any:
    return data


def nap(data: Any) -> Any:
    """Wait for 100 ms, as for a service or a database."""
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


def spin(data: float) -> float:
    """Keep a processor busy for as many seconds as the data says."""
    until = time.monotonic() + data
    while time.monotonic() < until:
        pass
    return data
