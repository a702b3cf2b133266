"""The server, and what every answer has in common: limits, tokens, problems in JSON.

Owns bottle's application object and waitress. What is refused is raised; here, and only here, it
becomes an `application/problem+json` document (RFC 9457) with the status of the error.
"""

import contextlib
import errno
import hmac
import json
import logging
import os
import queue
import resource
import select
import socket
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import bottle
from waitress import wasyncore
from waitress.adjustments import Adjustments
from waitress.channel import HTTPChannel
from waitress.server import TcpWSGIServer
from waitress.task import ErrorTask

from jobs import cores, errors
from web import intake, logs

#: The status of each error; a subclass stands before its base.
STATUS_CODES: dict[type[errors.Error], int] = {
    errors.MalformedError: 400,
    errors.UnauthorizedError: 401,
    errors.JobNotFoundError: 404,
    errors.MoveError: 409,
    errors.LengthRequiredError: 411,
    errors.TooLargeError: 413,
    errors.MediaTypeError: 415,
    errors.KeyReusedError: 422,
    errors.ReceiverRefusedError: 422,
    errors.UnavailableError: 503,
}

#: What the framework itself refuses; its own words would repeat the URL.
_DETAILS = {
    404: "There is nothing at this path: see GET /openapi.json, or the README.",
    413: "The body is far too large: send at most MAX_BODY bytes.",
    405: "This path does not take this method: the header Allow names those it takes.",
    500: "The service failed: what happened is in its log.",
}

#: Threads that answer requests.
THREADS = 4

#: Answers that one thread keeps at most, and for how long it takes on others, before they leave.
MAX_KEPT = 32
MAX_KEPT_SECONDS = 0.005

#: A connection to which so much is unsent is closed, if its caller asks for more.
MAX_UNSENT_BYTES = 16 * 1024 * 1024

#: Until a stop no longer waits for the threads that answer.
SHUTDOWN_SECONDS = 5.0

#: Connections at most; a half-sent request holds one until it has been silent for the timeout.
CONNECTIONS = 5000
SILENCE_SECONDS = 20
SWEEP_SECONDS = 5

#: Until a connection is accepted that could not be, or after a failure nobody expected. Nothing
#: is answered meanwhile.
ACCEPT_PAUSE_SECONDS = 0.05

#: Room above the largest body, so that ours is the rule which refuses it.
HEADROOM_BYTES = 64 * 1024

log = logging.getLogger("postback")

Handler = Callable[..., Any]


class Problem(bottle.HTTPError):  # type: ignore[misc]
    """An answer that refuses, with a text that tells the caller what to do."""


class Application(bottle.Bottle):  # type: ignore[misc]
    """A bottle application that refuses in JSON only, and asks for the token."""

    def __init__(self, api_token: str | None = None) -> None:
        super().__init__()
        self._api_token = api_token

    def serve(self, method: str, path: str, handler: Handler, *, open_to_all: bool = False) -> None:
        """Add a route. One that is open to all needs no token."""
        self.route(path, method, self._guarded(handler, open_to_all=open_to_all))

    def default_error_handler(self, res: bottle.HTTPError) -> str:
        """Return the problem document of an answer that refuses."""
        status_code = res.status_code
        detail = res.body if isinstance(res, Problem) else _DETAILS.get(status_code, res.body)
        bottle.response.content_type = "application/problem+json"
        return _document(status_code, detail)

    def _guarded(self, handler: Handler, *, open_to_all: bool) -> Handler:
        """Wrap a handler: the token first, and then whatever it raises becomes a problem."""

        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                if self._api_token is not None and not open_to_all:
                    self._check_token(self._api_token)
                return handler(*args, **kwargs)
            except errors.Error as exc:
                bottle.request.environ["postback.error"] = exc
                return problem(exc)
            except Exception:
                log.exception("request failed", extra={"path": bottle.request.route.rule})
                return Problem(500, _DETAILS[500])

        return guarded

    def _check_token(self, expected: str) -> None:
        given = intake.bearer_token(bottle.request.environ) or ""
        if not hmac.compare_digest(given.encode(), expected.encode()):
            raise errors.UnauthorizedError("Send the token as Authorization: Bearer <API_TOKEN>.")


