"""Clients' grammars are tried before they are served, where they hold nobody up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

from scheduler.core.sampling import GrammarSpec
from scheduler.shared_thread import SharedThread
from scheduler.text.grammar_checker import GrammarChecker


class Grammars:
    """Checks them in a thread that the users share, and that waits for a process. `definition` gives the tokenizer
    as `Tokenizer.definition` has it, when it is needed."""

    def __init__(self, definition: Callable[[], str], end_token_ids: Collection[int]) -> None:
        self._thread = SharedThread("grammars")
        self._checker = GrammarChecker(definition, end_token_ids)

    async def check(self, user: str, grammar: GrammarSpec, param: str | None = None) -> None:
        """Raises `InvalidRequestError`, which names `param`, for a grammar that cannot be served, and
        `NotCheckedError`."""
        # One that is known need not wait behind those that are new.
        if not self._checker.check_known(grammar, param):
            await asyncio.wrap_future(self._thread.submit(user, lambda: self._checker.check(grammar, param)))

    def close(self) -> None:
        self._thread.shutdown()
        self._checker.close()
