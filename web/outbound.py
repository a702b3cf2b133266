"""Which URLs and addresses a postback may reach, and the transport that checks before it connects.

A URL that a caller chose is checked twice. `Policy` reads its text when the job is accepted and at
each attempt. But a name can resolve to any address, and to another one a second later, so where
only public addresses are allowed, `Transport` checks each address before it connects to it.

`Transport` never waits. The loop must call `Transport.work` when its selector can be read, and at
`Transport.due_at()` at the latest.
"""

import _thread
import contextlib
import functools
import io
import ipaddress
import logging
import math
import os
import random
import re
import resource
import selectors
import socket
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import pycurl
import requests

from jobs import errors

#: The longest URL that is accepted, in characters.
MAX_URL = 2048

#: How much of an answer's body is read, in bytes.
MAX_ANSWER_BYTES = 4096

#: A connection that was idle for longer is not used again, in seconds: a firewall on the way may
#: have forgotten it without telling anyone. When a group was idle for that long, its connections
#: are closed. Otherwise those that receivers have closed would stay half-open.
MAX_IDLE_SECONDS = 25

#: Receivers are divided into so many groups by a hash of their origin, and into as many more where
#: only public addresses are allowed. libcurl looks up 20 names at once for each group. Names that
#: hang can delay only new connections of the same group.
GROUPS = 16

#: At most so many connections are kept for each group, and at most a quarter of the descriptors for
#: all groups together.
MAX_CONNECTIONS = 256

#: After so many seconds, what is left waits for the next turn of the loop.
MAX_TURN_SECONDS = 0.03

# A grammar much narrower than RFC 3986, so that no two parsers can disagree about the host.
_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST = rf"(?P<host>{_LABEL}(\.{_LABEL})*\.?|\[[0-9a-f:.]+\])"
_URL = re.compile(
    rf"(?P<scheme>https?)://{_HOST}(:(?P<port>[0-9]{{1,5}}))?(?P<rest>([/?][!\"$-\[\]-~]*)?)",
    re.IGNORECASE | re.ASCII,
)

_BAD_HOST = "The host must be a host name in ASCII (xn--...), an IPv4 address or an [IPv6 address]."
_BAD_PORT = "The port must be a number from 1 to 65535."

# What is said about a URL that the grammar refuses: the sentence of the first pattern that does not
# match; if all match, the port is wrong. None quotes the URL, because it may contain a password.
_RULES = (
    (rf".{{0,{MAX_URL}}}", f"The URL must have at most {MAX_URL} characters."),
    (r"https?://.*", "The URL must begin with http:// or https://."),
    (r"[^/]*//[^/?#@]*([/?#].*)?", "The URL must have no user name and no password."),
    (r"[^#]*", "The URL must have no fragment (#...)."),
    (r"[!-\[\]-~]*", "The URL must be printable ASCII without spaces and without backslashes."),
    (rf"[^/]*//{_HOST}(:[^/?]*)?([/?].*)?", _BAD_HOST),
)

# inet_aton reads these as an IPv4 address: 2130706433, 0x7f.1, 0177.0.0.1, 0.
_NUMERIC_HOST = re.compile(r"(.*\.)?(0x[0-9a-f]*|[0-9]+)\.?")

# IANA's special-purpose registries, written out: ipaddress.is_global changes between patch
# releases, and calls multicast global. 168.63.129.16 is Azure's metadata service. Of IPv6, all but
# 2000::/3, and what is special within it: Teredo and others, documentation.
_NOT_PUBLIC = [
    ipaddress.ip_network(text)
    for text in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
        *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16"),
        *("198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        "168.63.129.16/32",
        *("::/3", "4000::/2", "8000::/1", "2001::/23", "2001:db8::/32", "3fff::/20"),
    )
]
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")

