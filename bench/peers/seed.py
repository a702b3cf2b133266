"""The bare thread: Bottle, a thread for each job, a `requests.post`. `seed.py <server> <port>`."""

import sys
import threading
from typing import Any

import bottle
import requests

from bench.peers.work import URL, analyze, new_id


def work(job_id: str, data: Any) -> None:
    requests.post(URL, json={"id": job_id, "result": analyze(data)}, timeout=15)


@bottle.post("/process")
def process() -> dict[str, str]:
    job_id = new_id()
    threading.Thread(target=work, args=(job_id, bottle.request.json["data"]), daemon=True).start()
    return {"id": job_id, "state": "accepted"}


if __name__ == "__main__":
    bottle.BaseRequest.MEMFILE_MAX = 1 << 20
    bottle.run(host="127.0.0.1", server=sys.argv[1], port=int(sys.argv[2]))
