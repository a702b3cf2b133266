"""Analyses that Dask workers are not born with: DASK_UPLOAD=tests/uploaded.py brings them."""

import os
import threading
from pathlib import Path
from typing import Any


def act(data: Any, job: Any) -> Any:
    """Call the function of this file that the data names; echo other data."""
    if not (isinstance(data, dict) and "call" in data):
        return data
    return globals()[data["call"]](data["with"], job)


def describe(data: Any, job: Any) -> dict[str, Any]:
    return {"id": job.id, "start": job.start, "metadata": job.metadata}


def wait(data: str, job: Any) -> str:
    """Leave a mark beside a file, report, and wait until the file is there."""
    Path(f"{data}.{job.id}").touch()
    job.progress(0.5, "half")
    wait_for_file(data)
    return "waited"


def keep(data: Any, job: Any) -> None:
    job.progress(0.5, keep=data)


def fail(data: Any, job: Any) -> None:
    raise ValueError(f"cannot analyze {data}")


def end(data: int, job: Any) -> None:
    os._exit(data)


def wait_for_file(path: str) -> None:
    for _ in range(2000):
        if Path(path).exists():
            return
        threading.Event().wait(0.01)
    raise TimeoutError(path)
