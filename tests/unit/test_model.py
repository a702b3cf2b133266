"""Ids, instants, endings and events."""

import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import model
from jobs.model import Ending, Job, Outcome, State

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)
FIELDS: Any = {"state": State.RUNNING, "postback_url": None, "receiver": "", "forwarded": {}}
JOB = Job(id="1" * 32, metadata={"order": "é"}, created_at=NOW, **FIELDS)
BEGAN, ENDED = NOW + timedelta(seconds=1), NOW + timedelta(seconds=2)
SUCCESS = Ending(
    outcome=Outcome.SUCCEEDED, result=b'{"a": "\\u00e9"}', started_at=BEGAN, finished_at=ENDED
)


def event(ending: Ending, *, max_bytes: int = 10_000) -> model.Event:
    return model.event_of(JOB, ending, max_bytes=max_bytes, job_url="http://here/jobs/1")


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


def test_an_event_has_every_field_of_the_contract():
    posted = event(SUCCESS)

    assert json.loads(posted.body) == {
        "type": "job.succeeded",
        "timestamp": "2026-01-02T03:04:07.678Z",
        "data": {
            "id": JOB.id,
            "outcome": "succeeded",
            "result": {"a": "é"},
            "error": None,
            "metadata": {"order": "é"},
            "created_at": "2026-01-02T03:04:05.678Z",
            "started_at": "2026-01-02T03:04:06.678Z",
            "finished_at": "2026-01-02T03:04:07.678Z",
        },
    }
    assert posted.body[posted.result_at : -2] == SUCCESS.result
    assert (posted.result, posted.result_key) == (None, None)


def test_an_error_may_contain_any_text_and_is_cut():
    ending = model.without_result(Outcome.FAILED, "a\ud800é" + "x" * 3000, "ValueError")

    assert ending.error["message"] == "a?é" + "x" * 1997


def test_an_event_over_the_limit_links_to_its_result_by_a_key_that_cannot_be_guessed():
    whole = event(SUCCESS)

    thin, other = (event(SUCCESS, max_bytes=len(whole.body) - 1) for _ in range(2))

    assert event(SUCCESS, max_bytes=len(whole.body)) == whole
    assert (thin.result, thin.result_at) == (SUCCESS.result, None)
    assert len(str(thin.result_key)) >= 20
    assert thin.result_key != other.result_key
