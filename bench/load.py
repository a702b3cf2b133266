"""The load: callers that post payloads, and the receiver of the results, in one thread.

Knows how a job is followed from its request to its postback: each payload has a number of its own,
`{"data": {"n": 1000001}}`, and whatever a system posts holds it again. Raw sockets, one epoll and
no parsing beyond what is needed keep the cost low and the same for every system; `Figures.own_ms`
tells it.
"""

import errno
import gc
import re
import resource
import select
import socket
import time
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

#: The first number; all have as many digits, so that every request is as long.
FIRST = 1_000_000

#: Bytes read at once: of what may be all, and of the rest. A large buffer for each costs 13 us.
CHUNK = 1 << 12
LARGE = 1 << 18

#: The longest wait, in seconds: the end of a load is looked for as often.
TICK = 0.02

#: So many connections may end without an answer in one load; then there is nobody to ask.
MAX_BROKEN = 1000

LENGTH = re.compile(rb"content-length: *([0-9]+)", re.IGNORECASE)
NUMBER = re.compile(rb'"n": *([0-9]{7})')
#: Head and body are mostly sent apart. The kernel is asked to wake us once for a head and so many
#: bytes of the body: fewer than any body has.
LEAST_BODY = 10

THANKS = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is sent.

    Attributes:
        clients: Connections; each sends the next payload when the last is answered.
        seconds: How long payloads are sent.
        count: No more than this are sent.
        rate: Payloads a second at fixed times, whatever the answers; None: as the answers come.
        until_result: A client also waits for the result before it sends the next.
        expect_results: False for a route that does nothing.
        payload_bytes: Text in each payload, beside its number.
        patience: Seconds without an answer or a result after which no more is waited for.
    """

    clients: int = 32
    seconds: float = 4.0
    count: int = 1_000_000
    rate: float | None = None
    until_result: bool = False
    expect_results: bool = True
    payload_bytes: int = 0
    patience: float = 10.0


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What came of a load.

    Attributes:
        refused: Answered with another status than 200.
        broken: Connections that ended without an answer.
        missing: Answered 200, and the result has not come.
        answer_p50, answer_p99: Milliseconds from the request, or from when it was due.
        job_p50, job_p99: As long until its result was posted.
        own_ms: What callers and receiver cost, in milliseconds of CPU a job.
    """

    sent: int
    answered: int
    delivered: int
    refused: int
    broken: int
    missing: int
    repeats: int
    answers_per_second: float
    jobs_per_second: float
    answer_p50: float
    answer_p99: float
    job_p50: float
    job_p99: float
    own_ms: float


