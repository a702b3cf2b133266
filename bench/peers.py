"""The peers: one module that is the front and the workers of each, chosen by PEER.

`background`, `huey`, `dramatiq` and `celery` have FastAPI in front: `uvicorn peers:app`. The routes
are `async def`, although they write to a queue: as `def`, each in a thread, they were up to a fifth
slower. `bare` is a Bottle route that does nothing, `threads` one that starts a thread for each job:
`python -m peers <server> <port>`.
"""

import importlib
import os
import sys
import threading
import uuid
from typing import Any

import requests

PEER = os.environ["PEER"]
URL = os.environ["POSTBACK_URL"]

_module, _, _name = os.environ["ANALYSIS"].partition(":")
analyze = getattr(importlib.import_module(_module), _name)
_kept = threading.local()


def work(job_id: str, data: Any) -> None:
    """Analyze, and post once; over the connection that this thread keeps, if it lives on."""
    if not hasattr(_kept, "session"):
        _kept.session = requests if PEER == "threads" else requests.Session()
    _kept.session.post(URL, json={"id": job_id, "result": analyze(data)}, timeout=15)


def accepted() -> dict[str, str]:
    return {"id": uuid.uuid4().hex, "state": "accepted"}


if PEER == "huey":
    from huey import SqliteHuey

    huey = SqliteHuey(filename=os.environ["HUEY_FILE"])
    enqueue = huey.task()(work)
elif PEER == "dramatiq":
    import dramatiq
    from dramatiq.brokers.redis import RedisBroker

    dramatiq.set_broker(RedisBroker(url=os.environ["REDIS_URL"]))
    enqueue = dramatiq.actor(work).send
elif PEER == "celery":
    from celery import Celery

    tasks = Celery("tasks", broker=os.environ["REDIS_URL"])
    enqueue = tasks.task(work).delay

if PEER in ("bare", "threads"):
    import bottle

    @bottle.post("/process")
    def process() -> dict[str, str]:
        answer = accepted()
        if PEER == "threads":
            arguments = (answer["id"], bottle.request.json["data"])
            threading.Thread(target=work, args=arguments, daemon=True).start()
        return answer

    if __name__ == "__main__":
        bottle.BaseRequest.MEMFILE_MAX = 1 << 20
        bottle.run(host="127.0.0.1", server=sys.argv[1], port=int(sys.argv[2]))
else:
    from fastapi import BackgroundTasks, FastAPI

    app = FastAPI()

    @app.post("/process")
    async def process(payload: dict[str, Any], background: BackgroundTasks) -> dict[str, str]:
        answer = accepted()
        if PEER == "background":
            background.add_task(work, answer["id"], payload["data"])
        else:
            enqueue(answer["id"], payload["data"])
        return answer
