"""FastAPI's BackgroundTasks: the work is done in a thread of the pool, after the answer."""

from typing import Any

from fastapi import BackgroundTasks, FastAPI

from bench.peers.work import new_id, work

app = FastAPI()


@app.post("/process")
async def process(payload: dict[str, Any], background_tasks: BackgroundTasks) -> dict[str, str]:
    job_id = new_id()
    background_tasks.add_task(work, job_id, payload["data"])
    return {"id": job_id, "state": "accepted"}
