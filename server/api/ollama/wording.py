"""Ollama's answers: lines of JSON, the last of which has the counts, or one object."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, ClassVar

import msgspec
from msgspec import UNSET, UnsetType

from scheduler.client.async_engine import Delta
from scheduler.embedding import Embedding
from server.api.completion_objects import Usage
from server.api.embedding_request import EmbeddingRequest
from server.api.embeddings import EmbeddingWording
from server.api.logprobs import LogprobWords
from server.api.transcript import Said, Transcript, arguments_of
from server.http.errors import ApiError, OllamaError
from server.http.record import RequestRecord
from server.http.sse import EventStream, JsonLines
from server.parsing.events import Parser

NANOSECONDS = 1_000_000_000


class CalledFunction(msgspec.Struct, frozen=True):
    name: str
    arguments: dict[str, Any]


class Call(msgspec.Struct, frozen=True):
    function: CalledFunction


class Message(msgspec.Struct, frozen=True, kw_only=True):
    role: str = "assistant"
    content: str = ""
    thinking: str | UnsetType = UNSET
    tool_calls: list[Call] | UnsetType = UNSET


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """A line of an answer, or all of it. Durations are in nanoseconds."""

    model: str
    created_at: str
    message: Message | UnsetType = UNSET
    response: str | UnsetType = UNSET
    thinking: str | UnsetType = UNSET
    logprobs: list[msgspec.Raw] | UnsetType = UNSET
    done: bool = False
    done_reason: str | UnsetType = UNSET
    total_duration: int | UnsetType = UNSET
    load_duration: int | UnsetType = UNSET
    prompt_eval_count: int | UnsetType = UNSET
    prompt_eval_duration: int | UnsetType = UNSET
    eval_count: int | UnsetType = UNSET
    eval_duration: int | UnsetType = UNSET


class Embeddings(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    embeddings: list[list[float]]
    total_duration: int
    prompt_eval_count: int
    load_duration: int = 0


def time_of(seconds: float) -> str:
    """Unix time, as Ollama words it."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class OllamaWording:
    """Words the answers of /api/generate, and with `in_turns` those of /api/chat. Calls are told when they are
    whole, as Ollama tells them. `loads`: nothing was asked, and there is no answer."""

    stream: ClassVar[type[EventStream]] = JsonLines

    def __init__(
        self,
        model: str,
        parser: Parser,
        record: RequestRecord,
        words: LogprobWords | None = None,
        *,
        in_turns: bool = False,
        loads: bool = False,
    ) -> None:
        self.id = f"ollama-{uuid.uuid4().hex}"
        self._model = model
        self._transcript = Transcript(parser)
        self._said = Said()
        self._record = record
        self._words = words
        self._logprobs: list[msgspec.Raw] = []
        self._in_turns = in_turns
        self._loads = loads
        self._reason = "load"

    def opening(self) -> Sequence[msgspec.Struct]:
        return ()

    def chunk(self, choice: int, delta: Delta, usage: object) -> Sequence[Piece]:
        self.take(choice, delta)
        content, thinking = self._said.pop()
        logprobs, self._logprobs = self._logprobs, []
        if not (content or thinking or logprobs):
            return ()
        return [self._piece(content, thinking, logprobs)]

    def closing(self, usage: Usage) -> Sequence[Piece]:
        calls = [self._piece("", "", [], self._calls())] if self._said.calls else []
        return [*calls, self._ended(self._piece("", "", []), usage)]

    def failure(self, error: ApiError) -> msgspec.Struct:
        return OllamaError(error.body.error.message)

    def take(self, choice: int, delta: Delta) -> None:
        for event in self._transcript.hear(delta):
            self._said.add(event)
        if self._words is not None:
            self._logprobs += self._words.of_chat(delta.result.logprobs)
        if delta.finish_reason is not None and not self._loads:
            self._reason = str(delta.finish_reason)

    def whole(self, usage: Usage) -> Piece:
        said = self._said
        return self._ended(self._piece(said.content, said.reasoning, self._logprobs, self._calls()), usage)

    def _calls(self) -> list[Call]:
        return [Call(CalledFunction(name, arguments_of(text))) for name, text in self._said.calls]

    def _piece(
        self, content: str, thinking: str, logprobs: list[msgspec.Raw], calls: Sequence[Call] = ()
    ) -> Piece:
        said: dict[str, Any] = {"response": content, "thinking": thinking or UNSET}
        if self._in_turns:
            said = {
                "message": Message(content=content, thinking=thinking or UNSET, tool_calls=list(calls) or UNSET)
            }
        return Piece(model=self._model, created_at=time_of(time.time()), logprobs=logprobs or UNSET, **said)

    def _ended(self, piece: Piece, usage: Usage) -> Piece:
        first, rest = self._record.seconds
        return msgspec.structs.replace(
            piece,
            done=True,
            done_reason=self._reason,
            total_duration=round((first + rest) * NANOSECONDS),
            load_duration=0,
            prompt_eval_count=usage.prompt_tokens,
            prompt_eval_duration=round(first * NANOSECONDS),
            eval_count=usage.completion_tokens,
            eval_duration=round(rest * NANOSECONDS),
        )


class OllamaEmbedWording(EmbeddingWording):
    """Words the answers of /api/embed."""

    def __init__(
        self, model: str, body: EmbeddingRequest, embeddings: Sequence[Embedding], record: RequestRecord
    ) -> None:
        super().__init__(model, body, embeddings)
        self._record = record

    def whole(self, usage: Usage) -> msgspec.Struct:
        return Embeddings(
            model=self.model,
            embeddings=[each.tolist() for each in self.vectors()],
            total_duration=round(sum(self._record.seconds) * NANOSECONDS),
            prompt_eval_count=usage.prompt_tokens,
        )
