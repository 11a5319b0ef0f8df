"""What the engine learns of the tokenizer, for answers that are held to a grammar."""

from __future__ import annotations

import asyncio

from scheduler.client.supervisor import Supervisor
from scheduler.core.request import InvalidRequestError
from scheduler.text.tokenizer import Tokenizer
from scheduler.wire.messages import LearnTokenizer


class Lesson:
    """What each of the tokens says. Every engine is told before there is anything for it to do: learning takes
    longer than a step."""

    def __init__(self, tokenizer: Tokenizer, supervisor: Supervisor) -> None:
        self._tokenizer = tokenizer
        self._supervisor = supervisor
        self._first = asyncio.create_task(self._teach())

    async def _teach(self) -> str | InvalidRequestError:
        """What the first engine was told, or why there is nothing to tell."""
        try:
            definition = await asyncio.to_thread(self._tokenizer.definition)
        except InvalidRequestError as error:
            return error
        await self._supervisor.send(LearnTokenizer(definition))
        return definition

    async def repeat(self) -> None:
        """For an engine that has taken the place of another."""
        definition = await self._first
        if isinstance(definition, str):
            await self._supervisor.send(LearnTokenizer(definition))

    async def learned(self) -> None:
        """Returns when the engine has been told. Raises `InvalidRequestError` where it never will be."""
        outcome = await asyncio.shield(self._first)
        if isinstance(outcome, InvalidRequestError):
            raise outcome

    async def end(self) -> None:
        self._first.cancel()
        await asyncio.gather(self._first, return_exceptions=True)
