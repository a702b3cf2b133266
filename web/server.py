"""The server, and what all answers have in common: limits, tokens, problems in JSON.

Owns bottle's application object and waitress. One loop reads requests, and answers the short ones.
All others may take long, so waitress's own threads answer them, or check them and leave the rest to
the loop. One thread checks all large bodies, because threads that compute hold up the loop. The
loop stores what came together in one transaction, and sends the answers after its commit.
What is refused is raised. Here, and only here, it becomes an `application/problem+json` document
(RFC 9457).
"""

import contextlib
import hmac
import json
import logging
import math
import re
import resource
import select
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bottle
import waitress.channel
import waitress.server
from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.server import TcpWSGIServer
from waitress.task import ErrorTask, ThreadedTaskDispatcher, WSGITask
from waitress.utilities import BadRequest

from jobs import errors, model
from web import intake, logs

#: Requests that the loop itself answers, unless their body has more bytes, or more commas and
#: opening brackets. To check such a body takes up to 4 ms, or 17 if it was made to take long.
SHORT = {("POST", "/process"), ("POST", "/postprocessed"), ("GET", "/livez"), ("GET", "/readyz")}
SHORT_BYTES, SHORT_MARKS = 256 * 1024, 4096

#: Bytes that are read from a connection in one turn, and that waitress parses at once unless they
#: are only a body: it takes quadratic time.
READ_BYTES, PIECE_BYTES = 16 * 1024, 2 * 1024

#: Bytes of a line before a chunk, and of the trailer: waitress reads both in quadratic time.
MAX_LINE_BYTES = 8 * 1024

#: Answers that wait for one commit, and seconds after which no more are made for it.
MAX_TURN, TURN_SECONDS = 64, 0.02

#: Seconds until a thread that computes lets the loop go on. By default it is 5 ms, each time.
SWITCH_SECONDS = 0.0005

#: Seconds after which the loop looks at its deadlines, even if nothing happened.
TICK_SECONDS = 1.0

#: Seconds until the loop goes on after an error that nobody expected.
PAUSE_SECONDS = 0.05

#: A connection with more than this unsent gets one more answer, and is then closed.
MAX_UNSENT_BYTES = 16 * 1024 * 1024

#: Connections at most. A half-sent request has one until it was silent for SILENCE_SECONDS.
CONNECTIONS = 5000
SILENCE_SECONDS = 20

#: A stop waits so long for the answers to what was asked.
STOP_SECONDS = 5.0

#: Before a connection is closed, so much is read and thrown away, for so long. Otherwise a caller
#: that sends a whole body before it reads could not read why it is refused (RFC 9112, 9.6).
LINGER_BYTES = 1024 * 1024
LINGER_SECONDS = 2.0

#: Room above the largest body, so that our own rule refuses a body that is just too large.
HEADROOM_BYTES = 64 * 1024

#: What bottle and waitress refuse. Their own words would repeat the URL or name other limits.
_DETAILS = {
    404: "There is nothing at this path. The routes of the service are in GET /openapi.json. "
    "Postbacks are received at /postprocessed.",
    405: "This path does not allow this method; the header Allow lists the methods it allows.",
    413: "The body is far too large. For POST /process the limit is MAX_BODY, by default 1 MiB.",
    431: "The headers are too large; send at most 32 KiB.",
    500: "The service failed; its log says why.",
}

_PAGE_PATH = Path(__file__).with_name("page")

#: Nothing from elsewhere and nothing inline, so that no text from outside becomes a script.
_POLICY = "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
_PAGE_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

# Made once, because json.dumps() with a hook makes an encoder for each call.
_ENCODE = json.JSONEncoder(default=model.text_of).encode

_LOCAL = re.compile(r"localhost|127(\.[0-9]{1,3}){1,3}|::1")

log = logging.getLogger("postback")


