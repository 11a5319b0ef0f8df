"""How an endpoint words its answer: in one piece, or as the events of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

import msgspec
from msgspec import UnsetType

from scheduler.client.async_engine import Delta
from server.api.completion_objects import CompletionTokensDetails, PromptTokensDetails, Usage
from server.http.errors import ApiError
from server.http.json import Answer
from server.http.record import RequestRecord
from server.http.sse import EventStream


class Wording(Protocol):
    """`choice` counts the sequences of all prompts."""

    id: str
    stream: ClassVar[type[EventStream]]
    """How its events are sent."""

    def opening(self) -> Sequence[msgspec.Struct]:
        """What a stream begins with."""

    def chunk(self, choice: int, delta: Delta, usage: Usage | UnsetType | None) -> Sequence[msgspec.Struct]:
        """The events of one delta, with the usage so far if that is asked for."""

    def closing(self, usage: Usage) -> Sequence[msgspec.Struct]:
        """What a stream ends with."""

    def failure(self, error: ApiError) -> msgspec.Struct:
        """What a stream ends with that failed."""

    def take(self, choice: int, delta: Delta) -> None:
        """A part of the answer in one piece."""

    def whole(self, usage: Usage) -> Answer:
        """The answer in one piece: all that was taken."""


class ChunkedWording:
    """Of the endpoints whose streams are chunks of the answer and nothing else."""

    stream: ClassVar[type[EventStream]] = EventStream

    def opening(self) -> Sequence[msgspec.Struct]:
        return ()

    def failure(self, error: ApiError) -> msgspec.Struct:
        return error.body


def usage_of(record: RequestRecord) -> Usage:
    return Usage(
        prompt_tokens=record.prompt_tokens,
        completion_tokens=record.completion_tokens,
        total_tokens=record.prompt_tokens + record.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=record.cached_tokens),
        completion_tokens_details=CompletionTokensDetails(
            accepted_prediction_tokens=record.accepted_tokens,
            rejected_prediction_tokens=record.drafted_tokens - record.accepted_tokens,
        ),
    )
