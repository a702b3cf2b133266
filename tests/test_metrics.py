"""What is counted: told by hand, and by the service as it works."""

import json
import re
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jobs import errors, model
from jobs.model import State
from tests.harness import ROOT, Caller, poll
from web.logs import Answer
from web.metrics import MINUTES, Metrics

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics(clock) -> Metrics:
    return Metrics(clock)


def value(text: str, name: str, **labels: str) -> Any:
    """Return one sample of Prometheus text."""
    samples = [one for family in text_string_to_metric_families(text) for one in family.samples]
    found = [
        one.value for one in samples if one.name == name and labels.items() <= one.labels.items()
    ]
    return found[0] if found else None


def of(metrics: Metrics, name: str, **labels: str) -> Any:
    return value(metrics.text().decode(), name, **labels)


def job(**fields):
    one = model.new_job(postback_url=None, receiver="", forwarded={}, now=NOW)
    return one._replace(**fields)


def attempt(*, status_code: int | None = 204, error: str | None = None) -> model.Attempt:
    return model.Attempt(
        number=1,
        attempted_at=NOW,
        duration_seconds=0.25,
        status_code=status_code,
        error=error,
        seconds_until_next=None,
    )


def answer(*, method="POST", route="/process", seconds=0.01, status_code=200, error=None) -> Answer:
    return Answer(
        method=method,
        path=route,
        route=route,
        status_code=status_code,
        seconds=seconds,
        error=error,
        job_id=None,
    )


def test_an_accepted_job_is_counted(metrics):
    metrics.accepted(job())

    assert of(metrics, "postback_jobs_accepted_total") == 1


def test_every_outcome_and_end_is_there_before_it_happens(metrics):
    assert of(metrics, "postback_jobs_finished_total", outcome="crashed") == 0
    assert of(metrics, "postback_jobs_ended_total", state="undelivered") == 0


def test_an_analysis_counts_by_its_outcome_with_its_waiting_and_running_time(metrics):
    metrics.finished(
        job(
            outcome=model.Outcome.FAILED,
            started_at=NOW + timedelta(seconds=2),
            finished_at=NOW + timedelta(seconds=5),
        )
    )

    assert of(metrics, "postback_jobs_finished_total", outcome="failed") == 1
    assert of(metrics, "postback_waiting_seconds_sum") == 2
    assert of(metrics, "postback_running_seconds_sum") == 3


def test_a_job_canceled_before_it_began_has_no_running_time(metrics):
    metrics.finished(job(outcome=model.Outcome.CANCELED, finished_at=NOW))

    assert of(metrics, "postback_jobs_finished_total", outcome="canceled") == 1
    assert of(metrics, "postback_running_seconds_count") == 0


def test_a_clock_that_was_set_back_makes_no_negative_time(metrics):
    earlier = NOW - timedelta(hours=1)

    metrics.finished(job(outcome=model.Outcome.FAILED, started_at=earlier, finished_at=earlier))

    assert of(metrics, "postback_waiting_seconds_sum") == 0


@pytest.mark.parametrize(
    ("status_code", "error", "result"),
    [(204, None, "delivered"), (503, "503", "5xx"), (302, "302", "3xx"), (None, "x", "no_answer")],
)
def test_an_attempt_counts_by_its_result(metrics, status_code, error, result):
    metrics.attempted(job(), attempt(status_code=status_code, error=error), State.DELIVERING)

    assert of(metrics, "postback_attempts_total", result=result) == 1
    assert of(metrics, "postback_attempt_seconds_sum") == 0.25


def test_a_delivery_is_timed_from_the_answer(metrics, clock):
    clock.now += timedelta(seconds=7)

    metrics.attempted(job(), attempt(), State.DELIVERED)

    assert of(metrics, "postback_delivery_seconds_sum") == 7
    assert of(metrics, "postback_jobs_ended_total", state="delivered") == 1


def test_a_resend_counts_but_is_not_timed(metrics):
    metrics.attempted(job(resent_after=1), attempt(), State.DELIVERED)

    assert of(metrics, "postback_jobs_ended_total", state="delivered") == 1
    assert of(metrics, "postback_delivery_seconds_count") == 0


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (errors.FullError(""), "full"),
        (errors.MalformedError(""), "malformed"),
        (errors.TooLargeError(""), "too_large"),
        (errors.ReceiverRefusedError(""), "receiver_refused"),
    ],
)
def test_a_refusal_counts_by_its_reason(metrics, error, reason):
    metrics.answered(answer(status_code=503, error=error))

    assert of(metrics, "postback_jobs_refused_total", reason=reason) == 1


def test_only_process_refuses_jobs(metrics):
    metrics.answered(answer(method="GET", route="/jobs", error=errors.MalformedError("")))

    assert of(metrics, "postback_jobs_refused_total") is None


def test_answers_are_timed_by_route_and_status(metrics):
    metrics.answered(answer(seconds=0.5))

    labels = {"method": "POST", "route": "/process", "status_code": "200"}
    assert of(metrics, "postback_answer_seconds_sum", **labels) == 0.5


def test_methods_that_callers_make_up_share_one_label(metrics):
    metrics.answered(answer(method="SPAM1", route="none", status_code=405))
    metrics.answered(answer(method="SPAM2", route="none", status_code=405))

    assert of(metrics, "postback_answer_seconds_count", method="any", route="none") == 2