class Application(bottle.Bottle):  # type: ignore[misc]
    """A bottle application that refuses in JSON only.

    Args:
        api_tokens: Any of them opens the routes. Without one, the routes are open.
        allowed_hosts: What a Host header may name beside this machine; None for anything. A page
            that a browser loaded from elsewhere names another host (DNS rebinding).
    """

    def __init__(
        self, api_tokens: tuple[str, ...] = (), allowed_hosts: frozenset[str] | None = None
    ) -> None:
        super().__init__()
        self.uninstall(bottle.JSONPlugin)
        self.install(bottle.JSONPlugin(_ENCODE))
        self.config["catchall"] = False  # the server answers what is raised
        self._tokens = [token.encode() for token in api_tokens]
        self._allowed_hosts = allowed_hosts

    def serve(
        self, method: str, path: str, handler: Callable[..., Any], *, open_to_all: bool = False
    ) -> None:
        """Add a route. One that is open to all needs no token."""

        def guarded(**url_args: str) -> Any:
            self._check_host(bottle.request.environ.get("HTTP_HOST", "localhost"))
            if not open_to_all:
                self.check_token(bottle.request.environ)
            return handler(**url_args)

        self.route(path, method, guarded)

    def serve_page(self) -> None:
        """Add the page and its files. They contain no data, so they need no token."""

        def page(name: str = "index.html") -> Any:
            return bottle.static_file(name, root=_PAGE_PATH, headers=_PAGE_HEADERS)

        self.serve("GET", "/", page, open_to_all=True)
        self.serve("GET", "/page/<name>", page, open_to_all=True)

    def check_token(self, environ: Mapping[str, Any]) -> None:
        """Refuse a request without one of the tokens."""
        given = (intake.bearer_token(environ) or "").encode()
        if self._tokens and not any(hmac.compare_digest(given, one) for one in self._tokens):
            detail = "Send the token as Authorization: Bearer <API_TOKEN>."
            if given:
                detail = f"This token is not the one in API_TOKEN. {detail}"
            raise errors.Refusal(401, "Unauthorized", detail)

    def default_error_handler(self, res: bottle.HTTPError) -> bottle.HTTPResponse:
        """Return the problem document for what bottle itself refuses."""
        detail = _DETAILS.get(res.status_code, str(res.body))
        problem = _problem(errors.Refusal(res.status_code, "", detail))
        problem.headers.update(res.headers)
        return problem

    def _check_host(self, host: str) -> None:
        name = re.sub(r":[0-9]*$", "", host.lower()).strip("[]")
        allowed = self._allowed_hosts
        if allowed is not None and name not in allowed and not is_local(name):
            detail = f"The Host {name[:64]!r} is not this machine and not the host of PUBLIC_URL."
            raise errors.Refusal(403, "Host refused", f"{detail} Set API_TOKEN to allow any.")


