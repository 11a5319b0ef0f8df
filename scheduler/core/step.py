"""A step as plain data: what is to be computed, and what came of it.

Nothing here refers to a live sequence, so a step can be written down, sent to another process, and run
again there.
"""

from __future__ import annotations

from typing import Generic, Literal, Protocol, TypeAlias, TypeVar

import msgspec

from scheduler.core.sampling import Sampling

DraftKind = Literal["ngram", "prediction", "grammar"]
"""Where guesses come from: the sequence's own text, what its client expects, or what its grammar forces."""


def num_attended(start: int, length: int) -> int:
    """Keys that the queries of `length` tokens look at, the first of which follows `start` others."""
    return length * (2 * start + length + 1) // 2


class TableChange(msgspec.Struct, frozen=True, array_like=True):
    """New entries of one seat's block table, from the place `start` on. Entries before the first that a sequence
    brought are nobody's: they are out of the layers' window."""

    seat: int
    start: int
    blocks: list[int]
    group: int = 0
    """Of layers, each of which has tables of its own."""


class SinkShift(msgspec.Struct, frozen=True, array_like=True):
    """A sequence's first block moves on, as the tokens behind it were dropped: its keys are turned by as many
    positions, into a block of the sequence's own."""

    source: int
    """The block with the keys as they were computed."""
    target: int
    distance: int
    """In tokens."""


class ChunkInput(msgspec.Struct, frozen=True, array_like=True):
    """One sequence's part of a step."""

    request_id: str
    index: int
    """Which of the request's sequences; it also decides which numbers the sequence draws."""
    seat: int
    """Its row of the block tables."""
    start: int
    """The place of the first token in its sequence: the keys and values of those before it are in the pool."""
    token_ids: list[int]
    """To be computed: the known ones, then those that are only guessed."""
    num_drafted: int
    """How many are guessed. Each is kept if the token sampled before it is the same; the first that differs ends
    what is kept (speculative decoding, Leviathan et al., arXiv 2211.17192)."""
    samples: bool
    """Whether the logits of the last known token, and of all guessed ones, are wanted."""
    params: Sampling
    num_prompt_tokens: int = 0
    before: list[int] | None = None
    """The tokens before `start`, of a request that is steered: with its first chunk since it got its seat."""
    first_scored: int = 0
    """The place of the first token whose prediction of the next one is wanted: logprobs of the prompt."""
    targets: list[int] = []
    """The tokens that follow it and those after it."""
    num_pooled: int = 0
    """The last hidden states of so many tokens, at the chunk's end, are part of the embedding."""
    shift: int = 0
    """So many tokens before `start` have been dropped: what is behind them lies that much earlier in the table."""
    is_long: bool = False
    """Whether its tokens have the positions of a long text, of a model whose positions depend on that."""

    @property
    def num_sampled(self) -> int:
        """Rows of logits: those of the chunk's last tokens."""
        return self.num_drafted + 1 if self.samples else 0


class StateMove(msgspec.Struct, frozen=True, array_like=True):
    """Between a seat and a slot for states that are put aside."""

    seat: int
    slot: int
    num_tokens: int
    """That the state stands for."""


class SeatChanges(msgspec.Struct, array_like=True):
    """What has happened to the seats since the last step, to be done before anything is computed."""

    tables: list[TableChange] = []
    """To be taken over in this order."""
    shifts: list[SinkShift] = []
    """Of the sequences that go on beyond their window."""
    saves: list[StateMove] = []
    """States to be put aside before others change, also those of seats that were left."""
    vacated: list[int] = []
    """Seats that were left: what a model has kept of these sequences is nobody's any more. The next one may be
    there already."""
    loads: list[StateMove] = []
    """States that sequences begin with, which got their seats."""


class StepInput(msgspec.Struct, frozen=True, array_like=True):
    """What one step computes. The chunks' order is the order of the packed batch."""

    chunks: list[ChunkInput]
    changes: SeatChanges


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """The chosen token's log-probability (natural logarithm) and the likeliest alternatives, best first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]
    rank: int = 0
    """The token's place among all by their likelihood, where the likeliest has 1; 0 where nobody asked."""


class Choice(msgspec.Struct, frozen=True, array_like=True):
    """How a token was chosen from its steered logits."""

    num_candidates: int
    """Tokens that truncation left to choose from."""
    probability: float
    """The token's among them, after temperature."""
    low: float
    """The candidates' probabilities lie side by side between 0 and 1: the token's own part begins here."""
    number: float | None
    """What was drawn, between 0 and 1: it fell on the token's part. None: the likeliest was taken."""


class SampledToken(msgspec.Struct, frozen=True, array_like=True):
    token_id: int
    logprobs: TokenLogprobs | None = None
    choice: Choice | None = None
    """For requests that want it explained."""


class ChunkResult(msgspec.Struct, frozen=True, array_like=True):
    """What came of one chunk. It travels as it is: what tells of it further out holds it."""

    tokens: list[SampledToken] = []
    """None of a chunk without logits; else the guessed ones that were right, and the one that follows them."""
    is_broken: bool = False
    """Whether its logits were not numbers, or it may not choose any token."""
    scored: list[TokenLogprobs] = []
    """The log-probabilities of its targets."""
    pooled: list[float] = []
    """The sum of the hidden states that it gives to the embedding, [hidden size]. Each is a multiple of 2^-24, so
    that sums are exact, and the same however the prompt is cut into chunks."""
    forced: list[int] = []
    """The tokens that its grammar then forces, whatever the model says."""

    @property
    def token_ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        """One for each token, if they were asked for."""
        return [token.logprobs for token in self.tokens if token.logprobs is not None]

    @property
    def choices(self) -> list[Choice]:
        """One for each token, if it is to be explained."""
        return [token.choice for token in self.tokens if token.choice is not None]

    @property
    def tells_client(self) -> bool:
        """Whether anything in it is for whoever asked."""
        return bool(self.tokens or self.scored or self.pooled)

    def first(self, num_tokens: int) -> ChunkResult:
        """The same with so many tokens: where an answer ends, what was sampled behind its end is none of it."""
        return msgspec.structs.replace(self, tokens=self.tokens[:num_tokens])


NOTHING = ChunkResult()

StepResult: TypeAlias = list[ChunkResult]
"""What came of a step, chunk by chunk."""

Handle = TypeVar("Handle")


class Executor(Protocol, Generic[Handle]):
    """Runs steps, in the order in which they are launched."""

    def launch(self, step: StepInput) -> Handle:
        """Begin a step. May return before it is computed."""

    def collect(self, handle: Handle) -> StepResult:
        """Wait for a step, and sample its tokens."""
