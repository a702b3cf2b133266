"""Signatures of the Standard Webhooks kind: making them, verifying them, and the secrets for them.

What is signed is `id.timestamp.body`, the raw bytes, never a document that was parsed and written
again. `python -m web.signatures <origin>` prints the secret of a receiver.
"""

import base64
import hashlib
import hmac
import itertools
import os
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from jobs import errors
from web import outbound

#: How far a timestamp may be off, in seconds, either way.
TOLERANCE_SECONDS = 300

#: The headers that a signature needs.
HEADERS = ("webhook-id", "webhook-timestamp", "webhook-signature")

_PREFIX = "whsec_"
_MAKE = (
    "python3 -c 'import base64, secrets; "
    'print("whsec_" + base64.b64encode(secrets.token_bytes(32)).decode())\''
)
_TIMESTAMP = re.compile(r"[0-9]{1,12}")


def read_secrets(text: str) -> tuple[str, ...]:
    """Return the secrets in a text, separated by spaces.

    Raises:
        ValueError: One is not fit to sign with. The message does not contain it.
    """
    secrets = tuple(text.split())
    try:
        is_fit = all(one.startswith(_PREFIX) and 24 <= len(_key(one)) <= 64 for one in secrets)
    except ValueError:
        is_fit = False
    if not is_fit or (text and not secrets):
        expected = "expected whsec_ followed by the base64 of 24 to 64 random bytes"
        raise ValueError(f"{expected}. To make one: {_MAKE}")
    return secrets


def secret_for(secret: str, origin: str) -> str:
    """Return the secret that is shared with one receiver only, derived from ours.

    Args:
        secret: As `read_secrets` returns it.
        origin: As `outbound.Parts.origin` writes it.
    """
    digest = hmac.digest(_key(secret), origin.encode(), hashlib.sha256)
    return _PREFIX + base64.b64encode(digest).decode()


def sign(secrets: Sequence[str], *, webhook_id: str, timestamp: datetime, body: bytes) -> str:
    """Return the value of `webhook-signature`: one signature for each secret.

    Args:
        secrets: As `read_secrets` returns them. More than one while they are rotated.
        webhook_id: Contains no ".".
        timestamp: An aware instant, of which the whole seconds are signed.
        body: What is sent, byte for byte.
    """
    seconds = str(int(timestamp.timestamp()))
    return " ".join(_signature(secret, webhook_id, seconds, body) for secret in secrets)


def verify(
    secrets: Sequence[str], headers: Mapping[str, str], body: bytes, *, now: datetime
) -> None:
    """Accept a body that was signed with one of the secrets. Headers may contain any text.

    Args:
        secrets: One match is enough. Without a secret nothing is accepted.
        headers: Their names are in lower case.
        body: What was received, byte for byte.
        now: An aware instant, to compare the timestamp with.

    Raises:
        Refusal: 401 if the id or the signature is missing, or if no signature is right. 400 if the
            timestamp is not a number of seconds, or too far off.
    """
    webhook_id, seconds, given = (headers.get(name, "") for name in HEADERS)
    if not webhook_id or not given:
        raise _unauthorized("The headers webhook-id and webhook-signature are needed.")
    if not _TIMESTAMP.fullmatch(seconds):
        raise errors.invalid("webhook-timestamp must be a whole number of Unix seconds.")
    if abs(now.timestamp() - int(seconds)) > TOLERANCE_SECONDS:
        limit = f"more than {TOLERANCE_SECONDS} s off"
        raise errors.invalid(f"webhook-timestamp is {limit}. Sign with the current time.")
    # As bytes: compare_digest refuses text that is not ASCII.
    candidates = given.encode("utf-8", "surrogatepass").split(b" ")
    expected = [_signature(secret, webhook_id, seconds, body).encode() for secret in secrets]
    if not any(hmac.compare_digest(*pair) for pair in itertools.product(candidates, expected)):
        raise _unauthorized("webhook-signature does not fit the body and the secret.")


def main() -> None:
    """Print the secrets of the receiver whose origin is the only argument, one a line."""
    if len(sys.argv) != 2:
        sys.exit("usage: ./run secret <origin>, such as https://example.com:8443")
    path = os.environ.get("POSTBACK_SECRET_FILE")
    try:
        origin = outbound.parts(sys.argv[1]).origin
        text = Path(path).read_text("utf-8") if path else os.environ.get("POSTBACK_SECRET", "")
        secrets = read_secrets(text)
    except (errors.Refusal, OSError, ValueError) as exc:
        sys.exit(f"No secret: {exc}")
    if not secrets:
        sys.exit("Set POSTBACK_SECRET or POSTBACK_SECRET_FILE to the same value as the service.")
    print(f"Used where a caller names {origin} in postback_url:", file=sys.stderr)
    print(*(secret_for(secret, origin) for secret in secrets), sep="\n")


def _key(secret: str) -> bytes:
    return base64.b64decode(secret.removeprefix(_PREFIX), validate=True)


def _signature(secret: str, webhook_id: str, seconds: str, body: bytes) -> str:
    signed = b".".join((webhook_id.encode("utf-8", "surrogatepass"), seconds.encode(), body))
    digest = hmac.digest(_key(secret), signed, hashlib.sha256)
    return "v1," + base64.b64encode(digest).decode()


def _unauthorized(detail: str) -> errors.Refusal:
    return errors.Refusal(401, "Unauthorized", detail)


if __name__ == "__main__":
    main()