def _document(status_code: int, detail: str) -> str:
    title = HTTPStatus(status_code).phrase
    return json.dumps(
        {"type": "about:blank", "title": title, "status": status_code, "detail": detail}
    )


def problem(exc: errors.Error) -> Problem:
    """Return the answer for an error."""
    status_code = next(code for kind, code in STATUS_CODES.items() if isinstance(exc, kind))
    answer = Problem(status_code, str(exc))
    if isinstance(exc, errors.UnavailableError):
        answer.set_header("Retry-After", str(exc.retry_after_seconds))
    if isinstance(exc, errors.UnauthorizedError):
        answer.set_header("WWW-Authenticate", "Bearer")
    return answer


class Server:
    """A waitress server in a thread of its own. It listens from the first moment.

    Raises:
        ConfigError: The address cannot be listened on.
    """

    def __init__(self, *, host: str, port: int, max_body_bytes: int) -> None:
        self._max_body_bytes = max_body_bytes
        self._socket = _listen(host, port)
        self.port: int = self._socket.getsockname()[1]

    def start(
        self,
        application: logs.WSGI,
        *,
        settle: Callable[[], None],
        on_answered: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin to answer.

        Args:
            application: Answers requests.
            settle: Is called before answers leave; when it raises, none of them does.
            on_answered: Is called once they have left.
        """
        self._answerers = _Answerers(settle, on_answered)
        settings = Adjustments(
            sockets=[self._socket],
            connection_limit=_connection_limit(),
            max_request_body_size=self._max_body_bytes + HEADROOM_BYTES,
            max_request_header_size=32 * 1024,
            outbuf_high_watermark=1 << 40,
            asyncore_use_poll=True,  # select() fails at descriptor 1024
            channel_timeout=SILENCE_SECONDS,
            cleanup_interval=SWEEP_SECONDS,
            clear_untrusted_proxy_headers=False,  # nobody here reads them
            ident=None,
        )
        self._server = _WSGIServer(
            application,
            _sock=self._socket,
            dispatcher=self._answerers,
            adj=settings,
            sockinfo=(self._socket.family, self._socket.type, 0, self._socket.getsockname()),
            bind_socket=False,
        )
        self._thread = threading.Thread(target=self._run, name="server", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Answer what was asked, and close every connection."""
        self._answerers.shutdown()
        sockets = self._server._map  # noqa: SLF001 - waitress has no other way to stop from outside
        deadline = time.monotonic() + SHUTDOWN_SECONDS
        while _has_unsent(sockets) and time.monotonic() < deadline:
            threading.Event().wait(0.01)
        with contextlib.suppress(OSError):  # it was awake, and has closed its own end already
            self._server.trigger.pull_trigger(lambda: _close_all(sockets))
        self._thread.join(SILENCE_SECONDS)

    def _run(self) -> None:
        """Do what waitress's own loop does, without asking every silent connection at each turn.

        With 2,000 half-sent requests that alone more than doubles the p99 of the answers. Where
        the system has no epoll, its own loop must do.
        """
        cores.keep_to_one()
        if not hasattr(select, "epoll"):
            self._server.run()
            return
        sockets = self._server._map  # noqa: SLF001 - waitress's own loop is given them too
        with select.epoll() as silent:  # one for good: later no descriptor may be free
            while sockets:
                try:
                    _serve(sockets, silent, until=time.monotonic() + SWEEP_SECONDS)
                except OSError:  # waitress closes some by itself, also between two lines here
                    threading.Event().wait(0.001)
                except Exception:
                    log.exception("server failed")
                    threading.Event().wait(ACCEPT_PAUSE_SECONDS)


class _Refusal(ErrorTask):  # type: ignore[misc]
    """What waitress itself refuses, before the application is asked: a problem like any other."""

    def execute(self) -> None:
        error = self.request.error
        self.status = f"{error.code} {error.reason}"
        # Its own words would name its limit, which is not ours.
        detail = _DETAILS.get(error.code, f"{error.body}.")
        body = _document(error.code, detail).encode()
        self.response_headers.append(("Content-Type", "application/problem+json"))
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class _Channel(HTTPChannel):  # type: ignore[misc]
    """A connection that keeps its answers until they may leave."""

    error_task_class = _Refusal
    kept = 0  # answers that may not leave yet

    def send_continue(self) -> None:
        """Ask for the body, unless the request is complete, or refused, without one."""
        if not self.request.completed:
            super().send_continue()

    def write_soon(self, data: Any) -> Any:
        """Take a part of an answer; close the connection when there is no room to keep it."""
        try:
            return super().write_soon(data)
        except OSError:  # waitress has counted wrongly now
            self.drop()
            raise

    def keep(self) -> None:
        """Let nothing leave until one more answer is released."""
        with self.outbuf_lock:
            self.kept += 1

    def release(self) -> None:
        """Send what was kept, unless more is to be kept."""
        with self.outbuf_lock:
            if self.kept == 1 and self.connected:
                self._flush_exception(super()._flush_some, do_close=False)
            self.kept -= 1  # only now: from here on the server itself may send what is left

    def drop(self) -> None:
        """Close the connection; what was kept never leaves."""
        self.will_close = True

    def writable(self) -> Any:
        """Tell whether the server has something to do here."""
        return self.will_close or (not self.kept and super().writable())

    def _flush_some(self, do_close: bool = True) -> bool:  # noqa: FBT001, FBT002 - waitress's
        return not self.kept and super()._flush_some(do_close)


class _WSGIServer(TcpWSGIServer):  # type: ignore[misc]
    channel_class = _Channel

    def pull_trigger(self) -> None:
        """Do nothing: whoever answers wakes the server once for all that it has answered."""


class _Answerers:
    """The threads that answer requests, in place of waitress's own.

    Each answers what waits, and only then lets the answers leave, once what they promise is on the
    disk: requests that come together share one fsync, and few threads do for many.
    """

    def __init__(self, settle: Callable[[], None], on_answered: Callable[[], None]) -> None:
        self._settle = settle
        self._on_answered = on_answered
        self._waiting: queue.SimpleQueue[_Channel | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=f"answerer-{number}", daemon=True)
            for number in range(THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def add_task(self, channel: _Channel) -> None:
        """Have the next request of a connection answered."""
        self._waiting.put(channel)

    def shutdown(self) -> None:
        """End the threads, once they have answered what they were asked."""
        self._waiting.put(None)
        deadline = time.monotonic() + SHUTDOWN_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        cores.keep_to_one()
        next_ones: list[_Channel] = []  # one at most, which was not to wait for the disk
        while first := next_ones.pop() if next_ones else self._waiting.get():
            kept: list[_Channel] = []
            try:
                self._answer(first, kept, next_ones)
            except BaseException as exc:
                if not isinstance(exc, errors.JournalError):  # that was logged where it was seen
                    log.exception("requests not answered")
                for channel in kept:  # no answer may promise what is not kept
                    channel.drop()
            try:
                first.server.trigger.pull_trigger()
                self._on_answered()
            except Exception:
                log.exception("answers not followed up")
        self._waiting.put(None)  # for the next one

    def _answer(self, first: _Channel, kept: list[_Channel], next_ones: list[_Channel]) -> None:
        """Answer one request and those that wait behind it, then let the answers leave.

        Args:
            kept: Gets all that was answered.
            next_ones: Gets a request that came, but has no part in this.
        """
        promises, until = _may_promise(first), time.monotonic() + MAX_KEPT_SECONDS
        channel: _Channel | None = first
        while channel:
            channel.keep()
            kept.append(channel)
            if channel.total_outbufs_len > MAX_UNSENT_BYTES:
                channel.drop()
            else:
                channel.service()
            has_room = len(kept) < MAX_KEPT and time.monotonic() < until
            channel = self._next(next_ones) if promises and has_room else None
        if promises:
            self._settle()
        for channel in kept:
            channel.release()

    def _next(self, next_ones: list[_Channel]) -> _Channel | None:
        """Return a request that may share the wait for the disk, if one waits already."""
        try:
            channel = self._waiting.get_nowait()
        except queue.Empty:
            return None
        if channel is None:  # the service stops
            self._waiting.put(None)
            return None
        if _may_promise(channel):
            return channel
        next_ones.append(channel)  # it may take long
        return None


def _may_promise(channel: _Channel) -> bool:
    return getattr(channel.requests[0], "command", "") == "POST"


def _serve(sockets: dict[int, Any], silent: "select.epoll", *, until: float) -> None:
    known: dict[int, Any] = {}  # those that wait in the epoll
    try:
        _turn(sockets, silent, known, until=until)
    finally:
        for fd in known:
            with contextlib.suppress(OSError):  # it is closed
                silent.unregister(fd)


def _turn(
    sockets: dict[int, Any], silent: "select.epoll", known: dict[int, Any], *, until: float
) -> None:
    while sockets and (left_seconds := until - time.monotonic()) > 0:
        poller = select.poll()
        poller.register(silent, select.POLLIN)
        for fd, one in list(sockets.items()):
            if known.get(fd) is not one:
                _register(fd, one, poller, silent, known)
        ready = dict(poller.poll(left_seconds * 1000))
        if ready.pop(silent.fileno(), 0):
            ready |= dict(silent.poll(0))
        for fd, flags in ready.items():
            if fd in sockets:  # not closed in this very turn
                if known.pop(fd, None):
                    silent.unregister(fd)
                wasyncore.readwrite(sockets[fd], flags)


def _register(
    fd: int, one: Any, poller: select.poll, silent: "select.epoll", known: dict[int, Any]
) -> None:
    if getattr(one, "will_close", False):
        one.handle_write()  # not once it can be written to: who never reads would never be closed
        return
    reads, writes = one.readable(), one.writable()
    if reads and not writes and getattr(one, "requests", None) == []:
        known[fd] = one  # only its caller can find work for it
        silent.register(fd, select.EPOLLIN)
    elif reads or writes:
        waits = select.POLLIN | select.POLLPRI if reads else 0
        poller.register(fd, waits | (select.POLLOUT if writes and not one.accepting else 0))


def _close_all(sockets: dict[int, Any]) -> None:
    for one in list(sockets.values()):
        if isinstance(one, _Channel):
            one.handle_close()  # lets its buffers go, too
    wasyncore.close_all(sockets)


def _has_unsent(sockets: dict[int, Any]) -> bool:
    return any(getattr(one, "total_outbufs_len", 0) for one in list(sockets.values()))


class _Listener(socket.socket):
    """A listening socket that fails in silence; waitress would try, and log, again at once."""

    _is_failing = False

    def accept(self) -> tuple[socket.socket, Any]:
        try:
            accepted = super().accept()
        except OSError as exc:  # no descriptor is free, as a rule
            if not self._is_failing:
                log.warning("connection not accepted", extra={"error": exc.strerror})
            self._is_failing = True
            threading.Event().wait(ACCEPT_PAUSE_SECONDS)
            raise BlockingIOError(errno.EWOULDBLOCK, exc.strerror) from exc
        self._is_failing = False
        return accepted


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=1024)
        listener = _Listener(fileno=listener.detach())
        os.register_at_fork(after_in_child=listener.close)  # it may outlive the service
        return listener
    except OSError as exc:
        text = f"HOST={host!r} PORT={port}: cannot listen there: {exc.strerror}"
        raise errors.ConfigError([text]) from exc


def _connection_limit() -> int:
    """Return how many connections there may be: half of the descriptors are for other things.

    The usual 1,024 descriptors are raised as far as the machine allows: poll() needs no such limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limits = [2 * CONNECTIONS, *(limit for limit in (hard,) if limit != resource.RLIM_INFINITY)]
    if soft < min(limits):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(limits), hard))
    return max(1, min(limits) // 2)
