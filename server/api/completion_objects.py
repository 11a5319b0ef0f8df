"""OpenAI's answers, field for field."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

from scheduler.core.request import FinishReason
from server.api.explanation import ExplainedStep


def finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for a token that cannot be."""
    return max(logprob, -9999.0)


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What the answers and chunks of both endpoints begin with."""

    id: str
    object: str
    created: int
    model: str


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    """Guessed tokens: of the answer's tokens those that were guessed, and those that were guessed wrongly."""

    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails = CompletionTokensDetails()


# /v1/embeddings


class EmbeddingAnswer(msgspec.Struct, frozen=True):
    index: int
    embedding: str | list[float]
    """Base64 of its numbers, or the numbers."""
    object: str = "embedding"


class EmbeddingUsage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct, frozen=True):
    data: list[EmbeddingAnswer]
    model: str
    usage: EmbeddingUsage
    object: str = "list"


# /v1/completions: an answer and a chunk of one look the same.


class CompletionLogprobs(msgspec.Struct, frozen=True):
    tokens: list[str]
    token_logprobs: list[float | None]
    """The first token of a prompt has none."""
    top_logprobs: list[msgspec.Raw]
    """The alternatives at each token: their texts and log-probabilities, as JSON."""
    text_offset: list[int]
    """Where each token begins in the text."""


class PromptLogprob(msgspec.Struct, frozen=True):
    logprob: float
    rank: int
    decoded_token: str


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None
    """The stop token or the stop string that ended it."""
    prompt_logprobs: list[msgspec.Raw] | UnsetType | None = UNSET
    """Of each token of the prompt: by token a `PromptLogprob`, as JSON; of the first null."""
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    explanation: list[ExplainedStep] | UnsetType = UNSET


class Completion(Answer, frozen=True, kw_only=True):
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


# /v1/chat/completions


class TopLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    """What it adds to the text, in UTF-8: those of all tokens make the text. An end token adds nothing."""


class ChatLogprob(TopLogprob, frozen=True):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[msgspec.Raw]
    """A `ChatLogprob` for each token, as JSON."""
    refusal: None = None


class CalledFunction(msgspec.Struct, frozen=True):
    arguments: str
    """JSON, or a piece of it."""
    name: str | UnsetType = UNSET


class CalledCustom(msgspec.Struct, frozen=True):
    input: str
    """A text, or a piece of it."""
    name: str | UnsetType = UNSET


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    function: CalledFunction | UnsetType = UNSET
    custom: CalledCustom | UnsetType = UNSET
    type: str


class ToolCallDelta(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    function: CalledFunction | UnsetType = UNSET
    custom: CalledCustom | UnsetType = UNSET
    id: str | UnsetType = UNSET
    """With the name, in a call's first delta."""
    type: str | UnsetType = UNSET


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    role: str = "assistant"
    content: str | None
    """Null where tools are called and nothing is said."""
    refusal: None = None
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    """The same, by its older name."""
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET
    explanation: list[ExplainedStep] | UnsetType = UNSET


class ChatCompletion(Answer, frozen=True, kw_only=True):
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: list[msgspec.Raw] | None = None
    prompt_token_ids: list[int] | UnsetType = UNSET


class ChatDelta(msgspec.Struct, frozen=True):
    role: str | UnsetType = UNSET
    """In a choice's first chunk only."""
    content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET
    explanation: list[ExplainedStep] | UnsetType = UNSET


class ChatCompletionChunk(Answer, frozen=True, kw_only=True):
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    """Null before the last chunk, and there only if the client asked for it."""
    prompt_token_ids: list[int] | UnsetType = UNSET
    """In the first chunk only."""


# /v1/models


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """In OpenAI's words and in Anthropic's, whose clients read the same list."""

    id: str
    created: int
    max_model_len: int
    root: str
    object: str = "model"
    owned_by: str = "carousel"
    parent: None = None
    type: str = "model"
    display_name: str
    created_at: str
    """In RFC 3339's form."""
    max_input_tokens: int
    lifecycle: str = "active"


class ModelList(msgspec.Struct, frozen=True):
    data: list[Model]
    first_id: str
    last_id: str
    has_more: bool = False
    object: str = "list"


class Health(msgspec.Struct, frozen=True):
    status: str
