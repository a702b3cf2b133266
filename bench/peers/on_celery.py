"""Celery and Redis: FastAPI in front, `celery worker` behind."""

import os
from typing import Any

from celery import Celery
from fastapi import FastAPI

from bench.peers.work import new_id
from bench.peers.work import work as do

tasks = Celery("tasks", broker=os.environ["REDIS_URL"])
app = FastAPI()


@tasks.task
def work(job_id: str, data: Any) -> None:
    do(job_id, data)


@app.post("/process")
async def process(payload: dict[str, Any]) -> dict[str, str]:
    job_id = new_id()
    work.delay(job_id, payload["data"])
    return {"id": job_id, "state": "accepted"}
