"""What is done on the event loop for requests that arrive: a piece in each of its rounds, whoever's turn it is."""

from __future__ import annotations

import asyncio
from collections import deque


class Turnstile:
    """Lets one piece of work pass in a round of the event loop, the users' by turns. Each takes a millisecond or
    two, and where fifty come at once every stream would wait for all of them."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        """By user; whose turn it is first."""
        self._is_busy = False

    async def enter(self, user: str) -> None:
        """Returns when the user's next piece may be done."""
        loop = asyncio.get_running_loop()
        if not self._is_busy:
            self._is_busy = True
            loop.call_soon(self._let_in)
            return
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.setdefault(user, deque()).append(turn)
        await turn

    def _let_in(self) -> None:
        """A round is over: somebody may pass in the next one."""
        while self._waiting:
            user = next(iter(self._waiting))
            turns = self._waiting.pop(user)
            turn = turns.popleft()
            if turns:
                self._waiting[user] = turns
            if not turn.done():  # else whoever waited has gone
                turn.set_result(None)
                asyncio.get_running_loop().call_soon(self._let_in)
                return
        self._is_busy = False
