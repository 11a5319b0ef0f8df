"""Plans one step of the engine, and commits its result: iteration-level scheduling.

After Orca (Yu et al., OSDI 2022), the batch is formed anew at every step; after Sarathi-Serve (Agrawal et al.,
arXiv 2403.02310), running sequences decode first and prompts are computed in chunks with what is left of the
token budget, so that a long prompt never stalls the others.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Collection, Iterable

from scheduler.blocks import BlockPool, Prefix
from scheduler.plan import Chunk, Draft, Pace, Plan
from scheduler.policy import Policy, Work
from scheduler.request import FinishReason, InvalidRequestError, Request, Sequence, Status
from scheduler.turns import Turns

EXPRESS_TOKENS = 64
"""Prompt tokens at most that a step computes for newcomers alone."""

EXPRESS_EVERY = 4
"""Steps of all that come between two steps for newcomers alone."""


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
        pace: Pace | None = None,
        turns: Turns | None = None,
    ) -> None:
        self.pool = pool
        self.policy = policy
        self.num_seats = min(max_num_seqs, max_batched_tokens)
        self.max_batched_tokens = max_batched_tokens
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self.eos_token_ids = frozenset(eos_token_ids)
        self.prefix_caching = prefix_caching
        self.pace = pace
        self.turns = turns
        self.running: dict[tuple[str, int], Sequence] = {}
        self._live: dict[str, list[Sequence]] = {}  # unfinished sequences by request id
        self._free_seats = list(range(self.num_seats))  # a heap: low seats are taken first
        self._num_arrivals = 0
        self._num_steps_since_express = EXPRESS_EVERY
        self._deadlines: list[tuple[float, int, Sequence]] = []  # a heap: the next to pass first

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
            if request.deadline is not None:
                heapq.heappush(self._deadlines, (request.deadline, sequence.arrival, sequence))
            self.policy.add(sequence)
        return sequences

    def num_cached_tokens(self, request: Request) -> int:
        """How much of a new request's prompt need not be computed, as things stand."""
        return len(self._cached_prefix(request.prompt_token_ids, request).blocks) * self.pool.block_size

    def expire(self, now: float) -> list[Sequence]:
        """End the sequences whose deadline has passed, and return them. `now` is on the monotonic clock."""
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, sequence = heapq.heappop(self._deadlines)
            if sequence.status is not Status.FINISHED:
                self.finish(sequence, FinishReason.TIMEOUT)
                expired.append(sequence)
        return expired

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
        """Plan the next step: running sequences decode first, then prompts, in the policy's order, take what is
        left of the budget, be they running or still to be seated.

        Takes O(running sequences), plus the prompts of those admitted, however many wait.
        """
        decoding: list[Sequence] = []
        prefilling: list[Sequence] = []
        num_wanted = 0  # tokens, if all could be computed now
        for sequence in self.running.values():
            remaining = sequence.num_tokens - sequence.num_computed_tokens
            num_wanted += remaining
            (decoding if remaining == 1 else prefilling).append(sequence)
        budget = self.max_batched_tokens
        if self.turns is not None:
            newcomer = self.policy.peek() if self._free_seats else None
            num_wanted += newcomer.num_tokens if newcomer is not None else 0
            decoding, budget = self.turns.divide(decoding, num_wanted, budget)
        step = Draft(budget, self.pace)
        for sequence in decoding:
            self._make_room(sequence, step)
            if sequence.status is Status.RUNNING:
                step.decode(sequence)

        # After a preemption nobody is admitted: the blocks just freed are the running sequences' to grow into.
        may_admit = not step.preempted
        rank = self.policy.rank
        prompts = deque(sorted(prefilling, key=rank))
        while step.budget > 0:
            candidate = self.policy.peek() if may_admit else None
            if candidate is not None and not (prompts and rank(prompts[0]) < rank(candidate)):
                may_admit = self._seat(candidate, step)
            elif prompts:
                sequence = prompts.popleft()
                if sequence.status is Status.RUNNING:
                    step.prefill(sequence)
            else:
                break
        plan = step.plan()
        self._num_steps_since_express += 1
        if self._num_steps_since_express > EXPRESS_EVERY and (express := self._express(plan)):
            plan.chunks = express
            self._num_steps_since_express = 0
        return plan

    def _express(self, plan: Plan) -> list[Chunk]:
        """The short prompts of users who ask for nothing else. Where a step computes them alone, their first
        tokens are out in a fraction of the time that a step of all takes, and the others lose little."""
        seated = {sequence.key for sequence in plan.admitted if self.policy.is_newcomer(sequence)}
        chunks = [chunk for chunk in plan.chunks if chunk.sequence.key in seated and chunk.samples]
        return chunks if sum(chunk.length for chunk in chunks) <= EXPRESS_TOKENS else []

    def _make_room(self, sequence: Sequence, step: Draft) -> None:
        """Give a decoding sequence the block for its next token, preempting others, or itself, if it must."""
        while sequence.status is Status.RUNNING:
            missing = self.pool.blocks_for(sequence.num_tokens) - len(sequence.block_table)
            if missing <= self.pool.num_free:
                if missing > 0:
                    sequence.block_table += self.pool.allocate(missing)
                break
            victim = self.policy.victim(self.running.values())
            self.preempt(victim)
            step.drop(victim)

    def _seat(self, candidate: Sequence, step: Draft) -> bool:
        """Admit a waiting sequence, and let those who owe it their seats go; False if there is no place for it."""
        prefix = self._cached_prefix(candidate.token_ids, candidate.request)
        spare = self._num_spare_blocks(candidate, prefix)
        seats = len(self._free_seats)
        going: list[Sequence] = []
        if spare < 0 or seats == 0:
            for sequence in self.policy.yielding(candidate, self.running.values()):
                going.append(sequence)
                seats += 1
                spare += 1 + sum(self.pool.references(block) == 1 for block in sequence.block_table)
                if spare >= 0:
                    break
            else:
                return False
        for sequence in going:
            self.preempt(sequence)
            step.drop(sequence)
            step.num_yielded += 1
        if going:  # what they held may be evicted, or be part of the prefix
            prefix = self._cached_prefix(candidate.token_ids, candidate.request)
            if self._num_spare_blocks(candidate, prefix) < 0:
                return False
        self._admit(candidate, prefix)
        if candidate.num_preemptions == 0:
            step.admitted.append(candidate)
        step.prefill(candidate)
        return True

    def _num_spare_blocks(self, candidate: Sequence, prefix: Prefix) -> int:
        """Blocks that are free beyond what a waiting sequence takes, and beyond one for each running sequence, or
        the next step would preempt at once."""
        missing = self.pool.blocks_for(candidate.num_tokens) - len(prefix.blocks)
        return self.pool.num_free_after_sharing(prefix.blocks) - missing - len(self.running)

    def _cached_prefix(self, token_ids: list[int], request: Request) -> Prefix:
        if not self.prefix_caching:
            return Prefix([], [])
        return self.pool.lookup(token_ids, request.cache_salt)

    def _admit(self, sequence: Sequence, prefix: Prefix) -> None:
        """Give a waiting sequence a seat, and blocks for all its known tokens."""
        self.pool.share(prefix.blocks)
        sequence.prefix = prefix.identities
        missing = self.pool.blocks_for(sequence.num_tokens) - len(prefix.blocks)
        sequence.block_table = prefix.blocks + self.pool.allocate(missing)
        sequence.num_computed_tokens = len(prefix.blocks) * self.pool.block_size
        sequence.status = Status.RUNNING
        sequence.seat = heapq.heappop(self._free_seats)
        self.running[sequence.key] = sequence
        self.policy.seat(sequence)
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = sequence.num_charged_tokens = sequence.num_computed_tokens

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's seat and blocks; its full blocks stay cached for its return."""
        self._vacate(sequence)
        sequence.status = Status.WAITING
        sequence.num_preemptions += 1
        sequence.num_computed_tokens = 0
        self.policy.unseat(sequence)

    def _vacate(self, sequence: Sequence) -> None:
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
        plan.work = [self._work(chunk) for chunk in plan.chunks]
        for work in plan.work:
            self.policy.charge(work)
        finished = []
        for sequence, token in zip(sampling, tokens, strict=True):
            sequence.token_ids.append(token)
            reason = self._finish_reason(sequence, token)
            if reason is not None:
                self.finish(sequence, reason)
                finished.append(sequence)
        return finished

    def _work(self, chunk: Chunk) -> Work:
        """What a computed chunk did for its sequence, before the sampled token joins it."""
        sequence = chunk.sequence
        is_first = sequence.num_charged_tokens == sequence.num_cached_tokens and sequence.num_output_tokens == 0
        cached = sequence.num_cached_tokens if is_first else 0
        charged = max(sequence.num_charged_tokens, min(chunk.end, sequence.num_prompt_tokens))
        prompt = charged - sequence.num_charged_tokens
        sequence.num_charged_tokens = charged
        return Work(sequence, prompt, cached, int(chunk.samples))

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
            self._vacate(sequence)
            self.policy.leave(sequence)
        elif sequence.status is Status.WAITING:
            self.policy.withdraw(sequence)
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
