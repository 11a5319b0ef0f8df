"""One prompt and whose it is (`Request`), and the life of one answer to it (`Sequence`)."""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass

import msgspec

from scheduler.context_window import ContextWindow
from scheduler.sampling_params import TOO_LONG, InvalidRequestError, PromptTooLongError, SamplingParams

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


def longest_of(
    num_prompt_tokens: int, *, context_shift: bool, max_model_len: int, pool_tokens: int, shifted_len: int
) -> int:
    """Tokens that prompt plus answer can have. `pool_tokens` is the length of the longest sequence that all blocks
    of the pool hold, `shifted_len` that of one that goes on beyond its window."""
    longest = min(max_model_len, pool_tokens)
    return max(longest, shifted_len) if context_shift and num_prompt_tokens < longest else longest


def check_fits(
    request: Request, *, max_model_len: int, pool_tokens: int, vocab_size: int, shifted_len: int = 0
) -> None:
    """Raise `InvalidRequestError` for a request that even an empty engine could not finish. The lengths are those
    of `longest_of`."""
    num_prompt_tokens = len(request.prompt_token_ids)
    longest = longest_of(
        num_prompt_tokens,
        context_shift=bool(request.params.context_shift),
        max_model_len=max_model_len,
        pool_tokens=pool_tokens,
        shifted_len=shifted_len,
    )
    if num_prompt_tokens == 0:
        raise InvalidRequestError("the prompt is empty: at least one token is needed", "prompt")
    if not 0 <= min(request.prompt_token_ids) <= max(request.prompt_token_ids) < vocab_size:
        raise InvalidRequestError(f"the prompt has token ids outside of 0 to {vocab_size - 1}", "prompt")
    max_tokens = request.params.max_tokens
    wanted = 1 if max_tokens is None else max_tokens
    if num_prompt_tokens + wanted > longest:
        asked = (
            f"This model's maximum context length is {longest} tokens. However, you requested "
            f"{num_prompt_tokens + wanted} tokens ({num_prompt_tokens} in the prompt, {wanted} in the answer): "
            "shorten the prompt"
        )
        if num_prompt_tokens + min(wanted, 1) > longest:
            raise PromptTooLongError(f"{asked}.", num_prompt_tokens, longest)
        raise InvalidRequestError(f"{asked} or lower max_tokens.", "max_tokens", TOO_LONG)
    _check_tokens(request.params, vocab_size)


def _check_tokens(params: SamplingParams, vocab_size: int) -> None:
    chosen = {
        "logit_bias": params.logit_bias,
        "allowed_token_ids": params.allowed_token_ids,
        "bad_words": [token for phrase in params.bad_words if not isinstance(phrase, str) for token in phrase],
    }
    for param, tokens in chosen.items():
        if not all(0 <= token < vocab_size for token in tokens):
            raise InvalidRequestError(f"{param} has token ids outside of 0 to {vocab_size - 1}", param)


class Status(enum.Enum):
    """Where a sequence is in its life."""

    FOLLOWING = enum.auto()
    """New, and not in the queue yet: the first of its request's sequences is computing the prompt for all."""
    WAITING = enum.auto()
    """In the queue: new, or preempted and to be resumed."""
    RUNNING = enum.auto()
    """It has a seat: blocks and a place in each step."""
    FINISHED = enum.auto()


@dataclass(slots=True)
class BlockTable:
    """A sequence's blocks in one group of layers, in the order of its tokens."""

    first: int
    """How many blocks came before them: those fell out of the group's window, and are no longer held."""
    blocks: list[int]

    @property
    def end(self) -> int:
        """How many blocks of the sequence there are with those that fell out."""
        return self.first + len(self.blocks)


