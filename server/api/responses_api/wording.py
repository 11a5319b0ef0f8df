"""Words the answers of /v1/responses: events in OpenAI's order."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import msgspec
from msgspec import UnsetType

from scheduler.client.async_engine import Delta
from scheduler.text.tokenizer import Tokenizer
from server.api.completion_objects import Usage
from server.api.conversation import Conversation, call_id
from server.api.logprobs import LogprobWords
from server.api.responses_api.answers import Item, Part, Response, ResponseUsage, StreamEvent, status_of
from server.api.responses_api.request import ResponsesRequest
from server.api.transcript import Transcript
from server.http.errors import ApiError
from server.http.json import encode
from server.http.sse import EventStream, NamedEvents
from server.parsing.events import Arguments, CallBegun, Content, Event, Reasoning

KINDS = {
    "message": "output_text",
    "reasoning": "reasoning_text",
    "function_call": "function_call_arguments",
    "custom_tool_call": "custom_tool_call_input",
}
"""What the deltas of an item are called."""

CALLS = ("function_call", "custom_tool_call")


class ResponsesWording:
    """`on_end` is told the whole response, when there is one."""

    stream: ClassVar[type[EventStream]] = NamedEvents

    def __init__(
        self,
        tokenizer: Tokenizer,
        body: ResponsesRequest,
        conversation: Conversation,
        *,
        is_stored: bool,
        on_end: Callable[[Response], None],
    ) -> None:
        self.id = f"resp_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = conversation.model
        self._body = body
        self._params = conversation.params
        self._is_stored = is_stored
        self._on_end = on_end
        self._transcript = Transcript(conversation.new_parser())
        self._words = LogprobWords(tokenizer, as_ids=False)
        self._output: list[Item] = []
        self._text = ""
        """Of the item that is open."""
        self._logprobs: list[msgspec.Raw] = []
        self._num_logprobs_told = 0
        """In the deltas."""
        self._is_open = False
        self._status = "completed"
        self._num_reasoning = 0
        self._num_events = 0

    # A stream -------------------------------------------------------------------------------------------

    def opening(self) -> Sequence[msgspec.Struct]:
        response = self._response("in_progress", None)
        return [self._event(f"response.{what}", response=response) for what in ("created", "in_progress")]

    def chunk(self, choice: int, delta: Delta, usage: Usage | UnsetType | None) -> Sequence[msgspec.Struct]:
        events = [worded for event in self._hear(delta) for worded in self._worded(event)]
        return [*events, *self._close()] if delta.finish_reason is not None else events

    def closing(self, usage: Usage) -> Sequence[msgspec.Struct]:
        response = self._ended(usage)
        return [self._event(f"response.{self._status}", response=response)]

    def failure(self, error: ApiError) -> msgspec.Struct:
        content = error.body.error
        return self._event("error", code=content.code, message=content.message, param=content.param)

    # In one piece ---------------------------------------------------------------------------------------

    def take(self, choice: int, delta: Delta) -> None:
        self.chunk(choice, delta, None)

    def whole(self, usage: Usage) -> Response:
        return self._ended(usage)

    # Both -----------------------------------------------------------------------------------------------

    def _ended(self, usage: Usage) -> Response:
        response = self._response(self._status, ResponseUsage.of(usage, self._num_reasoning))
        self._on_end(response)
        return response

    def _hear(self, delta: Delta) -> list[Event]:
        events = self._transcript.hear(delta)
        if delta.finish_reason is not None:
            self._status = status_of(delta)
        self._logprobs += self._words.of_chat(delta.result.logprobs)
        if events and all(isinstance(event, Reasoning) for event in events):
            self._num_reasoning += len(delta.token_ids)
        return events

    def _worded(self, event: Event) -> list[StreamEvent]:
        match event:
            case Content(text):
                new = Item(id=self._item_id("msg"), type="message", role="assistant", content=[])
                return [*self._begin(new), *self._piece(text)]
            case Reasoning(text):
                new = Item(id=self._item_id("rs"), type="reasoning", summary=[], content=[])
                return [*self._begin(new), *self._piece(text)]
            case CallBegun(_, name):
                return [*self._close(), *self._begin(self._call(name))]
            case Arguments(_, text):
                return self._piece(text)

    def _item_id(self, kind: str) -> str:
        """It tells which response has the item: `recent.response_of`."""
        return f"{kind}_{self.id.removeprefix('resp_')}{len(self._output):x}"

    def _call(self, name: str) -> Item:
        """`name`: the tool's, as the model knows it."""
        tool = self._body.flat_tools.get(name)
        if tool is not None and tool.type == "custom":
            item = Item(id=self._item_id("ctc"), type="custom_tool_call", call_id=call_id(), input="")
        else:
            item = Item(id=self._item_id("fc"), type="function_call", call_id=call_id(), arguments="")
        item.name = name if tool is None else tool.name
        if tool is not None and tool.namespace:
            item.namespace = tool.namespace
        return item

    def _begin(self, item: Item) -> list[StreamEvent]:
        """Open an item, unless one of its kind is open."""
        if self._is_open and self._output[-1].type == item.type:
            return []
        events = self._close()
        item.status = "in_progress"
        self._output.append(item)
        self._is_open, self._text = True, ""
        events.append(self._of_item("response.output_item.added", item=msgspec.Raw(encode(item))))
        if item.type not in CALLS:
            events.append(self._of_item("response.content_part.added", content_index=0, part=self._part()))
        return events

    def _piece(self, text: str) -> list[StreamEvent]:
        self._text += text
        item = self._output[-1]
        fields: dict[str, Any] = {"item_id": item.id, "delta": text}
        if item.type not in CALLS:
            fields["content_index"] = 0
        if item.type == "message":
            fields["logprobs"] = self._logprobs[self._num_logprobs_told :]
            self._num_logprobs_told = len(self._logprobs)
        return [self._of_item(f"response.{KINDS[item.type]}.delta", **fields)]

    def _close(self) -> list[StreamEvent]:
        if not self._is_open:
            return []
        self._is_open = False
        item, text = self._output[-1], self._text
        item.status = self._status
        done = f"response.{KINDS[item.type]}.done"
        if item.type == "function_call":
            item.arguments = text
            events = [self._of_item(done, item_id=item.id, name=item.name, arguments=text)]
        elif item.type == "custom_tool_call":
            item.input = text
            events = [self._of_item(done, item_id=item.id, input=text)]
        else:
            part = self._part()
            item.content = [part]
            logprobs: dict[str, Any] = {"logprobs": part.logprobs} if item.type == "message" else {}
            events = [
                self._of_item(done, item_id=item.id, content_index=0, text=text, **logprobs),
                self._of_item("response.content_part.done", item_id=item.id, content_index=0, part=part),
            ]
            self._logprobs, self._num_logprobs_told = [], 0
        return [*events, self._of_item("response.output_item.done", item=msgspec.Raw(encode(item)))]

    def _part(self) -> Part:
        kind = self._output[-1].type
        if kind == "reasoning":
            return Part(type="reasoning_text", text=self._text)
        return Part(type="output_text", text=self._text, annotations=[], logprobs=self._logprobs)

    def _of_item(self, kind: str, **fields: Any) -> StreamEvent:
        if "item" not in fields and "item_id" not in fields:
            fields["item_id"] = self._output[-1].id
        return self._event(kind, output_index=len(self._output) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> StreamEvent:
        number, self._num_events = self._num_events, self._num_events + 1
        return StreamEvent(type=kind, sequence_number=number, **fields)

    def _response(self, status: str, usage: ResponseUsage | None) -> Response:
        body = self._body
        return Response(
            id=self.id,
            created_at=self._created,
            status=status,
            model=self._model,
            output=list(self._output) if usage is not None else [],
            instructions=body.instructions or None,
            max_output_tokens=body.max_output_tokens,
            parallel_tool_calls=body.parallel_tool_calls,
            previous_response_id=body.previous_response_id,
            reasoning={"effort": body.reasoning.effort, "summary": None},
            store=self._is_stored,
            temperature=self._params.temperature,
            truncation=body.truncation,
            text=body.text.model_dump(by_alias=True, exclude_unset=True) or {"format": {"type": "text"}},
            tool_choice=body.tool_choice if isinstance(body.tool_choice, str) else body.tool_choice.model_dump(),
            tools=[tool.told for tool in body.tools],
            top_p=self._params.top_p,
            metadata=body.metadata,
            usage=usage,
            incomplete_details={"reason": "max_output_tokens"} if status == "incomplete" else None,
        )
