"""POST /completion and /infill, and what llama.cpp's programs ask about the model, in llama.cpp's words."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from typing import Annotated, Any, ClassVar

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType
from pydantic import Field

from scheduler.client.async_engine import Delta
from scheduler.core.request import FinishReason, InvalidRequestError
from scheduler.text.tokenizer import Tokenizer
from server.api.chat_request import Message
from server.api.completion_objects import Usage
from server.api.completion_request import CompletionRequest
from server.api.completions import Prompt, completion_of
from server.api.counting import counted
from server.api.fields import LIST, TEXT, TEXT_OR_LIST, Hint, only
from server.api.generation import Asked, answer
from server.api.logprobs import LogprobWords
from server.api.models import longest_sequence
from server.api.reading import read
from server.api.requests import NotWorded
from server.api.shape import check_completion, check_fields
from server.api.tokens import TemplateFields
from server.app_keys import CONFIG, ENGINE, LIMITS
from server.http.errors import ApiError
from server.http.json import Answer, json_response
from server.http.protocol import refuse_expectations
from server.http.record import RequestRecord
from server.http.sse import EventStream, UnmarkedEvents

Json = dict[str, Any]

PROMPT = "a string, a list of token ids and strings, or a list of such prompts"


class LlamaCompletionRequest(NotWorded, CompletionRequest):
    best_of: Annotated[int | None, only(1)] = None
    prompt: Annotated[Any, TEXT_OR_LIST]
    """What to continue: a text, tokens, or both in a list; or several such."""
    logprobs: Annotated[int, Field(ge=0)] | None = None
    """`n_probs`: with the log-probabilities of so many likeliest tokens in the place of each."""
    return_tokens: bool = False
    """With the numbers of the answer's tokens."""
    cache_prompt: Hint[bool] = True
    id_slot: Hint[int] = -1
    n_keep: Hint[int] = 0
    samplers: Hint[Any] = None
    post_sampling_probs: Hint[bool] = False
    timings_per_token: Hint[bool] = False

    @classmethod
    def _translated(cls, values: Json) -> Json:
        if (count := values.pop("n_probs", None)) is not None and count != 0:
            values["logprobs"] = count
        return {"max_tokens": -1} | super()._translated(values)


class InfillRequest(LlamaCompletionRequest):
    """The text between two."""

    prompt: Annotated[str, TEXT] = ""
    """What the answer goes on with."""
    input_prefix: Annotated[str, TEXT]
    """What comes before it."""
    input_suffix: Annotated[str, TEXT]
    """What comes after it."""
    input_extra: Annotated[Hint[Any], LIST] = None


class ApplyTemplateRequest(TemplateFields):
    messages: Annotated[list[Message], LIST, Field(min_length=1, fail_fast=True)]
    """The conversation so far."""


class Timings(msgspec.Struct, frozen=True):
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float

    @classmethod
    def of(cls, usage: Usage, prompt: float, predicted: float) -> Timings:
        """Of so many seconds until the first token, and after it."""
        num_computed = usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens
        return cls(*_rates(num_computed, prompt), *_rates(usage.completion_tokens, predicted))


def _rates(count: int, seconds: float) -> tuple[int, float, float, float]:
    return count, 1000 * seconds, 1000 * seconds / max(1, count), count / max(1e-9, seconds)


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """An event of an answer, or all of it."""

    index: int
    content: str
    tokens: list[int]
    stop: bool = False
    id_slot: int = -1
    tokens_predicted: int
    tokens_evaluated: int
    completion_probabilities: list[msgspec.Raw] | UnsetType = UNSET
    model: str | UnsetType = UNSET
    stop_type: str | UnsetType = UNSET
    stopping_word: str | UnsetType = UNSET
    tokens_cached: int | UnsetType = UNSET
    truncated: bool | UnsetType = UNSET
    generation_settings: Json | UnsetType = UNSET
    prompt: str | UnsetType = UNSET
    timings: Timings | UnsetType = UNSET


class _Choice:
    def __init__(self, prompt: Prompt) -> None:
        self.num_prompt_tokens = len(prompt.token_ids)
        self.num_tokens = 0
        self.content: list[str] = []
        self.tokens: list[int] = []
        self.probabilities: list[msgspec.Raw] = []
        self.last: Delta | None = None

    def take(self, delta: Delta, probabilities: list[msgspec.Raw]) -> None:
        self.content.append(delta.text)
        self.tokens += delta.token_ids
        self.num_tokens += len(delta.token_ids)
        self.probabilities += probabilities
        self.last = delta

    def pop(self) -> tuple[str, list[int], list[msgspec.Raw]]:
        """What it has said since the last time."""
        said = "".join(self.content), self.tokens, self.probabilities
        self.content, self.tokens, self.probabilities = [], [], []
        return said


