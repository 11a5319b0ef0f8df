"""One prompt, whose it is, and why an answer ends."""

from __future__ import annotations

import enum
import time

import msgspec

from scheduler.core.sampling import Sampling

ANONYMOUS = "anonymous"
"""The user of every request while there are no keys."""


class InvalidRequestError(ValueError):
    """The request cannot be served as it is; the message tells the client what to change.

    `param` names the field at fault, and `code` the kind of fault, where they have names.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class FinishReason(enum.StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    """It produced an end-of-sequence token, a stop token or a stop string."""
    LENGTH = "length"
    """It reached `max_tokens`."""
    ABORT = "abort"
    """The client cancelled it or went away."""
    TIMEOUT = "timeout"
    """Its deadline passed."""
    REFUSED = "refused"
    """It turned out to take more work than it may; its error says of what."""
    ERROR = "error"
    """It failed inside the engine; the log has the traceback."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt from one client, as it travels to the engine."""

    request_id: str
    prompt_token_ids: list[int]
    params: Sampling
    """With `max_tokens` and `seed` resolved to numbers."""
    user: str = ANONYMOUS
    """Whose it is: who is served, and who is charged."""
    weight: float = 1.0
    """The user's share, relative to other users' (policy `fair`)."""
    max_running: int | None = None
    """How many of the user's sequences may run at once; None: any number."""
    priority: int = 0
    """Lower goes earlier: among the user's own requests (`fair`), or among all (`priority`)."""
    deadline: float | None = None
    """When it ends, answered or not: seconds on the machine's monotonic clock."""
    prediction: list[int] = []
    """Tokens that the client expects the answer to have: a source of guesses, which change no answer."""
    cache_salt: str = ""
    """Prefixes are shared only between requests of the same salt."""
    arrival_time: float = msgspec.field(default_factory=time.monotonic)
    """Seconds on the machine's monotonic clock."""
