import inspect
import json
import math
import re
from datetime import UTC, datetime, timedelta, timezone
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import errors, model
from jobs.model import MOVES, Outcome, State

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)
SCHEMA = (Path(model.__file__).parent / "schema.sql").read_text()
JOB = model.new_job(postback_url=None, receiver="", forwarded={}, now=NOW)
BEGUN = JOB._replace(started_at=NOW + timedelta(seconds=1))
DONE = NOW + timedelta(seconds=2)

CIRCULAR: list[object] = []
CIRCULAR.append(CIRCULAR)


def nested(depth):
    """Return lists and objects in turn, so deep in each other."""
    value: object = 0
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def event(ending, *, job=BEGUN, max_bytes=10_000):
    return model.event_of(
        job, ending, finished_at=DONE, max_bytes=max_bytes, result_url="http://here/jobs/1/result"
    )


def posted(ending, **options):
    return json.loads(event(ending, **options).body)


# States


@pytest.mark.parametrize(("column", "enum"), [("state", State), ("outcome", Outcome)])
def test_the_journal_allows_the_values_of_the_enum_and_no_others(column, enum):
    (values,) = re.findall(rf"CHECK \({column} IN \(([^)]*)\)\)", SCHEMA)

    assert re.findall(r"'(\w+)'", values) == list(enum)


def test_the_moves_lead_from_every_state_to_every_state():
    assert set(MOVES) == set(State)
    assert set().union(*MOVES.values()) == set(State)


# Ids and instants


def test_an_id_is_32_hexadecimal_digits():
    assert re.fullmatch(r"[0-9a-f]{32}", model.new_id(NOW))


def test_ids_sort_by_age():
    ids = [model.new_id(NOW + timedelta(milliseconds=number)) for number in range(300)]

    assert ids == sorted(ids)


def test_ids_of_one_moment_differ():
    assert len({model.new_id(NOW) for _ in range(1000)}) == 1000


def test_a_new_job_is_accepted_now_and_has_no_past():
    before = model.utc_now()

    job = model.new_job(postback_url="https://a/b", receiver="https://a", forwarded={"x": "y"})

    assert before <= job.created_at <= model.utc_now()
    assert (job.state, job.starts, job.attempts) == (State.ACCEPTED, 0, 0)
    assert (job.postback_url, job.receiver, job.forwarded) == (
        "https://a/b",
        "https://a",
        {"x": "y"},
    )


@pytest.mark.parametrize(
    ("instant", "text"),
    [
        (NOW, "2026-01-02T03:04:05.678Z"),
        (NOW.replace(microsecond=0), "2026-01-02T03:04:05.000Z"),
        (NOW.replace(microsecond=999_999), "2026-01-02T03:04:05.999Z"),
        (NOW.astimezone(timezone(timedelta(hours=-9))), "2026-01-02T03:04:05.678Z"),
    ],
)
def test_an_instant_has_one_form(instant, text):
    assert model.text_of(instant) == text


instants = st.datetimes(datetime(1970, 1, 1), datetime(9999, 12, 1), timezones=st.just(UTC))  # noqa: DTZ001


@settings(deadline=None, max_examples=50)
@given(instants, instants)
def test_text_order_is_time_order(one, other):
    earlier, later = sorted([one, other])

    assert model.text_of(earlier) <= model.text_of(later)