class Server(TcpWSGIServer):  # type: ignore[misc]
    """waitress with one loop, in a thread of its own. It listens from the first moment.

    Attributes:
        url: Where this machine reaches it.

    Raises:
        ConfigError: The address cannot be listened on.
    """

    def __init__(self, *, host: str, port: int, max_body_bytes: int) -> None:
        # waitress would measure silence by the wall clock, which may be set.
        waitress.channel.time = waitress.server.time = SimpleNamespace(time=time.monotonic)
        super().__init__(
            None,
            _sock=_listen(host, port),
            bind_socket=False,
            connection_limit=_connection_limit(),
            max_request_body_size=max_body_bytes + HEADROOM_BYTES,
            max_request_header_size=32 * 1024,
            recv_bytes=READ_BYTES,
            outbuf_high_watermark=1 << 40,  # else a few slow readers take all threads for good
            channel_timeout=SILENCE_SECONDS,
            cleanup_interval=TICK_SECONDS,
            threads=2,
            ident=None,
        )
        self.port: int = self.socket.getsockname()[1]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - it is replaced
        self.url = f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"
        self.short: deque[_Task] = deque()  # threads append what they checked
        self.silent = _Silent(self.active_channels, self._map) if hasattr(select, "epoll") else None
        self._checks = ThreadedTaskDispatcher()  # of large bodies
        self._checks.set_thread_count(1)
        self._thread = threading.Thread(target=self._run, name="server", daemon=True)
        self._is_awake = False
        self._stop_at = math.inf

    def start(
        self,
        application: Callable[..., Iterable[bytes]],
        turn: Callable[[], contextlib.AbstractContextManager[Any]],
        work: Callable[[], float] = lambda: TICK_SECONDS,
        on_answer: Callable[[logs.Answer], None] = lambda _: None,
        watched: Sequence[int] = (),
    ) -> None:
        """Begin to answer.

        Args:
            application: A handler that has checked a request may set `environ["postback.write"]`.
                That is called inside a transaction, and returns the answer. What is appended to
                `environ["postback.after"]` is called once the answer was sent.
            turn: A transaction for what the requests of a turn write. If it fails, their answers
                become a 503, and what they appended is not called.
            work: What else the loop does before each turn. Returns after how many seconds to call
                it again at the latest. It deals with its own errors.
            on_answer: Is called with each answer that was sent.
            watched: Descriptors. `work` is called as soon as one can be read.
        """
        self.application, self._turn, self._work = application, turn, work
        self.on_answer = on_answer
        for descriptor in watched:
            _Watched(descriptor, map=self._map)
        sys.setswitchinterval(SWITCH_SECONDS)
        self._thread.start()

    def stop(self) -> None:
        """Answer what was asked, and close every connection."""
        dispatchers = (self.task_dispatcher, self._checks)
        if self._thread.is_alive():
            self._stop_at, self.accepting = time.monotonic() + STOP_SECONDS, False
            self.trigger.pull_trigger()
            self._thread.join(STOP_SECONDS + TICK_SECONDS)
            for one in dispatchers:
                one.shutdown(timeout=TICK_SECONDS)
        # Threads that still run write to some of the connections.
        if not (self._thread.is_alive() or any(one.threads for one in dispatchers)):
            for channel in list(self.active_channels.values()):
                channel.handle_close()
            wasyncore.close_all(self._map)

    def wake(self) -> None:
        """Have the loop look for what there is to do. Any thread may call it."""
        if not self._is_awake and self._thread.is_alive():
            self._is_awake = True
            self.trigger.pull_trigger()

    pull_trigger = wake  # waitress calls it after each answer

    def _run(self) -> None:
        while self._stop_at == math.inf or self._is_answering():
            try:
                self._is_awake = False  # before it looks at anything, so that no waking is lost
                seconds = self._work()
                wasyncore.poll2(0.0 if self.short else min(seconds, TICK_SECONDS), self._map)
                self._is_awake = True  # so that an answer of its own does not wake it
                self._answer_short()
            except Exception:
                log.exception("server failed")
                threading.Event().wait(PAUSE_SECONDS)

    def _is_answering(self) -> bool:
        channels = self.active_channels.values()
        is_busy = any(one.requests or one.later or one.total_outbufs_len for one in channels)
        return is_busy and time.monotonic() < self._stop_at

    def _answer_short(self) -> None:
        """Answer what is short or was checked. Send the answers after the commit."""
        batch: list[_Task] = []
        until = time.monotonic() + TURN_SECONDS
        while self.short and len(batch) < MAX_TURN and time.monotonic() < until:
            batch.append(task := self.short.popleft())
            if not task.to_store:  # a thread has asked already those that have one
                task.ask()
        if writing := [task for task in batch if task.to_store]:
            self._store(writing)
        try:
            for task in batch:
                HTTPChannel.service(task.channel)
        finally:
            for task in batch:
                task.follow_up()

    def _store(self, tasks: Sequence["_Task"]) -> None:
        """Make the answers that need a transaction, in one."""
        try:
            with self._turn():
                for task in tasks:
                    task.store()
        except Exception as exc:
            failure = errors.JournalError(_DETAILS[500])
            if isinstance(exc, errors.JournalError):  # logged where it was found
                failure = exc
            else:
                log.exception("requests not answered")
            for task in tasks:
                task.refuse(failure)

    def add_task(self, channel: "_Channel") -> None:
        """Have the next request of a connection answered by the loop, or by a thread."""
        request = channel.requests[0]
        request.task = _Task(channel, request)
        if not (request.error or _is_small(request)):
            self._checks.add_task(channel)
        elif not request.error and (request.command, request.path) in SHORT:
            self.short.append(request.task)
        else:
            super().add_task(channel)

    def handle_accept(self) -> None:
        """Accept connections that wait, so that their requests share a turn, but not too many."""
        try:
            for _ in range(MAX_TURN):
                if len(self.active_channels) >= self.adj.connection_limit:
                    raise OSError("there are too many connections")  # noqa: TRY301 - as below
                if not (accepted := self.accept()):
                    break
                self.set_socket_options(accepted[0])
                _Channel(self, *accepted, self.adj, map=self._map)
        except (OSError, MemoryError) as exc:  # mostly, no descriptor is free
            log.warning("connection not accepted", extra={"error": str(exc)})
            self.accepting = False  # until the next maintenance

    def maintenance(self, now: float) -> None:
        """Close what was silent or lingered for too long. waitress calls it at each tick."""
        self.accepting = self._stop_at == math.inf
        silent_since = now - self.adj.channel_timeout
        for channel in list(self.active_channels.values()):
            is_silent = not channel.requests and channel.last_activity < silent_since
            if is_silent or channel.lingers_until < time.monotonic():
                channel.handle_close()


