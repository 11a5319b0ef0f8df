"""How often a sequence's guesses were right."""

from __future__ import annotations

from dataclasses import dataclass

PRIOR_WEIGHT = 2.0
"""How many guesses count for what is believed before any was made."""

MEMORY = 0.9
"""How much a verified guess still counts at the sequence's next one."""

IDLE_MEMORY = 0.98
"""How much it counts after a step in which none was made: what went wrong once is tried again."""


@dataclass(slots=True)
class DraftRecord:
    """Of one sequence's guesses of one kind."""

    prior: float
    """The share that is taken to be right until more is known."""
    right: float = 0.0
    tested: float = 0.0

    @property
    def probability(self) -> float:
        """That the next guess is right, if those before it are."""
        return (self.right + PRIOR_WEIGHT * self.prior) / (self.tested + PRIOR_WEIGHT)

    def learn(self, num_drafted: int, num_right: int) -> None:
        """After the first wrong guess the others say nothing."""
        self._fade(MEMORY)
        self.right += num_right
        self.tested += min(num_right + 1, num_drafted)

    def rest(self) -> None:
        """A step without a guess."""
        self._fade(IDLE_MEMORY)

    def _fade(self, share: float) -> None:
        self.right *= share
        self.tested *= share
