"""Counts what one request takes: for the answer's usage, for the user's limits, and for the ledger."""

from __future__ import annotations

import time
from collections.abc import Sequence

from scheduler.client.async_engine import Delta
from scheduler.core.request import FinishReason
from server.http.record import RequestRecord
from server.users.ledger import Ledger
from server.users.limits import Admission


class Meter:
    """Counts as the tokens come, so that the three agree whenever the request ends."""

    def __init__(
        self, user: str, prompts: Sequence[list[int]], record: RequestRecord, admission: Admission, ledger: Ledger
    ) -> None:
        """Raises `LimitExceededError` if the prompts are too much for now, `InvalidRequestError` if for ever."""
        lengths = [len(prompt) for prompt in prompts]
        record.prompt_tokens = sum(lengths)
        admission.add_prompts(lengths)
        self._user = user
        self._record = record
        self._admission = admission
        self._ledger = ledger
        self._lengths = lengths
        self._num_computed = [0] * len(lengths)
        """Tokens of each prompt."""
        self._waiting = set(range(len(lengths)))
        """The prompts without a token of an answer."""
        self._unread = set(self._waiting)
        """The prompts of which it is not known yet what the prefix cache spared."""

    def computed(self, place: int, num_tokens: int) -> None:
        """So many tokens of the prompt at this place, and of its answer, have been computed or found in the cache.
        The prompt's are paid for as they are: also if the client goes away before there is an answer."""
        num_new = min(num_tokens, self._lengths[place]) - self._num_computed[place]
        if num_new > 0:
            self._num_computed[place] += num_new
            self._record.computed_tokens += num_new
            self._admission.computed(num_new)
            self._ledger.add(self._user, prompt_tokens=num_new)

    def count(self, place: int, delta: Delta) -> None:
        """Count what a step did for the answer to the prompt at this place."""
        num_tokens = len(delta.token_ids) if delta.num_charged is None else delta.num_charged
        if num_tokens == 0 and delta.finish_reason is not FinishReason.LENGTH:  # of a prompt alone
            return
        if self._record.ttft is None:
            self._record.ttft = time.monotonic() - self._record.started
            self._ledger.add(self._user, requests=1)
        self.computed(place, self._lengths[place])
        if place in self._waiting:
            self._waiting.discard(place)
            self._admission.first_token()
        if delta.index == 0 and place in self._unread:  # the others find what this one computed: no saving
            self._unread.discard(place)
            self._record.cached_tokens += delta.output.num_cached_tokens
            self._ledger.add(self._user, cached_tokens=delta.output.num_cached_tokens)
        self._record.completion_tokens += num_tokens
        self._record.drafted_tokens += len(delta.output.drafted)
        self._record.accepted_tokens += delta.output.num_accepted
        self._admission.spend_tokens(num_tokens)
        self._ledger.add(self._user, completion_tokens=num_tokens)