class Bench:
    """Callers and receiver around one system; one load after the other.

    Args:
        first: The number of the first payload; other results are only counted.
    """

    def __init__(self, *, first: int = FIRST) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self._listener.settimeout(0)
        self.watch(self._listener, self._accept)
        self.receiver_url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/results"
        self._callers: list[Caller] = []
        self._next = first
        self.least_bytes = 1
        self.strangers = 0
        self._prepare(Load(clients=0), 0)

    def close(self) -> None:
        for caller in self._callers:
            caller.close()
        for handler in list(self._handlers.values()):
            if isinstance(handler.__self__, Inbound):  # type: ignore[attr-defined]
                handler.__self__.close()  # type: ignore[attr-defined]
        self.forget(self._listener)
        self._epoll.close()

    def run(self, load: Load, port: int, *, watch: Callable[[], None] = lambda: None) -> Figures:
        """Send a load to a port and wait for its results; `watch` is called now and then."""
        self._prepare(load, port)
        gc.collect()
        gc.disable()
        own = _cpu_seconds()
        self._began = self._last_at = time.perf_counter()
        self._until = self._began + load.seconds
        try:
            if load.rate:
                self._send_at_rate(watch)
            else:
                self._send(watch)
            if not self._stopped:
                self.finish(load.patience, watch=watch)
        finally:
            gc.enable()
        return self.figures(_cpu_seconds() - own)

    def finish(self, patience: float, *, watch: Callable[[], None] = lambda: None) -> None:
        """Receive until nothing is missing, or nothing came for so many seconds."""
        self._last_at = time.perf_counter()
        while self.unanswered or (self.missing and self._load.expect_results):
            if time.perf_counter() - self._last_at > patience:
                return
            self._turn(TICK)
            watch()

    def receive(self, count: int, patience: float) -> int:
        """Receive so many results of jobs sent by others; return how many came in time."""
        self.strangers, last, seen_at = 0, 0, time.perf_counter()
        while self.strangers < count and time.perf_counter() - seen_at < patience:
            self._turn(TICK)
            if self.strangers > last:
                last, seen_at = self.strangers, time.perf_counter()
        return self.strangers

    def first_result_after(self, at: float) -> float | None:
        """Return how many seconds after an instant a result came; None: none did."""
        after = [one - at for one in self._delivered_at if one > at]
        return min(after, default=None)

    def stop(self) -> None:
        """Send no more, and let `run` return; `finish` then goes on to receive."""
        self._until = 0.0
        self._stopped = True

    def figures(self, own_seconds: float = 0.0) -> Figures:
        answers = _sorted_ms(self._sent_at, self._answered_at)
        jobs = _sorted_ms(self._sent_at, self._delivered_at)
        last_answer = max(self._answered_at, default=0.0) - self._began
        last_job = max(self._delivered_at, default=0.0) - self._began
        return Figures(
            sent=len(self._sent_at),
            answered=len(answers),
            delivered=len(jobs),
            refused=self.refused,
            broken=self.broken,
            missing=self.missing,
            repeats=self.repeats,
            answers_per_second=len(answers) / last_answer if answers else 0.0,
            jobs_per_second=len(jobs) / last_job if jobs else 0.0,
            answer_p50=quantile(answers, 0.50),
            answer_p99=quantile(answers, 0.99),
            job_p50=quantile(jobs, 0.50),
            job_p99=quantile(jobs, 0.99),
            own_ms=1000 * own_seconds / max(len(self._sent_at), 1),
        )

    def _prepare(self, load: Load, port: int) -> None:
        for caller in self._callers:
            caller.close()
        self._load = load
        self._first = self._next
        self._stopped = False
        self._sent_at, self._answered_at, self._delivered_at = array("d"), array("d"), array("d")
        self.unanswered = self.missing = self.refused = self.broken = self.repeats = 0
        self._places = load.clients
        self._due: deque[float] = deque()
        self._callers = [Caller(self, port) for _ in range(load.clients)]
        self._idle = deque(self._callers)
        text = b', "text": "%s"' % (b"x" * load.payload_bytes) if load.payload_bytes else b""
        before, after = b'{"data": {"n": ', text + b"}}"
        length = len(before) + len(str(FIRST)) + len(after)
        head = b"POST /process HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Length: %d\r\n"
        head += b"Content-Type: application/json\r\n\r\n"
        self.around_number = (head % (port, length) + before, after)

    # What is sent when

    def _send(self, watch: Callable[[], None]) -> None:
        while time.perf_counter() < self._until and self._more():
            self._use_places()
            self._turn(TICK)
            watch()

    def _send_at_rate(self, watch: Callable[[], None]) -> None:
        for number in range(min(self._load.count, int(self._load.seconds * self._load.rate))):
            due = self._began + number / self._load.rate
            while (left := due - time.perf_counter()) > 0:
                self._turn_exactly(min(left, TICK))
            self._due.append(due)
            self._use_places()
            watch()

    def _use_places(self) -> None:
        if self._load.rate:
            while self._due and self._idle:
                self._idle.popleft().send(self._number(self._due.popleft()))
            return
        now = time.perf_counter()
        while self._places and self._idle and now < self._until and self._more():
            self._places -= 1
            self._idle.popleft().send(self._number(now))

    def _more(self) -> bool:
        return self._next - self._first < self._load.count

    def _number(self, at: float) -> int:
        self._next += 1
        self._sent_at.append(at)
        self._answered_at.append(0.0)
        self._delivered_at.append(0.0)
        self.unanswered += 1
        return self._next - 1

    # What is heard of a job

    def answered(self, caller: "Caller", number: int, status: bytes) -> None:
        self._last_at = self._answered_at[number - self._first] = time.perf_counter()
        self.unanswered -= 1
        accepted = status == b"200"
        self.refused += not accepted
        self.missing += accepted and not self._delivered_at[number - self._first]
        self._places += not (accepted and self._load.until_result)
        self._idle.append(caller)
        self._use_places()

    def delivered(self, number: int) -> None:
        index = number - self._first
        if not 0 <= index < len(self._delivered_at):  # of an earlier load
            self.strangers += 1
            return
        if self._delivered_at[index]:
            self.repeats += 1
            return
        self._last_at = self._delivered_at[index] = time.perf_counter()
        self.missing -= self._answered_at[index] > 0
        if self._load.until_result:
            self._places += 1
            self._use_places()

    def broke(self, caller: "Caller") -> None:
        self.broken += 1
        if self.broken > MAX_BROKEN:
            raise RuntimeError(f"{self.broken} connections ended without an answer: is it gone?")
        self.unanswered -= 1
        self._places += 1
        self._idle.append(caller)

    # Sockets

    def watch(self, sock: socket.socket, handler: Callable[[], None]) -> None:
        self._handlers[sock.fileno()] = handler
        self._epoll.register(sock.fileno(), select.EPOLLIN)

    def change(self, sock: socket.socket, handler: Callable[[], None], events: int) -> None:
        self._handlers[sock.fileno()] = handler
        self._epoll.modify(sock.fileno(), events)

    def forget(self, sock: socket.socket) -> None:
        del self._handlers[sock.fileno()]
        self._epoll.unregister(sock.fileno())
        sock.close()

    def _turn(self, seconds: float) -> None:
        for fd, _ in self._epoll.poll(seconds):
            if handler := self._handlers.get(fd):
                handler()

    def _turn_exactly(self, seconds: float) -> None:
        # epoll rounds its wait up to whole milliseconds; select does not.
        if select.select([self._epoll.fileno()], [], [], seconds)[0]:
            self._turn(0)

    def expect(self, least_bytes: int) -> None:
        """Let new connections wake us when so much has come: they inherit it."""
        if least_bytes != self.least_bytes:
            self.least_bytes = least_bytes
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, least_bytes)

    def _accept(self) -> None:
        try:
            while True:
                Inbound(self, self._listener.accept()[0])
        except BlockingIOError:
            pass


