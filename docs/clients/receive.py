"""Receive postbacks: verify, drop duplicates, store, and answer after that."""

import os
import sqlite3

import bottle
import standardwebhooks

webhook = standardwebhooks.Webhook(os.environ["POSTBACK_SECRET"])
received = sqlite3.connect(os.environ.get("RECEIVED", "received.db"))
received.execute("CREATE TABLE IF NOT EXISTS received (id TEXT PRIMARY KEY, body TEXT)")


def results() -> bottle.HTTPResponse:
    """Receive one event."""
    body = bottle.request.body.read()
    try:
        event = webhook.verify(body, dict(bottle.request.headers))
    except (standardwebhooks.WebhookVerificationError, ValueError):  # garbage is a ValueError
        return bottle.HTTPResponse(status=401)
    with received:  # the same event always has the same id
        row = (bottle.request.headers["webhook-id"], body.decode())
        is_new = received.execute("INSERT OR IGNORE INTO received VALUES (?, ?)", row).rowcount
    if is_new:
        print(event["type"], event["data"]["id"], flush=True)
    return bottle.HTTPResponse(status=204)


bottle.route("/results", "POST", results)
bottle.run(port=int(os.environ.get("PORT", "8081")), quiet=True)
