"""The environment: what each variable may hold, and how a wrong one is refused."""

import os
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import config
from config import Config
from jobs import errors
from web.outbound import Policy

SECRET = "whsec_" + "QUJD" * 8
OTHER_SECRET = "whsec_" + "REVG" * 8

VARIABLES = [name for name, _, _ in config.table()]
SECRETS = ["API_TOKEN", "POSTBACK_SECRET", "POSTBACK_HEADERS"]

#: Variable, text, what it is read as.
GOOD = [
    ("HOST", "::1", "::1"),
    ("PORT", "0", 0),
    ("PORT", "65535", 65535),
    ("PUBLIC_URL", "https://jobs.example.com/base/", "https://jobs.example.com/base"),
    ("API_TOKEN", r"a\$b${HOME}%20", r"a\$b${HOME}%20"),
    ("ANALYSIS", "shop.prices:run", "shop.prices:run"),
    ("EXECUTOR", "Process", "process"),
    ("WORKERS", "64", 64),
    ("DASK_SCHEDULER", "tcp://127.0.0.1:8786", "tcp://127.0.0.1:8786"),
    ("DASK_SCHEDULER", "tls://dask-scheduler.internal:8786", "tls://dask-scheduler.internal:8786"),
    ("DASK_SCHEDULER", "tcp://[::1]:8786", "tcp://[::1]:8786"),
    ("DASK_UPLOAD", __file__, Path(__file__)),
    ("JOB_TIMEOUT", "none", None),
    ("JOB_TIMEOUT", "1.5s", 1.5),
    ("MAX_RUNNING", "1", 1),
    ("MAX_PENDING", "1000000", 1_000_000),
    ("MAX_BODY", "1", 1),
    ("MAX_BODY", "64KiB", 65536),
    ("MAX_BODY", "1GiB", 1024**3),
    ("JOURNAL", "/data/my journal.db", Path("/data/my journal.db")),
    ("RETENTION", "3650d", 3650 * 86400.0),
    ("POSTBACK_URL", "http://127.0.0.1:8081/results?a=1", "http://127.0.0.1:8081/results?a=1"),
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
    ("POSTBACK_TIMEOUT", "250ms", 0.25),
    ("POSTBACK_SCHEDULE", "none", ()),
    ("POSTBACK_SCHEDULE", "1s  2m 3h", (1.0, 120.0, 10800.0)),
    ("POSTBACK_MAX_BYTES", "512B", 512),
    ("DRAIN", "1m", 60.0),
    ("LOG_LEVEL", "WARNING", "warning"),
    ("LOG_FORMAT", "json", "json"),
]