class _Task(WSGITask):  # type: ignore[misc]
    """One request: `ask` the application, `store`, send the answer by `service`, `follow_up`.

    Attributes:
        to_store: What makes the answer inside a transaction. None if it is made without one.
    """

    to_store: Callable[[], bottle.HTTPResponse] | None = None
    _after: Iterable[Callable[[], None]] = ()
    _reason: str | None = None

    def __init__(self, channel: "_Channel", request: Any) -> None:
        super().__init__(channel, request)
        self._asked_at = time.perf_counter()

    def ask(self) -> None:
        """Have the application answer. What it raises becomes the answer. Nothing is sent yet."""
        try:
            self._ask()
        except errors.Refusal as exc:
            self.refuse(exc)
        except Exception:
            log.exception("request failed", extra={"path": self.request.path})
            self.refuse(errors.Refusal(500, "Service failed", _DETAILS[500]))

    def _ask(self) -> None:
        if error := self.request.error:
            if isinstance(error, errors.Refusal):
                raise error
            raise errors.Refusal(error.code, error.reason, _DETAILS.get(error.code, error.body))
        environ = self.get_environment()
        environ["postback.after"] = self._after = []
        body = self.channel.server.application(environ, self._start)
        self._body = b"".join(body)
        if hasattr(body, "close"):  # a file
            body.close()
        self.to_store = environ.pop("postback.write", None)

    def _start(self, status: str, headers: list[tuple[str, str]], *_: object) -> None:
        self.status, self.response_headers = status, headers

    def store(self) -> None:
        """Do what the handler left for a transaction. Nothing is sent yet.

        A Refusal becomes the answer, because nothing was written. Anything else ends the turn.
        """
        try:
            if self.to_store:
                self._answer(self.to_store())
        except errors.Refusal as exc:
            self.refuse(exc)

    def refuse(self, refusal: errors.Refusal) -> None:
        """Answer with a problem document. What was to follow another answer does not."""
        self._answer(_problem(refusal))
        self._after, self._reason = (), refusal.title

    def _answer(self, answer: bottle.HTTPResponse) -> None:
        self.status, self.response_headers = answer.status_line, answer.headerlist
        self._body = answer.body.encode()

    def execute(self) -> None:
        """Send the answer: in one piece, unless it is so long that joining it takes time."""
        if self.request.error or self.channel.total_outbufs_len > MAX_UNSENT_BYTES:
            self.set_close_on_finish()
        self.content_length = len(self._body)
        is_head = getattr(self.request, "command", "") == "HEAD"
        pieces = [self.build_response_header(), b"" if is_head else self._body]
        self.wrote_header = True
        try:
            for piece in [b"".join(pieces)] if self.content_length <= SHORT_BYTES else pieces:
                self.channel.write_soon(piece)
        except OSError:  # as with a full disk; waitress has counted wrongly now
            self.channel.will_close = True
            raise

    def follow_up(self) -> None:
        """Do what follows the answer, whether or not its caller is still there."""
        for callback in (*self._after, self._tell):
            try:
                callback()
            except Exception:
                log.exception("answer not followed up")
        self.request.task = None  # else both, and the answer, wait for the garbage collector

    def _tell(self) -> None:
        request, environ = self.request, self.environ or {}
        route, url_args = environ.get("bottle.route"), environ.get("route.url_args", {})
        location = dict(self.response_headers).get("Location", "")
        answer = logs.Answer(
            method=getattr(request, "command", "none"),
            path=getattr(request, "path", "none"),
            route=route.rule if route else "none",
            status_code=int(self.status[:3]),
            seconds=time.perf_counter() - self._asked_at,
            reason=self._reason,
            job_id=location.rpartition("/jobs/")[2] or url_args.get("job_id"),
        )
        logs.answered(answer)
        self.channel.server.on_answer(answer)


