"""The bodies of POST /api/chat, /api/generate and /api/embed, in Ollama's words."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from scheduler.core.request import InvalidRequestError
from server.api.chat_request import ChatRequest
from server.api.completion_request import CompletionRequest, Prompts
from server.api.embedding_request import EmbeddingRequest
from server.api.fields import OBJECT, TEXT, TEXT_OR_LIST, Count, Hint, Length, described, only
from server.api.requests import NotWorded

Json = dict[str, Any]

FORMAT = '"json", or a JSON schema'
Format = Annotated[Literal["", "json"] | Json, described(FORMAT)]
"""JSON, or JSON that a schema accepts."""


NOTHING = [{"role": "user", "content": ""}]
"""What is said where nothing is."""


class OllamaFields(NotWorded):
    """What the bodies have in common that generate."""

    n: Annotated[Count, only(1)] = 1
    best_of: Annotated[int | None, only(1)] = None

    format: Annotated[Format, OBJECT] = ""
    """The form of the answer: JSON, or a JSON schema."""
    keep_alive: Hint[Any] = None
    """The model is always here."""
    truncate: Hint[bool] = True
    shift: Hint[bool] = True


class OllamaChatRequest(OllamaFields, ChatRequest):
    stream: bool = True
    """Send the answer as it comes, as lines of JSON."""

    @classmethod
    def _translated(cls, values: Json) -> Json:
        messages = values.get("messages", [])
        if isinstance(messages, list):
            values["messages"] = list(map(_message, messages)) or NOTHING
        if messages in ([], NOTHING):
            values["max_tokens"] = 0
        return super()._translated(_with_form(values))

    @property
    def loads(self) -> bool:
        """Whether nothing is asked: programs do so to have the model loaded."""
        return self.max_tokens == 0


class OllamaGenerateRequest(OllamaChatRequest):
    """A prompt, which the model's chat template words."""

    prompt: Annotated[str, TEXT] = ""
    """What to answer."""
    system: Annotated[str, TEXT] = ""
    """What comes before it."""
    raw: Annotated[bool, only(False)] = False
    context: Annotated[Any, only([])] = []
    template: Annotated[Any, only("")] = ""

    @classmethod
    def _translated(cls, values: Json) -> Json:
        asked = {"role": "user", "content": values.get("prompt", ""), "images": values.pop("images", [])}
        system = values.get("system")
        before = [{"role": "system", "content": system}] if system else []
        said = [*before, asked] if asked["content"] or asked["images"] else []
        return super()._translated(values | {"messages": said})


class OllamaRawRequest(OllamaFields, CompletionRequest):
    """A prompt that is continued as it is, or the text between two."""

    prompt: Annotated[Prompts, TEXT_OR_LIST, Field(max_length=1)]
    """What to continue."""
    logprobs: Annotated[Length | None, only()] = None
    stream: bool = True
    """Send the answer as it comes, as lines of JSON."""
    raw: Hint[bool] = False
    """The prompt is continued as it is, without a template."""
    system: Annotated[str, only("")] = ""
    context: Annotated[Any, only([])] = []
    template: Annotated[Any, only("")] = ""
    images: Annotated[Any, only([])] = []
    think: Annotated[Any, only(False)] = False

    @classmethod
    def _translated(cls, values: Json) -> Json:
        values = super()._translated(_with_form(values))
        return {"max_tokens": -1} | values


class OllamaEmbedRequest(EmbeddingRequest):
    keep_alive: Hint[Any] = None
    """The model is always here."""
    options: Hint[Json] = {}
    truncate: bool = True
    """Keep as much of an input as fits."""

    @classmethod
    def _translated(cls, values: Json) -> Json:
        if values.get("truncate", True) is True:
            values = {"truncate_prompt_tokens": -1, "truncation_side": "right"} | values
        return super()._translated(values)


def _message(message: Any) -> Any:
    """A turn in OpenAI's words."""
    if not isinstance(message, dict):
        return message
    message = dict(message)
    if images := message.pop("images", None):
        parts = [{"type": "image"} for _ in images] if isinstance(images, list) else []
        message["content"] = [{"type": "text", "text": message.get("content") or ""}, *parts]
    if (thought := message.pop("thinking", None)) is not None:
        message["reasoning_content"] = thought
    if (name := message.pop("tool_name", None)) is not None:
        message["name"] = name
    return message


def _with_form(values: Json) -> Json:
    """Ollama's `format` in OpenAI's words."""
    match values.get("format"):
        case "json":
            values["response_format"] = {"type": "json_object"}
        case dict() as schema:
            if "response_format" in values:
                raise InvalidRequestError(
                    "format and response_format both say what the answer looks like", "format"
                )
            values["response_format"] = {"type": "json_schema", "json_schema": {"schema": schema}}
    return values
