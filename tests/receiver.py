"""A scripted receiver on 127.0.0.1: a thread for each connection, raw sockets, every misbehaviour.

An answer is an int (that status, the connection kept), bytes (sent as they are, then the
connection is closed) or a function of the connection and the request, which may do as it likes
and returns one of those, or None to close.
"""

import contextlib
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Self

#: What a behaviour is: a function of the connection and the request.
Behaviour = Callable[[socket.socket, "Recorded"], "int | bytes | None"]
Answer = int | bytes | Behaviour


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """One request, as it was received.

    Attributes:
        headers: Their names in lower case; of a repeated one the last.
        received_at: By time.monotonic.
        connection: Counts from 1, in the order in which they were opened.
    """

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    received_at: float
    connection: int


class Receiver:
    """Records each request, then gives the next of its answers, and in the end the default.

    Args:
        answers: One for each request; the attribute may be replaced at any time.
        default: For every request after those.
        tls: Makes it an https server.
        port: 0 takes a free one.
        greeting: Is called with each connection before anything is read or encrypted.
    """

    def __init__(
        self,
        answers: Iterable[Answer] = (),
        *,
        default: Answer = 204,
        tls: ssl.SSLContext | None = None,
        port: int = 0,
        greeting: Callable[[socket.socket], object] | None = None,
    ) -> None:
        self.answers: list[Answer] = list(answers)
        self.default = default
        self.requests: list[Recorded] = []
        self.connections = 0
        self._tls = tls
        self._greeting = greeting
        self._changed = threading.Condition()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._is_closed = False
        self._listener = socket.create_server(("127.0.0.1", port), backlog=1024)
        self._listener_thread = threading.Thread(target=self._accept, daemon=True)
        self._listener_thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    @property
    def origin(self) -> str:
        """Its name is `localhost` with TLS, as certificates want names."""
        return f"https://localhost:{self.port}" if self._tls else f"http://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return self.url_for("/postback")

    def url_for(self, path: str) -> str:
        return self.origin + path

    def wait_for(self, n: int, timeout: float = 10) -> list[Recorded]:
        """Return all requests as soon as there are `n`; fail when there are not in time."""
        with self._changed:
            came = self._changed.wait_for(lambda: len(self.requests) >= n, timeout)
            assert came, f"{len(self.requests)} of {n} requests came within {timeout} s"
            return list(self.requests)

    def close(self) -> None:
        """Close every connection, and see to it that each thread ends."""
        with self._changed:
            self._is_closed = True
            for conn in (self._listener, *self._open):
                with contextlib.suppress(OSError):
                    conn.shutdown(socket.SHUT_RDWR)
        self._listener_thread.join(5)
        self._listener.close()
        assert not self._listener_thread.is_alive()
        for thread in self._threads:
            thread.join(5)
            assert not thread.is_alive(), "a connection of the receiver does not end"

    def _accept(self) -> None:
        while True:
            try:
                conn, _ = self._listener.accept()
            except OSError:  # it was shut down
                return
            with self._changed:
                self.connections += 1
                arguments = (conn, self.connections)
                thread = threading.Thread(target=self._serve, args=arguments, daemon=True)
                self._threads = [one for one in self._threads if one.is_alive()]
                # Started first: a thread that has not started looks like one that has ended.
                thread.start()
                self._threads.append(thread)

    def _serve(self, raw: socket.socket, number: int) -> None:
        # A duplicate, by which close() can end the connection even where TLS has taken the other.
        handle = socket.fromfd(raw.fileno(), raw.family, raw.type)
        with self._changed:
            self._open.add(handle)
            if self._is_closed:
                handle.shutdown(socket.SHUT_RDWR)
        try:
            with raw, contextlib.suppress(OSError, ValueError):
                raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self._greeting:
                    self._greeting(raw)
                self._talk(raw, number)
        finally:
            with self._changed:
                self._open.discard(handle)
                handle.close()

    def _talk(self, raw: socket.socket, number: int) -> None:
        if not self._tls:
            self._exchange(raw, number)
            return
        with self._tls.wrap_socket(raw, server_side=True) as conn:
            self._exchange(conn, number)

    def _exchange(self, conn: socket.socket, number: int) -> None:
        with conn.makefile("rb") as stream:
            while request := _read(stream, number):
                with self._changed:
                    self.requests.append(request)
                    answer = self.answers.pop(0) if self.answers else self.default
                    self._changed.notify_all()
                if not _answer(conn, request, answer):
                    return
                if request.headers.get("connection", "").lower() == "close":
                    return


