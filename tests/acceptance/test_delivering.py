"""The postback is a proper webhook: repeated, signed, final, and sent again when you say so."""

import base64
import hashlib
import hmac
import os
import threading

import pytest
import requests
import standardwebhooks

from tests.harness import act, events, poll, refusal
from tests.receiver import Receiver, reply

SECRET = "whsec_" + base64.b64encode(b"0123456789abcdef0123456789abcdef").decode()


def secret_of(receiver: Receiver) -> str:
    """Return the secret of a receiver, as design says it is made."""
    key = base64.b64decode(SECRET.removeprefix("whsec_"))
    derived = hmac.digest(key, receiver.origin.encode(), "sha256")
    return "whsec_" + base64.b64encode(derived).decode()


def verify(secret: str, request) -> None:
    standardwebhooks.Webhook(secret).verify(request.body.decode(), request.headers)


# Attempts


def test_failed_attempts_are_repeated_with_the_same_id_and_bytes(service, mailbox):
    mailbox.answers = [500, 302, 200]

    job_id = service.send(1, mailbox)

    job = service.wait_for(job_id)
    sent = mailbox.requests
    assert {one.headers["webhook-id"] for one in sent} == {job_id}
    assert len({one.body for one in sent}) == 1
    assert [one.headers["webhook-attempt"] for one in sent] == ["1", "2", "3"]
    assert {one.headers["webhook-attempt-max"] for one in sent} == {"4"}
    assert [one["status_code"] for one in job["attempts"]] == [500, 302, 200]
    assert (job["state"], job["attempts_made"]) == ("delivered", 3)


def test_after_the_last_attempt_a_job_is_undelivered_and_can_be_resent(service, mailbox):
    mailbox.answers = [500] * 4
    job_id = service.send(1, mailbox)
    assert service.wait_for(job_id)["state"] == "undelivered"
    mailbox.answers = [500, 204]

    answer = service.post(f"/jobs/{job_id}/resend")

    assert (answer.status_code, answer.json()["state"]) == (200, "delivering")
    assert service.wait_for(job_id)["state"] == "delivered"
    sent = mailbox.wait_for(6)
    assert len({(one.headers["webhook-id"], one.body) for one in sent}) == 1
    counts = [(one.headers["webhook-attempt"], one.headers["webhook-attempt-max"]) for one in sent]
    assert counts == [(str(n), "4") for n in range(1, 5)] + [("5", "8"), ("6", "8")]


@pytest.mark.parametrize("last", [410, reply(500, headers={"webhook-delivery": "abort-message"})])
def test_a_receiver_that_wants_no_more_is_left_alone_until_a_resend(service, mailbox, last):
    mailbox.answers = [last]
    job_id = service.send(1, mailbox)
    given_up = service.wait_for(job_id)

    service.post(f"/jobs/{job_id}/resend")

    assert (given_up["state"], given_up["attempts_made"]) == ("undelivered", 1)
    assert service.wait_for(job_id)["state"] == "delivered"


def test_f01_a_receiver_that_was_down_gets_its_postbacks_when_it_is_up(start_process):
    # Below the ports that the system gives to connections: an attempt could get this very one.
    port = 20_000 + os.getpid() % 10_000
    service = start_process(
        POSTBACK_URL=f"http://127.0.0.1:{port}/", POSTBACK_SCHEDULE="9ms " * 200
    )
    job_id = service.send(1)
    failed = poll(lambda: service.job(job_id)["attempts"], "an attempt that fails")

    with Receiver(port=port) as up:
        assert up.wait_for(1)[0].headers["webhook-id"] == job_id
        assert service.wait_for(job_id)["state"] == "delivered"
    assert failed[0]["error"] == "the connection failed: Connection refused"


def test_attempts_that_wait_are_resumed_without_the_analysis(start_process, receiver):
    receiver.answers = [500]
    service = start_process(POSTBACK_URL=receiver.url, POSTBACK_SCHEDULE="700ms")
    job_id = service.send(1)
    poll(lambda: service.job(job_id)["attempts"], "the first attempt")

    assert service.end() == 75
    service.start()

    job = service.wait_for(job_id)
    assert (job["state"], job["starts"]) == ("delivered", 1)
    assert [one.headers["webhook-attempt"] for one in receiver.requests] == ["1", "2"]


def test_a_slow_receiver_does_not_hold_up_another_one_or_the_analyses(start_process, receiver):
    released = threading.Event()
    with Receiver([500], default=lambda *_: released.wait(20) and 204) as slow:
        allow = f"{slow.origin} {receiver.origin}"
        service = start_process(POSTBACK_ALLOW=allow, POSTBACK_SCHEDULE="1h", MAX_RUNNING="1")
        failed = service.send(0, slow)
        poll(lambda: service.job(failed)["attempts"], "a failed attempt")
        waiting = [service.send(number, slow) for number in range(1, 9)]
        slow.wait_for(1 + 4)  # as many as there may be at once, because its last attempt failed

        jobs = service.wait_for_all([service.send(number, receiver) for number in range(1, 6)])

        assert {job["state"] for job in jobs} == {"delivered"}
        assert len(slow.requests) == 1 + 4
        released.set()
        assert {job["attempts_made"] for job in service.wait_for_all(waiting)} == {1}