class LlamaWording:
    """Words the answers of /completion and /infill."""

    stream: ClassVar[type[EventStream]] = UnmarkedEvents

    def __init__(
        self,
        tokenizer: Tokenizer,
        body: LlamaCompletionRequest,
        record: RequestRecord,
        model: str,
        prompts: Sequence[Prompt],
        num_sequences: int,
    ) -> None:
        self.id = f"llama-{uuid.uuid4().hex}"
        self._model = model
        self._body = body
        self._record = record
        self._words = None if body.logprobs is None else LogprobWords(tokenizer, as_ids=False)
        self._choices = [_Choice(prompt) for prompt in prompts for _ in range(num_sequences)]
        self._several = len(self._choices) > 1

    def opening(self) -> Sequence[msgspec.Struct]:
        return ()

    def chunk(self, choice: int, delta: Delta, usage: object) -> Sequence[Piece]:
        self.take(choice, delta)
        return [self._piece(choice)] if delta.text or self._choices[choice].probabilities else ()

    def closing(self, usage: Usage) -> Sequence[Piece]:
        return [self._last(choice, usage) for choice in range(len(self._choices))]

    def failure(self, error: ApiError) -> msgspec.Struct:
        return error.body

    def take(self, choice: int, delta: Delta) -> None:
        words = [] if self._words is None else self._words.of_chat(delta.result.logprobs)
        self._choices[choice].take(delta, words)

    def whole(self, usage: Usage) -> Answer:
        pieces = [self._last(choice, usage) for choice in range(len(self._choices))]
        return pieces if self._several else pieces[0]

    def _piece(self, choice: int) -> Piece:
        each = self._choices[choice]
        content, tokens, probabilities = each.pop()
        return Piece(
            index=choice,
            content=content,
            tokens=tokens if self._body.return_tokens or self._body.stream else [],
            tokens_predicted=each.num_tokens,
            tokens_evaluated=each.num_prompt_tokens,
            completion_probabilities=probabilities or UNSET,
        )

    def _last(self, choice: int, usage: Usage) -> Piece:
        last = self._choices[choice].last
        assert last is not None
        stop = last.output.stop_reason
        word = stop if isinstance(stop, str) else ""
        return msgspec.structs.replace(
            self._piece(choice),
            stop=True,
            model=self._model,
            stop_type="limit" if last.finish_reason is FinishReason.LENGTH else "word" if word else "eos",
            stopping_word=word,
            tokens_cached=usage.prompt_tokens_details.cached_tokens,
            truncated=False,
            generation_settings={},
            prompt="",
            timings=Timings.of(usage, *self._record.seconds),
        )


def add_routes(router: web.UrlDispatcher, root: str) -> None:
    posts = {"completion": complete, "infill": infill, "apply-template": apply_template}
    for path, handler in posts.items():
        router.add_post(f"{root}/{path}", handler, expect_handler=refuse_expectations)
    router.add_get(f"{root}/props", get_props)


async def complete(request: web.Request) -> web.StreamResponse:
    return await answer(request, understand_completion, prompt_field="prompt")


def understand_completion(app: web.Application, record: RequestRecord, content: bytes) -> Asked:
    """Raises whatever is wrong with the request. May be called in a thread."""
    return _understood(app, record, content, LlamaCompletionRequest)


async def infill(request: web.Request) -> web.StreamResponse:
    return await answer(request, understand_infill, prompt_field="input_prefix")


def understand_infill(app: web.Application, record: RequestRecord, content: bytes) -> Asked:
    """Raises whatever is wrong with the request. May be called in a thread."""
    return _understood(app, record, content, InfillRequest)


def _understood(
    app: web.Application, record: RequestRecord, content: bytes, model: type[LlamaCompletionRequest]
) -> Asked:
    tokenizer, longest = app[ENGINE].tokenizer, longest_sequence(app[ENGINE].info)
    check_completion(content, model, longest=longest, max_tokens=app[LIMITS].max_queued_tokens)
    body = read(app, record, content, model)

    def tokens(prompt: Any, *, special: bool) -> list[int]:
        """Of texts and tokens, one after the other."""
        parts = prompt if isinstance(prompt, list) else [prompt]
        found: list[int] = []
        for place, part in enumerate(parts):
            if isinstance(part, str):
                found += tokenizer.encode(part, special and place == 0, longest=longest)
            elif _is_token(part):
                found.append(part)
            else:
                raise InvalidRequestError(f"prompt should be {PROMPT}", "prompt")
        return found

    if isinstance(body, InfillRequest):
        between = tokenizer.fill_in_the_middle(body.input_prefix, body.input_suffix, longest=longest)
        prompts = [[*between, *tokens(body.prompt, special=False)]]
    else:
        is_one = not isinstance(body.prompt, list) or any(map(_is_token, body.prompt))
        prompts = [tokens(prompt, special=True) for prompt in ([body.prompt] if is_one else body.prompt)]
    body = body.model_copy(update={"prompt": prompts})
    return completion_of(app, body, partial(LlamaWording, tokenizer, body, record))


def _is_token(part: Any) -> bool:
    """Whether it is a number, and none of the booleans, which are numbers in Python."""
    return type(part) is int and 0 <= part < 2**31


async def apply_template(request: web.Request) -> web.Response:
    return await counted(request, _apply_template)


class Worded(msgspec.Struct, frozen=True):
    prompt: str


def _apply_template(app: web.Application, record: RequestRecord, content: bytes) -> Worded:
    tokenizer, longest = app[ENGINE].tokenizer, longest_sequence(app[ENGINE].info)
    check_fields(content, ApplyTemplateRequest, longest)
    body = read(app, record, content, ApplyTemplateRequest)
    token_ids = body.tokens(tokenizer, body.messages, longest=longest)
    return Worded(tokenizer.decode(token_ids, skip_special_tokens=False))


class Modalities(msgspec.Struct, frozen=True):
    vision: bool = False
    audio: bool = False


class Props(msgspec.Struct, frozen=True):
    default_generation_settings: Json
    total_slots: int
    model_alias: str
    model_path: str
    chat_template: str
    build_info: str
    modalities: Modalities = Modalities()
    is_sleeping: bool = False


async def get_props(request: web.Request) -> web.Response:
    info, config = request.app[ENGINE].info, request.app[CONFIG]
    settings = {"n_ctx": info.max_model_len, "params": info.sampling_defaults}
    template = request.app[ENGINE].tokenizer.chat_template.source
    build = f"carousel {version('carousel-llm')}"
    return json_response(Props(settings, info.num_seats, config.model_name, config.model, template, build))