class Caller:
    """One connection to the system; kept, unless the system closes it."""

    __slots__ = ("_bench", "_bytes", "_least_bytes", "_number", "_port", "_sock", "_unsent")

    def __init__(self, bench: Bench, port: int) -> None:
        self._bench = bench
        self._port = port
        self._sock: socket.socket | None = None
        self._least_bytes = 1
        self._bytes = self._unsent = b""
        self._number = 0  # 0: nothing is asked

    def send(self, number: int) -> None:
        before, after = self._bench.around_number
        self._number = number
        self._unsent = b"%s%d%s" % (before, number, after)
        if self._sock is None:
            self._connect()
        else:
            self._write()

    def close(self) -> None:
        if self._sock is not None:
            self._bench.forget(self._sock)
            self._sock = None
        self._bytes = b""

    def _connect(self) -> None:
        self._sock = socket.socket()
        self._least_bytes = 1
        self._sock.settimeout(0)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        code = self._sock.connect_ex(("127.0.0.1", self._port))
        self._bench.watch(self._sock, self._read)
        if code == errno.EINPROGRESS:
            self._bench.change(self._sock, self._write_on, select.EPOLLOUT)
        elif code:
            self._ended()
        else:
            self._write()

    def _write(self) -> None:
        try:
            sent = self._sock.send(self._unsent)
        except OSError:
            self._ended()
            return
        self._unsent = self._unsent[sent:]
        if self._unsent:
            self._bench.change(self._sock, self._write_on, select.EPOLLOUT)

    def _write_on(self) -> None:
        self._bench.change(self._sock, self._read, select.EPOLLIN)
        self._write()

    def _read(self) -> None:
        try:
            data = self._sock.recv(LARGE if self._bytes else CHUNK)
        except OSError:
            data = b""
        if not data:
            self._ended()
            return
        data = self._bytes + data
        head_bytes = _head_of_whole(data)
        if not head_bytes:
            self._bytes = data
            return
        self._bytes = b""
        if data.startswith(b"HTTP/1.0") or b"\nConnection: close" in data:
            self.close()
        elif self._least_bytes == 1:
            self._least_bytes = head_bytes + LEAST_BODY
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, self._least_bytes)
        number, self._number = self._number, 0
        self._bench.answered(self, number, data[9:12])

    def _ended(self) -> None:
        self.close()
        if self._number:
            self._number = 0
            self._bench.broke(self)


class Inbound:
    """One connection of the system to the receiver."""

    __slots__ = ("_bench", "_bytes", "_least_bytes", "_sock")

    def __init__(self, bench: Bench, sock: socket.socket) -> None:
        sock.settimeout(0)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._bench = bench
        self._sock = sock
        self._bytes = b""
        self._least_bytes = bench.least_bytes
        bench.watch(sock, self._read)

    def close(self) -> None:
        self._bench.forget(self._sock)

    def _read(self) -> None:
        try:
            data = self._sock.recv(LARGE if self._bytes else CHUNK)
            if not data:
                self.close()
                return
            data = self._bytes + data
            head_bytes = _head_of_whole(data)
            if not head_bytes:
                self._bytes = data
                return
            self._bytes = b""
            self._sock.send(THANKS)
            self._expect(head_bytes + LEAST_BODY)
        except OSError:
            self.close()
            return
        if found := NUMBER.search(data):
            self._bench.delivered(int(found[1]))

    def _expect(self, least_bytes: int) -> None:
        if least_bytes != self._least_bytes:
            self._least_bytes = least_bytes
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, least_bytes)
            self._bench.expect(least_bytes)


def quantile(values: list[float], part: float) -> float:
    """Return a quantile of sorted values; 0 when there are none."""
    return values[min(len(values) - 1, int(len(values) * part))] if values else 0.0


def _head_of_whole(data: bytes) -> int:
    """Return the length of the head when it and its body have come whole, else 0."""
    head_bytes = data.find(b"\r\n\r\n") + 4
    length = LENGTH.search(data, 0, head_bytes) if head_bytes >= 4 else None
    return head_bytes if length and len(data) >= head_bytes + int(length[1]) else 0


def _sorted_ms(begun: array, ended: array) -> list[float]:
    pairs = zip(begun, ended, strict=True)
    return sorted(1000 * (end - begin) for begin, end in pairs if end)


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
