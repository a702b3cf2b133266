#!/bin/sh
# Send a payload, and wait until its job has ended. usage: submit.sh '{"data": [3, 1, 4]}', or @FILE
set -eu
url=${POSTBACK:-http://127.0.0.1:8080}

# A refusal is printed. After a timeout it is safe to repeat with the same Idempotency-Key.
answer=$(curl --fail-with-body -sS "$url/process" -H "Authorization: Bearer ${API_TOKEN-}" \
    -H 'Content-Type: application/json' -H "Idempotency-Key: ${KEY:-$(date +%s)-$$}" -d "$1") || {
    printf '%s\n' "$answer" >&2
    exit 1
}
status_url=$(printf %s "$answer" | sed 's/.*"status_url": "\([^"]*\)".*/\1/')

until job=$(curl -fsS "$status_url" -H "Authorization: Bearer ${API_TOKEN-}") &&
    printf %s "$job" | grep -qE '^\{"id": "[^"]*", "state": "(un)?delivered"'; do
    sleep 1
done
printf '%s\n' "$job"
