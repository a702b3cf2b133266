"""The writes of many threads: shared commits, refusals and failures."""

from contextlib import closing
from functools import partial

import pytest

from jobs.errors import MoveError
from jobs.journal import Journal
from jobs.writer import Writer
from tests.integration.test_journal import accept, claim


class Desk:
    """A writer, running jobs, and what is told of the writes that move them back."""

    def __init__(self, journal):
        self.journal = journal
        self.asked: list[None] = []
        self.told: list[tuple[str, object]] = []
        self.writer = Writer(journal, on_write=lambda: self.asked.append(None))
        for _ in range(3):
            accept(journal)
        self.jobs = [one.job.id for one in claim(journal)]

    def hand_over(self, job_id, write=None, **options):
        write = write or partial(self.journal.run_again, job_id, next_start_at=None)
        self.writer.hand_over(write, lambda answer: self.told.append((job_id, answer)), **options)

    def states(self):
        return [self.journal.job(job_id).state for job_id in self.jobs]


@pytest.fixture
def desk(tmp_path):
    with closing(Journal(tmp_path / "journal.db", on_lost=lambda: None)) as journal:
        journal.open()
        yield Desk(journal)


def test_a_move_that_is_refused_does_not_undo_the_others_of_its_commit(desk):
    executed: list[str] = []
    desk.journal._connection.set_trace_callback(executed.append)
    first, _, third = desk.jobs
    for job_id in (first, first, third):
        desk.hand_over(job_id)
    assert (len(desk.asked), desk.told) == (3, [])

    desk.writer.write()

    assert executed.count("COMMIT") == 1
    assert [job_id for job_id, _ in desk.told] == [first, first, third]
    assert [type(answer) for _, answer in desk.told] == [type(None), MoveError, type(None)]
    assert desk.states() == ["accepted", "running", "accepted"]
    assert desk.writer.failure is None


def test_a_write_that_fails_is_tried_again_and_does_not_undo_the_others(desk):
    first, second, third = desk.jobs
    desk.hand_over(first)
    desk.hand_over(second, partial(raise_at_first, [MemoryError, MemoryError]))
    desk.hand_over(third)

    desk.writer.write()
    assert desk.told == [(first, None), (third, None)]
    assert "MemoryError" in str(desk.writer.failure)

    desk.writer.write(retry=True)
    assert desk.told[2:] == [(second, "written")]
    assert desk.writer.failure is None


def raise_at_first(problems):
    if problems:
        raise problems.pop()
    return "written"
