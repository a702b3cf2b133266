"""A raw HTTP body into a checked payload, strictly: nothing checked here is checked again.

It alone parses the JSON of requests. waitress has received the body when it is called, and has
checked its Content-Length. Whatever was sent, nothing but `errors.Refusal` is raised:

* The body is within the limit, and is application/json in UTF-8 without a Content-Encoding. A
  charset has no meaning (RFC 8259, section 11).
* The JSON means the same to every parser: no duplicate keys, no NaN, no number beyond the range of
  a float, no very long integers, no half surrogate pairs, a bounded depth.
* The payload has `data`, perhaps `postback_url` and `metadata`, and no other field.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

from jobs import errors, worker

#: Levels of arrays and objects allowed in the value under "data".
MAX_DEPTH = 64

#: Characters of an integer, its minus sign included: int() takes quadratic time on long ones.
MAX_INTEGER_LENGTH = 40

#: Bytes of the metadata as compact JSON in UTF-8.
MAX_METADATA_BYTES = 4096

#: The headers that travel with the job.
FORWARDED = ("traceparent", "tracestate", "x-request-id")

_FIELDS = ("data", "postback_url", "metadata")
_FORWARDED_KEYS = {f"HTTP_{name.upper().replace('-', '_')}": name for name in FORWARDED}

# A quoted string that is not closed ends with the header, which keeps the search linear.
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"?')
_BEARER = re.compile(r"bearer +([!-~]+)", re.IGNORECASE)
# A string of RFC 8941, section 3.3.3, or bare text.
_KEY = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\])*)"|([!#-~][ -~]*)')
_FORWARDABLE = re.compile(r"[!-~][ -~]{0,511}")
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


class Payload(NamedTuple):
    """What a caller sent to `POST /process`, checked.

    Attributes:
        body: The bytes as they came. The journal stores these.
        postback_url: As it came; whether it is allowed is decided elsewhere. None: the default.
        metadata: The caller's own object; None when absent.
        idempotency_key: Without its quotes.
        forwarded: The headers that travel with the job, by their names in lower case.
    """

    body: bytes
    postback_url: str | None
    metadata: dict[str, Any] | None
    idempotency_key: str | None
    forwarded: Mapping[str, str]


def read_payload(environ: Mapping[str, Any], *, max_bytes: int) -> Payload:
    """Read and check one request: size, type, JSON, fields, headers, in this order.

    Raises:
        Refusal: The detail says what was wrong and what would be right.
    """
    hint = "The operator can raise the limit, MAX_BODY."
    body = read_body(environ, max_bytes=max_bytes, hint=hint)
    fields = parse(body, max_depth=MAX_DEPTH + 1)  # the payload's own braces are a level
    if not isinstance(fields, dict):
        raise errors.invalid('The body is not a JSON object; send {"data": ...}.')
    if problems := list(_problems(fields)):
        raise errors.invalid(" ".join(problems))
    return Payload(
        body=body,
        postback_url=fields.get("postback_url"),
        metadata=fields.get("metadata"),
        idempotency_key=_idempotency_key(environ),
        forwarded=_forwarded(environ),
    )


def read_body(environ: Mapping[str, Any], *, max_bytes: int, hint: str = "") -> bytes:
    """Return the body of a JSON request. Length and type are checked before it is read.

    Args:
        environ: The request.
        max_bytes: The largest body.
        hint: Is said about that limit.

    Raises:
        Refusal: Also for an empty body.
    """
    if "CONTENT_LENGTH" not in environ:
        detail = "The length is not known; send a Content-Length."
        raise errors.Refusal(411, "Length required", detail)
    length = int(environ["CONTENT_LENGTH"])
    if length > max_bytes:
        detail = f"The body is larger than {max_bytes} bytes; send less. {hint}".rstrip()
        raise errors.Refusal(413, "Body too large", detail)
    if not length:
        raise errors.invalid('The body is empty; send JSON such as {"data": 1}.')
    _check_type(environ)
    return bytes(environ["wsgi.input"].read())


def parse(body: bytes, *, max_depth: int) -> Any:
    """Return the value of a JSON text. Refuse what two parsers could read differently.

    Args:
        body: UTF-8, without a byte order mark.
        max_depth: Levels of arrays and objects allowed in the whole text.

    Raises:
        Refusal: With the position, if the syntax is wrong.
    """
    try:
        value = _DECODER.decode(body.decode())
    except ValueError as exc:
        raise errors.invalid(f"The body is not valid JSON in UTF-8: {exc}.") from exc
    except RecursionError:
        _refuse_depth(max_depth)
    # Counting brackets costs far less than walking the value, and is mostly enough.
    if body.count(b"[") + body.count(b"{") > max_depth and not worker.is_sound(value, max_depth):
        _refuse_depth(max_depth)
    if _SURROGATE_ESCAPE.search(body):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as exc:  # there is no UTF-8 for it (RFC 3629)
            detail = "A \\u escape is half of a surrogate pair; send both halves."
            raise errors.invalid(detail) from exc
    return value


def prefers_async(environ: Mapping[str, Any]) -> bool:
    """Return whether the caller asks for a 202: `Prefer: respond-async` (RFC 7240)."""
    preferences = _QUOTED.sub("", environ.get("HTTP_PREFER", "")).lower().split(",")
    return any(each.partition(";")[0].strip() == "respond-async" for each in preferences)


def bearer_token(environ: Mapping[str, Any]) -> str | None:
    """Return the token of `Authorization: Bearer` (RFC 6750), printable ASCII, or None."""
    found = _BEARER.fullmatch(environ.get("HTTP_AUTHORIZATION", "").strip(" \t"))
    return found[1] if found else None


def _check_type(environ: Mapping[str, Any]) -> None:
    header, encoding = environ.get("CONTENT_TYPE", ""), environ.get("HTTP_CONTENT_ENCODING", "")
    detail = ""
    if header.partition(";")[0].strip().lower() != "application/json":
        detail = f"Content-Type is {_shown(header)}; send application/json."
    elif encoding.strip().lower() not in ("", "identity"):
        detail = f"Content-Encoding is {_shown(encoding)}; send the body without an encoding."
    if detail:
        raise errors.Refusal(415, "Unsupported media type", detail)


def _problems(fields: dict[str, Any]) -> Iterator[str]:
    if fields.get("data") in (None, "", [], {}):  # 0 and false are data
        yield 'Missing data: send "data" with a value that is not null, "", [] or {}.'
    unknown = next((name for name in fields if name not in _FIELDS), None)
    if unknown is not None:
        yield f'Unknown field {_shown(unknown)}; send only "data", "postback_url" and "metadata".'
    if not isinstance(fields.get("postback_url", ""), str):
        yield "postback_url is not a string; send a URL, or leave it out."
    metadata = fields.get("metadata", {})
    if not isinstance(metadata, dict):
        yield 'metadata is not an object; send one such as {"order": 17}, or leave it out.'
    elif metadata and (size := len(_compact(metadata))) > MAX_METADATA_BYTES:
        yield f"metadata has {size} bytes as compact JSON; send at most {MAX_METADATA_BYTES}."


def _compact(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _idempotency_key(environ: Mapping[str, Any]) -> str | None:
    header = environ.get("HTTP_IDEMPOTENCY_KEY")
    if header is None:
        return None
    found = _KEY.fullmatch(header.strip(" \t"))
    key = (found[2] or re.sub(r"\\(.)", r"\1", found[1])) if found else ""
    if not 1 <= len(key) <= 255:
        rule = "send 1 to 255 printable ASCII characters."
        raise errors.invalid(f"Idempotency-Key is {_shown(header)}; {rule}")
    return key


def _forwarded(environ: Mapping[str, Any]) -> dict[str, str]:
    """Return those that can be sent on as they are. A header for tracing refuses no job."""
    given = {name: environ[key] for key, name in _FORWARDED_KEYS.items() if key in environ}
    return {name: value for name, value in given.items() if _FORWARDABLE.fullmatch(value)}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        ((name, count),) = Counter(name for name, _ in pairs).most_common(1)
        raise errors.invalid(f"An object has the key {_shown(name)} {count} times; send it once.")
    return fields


def _integer(digits: str) -> int:
    if len(digits) > MAX_INTEGER_LENGTH:
        limit = f"send at most {MAX_INTEGER_LENGTH}."
        raise errors.invalid(f"An integer has {len(digits)} characters; {limit}")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise errors.invalid(f"{_shown(digits)} is too large; send at most 1.79e308.")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise errors.invalid(f"{name} is not JSON; send null or a string instead.")


def _refuse_depth(max_depth: int) -> NoReturn:
    raise errors.invalid(f"The JSON is nested too deeply; send at most {max_depth} levels.")


def _shown(text: str) -> str:
    """Shorten what a caller chose, and escape what a terminal would obey."""
    return repr(text[:64])


# Made once, because json.loads() with hooks makes a decoder for each call. It has no state.
_DECODER = json.JSONDecoder(
    object_pairs_hook=_object,
    parse_int=_integer,
    parse_float=_finite,
    parse_constant=_refuse_constant,
)
