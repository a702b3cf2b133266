"""One postback attempt: what is sent, what counts as success, when to try again.

Open this file to see or to change what a receiver gets. Which receivers may be reached is said in
`web/outbound.py`; how an attempt is ended in time, in `web/transport.py`.
"""

import email.utils
import http
import http.client
import random
import re
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

import requests
import requests.adapters

from jobs import errors, model
from web import outbound, signatures
from web.transport import Transport

VERSION = "0.1.0"

#: A receiver may put off the next attempt by as much, in seconds.
MAX_RETRY_AFTER_SECONDS = 3600.0

#: Each wait is made shorter or longer by up to this part of it, or all jobs come back at once.
JITTER = 0.2

#: What the operator reads for a failure; the first line that fits. Never the receiver's own words.
_PHRASES: tuple[tuple[type[Exception], str], ...] = (
    (errors.ReceiverRefusedError, "refused: {0}"),
    (ssl.SSLCertVerificationError, "certificate refused: {0.verify_message}"),
    (ssl.SSLError, "TLS failed: {0.reason}"),
    (http.client.RemoteDisconnected, "connection closed without an answer"),
    (http.client.HTTPException, "the answer is not proper HTTP"),
)

#: What the operator cannot set by POSTBACK_HEADERS.
RESERVED_HEADERS = re.compile(
    r"webhook-.*|content-.*|host|transfer-encoding|connection|accept-encoding|user-agent"
)


def seconds_until_next(
    number: int,
    schedule: Sequence[float],
    *,
    retry_after_seconds: float | None = None,
    random: Callable[[], float] = random.random,
) -> float | None:
    """Return how long to wait after a failed attempt, its jitter included; None: it was the last.

    Args:
        number: The attempt that failed; the first is 1.
        schedule: Seconds to wait after attempt 1, 2, 3, ...
        retry_after_seconds: The least to wait.
        random: Gives a number from 0 to 1.
    """
    if number > len(schedule):
        return None
    backoff_seconds = schedule[number - 1] * (1 + JITTER * (2 * random() - 1))
    return max(backoff_seconds, retry_after_seconds or 0.0)


