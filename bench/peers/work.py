"""What each peer does with a job: run the analysis, post the result. No second attempt."""

import importlib
import os
import threading
import uuid
from typing import Any

import requests

URL = os.environ["POSTBACK_URL"]

_module, _, _name = os.environ["ANALYSIS"].partition(":")
analyze = getattr(importlib.import_module(_module), _name)

_kept = threading.local()


def new_id() -> str:
    return uuid.uuid4().hex


def work(job_id: str, data: Any) -> None:
    """Analyze, and post over the connection that this thread keeps."""
    if not hasattr(_kept, "session"):
        _kept.session = requests.Session()
    _kept.session.post(URL, json={"id": job_id, "result": analyze(data)}, timeout=15)
