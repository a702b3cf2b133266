"""One POST to a receiver, over in time: a transport of `requests`, on sockets of its own.

The timeouts of other transports are no deadline, since each counts from the last byte. Here each
wait gets what is left of one. An address is judged before it is connected to, by `web/outbound.py`.
Of an answer only status and headers are told; a short body is read so that the connection can serve
again. HTTP/1.1 as RFC 9112 has it, as far as a client needs that sends one kind of request.
"""

import contextlib
import functools
import http.client
import re
import select
import socket
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import requests

from jobs import errors
from web import outbound

#: The largest header of an answer, in bytes and in lines.
MAX_HEADER_BYTES = 64 * 1024
MAX_HEADER_LINES = 100

#: As much of a body is read, for as long, only to keep the connection.
MAX_BODY_BYTES = 4096
MAX_BODY_SECONDS = 1.0

#: Interim answers before the final one.
MAX_INTERIM = 100

#: Receivers to which connections are kept, and for how long: what lies between may forget one that
#: is silent, and tell nobody.
MAX_ORIGINS = 8
MAX_KEPT_SECONDS = 30.0

#: Up to this size an event is sent with its header, in one piece.
ONE_PIECE_BYTES = 64 * 1024

#: A wait may be as much longer or shorter than what is left.
SLACK_SECONDS = 0.01

_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})( [^\n]*)?\r?")
_BLANK_LINE = re.compile(rb"\r?\n\r?\n")


class Answer(requests.Response):
    """A status, and the headers by their names in lower case. Nothing else is told.

    So it makes no cookie jar and the like, as its base does for each.
    """

    def __init__(self, status_code: int, headers: Mapping[str, str]) -> None:
        self.status_code = status_code
        self.headers = headers  # type: ignore[assignment]


class Transport(requests.adapters.BaseAdapter):
    """Sends requests, from as many threads at once as there are, and keeps connections.

    Args:
        ca_path: The certificates to trust.
        public_only: Whether each address has to be a public one. Not for each request, as a
            connection that is kept is not judged again.
        resolve: From a host name to its addresses. May block, and may raise OSError.
    """

    def __init__(self, *, ca_path: str, public_only: bool, resolve: outbound.Resolve) -> None:
        super().__init__()
        self._ca_path = ca_path
        self._public_only = public_only
        self._resolve = resolve
        self._lock = threading.Lock()  # guards what follows
        # By receiver, used last is last; since when each is kept (monotonic).
        self._kept: dict[str, list[tuple[float, socket.socket]]] = {}
        self._closed = False

    def send(
        self, request: requests.PreparedRequest, *_: Any, timeout: Any = None, **__: Any
    ) -> Answer:
        """Send a request whose URL `outbound.parts` accepts; return its answer, without the body.

        Args:
            request: With a body of bytes, and all headers but Host.
            timeout: Seconds until the answer is here, whatever the receiver does.

        Raises:
            ReceiverRefusedError: An address is not public and has to be.
            OSError: No answer; TimeoutError when the time is over.
            HTTPException: What came is not HTTP.
            RuntimeError: The transport is closed.
        """
        if self._closed:
            raise RuntimeError("no attempt may begin any more: the service stops")
        deadline = time.monotonic() + timeout
        parts = outbound.parts(str(request.url))
        head = _head(parts, request.headers)
        body = request.body if isinstance(request.body, bytes) else b""
        connection = self._take(parts.origin) or self._connect(parts, deadline)
        try:
            answer, can_serve_again = _exchange(connection, head, body, deadline)
        except BaseException:
            connection.close()
            self._forget(parts.origin)
            raise
        if can_serve_again:
            self._keep(parts.origin, connection)
        else:
            connection.close()
        return answer

    def close(self) -> None:
        """Close the connections that are kept, and keep no more."""
        with self._lock:
            self._closed = True
            kept, self._kept = self._kept, {}
        for each in kept.values():
            _close_all(each)

    def _take(self, origin: str) -> socket.socket | None:
        """Return a kept connection on which nothing has happened, so that it still works."""
        while True:
            with self._lock:
                kept = self._kept.get(origin)
                if not kept:
                    return None
                since, connection = kept.pop()
            poller = select.poll()
            poller.register(connection, select.POLLIN)
            if time.monotonic() - since < MAX_KEPT_SECONDS and not poller.poll(0):
                return connection
            connection.close()

    def _keep(self, origin: str, connection: socket.socket) -> None:
        kept = (time.monotonic(), connection)
        dropped: Sequence[tuple[float, socket.socket]] = ()
        with self._lock:
            if self._closed:
                dropped = [kept]
            else:
                self._kept[origin] = [*self._kept.pop(origin, ()), kept]
                if len(self._kept) > MAX_ORIGINS:
                    dropped = self._kept.pop(next(iter(self._kept)))
        _close_all(dropped)

    def _forget(self, origin: str) -> None:
        """Close what is kept to a receiver: one that failed may have siblings that are dead, too.

        Or each of the next attempts would be wasted on one of them.
        """
        with self._lock:
            kept = self._kept.pop(origin, [])
        _close_all(kept)

    def _connect(self, parts: outbound.Parts, deadline: float) -> socket.socket:
        """Connect to the first address of a host that answers."""
        addresses = self._addresses(parts.host, deadline)
        failure = OSError(0, "the name has no address")
        for left, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
            # A fair share of the time for each, so that one that is silent leaves some.
            share_seconds = _seconds_left(deadline) / left
            try:
                connection = socket.create_connection((address, parts.port), share_seconds)
            except OSError as exc:
                failure = exc
            else:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return self._secured(connection, parts, deadline)
        raise failure

    def _secured(
        self, connection: socket.socket, parts: outbound.Parts, deadline: float
    ) -> socket.socket:
        if parts.scheme == "http":
            return connection
        try:
            connection.settimeout(_seconds_left(deadline))
            # By the name, not the address, the certificate is checked.
            name = parts.host.strip("[]").rstrip(".")
            return tls_context(self._ca_path).wrap_socket(connection, server_hostname=name)
        except BaseException:
            connection.close()
            raise

    def _addresses(self, host: str, deadline: float) -> Sequence[str]:
        addresses = (
            [host.strip("[]")]
            if outbound.is_address(host)
            else _look_up(self._resolve, host, deadline)
        )
        if self._public_only and not all(map(outbound.is_public, addresses)):
            raise errors.ReceiverRefusedError(f"the address of {host} is not public")
        return addresses


