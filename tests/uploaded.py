"""Analyses that Dask workers are not born with: DASK_UPLOAD=tests/uploaded.py brings them."""

import os
import threading
from pathlib import Path
from typing import Any


def echo(data: Any) -> Any:
    return data


def meet(data: dict[str, str]) -> int:
    """Write this process's id down at `here`, wait until `there` exists, and return the id."""
    Path(data["here"] + ".new").write_text(str(os.getpid()), encoding="ascii")
    Path(data["here"] + ".new").rename(data["here"])
    wait_for_file(data["there"])
    return os.getpid()


def report(data: str, progress: Any) -> str:
    """Report once, then wait until the path exists."""
    progress(0.5, "half")
    wait_for_file(data)
    return "told"


def fail(data: Any) -> Any:
    raise ValueError(f"cannot analyze {data}")


def end(data: Any) -> Any:
    os._exit(int(data))


def wait_for_file(path: str) -> None:
    for _ in range(2000):
        if Path(path).exists():
            return
        threading.Event().wait(0.01)
    raise TimeoutError(path)
