import pytest

import postback

SCHEDULE = (2.0, 10.0, 60.0)


@pytest.mark.parametrize(
    ("number", "chance", "expected"),
    [(1, 0.5, 2.0), (1, 0.0, 1.6), (1, 1.0, 2.4), (2, 0.5, 10.0), (3, 0.0, 48.0)],
)
def test_the_wait_is_that_of_the_schedule_give_or_take_a_fifth(number, chance, expected):
    wait = postback.seconds_until_next(number, SCHEDULE, random=lambda: chance)

    assert wait == pytest.approx(expected)


@pytest.mark.parametrize(("number", "schedule"), [(4, SCHEDULE), (5, SCHEDULE), (1, ())])
def test_after_the_last_attempt_there_is_no_wait(number, schedule):
    assert postback.seconds_until_next(number, schedule, retry_after_seconds=5) is None


@pytest.mark.parametrize(("asked", "expected"), [(1.0, 2.0), (30.0, 30.0), (0, 2.0)])
def test_the_wait_is_at_least_what_the_receiver_asks_for(asked, expected):
    wait = postback.seconds_until_next(1, SCHEDULE, retry_after_seconds=asked, random=lambda: 0.5)

    assert wait == pytest.approx(expected)
