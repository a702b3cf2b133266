"""A raw HTTP body into a checked payload, strictly: what passes here is never checked again.

It alone parses the JSON of requests. It reads the WSGI environ, so no server and no framework can
soften a rule, and whatever was sent it raises nothing but a `RequestError`:

* the body is read whole and never past the limit; it is application/json in UTF-8, not encoded
  (a charset beside the type means nothing, RFC 8259 section 11);
* the JSON means the same to every parser: no duplicate keys, no NaN, no number beyond a float's
  range or of more digits than anyone reads, no half characters, a bounded depth;
* the payload has `data`, perhaps `postback_url`, and nothing else.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

from jobs import errors, model

#: Levels of arrays and objects allowed in the value under "data".
MAX_DEPTH = 64

#: Characters of an integer, its minus sign included: int() takes quadratic time on long ones.
MAX_INTEGER_LENGTH = 40

#: The headers that travel with the job.
FORWARDED = ("traceparent", "tracestate", "x-request-id")

_FORWARDED_KEYS = {f"HTTP_{name.upper().replace('-', '_')}": name for name in FORWARDED}

# A quoted string that nobody closes ends with the header: that keeps the search linear.
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"?')
_BEARER = re.compile(r"bearer +([!-~]+)", re.IGNORECASE)
# A string of RFC 8941, section 3.3.3, or bare text.
_KEY = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\])*)"|([!#-~][ -~]*)')
_FORWARDABLE = re.compile(r"[!-~][ -~]{0,511}")


class Payload(NamedTuple):
    """What a caller sent to `POST /process`, checked.

    Attributes:
        body: The bytes as they came; the journal keeps these.
        data: The value under "data".
        postback_url: As it came; whether it is allowed is decided elsewhere. None: the default.
        idempotency_key: Without its quotes.
        forwarded: The headers that travel with the job, by their names in lower case.
    """

    body: bytes
    data: Any
    postback_url: str | None
    idempotency_key: str | None
    forwarded: Mapping[str, str]


def read_payload(environ: Mapping[str, Any], *, max_bytes: int) -> Payload:
    """Read and check one request: size, type, JSON, fields, headers, in this order.

    Raises:
        RequestError: The message says what was wrong and what would be right.
    """
    body = read_body(environ, max_bytes=max_bytes)
    fields = parse(body, max_depth=MAX_DEPTH + 1)  # the payload's own braces are a level
    _check_fields(fields)
    return Payload(
        body=body,
        data=fields["data"],
        postback_url=fields.get("postback_url"),
        idempotency_key=_idempotency_key(environ),
        forwarded=_forwarded(environ),
    )


def read_body(environ: Mapping[str, Any], *, max_bytes: int) -> bytes:
    """Return the body of a JSON request, whole; length and type are checked before it is read.

    Raises:
        RequestError: Also for a body that is empty or ends early.
    """
    length = _declared_length(environ, max_bytes)
    _check_type(environ)
    body = _read(environ, max_bytes + 1 if length is None else length)
    if length is not None and len(body) < length:
        raise errors.MalformedError(
            f"The body ended after {len(body)} of {length} bytes; send what Content-Length says."
        )
    _check_size(len(body), max_bytes)
    return body


def parse(body: bytes, *, max_depth: int) -> Any:
    """Return the value of a JSON text, refusing what two parsers could read differently.

    Args:
        body: UTF-8, without a byte order mark.
        max_depth: Levels of arrays and objects allowed in the whole text.

    Raises:
        MalformedError: With the position, if the syntax is wrong.
    """
    text = _decode(body)
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as exc:
        raise errors.MalformedError(f"The body is not valid JSON: {exc}.") from exc
    except RecursionError:
        _refuse_depth(max_depth)
    # To count brackets costs far less than to walk the value, and is mostly enough.
    if body.count(b"[") + body.count(b"{") > max_depth and model.depth_of(value) > max_depth:
        _refuse_depth(max_depth)
    if model.has_lone_surrogate(value, text):
        raise errors.MalformedError("A \\u escape is half of a pair; send both halves.")
    return value


def prefers_async(environ: Mapping[str, Any]) -> bool:
    """Tell whether the caller asks for a 202: `Prefer: respond-async` (RFC 7240)."""
    preferences = _QUOTED.sub("", environ.get("HTTP_PREFER", "")).lower().split(",")
    return any(each.partition(";")[0].strip() == "respond-async" for each in preferences)


def bearer_token(environ: Mapping[str, Any]) -> str | None:
    """Return the token of `Authorization: Bearer` (RFC 6750), printable ASCII, or None."""
    found = _BEARER.fullmatch(environ.get("HTTP_AUTHORIZATION", "").strip(" \t"))
    return found[1] if found else None


def _declared_length(environ: Mapping[str, Any], max_bytes: int) -> int | None:
    """Return the Content-Length, or None for an input that ends by itself."""
    chunked = "HTTP_TRANSFER_ENCODING" in environ
    if chunked and environ.get("wsgi.input_terminated"):
        return None
    header = environ.get("CONTENT_LENGTH", "")
    if chunked or not header:
        raise errors.LengthRequiredError("The length is not known; send a Content-Length.")
    if not re.fullmatch("[0-9]+", header):
        raise errors.MalformedError(f"Content-Length is {_shown(header)}; send digits only.")
    # More digits are over every limit, and int() itself fails on 4,301.
    length = int(header) if len(header) <= 18 else max_bytes + 1
    _check_size(length, max_bytes)
    return length


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise errors.TooLargeError(f"The body is too large; send at most {max_bytes} bytes.")
    if not size:
        raise errors.MalformedError('The body is empty; send JSON such as {"data": 1}.')


def _check_type(environ: Mapping[str, Any]) -> None:
    header = environ.get("CONTENT_TYPE", "")
    if header.partition(";")[0].strip().lower() != "application/json":
        raise errors.MediaTypeError(f"Content-Type is {_shown(header)}; send application/json.")
    encoding = environ.get("HTTP_CONTENT_ENCODING", "")
    if encoding.strip().lower() not in ("", "identity"):
        raise errors.MediaTypeError(f"Content-Encoding is {_shown(encoding)}; send it unencoded.")


def _read(environ: Mapping[str, Any], limit: int) -> bytes:
    """Read up to `limit` bytes; fewer only when the input ends before."""
    chunks = []
    missing = limit
    try:
        while missing and (chunk := environ["wsgi.input"].read(missing)):
            chunks.append(chunk)
            missing -= len(chunk)
    except Exception as exc:  # each server raises what it likes
        raise errors.MalformedError("The body could not be read; send it again, whole.") from exc
    return b"".join(chunks)


def _decode(body: bytes) -> str:
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise errors.MalformedError(
            f"The body is not UTF-8 at byte {exc.start} (0x{body[exc.start]:02x}); send UTF-8."
        ) from exc
    if text.startswith("\ufeff"):
        raise errors.MalformedError("The body starts with a byte order mark; send it without.")
    return text


def _check_fields(fields: Any) -> None:
    if not isinstance(fields, dict):
        raise errors.MalformedError('The body is not a JSON object; send {"data": …}.')
    if problems := list(_problems(fields)):
        raise errors.MalformedError(" ".join(problems))


def _problems(fields: dict[str, Any]) -> Iterator[str]:
    if fields.get("data") in (None, "", [], {}):  # 0 and false are data
        yield 'Missing data: send "data" with a value that is not null, "", [] or {}.'
    unknown = next((name for name in fields if name not in ("data", "postback_url")), None)
    if unknown is not None:
        yield f'Unknown field {_shown(unknown)}; send only "data" and "postback_url".'
    if not isinstance(fields.get("postback_url", ""), str):
        yield "postback_url is not a string; send a URL, or leave it out."


def _idempotency_key(environ: Mapping[str, Any]) -> str | None:
    header = environ.get("HTTP_IDEMPOTENCY_KEY")
    if header is None:
        return None
    found = _KEY.fullmatch(header.strip(" \t"))
    key = (found[2] or re.sub(r"\\(.)", r"\1", found[1])) if found else ""
    if not 1 <= len(key) <= 255:
        raise errors.MalformedError(
            f"Idempotency-Key is {_shown(header)}; send 1 to 255 printable ASCII characters."
        )
    return key


def _forwarded(environ: Mapping[str, Any]) -> dict[str, str]:
    """Keep what can be sent on as it is: no header that only traces a job refuses it."""
    given = {name: environ[key] for key, name in _FORWARDED_KEYS.items() if key in environ}
    return {name: value for name, value in given.items() if _FORWARDABLE.fullmatch(value)}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        ((name, count),) = Counter(name for name, _ in pairs).most_common(1)
        raise errors.MalformedError(f"An object has the key {_shown(name)} {count} times; send 1.")
    return fields


def _integer(digits: str) -> int:
    if len(digits) > MAX_INTEGER_LENGTH:
        raise errors.MalformedError(
            f"An integer has {len(digits)} characters; send at most {MAX_INTEGER_LENGTH}."
        )
    return int(digits)


def finite(digits: str) -> float:
    """Return a number of JSON; refuse one beyond the range of a float."""
    number = float(digits)
    if math.isinf(number):
        raise errors.MalformedError(f"{_shown(digits)} is too large; send at most 1.79e308.")
    return number


def refuse_constant(name: str) -> NoReturn:
    """Refuse NaN and Infinity, which Python takes for JSON."""
    raise errors.MalformedError(f"{name} is not JSON; send null or a string instead.")


def _refuse_depth(max_depth: int) -> NoReturn:
    raise errors.MalformedError(f"The JSON is nested too deeply; send at most {max_depth} levels.")


def _shown(text: str) -> str:
    """Shorten what a caller chose, and escape what a terminal would obey."""
    return repr(text[:64])


# Made once: json.loads() with hooks makes a decoder for each call. It keeps nothing between calls.
_DECODER = json.JSONDecoder(
    object_pairs_hook=_object,
    parse_int=_integer,
    parse_float=finite,
    parse_constant=refuse_constant,
)
