"""Plans one step of the engine, and commits its result: iteration-level scheduling.

After Orca (Yu et al., OSDI 2022), the batch is formed anew at every step; after Sarathi-Serve (Agrawal et al.,
arXiv 2403.02310), running sequences decode first and prompts are computed in chunks with what is left of the
token budget, so that a long prompt never stalls the others.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from scheduler.blocks import BlockPool
from scheduler.policy import Policy
from scheduler.request import FinishReason, InvalidRequestError, Request, Sequence, Status


@dataclass(frozen=True, slots=True)
class Chunk:
    """One sequence's part of a step: compute its tokens `[start, start + length)`."""

    sequence: Sequence
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the last known token, so that the next one is sampled."""
        return self.end == self.sequence.num_tokens


@dataclass(slots=True)
class Plan:
    """What one step computes. The chunks' order is the order of the packed batch."""

    chunks: list[Chunk]
    num_cached_tokens: int = 0
    """Prompt tokens of newly admitted sequences that the prefix cache spared."""
    preempted: list[Sequence] = field(default_factory=list)
    """Sequences that lost their seat while this plan was made."""

    @property
    def num_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)

    @property
    def sampling(self) -> list[Sequence]:
        """The sequences whose next token this step samples, in the batch's order."""
        return [chunk.sequence for chunk in self.chunks if chunk.samples]