def test_a_receiver_can_hold_off_all_attempts_for_a_while(start_process, receiver):
    """Of two pauses that it asks for, the one that ends later counts."""
    released = threading.Event()
    short, long = (reply(503, headers={"Retry-After": text}) for text in ("1", "2"))
    receiver.answers = [lambda *args: short(*args) if released.wait(10) else None, long]
    with Receiver() as other:
        service = start_process(
            POSTBACK_ALLOW=f"{receiver.origin} {other.origin}", POSTBACK_SCHEDULE="10ms"
        )
        first = [service.send(0, receiver)]
        receiver.wait_for(1)
        first.append(service.send(1, receiver))
        poll(lambda: service.job(first[1])["attempts"], "an attempt that is held off")
        released.set()
        poll(lambda: service.job(first[0])["attempts"], "another one")
        later = [service.send(number, receiver) for number in (2, 3)]

        elsewhere = service.wait_for(service.send(4, other))

        assert elsewhere["state"] == "delivered"
        assert len(receiver.requests) == 2
        jobs = service.wait_for_all([*first, *later])
        assert [job["attempts_made"] for job in jobs] == [2, 2, 1, 1]
        times = [one.received_at for one in receiver.requests]
        assert times[2] - times[1] >= 1.9


def test_why_an_attempt_failed_is_told_with_what_the_receiver_answered(service, mailbox):
    mailbox.answers = [reply(404, b"no such order"), 204]
    job = service.wait_for(service.send(1, mailbox))

    failed, delivered = job["attempts"]

    assert failed["answer"] == "no such order"
    assert "404" in failed["error"]
    assert (delivered["answer"], delivered["error"]) == (None, None)
    assert "no such order" not in service.log()


# Signed


def test_every_attempt_is_signed_for_the_configured_receiver(start_process, receiver):
    receiver.answers = [500]
    service = start_process(
        POSTBACK_URL=receiver.url, POSTBACK_SECRET=SECRET, POSTBACK_SCHEDULE="10ms"
    )

    service.wait_for(service.send("naïve ☃"))

    for request in receiver.wait_for(2):
        verify(SECRET, request)


def test_a_receiver_that_a_caller_chose_cannot_forge_an_event_to_another(start_process, receiver):
    with Receiver() as other:
        allow = f"{receiver.origin} {other.origin}"
        service = start_process(POSTBACK_SECRET=SECRET, POSTBACK_ALLOW=allow)
        service.wait_for_all([service.send(1, receiver), service.send(1, other)])
        own = service.wait_for(service.send(1))

        (mine,), (theirs,) = receiver.requests, other.requests
        secrets = [SECRET, secret_of(receiver), secret_of(other)]

    verify(secrets[1], mine)
    verify(secrets[2], theirs)
    for secret in (secrets[0], secrets[2]):
        with pytest.raises(standardwebhooks.WebhookVerificationError):
            verify(secret, mine)
    (received,) = service.get("/postprocessed").json()["received"]
    assert (received["webhook_id"], received["signature"]) == (own["id"], "good")


# Large results


def test_a_large_result_is_posted_as_a_link_that_needs_no_token(start_process, receiver):
    service = start_process(
        POSTBACK_URL=receiver.url, POSTBACK_MAX_BYTES="1KiB", API_TOKEN="secret"
    )
    headers = {"Authorization": "Bearer secret"}
    job_id = service.process({"data": act("large", 5000)}, headers)
    (event,) = events(receiver.wait_for(1))
    link = event["data"]["result_url"]

    answer = requests.get(link, timeout=10)
    forged = requests.get(link[:-1] + "~", timeout=10)

    assert "result" not in event["data"]
    assert answer.headers["Content-Type"] == "application/json"
    assert hashlib.sha256(answer.content).hexdigest() == event["data"]["result_sha256"]
    assert len(answer.content) == event["data"]["result_bytes"] == 5002
    assert forged.status_code == requests.get(link.split("?")[0], timeout=10).status_code == 401
    job = service.get(f"/jobs/{job_id}", headers=headers).json()
    assert (job["result"], job["result_url"]) == (None, link)


# After an outage


def test_all_undelivered_jobs_can_be_resent_at_once(start_process, receiver):
    receiver.default = 500
    service = start_process(POSTBACK_URL=receiver.url, POSTBACK_SCHEDULE="none")
    early, late = (service.wait_for(service.send(number)) for number in (1, 2))
    receiver.default = 204

    def resend(**since):
        return service.post("/jobs/resend", json={"state": "undelivered", **since}).json()["resent"]

    assert resend(since=late["ended_at"]) == 1
    assert service.wait_for(late["id"], "delivered")["attempts_made"] == 2
    assert service.job(early["id"])["state"] == "undelivered"
    assert resend() == 1
    assert service.wait_for(early["id"], "delivered")
    assert resend() == 0


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ([], "undelivered"),
        ({"state": "delivered"}, "undelivered"),
        ({"state": "undelivered", "since": "yesterday"}, "since"),
        ({"state": "undelivered", "since": 5}, "since"),
        ({"state": "undelivered", "until": "2026-01-02"}, "since"),
    ],
)
def test_a_resend_of_nonsense_is_refused(service, body, named):
    answer = service.post("/jobs/resend", json=body)

    assert named in refusal(answer, 400)


# Deleted


def test_a_deleted_job_leaves_nothing(service):
    payload, key = {"data": 1}, {"Idempotency-Key": "to be deleted"}
    job_id = service.process(payload, key)
    service.wait_for(job_id)

    answer = service.request("DELETE", f"/jobs/{job_id}")

    assert (answer.status_code, answer.content) == (204, b"")
    assert service.get(f"/jobs/{job_id}").status_code == 404
    assert job_id not in service.get("/postprocessed").text
    assert service.process(payload, key) != job_id


def test_a_job_that_has_not_ended_is_not_deleted(service, gate):
    job_id = service.send(gate.data)
    gate.wait_for(1)

    answer = service.request("DELETE", f"/jobs/{job_id}")

    assert "is running, so it cannot be deleted. Cancel it, and wait" in refusal(answer, 409)
    assert service.job(job_id)["data"] == gate.data
