"""The load: callers that post payloads, and the receivers of the results, in one thread.

Each payload has a number of its own, `{"data": {"n": 1000000001}}`, and whatever a system posts
contains it again, so a job is followed from its request to its postback. Raw sockets, one epoll and
no more parsing than is needed keep the cost low, and the same for every system; `own_ms` tells it.
"""

import contextlib
import random
import re
import select
import socket
import time
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

#: The least number. All have as many digits, so every request is as long.
FIRST = 1_000_000_000

#: Bytes read at once where no more are known to come. A large buffer for each read costs 13 us.
CHUNK = 1 << 12

#: The longest wait in seconds; the end of a load is looked for as often.
TICK = 0.02

#: So many connections may end without an answer in one load. Then there is nobody to ask.
MAX_BROKEN = 1000
LENGTH = re.compile(rb"content-length: *([0-9]+)", re.IGNORECASE)
NUMBER = re.compile(rb'"n": *([0-9]{10})')
THANKS = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"

#: What came of a load, by name. Times are in milliseconds unless the name says otherwise.
Row = dict[str, float]

LEGEND = """answer: from the request, or from when it was due, to its answer. job: from there to the
postback. wait: from the 200 to the postback. refused: answered by another status than 200. broken:
the connection ended without an answer. missing: answered 200, and no postback came. cpu and rss: of
all processes of the system; cpu in ms for each job. peak: the peak of each process, added up.
Figures are medians over the rounds. Ratios are made within a round first; for the wait the best
peer is the one that delivers most, for the others the one with the best figure.
"""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is sent.

    Attributes:
        clients: Connections. Each sends the next payload when the last is answered.
        seconds: How long payloads are sent, and `count` how many at most.
        rate: Payloads a second at fixed times, whatever the answers. None: as the answers come.
        until_result: A client also waits for the result before it sends the next.
        expect_results: Whether results are waited for at the end.
        extra: JSON members in each payload, beside its number.
        receivers: How many of the receivers are named in turn as `postback_url`.
        patience: Seconds without an answer or a result after which no more is waited for.
    """

    clients: int = 32
    seconds: float = 4.0
    count: int = 1_000_000
    rate: float | None = None
    until_result: bool = False
    expect_results: bool = True
    extra: str = ""
    receivers: int = 0
    patience: float = 10.0


class Bench:
    """Callers and receivers around one system; one load after the other.

    Args:
        receivers: Receivers beside the one of `origins[0]`, each on a port of its own.
        dead: How many more are dead. Half of them refuse connections, half never answer.
    """

    def __init__(self, *, receivers: int = 0, dead: int = 0) -> None:
        self.epoll = select.epoll()
        self.handlers: dict[int, Callable[[int], None]] = {}
        self.strangers_at, self.delivered_at = array("d"), array("d")
        self._sockets = [_listener() for _ in range(1 + receivers)]
        for sock in self._sockets:
            self.handlers[sock.fileno()] = partial(self._accept, sock)
            self.epoll.register(sock, select.EPOLLIN)
        self._sockets += [_listener(refuses=number % 2 == 0) for number in range(dead)]
        self.origins = [f"http://127.0.0.1:{sock.getsockname()[1]}" for sock in self._sockets]
        # By chance, so that what an earlier service left is not taken for ours.
        self._alive, self._next = receivers, random.randrange(FIRST, 9 * FIRST)

    def close(self) -> None:
        self._disconnect(self._answered, self._received)
        for sock in self._sockets:
            sock.close()
        self.epoll.close()

    def run(self, load: Load, port: int) -> Row:
        """Send a load to a port and wait for its results."""
        self._prepare(load, port)
        if load.rate:
            self._send_at_rate(load.rate)
        else:
            self._permits.extend([0.0] * load.clients)
            while time.perf_counter() < self._until and self._more():
                self._use_permits()
                self._turn(TICK)
        self._sent_seconds = time.perf_counter() - self._began
        self.finish(load.patience)
        return self.figures()

    def finish(self, patience: float, strangers: int = 0) -> None:
        """Receive until nothing is missing, or nothing came for so many seconds.

        Strangers are results of earlier loads. So many of them are missing, too.
        """
        self._last_at = time.perf_counter()
        while time.perf_counter() - self._last_at <= patience:
            missing = self.missing and self._load.expect_results
            if not (self.unanswered or missing or len(self.strangers_at) < strangers):
                return
            self._turn(TICK)

    def figures(self) -> Row:
        """Return what came of the load so far; LEGEND says what is what."""
        sent, answered, delivered = self._sent_at, self._answered_at, self.delivered_at
        names = ("refused", "broken", "repeats", "missing")
        row: Row = {"sent": len(sent)} | {name: getattr(self, name) for name in names}
        every = {
            "answer": (sent, answered),
            "job": (sent, delivered),
            "wait": (answered, delivered),
        }
        for name, (begun, ended) in every.items():
            times = _sorted_ms(begun, ended)
            for part in (50, 99):
                row[f"{name}_p{part}"] = times[len(times) * part // 100] if times else 0.0
            row[f"{name}s"] = len(times)
            row[f"{name}s_seconds"] = max(0.0, max(ended, default=0.0) - self._began)
            took = max(row[f"{name}s_seconds"], self._sent_seconds)
            row[f"{name}s_per_second"] = len(times) / took
        row["own_ms"] = 1000 * (time.process_time() - self._own) / max(len(sent), 1)
        return row

    def _prepare(self, load: Load, port: int) -> None:
        self._disconnect(self._answered)
        self._load, self._port, self._first = load, port, self._next
        self._sent_at, self._answered_at, self.delivered_at = array("d"), array("d"), array("d")
        self.unanswered = self.missing = self.refused = self.broken = self.repeats = 0
        #: One for each payload that may be sent: when it was due, or 0 for now.
        self._permits: deque[float] = deque()
        self._idle: deque[Connection | None] = deque([None] * load.clients)
        urls = [f"{origin}/results" for origin in self.origins[1 : 1 + load.receivers]]
        named = [f', "postback_url": "{url}"' for url in urls] or [""]
        self._requests = [_around_number(port, load.extra, one) for one in named]
        self._began, self._own = time.perf_counter(), time.process_time()
        self._until = self._began + load.seconds

    def _send_at_rate(self, rate: float) -> None:
        for number in range(int(self._load.seconds * rate)):
            due = self._began + number / rate
            while (left := due - time.perf_counter()) > 0:
                # epoll rounds its wait up to whole milliseconds; select does not.
                if select.select([self.epoll.fileno()], [], [], min(left, TICK))[0]:
                    self._turn(0)
            self._permits.append(due)
            self._use_permits()

    def _use_permits(self) -> None:
        now = time.perf_counter()
        while self._permits and self._idle and self._more():
            if not self._load.rate and now >= self._until:
                return
            self._send_next(self._permits.popleft() or now)

    def _more(self) -> bool:
        return self._next - self._first < self._load.count

    def _send_next(self, due: float) -> None:
        number, self._next = self._next, self._next + 1
        self._sent_at.append(due)
        self._answered_at.append(0.0)
        self.delivered_at.append(0.0)
        self.unanswered += 1
        caller = self._idle.popleft()
        if not (caller and caller.is_open):
            sock = socket.socket()
            sock.settimeout(0)
            sock.connect_ex(("127.0.0.1", self._port))  # the first write tells whether it failed
            caller = Connection(self, sock, self._answered)
        caller.number = number
        before, after = self._requests[number % len(self._requests)]
        caller.send(b"%b%d%b" % (before, number, after))

    def _answered(self, caller: "Connection", answer: bytes) -> None:
        number, caller.number = caller.number, 0
        if not number:  # a connection that was idle has ended
            return
        self.unanswered -= 1
        self._idle.append(caller)
        accepted = answer[9:12] == b"200"
        if not (self._load.rate or (accepted and self._load.until_result)):
            self._permits.append(0.0)
        if not answer:
            self.broken += 1
            if self.broken > MAX_BROKEN:
                raise RuntimeError(f"{self.broken} connections ended: is it gone?")
            return
        index = number - self._first
        self._last_at = self._answered_at[index] = time.perf_counter()
        self.refused += not accepted
        is_dead = number % len(self._requests) >= max(self._alive, 1)
        self.missing += accepted and not (self.delivered_at[index] or is_dead)
        if answer.startswith(b"HTTP/1.0") or b"\nConnection: close" in answer:
            caller.close()
        self._use_permits()

    def _received(self, sender: "Connection", message: bytes) -> None:
        if not message:
            return
        sender.send(THANKS)
        # The number is among the first members, so a large result is not searched.
        if found := NUMBER.search(message, 0, CHUNK):
            self._delivered(int(found[1]) - self._first)

    def _delivered(self, index: int) -> None:
        self._last_at = time.perf_counter()
        if not 0 <= index < len(self.delivered_at):
            self.strangers_at.append(self._last_at)
        elif self.delivered_at[index]:
            self.repeats += 1
        else:
            self.delivered_at[index] = self._last_at
            self.missing -= self._answered_at[index] > 0
            if self._load.until_result:
                self._permits.append(0.0)
                self._use_permits()

    def _turn(self, seconds: float) -> None:
        for fd, events in self.epoll.poll(seconds):
            if handler := self.handlers.get(fd):
                handler(events)

    def _accept(self, listener: socket.socket, _: int) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                Connection(self, listener.accept()[0], self._received)

    def _disconnect(self, *heard: Callable[["Connection", bytes], None]) -> None:
        for handler in list(self.handlers.values()):
            if isinstance(handler, Connection) and handler.heard in heard:
                handler.close()


class Connection:
    """Hands on each message, a head and its body, when it has come whole; b"" for the end."""

    __slots__ = ("_bench", "_got", "_sock", "_unsent", "_whole", "heard", "is_open", "number")

    def __init__(
        self, bench: Bench, sock: socket.socket, heard: Callable[["Connection", bytes], None]
    ) -> None:
        sock.settimeout(0)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._bench, self._sock, self.heard = bench, sock, heard
        self._got, self._whole, self._unsent = bytearray(), 0, b""
        self.number, self.is_open = 0, True  # 0: nothing is asked
        bench.handlers[sock.fileno()] = self
        bench.epoll.register(sock, select.EPOLLIN)

    def close(self) -> None:
        self.is_open = False
        self._bench.handlers.pop(self._sock.fileno(), None)
        self._sock.close()

    def send(self, data: bytes) -> None:
        self._unsent = data
        if not self._write():
            self._bench.epoll.modify(self._sock, select.EPOLLIN | select.EPOLLOUT)

    def __call__(self, events: int) -> None:
        """Take what epoll says."""
        if events & ~select.EPOLLOUT:
            self._read()
        elif self._write() and self.is_open:
            self._bench.epoll.modify(self._sock, select.EPOLLIN)

    def _write(self) -> bool:
        """Write what can be written; return whether nothing is left."""
        try:
            self._unsent = self._unsent[self._sock.send(self._unsent) :]
        except BlockingIOError:
            return False
        except OSError:
            self._end()
            return True
        return not self._unsent

    def _read(self) -> None:
        try:
            data = self._sock.recv(max(CHUNK, min(1 << 20, self._whole - len(self._got))))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._end()
            return
        self._got += data
        self._whole = self._whole or _whole(self._got)
        if 0 < self._whole <= len(self._got):
            message, self._got, self._whole = bytes(self._got), bytearray(), 0
            self.heard(self, message)

    def _end(self) -> None:
        self.close()
        self.heard(self, b"")


def _listener(*, refuses: bool = False) -> socket.socket:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.settimeout(0)
    if not refuses:
        sock.listen(4096)
    return sock


def _around_number(port: int, extra: str, named: str) -> tuple[bytes, bytes]:
    """Return a request, up to the number and from there on."""
    before, after = '{"data": {"n": ', f"{extra and ', '}{extra}}}{named}}}"
    length = len(before) + len(str(FIRST)) + len(after)
    head = f"POST /process HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {length}\r\n"
    return f"{head}Content-Type: application/json\r\n\r\n{before}".encode(), after.encode()


def _whole(data: bytearray) -> int:
    """Return the length of the message that begins here, 0 when its head has not come whole."""
    head_bytes = data.find(b"\r\n\r\n") + 4
    length = LENGTH.search(data, 0, head_bytes) if head_bytes >= 4 else None
    return head_bytes + int(length[1]) if length else 0


def _sorted_ms(begun: array, ended: array) -> list[float]:
    """Return how long each took; 0 for a result that came before its answer."""
    pairs = zip(begun, ended, strict=True)
    return sorted(max(0.0, 1000 * (end - begin)) for begin, end in pairs if begin and end)