# Of every handle of libcurl. Nothing else is switched on, such as redirects, cookies or .netrc.
_OPTIONS: dict[int, object] = {
    pycurl.POST: 1,
    pycurl.HTTP_VERSION: pycurl.CURL_HTTP_VERSION_1_1,
    pycurl.PROXY: "",  # without it, libcurl reads http_proxy and the like
    pycurl.MAXAGE_CONN: MAX_IDLE_SECONDS,
    pycurl.DNS_CACHE_TIMEOUT: 1,  # seconds; a failed look-up is cached, too
    pycurl.NOSIGNAL: 1,
    pycurl.BUFFERSIZE: MAX_ANSWER_BYTES,
    # CURLOPT_QUICK_EXIT, which pycurl has no name for: closing a handle does not wait for a name
    # look-up that hangs. Without it, close() was seen to block for 9.5 s.
    322: 1,
}

# What the operator reads for an error code of libcurl. pycurl has no names for 61
# (BAD_CONTENT_ENCODING) and 100 (TOO_LARGE). Of libcurl's own texts, only those about TLS
# never contain the URL with its query.
_TLS = (pycurl.E_SSL_CONNECT_ERROR, pycurl.E_PEER_FAILED_VERIFICATION, pycurl.E_SSL_CACERT_BADFILE)
_NOT_HTTP = (pycurl.E_UNSUPPORTED_PROTOCOL, pycurl.E_FTP_WEIRD_SERVER_REPLY, 61, 100)
_PHRASES = {
    pycurl.E_OPERATION_TIMEDOUT: "no answer within {timeout:g} s",
    pycurl.E_COULDNT_RESOLVE_HOST: "the host name could not be resolved",
    pycurl.E_GOT_NOTHING: "the connection was closed without an answer",
    **dict.fromkeys(_TLS, "TLS failed: {text}"),
    **dict.fromkeys(_NOT_HTTP, "the answer is not proper HTTP"),
}


log = logging.getLogger("postback")


class Parts(NamedTuple):
    """What is needed of a URL.

    Attributes:
        host: In lower case. An IPv6 address is in brackets.
        origin: The `scheme://host:port`, always with the port.
        url: The URL that is sent to: the origin, the path and the query.
    """

    scheme: str
    host: str
    origin: str
    url: str


@functools.lru_cache(maxsize=1024)
def parts(url: str) -> Parts:
    """Return the parts of an http or https URL.

    Raises:
        Refusal: The URL is not valid. The detail says which part is wrong and does not quote it,
            because it may contain a password.
    """
    match = _URL.fullmatch(url) if len(url) <= MAX_URL else None
    if not match:
        flags = re.IGNORECASE | re.ASCII | re.DOTALL
        broken = (why for rule, why in _RULES if not re.fullmatch(rule, url, flags))
        raise _refused(next(broken, _BAD_PORT))
    scheme, host = match["scheme"].lower(), _canonical(match["host"].lower())
    port = int(match["port"] or (443 if scheme == "https" else 80))
    if not host or not 1 <= port <= 65535:
        raise _refused(_BAD_PORT if host else _BAD_HOST)
    origin = f"{scheme}://{host}:{port}"
    target = re.sub(r"^\?", "/?", match["rest"])
    return Parts(scheme, host, origin, origin + urllib.parse.quote(target, "!$%&'()*+,/:;=?@[]~"))


