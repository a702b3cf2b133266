"""Signatures of the Standard Webhooks kind: making them, and checking them without ever failing.

Signed is `id.timestamp.body`, the raw bytes; never a document that was parsed and written again.
The library's own `verify` raises errors of many kinds for garbage and its `sign` needs text, so
only its HMAC is used.
"""

import base64
import hmac
import re
from collections.abc import Mapping, Sequence
from datetime import datetime

from standardwebhooks.webhooks import hmac_data

from jobs import errors

#: How far a timestamp may be off, in seconds, either way.
TOLERANCE_SECONDS = 300

#: The headers that a signature needs.
HEADERS = ("webhook-id", "webhook-timestamp", "webhook-signature")

_PREFIX = "whsec_"
_TIMESTAMP = re.compile(r"[0-9]{1,12}")


def read_secrets(text: str) -> tuple[str, ...]:
    """Return the secrets of a text, separated by blanks, each fit to sign with.

    Raises:
        ValueError: One is not; the message says what would be right and keeps it to itself.
    """
    secrets = tuple(text.split())
    if (text and not secrets) or not all(map(_is_fit, secrets)):
        raise ValueError("expected whsec_ followed by the base64 of 24 to 64 random bytes")
    return secrets


def sign(secrets: Sequence[str], *, webhook_id: str, timestamp: datetime, body: bytes) -> str:
    """Return the value of `webhook-signature`: one signature for each secret.

    Args:
        secrets: As `read_secrets` returns them; more than one while they are rotated.
        webhook_id: Contains no ".".
        timestamp: An aware instant; whole seconds of it are signed.
        body: What is sent, byte for byte.
    """
    seconds = str(int(timestamp.timestamp()))
    return " ".join(_signature(secret, webhook_id, seconds, body) for secret in secrets)


def verify(
    secrets: Sequence[str], headers: Mapping[str, str], body: bytes, *, now: datetime
) -> None:
    """Accept a body that one of the secrets has signed; headers full of garbage are no exception.

    Args:
        secrets: One match is enough; without a secret nothing is accepted.
        headers: Their names in lower case.
        body: What was received, byte for byte.
        now: An aware instant, to judge the timestamp by.

    Raises:
        UnauthorizedError: The id or the signature is missing, or no signature fits.
        MalformedError: The timestamp is no number of seconds, or is off by more than the tolerance.
    """
    webhook_id = headers.get("webhook-id", "")
    given = headers.get("webhook-signature", "")
    if not webhook_id or not given:
        raise errors.UnauthorizedError("The headers webhook-id and webhook-signature are needed.")
    seconds = _fresh(headers.get("webhook-timestamp", ""), now)
    expected = [_signature(secret, webhook_id, seconds, body).encode() for secret in secrets]
    if not any(_matches(one, expected) for one in given.split(" ")):
        raise errors.UnauthorizedError("webhook-signature does not fit the body and the secret.")


def _is_fit(secret: str) -> bool:
    try:
        key = base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
    except ValueError:
        return False
    return secret.startswith(_PREFIX) and 24 <= len(key) <= 64


def _fresh(seconds: str, now: datetime) -> str:
    if not _TIMESTAMP.fullmatch(seconds):
        raise errors.MalformedError("webhook-timestamp must be a whole number of Unix seconds.")
    if abs(now.timestamp() - int(seconds)) > TOLERANCE_SECONDS:
        raise errors.MalformedError(
            f"webhook-timestamp is more than {TOLERANCE_SECONDS} s off; send it with a new one."
        )
    return seconds


def _matches(given: str, expected: Sequence[bytes]) -> bool:
    # As bytes: compare_digest refuses text that is not ASCII.
    candidate = given.encode("utf-8", "surrogatepass")
    return any(hmac.compare_digest(candidate, one) for one in expected)


def _signature(secret: str, webhook_id: str, seconds: str, body: bytes) -> str:
    key = base64.b64decode(secret.removeprefix(_PREFIX))
    signed = b".".join((webhook_id.encode("utf-8", "surrogatepass"), seconds.encode(), body))
    return "v1," + base64.b64encode(hmac_data(key, signed)).decode()
