"""Counts what one request takes: for the answer's usage, for the user's limits, and for the ledger."""

from __future__ import annotations

import time
from collections.abc import Sequence

from scheduler.engine.client import Delta
from scheduler.request import FinishReason
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
        self._waiting = dict(enumerate(lengths))
        """The prompts without a token of an answer, and how long they are."""
        self._unread = set(self._waiting)
        """The prompts of which it is not known yet what the prefix cache spared."""

    def count(self, place: int, delta: Delta) -> None:
        """Count what a step did for the prompt at this place."""
        num_tokens = len(delta.token_ids)
        if num_tokens == 0 and delta.finish_reason is not FinishReason.LENGTH:  # of a prompt alone
            return
        if self._record.ttft is None:
            self._record.ttft = time.monotonic() - self._record.started
            self._ledger.add(self._user, requests=1)
        if (num_prompt_tokens := self._waiting.pop(place, None)) is not None:
            self._admission.first_token(num_prompt_tokens)
            self._ledger.add(self._user, prompt_tokens=num_prompt_tokens)
        if delta.index == 0 and place in self._unread:  # the others find what this one computed: no saving
            self._unread.discard(place)
            self._record.cached_tokens += delta.num_cached_tokens
            self._ledger.add(self._user, cached_tokens=delta.num_cached_tokens)
        self._record.completion_tokens += num_tokens
        self._record.drafted_tokens += len(delta.drafted)
        self._record.accepted_tokens += delta.num_accepted
        self._admission.spend_tokens(num_tokens)
        self._ledger.add(self._user, completion_tokens=num_tokens)