class _Parser(HTTPRequestParser):  # type: ignore[misc]
    """Reads a request, and refuses what waitress would answer wrongly or not at all."""

    def received(self, data: bytes) -> int:
        """Read a part of a request, and return how many bytes of it."""
        try:
            size: int = super().received(data)
        except OSError as exc:  # there is no room for a large body, which is kept in a file
            detail = f"The body could not be stored ({exc.strerror}): send it again later."
            self.error = errors.Refusal(503, "No room", detail, retry_after_seconds=5)
            self.completed, size = True, len(data)
        chunks = self.body_rcv if self.chunked else None
        if chunks is not None:
            self.body_bytes_received = len(chunks)  # without what is between them
            if max(len(chunks.control_line), len(chunks.trailer)) > MAX_LINE_BYTES:
                text = "A line between two chunks, or the trailer, is too long; send at most 8 KiB."
                self.error, self.completed = BadRequest(text), True
        return size

    def parse_header(self, header_plus: bytes) -> None:
        """Read the request line and the headers."""
        try:
            super().parse_header(header_plus)
        except ValueError as exc:
            raise ParsingError("The path or the Content-Length is not valid.") from exc
        if "TRANSFER_ENCODING" in self.headers:  # RFC 9112, section 6.1
            raise ParsingError("Transfer-Encoding needs HTTP/1.1.")
        options = [one.strip() for one in self.headers.get("CONNECTION", "").lower().split(",")]
        is_ambiguous = self.chunked and "CONTENT_LENGTH" in self.headers  # section 6.3
        if is_ambiguous or "close" in options:  # one of several (section 9.6)
            self.headers["CONNECTION"] = "close"


class _Channel(HTTPChannel):  # type: ignore[misc]
    """A connection.

    Attributes:
        lingers_until: When it is closed, by `time.monotonic()`, after its last answer was sent.
        later: Was read, and is parsed when the requests before it are answered.
    """

    parser_class = _Parser
    lingers_until = math.inf
    close_when_flushed: bool
    later = b""

    def task_class(self, _: HTTPChannel, request: Any) -> Any:
        """Return the task that answers a request. waitress made the request for its own errors."""
        return getattr(request, "task", None) or ErrorTask(self, request)

    error_task_class = task_class

    def service(self) -> None:
        """Answer the next request, in a thread. A job is accepted even if its caller has gone."""
        task = self.requests[0].task
        task.ask()
        if task.to_store:  # the loop goes on with it, so that it shares a commit
            self.server.short.append(task)
            self.server.wake()
            return
        super().service()
        task.follow_up()

    def send_continue(self) -> None:
        """Ask for the body, unless it is here or refused."""
        if not self.request.completed:
            super().send_continue()

    def readable(self) -> bool:
        """Return whether the loop waits for bytes from this connection."""
        waits = bool(self.connected and super().readable())
        if waits and (data := self.later):
            self.later = b""
            self.received(data)
            self.server.wake()  # the loop is about to wait
            # A thread may have answered already.
            waits = bool(self.connected and not self.later and super().readable())
        if waits and self.server.silent:
            self.server.silent.add(self)
            waits = False
        return waits

    def handle_write(self) -> None:
        """Send. When the last answer was sent, linger before the connection is closed."""
        is_last = self.close_when_flushed  # a thread may set it meanwhile
        if not self.will_close:
            self._flush_exception(self._flush_some_if_lockable)
        if self.will_close:
            self.handle_close()
        elif is_last and not self.total_outbufs_len:
            self.close_when_flushed = False
            self.lingers_until = time.monotonic() + LINGER_SECONDS
            with contextlib.suppress(OSError):  # the caller has gone
                self.socket.shutdown(socket.SHUT_WR)

    def received(self, data: bytes) -> None:
        """Read bytes of requests, or throw them away, which shortens the time to linger."""
        if self.lingers_until == math.inf:
            while data and not self.requests:
                size, request = PIECE_BYTES, self.request
                if request and request.headers_finished and not request.chunked:
                    size = max(1, request.content_length - request.body_bytes_received)
                piece, data = data[:size], data[size:]
                super().received(piece if self.request else piece.lstrip(b"\r\n"))
            self.later = data  # a thousand requests may have come at once
            return
        self.lingers_until -= LINGER_SECONDS * len(data) / LINGER_BYTES
        if self.lingers_until < time.monotonic():
            self.handle_close()


