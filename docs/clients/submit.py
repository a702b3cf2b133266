"""Send a payload, and print the id of its job. usage: submit.py '{"data": [3, 1, 4]}'."""

import json
import os
import sys
import uuid

import requests

payload = json.loads(sys.argv[1])
answer = requests.post(
    os.environ.get("POSTBACK", "http://127.0.0.1:8080") + "/process",
    json=payload,
    headers={
        "Authorization": f"Bearer {os.environ.get('API_TOKEN', '')}",
        "Idempotency-Key": str(uuid.uuid4()),  # the same one if you send it again
    },
    timeout=10,
)
if answer.status_code != 200:
    sys.exit(answer.json()["detail"])
print(answer.json()["id"])
