"""Clients' grammars are tried before they are served, where they hold nobody up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from aiohttp import web

from scheduler.engine.client import AsyncEngine
from scheduler.shared_thread import SharedThread
from scheduler.text.grammar_checker import GrammarChecker
from server.api.structured import Form
from server.app_keys import ENGINE


class Grammars:
    """Checks them in a thread that the users share, and that waits for a process."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._thread = SharedThread("grammars")
        self._checker: GrammarChecker | None = None

    async def check(self, user: str, form: Form) -> None:
        """Raises `InvalidRequestError` for a grammar that cannot be served."""
        # One that is known need not wait behind those that are new.
        if self._checker is None or not self._checker.check_known(form.grammar, form.field):
            await asyncio.wrap_future(self._thread.submit(user, lambda: self._check(form)))

    def _check(self, form: Form) -> None:
        if self._checker is None:
            self._checker = GrammarChecker(self._engine.tokenizer.definition, self._engine.info.eos_token_ids)
        self._checker.check(form.grammar, form.field)

    def close(self) -> None:
        self._thread.shutdown()
        if self._checker is not None:
            self._checker.close()


GRAMMARS = web.AppKey("grammars", Grammars)


async def grammars_lifetime(app: web.Application) -> AsyncIterator[None]:
    """For `cleanup_ctx`."""
    app[GRAMMARS] = Grammars(app[ENGINE])
    yield
    app[GRAMMARS].close()