class _Watched(wasyncore.file_dispatcher):  # type: ignore[misc]
    """A descriptor that ends the wait of waitress's loop when it can be read."""

    def writable(self) -> bool:
        """Return that there is nothing to send."""
        return False

    def handle_read(self) -> None:
        """Do nothing: it is read by `work`."""

    def handle_close(self) -> None:
        """Do nothing: waitress calls it after an error."""


class _Silent(_Watched):
    """The connections that wait for their callers. For waitress's loop they are one.

    Without it, each turn of the loop would ask each of thousands of half-sent requests.
    """

    def __init__(self, channels: dict[int, _Channel], sockets: dict[int, Any]) -> None:
        self._channels = channels
        self._epoll = select.epoll()
        super().__init__(self._epoll.fileno(), map=sockets)

    def add(self, channel: _Channel) -> None:
        """Take a connection out of the loop until its caller sends something."""
        self._epoll.register(channel.socket, select.EPOLLIN)
        del self._map[channel.socket.fileno()]

    def handle_read(self) -> None:
        """Give connections back to the loop, because their callers sent something."""
        for fd, flags in self._epoll.poll(0, MAX_TURN):
            self._epoll.unregister(fd)
            self._map[fd] = self._channels[fd]
            wasyncore.readwrite(self._channels[fd], flags)


def _is_small(request: HTTPRequestParser) -> bool:
    if request.body_bytes_received > SHORT_BYTES:
        return False
    body: bytes = request.get_body_stream().getvalue()  # waitress keeps so much in memory
    return sum(map(body.count, (b",", b"[", b"{"))) <= SHORT_MARKS


def is_local(host: str) -> bool:
    """Return whether only this machine can reach a host of this name or address."""
    return bool(_LOCAL.fullmatch(host))


def json_answer(fields: Mapping[str, Any], status_code: int = 200) -> bottle.HTTPResponse:
    """Return an answer in JSON."""
    return bottle.HTTPResponse(_ENCODE(fields), status_code, content_type="application/json")


def _problem(refusal: errors.Refusal) -> bottle.HTTPResponse:
    """Return the document of a refusal, with the headers that belong to it."""
    code = refusal.status_code
    fields = {"type": "about:blank", "title": HTTPStatus(code).phrase, "status": code}
    problem = json_answer({**fields, "detail": refusal.detail}, code)
    problem.content_type = "application/problem+json"
    if refusal.retry_after_seconds is not None:
        problem.set_header("Retry-After", refusal.retry_after_seconds)
    if code == 401:
        problem.set_header("WWW-Authenticate", "Bearer")
    return problem


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, dualstack_ipv6=host == "::")
    except (OSError, ValueError, OverflowError) as exc:  # ValueError: no dual stack here
        text = f"HOST={host!r} PORT={port}: cannot listen there: {getattr(exc, 'strerror', exc)}"
        raise errors.ConfigError(text) from exc


def _connection_limit() -> int:
    """Return how many connections there may be: half of the descriptors are for other things.

    A connection may need two, because a large body or answer is kept in a file.

    The usual 1,024 descriptors are raised as far as the machine allows. poll() has no such limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    descriptors = max(soft, min(4 * CONNECTIONS, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, hard))
    return min(CONNECTIONS, descriptors // 4)
