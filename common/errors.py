"""The one error tree. A leaf knows its HTTP status, OpenAI `type` and `code`; the code is also the NATS error code.

MoeculeError
├── ConfigError               the start must end (exit 78): setting, checkpoint or model
├── InvalidRequest            400
│   ├── ContextLengthExceeded 400
│   ├── InvalidKey            401
│   ├── NotAllowed            403
│   ├── ModelNotFound         404
│   ├── NotFound              404
│   ├── MethodNotAllowed      405
│   ├── BodyTimeout           408
│   └── BodyTooLarge          413
├── RequestCancelled          499
├── Overloaded                429: the queues
├── RateLimited               429: a limit of the caller's own key
├── DeadlineExceeded          408: the time that the caller gave is over
├── InternalError             500
└── Unavailable               503
    ├── NoWorker              no worker can take the request
    ├── ExpertsUnavailable    some expert lives on no live shard
    ├── WorkerLost            the worker of a running request is gone
    ├── Draining              the actor is leaving
    └── BusUnavailable        NATS cannot be reached
        ├── NoResponders      nobody listens on the subject
        └── BusTimeout        nobody answered in time
"""

from __future__ import annotations

from typing import ClassVar

LONGEST_MESSAGE = 2000  # characters
LONGEST_PARAM = 200
EXIT_FAILURE = 1  # an actor failed; as of any exception
EXIT_CONFIG = 78  # the start must end: a restart would fail alike
EXIT_UNAVAILABLE = 69  # NATS did not come up


class MoeculeError(Exception):
    """`message` may quote what a client sent, of any length: it is cut, else no answer could carry it."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"
    retry_after: int | None = None  # seconds; None: a retry is useless

    def __init__(self, message: str, param: str | None = None) -> None:
        self.message = message if len(message) <= LONGEST_MESSAGE else f"{message[: LONGEST_MESSAGE - 3]}..."
        self.param = param and param[:LONGEST_PARAM]
        super().__init__(self.message)


class ConfigError(MoeculeError):
    code = "config_error"


class InternalError(MoeculeError):
    pass


class InvalidRequest(MoeculeError):
    status, type, code = 400, "invalid_request_error", "invalid_request"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class InvalidKey(InvalidRequest):
    status, code = 401, "invalid_api_key"


class NotAllowed(InvalidRequest):
    status, code = 403, "not_allowed"


class ModelNotFound(InvalidRequest):
    status, code = 404, "model_not_found"


class NotFound(InvalidRequest):
    status, code = 404, "not_found"


class MethodNotAllowed(InvalidRequest):
    status, code = 405, "method_not_allowed"


class BodyTimeout(InvalidRequest):
    status, code, retry_after = 408, "body_timeout", 1


class BodyTooLarge(InvalidRequest):
    status, code = 413, "body_too_large"


class RequestCancelled(MoeculeError):
    status, type, code = 499, "invalid_request_error", "request_cancelled"


class Overloaded(MoeculeError):
    status, type, code, retry_after = 429, "rate_limit_error", "overloaded", 1


class RateLimited(MoeculeError):
    status, type, code, retry_after = 429, "rate_limit_error", "rate_limit_exceeded", 1

    def __init__(self, message: str, param: str | None = None, retry_after: int = 1) -> None:
        super().__init__(message, param)
        self.retry_after = retry_after


class DeadlineExceeded(MoeculeError):
    status, type, code = 408, "timeout_error", "deadline_exceeded"


class Unavailable(MoeculeError):
    status, type, code, retry_after = 503, "server_error", "unavailable", 1


class NoWorker(Unavailable):
    code = "no_worker"


class ExpertsUnavailable(Unavailable):
    code = "experts_unavailable"


class WorkerLost(Unavailable):
    code = "worker_lost"


class Draining(Unavailable):
    code = "draining"


class BusUnavailable(Unavailable):
    code = "bus_unavailable"


class NoResponders(BusUnavailable):
    code = "no_responders"


class BusTimeout(BusUnavailable):
    code = "bus_timeout"


def _leaves(cls: type[MoeculeError]) -> dict[str, type[MoeculeError]]:
    found = {cls.code: cls}
    for sub in cls.__subclasses__():
        found |= _leaves(sub)
    return found


BY_CODE: dict[str, type[MoeculeError]] = _leaves(MoeculeError) | {InternalError.code: InternalError}


def from_code(code: str, message: str, param: str | None = None) -> MoeculeError:
    """The error that travelled as (code, message, param); an unknown code becomes InternalError."""
    return BY_CODE.get(code, InternalError)(message, param)
