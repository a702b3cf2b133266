"""Dramatiq and Redis: FastAPI in front, `dramatiq` behind."""

import os
from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from fastapi import FastAPI

from bench.peers.work import new_id
from bench.peers.work import work as do

dramatiq.set_broker(RedisBroker(url=os.environ["REDIS_URL"]))
app = FastAPI()


@dramatiq.actor
def work(job_id: str, data: Any) -> None:
    do(job_id, data)


@app.post("/process")
async def process(payload: dict[str, Any]) -> dict[str, str]:
    job_id = new_id()
    work.send(job_id, payload["data"])
    return {"id": job_id, "state": "accepted"}