@functools.cache
def tls_context(ca_path: str) -> ssl.SSLContext:
    """Return what checks certificates and names against this CA bundle alone.

    Made once, since reading a bundle takes 20 ms; by hand, since the default context obeys
    environment variables.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(ca_path)
    return context


def _head(parts: outbound.Parts, headers: Mapping[str, str]) -> bytes:
    if not all(map(str.isprintable, headers.values())):
        raise ValueError("a header holds what cannot be printed")
    lines = "".join([f"{name}: {text}\r\n" for name, text in headers.items()])
    return f"POST {parts.target or '/'} HTTP/1.1\r\nHost: {parts.authority}\r\n{lines}\r\n".encode(
        "ascii"
    )


def _exchange(
    connection: socket.socket, head: bytes, body: bytes, deadline: float
) -> tuple[Answer, bool]:
    """Send and receive; return the answer, and whether the connection can serve again."""
    reader = _Reader(connection, deadline)
    try:
        _limit(connection, deadline)
        if len(body) <= ONE_PIECE_BYTES:
            connection.sendall(head + body)
        else:
            connection.sendall(head)
            _limit(connection, deadline)
            connection.sendall(body)
    except (BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):
        pass  # it may have answered before it had read all
    answer, version = reader.answer()
    is_success = 200 <= answer.status_code < 300  # what counts is said in postback.py
    return answer, is_success and reader.drain(answer, version)


class _Reader:
    """Reads one answer. Each wait gets what is left until the deadline."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._connection = connection
        self._deadline = deadline
        self._buffer = b""

    def answer(self) -> tuple[Answer, int]:
        """Return the final status and its headers, and the minor version of HTTP."""
        for _ in range(MAX_INTERIM + 1):
            answer, version = _parsed(self._block())
            if answer.status_code >= 200:  # else it is an interim one (RFC 9110, section 15.2)
                return answer, version
        raise http.client.HTTPException("too many interim answers")

    def drain(self, answer: Answer, version: int) -> bool:
        """Read what is left of a short answer; return whether that was all of it.

        Whatever happens here, the answer came: a failure must not undo a delivery.
        """
        asked = answer.headers.get("connection", "keep-alive" if version else "close").lower()
        if "close" in asked:
            return False
        self._deadline = min(self._deadline, time.monotonic() + MAX_BODY_SECONDS)
        try:
            default = "0" if answer.status_code == 204 else f"{MAX_BODY_BYTES + 1}"
            length = answer.headers.get("content-length", default)
            if "transfer-encoding" not in answer.headers:
                self._skip(_number(length, 10))
            elif "content-length" in answer.headers:  # two ways to read it: RFC 9112, section 6.3
                return False
            else:
                self._skip_chunks()
        except (OSError, ValueError, http.client.HTTPException):
            return False
        return not self._buffer

    def _block(self) -> bytes:
        """Return what comes before the next blank line."""
        start = 0
        while not (found := _BLANK_LINE.search(self._buffer, start)):
            if len(self._buffer) > MAX_HEADER_BYTES:
                raise http.client.LineTooLong("header")
            start = max(0, len(self._buffer) - 3)
            self._receive()
        if found.start() > MAX_HEADER_BYTES:
            raise http.client.LineTooLong("header")
        block, self._buffer = self._buffer[: found.start()], self._buffer[found.end() :]
        return block

    def _skip_chunks(self) -> None:
        left = MAX_BODY_BYTES
        while left > 0:
            while b"\n" not in self._buffer:
                if len(self._buffer) > MAX_BODY_BYTES:
                    raise ValueError("too much to read")
                self._receive()
            line, _, self._buffer = self._buffer.partition(b"\n")
            size = _number(line.partition(b";")[0].decode("latin-1").strip(), 16)
            self._skip(size + 2)  # and the end of its line; trailers are not read
            if not size:
                return
            left -= len(line) + size
        raise ValueError("too much to read")

    def _skip(self, size: int) -> None:
        if size > MAX_BODY_BYTES:
            raise ValueError("too much to read")
        while len(self._buffer) < size:
            self._receive()
        self._buffer = self._buffer[size:]

    def _receive(self) -> None:
        _limit(self._connection, self._deadline)
        received = self._connection.recv(MAX_HEADER_BYTES)
        if not received and not self._buffer:
            raise http.client.RemoteDisconnected("closed without an answer")
        if not received:
            raise http.client.HTTPException("closed within the answer")
        self._buffer += received