#: Variable, text, words of the line that refuses it.
BAD = [
    ("HOST", "my host", "no blanks"),
    ("HOST", "é", "no blanks"),
    ("PORT", "65536", "a port from 0 to 65535"),
    ("PORT", "-1", "a port"),
    ("PORT", "٨٠", "a port"),
    ("PORT", "80 ", "a port"),
    ("PUBLIC_URL", "jobs.example.com", "an http or https URL"),
    ("PUBLIC_URL", "http://example.com/?a=1", "a URL without a query"),
    ("API_TOKEN", "two words", "no blanks"),
    ("API_TOKEN", "line\n", "no blanks"),
    ("ANALYSIS", "a b", "no blanks"),
    ("EXECUTOR", "celery", "one of thread, process, dask"),
    ("WORKERS", "0", "a whole number"),
    ("DASK_SCHEDULER", "127.0.0.1:8786", "an address such as tcp://127.0.0.1:8786"),
    ("DASK_SCHEDULER", "http://dask:8786", "an address such as tcp://"),
    ("DASK_SCHEDULER", "tcp://dask", "an address such as tcp://"),
    ("DASK_UPLOAD", "/nowhere/analysis.py", "a .py, .zip or .egg file that is there"),
    ("DASK_UPLOAD", str(Path(__file__).parent), "a .py, .zip or .egg file that is there"),
    ("JOB_TIMEOUT", "5", "a duration such as 15s or 5m"),
    ("JOB_TIMEOUT", "0s", "a duration"),
    ("JOB_TIMEOUT", "1e3s", "a duration"),
    ("JOB_TIMEOUT", "\N{ARABIC-INDIC DIGIT FIVE}s", "a duration"),
    ("MAX_RUNNING", "0", "a whole number from 1 to 1000000"),
    ("MAX_RUNNING", "1.5", "a whole number"),
    ("MAX_PENDING", "1000001", "a whole number"),
    ("MAX_PENDING", "1_000", "a whole number"),
    ("MAX_BODY", "0", "a size such as 64KiB or 1MiB"),
    ("MAX_BODY", "1MB", "a size"),
    ("MAX_BODY", "2GiB", "a size"),
    ("RETENTION", "3651d", "a duration"),
    ("POSTBACK_URL", "ftp://example.com/", "an http or https URL"),
    ("POSTBACK_URL", "http://", "an http or https URL"),
    ("POSTBACK_URL", "http://user:pw@example.com/", "an http or https URL"),
    (
        "POSTBACK_ALLOW",
        "https://example.com/path",
        "an origin such as https://example.com:8443, or *",
    ),
    ("POSTBACK_ALLOW", "a\nb", "an origin"),
    ("POSTBACK_SECRET", "secret", "whsec_ followed by"),
    ("POSTBACK_SECRET", f"{SECRET} whsec_QUJD", "whsec_ followed by"),
    ("POSTBACK_HEADERS", "Authorization: Bearer x", "a JSON object of headers"),
    ("POSTBACK_HEADERS", "[" * 100_000, "a JSON object of headers"),
    ("POSTBACK_HEADERS", '["a"]', "a JSON object of headers"),
    ("POSTBACK_HEADERS", '{"a": 1}', "a JSON object of headers"),
    ("POSTBACK_HEADERS", '{"a b": "c"}', "a JSON object of headers"),
    ("POSTBACK_HEADERS", '{"": "c"}', "a JSON object of headers"),
    ("POSTBACK_HEADERS", '{"a": "b\\r\\nc: d"}', "a JSON object of headers"),
    ("POSTBACK_HEADERS", '{"a": "é"}', "a JSON object of headers"),
    ("POSTBACK_TIMEOUT", "fast", "a duration"),
    ("POSTBACK_SCHEDULE", "1s,2s", "a duration"),
    ("POSTBACK_SCHEDULE", "1s none", "a duration"),
    ("POSTBACK_MAX_BYTES", "-1", "a size"),
    ("DRAIN", "", "a duration"),
    ("LOG_LEVEL", "loud", "one of debug, info, warning, error"),
    ("LOG_FORMAT", "xml", "one of text, json"),
]


