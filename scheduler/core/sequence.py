"""The life of one answer to a request: how far it has come, and while it runs, what it holds."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from scheduler.core.request import FinishReason, Request
from scheduler.core.seams import ENDLESS, NO_WINDOW, Window


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


@dataclass(slots=True, eq=False)
class Lease:
    """What a running sequence holds: a seat, and the blocks of what it has computed. It is gone with the seat."""

    seat: int
    """Its row in the batch, from 0 to the number of seats less one."""
    num_cached_tokens: int
    """How many were computed when it got the seat."""
    tables: list[BlockTable]
    """One for each group of layers."""
    prefix: list[bytes]
    """Identity in the prefix cache of each full block that is already published (see blocks.py)."""
    shift: int = 0
    """How many tokens behind its first block have been dropped."""
    sink: int | None = None
    """The first block as it was computed, once tokens are dropped."""
    stops: list[int] = field(default_factory=list)
    """Of a model that keeps states: at how many computed tokens one is to be put aside, the last first. No chunk
    may run across."""
    state: bytes | None = None
    """The prefix under which a state was put aside last, if it is of no use once there is another one."""

    @property
    def blocks(self) -> list[int]:
        """All that it refers to."""
        own = [block for table in self.tables for block in table.blocks]
        return own if self.sink is None else [*own, self.sink]

    @property
    def num_blocks(self) -> int:
        """Those of its tables."""
        return sum(len(table.blocks) for table in self.tables)


@dataclass(slots=True, eq=False, repr=False)
class Sequence:
    """One sampled continuation of a request, and how far it has been computed.

    The invariant behind everything: the KV of `token_ids[:num_computed_tokens]`, as far as a layer still sees it,
    is in the blocks of its lease. Prefill, a chunk, decode and resumption after preemption all just raise
    `num_computed_tokens` towards `len(token_ids)`.
    """

    request: Request
    index: int = 0
    arrival: int = 0
    """Its place in the order of all arrivals, given by the scheduler."""
    lease: Lease | None = None
    """While running."""
    seated_time: float | None = None
    """When it got its first seat, on the monotonic clock."""
    first_token_time: float | None = None
    """When its first token was sampled, on the monotonic clock."""
    token_ids: list[int] = field(init=False)
    """Prompt and answer so far. The request's own list until there is an answer: who waits needs no copy."""
    num_prompt_tokens: int = field(init=False)
    num_computed_tokens: int = 0
    num_ever_computed: int = 0
    """The most that `num_computed_tokens` has been: fewer are there after a preemption."""
    crowded_out: bool = False
    """Whether it has lost its seat for want of blocks."""
    num_cached_tokens: int = 0
    """Prompt tokens that the prefix cache spared at first admission."""
    num_charged_tokens: int = 0
    """Prompt tokens that are on the user's account: what is computed again is not charged again."""
    num_preemptions: int = 0
    is_long: bool = False
    """Whether it has more tokens than its model's first kind of positions reaches. What it had computed before is
    of no use then."""
    long_after: int = ENDLESS
    """How many those are, of a model that has two kinds; given by the scheduler."""
    window: Window = NO_WINDOW
    """What it looks back on, and how long it can get; given by the scheduler."""
    root: bytes = b""
    """What its first block follows in the prefix cache, given by the scheduler."""
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    """The stop token that ended it, if one of the request's own did."""

    def __post_init__(self) -> None:
        self.token_ids = self.request.prompt_token_ids
        self.num_prompt_tokens = len(self.token_ids)

    @property
    def held(self) -> Lease:
        """Its lease. Only a running sequence has one."""
        assert self.lease is not None, f"{self} has no seat"
        return self.lease

    @property
    def until_border(self) -> int:
        """How many tokens a chunk can have: up to where more of the context is dropped, or a state is to be put
        aside."""
        stops, count = self.held.stops, self.num_computed_tokens
        while stops and stops[-1] <= count:
            stops.pop()
        border = self.window.until_shift(count)
        return min(border, stops[-1] - count) if stops else border

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
