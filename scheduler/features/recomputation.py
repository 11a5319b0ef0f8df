"""How much may be computed again for the sake of fairness.

A sequence that gives up its seat resumes from what is left of it in the prefix cache. Where blocks are plenty that
is all; where they are not, others have overwritten it, and its tokens are computed again. A seat that changes
hands must be worth that.
"""

from __future__ import annotations

from scheduler.core.sequence import Sequence

SHARE = 1 / 8
"""Tokens that may be computed again for each that is computed for the first time."""

MOST = 2048.0
"""Tokens of credit at most, and at the beginning: whoever comes seldom does not have to wait for it."""


class RecomputationCredit:
    """Earned by tokens computed for the first time, spent by tokens computed again after a seat changed hands.

    What a change costs is guessed when it is made, and settled when the sequence that gave way comes back and it
    is known what the cache still has.
    """

    def __init__(self) -> None:
        self._tokens = MOST
        self._stakes: dict[tuple[str, int], int] = {}  # guesses, of those who have not come back

    def earn(self, num_tokens: int) -> None:
        self._tokens = min(MOST, self._tokens + SHARE * num_tokens)

    def affords(self, loss: int, spent: int = 0) -> bool:
        """Whether `loss` tokens may be lost, after `spent` others. One that is larger than any credit takes a full
        one, and leaves a debt."""
        return loss == 0 or self._tokens - spent >= min(loss, MOST)

    def stake(self, sequence: Sequence, loss: int) -> None:
        """A sequence gave way, and may lose so many tokens."""
        self._tokens -= loss
        self._stakes[sequence.key] = loss

    def settle(self, sequence: Sequence) -> None:
        """A sequence has a seat (again), and its cached prefix."""
        stake = self._stakes.pop(sequence.key, None)
        if stake is not None:
            self._tokens += stake - (sequence.num_ever_computed - sequence.num_computed_tokens)

    def release(self, sequence: Sequence) -> None:
        """A waiting sequence has ended: nothing of it will be computed again."""
        self._tokens += self._stakes.pop(sequence.key, 0)
