"""What the benchmarks have analyzed."""

import time
from typing import Any


def echo(data: Any) -> Any:
    return data


def spin(data: float) -> float:
    """Keep a processor busy for as many seconds as the data says."""
    until = time.monotonic() + data
    while time.monotonic() < until:
        pass
    return data
