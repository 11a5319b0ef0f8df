"""Plans one step of the engine, and commits its result: iteration-level scheduling.

After Orca (Yu et al., OSDI 2022), the batch is formed anew at every step; after Sarathi-Serve (Agrawal et al.,
arXiv 2403.02310), running sequences decode first and prompts are computed in chunks with what is left of the
token budget, so that a long prompt never stalls the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable

from scheduler.core.admission import Admission
from scheduler.core.blocks import BlockPool
from scheduler.core.plan import Gain, Plan, PlanBuilder, work_of
from scheduler.core.policy import Policy
from scheduler.core.request import FinishReason, InvalidRequestError, Request
from scheduler.core.seams import (
    Drafter,
    NoDrafts,
    NoPacing,
    NoStates,
    NoYielding,
    Pacing,
    States,
    WholeContext,
    Window,
    Yielding,
)
from scheduler.core.seating import Seating
from scheduler.core.sequence import Sequence, Status
from scheduler.core.siblings import Siblings
from scheduler.core.step import StepResult


class Scheduler:
    """Seats sequences, gives each step its plan, and keeps every sequence's account with the block pool.

    `max_num_seqs` seats, but never more than `max_batched_tokens`, so that every running sequence can be given
    its token in every step. Users share cached prefixes only with `share_prefixes`. `eos_token_ids` end a sequence
    unless its request says `ignore_eos`. `states`: of a model that keeps them, or no prefix of it can be cached.
    """

    def __init__(
        self,
        pool: BlockPool,
        policy: Policy,
        *,
        max_num_seqs: int,
        max_batched_tokens: int,
        max_model_len: int,
        eos_token_ids: Iterable[int] = (),
        prefix_caching: bool = True,
        share_prefixes: bool = False,
        pacing: Pacing | None = None,
        drafter: Drafter | None = None,
        window: Window | None = None,
        states: States | None = None,
        yielding: Yielding | None = None,
    ) -> None:
        self.pool = pool
        self.policy = policy
        self.num_seats = min(max_num_seqs, max_batched_tokens)
        self.max_batched_tokens = max_batched_tokens
        self.eos_token_ids = frozenset(eos_token_ids)
        self.seating = Seating(
            pool,
            num_seats=self.num_seats,
            longest_chunk=max_batched_tokens,
            prefix_caching=prefix_caching,
            share_prefixes=share_prefixes,
            states=states or NoStates(),
        )
        self.pacing: Pacing = pacing or NoPacing()
        self.drafter: Drafter = drafter or NoDrafts()
        self._whole = WholeContext(min(max_model_len, self.seating.holdings.longest(pool.num_blocks)))
        self.window = window or self._whole
        """What sequences look back on that go on beyond the model's own, where it can."""
        self._live: dict[str, list[Sequence]] = {}  # unfinished sequences by request id
        self._num_arrivals = 0
        self.admission = Admission(policy, self.seating, yielding or NoYielding())
        self._siblings = Siblings(policy)

    @property
    def running(self) -> dict[tuple[str, int], Sequence]:
        return self.seating.running

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def num_waiting(self) -> int:
        return len(self.policy) + len(self._siblings)

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    @property
    def live_requests(self) -> Collection[str]:
        """The ids of requests with a sequence that has not ended."""
        return self._live.keys()

    # Intake ---------------------------------------------------------------------------------------------

    def add(self, request: Request, resumed: list[Sequence] | None = None) -> list[Sequence]:
        """Queue a request, and return its `n` sequences; or those that it had in another engine, which go on as
        after a preemption. Raises `InvalidRequestError` if it can never fit."""
        window = self._window_of(request)
        if request.request_id in self._live:
            raise InvalidRequestError(f"request id {request.request_id!r} is in use by a live request")
        sequences = [Sequence(request, index) for index in range(request.params.n)] if resumed is None else resumed
        self._live[request.request_id] = list(sequences)
        for sequence in sequences:
            self._num_arrivals += 1
            sequence.arrival = self._num_arrivals
            sequence.root = self.seating.root(request)
            sequence.window = window
        self._enqueue(sequences)
        return sequences

    def _window_of(self, request: Request) -> Window:
        """What its sequences look back on. Raises `InvalidRequestError` if they cannot end in it."""
        num_prompt_tokens, most = len(request.prompt_token_ids), request.params.max_tokens
        shifts = request.params.context_shift and num_prompt_tokens < self._whole.longest
        window = self.window if shifts else self._whole
        if num_prompt_tokens == 0 or num_prompt_tokens + (1 if most is None else most) > window.longest:
            asked = f"{num_prompt_tokens} tokens in the prompt and {most} in the answer"
            raise InvalidRequestError(f"{asked} do not fit into {window.longest}", "prompt")
        return window

    def _enqueue(self, sequences: list[Sequence]) -> None:
        """The first goes ahead. Its siblings follow when the prompt, which is theirs too, is in the cache."""
        first, *others = sequences
        self.policy.add(first)
        if not self.seating.prefix_caching or first.index > 0 or first.num_output_tokens > 0:
            for sequence in others:
                self.policy.add(sequence)
        elif others:
            self._siblings.wait(first, others)

    def abort(
        self, request_id: str, index: int | None = None, reason: FinishReason = FinishReason.ABORT
    ) -> list[Sequence]:
        """End a request's unfinished sequences, or the one of that index, in whatever state, and return them.
        Unknown ids are ignored: the request may have finished while the abort was on its way."""
        live = self._live.get(request_id, [])
        sequences = [sequence for sequence in live if index is None or sequence.index == index]
        for sequence in sequences:
            self.finish(sequence, reason)
        return sequences

    # Planning -------------------------------------------------------------------------------------------

    def schedule(self) -> Plan:
        """Plan the next step: running sequences decode first, then prompts, in the policy's order, take what is
        left of the budget, be they running or still to be seated.

        Takes O(running sequences), plus the prompts of those admitted, however many wait. Nobody who gets a seat
        loses it in the same plan, so that no more than twice as many seats as there are change hands.
        """
        self.admission.begin()
        decoding: list[Sequence] = []
        prefilling: list[Sequence] = []
        for sequence in self.running.values():
            is_decode = len(sequence.token_ids) - sequence.num_computed_tokens == 1
            (decoding if is_decode else prefilling).append(sequence)
        decode, num_tokens, pace, leftovers = self.pacing.budget(
            decoding, self._next_prompts(prefilling), self.max_batched_tokens
        )
        step = PlanBuilder(num_tokens, pace)
        self._fill(step, decode, prefilling, leftovers)
        if step.is_empty:  # nobody else can use what was held back
            self._fill(step, self._still_running(decoding), self._still_running(prefilling), num_tokens)
        assert step.num_moves <= 2 * self.num_seats, "a plan took seats from those to whom it had given them"
        plan = step.plan()
        if not self.pacing.narrow(plan):
            self.drafter.draft(plan, step.budget, self.seating.reserve, pace.seconds)
        if plan.chunks:  # or nothing is executed, and what is new stays for the next step
            plan.changes = self.seating.take_changes()
        return plan

    @staticmethod
    def _still_running(sequences: list[Sequence]) -> list[Sequence]:
        return [sequence for sequence in sequences if sequence.status is Status.RUNNING]

    def _fill(
        self, step: PlanBuilder, decoding: list[Sequence], prefilling: list[Sequence], leftovers: int
    ) -> None:
        """Put chunks into a step: of the prompts of those who get leftovers, so many tokens."""
        for sequence in decoding:
            if sequence.status is Status.RUNNING and self.admission.make_room(sequence, step):
                step.decode(sequence)
        for sequence in prefilling:
            if sequence.status is Status.RUNNING:
                self.admission.make_room(sequence, step)

        # After a preemption nobody is admitted: the blocks just freed are the running sequences' to grow into.
        may_admit = not step.preempted or not self.running
        rank = self.policy.rank
        prompts = deque(sorted(self._still_running(prefilling), key=rank))
        while step.budget > 0:
            candidate = self.policy.peek() if may_admit else None
            if candidate is not None and not (prompts and rank(prompts[0]) < rank(candidate)):
                sequence = candidate
            elif prompts:
                sequence = prompts.popleft()
            else:
                break
            gets_leftovers = self.policy.gets_leftovers(sequence)
            most = leftovers if gets_leftovers else self.max_batched_tokens
            if most == 0:
                break
            if sequence is candidate:
                may_admit = self.admission.seat(sequence, step)
            if sequence.status is Status.RUNNING:
                length = step.prefill(sequence, most)
                leftovers -= length if gets_leftovers else 0

    def _next_prompts(self, prefilling: list[Sequence]) -> list[Sequence]:
        """Those of the running, and of who is seated next."""
        newcomer = self.policy.peek() if self.seating.num_free_seats else None
        return prefilling if newcomer is None else [*prefilling, newcomer]

    # Committing -----------------------------------------------------------------------------------------

    def commit(self, plan: Plan, results: StepResult) -> list[Gain]:
        """Take in a step's result, and return what each of its sequences gained.

        Keys and values of guessed tokens count only as far as the guesses were right: no others are published.
        """
        gains = []
        plan.work = []
        ended: list[tuple[Sequence, FinishReason]] = []
        for chunk, came in zip(plan.chunks, results, strict=True):
            result, tokens = came, came.tokens
            if chunk.samples != bool(tokens) or len(tokens) > len(chunk.drafted) + 1:
                raise ValueError(f"{len(tokens)} tokens came back for {chunk}")
            sequence = chunk.sequence
            for place, token in enumerate(tokens, 1):
                sequence.append(token.token_id)
                if (reason := self._finish_reason(sequence, token.token_id)) is not None:
                    ended.append((sequence, reason))
                    result = result.first(place)
                    break
            if sequence.request.params.max_tokens == 0 and chunk.end == sequence.num_tokens:
                ended.append((sequence, FinishReason.LENGTH))
            num_taken = len(result.tokens)
            plan.work.append(work_of(chunk, num_taken, len(chunk.drafted) + 1 - len(tokens)))
            if tokens:
                self.drafter.learn(chunk, len(tokens), plan.stretch, result.forced)
            sequence.num_computed_tokens = chunk.end + num_taken - 1 if chunk.drafted else chunk.end
            if sequence.num_ever_computed < sequence.num_computed_tokens:
                sequence.num_ever_computed = sequence.num_computed_tokens
            self.seating.settle(sequence)
            gains.append(Gain(chunk, result))
            if tokens and self._siblings and sequence.index == 0:
                self._siblings.follow(sequence)
        self.policy.charge(plan.work)
        for sequence, reason in ended:
            self.finish(sequence, reason)
        return gains

    def _finish_reason(self, sequence: Sequence, token: int) -> FinishReason | None:
        params = sequence.request.params
        num_output_tokens = sequence.num_output_tokens
        if num_output_tokens >= params.min_tokens:
            if token in params.stop_token_ids:
                sequence.stop_reason = token
                return FinishReason.STOP
            if token in self.eos_token_ids and not params.ignore_eos:
                return FinishReason.STOP
        if num_output_tokens == params.max_tokens or sequence.num_tokens >= sequence.window.longest:
            return FinishReason.LENGTH
        return None

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence, waiting or running, and give back all that it holds."""
        self.admission.forget(sequence)
        self.drafter.forget(sequence)
        if sequence.status is Status.RUNNING:
            self.seating.vacate(sequence)
            self.policy.leave(sequence)
        elif sequence.status is Status.WAITING:
            self.seating.forget(sequence)
            self.policy.withdraw(sequence)
        else:
            self._siblings.leave(sequence)
        if sequence.index == 0:
            self._siblings.follow(sequence)
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason
        siblings = self._live[sequence.request.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._live[sequence.request.request_id]
