"""Grammars of new requests, compiled beside the steps: a request joins the queue when its grammar is ready."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from concurrent.futures import Future, wait
from typing import NamedTuple

from scheduler.core.request import InvalidRequestError, Request
from scheduler.shared_thread import SharedThread
from scheduler.text.grammar import Grammar, GrammarCompiler

logger = logging.getLogger(__name__)


class Compiled(NamedTuple):
    request: Request
    grammar: Grammar | None
    error: str | None
    """Why there is none."""


class Compiling:
    """The requests whose grammars are being compiled, in one thread that their users share: the library lets the
    interpreter go on."""

    def __init__(self, end_tokens: Iterable[int]) -> None:
        self._end_tokens = frozenset(end_tokens)
        self._thread = SharedThread("grammars")
        self._compiler: Future[GrammarCompiler] | None = None
        self._requests: dict[str, tuple[Request, Future[Grammar]]] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def learn(self, tokenizer: str) -> None:
        """The tokenizer, as `Tokenizer.definition` has it: needed before the first grammar."""
        self._compiler = self._thread.submit("", lambda: GrammarCompiler(tokenizer, self._end_tokens))

    def known(self, request: Request) -> Grammar | None:
        """Its grammar, if that was compiled for another one: nobody has to wait for it."""
        compiler, spec = self._compiler, request.params.grammar
        if compiler is None or spec is None or not compiler.done() or compiler.exception() is not None:
            return None
        return compiler.result().known(spec)

    def begin(self, request: Request) -> None:
        """Raises `InvalidRequestError` where no tokenizer is known."""
        compiler, spec = self._compiler, request.params.grammar
        if compiler is None or spec is None:
            raise InvalidRequestError("grammars are not possible without a tokenizer")
        compiled = self._thread.submit(request.user, lambda: compiler.result().compile(spec))
        self._requests[request.request_id] = request, compiled

    def take(self, timeout: float) -> list[Compiled]:
        """Those that are done; waits so many seconds for one."""
        if not self._requests:
            return []
        if timeout > 0:
            wait([compiled for _, compiled in self._requests.values()], timeout, return_when="FIRST_COMPLETED")
        done = []
        for request, compiled in list(self._requests.values()):
            if not compiled.done():
                continue
            del self._requests[request.request_id]
            error = compiled.exception()
            if error is None:
                done.append(Compiled(request, compiled.result(), None))
            elif isinstance(error, InvalidRequestError):
                done.append(Compiled(request, None, str(error)))
            else:
                logger.error("compiling the grammar of %s failed", request.request_id, exc_info=error)
                done.append(Compiled(request, None, "the engine failed on this grammar; its log says why"))
        return done

    def drop(self, request_id: str) -> Request | None:
        """Its client has gone."""
        found = self._requests.pop(request_id, None)
        if found is None:
            return None
        found[1].cancel()
        return found[0]
