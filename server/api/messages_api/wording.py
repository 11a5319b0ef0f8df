"""Anthropic's answers and events, field for field."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec
from msgspec import UNSET, UnsetType

from scheduler.client.async_engine import Delta
from scheduler.core.request import FinishReason
from server.api.completion_objects import Usage
from server.api.conversation import Conversation
from server.api.transcript import Transcript, arguments_of
from server.http.errors import ApiError, in_anthropics_words
from server.http.sse import EventStream, NamedEvents
from server.parsing.events import Arguments, CallBegun, Content, Event, Reasoning, merged


class MessagesUsage(msgspec.Struct, frozen=True):
    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0


class ContentBlock(msgspec.Struct, frozen=True, kw_only=True):
    type: str
    text: str | UnsetType = UNSET
    thinking: str | UnsetType = UNSET
    signature: str | UnsetType = UNSET
    id: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    input: dict[str, Any] | UnsetType = UNSET


class MessageAnswer(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    model: str
    content: list[ContentBlock]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessagesUsage
    type: str = "message"
    role: str = "assistant"


class MessageStart(msgspec.Struct, frozen=True):
    message: MessageAnswer
    type: str = "message_start"


class BlockStart(msgspec.Struct, frozen=True):
    index: int
    content_block: ContentBlock
    type: str = "content_block_start"


class BlockPiece(msgspec.Struct, frozen=True, kw_only=True):
    type: str
    text: str | UnsetType = UNSET
    thinking: str | UnsetType = UNSET
    partial_json: str | UnsetType = UNSET


class BlockDelta(msgspec.Struct, frozen=True):
    index: int
    delta: BlockPiece
    type: str = "content_block_delta"


class BlockStop(msgspec.Struct, frozen=True):
    index: int
    type: str = "content_block_stop"


class Stopped(msgspec.Struct, frozen=True):
    stop_reason: str
    stop_sequence: str | None


class MessageDelta(msgspec.Struct, frozen=True):
    delta: Stopped
    usage: MessagesUsage
    type: str = "message_delta"


class MessageStop(msgspec.Struct, frozen=True):
    type: str = "message_stop"


class MessagesWording:
    """Words the answers of /v1/messages. `block_size`: that of the prefix cache, if what it takes in is told."""

    stream: ClassVar[type[EventStream]] = NamedEvents

    def __init__(self, conversation: Conversation, block_size: int | None = None) -> None:
        self.id = f"msg_{uuid.uuid4().hex}"
        self._model = conversation.model
        self._num_prompt_tokens = len(conversation.prompt)
        self._block_size = block_size
        self._max_tokens = conversation.params.max_tokens
        self._transcript = Transcript(conversation.new_parser())
        self._said: list[Event] = []
        self._open: type[Event] | None = None
        """What kind of block is open."""
        self._index = -1
        self._stopped = Stopped("end_turn", None)

    def opening(self) -> Sequence[msgspec.Struct]:
        return [MessageStart(self._answer([], MessagesUsage(self._num_prompt_tokens, 0), None))]

    def chunk(self, choice: int, delta: Delta, usage: Usage | UnsetType | None) -> Sequence[msgspec.Struct]:
        said: list[msgspec.Struct] = []
        for event in self._hear(delta):
            said += self._worded(event)
        return said

    def closing(self, usage: Usage) -> Sequence[msgspec.Struct]:
        return [*self._close(), MessageDelta(self._reason(usage), self._usage(usage)), MessageStop()]

    def failure(self, error: ApiError) -> msgspec.Struct:
        return in_anthropics_words(error)

    def take(self, choice: int, delta: Delta) -> None:
        self._said += self._hear(delta)

    def whole(self, usage: Usage) -> MessageAnswer:
        blocks: list[ContentBlock] = []
        calls: dict[int, tuple[str, str]] = {}
        for event in merged(self._said):
            match event:
                case Content(text):
                    blocks.append(ContentBlock(type="text", text=text))
                case Reasoning(text):
                    blocks.append(ContentBlock(type="thinking", thinking=text, signature=""))
                case CallBegun(index, name):
                    calls[index] = name, ""
                    blocks.append(ContentBlock(type="tool_use", id=_call_id(), name=name, input={}))
                case Arguments(_, text):
                    blocks[-1] = msgspec.structs.replace(blocks[-1], input=arguments_of(text))
        return self._answer(blocks, self._usage(usage), self._reason(usage))

    def _reason(self, usage: Usage) -> Stopped:
        """An answer that was cut before it had all the tokens that it may have was cut by the context's end."""
        if self._stopped.stop_reason == "max_tokens" and usage.completion_tokens != self._max_tokens:
            return Stopped("model_context_window_exceeded", None)
        return self._stopped

    def _usage(self, usage: Usage) -> MessagesUsage:
        cached, created = usage.prompt_tokens_details.cached_tokens, 0
        if self._block_size is not None:
            whole = usage.prompt_tokens - usage.prompt_tokens % self._block_size
            created = max(0, whole - cached)
        return MessagesUsage(
            usage.prompt_tokens - cached - created,
            usage.completion_tokens,
            cache_read_input_tokens=cached,
            cache_creation_input_tokens=created,
        )

    def _answer(self, blocks: list[ContentBlock], usage: MessagesUsage, stopped: Stopped | None) -> MessageAnswer:
        return MessageAnswer(
            id=self.id,
            model=self._model,
            content=blocks,
            stop_reason=None if stopped is None else stopped.stop_reason,
            stop_sequence=None if stopped is None else stopped.stop_sequence,
            usage=usage,
        )

    def _hear(self, delta: Delta) -> list[Event]:
        events = self._transcript.hear(delta)
        if delta.finish_reason is FinishReason.LENGTH:
            self._stopped = Stopped("max_tokens", None)
        elif isinstance(stop := delta.output.stop_reason, str):
            self._stopped = Stopped("stop_sequence", stop)
        elif self._transcript.has_called:
            self._stopped = Stopped("tool_use", None)
        return events

    def _worded(self, event: Event) -> list[msgspec.Struct]:
        match event:
            case Content(text):
                begun = self._begin(Content, ContentBlock(type="text", text=""))
                return [*begun, BlockDelta(self._index, BlockPiece(type="text_delta", text=text))]
            case Reasoning(text):
                begun = self._begin(Reasoning, ContentBlock(type="thinking", thinking="", signature=""))
                return [*begun, BlockDelta(self._index, BlockPiece(type="thinking_delta", thinking=text))]
            case CallBegun(_, name):
                block = ContentBlock(type="tool_use", id=_call_id(), name=name, input={})
                return [*self._close(), *self._begin(CallBegun, block)]
            case Arguments(_, text):
                return [BlockDelta(self._index, BlockPiece(type="input_json_delta", partial_json=text))]

    def _begin(self, kind: type[Event], block: ContentBlock) -> list[msgspec.Struct]:
        """Open a block, unless one of its kind is open."""
        if self._open is kind:
            return []
        closed = self._close()
        self._open = kind
        self._index += 1
        return [*closed, BlockStart(self._index, block)]

    def _close(self) -> list[msgspec.Struct]:
        if self._open is None:
            return []
        self._open = None
        return [BlockStop(self._index)]


def _call_id() -> str:
    return f"toolu_{uuid.uuid4().hex[:24]}"
