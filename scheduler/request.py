"""One prompt and whose it is, as it travels to the engine."""

from __future__ import annotations

import enum
import time

import msgspec

from scheduler.sampling_params import SamplingParams

ANONYMOUS = "anonymous"
"""The user of every request while there are no keys."""


class DeadlineError(RuntimeError):
    """The request cannot be answered by its deadline; the message says why."""


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


class PriorityClass(enum.IntEnum):
    """A user's class; see fair.py and `PriorityFirst` for what it does."""

    HIGH = -1
    NORMAL = 0
    LOW = 1


CLASS_DISTANCE = 1000
"""Between the priorities of two classes."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt from one client, as it travels to the engine."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
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

    @property
    def priority_class(self) -> PriorityClass:
        """The class whose priority is nearest."""
        return PriorityClass(max(-1, min(1, round(self.priority / CLASS_DISTANCE))))


class Progress(msgspec.Struct, frozen=True):
    """How far one of a request's sequences had come when the engine was lost that had it."""

    index: int
    token_ids: list[int]
    """Of its answer."""
    num_computed: int
    """The most of its tokens, the prompt's among them, that had been computed."""
    num_cached_tokens: int
