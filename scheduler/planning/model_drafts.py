"""Guesses of a draft model: a small one, of the same vocabulary, that is run ahead of the large one.

Each guess of a sequence takes a pass of the draft model, which all sequences share. So guesses are decided on
level by level: everybody's first, everybody's second, and so on, while a level raises the tokens a second.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from scheduler.planning.draft_record import DraftRecord
from scheduler.planning.draft_room import DraftRoom
from scheduler.planning.plan import Chunk
from scheduler.planning.sequence import Sequence
from scheduler.planning.step_cost import StepCost
from scheduler.sampling_params import SamplingParams
from scheduler.step import DraftInput

PRIOR = 0.6
"""The share of guesses that are right, until more is known."""

CATCH_UP = 128
"""Tokens at most that the draft model reads of one sequence in one step, of what it has not seen."""

LONG_MEMORY = 0.99
"""How much a verified guess still counts, for what is believed of other sequences, at the next one."""

WORTH = 16
"""It does not begin to read where it would read more than so many tokens for each that is left to guess."""


@dataclass(slots=True)
class _Follower:
    """How far the draft model has followed one sequence."""

    params: SamplingParams
    """How it chooses its guesses."""
    record: DraftRecord
    num_seen: int = 0
    """Its keys and values of so many tokens are in the sequence's blocks."""
    num_noted: int = 0
    """Of so many blocks it is noted what it left in them."""
    seating: int = -1
    """Since which of the sequence's preemptions: other blocks have been given to it after one."""


