"""What is known of a request while it is answered."""

from __future__ import annotations

import asyncio

from scheduler.engine.stream import Delta, RequestStream
from scheduler.request import Request
from scheduler.text.tokenizer import Tokenizer


class InFlight:
    """One request in flight: its stream of text, and the queue that its deltas go through."""

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self.stream = RequestStream(request, tokenizer)
        self.queue: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        self.first_token_at: float | None = None
        self.last_token_at: dict[int, float] = {}
        self.engine_number = 0
        """The engine that knows of it; 0: none."""
        self.timer: asyncio.TimerHandle | None = None
        """Ends it at its deadline."""