class Sender:
    """Makes attempts, from as many threads at once as there are. One serves them all.

    Args:
        url: Where to, unless a caller named another place.
        policy: Which URLs of callers are allowed; asked again at each attempt.
        secrets: Sign the events; more than one while they are rotated, none for no signature.
        headers: What the operator adds to each attempt, never instead of ours: perhaps a token, so
            not to a URL that a caller chose among all.
        timeout_seconds: The wall clock of a whole attempt, whatever the receiver does.
        schedule: Seconds to wait after attempt 1, 2, 3, ...
        clock: Gives the aware instant that is signed.
        random: Gives a number from 0 to 1, for the jitter.
        ca_bundle: A file of certificates to trust in place of the usual ones.
        resolve: From a host name to its addresses.
    """

    def __init__(
        self,
        *,
        url: str,
        policy: outbound.Policy,
        secrets: Sequence[str],
        headers: Mapping[str, str],
        timeout_seconds: float,
        schedule: Sequence[float],
        clock: Callable[[], datetime] = model.utc_now,
        random: Callable[[], float] = random.random,
        ca_bundle: str | None = None,
        resolve: outbound.Resolve = outbound.resolve,
    ) -> None:
        self._url = url
        self._policy = policy
        self._secrets = tuple(secrets)
        self._headers = dict(headers)
        self._timeout_seconds = timeout_seconds
        self._schedule = tuple(schedule)
        self._clock = clock
        self._random = random
        ca_path = ca_bundle or requests.adapters.DEFAULT_CA_BUNDLE_PATH
        # Apart, so that no connection to a private address serves a caller's URL.
        self._transports = {
            public_only: Transport(ca_path=ca_path, public_only=public_only, resolve=resolve)
            for public_only in (False, True)
        }
        #: No attempt is due later than this after another.
        longest_seconds = max(self._schedule, default=0.0) * (1 + JITTER)
        self.longest_wait_seconds = max(MAX_RETRY_AFTER_SECONDS, longest_seconds)

    def attempt(self, job: model.Job, event: bytes) -> model.Attempt:
        """Send an event once, and tell how that went. Whatever happens, nothing is raised.

        Args:
            job: Its id is the webhook-id, the same for each attempt.
            event: Sent byte for byte.
        """
        attempted_at, started = self._clock(), time.monotonic()
        status_code: int | None = None
        headers: Mapping[str, str] = {}
        try:
            public_only = job.postback_url is not None and self._policy.check(job.postback_url)
            request = self._request(job, event, timestamp=attempted_at, is_trusted=not public_only)
            # Not by a Session: it adds cookies, .netrc, proxies and half of the time.
            answer = self._transports[public_only].send(request, timeout=self._timeout_seconds)
            status_code, headers = answer.status_code, answer.headers
            error = _fault(status_code)
        except Exception as exc:  # noqa: BLE001 - whatever the libraries raise is a failed attempt
            error = self._reason(exc)
        final = error is None or _is_final(status_code, headers)
        return model.Attempt(
            number=job.attempts + 1,
            attempted_at=attempted_at,
            duration_seconds=time.monotonic() - started,
            status_code=status_code,
            error=error,
            seconds_until_next=None if final else self._until_next(job, headers, attempted_at),
        )

    def _until_next(
        self, job: model.Job, headers: Mapping[str, str], now: datetime
    ) -> float | None:
        return seconds_until_next(
            job.attempts + 1 - job.resent_after,  # a resend has the whole schedule before it
            self._schedule,
            retry_after_seconds=_retry_after(headers, now),
            random=self._random,
        )

    def close(self) -> None:
        """Close the connections that are kept; attempts that are under way end by themselves."""
        for transport in self._transports.values():
            transport.close()

    def _request(
        self, job: model.Job, event: bytes, *, timestamp: datetime, is_trusted: bool
    ) -> requests.PreparedRequest:
        """Build every attempt in this one place: id and bytes stay, time and signature are new.

        By hand: `PreparedRequest.prepare` checks what is checked already, and costs as much as the
        sending.
        """
        own = {
            name: text
            for name, text in self._headers.items()
            if is_trusted and name.lower() not in job.forwarded
        }
        headers = {
            **own,
            **job.forwarded,
            "Content-Type": "application/json",
            "Content-Length": str(len(event)),
            "User-Agent": f"postback/{VERSION}",
            "Accept-Encoding": "identity",
            "webhook-id": job.id,
            "webhook-timestamp": str(int(timestamp.timestamp())),
            "webhook-attempt": str(job.attempts + 1),
            "webhook-attempt-max": str(job.resent_after + len(self._schedule) + 1),
        }
        if self._secrets:
            headers["webhook-signature"] = signatures.sign(
                self._secrets, webhook_id=job.id, timestamp=timestamp, body=event
            )
        request = requests.PreparedRequest()
        request.method, request.url, request.body = "POST", job.postback_url or self._url, event
        request.headers = headers  # type: ignore[assignment]  # a dict is copied much faster
        return request

    def _reason(self, exc: Exception) -> str:
        if isinstance(exc, TimeoutError):
            return f"no answer within {self._timeout_seconds:g} s"
        for kind, phrase in _PHRASES:
            if isinstance(exc, kind):
                return phrase.format(exc)[:200]
        return str(getattr(exc, "strerror", None) or type(exc).__name__)[:200]


def _is_success(status_code: int) -> bool:
    # Not Response.ok: requests calls every status below 400 ok, a redirect included.
    return 200 <= status_code < 300


def _fault(status_code: int) -> str | None:
    """Return what is wrong with a status; None when it means delivered."""
    if _is_success(status_code):
        return None
    # Our own words: the phrase of the answer is the receiver's.
    phrase = http.client.responses.get(status_code, "")
    redirect = ": redirects are not followed" if 300 <= status_code < 400 else ""
    return f"{status_code} {phrase}".strip() + redirect


def _is_final(status_code: int | None, headers: Mapping[str, str]) -> bool:
    return status_code == 410 or headers.get("webhook-delivery") == "abort-message"


def _retry_after(headers: Mapping[str, str], now: datetime) -> float | None:
    """Return the seconds a Retry-After asks for; None when there is none that makes sense."""
    text = headers.get("retry-after", "")
    if re.fullmatch(r"[0-9]+", text):
        return min(float(text), MAX_RETRY_AFTER_SECONDS)
    try:
        at = email.utils.parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    seconds = (at.replace(tzinfo=at.tzinfo or UTC) - now).total_seconds()
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_SECONDS)
