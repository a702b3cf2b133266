"""Which URLs and addresses a postback may reach, and the transport that checks before it connects.

A URL that a caller chose is checked twice. `Policy` reads its text when the job is accepted and at
each attempt. But a name can resolve to any address, and to another one a second later, so where
only public addresses are allowed, `CurlAdapter` checks each address before it connects to it.
"""

import contextlib
import functools
import io
import ipaddress
import os
import re
import socket
import time
import urllib.parse
from collections import deque
from collections.abc import Sequence
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
#: have forgotten it without telling anyone.
MAX_IDLE_SECONDS = 25

#: A handle that no request has used for so long is closed together with its connections, or those
#: that receivers have closed would stay half-open in this process.
CLOSE_IDLE_SECONDS = 5.0

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
    # CURLOPT_QUICK_EXIT, which pycurl has no name for: closing a handle does not wait for a name
    # look-up that hangs. Without it, close() was seen to block for 9.5 s.
    322: 1,
}

# What the operator reads for an error code of libcurl. Of libcurl's own texts, only those about TLS
# never contain the URL with its query.
_TLS = (pycurl.E_SSL_CONNECT_ERROR, pycurl.E_PEER_FAILED_VERIFICATION, pycurl.E_SSL_CACERT_BADFILE)
_NOT_HTTP = (pycurl.E_UNSUPPORTED_PROTOCOL, pycurl.E_FTP_WEIRD_SERVER_REPLY, 100)  # 100: TOO_LARGE
_PHRASES = {
    pycurl.E_OPERATION_TIMEDOUT: "no answer within {timeout:g} s",
    pycurl.E_COULDNT_RESOLVE_HOST: "the host name could not be resolved",
    pycurl.E_GOT_NOTHING: "the connection was closed without an answer",
    **dict.fromkeys(_TLS, "TLS failed: {text}"),
    **dict.fromkeys(_NOT_HTTP, "the answer is not proper HTTP"),
}


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


class CurlAdapter(requests.adapters.BaseAdapter):
    """Sends POST requests with libcurl, from any number of threads.

    A handle of libcurl keeps its connections and is used by one thread at a time. Between two
    requests it waits in a pool. Redirects, cookies, proxies, .netrc and the environment are not
    used. Certificates are always verified.

    Args:
        ca_path: A file with the certificates to trust.
        public_only: Whether every address of a host must be public. It is the same for all
            requests, because a connection that is kept is not checked again.
    """

    def __init__(self, *, ca_path: str, public_only: bool) -> None:
        super().__init__()
        self._ca_path = ca_path
        self._public_only = public_only
        # The handles that no request uses, the longest idle first, each with the time.monotonic()
        # since when it is idle.
        self._idle: deque[tuple[float, pycurl.Curl]] = deque()

    def send(
        self, request: requests.PreparedRequest, *_: Any, timeout: Any = None, **__: Any
    ) -> requests.Response:
        """Send a POST request and return the answer, with at most 4 KiB of its body.

        An answer counts as soon as its header is complete, whatever happens to its body. Its header
        Retry-After is always a number of seconds, 0 if there is none.

        Args:
            request: Has a body of bytes. Host and Content-Length are added to its headers.
            timeout: Seconds for everything together, the name look-up included.

        Raises:
            Refusal: An address is not public, and must be.
            requests.ConnectionError: There was no answer. The text says why.
        """
        curl, head, body = self._take(), list[bytes](), bytearray()
        lines = ["Expect:", *(f"{name}: {text}" for name, text in request.headers.items())]
        curl.setopt(pycurl.URL, request.url)
        curl.setopt(pycurl.POSTFIELDS, request.body)
        curl.setopt(pycurl.HTTPHEADER, lines)
        curl.setopt(pycurl.HEADERFUNCTION, head.append)
        curl.setopt(pycurl.WRITEFUNCTION, functools.partial(_add, body))
        code, reason = 0, "the connection was closed within the header of the answer"
        try:
            self._perform(curl, timeout)
        except pycurl.error as exc:
            code, reason = exc.args[0], _reason(curl, exc, timeout)
        finally:
            answer = _answer(curl, head, bytes(body))
            curl.setopt(pycurl.POSTFIELDS, b"")  # a large event must not stay in the pool
            if code == pycurl.E_OPERATION_TIMEDOUT:
                curl.close()  # a name look-up that hangs would hold up the handle's next one
            else:
                self._idle.append((time.monotonic(), curl))
        if answer is None:
            raise requests.ConnectionError(reason)
        return answer

    def close_idle(self, seconds: float) -> None:
        """Close the handles, and their connections, that were idle for so long."""
        with contextlib.suppress(IndexError):
            while self._idle[0][0] <= time.monotonic() - seconds:
                self._idle.popleft()[1].close()

    def _perform(self, curl: pycurl.Curl, timeout: float) -> None:
        """Let libcurl do the request.

        Where addresses must be public and no connection is kept, it is first done in vain: each
        address of the host is refused and noted. If all of them are public, it is done again.
        """
        deadline = time.monotonic() + timeout
        asked, approved = set[str](), set[str]()
        if self._public_only:
            curl.setopt(pycurl.OPENSOCKETFUNCTION, functools.partial(_open_socket, asked, approved))
        while True:
            curl.setopt(pycurl.TIMEOUT_MS, max(1, int((deadline - time.monotonic()) * 1000)))
            try:
                curl.perform()
                return
            except pycurl.error:
                if not all(map(is_public, asked)):
                    raise _refused("The address of the host is not public.") from None
                if asked <= approved:
                    raise
                approved |= asked

    def _take(self) -> pycurl.Curl:
        with contextlib.suppress(IndexError):
            return self._idle.pop()[1]
        curl = pycurl.Curl()
        for option, value in (_OPTIONS | {pycurl.CAINFO: self._ca_path}).items():
            curl.setopt(option, value)
        return curl


