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
