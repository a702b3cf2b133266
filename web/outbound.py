"""Which URLs and addresses a postback may reach, and connections that reach only those, in time.

Text is no filter: a name can resolve to anything, and to something else a second later. So the
rule for addresses is applied to the address that is connected to, before any byte is sent. The
timeouts of sockets are no deadline: each counts from the last byte. So a watchdog cuts the
connection of an attempt whose time is over, in whatever phase it is.
"""

import contextlib
import functools
import ipaddress
import logging
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Self

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from jobs import errors

#: The longest URL that is accepted, in characters.
MAX_URL = 2048

#: Receivers to which connections are kept.
MAX_ORIGINS = 8

#: From a host name to its addresses, in the order to try them. May block, and may raise OSError.
Resolve = Callable[[str], Sequence[str]]

#: What urllib3 wraps around a failure.
LibraryError = urllib3.exceptions.HTTPError

# A grammar much narrower than RFC 3986, so that no two parsers can disagree about the host:
# printable ASCII without blank, "#" and backslash, and nothing but a port beside the host.
_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_URL = re.compile(
    rf"(?P<scheme>https?)://(?P<host>{_LABEL}(\.{_LABEL})*\.?|\[[0-9a-f:.]+\])"
    r"(:(?P<port>[0-9]{1,5}))?(?P<rest>([/?][!\"$-\[\]-~]*)?)",
    re.IGNORECASE | re.ASCII,
)

# inet_aton reads these as an IPv4 address: 2130706433, 0x7f.1, 0177.0.0.1, 0.
_NUMERIC_HOST = re.compile(r"(.*\.)?(0x[0-9a-f]*|[0-9]+)\.?")

_DEFAULT_PORTS = {"http": 80, "https": 443}

