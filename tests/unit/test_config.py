"""The environment: what each variable may contain, and how a wrong one is refused."""

import os
from dataclasses import fields
from pathlib import Path

import certifi
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import config
from config import Config
from jobs import errors
from web.outbound import Policy

SECRET = "whsec_" + "QUJD" * 8
OTHER_SECRET = "whsec_" + "REVG" * 21 + "RA=="  # of 64 bytes, the most
SHORT, LONG = "whsec_" + "QUFB" * 7 + "QUE=", "whsec_" + "enp6" * 21 + "eno="  # of 23 and 65

VARIABLES = [name for name, _, _ in config.table()]
SECRETS = ["API_TOKEN", "POSTBACK_SECRET", "POSTBACK_HEADERS"]

#: Variable, text, what it is read as: at least one for each kind of text.
GOOD = [
    ("PORT", "65535", 65535),
    ("PUBLIC_URL", "https://jobs.example.com/base/", "https://jobs.example.com/base"),
    ("API_TOKEN", r"a\$b${HOME}%20", (r"a\$b${HOME}%20",)),
    ("EXECUTOR", "Process", "process"),
    ("DASK_SCHEDULER", "tcp://[::1]:8786", "tcp://[::1]:8786"),
    ("DASK_UPLOAD", __file__, Path(__file__)),
    ("JOB_TIMEOUT", "none", None),
    ("JOB_TIMEOUT", "1.5s", 1.5),
    ("MAX_PENDING", "1000000", 1_000_000),
    ("MAX_BODY", "64KiB", 65536),
    ("JOURNAL", "/data/my journal.db", Path("/data/my journal.db")),
    ("RETENTION", "3650d", 3650 * 86400.0),
    ("POSTBACK_ALLOW", "*", Policy(allow=frozenset(), any_public_https=True)),
    (
        "POSTBACK_ALLOW",
        "http://web:8080 https://Example.com",
        Policy(
            allow=frozenset({"http://web:8080", "https://example.com:443"}), any_public_https=False
        ),
    ),
    ("POSTBACK_SECRET", f"{SECRET} {OTHER_SECRET}", (SECRET, OTHER_SECRET)),
    ("POSTBACK_HEADERS", '{"X-Key": "a\\\\$b"}', {"X-Key": r"a\$b"}),
    ("POSTBACK_CA_BUNDLE", certifi.where(), Path(certifi.where())),
    ("POSTBACK_SCHEDULE", "none", ()),
    ("POSTBACK_SCHEDULE", "1s  2m 3h", (1.0, 120.0, 10800.0)),
    ("LOG_LEVEL", "WARNING", "warning"),
]

#: Variable, text, words of the line that refuses it.
BAD = [
    ("HOST", "my host", "without spaces"),
    ("PORT", "65536", "a whole number from 0 to 65535"),
    ("PORT", "٨٠", "a whole number"),
    ("PUBLIC_URL", "jobs.example.com", "http"),
    ("PUBLIC_URL", "http://example.com/?a=1", "a URL without a query"),
    ("API_TOKEN", "é", "tokens of printable ASCII"),
    ("ANALYSIS_SCHEDULE", "10", "durations separated by spaces, such as 2s 10s 1m, or none"),
    ("EXECUTOR", "celery", "one of thread, process, dask"),
    ("WORKERS", "0", "a whole number from 1"),
    ("DASK_SCHEDULER", "http://dask:8786", "tcp://"),
    ("DASK_SCHEDULER", "tcp://dask", "HOST:PORT"),
    ("DASK_UPLOAD", "/nowhere/analysis.py", "a .py, .zip or .egg file that exists"),
    ("JOB_TIMEOUT", "5", "a duration such as 15s or 5m, up to 3650d"),
    ("JOB_TIMEOUT", "0s", "a duration"),
    ("MAX_RUNNING", "1.5", "a whole number from 1 to 1000000"),
    ("MAX_BODY", "0", "a size such as 64KiB or 1MiB, up to 1GiB"),
    ("MAX_BODY", "1MB", "a size"),
    ("RETENTION", "3651d", "a duration"),
    ("POSTBACK_URL", "ftp://example.com/", "http"),
    ("POSTBACK_URL", "http://user:pw@example.com/", "user name"),
    (
        "POSTBACK_ALLOW",
        "https://good.example https://bad.example/path",
        "'https://bad.example/path'",
    ),
    ("POSTBACK_ALLOW", "https://*", "The host"),
    *(
        ("POSTBACK_SECRET", text, "expected whsec_ followed by the base64 of 24 to 64 random bytes")
        for text in (SECRET[6:], f"{SECRET}!", f"{OTHER_SECRET} whsec_QUJD", SHORT, LONG, " ")
    ),
    ("POSTBACK_HEADERS", "Authorization: Bearer x", "a JSON object of headers"),
    ("POSTBACK_HEADERS", "[" * 100_000, "a JSON object of headers"),
    ("POSTBACK_HEADERS", '{"a: b": "c"}', "a JSON object of headers"),
    ("POSTBACK_HEADERS", '{"a": "b\\r\\nc: d"}', "a JSON object of headers"),
    ("POSTBACK_HEADERS", '{"a": "é"}', "a JSON object of headers"),
    ("POSTBACK_CA_BUNDLE", __file__, "certificates in PEM format"),
    ("LOG_LEVEL", "loud", "one of debug, info, warning, error"),
]


