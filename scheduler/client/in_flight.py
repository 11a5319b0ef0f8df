"""What is known of a request while it is answered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from scheduler.client.stream import Delta, RequestStream
from scheduler.core.request import Request
from scheduler.text.tokenizer import Tokenizer

Computed = Callable[[int], object]
"""Told how many tokens of a request have been computed, or found in the cache."""


class InFlight:
    """One request in flight: its stream of text, and the queue that its deltas go through. `computed` is told how
    many of its tokens have been computed."""

    def __init__(self, request: Request, tokenizer: Tokenizer, computed: Computed) -> None:
        self.computed = computed
        self.stream = RequestStream(request, tokenizer)
        self.queue: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        self.num_computed = 0
        """The most tokens of it that any engine has computed."""
        self.first_token_at: float | None = None
        self.last_token_at: dict[int, float] = {}
        self.engine_number = 0
        """The engine that knows of it; 0: none."""
        self.timer: asyncio.TimerHandle | None = None
        """Ends it at its deadline."""
        self.has_expired = False
        """Whether that has ended it, and the engine has yet to say so."""