# Results


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (None, "null"),
        (0, "0"),
        ((1, 2), "[1, 2]"),
        ({1: True}, '{"1": true}'),
        ("\U0001f600", r'"\ud83d\ude00"'),
        (r"\ud800", r'"\\ud800"'),
        (nested(128), json.dumps(nested(128))),
        ([[]] * 129, json.dumps([[]] * 129)),
        ([nested(127), []], json.dumps([nested(127), []])),
    ],
    ids=[
        "null",
        "zero",
        "tuple",
        "number-as-key",
        "pair",
        "escape",
        "128-deep",
        "129-wide",
        "both",
    ],
)
def test_what_is_json_succeeds(result, text):
    assert model.succeeded(result) == model.Ending(outcome=Outcome.SUCCEEDED, result=text)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (math.nan, "not JSON compliant"),
        ({"a": [-math.inf]}, "not JSON compliant"),
        ({1}, "type set"),
        (b"x", "type bytes"),
        (object(), "type object"),
        ({(1, 2): 3}, "keys must be"),
        (10**5000, "Exceeds the limit"),
        (CIRCULAR, "Circular"),
        (nested(129), "nested deeper than 128"),
        (((),) * 200 + (nested(129),), "nested deeper than 128"),
        (nested(2000), "recursion|nested deeper"),
        ("\ud800", "half of a surrogate pair"),
        ({"\udfff": 1}, "half of a surrogate pair"),
        (["\ude00\ud83d"], "half of a surrogate pair"),
    ],
    ids=[
        *("nan", "infinity", "set", "bytes", "object", "tuple-as-key", "huge-number", "circular"),
        *("129-deep", "129-deep-in-tuples", "2000-deep", "surrogate", "surrogate-key", "swapped"),
    ],
)
def test_what_is_not_json_is_a_failed_analysis(result, message):
    ending = model.succeeded(result)

    assert (ending.outcome, ending.result) == (Outcome.FAILED, None)
    assert ending.error["type"] == "not_serialisable"
    assert re.search(message, ending.error["message"])


def test_a_result_at_the_limit_is_kept(monkeypatch):
    monkeypatch.setattr(model, "MAX_RESULT_BYTES", 10)

    assert model.succeeded("a" * 8).result == '"aaaaaaaa"'


def test_a_result_over_the_limit_is_a_failed_analysis(monkeypatch):
    monkeypatch.setattr(model, "MAX_RESULT_BYTES", 10)

    ending = model.succeeded("a" * 9)

    assert ending.outcome == Outcome.FAILED
    assert ending.error == {
        "type": "result_too_large",
        "message": "The result is 11 bytes of JSON; at most 10 are kept.",
    }


@pytest.mark.parametrize(
    ("value", "depth"), [(0, 0), ("[[", 0), ([], 1), ({}, 1), ((), 1), ([1, {"a": [2]}, []], 3)]
)
def test_the_depth_counts_lists_and_objects(value, depth):
    assert model.depth_of(value) == depth


# Errors of an analysis


class UnreadableError(Exception):
    def __str__(self):
        raise SystemExit


@pytest.mark.parametrize(
    ("exc", "error"),
    [
        (ValueError("no"), {"type": "ValueError", "message": "no"}),
        (KeyError("a"), {"type": "KeyError", "message": "'a'"}),
        (SystemExit(3), {"type": "SystemExit", "message": "3"}),
        (ValueError("a\ud800é"), {"type": "ValueError", "message": "a?é"}),
        (ValueError("é" * 2001), {"type": "ValueError", "message": "é" * 2000}),
        (
            UnreadableError(),
            {"type": "UnreadableError", "message": "(its message cannot be read)"},
        ),
    ],
    ids=["plain", "key", "exit", "surrogate", "long", "unreadable"],
)
def test_an_analysis_that_raises_leaves_its_type_and_message(exc, error):
    assert model.failed(exc) == model.Ending(outcome=Outcome.FAILED, error=error)


@pytest.mark.parametrize(
    ("ending", "outcome", "error"),
    [
        (
            model.timed_out(0.5),
            "timed_out",
            {
                "type": "timed_out",
                "message": "The analysis took longer than JOB_TIMEOUT, 0.5 s.",
            },
        ),
        (model.canceled(), "canceled", {"type": "canceled", "message": "The job was canceled."}),
        (model.crashed("exit -11"), "crashed", {"type": "crashed", "message": "exit -11"}),
        (model.failed(OSError("x")), "failed", {"type": "OSError", "message": "x"}),
    ],
    ids=["timed_out", "canceled", "crashed", "failed"],
)
def test_an_ending_without_a_result_is_posted_with_its_error(ending, outcome, error):
    document = posted(ending)

    assert document["type"] == f"job.{outcome}"
    assert (document["data"]["outcome"], document["data"]["error"]) == (outcome, error)
    assert document["data"]["result"] is None


