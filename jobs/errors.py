"""The tree of errors: everything the service refuses or gives up, with its facts as attributes.

    errors.Error
    ├── ConfigError              a start that is refused; one line for each problem
    ├── RequestError             what the caller sent cannot be accepted; sending it again is no use
    │   ├── MalformedError           the body or a header breaks a rule
    │   ├── LengthRequiredError      no length was given
    │   ├── TooLargeError            the body is over MAX_BODY
    │   ├── MediaTypeError           the body is not application/json
    │   ├── UnauthorizedError        the token is missing or wrong
    │   ├── KeyReusedError           an Idempotency-Key came with another body
    │   └── ReceiverRefusedError     a postback URL, or the address behind it, is not allowed
    ├── UnavailableError         try again later; nothing was accepted
    │   ├── FullError                MAX_PENDING jobs are waiting
    │   ├── DrainingError            the service is about to stop
    │   └── JournalError             the journal cannot be written or read now
    │       └── JournalLostError         it can no longer be trusted: the process must end
    ├── JobNotFoundError         no job has this id
    └── MoveError                the job's state does not allow the move

`web/server.py` holds the one table from these to HTTP status codes.
"""

from collections.abc import Sequence


class Error(Exception):
    """Everything that Postback itself raises."""


class ConfigError(Error):
    """The service cannot start as it is configured.

    Attributes:
        problems: One line for each thing that is wrong, saying what would be right.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class RequestError(Error):
    """What was sent cannot be accepted; the message tells the caller what to do."""


class MalformedError(RequestError):
    """The body or a header breaks a rule."""


class LengthRequiredError(RequestError):
    """The body has no length that can be known before it is read."""


class TooLargeError(RequestError):
    """The body is larger than is allowed."""


class MediaTypeError(RequestError):
    """The body is not application/json, or is encoded."""


class UnauthorizedError(RequestError):
    """The token or the signature is missing or wrong."""


class KeyReusedError(RequestError):
    """An Idempotency-Key came again with another body."""


class ReceiverRefusedError(RequestError):
    """A postback URL, or the address behind it, is not allowed."""


class UnavailableError(Error):
    """Nothing was accepted; the same request may be sent again later.

    Attributes:
        retry_after_seconds: When another try makes sense, in whole seconds.
    """

    retry_after_seconds = 5


class FullError(UnavailableError):
    """As many jobs are waiting as MAX_PENDING allows."""


class DrainingError(UnavailableError):
    """The service is about to stop."""


class JournalError(UnavailableError):
    """The journal cannot be written or read now; it may recover by itself."""


class JournalLostError(JournalError):
    """The journal can no longer be trusted: the process must end, and a restart reads the disk."""


class JobNotFoundError(Error):
    """No job has this id; finished jobs are removed after RETENTION."""

    def __init__(self, job_id: str) -> None:
        super().__init__(
            f"No job has the id {job_id[:64]!r}. Finished jobs are removed after RETENTION."
        )
        self.job_id = job_id


class MoveError(Error):
    """The job's state does not allow the move.

    Attributes:
        job_id: The job.
        state: Where it stands.
        wanted: What was to be done with it.
    """

    def __init__(self, job_id: str, *, state: str, wanted: str) -> None:
        super().__init__(f"Job {job_id} is {state}; it cannot be {wanted}.")
        self.job_id = job_id
        self.state = state
        self.wanted = wanted
