"""HTTP as raw bytes: what no proper client would send, and reading what comes back."""

import contextlib
import socket
import time
from http.client import parse_headers
from typing import Any

#: Seconds after which a server that neither answers nor closes counts as hanging.
PATIENCE_SECONDS = 3.0


@contextlib.contextmanager
def connected(service):
    """Yield a socket, and the stream of what comes back."""
    with open_socket(service) as conn, conn.makefile("rb") as stream:
        yield conn, stream


def open_socket(service, timeout: float = PATIENCE_SECONDS) -> socket.socket:
    """Return a connection to a service; it must be closed."""
    host, _, port = service.base_url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=timeout)


def answer(stream: Any) -> tuple[int, Any, bytes]:
    """Read one answer: its status, headers and body. (0, {}, b"") when the connection has ended."""
    try:
        words = stream.readline().split()
    except ConnectionResetError:
        words = []
    if not words:
        return 0, {}, b""
    headers = parse_headers(stream)
    return int(words[1]), headers, stream.read(int(headers.get("Content-Length", "0")))


def exchange(service, sent: bytes, *, finish: bool = False) -> tuple[int, Any, bytes]:
    """Send bytes on a connection of their own; return the first answer."""
    with connected(service) as (conn, stream):
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            conn.sendall(sent)
            if finish:
                conn.shutdown(socket.SHUT_WR)
        return answer(stream)


def status_code(service, sent: bytes, *, finish: bool = False) -> int:
    """Send bytes on a connection of their own; return the status of the first answer."""
    return exchange(service, sent, finish=finish)[0]


def get(path: str = "/livez") -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


def post(
    body: bytes = b'{"data": 1}',
    *,
    length: int | str | None = None,
    path: str = "/process",
    extra: str = "",
    media: str = "application/json",
) -> bytes:
    """Return a request; valid unless an argument says otherwise. `media` "" leaves the type out."""
    length = len(body) if length is None else length
    kind = f"Content-Type: {media}\r\n" if media else ""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\n{kind}Content-Length: {length}\r\n{extra}\r\n"
    return head.encode("latin-1") + body


def chunked(
    *chunks: bytes, end: bytes = b"0\r\n\r\n", extra: str = "", coding: str = "chunked"
) -> bytes:
    """Return a request in these chunks."""
    head = (
        "POST /process HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Transfer-Encoding: {coding}\r\n{extra}\r\n"
    )
    return head.encode() + b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + end


def padded(size: int) -> bytes:
    """Return a valid payload of as many bytes."""
    return b'{"data": "%s"}' % (b"x" * (size - 12))


def seconds(service, sent: bytes) -> float:
    """Return how long a request that is accepted, or answered 200, takes to its answer."""
    began = time.perf_counter()
    assert status_code(service, sent) == 200
    return time.perf_counter() - began