class ModelDrafts:
    """What the draft model is asked. Its keys and values lie in blocks of the same numbers as the large model's,
    so what it knows of a cached prefix is found again with it."""

    def __init__(self, cost: StepCost, draft_cost: StepCost, block_size: int) -> None:
        self._cost = cost
        self._draft_cost = draft_cost
        self._block_size = block_size
        self._followers: dict[tuple[str, int], _Follower] = {}
        self.noted: dict[int, bytes] = {}
        """By block, of which prefix it holds the draft model's keys and values."""
        self._record = DraftRecord(PRIOR, memory=LONG_MEMORY)
        """Of all sequences: what is believed of a new one."""

    def ask(self, room: DraftRoom, expected: list[float]) -> None:
        """Ask for guesses behind those of the plan's chunks that have none. `expected`: how many tokens each gives
        without them."""
        plan = room.plan
        chunks = {
            place: chunk
            for place, chunk in enumerate(plan.chunks)
            if room.most[place] > 0 and not chunk.drafted and chunk.shift == 0
        }
        for chunk in chunks.values():
            self._follow(chunk.sequence)
        unread = self._to_read(room, chunks)
        counts = self._allot(room, chunks, expected, unread)
        if not counts:
            self._record.rest()
        for place, chunk in chunks.items():
            follower = self._followers[chunk.sequence.key]
            count = counts.get(place, 0)
            if count == 0:
                follower.record.rest()
                continue
            tokens = chunk.sequence.token_ids[follower.num_seen :][:CATCH_UP]
            if unread[place] > CATCH_UP:
                count = 0
            elif not room.reserve(chunk.sequence, count):
                continue
            room.num_tokens -= count
            plan.asked[place] = DraftInput(
                *chunk.sequence.key, chunk.seat, follower.num_seen, tokens, count, follower.params
            )
            self._overwrite(chunk.sequence, follower, follower.num_seen + len(tokens) + count)
            follower.num_seen += len(tokens)

    def _to_read(self, room: DraftRoom, chunks: dict[int, Chunk]) -> dict[int, int]:
        """By place in the plan, how many tokens the draft model has not seen, of the sequences that it may be
        asked about in this step: those that pay for it in what is left to guess, and as far as the step may take
        it. Who is behind by more than a step reads has no guesses in it."""
        unread: dict[int, int] = {}
        left = room.longest - self._cost.predict(room.plan.num_tokens, room.plan.attended)
        for place, chunk in chunks.items():
            count = chunk.sequence.num_tokens - self._followers[chunk.sequence.key].num_seen
            reading = self._reading([count])
            if reading <= left and (count <= CATCH_UP or count <= WORTH * _left_to_guess(chunk.sequence)):
                unread[place] = count
                left -= reading
        return unread

    def _reading(self, unread: Iterable[int]) -> float:
        """Seconds that the draft model's first pass takes longer for what it reads before it guesses."""
        more = sum(min(count, CATCH_UP) - 1 for count in unread)
        return self._draft_cost.predict(more, 0) - self._draft_cost.predict(0, 0)

    def learn(self, chunk: Chunk, num_right: int) -> None:
        """So many of a chunk's guesses were right. The last one was not put into the draft model."""
        follower = self._followers[chunk.sequence.key]
        num_drafted = len(chunk.drafted)
        follower.record.learn(num_drafted, num_right)
        self._record.learn(num_drafted, num_right)
        follower.num_seen = chunk.end + min(num_right, num_drafted - 1)

    def forget(self, sequence: Sequence) -> None:
        """It ends; its blocks are still its own."""
        follower = self._followers.pop(sequence.key, None)
        if follower is not None and follower.seating == sequence.num_preemptions:
            self._note(sequence, follower)

    def _follow(self, sequence: Sequence) -> None:
        """Take note of what a sequence has become."""
        follower = self._followers.get(sequence.key)
        if follower is None:
            params = sequence.request.params
            plain = SamplingParams(
                temperature=params.temperature,
                top_k=params.top_k,
                top_p=params.top_p,
                min_p=params.min_p,
                seed=params.seed,
            )
            follower = self._followers[sequence.key] = _Follower(plain, DraftRecord(self._record.probability))
        if follower.seating == sequence.num_preemptions:
            self._note(sequence, follower)
            return
        follower.seating = sequence.num_preemptions
        blocks, prefix = sequence.held.tables[0].blocks, sequence.held.prefix
        known = 0
        while known < len(prefix) and self.noted.get(blocks[known]) == prefix[known]:
            known += 1
        follower.num_noted = known
        follower.num_seen = min(known * self._block_size, sequence.num_tokens - 1)

    def _overwrite(self, sequence: Sequence, follower: _Follower, end: int) -> None:
        """Tokens up to a place get new keys and values: what was noted of their blocks is no longer so."""
        for block in sequence.held.tables[0].blocks[follower.num_noted : -(-end // self._block_size)]:
            self.noted.pop(block, None)

    def _note(self, sequence: Sequence, follower: _Follower) -> None:
        """Note what lies in the blocks that have been filled since the last time. Where the context has shifted,
        its blocks are no longer those of its first tokens, and nothing is noted."""
        lease = sequence.held
        if lease.shift:
            return
        num_full = min(len(lease.prefix), follower.num_seen // self._block_size)
        for place in range(follower.num_noted, num_full):
            self.noted[lease.tables[0].blocks[place]] = lease.prefix[place]
        follower.num_noted = max(follower.num_noted, num_full)

    def _allot(
        self, room: DraftRoom, chunks: dict[int, Chunk], expected: list[float], unread: dict[int, int]
    ) -> dict[int, int]:
        """By place in the plan, how many guesses are asked for. What is read for them is read once, for all that
        come later too: it takes part of the step's time, and is not held against their gain."""
        plan, budget = room.plan, room.num_tokens
        reading = self._reading(unread.values())
        counts: dict[int, int] = {}
        best: dict[int, int] = {}
        num_tokens, attended = plan.num_tokens, plan.attended
        plain = seconds = self._cost.predict(num_tokens, attended)
        stretch = 1.0
        total = num_tokens - len(expected) + sum(expected)
        expected = list(expected)
        chances = {
            place: self._followers[chunk.sequence.key].record.probability for place, chunk in chunks.items()
        }
        level = 0
        active = list(unread)
        while active and budget > 0:
            level += 1
            # What only one row more costs has to pay for each, and the pass of the draft model for all of them.
            computing = self._cost.predict(num_tokens, attended)
            row = self._cost.predict(num_tokens + 1, attended) - computing
            row += self._draft_cost.predict(1, 0) - self._draft_cost.predict(0, 0)
            active = [
                place
                for place in active
                if room.most[place] >= level and chances[place] ** level * seconds > total * row
            ][:budget]
            gain = sum(chances[place] ** level for place in active)
            keys = sum(chunks[place].end + level for place in active)
            longer = seconds + self._cost.predict(num_tokens + len(active), attended + keys) - computing
            longer += self._draft_cost.predict(len(active), keys)
            if longer + reading > room.longest or gain * seconds <= total * (longer - seconds):
                break
            for place in active:
                counts[place] = level
                expected[place] += chances[place] ** level
            num_tokens, attended, seconds = num_tokens + len(active), attended + keys, longer
            total += gain
            budget -= len(active)
            if seconds <= room.patience(expected) * plain:
                best = dict(counts)
                stretch = (seconds + reading) / plain
        room.stretch *= stretch
        return best


def _left_to_guess(sequence: Sequence) -> float:
    """How many tokens its answer may still get."""
    max_tokens = sequence.request.params.max_tokens
    return float("inf") if max_tokens is None else max_tokens - sequence.num_output_tokens
