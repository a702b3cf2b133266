"""Analyses that misbehave, to be named as ANALYSIS=tests.faults.misbehaving:name."""

import os
import signal
import sys
from typing import Any

from tests.analyses import *  # noqa: F403 - all of them can be named here too


def binary(data: Any) -> bytes:
    return b"bytes"


def odd_key(data: Any) -> Any:
    return {(1, 2): 3}


def half_a_pair(data: Any) -> str:
    return "\ud800"


def meddle(data: str) -> str:
    """Do to the process what an analysis should not."""
    if data == "print":
        for _ in range(100):
            sys.stdout.write("x" * 1_000_000)
    if data == "chdir":
        os.chdir("/")
    if data == "close":
        sys.stdout.close()
        sys.stderr.close()
    if data == "signal":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return data
