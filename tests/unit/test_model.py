"""Ids, instants, endings and events."""

import re
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import model
from jobs.model import Ending, Job, Outcome, State

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)
FIELDS: Any = {"state": State.RUNNING, "postback_url": None, "receiver": "", "forwarded": {}}
JOB = Job(id="1" * 32, created_at=NOW, **FIELDS)
SUCCESS = Ending(outcome=Outcome.SUCCEEDED, result=b"1", started_at=NOW, finished_at=NOW)


def event(max_bytes: int = 10_000) -> model.Event:
    return model.event_of(JOB, SUCCESS, max_bytes=max_bytes, job_url="http://here/jobs/1")


def test_ids_are_32_hexadecimal_digits_that_sort_by_age_and_differ():
    ids = [model.new_id(NOW + timedelta(milliseconds=number // 9)) for number in range(900)]

    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in ids)
    assert len(set(ids)) == 900
    assert [one[:12] for one in sorted(ids)] == [one[:12] for one in ids]


INSTANTS = st.datetimes(datetime(1970, 1, 2), datetime(9999, 12, 1), timezones=st.just(UTC))  # noqa: DTZ001


@settings(deadline=None, max_examples=50)
@given(st.lists(INSTANTS))
def test_an_instant_has_one_form_whose_order_is_time_order(some):
    texts = [model.text_of(one) for one in sorted(some)]

    assert texts == sorted(texts)
    for one, text in zip(sorted(some), texts, strict=True):
        assert re.fullmatch(r"\d{4}(-\d\d){2}T\d\d(:\d\d){2}\.\d{3}Z", text)
        assert timedelta(0) <= one - datetime.fromisoformat(text) < timedelta(milliseconds=1)


# Events


def test_an_error_may_contain_any_text_and_is_cut():
    ending = model.without_result(Outcome.FAILED, "a\ud800é" + "x" * 3000, "ValueError")

    assert ending.error["message"] == "a?é" + "x" * 1997


def test_an_event_over_the_limit_links_to_its_result_by_a_key_that_cannot_be_guessed():
    whole = event()

    thin, other = (event(max_bytes=len(whole.body) - 1) for _ in range(2))

    assert event(max_bytes=len(whole.body)) == whole
    assert (thin.result, thin.result_at) == (SUCCESS.result, None)
    assert len(str(thin.result_key)) >= 20
    assert thin.result_key != other.result_key
