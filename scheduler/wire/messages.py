"""What travels between the engine's process and the process that talks to clients, encoded with msgspec."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec

from scheduler.core.request import FinishReason, Request
from scheduler.core.sampling import Pooling
from scheduler.core.step import NOTHING, ChunkResult, DraftKind

REQUESTS, OUTPUTS = "requests", "outputs"
"""The sockets' names: messages to the engine, and from it."""


class Progress(msgspec.Struct, frozen=True):
    """How far one of a request's sequences had come when the engine was lost that had it."""

    index: int
    token_ids: list[int]
    """Of its answer."""
    num_computed: int
    """The most of its tokens, the prompt's among them, that had been computed."""
    num_cached_tokens: int


class Launch(msgspec.Struct, frozen=True):
    """What the engine's process is told at its start."""

    config: dict[str, Any]
    """The validated EngineConfig, as JSON has it."""
    model_path: str
    log_level: int


class AddRequest(msgspec.Struct, frozen=True, tag=True):
    request: Request
    progress: list[Progress] | None = None
    """Of a request that goes on: its sequences that have not ended. None: it is new."""


class AbortRequest(msgspec.Struct, frozen=True, tag=True):
    request_id: str
    index: int | None = None
    """Which of its sequences; None: all."""
    reason: FinishReason = FinishReason.ABORT
    """Stop, where its text met a stop string."""


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Finish the current step, then leave."""


class LearnTokenizer(msgspec.Struct, frozen=True, tag=True):
    """Sent before the first request that has a grammar."""

    definition: str
    """As `Tokenizer.definition` has it."""


class Watch(msgspec.Struct, frozen=True, tag=True):
    """Send a `Snapshot` along at most this often; None: no more of them."""

    interval: float | None
    """Seconds."""


class RecordTrace(msgspec.Struct, frozen=True, tag=True):
    """Record the next steps as trace events, and send them when they are done."""

    number: int
    """What `Recorded` will be known by."""
    num_steps: int
    """0: forget the recording of this number, nobody waits for it any more."""


ToEngine = AddRequest | AbortRequest | LearnTokenizer | Watch | RecordTrace | Shutdown


class StepPart(msgspec.Struct, frozen=True, array_like=True):
    """What a step was for one sequence whose request wants it explained."""

    start: int
    """Tokens whose keys and values were in the cache before."""
    length: int
    """Known tokens that were computed, behind those. Guessed ones follow them."""
    shift: int
    """Tokens among those before that have been dropped."""
    num_sequences: int
    """How many shared the step."""
    seconds: float
    """That the forward pass and the choice of tokens took, for all of them together."""


class SequenceOutput(msgspec.Struct, frozen=True, array_like=True):
    """What one step did for one sequence."""

    request_id: str
    index: int
    result: ChunkResult = NOTHING
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token that ended it, or beyond the engine the stop string."""
    num_cached_tokens: int = 0
    queue_time: float = 0.0
    """Seconds from the request's arrival to the sequence's first seat; 0 if it never had one."""
    error: str | None = None
    drafted: list[int] = []
    """Tokens that were guessed in this step; those that were right are the first of the result's."""
    part: StepPart | None = None
    """For requests that want it explained."""
    num_computed: int = 0
    """The most tokens of the sequence that have been computed: what is wanted of each has been given for these."""

    @property
    def token_ids(self) -> list[int]:
        return self.result.token_ids

    @property
    def num_accepted(self) -> int:
        """How many of the guessed tokens were right."""
        alike = (one == other for one, other in zip(self.drafted, self.token_ids, strict=False))
        return sum(1 for _ in itertools.takewhile(bool, alike))


class EngineState(msgspec.Struct, frozen=True, array_like=True):
    """How full the engine is between two steps."""

    num_running: int
    num_waiting: int
    num_used_blocks: int
    num_cached_blocks: int
    """Blocks that nobody refers to but whose content can still be shared."""
    fairness_gap: float
    """How far the counters of the users who wait are apart, in prompt tokens per weight."""
    num_prompt_tokens_left: int = 0
    """Of the prompts that have a seat: those that are still to be computed."""


class Phases(msgspec.Struct, frozen=True, array_like=True):
    """Where a step's time went, in seconds."""

    plan: float
    execute: float
    """The forward pass."""
    sample: float
    commit: float


class Received(msgspec.Struct, frozen=True, array_like=True):
    """One user's part of a step."""

    service: float
    """In prompt tokens, as the fair policy counts them."""
    seconds: float
    """Of the step's duration, in proportion to the tokens computed."""


