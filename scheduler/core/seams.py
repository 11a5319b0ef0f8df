"""What features ride on: protocols that planning asks and tells, each with a default that does nothing.

The policy, which is one more, has a file of its own (policy.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

if TYPE_CHECKING:
    from scheduler.core.blocks import BlockPool, Identity, Prefix
    from scheduler.core.plan import Chunk, Plan
    from scheduler.core.seating import Seating
    from scheduler.core.sequence import Sequence
    from scheduler.core.step import SeatChanges

ENDLESS = 1 << 40
"""More tokens, or blocks, than any sequence has."""

# How long a step may be -----------------------------------------------------------------------------------


class Pace(Protocol):
    """How long a step may be as it is put together."""

    @property
    def seconds(self) -> float:
        """That it may take."""

    def room(self, num_tokens: int, attended: int, start: int) -> int:
        """How many more tokens fit into a step of `num_tokens`, whose queries look at `attended` keys: of a prompt
        from its place `start` on."""

    def least(self, start: int) -> int:
        """How many of a prompt's are computed even where there is no room: they must not starve."""


class NoPace:
    """A step is as long as it gets."""

    seconds = math.inf

    def room(self, num_tokens: int, attended: int, start: int) -> int:
        return ENDLESS

    def least(self, start: int) -> int:
        return 0


class StepBudget(NamedTuple):
    """What a step may be."""

    decoding: list[Sequence]
    """Who decodes in it."""
    num_tokens: int
    """That it computes at most."""
    pace: Pace
    leftovers: int
    """How many tokens of the prompts of those who get what the others leave."""


class Pacing(Protocol):
    """Asked before a plan is put together, and after. Bounds on latency ride on it."""

    def budget(self, decoding: list[Sequence], prompts: list[Sequence], most: int) -> StepBudget:
        """Of a step in which these could decode, and which computes `most` tokens at most. `prompts`: those whose
        prompts it could compute, that of who is seated next among them."""

    def narrow(self, plan: Plan) -> bool:
        """Leave only a part in a plan that is put together; whether that was done."""


class NoPacing:
    """A step is as long as it gets."""

    def budget(self, decoding: list[Sequence], prompts: list[Sequence], most: int) -> StepBudget:
        return StepBudget(decoding, most, NoPace(), most)

    def narrow(self, plan: Plan) -> bool:
        return False


# Guesses of the next tokens -------------------------------------------------------------------------------

Reserve = Callable[["Sequence", int], bool]
"""Makes room for so many guessed tokens of a sequence, if there is any to spare."""


class Drafter(Protocol):
    """Told of each plan before it is executed, and of what came of it. Speculative decoding rides on it."""

    most_tokens: ClassVar[int]
    """That a step can give a sequence."""

    def draft(self, plan: Plan, num_tokens: int, reserve: Reserve, longest: float = math.inf) -> None:
        """Put guesses behind the chunks of a plan: `num_tokens` at most, and only as far as the step, by what is
        known of its cost, takes no more than `longest` seconds."""

    def learn(self, chunk: Chunk, num_kept: int, stretch: float, forced: list[int]) -> None:
        """A chunk that samples gave so many tokens: one, and the guesses before it that were right; in a step that
        took so many times longer for all guesses in it. Its grammar forces some tokens behind them, perhaps."""

    def forget(self, sequence: Sequence) -> None:
        """It ends; its blocks are still its own."""


class NoDrafts:
    """Each step gives each sequence one token."""

    most_tokens: ClassVar[int] = 1

    def draft(self, plan: Plan, num_tokens: int, reserve: Reserve, longest: float = math.inf) -> None: ...
    def learn(self, chunk: Chunk, num_kept: int, stretch: float, forced: list[int]) -> None: ...
    def forget(self, sequence: Sequence) -> None: ...


# Seats that change hands ----------------------------------------------------------------------------------


class Yielded(NamedTuple):
    """A running sequence that gives way."""

    sequence: Sequence
    loss: int
    """How many of its tokens may have to be computed again."""


