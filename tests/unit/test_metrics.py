"""What is counted, and where: Prometheus text, and the last hour for the page."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jobs import model
from jobs.model import Outcome, State
from web.logs import Answer
from web.metrics import MINUTES, Metrics

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
JOB = model.Job(
    id="j", state=State.RUNNING, postback_url=None, receiver="", forwarded={}, created_at=NOW
)
ATTEMPT = model.Attempt(number=1, attempted_at=NOW, duration_seconds=0.25, status_code=204)
ANSWER = Answer("POST", "/process", "/process", 200, 0.01)


class Clock:
    now = NOW

    def __call__(self):
        return self.now


class Journal:
    """A journal in which one job waits."""

    def census(self):
        return [(State.DELIVERING, 2, NOW), (State.ACCEPTED, 0, None)]

    def size_bytes(self):
        return 4096


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def metrics(clock):
    return Metrics(clock)


def of(metrics, name, **labels):
    """Return one sample of the text."""
    families = text_string_to_metric_families(metrics.text(Journal()).decode())
    samples = [one for family in families for one in family.samples if one.name == name]
    found = [one.value for one in samples if labels.items() <= one.labels.items()]
    return found[0] if found else None


@pytest.mark.parametrize(
    ("started", "finished", "expected"),
    [(2, 5, (2, 3, 1)), (-3600, -3600, (0, 0, 1)), (None, 1, (0, 0, 0))],
    ids=["in order", "the clock was set back", "canceled before it began"],
)
def test_an_analysis_counts_with_its_times(metrics, started, finished, expected):
    ending = model.without_result(Outcome.FAILED, "no", "ValueError")
    times: dict[str, Any] = {
        "started_at": None if started is None else NOW + timedelta(seconds=started),
        "finished_at": NOW + timedelta(seconds=finished),
    }

    metrics.ended_analysis(JOB, replace(ending, **times))

    counts = [of(metrics, "postback_jobs_finished_total", outcome=one) for one in Outcome]
    assert counts == [one is Outcome.FAILED for one in Outcome]
    names = ("waiting_seconds_sum", "running_seconds_sum", "running_seconds_count")
    assert tuple(of(metrics, f"postback_{name}") for name in names) == expected


@pytest.mark.parametrize(
    ("status_code", "error", "result"),
    [(204, None, "delivered"), (503, "503", "5xx"), (302, "302", "3xx"), (None, "x", "no_answer")],
)
def test_an_attempt_counts_by_its_result(metrics, status_code, error, result):
    attempt = replace(ATTEMPT, status_code=status_code, error=error)

    metrics.attempted(JOB, attempt, State.DELIVERING)

    assert of(metrics, "postback_attempts_total", result=result) == 1
    assert of(metrics, "postback_attempt_seconds_sum") == 0.25
    assert of(metrics, "postback_jobs_ended_total", state="delivered") == 0


@pytest.mark.parametrize(("resent_after", "count"), [(0, 1), (1, 0)])
def test_a_delivery_is_timed_unless_it_was_resent(metrics, clock, resent_after, count):
    clock.now += timedelta(seconds=7)

    metrics.attempted(replace(JOB, resent_after=resent_after), ATTEMPT, State.DELIVERED)

    assert of(metrics, "postback_jobs_ended_total", state="delivered") == 1
    assert of(metrics, "postback_delivery_seconds_sum") == 7 * count
    assert of(metrics, "postback_delivery_seconds_count") == count


@pytest.mark.parametrize(
    ("method", "route", "count"),
    [
        ("POST", "/process", 1),
        ("GET", "none", 1),  # the server itself
        ("GET", "/jobs", None),
        ("POST", "/postprocessed", None),
    ],
)
def test_a_refused_job_counts_by_its_reason(metrics, method, route, count):
    metrics.answered(ANSWER._replace(method=method, route=route, reason="Body too large"))

    assert of(metrics, "postback_jobs_refused_total", reason="body_too_large") == count


def test_answers_are_timed_by_route_and_methods_that_callers_make_up_share_a_label(metrics):
    metrics.answered(ANSWER)
    metrics.answered(ANSWER._replace(method="SPAM1", route="none", status_code=405))
    metrics.answered(ANSWER._replace(method="SPAM2", route="none", status_code=405))

    labels = {"method": "POST", "route": "/process", "status_code": "200"}
    assert of(metrics, "postback_answer_seconds_sum", **labels) == 0.01
    assert of(metrics, "postback_answer_seconds_count", method="any", route="none") == 2


def test_what_the_journal_knows_is_asked_each_time(metrics, clock):
    clock.now += timedelta(seconds=9)

    assert of(metrics, "postback_jobs", state="delivering") == 2
    assert of(metrics, "postback_oldest_job_age_seconds", state="delivering") == 9
    assert of(metrics, "postback_oldest_job_age_seconds", state="accepted") == 0
    assert of(metrics, "postback_journal_bytes") == 4096


# The last hour


def test_a_minute_has_its_counts_and_the_p99_of_its_answers(metrics):
    assert metrics.hour() == []
    metrics.accepted(JOB)
    assert metrics.hour()[0]["p99_seconds"] is None
    assert of(metrics, "postback_jobs_accepted_total") == 1
    metrics.attempted(JOB, ATTEMPT, State.DELIVERED)
    metrics.attempted(JOB, replace(ATTEMPT, error="x"), State.UNDELIVERED)
    for seconds in [0.001] * 98 + [1.0] * 2:
        metrics.answered(ANSWER._replace(seconds=seconds))

    (minute,) = metrics.hour()

    assert (minute["accepted"], minute["delivered"], minute["undelivered"]) == (1, 1, 1)
    assert minute["at"] == "2026-01-02T03:04:00.000Z"
    assert 0.9 < minute["p99_seconds"] < 1.1


@pytest.mark.parametrize(("minutes", "left"), [(MINUTES, 0), (MINUTES - 1, 1)])
def test_what_is_older_than_an_hour_is_gone(metrics, clock, minutes, left):
    metrics.answered(ANSWER)
    clock.now += timedelta(minutes=minutes)

    assert len(metrics.hour()) == left


def test_a_clock_that_was_set_back_goes_on_counting(metrics, clock):
    metrics.answered(ANSWER)
    clock.now -= timedelta(minutes=5)
    metrics.answered(ANSWER)

    assert len(metrics.hour()) == 1
