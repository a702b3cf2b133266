"""The peer: FastAPI answers, and its BackgroundTasks work in threads of the same process."""

import time
from typing import Any

from fastapi import BackgroundTasks, FastAPI

app = FastAPI()


def analyze(data: Any) -> None:
    """Keep a processor busy for as many seconds as the data says."""
    until = time.monotonic() + data
    while time.monotonic() < until:
        pass


@app.post("/process")
def process(payload: dict[str, Any], tasks: BackgroundTasks) -> dict[str, str]:
    tasks.add_task(analyze, payload["data"])
    return {"state": "accepted"}