def _open_socket(asked: set[str], approved: set[str], _: int, address: Any) -> int:
    asked.add(address.addr[0])
    if address.addr[0] not in approved:
        return int(pycurl.SOCKET_BAD)
    return socket.socket(address.family, address.socktype, address.protocol).detach()


def _add(body: bytearray, part: bytes) -> int | None:
    body += part[: MAX_ANSWER_BYTES - len(body)]
    return None if len(body) < MAX_ANSWER_BYTES else 0  # 0 ends the request


def _answer(curl: pycurl.Curl, head: Sequence[bytes], body: bytes) -> requests.Response | None:
    """Return the final answer; None if its header is not complete."""
    # Interim answers, such as 103, may come before.
    starts = [n for n, line in enumerate(head, 1) if line[:5].upper() == b"HTTP/"]
    lines = [line.decode("latin-1").strip() for line in head[max(starts, default=0) :]]
    status_code = curl.getinfo(pycurl.RESPONSE_CODE)
    if "" not in lines or status_code < 200:
        return None
    answer = requests.Response()
    answer.status_code, answer.raw = status_code, io.BytesIO(body)
    for name, _, text in (line.partition(":") for line in lines):
        answer.headers[name] = text.strip()
    answer.headers["retry-after"] = str(curl.getinfo(pycurl.RETRY_AFTER))
    return answer


def _reason(curl: pycurl.Curl, exc: pycurl.error, timeout: float) -> str:
    code, text = exc.args
    number = curl.getinfo(pycurl.OS_ERRNO)
    system = os.strerror(number) if number else f"error {code} of libcurl"
    phrase = _PHRASES.get(code, "the connection failed: {system}")
    return phrase.format(timeout=timeout, text=text, system=system)


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
    raise ValueError(f"{shown!r}: expected an origin such as https://example.com:8443. {why}")


def _refused(detail: str) -> errors.Refusal:
    return errors.Refusal(422, "Receiver refused", detail)