def _parsed(block: bytes) -> tuple[Answer, int]:
    """Return the answer that a header tells, and the minor version of HTTP."""
    first, *lines = block.split(b"\n")
    found = _STATUS_LINE.fullmatch(first)
    if not found or len(lines) > MAX_HEADER_LINES:
        raise http.client.BadStatusLine(repr(first[:80]))
    headers: dict[str, str] = {}
    for name, text in map(_field, lines):  # RFC 9110, section 5.3
        headers[name] = f"{headers[name]}, {text}" if name in headers else text
    return Answer(int(found[2]), headers), int(found[1])


def _field(line: bytes) -> tuple[str, str]:
    name, _, text = line.decode("latin-1").partition(":")
    return name.lower(), text.strip()


def _number(text: str, base: int) -> int:
    """Return a number of digits alone; int() takes signs, blanks and underscores, too."""
    if not text.isalnum():
        raise ValueError("no number")
    return int(text, base)


def _limit(connection: socket.socket, deadline: float) -> None:
    """Give the next wait what is left, nearly: each change asks the system."""
    left = _seconds_left(deadline)
    if abs((connection.gettimeout() or 0.0) - left) > SLACK_SECONDS:
        connection.settimeout(left)


def _seconds_left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the deadline of the attempt has passed")
    return left


def _look_up(resolve: outbound.Resolve, host: str, deadline: float) -> Sequence[str]:
    """Resolve in a thread that can be left behind: getaddrinfo cannot be interrupted."""
    found: list[Sequence[str] | Exception] = []
    thread = threading.Thread(
        target=_answer, args=(resolve, host, found), name="resolve", daemon=True
    )
    thread.start()
    thread.join(_seconds_left(deadline))
    if not found:
        raise TimeoutError("the name was not resolved in time")
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def _answer(resolve: outbound.Resolve, host: str, found: list[Sequence[str] | Exception]) -> None:
    """Put into `found` what the look-up gives, whatever it is."""
    try:
        found.append(resolve(host))
    except Exception as exc:  # noqa: BLE001 - raised again where it is awaited
        found.append(exc)


def _close_all(kept: Sequence[tuple[float, socket.socket]]) -> None:
    for _, connection in kept:
        with contextlib.suppress(OSError):
            connection.close()