# IANA's special-purpose registries, written out: ipaddress.is_global changes between patch
# releases, and calls multicast global. 168.63.129.16 is Azure's metadata service.
_NOT_PUBLIC: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = (
    *map(
        ipaddress.IPv4Network,
        (
            *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
            *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24"),
            *("192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24"),
            *("224.0.0.0/4", "240.0.0.0/4", "168.63.129.16/32"),
        ),
    ),
    *map(
        ipaddress.IPv6Network,
        # All but 2000::/3, and what is special within it: Teredo and others, documentation.
        ("::/3", "4000::/2", "8000::/1", "2001::/23", "2001:db8::/32", "3fff::/20"),
    ),
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def origin(url: str) -> str:
    """Return the `scheme://host:port` that a URL leads to, in lower case, the port always told.

    A host that is not ASCII is refused: its punycode form is accepted.

    Raises:
        ReceiverRefusedError: It is not a plain http or https URL.
    """
    scheme, host, port, _ = _split(url)
    return f"{scheme}://{host}:{port}"


def target(url: str) -> str:
    """Return the path and the query of a URL that `origin` accepts."""
    rest = _split(url)[3]
    return rest if rest.startswith("/") else f"/{rest}"


def is_public(address: str) -> bool:
    """Tell whether an IP address is one of the public internet; False for what is no address.

    An IPv4 address that travels inside an IPv6 address (mapped, 6to4, NAT64) is judged itself.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        ip = _embedded(ip) or ip
    return ip.is_global and not any(ip in network for network in _NOT_PUBLIC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Which postback URLs a caller may ask for; with neither, none.

    Attributes:
        allow: Origins that are listed by name, as `origin` writes them; they may be private.
        any_public_https: Whether every public https address is allowed beside them.
    """

    allow: frozenset[str]
    any_public_https: bool

    @classmethod
    def of(cls, text: str) -> Self:
        """Read POSTBACK_ALLOW: origins separated by blanks, `*` for any public https address.

        Raises:
            ValueError: An entry is no origin; the message names it.
        """
        entries = set(text.split())
        return cls(allow=frozenset(map(_listed, entries - {"*"})), any_public_https="*" in entries)

    def check(self, url: str) -> bool:
        """Return whether the address behind an allowed URL must be public. Looks up no name.

        Raises:
            ReceiverRefusedError: The URL is not allowed.
        """
        scheme, host, port, _ = _split(url)
        if f"{scheme}://{host}:{port}" in self.allow:
            return False
        if not self.any_public_https:
            raise errors.ReceiverRefusedError(
                f"postback_url: {scheme}://{host}:{port} is not listed in POSTBACK_ALLOW."
            )
        if scheme != "https":
            raise errors.ReceiverRefusedError("postback_url must begin with https://.")
        if _is_address(host) and not is_public(host.strip("[]")):
            raise errors.ReceiverRefusedError(f"postback_url: {host} is not a public address.")
        return True


def resolve(host: str) -> Sequence[str]:
    """Return the addresses of a name, in the order in which the system would try them."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))


class Guard:
    """The limits of one attempt: which addresses it may reach, and until when.

    Attributes:
        passed: Whether the deadline has passed. What the receiver seems to say after that does
            not count: a header block that was cut short looks complete.
    """

    def __init__(
        self, *, deadline: float, public_only: bool, resolve: Resolve, lock: threading.Condition
    ) -> None:
        self.deadline = deadline
        self.passed = False
        self._public_only = public_only
        self._resolve = resolve
        self._lock = lock
        self._line: socket.socket | None = None

    def connect(self, host: str, port: int, options: Any) -> socket.socket:
        """Connect to the first address of a host that answers.

        Raises:
            ReceiverRefusedError: One of the addresses is not public and has to be.
            OSError: No address answers, or the name has none.
        """
        addresses = self._addresses(host)
        failure = OSError(0, "the name has no address")
        for left, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
            # A fair share of the time for each, so that one that is silent leaves some.
            share_seconds = max(0.001, self._seconds_left() / left)
            try:
                connection = urllib3.util.connection.create_connection(
                    (address, port), share_seconds, socket_options=options
                )
            except OSError as exc:
                failure = exc
            else:
                self.hold(connection)
                return connection
        raise failure

    def hold(self, connection: socket.socket) -> None:
        """Let the deadline cut this connection.

        By a descriptor of its own: TLS takes the socket's away, and http.client drops it early.
        """
        line = socket.fromfd(connection.fileno(), connection.family, connection.type)
        with self._lock:
            self._close_line()
            self._line = line
            if self.passed:
                self.cut()

    def release(self) -> None:
        """Keep hands off the connection from now on: it may serve another attempt."""
        with self._lock:
            self._close_line()

    def cut(self) -> None:
        """End the attempt now: whatever it waits for fails. The lock is held."""
        self.passed = True
        if self._line:
            with contextlib.suppress(OSError):  # the receiver was faster
                self._line.shutdown(socket.SHUT_RDWR)

    def check(self) -> None:
        """Raise TimeoutError when the deadline has passed."""
        if self.passed:
            raise TimeoutError("the deadline of the attempt has passed") from None

    def _addresses(self, host: str) -> Sequence[str]:
        addresses = [host] if _is_address(host) else self._look_up(host)
        if self._public_only and not all(map(is_public, addresses)):
            raise errors.ReceiverRefusedError(f"the address of {host} is not public")
        return addresses

    def _look_up(self, host: str) -> Sequence[str]:
        """Resolve in a thread that can be left behind: getaddrinfo cannot be interrupted."""
        found: list[Sequence[str] | Exception] = []
        thread = threading.Thread(
            target=_answer, args=(self._resolve, host, found), name="resolve", daemon=True
        )
        thread.start()
        thread.join(self._seconds_left())
        if not found:
            raise TimeoutError("the name was not resolved in time")
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]

    def _seconds_left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    def _close_line(self) -> None:
        if self._line:
            self._line.close()
            self._line = None


class Watchdog:
    """Ends attempts whose time is over. One thread for all of them, asleep nearly always.

    All attempts have the same time, so the one that began first ends first. The thread sleeps
    until then; an attempt that begins or ends wakes it only when it has no deadline to wait for.
    """

    def __init__(self, *, timeout_seconds: float, resolve: Resolve = resolve) -> None:
        self._timeout_seconds = timeout_seconds
        self._resolve = resolve
        self._changed = threading.Condition()
        self._guards: dict[Guard, None] = {}  # under way, the oldest first
        self._thread: threading.Thread | None = None
        self._is_idle = False
        self._is_closed = False

    @contextlib.contextmanager
    def guard(self, *, public_only: bool) -> Iterator[Guard]:
        """Guard the connections of one attempt, those of this thread within the block.

        Raises:
            TimeoutError: In place of any failure, when the deadline has passed.
        """
        guard = self._begin(public_only=public_only)
        token = _guard.set(guard)
        try:
            yield guard
        except Exception:
            guard.check()
            raise
        finally:
            _guard.reset(token)
            with self._changed:
                self._guards.pop(guard, None)
            guard.release()

    def close(self) -> None:
        """Let the thread end; attempts that are under way keep their deadline."""
        with self._changed:
            self._is_closed = True
            is_idle = not self._guards
            self._changed.notify()
        if self._thread and is_idle:
            self._thread.join()

    def _begin(self, *, public_only: bool) -> Guard:
        with self._changed:
            self._start()
            guard = Guard(
                deadline=time.monotonic() + self._timeout_seconds,
                public_only=public_only,
                resolve=self._resolve,
                lock=self._changed,
            )
            self._guards[guard] = None
            if self._is_idle:
                self._is_idle = False
                self._changed.notify()
            return guard

    def _start(self) -> None:
        if self._is_closed:
            raise RuntimeError("no attempt may begin any more: the service stops")
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
            thread.start()
            self._thread = thread

    def _run(self) -> None:
        with self._changed:
            while self._guards or not self._is_closed:
                wait_seconds = self._cut_overdue()
                self._is_idle = wait_seconds is None
                self._changed.wait(wait_seconds)

    def _cut_overdue(self) -> float | None:
        """Return the seconds until the next deadline; None when there is none."""
        for guard in list(self._guards):
            left_seconds = guard.deadline - time.monotonic()
            if left_seconds > 0:
                return left_seconds
            del self._guards[guard]
            guard.cut()
        return None


class Pools:
    """Connections that are kept, to the receivers that were reached last.

    They work only inside `Watchdog.guard`, and obey it. The pools must serve attempts of one kind
    only, those to any address or those to public ones: a connection that is kept is not checked
    again.
    """

    def __init__(self, *, max_connections: int, ca_path: str) -> None:
        # Its messages hold whole URLs, whose queries may be secret.
        logging.getLogger("urllib3").setLevel(logging.ERROR)
        self._max_connections = max_connections
        self._ca_path = ca_path
        self._lock = threading.Lock()
        self._pools: dict[tuple[str, str, int], HTTPConnectionPool] = {}  # used last is last

    def of(self, url: str) -> HTTPConnectionPool:
        """Return the connections to the origin of a URL that `origin` accepts."""
        key = _split(url)[:3]
        with self._lock:
            pool = self._pools.pop(key, None) or self._make(*key)
            self._pools[key] = pool
            if len(self._pools) > MAX_ORIGINS:  # it closes itself when nobody uses it any more
                del self._pools[next(iter(self._pools))]
            return pool

    def close(self) -> None:
        """Close those that are not in use."""
        with self._lock:
            for pool in self._pools.values():
                pool.close()
            self._pools.clear()

    def _make(self, scheme: str, host: str, port: int) -> HTTPConnectionPool:
        if scheme == "http":
            return _Pool(host, port, maxsize=self._max_connections)
        context = tls_context(self._ca_path)
        return _TLSPool(host, port, maxsize=self._max_connections, ssl_context=context)


@functools.cache
def tls_context(ca_path: str) -> ssl.SSLContext:
    """Return what checks certificates and names against this CA bundle alone.

    Made once, since reading a bundle takes 20 ms; by hand, since the default context obeys
    environment variables.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(ca_path)
    return context


#: The guard of the attempt that this thread makes.
_guard: ContextVar[Guard] = ContextVar("guard")


class _Connection(HTTPConnection):
    def _new_conn(self) -> socket.socket:
        # Only the socket: the host stays, so that the certificate is checked against the name.
        return _guard.get().connect(self._dns_host, self.port, self.socket_options)


class _TLSConnection(_Connection, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection

    def _get_conn(self, timeout: float | None = None) -> Any:
        connection: Any = super()._get_conn(timeout)
        if connection.sock:
            _guard.get().hold(connection.sock)
        return connection

    def _put_conn(self, conn: Any) -> None:
        # First, or this attempt's deadline could cut the attempt that takes it next.
        _guard.get().release()
        super()._put_conn(conn)


class _TLSPool(_Pool, HTTPSConnectionPool):
    ConnectionCls = _TLSConnection


@functools.lru_cache(maxsize=1024)
def _split(url: str) -> tuple[str, str, int, str]:
    """Return scheme, host, port, and what follows them, or refuse the URL."""
    match = _URL.fullmatch(url) if len(url) <= MAX_URL else None
    if not match or match["host"].lower() != _library_host(url):
        raise _refusal()
    scheme, port = match["scheme"].lower(), match["port"]
    return scheme, _canonical(match["host"].lower()), _checked_port(scheme, port), match["rest"]


def _library_host(url: str) -> str | None:
    """Return the host that the library will connect to."""
    try:
        return urllib3.util.parse_url(url).host
    except urllib3.exceptions.LocationParseError:
        return None


def _canonical(host: str) -> str:
    if _is_address(host):
        return f"[{ipaddress.IPv6Address(host[1:-1])}]" if host.startswith("[") else host
    if len(host) > 253 or host.startswith("[") or _NUMERIC_HOST.fullmatch(host):
        raise _refusal()
    return host


def _checked_port(scheme: str, text: str | None) -> int:
    port = int(text) if text else _DEFAULT_PORTS[scheme]
    if not 1 <= port <= 65535:
        raise _refusal()
    return port


def _refusal() -> errors.ReceiverRefusedError:
    return errors.ReceiverRefusedError(
        "postback_url must be a plain http or https URL: a host, perhaps a port and a path, no"
        f" user name, no fragment, printable ASCII, at most {MAX_URL} characters."
    )


def _listed(entry: str) -> str:
    try:
        scheme, host, port, rest = _split(entry)
    except errors.ReceiverRefusedError:
        rest = entry
    if rest:
        raise ValueError(f"{entry!r}: expected an origin such as https://example.com:8443, or *")
    return f"{scheme}://{host}:{port}"


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def _embedded(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    if ip in _NAT64:
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour


def _answer(resolve: Resolve, host: str, found: list[Sequence[str] | Exception]) -> None:
    """Put into `found` what the look-up gives, whatever it is."""
    try:
        found.append(resolve(host))
    except Exception as exc:  # noqa: BLE001 - raised again where it is awaited
        found.append(exc)