class Draft(msgspec.Struct, frozen=True, array_like=True):
    """One sequence's guesses in a step."""

    kind: DraftKind
    num_drafted: int
    num_accepted: int
    """Those that were right, up to the first that was wrong."""


class StepStats(msgspec.Struct, frozen=True, array_like=True):
    """One step in figures."""

    duration: float
    """Seconds."""
    num_tokens: int
    """Tokens computed."""
    num_prompt_tokens: int
    """Those among them that clients sent (a resumed sequence's own tokens are not)."""
    num_cached_tokens: int
    """Prompt tokens that the prefix cache spared the sequences admitted in this step."""
    num_recomputed_tokens: int
    """Those that had been computed before a preemption."""
    num_sampled_tokens: int
    num_preemptions: int
    num_yielded: int
    """Those among the preemptions that gave a seat to another user, rather than for want of blocks."""
    num_lookup_tokens: int
    """Prompt tokens that were looked up in the prefix cache."""
    phases: Phases
    users: dict[str, Received]
    """What the users whose sequences took part received."""
    num_violations: int = 0
    """Things that did not add up in the accounts of seats and blocks, and were repaired."""
    drafts: list[Draft] = []
    """Of the sequences that had guesses."""

    @property
    def num_drafted(self) -> int:
        """Tokens that were guessed, and computed."""
        return sum(draft.num_drafted for draft in self.drafts)

    @property
    def num_accepted(self) -> int:
        """Those among them that were right."""
        return sum(draft.num_accepted for draft in self.drafts)


class EngineInfo(msgspec.Struct, frozen=True, tag=True):
    """Sent once, when the engine is ready: what was loaded and how large the pool is."""

    model: str
    max_model_len: int
    vocab_size: int
    num_blocks: int
    """Each holds `block_size` tokens' keys and values in the layers of a group; a sequence has blocks in each."""
    block_size: int
    kv_cache_dtype: str
    device: str
    attention_backend: str
    products: str
    """Arithmetic of the matrix products: stored, int4, int8, bfloat16, float16 or float32."""
    weights_bytes: int
    instruction_set: str
    """That of the native kernels, as processor.py names it; empty where they are not used."""
    pool_bytes: int = 0
    """Of all blocks: an engine that is given as many as its `kv_cache_memory` has the same number of them."""
    num_seats: int = 0
    """How many sequences at most share a step."""
    eos_token_ids: list[int] = []
    """The tokens that end an answer."""
    embedding_size: int = 0
    """Dimensions of an embedding."""
    embedding_layers: list[str] = []
    """Folders of the dense layers that make it of what pooling gives."""
    pooling: Pooling | None = "mean"
    """How embeddings are made where a request does not say it; None: a request has to."""
    has_head: bool = True
    """Whether it makes text; else it makes embeddings alone."""
    context_shift: bool = False
    """Whether answers go on beyond the model's window where a request does not say it."""
    shifted_len: int = 0
    """How long they can get."""
    shift_obstacle: str = ""
    """Why they cannot go on."""
    sampling_defaults: dict[str, float] = {}
    """What the model's generation config says of how to choose tokens, for requests that do not."""


class EngineFailed(msgspec.Struct, frozen=True, tag=True):
    """Sent once, instead of `EngineInfo`, when the engine could not start; `message` is for the user."""

    message: str


class SeatView(msgspec.Struct, frozen=True, array_like=True):
    """Who sits on a seat, and how far they are."""

    seat: int
    request_id: str
    index: int
    user: str
    num_prompt_tokens: int
    num_computed_tokens: int
    num_output_tokens: int
    max_tokens: int


class Snapshot(msgspec.Struct, frozen=True, array_like=True):
    """The batch and the block pool at one moment, for those who watch."""

    seats: list[SeatView]
    blocks: bytes | None
    """The state of each block, or of groups of neighbours, as `BlockPool.map` has it; None: as before."""


class Recorded(msgspec.Struct, frozen=True, tag=True):
    """The trace that `RecordTrace` asked for: a JSON array of Chrome trace events."""

    number: int
    events: bytes


class StepOutputs(msgspec.Struct, frozen=True, tag=True):
    """What happened since the last such message; `step` is None if nothing was computed."""

    outputs: list[SequenceOutput]
    state: EngineState
    step: StepStats | None = None
    publishing: float = 0.0
    """Seconds that it took to send the message before this one."""
    snapshot: Snapshot | None = None


FromEngine = EngineInfo | EngineFailed | StepOutputs | Recorded
