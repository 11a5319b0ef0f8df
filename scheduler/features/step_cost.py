"""What a step costs, learned while the engine runs: seconds as a function of its tokens and their contexts."""

from __future__ import annotations

import math

import numpy as np

MEMORY = 0.995
"""How much an observation still counts one step later: some 200 steps are remembered."""

OUTLIER = 5.0
"""A step that takes so many times what was predicted is an accident (swapping, a compilation), and teaches nothing
unless there was another one lately. Even then it counts as no longer than this: what has become slow shows it
again and again."""

LATELY = 64
"""Steps."""

LEAST_SECONDS = 1e-4
"""No step is predicted to take less, or nothing could be learned from one that takes longer."""

HEADROOM = 0.1
"""Share of a target that is left unplanned, for what the engine does not see: the wire, and the client."""


class StepCost:
    """A linear model of a step's duration: `fixed + per_token * tokens + per_key * attended`.

    `attended` counts the keys that all queries of the step look at. Least squares over recent steps, each estimate
    held to the one before it where those steps say nothing: steps that only decode teach nothing about prompts.
    """

    def __init__(self) -> None:
        self.estimate = np.array([5e-3, 2e-4, 1e-7])
        """Seconds of a step, of a token, of a key. Before anything is observed, those of a small model on a plain
        CPU; a few steps correct them."""
        self._scale = np.array([1.0, 1e-2, 1e-5])  # brings the three terms to a like size
        self._squares = np.zeros((3, 3))
        self._products = np.zeros(3)
        self._num_since_accident = LATELY
        self.error = 0.0
        """Mean distance between prediction and observation, in seconds, over recent steps."""

    def observe(self, num_tokens: int, attended: int, seconds: float) -> None:
        """Learn from one step."""
        predicted = self.predict(num_tokens, attended)
        most = OUTLIER * max(LEAST_SECONDS, predicted)
        is_first = seconds > most and self._num_since_accident >= LATELY
        self._num_since_accident = 0 if seconds > most else self._num_since_accident + 1
        if is_first:
            return
        seconds = min(seconds, most)
        error = abs(seconds - predicted)
        self.error += (1 - MEMORY) * 4 * (error - self.error)
        terms = self._scale * (1, num_tokens, attended)
        self._squares = MEMORY * self._squares + np.outer(terms, terms)
        self._products = MEMORY * self._products + terms * seconds
        hold = 0.01 * np.eye(3)
        scaled = np.linalg.solve(self._squares + hold, self._products + hold @ (self.estimate / self._scale))
        self.estimate = np.maximum(scaled, 0.0) * self._scale

    def predict(self, num_tokens: float, attended: float) -> float:
        """Seconds that a step takes."""
        fixed, per_token, per_key = self.estimate.tolist()
        seconds: float = fixed + per_token * num_tokens + per_key * attended
        return seconds

    def tokens_within(self, seconds: float, context: int) -> int:
        """How many tokens a step computes in `seconds` that look at `context` keys each."""
        fixed, per_token, per_key = self.estimate.tolist()
        each = per_token + per_key * context
        return int(min(max(0.0, seconds - fixed) / each, 1 << 30)) if each > 0 else 1 << 30

    def prompt_tokens_within(self, seconds: float, num_tokens: int, attended: int, start: int) -> int:
        """How many more tokens a step of `num_tokens` can compute, of a prompt from its place `start` on, before
        it takes longer than `seconds`."""
        slack = seconds * (1 - HEADROOM) - 2 * self.error - self.predict(num_tokens, attended)
        if slack <= 0:
            return 0
        _, per_token, per_key = self.estimate.tolist()
        # n more tokens attend to n * (start + n / 2) keys.
        linear, quadratic = per_token + per_key * start, per_key / 2
        if quadratic * slack <= 1e-9 * linear**2:
            return int(slack / linear) if linear > 0 else 1 << 30
        return int((math.sqrt(linear**2 + 4 * quadratic * slack) - linear) / (2 * quadratic))