@pytest.fixture(autouse=True)
def unset(monkeypatch, tmp_path):
    """Every variable is unset, and no file lies in the current directory."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(f"{name}_FILE", raising=False)
    monkeypatch.chdir(tmp_path)


def field_of(variable: str) -> str:
    return next(one.name for one in fields(Config) if config.variable(one.name) == variable)


def problems() -> tuple[str, ...]:
    with pytest.raises(errors.ConfigError) as refused:
        config.load()
    return refused.value.problems


def test_without_any_variable_the_defaults_hold():
    settings = config.load()

    assert settings == Config(
        host="127.0.0.1",
        port=8080,
        public_url=None,
        api_token=None,
        analysis="processing:analyze",
        executor="thread",
        workers=None,
        dask_scheduler=None,
        dask_upload=None,
        job_timeout_seconds=None,
        max_running=32,
        max_pending=10000,
        max_body_bytes=1024**2,
        journal_path=Path("journal.db"),
        retention_seconds=86400.0,
        postback_url=None,
        postback_allow=Policy(allow=frozenset(), any_public_https=False),
        postback_secret=(),
        postback_headers={},
        postback_timeout_seconds=15.0,
        postback_schedule_seconds=(2.0, 10.0, 60.0, 300.0, 1800.0, 7200.0, 21600.0),
        postback_max_bytes=1024**2,
        drain_seconds=25.0,
        log_level="info",
        log_format="text",
    )


def test_dask_needs_a_scheduler(monkeypatch):
    monkeypatch.setenv("EXECUTOR", "dask")

    assert problems() == ("DASK_SCHEDULER: EXECUTOR=dask needs one, such as tcp://127.0.0.1:8786",)


def test_a_loaded_config_cannot_be_changed():
    settings = config.load()

    with pytest.raises(AttributeError):
        settings.port = 1  # type: ignore[misc]


@pytest.mark.parametrize(("name", "text", "value"), GOOD)
def test_a_variable_is_read(monkeypatch, name, text, value):
    monkeypatch.setenv(name, text)

    assert getattr(config.load(), field_of(name)) == value


@pytest.mark.parametrize(("name", "text", "words"), BAD, ids=[f"{n}-{t:.20}" for n, t, _ in BAD])
def test_a_wrong_variable_is_refused_in_one_line_that_says_what_is_right(
    monkeypatch, name, text, words
):
    monkeypatch.setenv(name, text or "0ms")

    [line] = problems()

    assert line.startswith(f"{name}=")
    assert words in line.partition(": expected ")[2]
    assert len(line.splitlines()) == 1


def test_every_variable_has_a_good_text_in_the_table():
    assert {name for name, _, _ in GOOD} == set(VARIABLES)


@pytest.mark.parametrize("name", VARIABLES)
def test_a_variable_that_is_empty_is_unset(monkeypatch, name):
    defaults = config.load()
    monkeypatch.setenv(name, "")

    assert config.load() == defaults


@pytest.mark.parametrize("name", SECRETS)
def test_a_file_variable_that_is_empty_is_unset(monkeypatch, name):
    defaults = config.load()
    monkeypatch.setenv(f"{name}_FILE", "")

    assert config.load() == defaults


def test_all_wrong_variables_are_named_in_one_refusal(monkeypatch):
    monkeypatch.setenv("PORT", "http")
    monkeypatch.setenv("POSTBACK_TIMEOUT", "fast")
    monkeypatch.setenv("POSTBACK_RETRIES", "3")

    lines = problems()

    assert sorted(line.partition("=")[0].partition(":")[0] for line in lines) == [
        "PORT",
        "POSTBACK_RETRIES",
        "POSTBACK_TIMEOUT",
    ]
    assert "POSTBACK_TIMEOUT='fast': expected a duration such as 15s or 5m" in lines


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("POSTBACK_URI", "did you mean POSTBACK_URL?"),
        ("POSTBACK_SECRETS", "did you mean POSTBACK_SECRET?"),
        ("POSTBACK_SECRET_FIEL", "did you mean POSTBACK_SECRET_FILE?"),
        ("POSTBACK_XYZZY_PLUGH_FROBOZZ_QUUX", "see --help"),
        ("POSTBACK_URL_FILE", "did you mean POSTBACK_URL?"),
    ],
)
def test_an_unknown_name_with_our_prefix_is_refused_with_a_hint(monkeypatch, name, hint):
    monkeypatch.setenv(name, "1")

    assert problems() == (f"{name}: there is no such setting; {hint}",)


def test_what_kubernetes_tells_of_a_service_named_postback_is_passed_over(monkeypatch):
    monkeypatch.setenv("POSTBACK_PORT", "tcp://10.0.0.1:8080")
    monkeypatch.setenv("POSTBACK_PORT_8080_TCP_ADDR", "10.0.0.1")
    monkeypatch.setenv("POSTBACK_SERVICE_HOST", "10.0.0.1")
    assert config.load().port == 8080

    monkeypatch.setenv("POSTBACK_PORT", "8080")
    assert "POSTBACK_PORT: there is no such setting" in problems()[0]


@pytest.mark.parametrize("name", ["POSTBACK_SCHEDULE", "POSTBACK_SECRET"])
def test_blanks_alone_do_not_switch_off_what_they_should_set(monkeypatch, name):
    monkeypatch.setenv(name, " ")

    assert f"{name}=" in problems()[0]


# Secrets


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("API_TOKEN", "hunter2 hunter2"),
        ("POSTBACK_SECRET", "whsec_hunter2"),
        ("POSTBACK_HEADERS", '{"Authorization": "Bearer hunter2'),
        ("POSTBACK_HEADERS", '{"X-Key": "hunter2", "b": 1}'),
    ],
)
def test_a_refusal_never_shows_a_secret(monkeypatch, name, text):
    monkeypatch.setenv(name, text)

    [line] = problems()

    assert line.startswith(f"{name}=***: expected ")
    assert "hunter2" not in line


@pytest.mark.parametrize(
    "name", ["Webhook-Id", "webhook-signature", "Content-Type", "HOST", "User-Agent", "Connection"]
)
def test_a_header_that_is_ours_is_refused_by_name(monkeypatch, name):
    monkeypatch.setenv("POSTBACK_HEADERS", f'{{"X-Fine": "1", "{name}": "hunter2"}}')

    assert problems() == (f"POSTBACK_HEADERS=***: expected headers other than {name}",)


@pytest.mark.parametrize("end", ["", "\n", "\r\n", " \n"])
def test_a_secret_comes_from_a_file_without_the_end_of_its_line(monkeypatch, tmp_path, end):
    (tmp_path / "token").write_bytes(rf"to\$ken${end}".encode())
    monkeypatch.setenv("API_TOKEN", "another")
    monkeypatch.setenv("API_TOKEN_FILE", str(tmp_path / "token"))

    assert config.load().api_token == r"to\$ken$"


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize(
    "path", ["missing", ".", "empty", "blank", "binary", "empty/inside", "a" * 300]
)
def test_a_secret_file_that_holds_none_is_refused_in_one_line(monkeypatch, tmp_path, name, path):
    (tmp_path / "empty").touch()
    (tmp_path / "blank").write_text(" \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    monkeypatch.setenv(f"{name}_FILE", path)

    assert problems() == (f"{name}_FILE: expected a readable file that holds the secret",)


@pytest.mark.parametrize("name", ["HOST", "JOURNAL", "LOG", "PORT", "ANALYSIS"])
def test_a_file_variable_of_another_program_is_no_business_of_ours(monkeypatch, name):
    defaults = config.load()
    monkeypatch.setenv(f"{name}_FILE", "/nowhere")

    assert config.load() == defaults


# The help


def test_the_help_has_a_line_for_each_field():
    rows = list(config.table())

    assert len(rows) == len(fields(Config))
    assert len(set(VARIABLES)) == len(rows)
    assert all(meaning for _, _, meaning in rows)


def test_the_help_says_which_variables_may_be_files():
    assert [name for name, _, meaning in config.table() if "NAME_FILE" in meaning] == SECRETS


def test_each_default_in_the_help_is_itself_accepted(monkeypatch):
    defaults = config.load()
    for name, default, _ in config.table():
        monkeypatch.setenv(name, default)

    assert config.load() == defaults


# Anything

TEXTS = st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=40)


@given(name=st.sampled_from([*VARIABLES, "POSTBACK_X"]), text=TEXTS)
@settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200
)
def test_any_text_is_read_or_refused_in_one_line(name, text):
    os.environ[name] = text
    try:
        outcome: object = config.load()
    except errors.ConfigError as exc:
        outcome = exc
    finally:
        del os.environ[name]

    lines = getattr(outcome, "problems", ())
    assert len(lines) <= 1
    assert not [line for line in lines if len(line.splitlines()) != 1]
