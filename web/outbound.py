"""Which URLs and addresses a postback may reach.

Text is no filter: a name can resolve to anything, and to something else a second later. So beside
the rule for URLs there is one for addresses; `web/transport.py` applies it to the address that it
is about to connect to, before any byte is sent.
"""

import functools
import ipaddress
import re
import socket
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

from jobs import errors

#: The longest URL that is accepted, in characters.
MAX_URL = 2048

#: From a host name to its addresses, in the order to try them. May block, and may raise OSError.
Resolve = Callable[[str], Sequence[str]]

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


class Parts(NamedTuple):
    """What a URL consists of.

    Attributes:
        host: In lower case; an IPv6 address in brackets.
        target: The path and the query, as they are sent; "" where the URL has neither.
    """

    scheme: str
    host: str
    port: int
    target: str

    @property
    def origin(self) -> str:
        """The `scheme://host:port`, the port always told."""
        return f"{self.scheme}://{self.host}:{self.port}"

    @property
    def authority(self) -> str:
        """The value of the header Host."""
        is_default = self.port == _DEFAULT_PORTS[self.scheme]
        return self.host if is_default else f"{self.host}:{self.port}"


@functools.lru_cache(maxsize=1024)
def parts(url: str) -> Parts:
    """Return the parts of a plain http or https URL.

    A host that is not ASCII is refused: its punycode form is accepted.

    Raises:
        ReceiverRefusedError: It is none.
    """
    match = _URL.fullmatch(url) if len(url) <= MAX_URL else None
    if not match:
        raise _refusal()
    scheme, host = match["scheme"].lower(), _canonical(match["host"].lower())
    return Parts(scheme, host, _checked_port(scheme, match["port"]), _encoded(match["rest"]))


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
        scheme, host, *_ = found = parts(url)
        if found.origin in self.allow:
            return False
        if not self.any_public_https:
            raise errors.ReceiverRefusedError(
                f"postback_url: {found.origin} is not listed in POSTBACK_ALLOW."
            )
        if scheme != "https":
            raise errors.ReceiverRefusedError("postback_url must begin with https://.")
        if is_address(host) and not is_public(host.strip("[]")):
            raise errors.ReceiverRefusedError(f"postback_url: {host} is not a public address.")
        return True


def resolve(host: str) -> Sequence[str]:
    """Return the addresses of a name, in the order in which the system would try them."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))


def is_address(host: str) -> bool:
    """Tell whether a host is an address, an IPv6 one perhaps in brackets."""
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def _canonical(host: str) -> str:
    if is_address(host):
        if not host.startswith("["):
            return host
        if ":" in host:
            return f"[{ipaddress.IPv6Address(host[1:-1])}]"
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


def _encoded(rest: str) -> str:
    """Return what follows the host, with percent signs for what a URL may not hold (RFC 3986)."""
    path = rest if rest.startswith("/") or not rest else f"/{rest}"
    return urllib.parse.quote(path, safe="!$%&'()*+,/:;=?@[]~")


def _listed(entry: str) -> str:
    try:
        found = parts(entry)
    except errors.ReceiverRefusedError as exc:
        raise _no_origin(entry) from exc
    if found.target:
        raise _no_origin(entry)
    return found.origin


def _no_origin(entry: str) -> ValueError:
    return ValueError(f"{entry!r}: expected an origin such as https://example.com:8443, or *")


def _embedded(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    if ip in _NAT64:
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour
