"""One error tree. Each class carries the gRPC status that a client sees.

    AlbireoError                 INTERNAL
    ├── InvalidRequest           INVALID_ARGUMENT     refuse the request: a field is wrong
    ├── NotServed                UNIMPLEMENTED        refuse the request: a parameter is not served yet
    ├── NotFound                 NOT_FOUND            refuse the request: what it asks for is not there
    ├── Overloaded               RESOURCE_EXHAUSTED   refuse the request: try again later
    ├── DeadlineExceeded         DEADLINE_EXCEEDED    refuse or fail the request: nobody waits for its answer
    ├── GroupUnavailable         UNAVAILABLE          fail the request: its worker group is gone
    ├── StoreUnavailable         UNAVAILABLE          go on without: the KV store is gone, all is a miss
    ├── ConfigError              FAILED_PRECONDITION  do not start: a flag, file or model is wrong
    └── GroupError               INTERNAL             restart the group: its state can no longer be trusted

There are three outcomes only: refuse the request, fail the request, restart the group.
"""

import grpc


class AlbireoError(Exception):
    """Base of all errors raised on purpose."""

    status: grpc.StatusCode = grpc.StatusCode.INTERNAL
    retry_after_s: float = 0.0  # when a client should try again; 0: unknown


class InvalidRequest(AlbireoError):
    """A request field has a value that cannot be served; the message names field, value and limit."""

    status = grpc.StatusCode.INVALID_ARGUMENT


class NotServed(AlbireoError):
    """A request asks for a parameter that this version does not serve. It is never ignored."""

    status = grpc.StatusCode.UNIMPLEMENTED


class NotFound(AlbireoError):
    """A request asks for something that is not there."""

    status = grpc.StatusCode.NOT_FOUND


class Overloaded(AlbireoError):
    """A bound is reached; the client should try again later."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(AlbireoError):
    """A request's deadline has passed."""

    status = grpc.StatusCode.DEADLINE_EXCEEDED


class GroupUnavailable(AlbireoError):
    """The worker group or the planner is gone."""

    status = grpc.StatusCode.UNAVAILABLE


class StoreUnavailable(AlbireoError):
    """The KV store is gone, or has taken back a lease; whoever needs it computes instead."""

    status = grpc.StatusCode.UNAVAILABLE


class ConfigError(AlbireoError):
    """A flag, a configuration file or a model directory cannot be used; the process does not start."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class GroupError(AlbireoError):
    """The state of a worker group can no longer be trusted."""
