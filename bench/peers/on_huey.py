"""Huey on SQLite: FastAPI in front, `huey_consumer` with threads behind."""

import os
from typing import Any

from fastapi import FastAPI
from huey import SqliteHuey

from bench.peers.work import new_id
from bench.peers.work import work as do

huey = SqliteHuey(filename=os.environ["HUEY_FILE"])
app = FastAPI()


@huey.task()
def work(job_id: str, data: Any) -> None:
    do(job_id, data)


@app.post("/process")
async def process(payload: dict[str, Any]) -> dict[str, str]:
    job_id = new_id()
    work(job_id, payload["data"])
    return {"id": job_id, "state": "accepted"}