def test_a_commit_is_timed(metrics):
    metrics.settled(0.002)

    assert of(metrics, "postback_commit_seconds_sum") == 0.002


# The last hour


def test_an_hour_without_any_happening_is_empty(metrics):
    assert metrics.hour() == []


def test_a_minute_has_its_counts_and_the_p99_of_its_answers(metrics):
    metrics.accepted(job())
    metrics.attempted(job(), attempt(), State.DELIVERED)
    metrics.attempted(job(), attempt(error="x"), State.UNDELIVERED)
    fast = [answer(seconds=0.001)] * 98
    for one in [*fast, answer(seconds=1.0), answer(seconds=1.0)]:
        metrics.answered(one)

    (minute,) = metrics.hour()

    assert (minute["accepted"], minute["delivered"], minute["undelivered"]) == (1, 1, 1)
    assert minute["at"] == "2026-01-02T03:04:00.000Z"
    assert 0.9 < minute["p99_seconds"] < 1.1


def test_a_minute_without_answers_has_no_p99(metrics):
    metrics.accepted(job())

    assert metrics.hour()[0]["p99_seconds"] is None


def test_what_is_older_than_an_hour_is_gone(metrics, clock):
    metrics.answered(answer())
    clock.now += timedelta(minutes=MINUTES)

    assert metrics.hour() == []


def test_a_clock_that_was_set_back_goes_on_counting(metrics, clock):
    metrics.answered(answer())
    clock.now -= timedelta(minutes=5)
    metrics.answered(answer())

    assert len(metrics.hour()) == 1


# The service


def metrics_with(service: Caller, name: str) -> str:
    """Return the metrics once one is counted: that comes after the answer, or the delivery."""

    def find() -> str | None:
        text = service.get("/metrics").text
        return text if value(text, name) else None

    return poll(find, f"{name} to be counted")


def test_a_job_leaves_its_trace_in_every_metric(service):
    service.wait_for(service.process({"data": 1}))
    service.post("/process", json={})

    text = metrics_with(service, "postback_delivery_seconds_count")

    assert value(text, "postback_jobs_accepted_total") == 1
    assert value(text, "postback_jobs_refused_total", reason="malformed") == 1
    assert value(text, "postback_attempts_total", result="delivered") == 1
    assert value(text, "postback_running_seconds_count") == 1
    assert value(text, "postback_commit_seconds_count") >= 1
    assert value(text, "postback_journal_bytes") > 4096


def test_what_is_not_delivered_is_counted_after_a_restart_too(start, receiver):
    receiver.default = 503
    service = start(POSTBACK_URL=receiver.url, POSTBACK_SCHEDULE="1h")
    service.process({"data": 1})
    service.process({"data": 2})
    receiver.wait_for(2)
    service.restart()

    text = service.get("/metrics").text

    assert value(text, "postback_jobs", state="delivering") == 2
    assert 0 < value(text, "postback_oldest_job_age_seconds", state="delivering") < 20
    assert value(text, "postback_oldest_job_age_seconds", state="accepted") == 0


def test_a_thread_that_outlives_its_job_is_counted(start, gate):
    service = start(ANALYSIS="tests.analyses:wait", JOB_TIMEOUT="50ms")
    service.process({"data": 1})

    metrics_with(service, "postback_outlived_threads")
    gate.open()

    poll(lambda: value(service.get("/metrics").text, "postback_outlived_threads") == 0, "its end")


# Prometheus itself

promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="apt install prometheus")


@promtool
def test_prometheus_finds_no_fault_with_the_text(service):
    service.wait_for(service.process({"data": 1}))
    text = service.get("/metrics").text

    check = subprocess.run(
        ["promtool", "check", "metrics"], check=False, input=text, capture_output=True, text=True
    )

    assert (check.returncode, check.stdout + check.stderr) == (0, "")


@promtool
@pytest.mark.parametrize(
    "arguments", [("check", "rules", "docs/alerts.yml"), ("test", "rules", "tests/alerts.yml")]
)
def test_the_alert_rules_load_and_fire_when_they_should(arguments):
    check = subprocess.run(
        ["promtool", *arguments], check=False, cwd=ROOT, capture_output=True, text=True
    )

    assert check.returncode == 0, check.stdout + check.stderr


DASHBOARD = json.loads((ROOT / "docs/grafana.json").read_text(encoding="utf-8"))
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


@promtool
def test_the_queries_of_the_dashboard_are_well_formed(tmp_path):
    rules = [
        {"record": f"query:{number}", "expr": query.replace("$__rate_interval", "5m")}
        for number, query in enumerate(QUERIES)
    ]
    path = tmp_path / "queries.yml"
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))

    check = subprocess.run(
        ["promtool", "check", "rules", path], check=False, capture_output=True, text=True
    )

    assert check.returncode == 0, check.stdout + check.stderr


def test_dashboard_and_alerts_ask_for_metrics_that_exist(service):
    service.wait_for(service.process({"data": 1}))
    service.post("/process", json={})
    text = metrics_with(service, "postback_attempts_total")
    alerts = (ROOT / "docs/alerts.yml").read_text(encoding="utf-8")

    asked = set(re.findall(r"postback_\w+", " ".join(QUERIES) + alerts))

    known = {one.name for family in text_string_to_metric_families(text) for one in family.samples}
    assert asked <= known
