"""The few kinds of error that somebody catches by name.

Refusal               a request that is not carried out: a status code, a title and a detail
├── MoveError         the job's state does not allow what was asked (409)
└── JournalError      the journal cannot be read or written now (503)
    └── JournalLost   it can no longer be trusted, so the process must end
ConfigError           a start that is refused: one line for each problem
"""


class Refusal(Exception):  # noqa: N818 - a refusal is an answer
    """A request that is not carried out.

    Attributes:
        status_code: The HTTP status of the answer.
        title: What kind of refusal it is, in a few words. The metrics count by it.
        detail: What was wrong, and what would have been right.
        retry_after_seconds: When the same request may succeed; None when it never will.
    """

    def __init__(
        self, status_code: int, title: str, detail: str, *, retry_after_seconds: int | None = None
    ) -> None:
        super().__init__(detail)
        self.status_code = status_code
        self.title = title
        self.detail = detail
        self.retry_after_seconds = retry_after_seconds


def invalid(detail: str) -> Refusal:
    """Return the refusal of an invalid request."""
    return Refusal(400, "Invalid request", detail)


class MoveError(Refusal):
    """The job's state does not allow the move. Nothing was changed."""

    def __init__(self, job_id: str, *, state: str, wanted: str) -> None:
        detail = f"Job {job_id} is {state}, so it cannot be {wanted}."
        if wanted == "deleted":
            first = "Wait" if state == "delivering" else "Cancel it, and wait"
            detail += f" {first} until it is delivered or undelivered."
        super().__init__(409, "Wrong state", detail)


class JournalError(Refusal):
    """The journal cannot be read or written now. Nothing was committed."""

    def __init__(self, detail: str) -> None:
        super().__init__(503, "Journal failing", detail, retry_after_seconds=5)


class JournalLost(JournalError):  # noqa: N818 - as above
    """The journal can no longer be trusted. The process must end; a restart reads the disk."""


class ConfigError(Exception):
    """The service cannot start as it is configured: a line for each thing that is wrong."""
