"""The environment, read once into a frozen `Config`, or refused with one line for each mistake.

Each field of `Config` is one variable, and the table of `--help` is made from the same fields. A
duration is written like `250ms`, `15s`, `5m` or `24h`, and a size like `512`, `64KiB` or `1MiB`.
"""

import contextlib
import difflib
import json
import math
import os
import re
import ssl
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from jobs import errors
from web import outbound, signatures

T = TypeVar("T")

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {"": 1, "B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}

# Beyond these, dates overflow and one body fills the memory.
_MAX_SECONDS = 10 * 365 * 86400.0
_MAX_BYTES = 1024**3

_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+\n[ -~]*")  # RFC 9110, section 5.6.2

# What an attempt sets itself.
_RESERVED = re.compile(
    r"webhook-.*|content-.*|host|transfer-encoding|connection|accept-encoding|user-agent"
)

# Kubernetes sets these in every container of a namespace, for each Service named postback-...
_KUBERNETES = re.compile(
    r"POSTBACK_([A-Z0-9_]+_)?(SERVICE_(HOST|PORT)|PORT_[0-9]+_(TCP|UDP|SCTP)|PORT=[a-z]+://)"
)


def duration(text: str) -> float:
    """Return the seconds of a text such as `15s`."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)(ms|s|m|h|d)", text)
    seconds = float(match[1]) * _SECONDS[match[2]] if match else 0.0
    expected = "a duration such as 15s or 5m, up to 3650d"
    return _checked(seconds, 0 < seconds <= _MAX_SECONDS, expected)


def timeout(text: str) -> float | None:
    """Return the seconds of a text such as `15s`, and None for `none`."""
    return None if text == "none" else duration(text)


def durations(text: str) -> tuple[float, ...]:
    """Return the seconds of durations separated by spaces, and nothing for `none`."""
    found: tuple[float, ...] = ()
    with contextlib.suppress(ValueError):
        found = () if text == "none" else tuple(map(duration, text.split()))
    expected = "durations separated by spaces, such as 2s 10s 1m, or none"
    return _checked(found, found or text == "none", expected)


def size(text: str) -> int:
    """Return the bytes of a text such as `1MiB`."""
    match = re.fullmatch(r"([0-9]{1,10})(B|KiB|MiB|GiB)?", text)
    size_bytes = int(match[1]) * _BYTES[match[2] or ""] if match else 0
    expected = "a size such as 64KiB or 1MiB, up to 1GiB"
    return _checked(size_bytes, 0 < size_bytes <= _MAX_BYTES, expected)


def whole(least: int, most: int) -> Callable[[str], int]:
    """Return a parser of whole numbers between two limits, which are themselves allowed."""

    def parse(text: str) -> int:
        number = int(text) if re.fullmatch(r"[0-9]{1,7}", text) else -1
        return _checked(number, least <= number <= most, f"a whole number from {least} to {most}")

    return parse


def like(pattern: str, expected: str) -> Callable[[str], str]:
    """Return a parser of texts that match a pattern."""
    return lambda text: _checked(text, re.fullmatch(pattern, text, re.ASCII), expected)


def choice(*words: str) -> Callable[[str], str]:
    """Return a parser of one of these words, in upper or lower case."""
    return lambda text: _checked(text.lower(), text.lower() in words, f"one of {', '.join(words)}")


def tokens(text: str) -> tuple[str, ...]:
    """Return the texts that are separated by white space."""
    expected = "tokens of printable ASCII characters, separated by spaces"
    return tuple(_checked(text, re.fullmatch(r"([!-~]+\s+)*[!-~]*", text), expected).split())


def url(text: str) -> str:
    """Return an http or https URL."""
    outbound.parts(text)
    return text


def base_url(text: str) -> str:
    """Return an http or https URL to which paths can be appended."""
    return _checked(url(text).rstrip("/"), "?" not in text, "a URL without a query")


def headers(text: str) -> Mapping[str, str]:
    """Return the headers in a JSON object."""
    value, fit = {}, False
    with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
        value = json.loads(text)
        fit = all(_HEADER.fullmatch(name + "\n" + line) for name, line in value.items())
    _checked(value, fit, 'a JSON object of headers such as {"Authorization": "Bearer ..."}')
    ours = [name for name in value if _RESERVED.fullmatch(name.lower())]
    return _checked(value, not ours, f"other headers than {', '.join(ours)}, which Postback sets")


def upload(text: str) -> Path:
    """Return a file that Dask workers can import."""
    fit = text.endswith((".py", ".zip", ".egg")) and Path(text).is_file()
    return _checked(Path(text), fit, "a .py, .zip or .egg file that exists")


def certificates(text: str) -> Path:
    """Return a file of certificates."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(text)
    except OSError as exc:
        raise ValueError("expected a readable file of certificates in PEM format") from exc
    return Path(text)


def _env(parse: Callable[[str], Any], default: str | None = None, *, secret: bool = False) -> Any:
    """Declare a field: how its text is read, and the text that counts when it is unset."""
    return field(metadata={"parse": parse, "default": default, "secret": secret})


_word = like(r"[!-~]+", "printable ASCII without spaces")
_count = whole(1, 1_000_000)
_address = like(
    r"(tcp|tls)://(\[[0-9A-Fa-f:.]+\]|[\w.-]+):[0-9]{1,5}", "tcp:// or tls://, HOST:PORT"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Every setting. A field is its variable in lower case, plus the unit.

    `--help` shows the meanings as they are written here.

    Attributes:
        host: Address to listen on. 0.0.0.0 is every IPv4 address, and :: every IPv6 and IPv4 one.
        port: Port to listen on. 0 is any free one.
        public_url: URL by which others reach the service. It may have a path.
        api_token: Token that callers must send. Several, separated by spaces, are all valid.
        analysis: Your function, as package.module:function.
        analysis_schedule_seconds: Waits after which an analysis that raised runs again.
        executor: Where the analysis runs: thread, process or dask.
        workers: Processes of EXECUTOR=process. The default is the CPUs this process may use.
        dask_scheduler: Address of the cluster of EXECUTOR=dask, such as tcp://127.0.0.1:8786.
        dask_upload: A .py, .zip or .egg file to send to the Dask workers.
        job_timeout_seconds: How long an analysis may take.
        max_running: How many analyses may run at once.
        max_pending: How many accepted jobs may wait. Beyond that, the answer is 503.
        max_body_bytes: Largest request body.
        journal_path: File of the journal. It must be on a local disk.
        retention_seconds: How long an ended job is kept.
        postback_url: Where results are posted. The default is the service's own /postprocessed.
        postback_allow: Origins that callers may name in postback_url. * is any public https URL.
        postback_secret: Signs postbacks: whsec_... Several, separated by spaces, for a rotation.
        postback_headers: JSON object of headers to send, except to URLs that only * allows.
        postback_ca_bundle: File of certificates (PEM) to trust in place of the usual ones.
        postback_timeout_seconds: How long one delivery attempt may take.
        postback_schedule_seconds: Waits between attempts, or none for a single attempt.
        postback_max_bytes: Largest event. A result that does not fit is replaced by a link to it.
        drain_seconds: How long a stop waits for running jobs.
        log_level: The least important messages to log: debug, info, warning or error.
        log_format: text or json.
    """

    host: str = _env(_word, "127.0.0.1")
    port: int = _env(whole(0, 65535), "8080")
    public_url: str | None = _env(base_url)
    api_token: tuple[str, ...] = _env(tokens, "", secret=True)
    analysis: str = _env(_word, "processing:analyze")
    analysis_schedule_seconds: tuple[float, ...] = _env(durations, "none")
    executor: str = _env(choice("thread", "process", "dask"), "thread")
    workers: int | None = _env(_count)
    dask_scheduler: str | None = _env(_address)
    dask_upload: Path | None = _env(upload)
    job_timeout_seconds: float | None = _env(timeout, "none")
    max_running: int = _env(_count, "32")
    max_pending: int = _env(_count, "10000")
    max_body_bytes: int = _env(size, "1MiB")
    journal_path: Path = _env(Path, "journal.db")
    retention_seconds: float = _env(duration, "24h")
    postback_url: str | None = _env(url)
    postback_allow: outbound.Policy = _env(outbound.Policy.of, "")
    postback_secret: tuple[str, ...] = _env(signatures.read_secrets, "", secret=True)
    postback_headers: Mapping[str, str] = _env(headers, "{}", secret=True)
    postback_ca_bundle: Path | None = _env(certificates)
    postback_timeout_seconds: float = _env(duration, "15s")
    postback_schedule_seconds: tuple[float, ...] = _env(
        durations, "2s 10s 1m 5m 30m 2h 6h 12h 24h 24h"
    )
    postback_max_bytes: int = _env(size, "1MiB")
    drain_seconds: float = _env(duration, "25s")
    log_level: str = _env(choice("debug", "info", "warning", "error"), "info")
    log_format: str = _env(choice("text", "json"), "text")


def load() -> Config:
    """Read the environment.

    Raises:
        ConfigError: One line for each wrong variable, such as
            POSTBACK_TIMEOUT='fast': expected a duration such as 15s or 5m, up to 3650d
    """
    problems, values = list(_unknown()), {}
    for setting in fields(Config):
        try:
            values[setting.name] = _read(variable(setting.name), setting.metadata)
        except ValueError as exc:
            problems.append(str(exc))
    if values.get("executor") == "dask" and values.get("dask_scheduler", "wrong") is None:
        problems.append("DASK_SCHEDULER: EXECUTOR=dask needs it, such as tcp://127.0.0.1:8786")
    if values.get("workers") and values.get("executor") in ("thread", "dask"):
        problems.append("WORKERS: only EXECUTOR=process takes it. Set that, or leave out WORKERS.")
    if problems:
        raise errors.ConfigError("\n".join(problems))
    if values["executor"] == "process":  # one job for each worker
        workers = values["workers"] or cpu_count()
        values["max_running"] = min(workers, values["max_running"])
    return Config(**values)


def variable(name: str) -> str:
    """Return the environment variable of a field: the field without its unit."""
    return re.sub(r"(?<!_max)_(seconds|bytes|path)$", "", name).upper()


def table() -> Iterator[tuple[str, str, str]]:
    """Yield each variable, its default as it would be written, and its meaning."""
    meanings = dict(re.findall(r"^ {4,}(\w+): (.+)$", Config.__doc__ or "", re.MULTILINE))
    for setting in fields(Config):
        name, spec = variable(setting.name), setting.metadata
        file = f" Or {name}_FILE, a file that contains it." if spec["secret"] else ""
        yield name, spec["default"] or "", meanings.get(setting.name, "") + file


def without_password(text: str) -> str:
    """Return a URL that can be shown: without what stands before an @, and without its query."""
    return re.sub(r"(?s)(?<=//).*@|(?<=\?).*", "***", text)


def cpu_count(limit_path: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Return how many CPUs this process may use, by its affinity and its container's quota."""
    # macOS has no affinity.
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError, ValueError):  # no cgroups of version 2, or no quota
        quota, period = map(int, limit_path.read_text(encoding="utf-8").split())
        return min(count or 1, math.ceil(quota / period))
    return count or 1


def _read(name: str, spec: Mapping[str, Any]) -> Any:
    # A variable that is set but empty counts as unset, because compose files leave such.
    text = (_secret(name) if spec["secret"] else os.environ.get(name)) or spec["default"]
    try:
        return spec["parse"](text) if text is not None else None
    except (ValueError, errors.Refusal) as exc:
        shown = "***" if spec["secret"] else repr(without_password(text))
        reason = re.sub(r"(?<=\?)[^\s']+", "***", str(exc))  # it may quote one of several URLs
        raise ValueError(f"{name}={shown}: {reason}") from exc


def _secret(name: str) -> str:
    text, path = os.environ.get(name, ""), os.environ.get(f"{name}_FILE")
    if text and path:
        raise ValueError(f"{name} and {name}_FILE are both set: leave out one")
    try:
        # An empty file is a mistake that must not open the service to everybody.
        text = Path(path).read_text(encoding="utf-8").strip() if path else text
        return _checked(text, text or not path, "a secret")
    except (OSError, ValueError) as exc:
        why = getattr(exc, "strerror", None) or "it is empty or not UTF-8"
        expected = "expected a readable file that contains the secret"
        raise ValueError(f"{name}_FILE: {expected}: {why}") from exc


def _unknown() -> Iterator[str]:
    known = {variable(one.name) for one in fields(Config)}
    known |= {f"{variable(one.name)}_FILE" for one in fields(Config) if one.metadata["secret"]}
    similar = {name.removeprefix("POSTBACK_"): name for name in sorted(known)}
    for name, text in sorted(os.environ.items()):
        if not name.startswith("POSTBACK_") or name in known or _KUBERNETES.match(f"{name}={text}"):
            continue
        close = difflib.get_close_matches(name.removeprefix("POSTBACK_"), similar, n=1)
        hint = f"Did you mean {similar[close[0]]}?" if close else "./run serve --help lists them."
        yield f"{name}: there is no such setting. {hint}"


def _checked(value: T, fit: object, expected: str) -> T:
    if not fit:
        raise ValueError(f"expected {expected}")
    return value