# Events


def test_an_event_has_every_field_of_the_contract():
    document = posted(model.succeeded({"a": "é"}))

    assert document == {
        "type": "job.succeeded",
        "timestamp": "2026-01-02T03:04:07.678Z",
        "data": {
            "id": JOB.id,
            "outcome": "succeeded",
            "result": {"a": "é"},
            "error": None,
            "created_at": "2026-01-02T03:04:05.678Z",
            "started_at": "2026-01-02T03:04:06.678Z",
            "finished_at": "2026-01-02T03:04:07.678Z",
        },
    }


def test_a_job_that_never_began_is_posted_without_a_start():
    assert posted(model.canceled(), job=JOB)["data"]["started_at"] is None


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
results = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10
)


@settings(deadline=None, max_examples=50)
@given(results)
def test_any_json_result_arrives_as_it_was_returned(result):
    assert posted(model.succeeded(result))["data"]["result"] == result


def test_an_event_at_the_limit_is_posted_whole():
    ending = model.succeeded("a" * 100)
    whole = event(ending)

    assert event(ending, max_bytes=len(whole.body)) == whole
    assert whole.result is None


def test_an_event_over_the_limit_links_to_its_result():
    ending = model.succeeded("é" * 100)
    result = ending.result.encode()

    thin = event(ending, max_bytes=len(event(ending).body) - 1)

    data = json.loads(thin.body)["data"]
    assert thin.result == ending.result
    assert "result" not in data
    assert data["result_url"] == "http://here/jobs/1/result"
    assert data["result_bytes"] == len(result)
    assert data["result_sha256"] == sha256(result).hexdigest()


def test_an_error_is_posted_whole_whatever_the_limit():
    ending = model.failed(ValueError("x"))

    assert event(ending, max_bytes=1) == event(ending)


@pytest.mark.parametrize(("error", "delivered"), [(None, True), ("502", False), ("", False)])
def test_an_attempt_without_an_error_is_delivered(error, delivered):
    attempt = model.Attempt(
        number=1,
        attempted_at=NOW,
        duration_seconds=0.1,
        status_code=None,
        error=error,
        seconds_until_next=None,
    )

    assert attempt.delivered is delivered


# The tree of errors


def test_the_picture_of_the_errors_shows_all_of_them():
    classes = dict(inspect.getmembers(errors, inspect.isclass))
    shown = re.findall(r"── (\w+)", errors.__doc__)

    assert {"Error", *shown} == {
        name for name, one in classes.items() if one.__module__ == errors.__name__
    }
    assert all(issubclass(classes[name], errors.Error) for name in shown)


def test_a_refused_start_names_each_problem_on_a_line():
    error = errors.ConfigError(["PORT='x'", "HOST=''"])

    assert error.problems == ("PORT='x'", "HOST=''")
    assert str(error) == "PORT='x'\nHOST=''"


def test_a_move_that_is_refused_tells_its_facts():
    error = errors.MoveError("1", state=State.RUNNING, wanted=State.DELIVERED)

    assert (error.job_id, error.state, error.wanted) == ("1", "running", "delivered")
    assert str(error) == "Job 1 is running; it cannot be delivered."


def test_an_unknown_id_is_told_only_in_part():
    error = errors.JobNotFoundError("a" * 5000)

    assert error.job_id == "a" * 5000
    assert len(str(error)) < 200


def test_whoever_is_turned_away_learns_when_to_come_again():
    assert errors.JournalLostError("gone").retry_after_seconds == 5