def reply(
    status: int, body: bytes = b"", headers: dict[str, str] | None = None
) -> Callable[[socket.socket, Recorded], int | bytes | None]:
    """Answer properly, and keep the connection."""

    def behave(conn: socket.socket, request: Recorded) -> int | bytes | None:
        conn.sendall(_head(status, len(body), headers or {}) + body)
        return KEEP

    return behave


def drip(
    start: bytes, piece: bytes, every: float = 0.02
) -> Callable[[socket.socket, object], None]:
    """Send `start`, then a piece at a time until the other side ends the connection."""

    def behave(conn: socket.socket, request: object = None) -> None:
        conn.sendall(start)
        conn.settimeout(every)
        while True:
            with contextlib.suppress(TimeoutError):
                if not conn.recv(4096):
                    return
                continue
            conn.sendall(piece)

    return behave


def flood(start: bytes, piece: bytes) -> Callable[[socket.socket, object], None]:
    """Send `start`, then pieces as fast as they are taken, until the connection ends."""

    def behave(conn: socket.socket, request: object = None) -> None:
        conn.sendall(start)
        while True:
            conn.sendall(piece)

    return behave


def hang(conn: socket.socket, request: object = None) -> None:
    """Say nothing until the other side ends the connection."""
    while conn.recv(65536):
        pass


def close(conn: socket.socket, request: object = None) -> None:
    """End the connection without a word."""


def reset(conn: socket.socket, request: object = None) -> None:
    """End the connection by an RST."""
    conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def reset_after(start: bytes) -> Callable[[socket.socket, Recorded], None]:
    """Send something, then an RST."""

    def behave(conn: socket.socket, request: Recorded) -> None:
        conn.sendall(start)
        reset(conn)

    return behave


@contextlib.contextmanager
def silent_port(host: str, port: int = 0) -> Iterator[int]:
    """Give a port at which connections are neither accepted nor refused."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as full, socket.socket(family) as filler:
        full.bind((host, port))
        full.listen(0)
        filler.connect(full.getsockname())
        yield int(full.getsockname()[1])


#: 100 Continue for ever.
continue_flood = flood(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 8)

#: A header block, then a body, that never end.
drip_headers = drip(b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n")
drip_body = drip(b"HTTP/1.1 200 OK\r\nContent-Length: 4000\r\n\r\n", b"x")
endless_body = flood(
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"4000\r\n" + b"x" * 0x4000 + b"\r\n"
)
huge_body = flood(b"HTTP/1.1 200 OK\r\nContent-Length: 300000000\r\n\r\n", b"x" * 65536)

#: Bytes to answer with, after which the connection is closed.
GARBAGE = b"\x00\xff\x16\x03 not http at all\r\n\r\n"
HTTP_09 = b"<html>200 OK</html>\n"
TRUNCATED = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nshort"
TOO_LONG = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nmuch longer than it says"

#: A status no receiver sends: the behaviour has answered itself, and the connection is kept.
KEEP = -1


def _answer(conn: socket.socket, request: Recorded, answer: Answer | None) -> bool:
    """Give an answer; return whether the connection goes on."""
    if callable(answer):
        answer = answer(conn, request)
    if isinstance(answer, bytes):
        conn.sendall(answer)
        return False
    if answer is None or answer == KEEP:
        return answer == KEEP
    conn.sendall(_head(answer, 0, {}))
    return True


def _head(status: int, length: int, headers: dict[str, str]) -> bytes:
    framing = {} if status == 204 or status < 200 else {"Content-Length": str(length)}
    lines = [f"{name}: {value}\r\n" for name, value in {**framing, **headers}.items()]
    return f"HTTP/1.1 {status} Scripted\r\n{''.join(lines)}\r\n".encode("latin-1")


def _read(stream, number: int) -> Recorded | None:
    """Read one request; None when the other side has ended the connection, or speaks no HTTP."""
    line = stream.readline(65536).decode("latin-1").split(" ")
    if len(line) != 3 or not line[2].startswith("HTTP/"):
        return None
    headers = {}
    while header := stream.readline().decode("latin-1").strip():
        name, _, value = header.partition(":")
        headers[name.lower()] = value.strip()
    return Recorded(
        method=line[0],
        path=line[1],
        headers=headers,
        body=stream.read(int(headers.get("content-length", "0"))),
        received_at=time.monotonic(),
        connection=number,
    )