def is_public(address: str) -> bool:
    """Tell whether an IP address belongs to the public internet. False if it is not an address.

    An IPv4 address inside an IPv6 address (mapped, 6to4, NAT64) is judged itself.
    """
    ip = _ip(address)
    if isinstance(ip, ipaddress.IPv6Address):
        nat64 = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None
        ip = nat64 or ip.ipv4_mapped or ip.sixtofour or ip
    return ip is not None and ip.is_global and not any(ip in network for network in _NOT_PUBLIC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Which postback URLs a caller may ask for. If both attributes are empty, none.

    Attributes:
        allow: Origins that are listed by name, as `Parts.origin` writes them. They may be private.
        any_public_https: Whether every https URL with a public address is allowed, too.
    """

    allow: frozenset[str]
    any_public_https: bool

    @classmethod
    def of(cls, text: str) -> Self:
        """Read POSTBACK_ALLOW: origins separated by spaces, `*` for any public https address.

        Raises:
            ValueError: An entry is not an origin. The message quotes it without a password.
        """
        entries = set(text.split())
        return cls(allow=frozenset(map(_listed, entries - {"*"})), any_public_https="*" in entries)

    def check(self, url: str) -> bool:
        """Return whether the address behind an allowed URL must be public. Looks up no name.

        Raises:
            Refusal: The URL is not allowed.
        """
        try:
            scheme, host, origin, _ = parts(url)
        except errors.Refusal as exc:
            raise _refused(f"postback_url: {exc.detail}") from exc
        if origin in self.allow:
            return False
        if not self.any_public_https:
            problem = f"{origin} is not listed in POSTBACK_ALLOW."
        elif scheme != "https":
            problem = "The URL must begin with https://."
        elif _ip(host) and not is_public(host):
            problem = f"{host} is not a public address."
        else:
            return True
        hint = f"To allow it, the operator adds {origin} to POSTBACK_ALLOW."
        raise _refused(f"postback_url: {problem} {hint}")


class _Request(pycurl.Curl):  # type: ignore[misc]
    """One request, from its start until `then` was called.

    Attributes:
        then: Is given the answer, or why there is none.
        timeout: Seconds that it may take.
        deadline: When it is given up, by the monotonic clock.
        head: The lines of the answer's header so far.
        body: The answer's body so far.
        asked: The addresses that libcurl wanted to connect to, where all must be public.
        approved: Those of them that it may connect to.
    """

    def __init__(self, then: Callable[[requests.Response | Exception], None], timeout: float):
        super().__init__()
        self.then, self.timeout, self.deadline = then, timeout, time.monotonic() + timeout
        self.head, self.body = list[bytes](), bytearray()
        self.asked, self.approved = set[str](), set[str]()

    def add(self, part: bytes) -> int | None:
        """Take a part of the answer's body."""
        self.body += part[: MAX_ANSWER_BYTES - len(self.body)]
        return None if len(self.body) < MAX_ANSWER_BYTES else 0  # 0 ends the request

    def open_socket(self, _: int, address: Any) -> int:
        """Return a socket for an address that was approved."""
        self.asked.add(address.addr[0])
        if address.addr[0] not in self.approved:
            return int(pycurl.SOCKET_BAD)
        return socket.socket(address.family, address.socktype, address.protocol).detach()

    def answer(self, code: int, text: str) -> requests.Response | Exception:
        """Return the final answer, or why its header is not complete."""
        # Interim answers, such as 103, may come before.
        starts = [n for n, line in enumerate(self.head, 1) if line[:5].upper() == b"HTTP/"]
        lines = [line.decode("latin-1").strip() for line in self.head[max(starts, default=0) :]]
        status_code = self.getinfo(pycurl.RESPONSE_CODE)
        if "" not in lines or status_code < 200:
            return requests.ConnectionError(self._reason(code, text))
        answer = requests.Response()
        answer.status_code, answer.raw = status_code, io.BytesIO(self.body)
        for name, _, value in (line.partition(":") for line in lines[: lines.index("")]):
            answer.headers[name] = value.strip()
        answer.headers["retry-after"] = str(self.getinfo(pycurl.RETRY_AFTER))
        return answer

    def _reason(self, code: int, text: str) -> str:
        if not code:
            return "the connection was closed within the header of the answer"
        number = self.getinfo(pycurl.OS_ERRNO)
        system = os.strerror(number) if number else f"error {code} of libcurl"
        other = "TLS failed: {text}" if "SSL" in text else "the connection failed: {system}"
        phrase = _PHRASES.get(code, other)
        return phrase.format(timeout=self.timeout, text=text, system=system)


class _Group:
    """A multi handle of libcurl, for the requests to some receivers.

    Attributes:
        multi: Makes the requests, and keeps connections.
        due_at: When libcurl wants to be called again, by the monotonic clock.
        used_at: When a request last began or ended.
        is_closed: No request is given to it any more.
        requests: What is under way.
    """

    def __init__(self, selector: selectors.BaseSelector, max_connections: int) -> None:
        self._selector = selector
        self.multi = pycurl.CurlMulti()
        self.multi.setopt(pycurl.M_SOCKETFUNCTION, self._watch)
        self.multi.setopt(pycurl.M_TIMERFUNCTION, self._wait)
        self.multi.setopt(pycurl.M_MAXCONNECTS, max_connections)
        self.due_at = self.used_at = math.inf
        self.is_closed = False
        self.requests: set[_Request] = set()

    def begin(self, request: _Request) -> None:
        """Begin a request, or begin it again. `go_on` sends it."""
        self.used_at = self.due_at = now = time.monotonic()
        request.setopt(pycurl.TIMEOUT_MS, max(1, int((request.deadline - now) * 1000)))
        self.multi.add_handle(request)
        self.requests.add(request)

    def go_on(self, fd: int, events: int) -> None:
        """Do what can be done without waiting."""
        if self.is_closed:
            return
        if fd == pycurl.SOCKET_TIMEOUT:
            self.due_at = math.inf
        self.multi.socket_action(fd, events)  # the flags are those of selectors
        _, fine, failed = self.multi.info_read()
        for request, code, text in (*((one, 0, "") for one in fine), *failed):
            self.multi.remove_handle(request)
            self.requests.discard(request)
            self._end(request, code, text)

    def _end(self, request: _Request, code: int, text: str) -> None:
        """Pass on how a request went.

        Where addresses must be public and no connection is kept, the first try opens none: each
        address of the host is refused and noted. If all are public, the request is begun again.
        """
        self.used_at, answer = time.monotonic(), request.answer(code, text)
        is_kept = not request.getinfo(pycurl.NUM_CONNECTS)
        if is_kept and (code in _NOT_HTTP or request.getinfo(pycurl.RESPONSE_CODE) == 408):
            # What was read was no answer to this request: it lay on a kept connection, which the
            # receiver was about to close (RFC 9110, section 15.5.9).
            request.head[:], request.body[:] = [], b""
            request.setopt(pycurl.FRESH_CONNECT, 1)
            self.begin(request)
            return
        if code and not all(map(is_public, request.asked)):
            answer = _refused("The address of the host is not public.")
        elif code and not request.head and not request.asked <= request.approved:
            request.approved |= request.asked
            self.begin(request)
            return
        request.close()
        request.then(answer)

    def _watch(self, what: int, fd: int, *_: Any) -> None:
        if self.is_closed:
            return
        with contextlib.suppress(KeyError):
            self._selector.unregister(fd)
        if what != pycurl.POLL_REMOVE:
            self._selector.register(fd, what, self)

    def _wait(self, milliseconds: int) -> None:
        self.due_at = time.monotonic() + milliseconds / 1000 if milliseconds >= 0 else math.inf


class Transport:
    """Sends POST requests with libcurl, many at once. Only the loop may call its methods.

    Redirects, cookies, proxies, .netrc and the environment are not used. Certificates are always
    verified.

    Args:
        ca_path: A file with the certificates to trust.
        timeout: Seconds for one request in all, the name look-up included.

    Attributes:
        selector: Can be read when there is something for `work`.
    """

    def __init__(self, ca_path: str, *, timeout: float) -> None:
        self._timeout = timeout
        self._options = {**_OPTIONS, pycurl.CAINFO: ca_path}
        self.selector = selectors.DefaultSelector()
        self._groups: dict[tuple[int, bool], _Group] = {}

    def send(
        self,
        request: requests.PreparedRequest,
        then: Callable[[requests.Response | Exception], None],
        *,
        public_only: bool,
    ) -> None:
        """Begin to send a POST request.

        Args:
            request: Has a body of bytes. Host and Content-Length are added to its headers.
            then: Is called by `work`, with the answer and at most 4 KiB of its body. An answer
                counts once its header is complete, whatever happens to its body. Retry-After is
                always a number of seconds there, 0 if there is none. Otherwise `then` is given a
                Refusal if an address must be public and is not, or a ConnectionError that says why.
            public_only: Whether every address of the host must be public.
        """
        own = _Request(then, self._timeout)
        named = request.headers.items()
        # libcurl would leave out a header that is written with a colon and without a value.
        lines = ["Expect:", *(f"{name}: {text}" if text else f"{name};" for name, text in named)]
        options: dict[int, Any] = {
            **self._options,
            pycurl.URL: request.url,
            pycurl.POSTFIELDS: request.body,
            pycurl.HTTPHEADER: lines,
            pycurl.HEADERFUNCTION: own.head.append,
            pycurl.WRITEFUNCTION: own.add,
        }
        if public_only:
            options[pycurl.OPENSOCKETFUNCTION] = own.open_socket
        for option, value in options.items():
            own.setopt(option, value)
        # A kept connection to a private address must not serve a request that may not go there.
        key = hash(parts(str(request.url)).origin) % GROUPS, public_only
        if key not in self._groups:
            descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            most = max(1, min(MAX_CONNECTIONS, descriptors // (8 * GROUPS)))
            self._groups[key] = _Group(self.selector, most)
        self._groups[key].begin(own)

    def work(self) -> None:
        """Go on with what is under way."""
        now = time.monotonic()
        steps = [(one.data, one.fd, events) for one, events in self.selector.select(0)]
        due = [group for group in self._groups.values() if group.due_at <= now]
        steps += [(group, pycurl.SOCKET_TIMEOUT, 0) for group in due]
        random.shuffle(steps)  # else the same ones would come first each time
        for group, fd, events in steps:
            try:
                group.go_on(fd, events)
            except Exception:
                self._close(group)  # nobody knows what libcurl thinks now
                log.exception("receivers given up")
            if time.monotonic() > now + MAX_TURN_SECONDS:  # others wait for the loop
                break
        for group in [*self._groups.values()]:
            if not group.requests and group.used_at < now - MAX_IDLE_SECONDS:
                self._close(group)

    def _close(self, group: _Group) -> None:
        self._groups = {key: one for key, one in self._groups.items() if one is not group}
        group.is_closed = True
        for one in [*self.selector.get_map().values()]:
            if one.data is group:
                self.selector.unregister(one.fd)
        with contextlib.suppress(RuntimeError):  # no thread is free: the collector closes it
            _thread.start_new_thread(group.multi.close, ())  # waits for look-ups that hang

    def due_at(self) -> float:
        """Return when `work` is to be called at the latest, by the monotonic clock."""
        return min((group.due_at for group in self._groups.values()), default=math.inf)


def _canonical(host: str) -> str | None:
    """Return a host as all programs read it alike; None if they do not."""
    ip = _ip(host)
    if host.startswith("["):
        return f"[{ip}]" if isinstance(ip, ipaddress.IPv6Address) else None
    return host if ip or (len(host) <= 253 and not _NUMERIC_HOST.fullmatch(host)) else None


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None


def _listed(entry: str) -> str:
    try:
        found = parts(entry)
        if found.url == found.origin:
            return found.origin
        why = "It must have no path."
    except errors.Refusal as exc:
        why = exc.detail
    shown = re.sub(r"//.*@", "//***@", entry)
    expected = "origins such as https://example.com:8443, separated by spaces"
    raise ValueError(f"{shown!r}: expected {expected}. {why}")


def _refused(detail: str) -> errors.Refusal:
    return errors.Refusal(422, "Receiver refused", detail)