class Yielding(Protocol):
    """Asked for whoever is next and does not fit, and told who comes and goes. Fair shares of the seats, and
    passing whoever waits for blocks, ride on it."""

    def begin(self) -> None:
        """A new plan is begun."""

    def fits(self, candidate: Sequence, seating: Seating) -> Prefix | None:
        """With which cached prefix a waiting sequence fits into what is free; None if it does not."""

    def owing(self, candidate: Sequence, seating: Seating, kept: Collection[Sequence]) -> list[Sequence]:
        """Running sequences that may have to give way to a waiting one, the first to go first. Those in `kept`
        stay."""

    def going(self, candidate: Sequence, seating: Seating, owing: list[Sequence]) -> list[Yielded] | None:
        """Who of those must go so that the waiting one has a seat and its blocks; None if all are not enough."""

    def passed(self, sequence: Sequence) -> bool:
        """It does not fit; returns whether others may pass it in this plan."""

    def seated(self, sequence: Sequence) -> None:
        """It got a seat."""

    def unseated(self, sequence: Sequence) -> None:
        """It is about to lose its seat, and comes back."""

    def forget(self, sequence: Sequence) -> None:
        """It has ended, or begins anew."""


class NoYielding:
    """Whoever sits stays as long as there are blocks, and nobody passes who is next."""

    def begin(self) -> None: ...

    def fits(self, candidate: Sequence, seating: Seating) -> Prefix | None:
        prefix = seating.cached_prefix(candidate)
        return prefix if seating.num_spare_blocks(candidate, prefix) >= 0 else None

    def owing(self, candidate: Sequence, seating: Seating, kept: Collection[Sequence]) -> list[Sequence]:
        return []

    def going(self, candidate: Sequence, seating: Seating, owing: list[Sequence]) -> list[Yielded] | None:
        return None

    def passed(self, sequence: Sequence) -> bool:
        return False

    def seated(self, sequence: Sequence) -> None: ...
    def unseated(self, sequence: Sequence) -> None: ...
    def forget(self, sequence: Sequence) -> None: ...


# What is kept of a sequence -------------------------------------------------------------------------------


class Window(Protocol):
    """How much of its context a sequence keeps, and how it lets go of the rest. Context shift rides on it."""

    @property
    def num_tokens(self) -> int:
        """That it looks back on, in whole blocks."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence: positions end somewhere."""

    def until_shift(self, position: int) -> int:
        """How many tokens from this position on are computed before some are dropped."""

    def make_way(self, sequence: Sequence, pool: BlockPool, changes: SeatChanges) -> bool:
        """Drop what has to make room for a running sequence's next token; False if that takes a block, and there
        is none."""


class WholeContext(NamedTuple):
    """Nothing is dropped."""

    longest: int
    num_tokens: int = ENDLESS

    def until_shift(self, position: int) -> int:
        return ENDLESS

    def make_way(self, sequence: Sequence, pool: BlockPool, changes: SeatChanges) -> bool:
        return True


NO_WINDOW = WholeContext(ENDLESS)


class States(Protocol):
    """What a model keeps of a sequence beside keys and values. States that are put aside, so that others begin
    with them, ride on it."""

    def reset(self) -> None:
        """Nothing is put aside any more."""

    def reach(self, identities: list[Identity]) -> int:
        """Of a prefix's blocks, how many a sequence can begin behind."""

    def begin(self, sequence: Sequence, prefix: Prefix, changes: SeatChanges) -> None:
        """A sequence has a seat, behind a cached prefix."""

    def settle(self, sequence: Sequence, changes: SeatChanges) -> None:
        """All that a running sequence has computed is in full blocks."""


class NoStates:
    """There is nothing but keys and values."""

    def reset(self) -> None: ...

    def reach(self, identities: list[Identity]) -> int:
        return len(identities)

    def begin(self, sequence: Sequence, prefix: Prefix, changes: SeatChanges) -> None: ...
    def settle(self, sequence: Sequence, changes: SeatChanges) -> None: ...