class Sequence:
    """One sampled continuation of a request, and how far it has been computed.

    The invariant behind everything: the KV of `token_ids[:num_computed_tokens]`, as far as a layer still sees it,
    is in the blocks of `tables`. Prefill, a chunk, decode and resumption after preemption all just raise
    `num_computed_tokens` towards `len(token_ids)`.
    """

    __slots__ = (
        "arrival",
        "crowded_out",
        "finish_reason",
        "first_token_time",
        "index",
        "is_long",
        "long_after",
        "num_cached_tokens",
        "num_charged_tokens",
        "num_computed_tokens",
        "num_ever_computed",
        "num_preemptions",
        "num_prompt_tokens",
        "num_seated_tokens",
        "prefix",
        "request",
        "root",
        "seat",
        "seated_time",
        "shift",
        "sink",
        "state",
        "status",
        "stop_reason",
        "stops",
        "tables",
        "token_ids",
        "window",
    )

    def __init__(self, request: Request, index: int = 0) -> None:
        self.request = request
        self.index = index
        self.arrival = 0
        """Its place in the order of all arrivals, given by the scheduler."""
        self.seat: int | None = None
        """While running: its row in the batch, from 0 to the number of seats less one."""
        self.seated_time: float | None = None
        """When it got its first seat, on the monotonic clock."""
        self.first_token_time: float | None = None
        """When its first token was sampled, on the monotonic clock."""
        self.token_ids: list[int] = request.prompt_token_ids
        """Prompt and answer so far. The request's own list until there is an answer: who waits needs no copy."""
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.num_computed_tokens = 0
        self.num_ever_computed = 0
        """The most that `num_computed_tokens` has been: fewer are there after a preemption."""
        self.crowded_out = False
        """Whether it has lost its seat for want of blocks."""
        self.num_cached_tokens = 0
        """Prompt tokens that the prefix cache spared at first admission."""
        self.num_charged_tokens = 0
        """Prompt tokens that are on the user's account: what is computed again is not charged again."""
        self.num_preemptions = 0
        self.num_seated_tokens = 0
        """How many were computed when it got its seat."""
        self.tables: list[BlockTable] = []
        """While running: one for each group of layers."""
        self.long_after: int | None = None
        """More known tokens than this have other positions, of a model whose positions change there; given by the
        scheduler."""
        self.is_long = False
        """Whether it has so many. What it had computed before is of no use then."""
        self.window: ContextWindow | None = None
        """What it looks back on if it goes on beyond that; given by the scheduler."""
        self.shift = 0
        """While running: how many tokens behind its first block have been dropped."""
        self.sink: int | None = None
        """While running: the first block as it was computed, once tokens are dropped."""
        self.root = b""
        """What its first block follows in the prefix cache, given by the scheduler."""
        self.prefix: list[bytes] = []
        """Identity in the prefix cache of each full block that is already published (see blocks.py)."""
        self.stops: list[int] = []
        """While running, of a model that keeps states: at how many computed tokens one is to be put aside, the
        last first. No chunk may run across."""
        self.state: bytes | None = None
        """While running: the prefix under which a state was put aside last, if it is of no use once there is
        another one."""
        self.status = Status.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | None = None
        """The stop token that ended it, if one of the request's own did."""

    @property
    def until_shift(self) -> int:
        """How many tokens can be computed before more are dropped."""
        if self.window is None:
            return 1 << 40
        return self.window.until_shift(self.num_computed_tokens)

    @property
    def until_stop(self) -> int:
        """How many tokens can be computed before a state is to be put aside."""
        while self.stops and self.stops[-1] <= self.num_computed_tokens:
            self.stops.pop()
        return self.stops[-1] - self.num_computed_tokens if self.stops else 1 << 40

    def append(self, token_id: int) -> None:
        """One more token of the answer."""
        if self.token_ids is self.request.prompt_token_ids:
            self.token_ids = list(self.token_ids)
        self.token_ids.append(token_id)

    @property
    def is_scored(self) -> bool:
        """Whether logprobs of its prompt are still wanted. Its siblings have the same prompt."""
        is_wanted = self.request.params.prompt_logprobs is not None and self.index == 0
        return is_wanted and self.num_ever_computed < self.num_prompt_tokens

    @property
    def is_read(self) -> bool:
        """Whether something of each token of its prompt is still wanted that the prefix cache has not."""
        return self.is_scored or self.request.params.pooling == "mean"

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def key(self) -> tuple[str, int]:
        """What names this sequence across processes: the request's id and the index within it."""
        return self.request.request_id, self.index

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request.request_id}/{self.index}, {self.status.name}, "
            f"{self.num_computed_tokens} of {self.num_tokens} tokens computed)"
        )
