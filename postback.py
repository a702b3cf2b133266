"""One attempt to post an event: what is sent, what counts as success, when to try again.

Open this file to see or to change what a receiver gets. `web/outbound.py` says which receivers may
be reached, and sends the request.
"""

import http.client
import random
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import requests
import requests.utils

from config import Config
from jobs import errors, model
from web import outbound, signatures

VERSION = "0.2.0"

#: The longest wait that a receiver can ask for with Retry-After, in seconds.
MAX_RETRY_AFTER_SECONDS = 3600.0

#: Each wait is made shorter or longer by up to this part of it, so that the jobs that failed
#: together do not all come back together.
JITTER = 0.2

#: How much of a failed answer the operator sees, in characters.
MAX_ANSWER = 512


def seconds_until_next(
    number: int,
    schedule: Sequence[float],
    *,
    retry_after_seconds: float = 0.0,
    random: Callable[[], float] = random.random,
) -> float | None:
    """Return how long to wait after a failed attempt, jitter included; None if it was the last.

    Args:
        number: The attempt that failed. The first is 1.
        schedule: Seconds to wait after attempt 1, 2, 3, ...
        retry_after_seconds: The shortest wait.
        random: Gives a number from 0 to 1.
    """
    if number > len(schedule):
        return None
    seconds = max(schedule[number - 1] * (1 + JITTER * (2 * random() - 1)), retry_after_seconds)
    return round(seconds, 3)


class Sender:
    """Makes attempts, many at once, for the loop.

    Args:
        config: What it says about postbacks.
        url: Where events go unless the caller named another URL.
        own_urls: They share our secrets with the origin of `url`. Each other receiver has secrets
            of its own, so that none can forge an event to another.
        clock: Gives the aware instant that is signed.
        random: Gives a number from 0 to 1, for the jitter.
    """

    def __init__(
        self,
        config: Config,
        *,
        url: str,
        own_urls: frozenset[str] = frozenset(),
        clock: Callable[[], datetime] = model.utc_now,
        random: Callable[[], float] = random.random,
    ) -> None:
        self._config = config
        self._url = url
        self._own_urls, self._own_origin = own_urls, outbound.parts(url).origin
        self._clock = clock
        self._random = random
        ca_path = str(config.postback_ca_bundle or requests.utils.DEFAULT_CA_BUNDLE_PATH)
        self.transport = outbound.Transport(ca_path, timeout=config.postback_timeout_seconds)
        longest_seconds = max(config.postback_schedule_seconds, default=0.0) * (1 + JITTER)
        #: No attempt is due later than this after another.
        self.longest_wait_seconds = max(MAX_RETRY_AFTER_SECONDS, longest_seconds)

    def attempt(self, job: model.Job, event: bytes, then: Callable[[model.Attempt], None]) -> None:
        """Begin to send an event once.

        Args:
            job: Its id is the webhook-id, the same for each attempt.
            event: Is sent byte for byte.
            then: Is called with the result: at once if the URL is refused, otherwise later, by
                `transport.work`.

        Raises:
            MemoryError: It could not begin.
        """
        attempted_at, started, is_public_only = self._clock(), time.monotonic(), False

        def end(answer: requests.Response | Exception) -> None:
            status_code = None if isinstance(answer, Exception) else answer.status_code
            error = _reason(answer) if isinstance(answer, Exception) else _fault(answer.status_code)
            attempt = model.Attempt(
                number=job.attempts + 1,
                attempted_at=attempted_at,
                duration_seconds=time.monotonic() - started,
                status_code=status_code,
                error=error,
                **self._follows(job, answer, show=not is_public_only) if error else {},
            )
            then(attempt)

        try:
            url, policy = job.postback_url, self._config.postback_allow
            is_public_only = url is not None and policy.check(url)
            request = self._request(job, event, at=attempted_at, is_trusted=not is_public_only)
            self.transport.send(request, end, public_only=is_public_only)
        except MemoryError:
            raise
        except Exception as exc:  # noqa: BLE001 - whatever the libraries raise is a failed attempt
            end(exc)

    def _follows(
        self, job: model.Job, answer: requests.Response | Exception, *, show: bool
    ) -> dict[str, Any]:
        """Return what follows from a failed attempt: the fields of Attempt that say so."""
        if isinstance(answer, Exception):
            answer, show = requests.Response(), False  # an empty one
        headers, status_code = answer.headers, answer.status_code
        # The transport has made a number of it.
        asked_seconds = min(float(headers.get("retry-after", 0)), MAX_RETRY_AFTER_SECONDS)
        is_final = status_code == 410 or headers.get("webhook-delivery") == "abort-message"
        until_next = seconds_until_next(
            job.attempts + 1 - job.resent_after,  # after a resend the schedule begins again
            self._config.postback_schedule_seconds,
            retry_after_seconds=asked_seconds,
            random=self._random,
        )
        body = answer.content if show else b""
        return {
            "answer": body.decode(errors="replace")[:MAX_ANSWER] or None,
            "seconds_until_next": None if is_final else until_next,
            "hold_seconds": asked_seconds if status_code in {429, 503} else 0.0,
        }

    def _request(
        self, job: model.Job, event: bytes, *, at: datetime, is_trusted: bool
    ) -> requests.PreparedRequest:
        """Build the request: id and event are the same at each attempt, time and signature new.

        Without `PreparedRequest.prepare`, which checks again what is checked already and would cost
        as much as the sending.
        """
        given = self._config.postback_headers if is_trusted else {}
        own = {name: text for name, text in given.items() if name.lower() not in job.forwarded}
        target = outbound.parts(job.postback_url or self._url)
        scheduled = job.resent_after + len(self._config.postback_schedule_seconds)
        headers = {
            **own,
            **job.forwarded,
            "Content-Type": "application/json",
            "User-Agent": f"postback/{VERSION}",
            "Accept-Encoding": "identity",
            "webhook-id": job.id,
            "webhook-timestamp": str(int(at.timestamp())),
            "webhook-attempt": str(job.attempts + 1),
            "webhook-attempt-max": str(max(job.attempts, scheduled) + 1),
        }
        secrets = self._config.postback_secret
        path = target.url.partition("?")[0]
        if not (target.origin == self._own_origin or path in self._own_urls):
            secrets = tuple(signatures.secret_for(secret, target.origin) for secret in secrets)
        if secrets:
            signature = signatures.sign(secrets, webhook_id=job.id, timestamp=at, body=event)
            headers["webhook-signature"] = signature
        request = requests.PreparedRequest()
        request.method, request.url, request.body = "POST", target.url, event
        request.headers = headers  # type: ignore[assignment]  # a dict is copied much faster
        return request


def _fault(status_code: int) -> str | None:
    """Return what is wrong with a status; None if it means that the event is delivered."""
    # Not Response.ok: requests calls every status below 400 ok, a redirect included.
    if 200 <= status_code < 300:
        return None
    # Our own words: the phrase in the answer is the receiver's.
    phrase = http.client.responses.get(status_code, "")
    redirect = ": redirects are not followed" if 300 <= status_code < 400 else ""
    return f"{status_code} {phrase}".strip() + redirect


def _reason(exc: Exception) -> str:
    """Return why there was no answer. It never contains a URL's query."""
    if isinstance(exc, errors.Refusal):
        return f"refused: {exc.detail}"
    return str(exc)[:200] if isinstance(exc, requests.ConnectionError) else type(exc).__name__
