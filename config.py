"""The environment, read once into a frozen `Config`, or a refusal naming every wrong variable.

Each field of `Config` is one variable; `--help` is made from the same fields. Durations are written
`250ms`, `15s`, `5m`, `24h`; sizes `512`, `64KiB`, `1MiB`.
"""

import difflib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import environs

import postback
from jobs import errors
from web import outbound, signatures

T = TypeVar("T")

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {"": 1, "B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}

#: Limits of what the machine and the libraries can take.
_MAX_SECONDS = 10 * 365 * 86400.0
_MAX_BYTES = 1024**3

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, section 5.6.2
_PRINTABLE = re.compile(r"[ -~]*")

# What Kubernetes tells each container of a Service that is named postback.
_OF_CLUSTER = re.compile(r"POSTBACK_(SERVICE_(HOST|PORT)|PORT_[0-9]+_|PORT=[a-z]+://)")


def duration(text: str) -> float:
    """Return the seconds of a text such as `15s`."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)(ms|s|m|h|d)", text)
    seconds = float(match[1]) * _SECONDS[match[2]] if match else 0.0
    return _checked(seconds, 0 < seconds <= _MAX_SECONDS, "a duration such as 15s or 5m")


def timeout(text: str) -> float | None:
    """Return the seconds of a text such as `15s`; None for `none`."""
    return None if text == "none" else duration(text)


def durations(text: str) -> tuple[float, ...]:
    """Return the seconds of durations separated by spaces; none at all for `none`."""
    found = () if text == "none" else tuple(map(duration, text.split()))
    return _checked(found, bool(found) or text == "none", "durations such as 2s 10s, or none")


def size(text: str) -> int:
    """Return the bytes of a text such as `1MiB`."""
    match = re.fullmatch(r"([0-9]{1,10})(B|KiB|MiB|GiB)?", text)
    size_bytes = int(match[1]) * _BYTES[match[2] or ""] if match else 0
    return _checked(size_bytes, 0 < size_bytes <= _MAX_BYTES, "a size such as 64KiB or 1MiB")


def count(text: str) -> int:
    """Return a whole number from 1 to a million."""
    number = int(text) if re.fullmatch(r"[0-9]{1,7}", text) else 0
    return _checked(number, 1 <= number <= 1_000_000, "a whole number from 1 to 1000000")


def port(text: str) -> int:
    """Return a port; 0 for any that is free."""
    number = int(text) if re.fullmatch(r"[0-9]{1,5}", text) else -1
    return _checked(number, 0 <= number <= 65535, "a port from 0 to 65535, 0 for any free one")


def url(text: str) -> str:
    """Return an http or https URL."""
    try:
        outbound.parts(text)
    except errors.ReceiverRefusedError as exc:
        expected = "expected an http or https URL such as http://127.0.0.1:8080/results"
        raise ValueError(expected) from exc
    return text


def base_url(text: str) -> str:
    """Return an http or https URL that paths can be put behind."""
    return _checked(url(text).rstrip("/"), "?" not in text, "a URL without a query")


def word(text: str) -> str:
    """Return a text without blanks."""
    return _checked(text, bool(re.fullmatch(r"[!-~]+", text)), "printable characters, no blanks")


def headers(text: str) -> Mapping[str, str]:
    """Return the headers in a JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    fit = isinstance(value, dict) and all(
        _TOKEN.fullmatch(name) and isinstance(line, str) and _PRINTABLE.fullmatch(line)
        for name, line in value.items()
    )
    _checked(value, fit, 'a JSON object of headers such as {"Authorization": "Bearer ..."}')
    reserved = [name for name in value if postback.RESERVED_HEADERS.fullmatch(name.lower())]
    return dict(_checked(value, not reserved, f"headers other than {', '.join(reserved)}"))


def scheduler(text: str) -> str:
    """Return the address of a Dask scheduler."""
    fit = re.fullmatch(r"(tcp|tls)://(\[[0-9A-Fa-f:.]+\]|[\w.-]+):[0-9]{1,5}", text)
    return _checked(text, bool(fit), "an address such as tcp://127.0.0.1:8786, or tls://...")


def upload(text: str) -> Path:
    """Return a file that Dask workers can import."""
    path = Path(text)
    fit = path.suffix in (".py", ".zip", ".egg") and path.is_file()
    return _checked(path, fit, "a .py, .zip or .egg file that is there")


def choice(*words: str) -> Callable[[str], str]:
    """Return a parser that takes one of these words."""

    def parse(text: str) -> str:
        return _checked(text.lower(), text.lower() in words, "one of " + ", ".join(words))

    return parse


def _env(
    parse: Callable[[str], Any], default: str | None, meaning: str, *, secret: bool = False
) -> Any:
    """Declare a field: how its text is read, what it is when unset, and its line in the help."""
    metadata = {"parse": parse, "default": default, "meaning": meaning, "secret": secret}
    return field(metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Every setting. A field is its variable in lower case, plus the unit."""

    host: str = _env(word, "127.0.0.1", "address to listen on; 0.0.0.0 for every one")
    port: int = _env(port, "8080", "port to listen on; 0 for any free one")
    public_url: str | None = _env(base_url, None, "how others reach it; unset: its address")
    api_token: str | None = _env(word, None, "token that callers must send", secret=True)
    analysis: str = _env(word, "processing:analyze", "your function, as package.module:function")
    executor: str = _env(
        choice("thread", "process", "dask"),
        "thread",
        "where the analysis runs: thread, process or dask",
    )
    workers: int | None = _env(count, None, "children of EXECUTOR=process; unset: as many as cores")
    dask_scheduler: str | None = _env(
        scheduler, None, "for EXECUTOR=dask, such as tcp://127.0.0.1:8786"
    )
    dask_upload: Path | None = _env(upload, None, "a .py, .zip or .egg file for the Dask workers")
    job_timeout_seconds: float | None = _env(timeout, "none", "how long an analysis may take")
    max_running: int = _env(count, "32", "analyses at once")
    max_pending: int = _env(count, "10000", "jobs that may wait; past that the answer is 503")
    max_body_bytes: int = _env(size, "1MiB", "largest payload")
    journal_path: Path = _env(Path, "journal.db", "file of the journal")
    retention_seconds: float = _env(duration, "24h", "how long an ended job is kept")
    postback_url: str | None = _env(url, None, "where results go; unset: our own /postprocessed")
    postback_allow: outbound.Policy = _env(
        outbound.Policy.of, "", "origins a caller may name as postback_url; * for any public https"
    )
    postback_secret: tuple[str, ...] = _env(
        signatures.read_secrets,
        "",
        "signs postbacks: whsec_...; several while rotating",
        secret=True,
    )
    postback_headers: Mapping[str, str] = _env(
        headers, "{}", "sent with postbacks, but to no URL that only * allows; JSON", secret=True
    )
    postback_timeout_seconds: float = _env(duration, "15s", "wall clock of a whole attempt")
    postback_schedule_seconds: tuple[float, ...] = _env(
        durations, "2s 10s 1m 5m 30m 2h 6h", "waits between attempts; none for a single attempt"
    )
    postback_max_bytes: int = _env(size, "1MiB", "a larger event has a link in place of the result")
    drain_seconds: float = _env(duration, "25s", "how long a stop waits for what is under way")
    log_level: str = _env(
        choice("debug", "info", "warning", "error"), "info", "the least that is logged"
    )
    log_format: str = _env(choice("text", "json"), "text", "text or json")


def load() -> Config:
    """Read the environment, once.

    Raises:
        ConfigError: One line for each wrong variable, such as
            POSTBACK_TIMEOUT='fast': expected a duration such as 15s or 5m.
    """
    problems = list(_unknown(os.environ))
    values = {}
    for setting in fields(Config):
        try:
            values[setting.name] = _read(variable(setting.name), setting.metadata)
        except ValueError as exc:
            problems.append(str(exc))
    if values.get("executor") == "dask" and not values.get("dask_scheduler", "refused already"):
        problems.append("DASK_SCHEDULER: EXECUTOR=dask needs one, such as tcp://127.0.0.1:8786")
    if problems:
        raise errors.ConfigError(problems)
    return Config(**values)


def variable(name: str) -> str:
    """Return the environment variable of a field: the field without its unit."""
    return re.sub(r"(?<!_max)_(seconds|bytes|path)$", "", name).upper()


def table() -> Iterator[tuple[str, str, str]]:
    """Yield each variable, its default as it would be written, and its meaning."""
    for setting in fields(Config):
        meaning = setting.metadata["meaning"]
        suffix = " (or NAME_FILE)" if setting.metadata["secret"] else ""
        yield variable(setting.name), setting.metadata["default"] or "", meaning + suffix


def _read(name: str, spec: Mapping[str, Any]) -> Any:
    # A variable that is set, but empty, is as good as unset: compose files leave such.
    text = (_secret(name) if spec["secret"] else environs.env.str(name, "")) or spec["default"]
    if text is None:
        return None
    try:
        return spec["parse"](text)
    except ValueError as exc:
        shown = "***" if spec["secret"] else repr(text)
        raise ValueError(f"{name}={shown}: {exc}") from exc


def _secret(name: str) -> str:
    """Return a secret, from the file that NAME_FILE names if it is set."""
    try:
        text = environs.FileAwareEnv(strip_whitespace=True).str(name, "")
        # An empty file is a mistake: it must not open the service to all.
        return _checked(text, bool(text or not os.environ.get(f"{name}_FILE")), "a secret")
    except (OSError, ValueError) as exc:
        raise ValueError(f"{name}_FILE: expected a readable file that holds the secret") from exc


def _unknown(environment: Mapping[str, str]) -> Iterator[str]:
    known = [variable(setting.name) for setting in fields(Config)]
    known += [f"{variable(one.name)}_FILE" for one in fields(Config) if one.metadata["secret"]]
    for name in sorted(environment):
        if _OF_CLUSTER.match(f"{name}={environment[name]}"):
            continue
        if name.startswith("POSTBACK_") and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "see --help"
            yield f"{name}: there is no such setting; {hint}"


def _checked(value: T, fit: bool, expected: str) -> T:  # noqa: FBT001 - reads as a sentence
    if not fit:
        raise ValueError(f"expected {expected}")
    return value