@pytest.fixture(autouse=True)
def unset(monkeypatch, tmp_path):
    """Unset every variable, and leave the checkout."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(f"{name}_FILE", raising=False)
    monkeypatch.chdir(tmp_path)


def field_of(variable: str) -> str:
    return next(one.name for one in fields(Config) if config.variable(one.name) == variable)


def problems() -> tuple[str, ...]:
    with pytest.raises(errors.ConfigError) as refused:
        config.load()
    return tuple(str(refused.value).splitlines())


@pytest.mark.parametrize(("name", "text", "value"), GOOD)
def test_a_variable_is_read(monkeypatch, name, text, value):
    monkeypatch.setenv(name, text)

    assert getattr(config.load(), field_of(name)) == value


@pytest.mark.parametrize(("name", "text", "words"), BAD, ids=[f"{n}-{t:.20}" for n, t, _ in BAD])
def test_a_wrong_variable_is_refused_with_what_is_right(monkeypatch, name, text, words):
    monkeypatch.setenv(name, text)

    [line] = problems()

    assert line.startswith(f"{name}=")
    assert words in line.partition(": ")[2]
    assert len(line.splitlines()) == 1


@pytest.mark.parametrize("executor", ["", "dask"])
def test_workers_are_refused_for_another_executor(monkeypatch, executor):
    monkeypatch.setenv("WORKERS", "4")
    monkeypatch.setenv("EXECUTOR", executor)
    monkeypatch.setenv("DASK_SCHEDULER", "tcp://127.0.0.1:8786")

    assert problems() == (
        "WORKERS: only EXECUTOR=process takes it. Set that, or leave out WORKERS.",
    )


@pytest.mark.parametrize("name", [*VARIABLES, *(f"{name}_FILE" for name in SECRETS)])
def test_a_variable_that_is_empty_counts_as_unset(monkeypatch, name):
    defaults = config.load()
    monkeypatch.setenv(name, "")

    assert config.load() == defaults


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("POSTBACK_SECRET_FIEL", "Did you mean POSTBACK_SECRET_FILE?"),
        ("POSTBACK_PORT", "Did you mean PORT?"),
        ("POSTBACK_XYZZY_PLUGH_FROBOZZ_QUUX", "./run serve --help lists them."),
    ],
)
def test_an_unknown_name_with_our_prefix_is_refused_with_a_suggestion(monkeypatch, name, hint):
    monkeypatch.setenv(name, "8080")

    assert problems() == (f"{name}: there is no such setting. {hint}",)


@pytest.mark.parametrize("service", ["POSTBACK", "POSTBACK_URL"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("SERVICE_HOST", "10.0.0.1"),
        ("SERVICE_PORT_HTTP", "80"),
        ("PORT", "tcp://10.0.0.1:80"),
        ("PORT_53_UDP_PORT", "53"),
    ],
)
def test_what_kubernetes_sets_for_a_service_is_ignored(monkeypatch, service, name, text):
    monkeypatch.setenv(f"{service}_{name}", text)

    assert config.load().port == 8080


# Secrets


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("API_TOKEN", "hunter2\N{SNOWMAN}"),
        ("POSTBACK_HEADERS", '{"X-Key": "hunter2", "b": 1}'),
        ("POSTBACK_SECRET", "hunter2"),
    ],
)
def test_a_refusal_never_shows_a_secret(monkeypatch, name, text):
    monkeypatch.setenv(name, text)

    [line] = problems()

    assert line.startswith(f"{name}=***: expected ")
    assert "hunter2" not in line


@pytest.mark.parametrize("name", ["POSTBACK_URL", "PUBLIC_URL", "POSTBACK_ALLOW"])
@pytest.mark.parametrize(
    "url",
    [
        "https://user:hunter2/@@example.com/#a",
        "https://user:hunter2?@example.com/",
        "https://example.com:0/?token=hunter2",
    ],
)
def test_a_refused_url_shows_no_password_and_no_query(monkeypatch, name, url):
    monkeypatch.setenv(name, url)

    [line] = problems()

    assert "hunter2" not in line
    assert "***" in line


@pytest.mark.parametrize("name", ["Webhook-Id", "HOST"])
def test_a_header_that_is_ours_is_refused_by_name(monkeypatch, name):
    monkeypatch.setenv("POSTBACK_HEADERS", f'{{"X-Fine": "1", "{name}": "hunter2"}}')

    assert problems() == (
        f"POSTBACK_HEADERS=***: expected other headers than {name}, which Postback sets",
    )


def test_a_secret_comes_from_a_file_without_the_end_of_its_line(monkeypatch, tmp_path):
    (tmp_path / "token").write_bytes(b"to\\$ken$ \r\n")
    monkeypatch.setenv("API_TOKEN_FILE", str(tmp_path / "token"))

    assert config.load().api_token == (r"to\$ken$",)

    monkeypatch.setenv("API_TOKEN", "another")
    assert problems() == ("API_TOKEN and API_TOKEN_FILE are both set: leave out one",)


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("missing", "No such file or directory"),
        (".", "Is a directory"),
        ("blank", "it is empty or not UTF-8"),
        ("binary", "it is empty or not UTF-8"),
    ],
)
def test_a_file_without_a_secret_is_refused_in_one_line(monkeypatch, tmp_path, name, path, why):
    (tmp_path / "blank").write_text(" \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(f"{name}_FILE", path)

    assert problems() == (f"{name}_FILE: expected a readable file that contains the secret: {why}",)


# The help


def test_the_help_has_a_line_for_each_field():
    rows = list(config.table())

    assert len({name for name, *_ in rows}) == len(rows) == len(fields(Config))
    assert [name for name, _, meaning in rows if f"{name}_FILE" in meaning] == SECRETS


def test_each_default_in_the_help_is_itself_accepted(monkeypatch):
    defaults = config.load()
    for name, default, _ in config.table():
        monkeypatch.setenv(name, default)

    assert config.load() == defaults


# The CPUs


def test_the_affinity_decides_how_many_cpus_there_are(tmp_path):
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, [min(cpus)])

    count = config.cpu_count(tmp_path / "none")
    os.sched_setaffinity(0, cpus)

    assert count == 1


@pytest.mark.parametrize(
    ("limit", "most"),
    [("50000 100000", 1), ("100000000 100000", 1000), ("max 100000", 1000)],
)
def test_the_quota_of_the_container_limits_the_cpus(tmp_path, limit, most):
    path = tmp_path / "cpu.max"
    without = config.cpu_count(path)
    path.write_text(f"{limit}\n")

    assert config.cpu_count(path) == min(without, most)


TEXTS = st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=40)


@given(name=st.sampled_from([*VARIABLES, "POSTBACK_X"]), text=TEXTS)
@settings(deadline=None, max_examples=100)
def test_any_text_is_read_or_refused_in_one_line(name, text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, text)
        try:
            lines: tuple[str, ...] = (config.load().host,)
        except errors.ConfigError as exc:
            lines = tuple(str(exc).splitlines())

    assert [len(line.splitlines()) for line in lines] == [1]
