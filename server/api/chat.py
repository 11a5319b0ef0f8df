"""POST /v1/chat/completions: continue a conversation, worded by the model's chat template."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from scheduler.client.async_engine import Delta
from scheduler.core.request import FinishReason
from scheduler.core.step import TokenLogprobs
from scheduler.text.tokenizer import Tokenizer
from server.api.chat_request import ChatRequest
from server.api.completion_objects import (
    CalledCustom,
    CalledFunction,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from server.api.conversation import Conversation, call_id, understand
from server.api.explanation import Explainer
from server.api.generation import Asked, answer
from server.api.logprobs import LogprobWords
from server.api.models import longest_sequence
from server.api.reading import read
from server.api.shape import check_chat
from server.api.transcript import Said, Transcript
from server.api.wording import ChunkedWording
from server.app_keys import ENGINE
from server.http.record import RequestRecord
from server.parsing.events import Arguments, CallBegun, Content, Event, Reasoning, merged


async def create_chat_completion(request: web.Request) -> web.StreamResponse:
    return await answer(request, understand_chat, prompt_field="messages")


def understand_chat(app: web.Application, record: RequestRecord, content: bytes) -> Asked:
    """Raises whatever is wrong with the request. May be called in a thread."""
    check_chat(content, longest=longest_sequence(app[ENGINE].info))
    body = read(app, record, content, ChatRequest)
    conversation = understand(app, body.ask())
    wording = ChatWording(app[ENGINE].tokenizer, body, conversation)
    return conversation.asked(wording, body.beams(conversation.params))


class ChatWording(ChunkedWording):
    """Words the answers of /v1/chat/completions."""

    def __init__(self, tokenizer: Tokenizer, body: ChatRequest, conversation: Conversation) -> None:
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = conversation.model
        self._body = body
        self._prompt = conversation.prompt
        self._has_begun = False
        """Whether a chunk of the stream is out."""
        self._scored: list[TokenLogprobs] = []
        self._words = LogprobWords(tokenizer, as_ids=body.return_tokens_as_token_ids)
        echoed = body.messages[-1].text if body.echo and body.continue_final_message else ""
        self._voices = [
            _Voice(
                conversation,
                Explainer(tokenizer, conversation.prompt),
                echoed=echoed,
                includes_reasoning=body.include_reasoning,
            )
            for _ in range(body.n)
        ]

    def chunk(self, choice: int, delta: Delta, usage: Usage | UnsetType | None) -> Sequence[ChatCompletionChunk]:
        voice = self._voices[choice]
        events = voice.hear(delta)
        voice.explainer.take(delta)
        self._scored.extend(delta.result.scored)
        wants_ids = self._body.return_token_ids
        if not (events or delta.result.logprobs or delta.finish_reason or (wants_ids and delta.token_ids)):
            return ()
        deltas = [worded for event in events if (worded := voice.delta(event)) is not None] or [
            ChatDelta(content="")
        ]
        if not voice.is_introduced:
            deltas[0] = msgspec.structs.replace(deltas[0], role="assistant")
            voice.is_introduced = True
        chunks = [self._chunk([ChatChunkChoice(index=choice, delta=each)], usage) for each in deltas[:-1]]
        last = ChatChunkChoice(
            index=choice,
            delta=deltas[-1],
            logprobs=self._logprobs(delta),
            finish_reason=voice.reason(delta),
            stop_reason=delta.output.stop_reason if delta.finish_reason is not None else UNSET,
            token_ids=delta.token_ids if wants_ids else UNSET,
            explanation=voice.explainer.pop(),
        )
        return [*chunks, self._chunk([last], usage)]

    def closing(self, usage: Usage) -> Sequence[ChatCompletionChunk]:
        return [self._chunk([], usage)] if self._body.include_usage else ()

    def take(self, choice: int, delta: Delta) -> None:
        self._scored.extend(delta.result.scored)
        voice = self._voices[choice]
        for event in voice.hear(delta):
            voice.said.add(event)
        if (logprobs := self._logprobs(delta)) is not None:
            voice.logprobs += logprobs.content
        voice.explainer.take(delta)
        voice.token_ids += delta.token_ids
        voice.last = delta

    def whole(self, usage: Usage) -> ChatCompletion:
        return ChatCompletion(
            id=self.id,
            object="chat.completion",
            created=self._created,
            model=self._model,
            choices=[self._whole(choice, voice) for choice, voice in enumerate(self._voices)],
            usage=usage,
            prompt_logprobs=self._prompt_logprobs(),
            prompt_token_ids=self._prompt if self._body.return_token_ids else UNSET,
        )

    def _whole(self, choice: int, voice: _Voice) -> ChatChoice:
        assert voice.last is not None
        return ChatChoice(
            index=choice,
            message=voice.message(),
            logprobs=ChatLogprobs(voice.logprobs) if voice.logprobs else None,
            finish_reason=voice.reason(voice.last),
            stop_reason=voice.last.output.stop_reason,
            token_ids=voice.token_ids if self._body.return_token_ids else UNSET,
            explanation=voice.explainer.pop(),
        )

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | UnsetType | None) -> ChatCompletionChunk:
        is_first, self._has_begun = not self._has_begun, True
        return ChatCompletionChunk(
            id=self.id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._model,
            choices=choices,
            usage=usage,
            prompt_token_ids=self._prompt if is_first and self._body.return_token_ids else UNSET,
        )

    def _logprobs(self, delta: Delta) -> ChatLogprobs | None:
        if not self._body.logprobs or not delta.result.logprobs:
            return None
        return ChatLogprobs(self._words.of_chat(delta.result.logprobs))

    def _prompt_logprobs(self) -> list[msgspec.Raw] | None:
        if self._body.prompt_logprobs is None:
            return None
        return [msgspec.Raw(b"null"), *self._words.of_prompt(self._scored)]


class _Voice:
    """One of the answers."""

    def __init__(
        self, conversation: Conversation, explainer: Explainer, *, echoed: str, includes_reasoning: bool
    ) -> None:
        self.explainer = explainer
        self.is_introduced = False
        """Whether its first chunk, which names the role, is out."""
        self.said = Said()
        self.logprobs: list[msgspec.Raw] = []
        self.token_ids: list[int] = []
        self.last: Delta | None = None
        self._transcript = Transcript(conversation.new_parser())
        self._includes_reasoning = includes_reasoning
        self._echoed = echoed
        self._custom_tools = conversation.custom_tools
        self._called: list[str] = []
        """The names of the tools, in the order of the calls."""

    def hear(self, delta: Delta) -> list[Event]:
        """What a piece of text turns out to say."""
        events = self._transcript.hear(delta)
        if self._echoed:
            events = merged([Content(self._echoed), *events])
            self._echoed = ""
        if not self._includes_reasoning:
            events = merged(event for event in events if not isinstance(event, Reasoning))
        return events

    def reason(self, delta: Delta) -> str | None:
        if delta.finish_reason is FinishReason.STOP and self._transcript.has_called:
            return "tool_calls"
        return delta.finish_reason

    def delta(self, event: Event) -> ChatDelta:
        match event:
            case Content(text):
                return ChatDelta(content=text)
            case Reasoning(text):
                return ChatDelta(reasoning=text, reasoning_content=text)
            case CallBegun(index, name):
                self._called.append(name)
                if name in self._custom_tools:
                    begun = ToolCallDelta(index=index, custom=CalledCustom("", name), id=call_id(), type="custom")
                else:
                    called = CalledFunction("", name)
                    begun = ToolCallDelta(index=index, function=called, id=call_id(), type="function")
                return ChatDelta(tool_calls=[begun])
            case Arguments(index, text):
                if self._called[index] in self._custom_tools:
                    return ChatDelta(tool_calls=[ToolCallDelta(index=index, custom=CalledCustom(text))])
                return ChatDelta(tool_calls=[ToolCallDelta(index=index, function=CalledFunction(text))])

    def message(self) -> ChatMessage:
        said = self.said
        return ChatMessage(
            content=said.content if said.content or not said.calls else None,
            reasoning=said.reasoning or UNSET,
            reasoning_content=said.reasoning or UNSET,
            tool_calls=[self._call(*call) for call in said.calls] or UNSET,
        )

    def _call(self, name: str, arguments: str) -> ToolCall:
        if name in self._custom_tools:
            return ToolCall(id=call_id(), custom=CalledCustom(arguments, name), type="custom")
        return ToolCall(id=call_id(), function=CalledFunction(arguments, name), type="function")