class Scheduler:
    """Seats sequences, gives each step its plan, and keeps every sequence's account with the block pool.

    `max_num_seqs` seats, but never more than `max_batched_tokens`, so that every running sequence can be given
    its token in every step. `eos_token_ids` end a sequence unless its request says `ignore_eos`.
    """

    def __init__(
        self,
        pool: BlockPool,
        policy: Policy,
        *,
        max_num_seqs: int,
        max_batched_tokens: int,
        max_model_len: int,
        vocab_size: int,
        eos_token_ids: Iterable[int] = (),
        prefix_caching: bool = True,
    ) -> None:
        self.pool = pool
        self.policy = policy
        self.num_seats = min(max_num_seqs, max_batched_tokens)
        self.max_batched_tokens = max_batched_tokens
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self.eos_token_ids = frozenset(eos_token_ids)
        self.prefix_caching = prefix_caching
        self.running: dict[tuple[str, int], Sequence] = {}
        self._live: dict[str, list[Sequence]] = {}  # unfinished sequences by request id
        self._free_seats = list(range(self.num_seats))  # a heap: low seats are taken first
        self._num_arrivals = 0

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def num_waiting(self) -> int:
        return len(self.policy)

    @property
    def has_work(self) -> bool:
        return bool(self.running) or len(self.policy) > 0

    # Intake ---------------------------------------------------------------------------------------------

    def add(self, request: Request) -> list[Sequence]:
        """Queue a request, and return its `n` sequences. Raises `InvalidRequestError` if it can never fit."""
        check_fits(
            request,
            max_model_len=self.max_model_len,
            pool_tokens=self.pool.num_blocks * self.pool.block_size,
            vocab_size=self.vocab_size,
        )
        if request.request_id in self._live:
            raise InvalidRequestError(f"request id {request.request_id!r} is in use by a live request")
        sequences = [Sequence(request, index) for index in range(request.params.n)]
        self._live[request.request_id] = list(sequences)
        for sequence in sequences:
            self._num_arrivals += 1
            sequence.arrival = self._num_arrivals
            self.policy.add(sequence)
        return sequences

    def abort(self, request_id: str, index: int | None = None) -> list[Sequence]:
        """End a request's unfinished sequences, or the one of that index, in whatever state, and return them.
        Unknown ids are ignored: the request may have finished while the abort was on its way."""
        live = self._live.get(request_id, [])
        sequences = [sequence for sequence in live if index is None or sequence.index == index]
        for sequence in sequences:
            self.finish(sequence, FinishReason.ABORT)
        return sequences

    # Planning -------------------------------------------------------------------------------------------

    def schedule(self) -> Plan:
        """Plan the next step: running sequences first, decodes before chunks of prompts, then admissions.

        Takes O(running sequences), plus the prompts of those admitted, however many wait.
        """
        planned: dict[tuple[str, int], Chunk] = {}
        plan = Plan(chunks=[])
        budget = self.max_batched_tokens
        decoding: list[Sequence] = []
        prefilling: list[Sequence] = []
        for sequence in self.running.values():
            remaining = sequence.num_tokens - sequence.num_computed_tokens
            (decoding if remaining == 1 else prefilling).append(sequence)

        for sequence in decoding + prefilling:
            length = min(sequence.num_tokens - sequence.num_computed_tokens, budget)
            if length == 0 or sequence.status is not Status.RUNNING:
                continue
            for victim in self._make_room(sequence, sequence.num_computed_tokens + length):
                plan.preempted.append(victim)
                if (dropped := planned.pop(victim.key, None)) is not None:
                    budget += dropped.length
            if sequence.status is Status.RUNNING:
                planned[sequence.key] = Chunk(sequence, sequence.num_computed_tokens, length)
                budget -= length

        # After a preemption nobody is admitted: the blocks just freed are the running sequences' to grow into.
        while not plan.preempted and budget > 0 and self._free_seats:
            candidate = self.policy.peek()
            if candidate is None or not self._admit(candidate):
                break
            if candidate.num_preemptions == 0:
                plan.num_cached_tokens += candidate.num_cached_tokens
            length = min(candidate.num_tokens - candidate.num_computed_tokens, budget)
            planned[candidate.key] = Chunk(candidate, candidate.num_computed_tokens, length)
            budget -= length

        plan.chunks = list(planned.values())
        return plan

    def _make_room(self, sequence: Sequence, num_tokens: int) -> list[Sequence]:
        """Grow the block table to hold `num_tokens`, preempting others, or the sequence itself, if it must."""
        preempted = []
        while sequence.status is Status.RUNNING:
            missing = self.pool.blocks_for(num_tokens) - len(sequence.block_table)
            if missing <= self.pool.num_free:
                if missing > 0:
                    sequence.block_table += self.pool.allocate(missing)
                break
            victim = self.policy.victim(self.running.values())
            self.preempt(victim)
            preempted.append(victim)
        return preempted

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence a seat, and blocks for all its known tokens; False if they are not there."""
        pool = self.pool
        prefix = None
        num_shared = 0
        available = pool.num_free
        if self.prefix_caching:
            prefix = pool.lookup(sequence.token_ids, sequence.request.cache_salt)
            num_shared = len(prefix.blocks)
            available = pool.num_free_after_sharing(prefix.blocks)
        missing = pool.blocks_for(sequence.num_tokens) - num_shared
        # One block each is left for the running sequences, or the next step would preempt at once.
        if missing + len(self.running) > available:
            return False
        if prefix is not None:
            pool.share(prefix.blocks)
            sequence.block_table = prefix.blocks
            sequence.prefix = prefix.identities
        sequence.block_table = sequence.block_table + pool.allocate(missing)
        sequence.num_computed_tokens = num_shared * pool.block_size
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = sequence.num_computed_tokens
        self.policy.remove(sequence)
        sequence.status = Status.RUNNING
        sequence.seat = heapq.heappop(self._free_seats)
        self.running[sequence.key] = sequence
        return True

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's seat and blocks; its full blocks stay cached for its return."""
        self._leave(sequence)
        sequence.status = Status.WAITING
        sequence.num_preemptions += 1
        sequence.num_computed_tokens = 0
        self.policy.requeue(sequence)

    def _leave(self, sequence: Sequence) -> None:
        assert sequence.seat is not None
        self.pool.free(sequence.block_table)
        sequence.block_table = []
        sequence.prefix = []
        heapq.heappush(self._free_seats, sequence.seat)
        sequence.seat = None
        del self.running[sequence.key]

    # Committing -----------------------------------------------------------------------------------------

    def commit(self, plan: Plan, tokens: Collection[int]) -> list[Sequence]:
        """Take in a step's result, and return the sequences that it finished.

        `tokens` are the sampled ones, one for each sequence of `plan.sampling`, in that order.
        """
        sampling = plan.sampling
        if len(tokens) != len(sampling):
            raise ValueError(f"{len(sampling)} sequences were to be sampled, {len(tokens)} tokens came back")
        for chunk in plan.chunks:
            chunk.sequence.num_computed_tokens = chunk.end
            if self.prefix_caching:
                self._publish_full_blocks(chunk.sequence)
        finished = []
        for sequence, token in zip(sampling, tokens, strict=True):
            sequence.token_ids.append(token)
            reason = self._finish_reason(sequence, token)
            if reason is not None:
                self.finish(sequence, reason)
                finished.append(sequence)
        return finished

    def _publish_full_blocks(self, sequence: Sequence) -> None:
        size = self.pool.block_size
        prefix = sequence.prefix
        for index in range(len(prefix), sequence.num_computed_tokens // size):
            parent = prefix[-1] if prefix else sequence.request.cache_salt
            tokens = sequence.token_ids[index * size : (index + 1) * size]
            prefix.append(self.pool.publish(sequence.block_table[index], parent, tokens))

    def _finish_reason(self, sequence: Sequence, token: int) -> FinishReason | None:
        params = sequence.request.params
        if sequence.num_output_tokens >= params.min_tokens:
            if token in params.stop_token_ids:
                sequence.stop_reason = token
                return FinishReason.STOP
            if token in self.eos_token_ids and not params.ignore_eos:
                return FinishReason.STOP
        if sequence.num_output_tokens == params.max_tokens or sequence.num_tokens >= self.max_model_len:
            return FinishReason.LENGTH
        return None

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence, waiting or running, and give back all that it holds."""
        if sequence.status is Status.RUNNING:
            self._leave(sequence)
        elif sequence.status is Status.WAITING:
            self.policy.remove(sequence)
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason
        siblings = self._live[sequence.request.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._live[sequence.request.request_id]


def check_fits(request: Request, *, max_model_len: int, pool_tokens: int, vocab_size: int) -> None:
    """Raise `InvalidRequestError` for a request that even an empty engine could not finish.

    `pool_tokens` is what all blocks of the pool hold together.
    """
    num_prompt_tokens = len(request.prompt_token_ids)
    longest = min(max_model_len, pool_tokens)
    if num_prompt_tokens == 0:
        raise InvalidRequestError("the prompt is empty: at least one token is needed", "prompt")
    if not 0 <= min(request.prompt_token_ids) <= max(request.prompt_token_ids) < vocab_size:
        raise InvalidRequestError(f"the prompt has token ids outside of 0 to {vocab_size - 1}", "prompt")
    if num_prompt_tokens >= longest:
        raise InvalidRequestError(
            f"the prompt has {num_prompt_tokens} tokens, and prompt plus answer can have {longest} at most: "
            "shorten the prompt",
            "prompt",
        )
    max_tokens = request.params.max_tokens
    if max_tokens is not None and num_prompt_tokens + max_tokens > longest:
        raise InvalidRequestError(
            f"the prompt has {num_prompt_tokens} tokens and max_tokens is {max_tokens}, together more than the "
            f"{longest} that prompt plus answer can have: shorten the prompt or lower max_tokens",
            "max_tokens",
        )
