"""What the two endpoints accept.

Null means "not given", as in OpenAI's API. A parameter of OpenAI's that Carousel does not implement is
accepted where it asks for nothing and refused where it would change the answer: none is silently ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from scheduler.sampling_params import InvalidRequestError, SamplingParams

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_SEQUENCES = 2048
"""Prompts times `n` in one request."""
CONTENT = "a string or a list of text parts"
PROMPTS = "a string, a list of strings, a list of token ids, or a list of lists of token ids"


def _described(expected: str) -> WrapValidator:
    """One sentence about a union, in place of one for each of its members."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("union", "should be {expected}", {"expected": expected}) from None

    return WrapValidator(validate)


def _only(*neutral: Any) -> AfterValidator:
    """For a parameter that is not implemented: refuse every value that asks for something."""

    def validate(value: Any) -> Any:
        if value not in neutral:
            raise PydanticCustomError("not_implemented", "is not implemented by Carousel")
        return value

    return AfterValidator(validate)


def _one_in_list(prompt: Any) -> Any:
    """A single prompt, text or tokens, becomes a list of one."""
    single = isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], int))
    return [prompt] if single else prompt


Count = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[Count], Field(fail_fast=True)]
Stop = Annotated[str, Field(max_length=MAX_STOP_CHARACTERS)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: Annotated[bool, _only(False)] = False


class GenerationRequest(_Body):
    """What both endpoints share."""

    model: str | None = None
    n: Count = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Annotated[
        Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)],
        _described(
            f"a string or a list of at most {MAX_STOPS} strings, of at most {MAX_STOP_CHARACTERS} characters each"
        ),
    ] = []
    stream: bool = False
    stream_options: StreamOptions | None = None

    # Beyond OpenAI's API, named as in other servers.
    cache_salt: str = ""
    ignore_eos: bool = False
    min_p: float = 0.0
    min_tokens: Count = 0
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    """Among the user's own class: lower goes earlier."""
    stop_token_ids: TokenIds = []
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Seconds from the request's arrival to the end of its answer."""
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = 0

    # These change nothing in the answer.
    metadata: dict[str, Any] = {}
    prompt_cache_key: str = ""
    prompt_cache_options: dict[str, Any] = {}
    prompt_cache_retention: str = ""
    safety_identifier: str = ""
    service_tier: Annotated[str, _only("auto", "default")] = "auto"
    user: str = ""

    # Not implemented.
    frequency_penalty: Annotated[Any, _only(0)] = 0
    logit_bias: Annotated[Any, _only({})] = {}
    presence_penalty: Annotated[Any, _only(0)] = 0
    repetition_penalty: Annotated[Any, _only(1)] = 1

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def _sampling_params(self, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options are for stream: true only", "stream_options")
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_k=max(0, self.top_k),  # -1 turns it off in other servers
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            stop_token_ids=frozenset(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            n=self.n,
        )


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    prompt: Annotated[
        Annotated[list[str], Field(fail_fast=True)] | Annotated[list[TokenIds], Field(fail_fast=True)],
        BeforeValidator(_one_in_list),
        _described(PROMPTS),
    ]
    """One item for each prompt: its text or its tokens."""
    echo: bool = False
    logprobs: Count | None = None
    max_tokens: Count = 16

    # Not implemented.
    best_of: int | None = None
    suffix: Annotated[Any, _only("")] = ""

    def sampling_params(self) -> SamplingParams:
        """Raises `InvalidRequestError` for what the fields, each right by itself, do not make together."""
        if not self.prompt:
            raise InvalidRequestError("prompt is empty", "prompt")
        if len(self.prompt) * self.n > MAX_SEQUENCES:
            raise InvalidRequestError(
                f"{len(self.prompt)} prompts times n = {self.n} is more than {MAX_SEQUENCES}", "prompt"
            )
        if self.best_of not in (None, self.n):
            raise InvalidRequestError("best_of other than n is not implemented by Carousel", "best_of")
        if self.echo and self.logprobs is not None:
            raise InvalidRequestError("logprobs together with echo are not implemented by Carousel", "logprobs")
        return self._sampling_params(max_tokens=self.max_tokens, logprobs=self.logprobs)


class TextPart(_Body):
    type: Literal["text"]
    text: str


class Message(_Body):
    """One turn of a conversation. An assistant's turn may be sent back just as it was received."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | list[TextPart], _described(CONTENT)]
    name: str | None = None

    # Not implemented.
    annotations: Annotated[Any, _only([])] = []
    audio: Annotated[Any, _only()] = None
    function_call: Annotated[Any, _only()] = None
    refusal: Annotated[Any, _only("")] = ""
    tool_calls: Annotated[Any, _only([])] = []

    def for_template(self) -> dict[str, str]:
        """As chat templates know it: text in one piece, and `developer` by its older name."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        message = {"role": "system" if self.role == "developer" else self.role, "content": content}
        return message | ({"name": self.name} if self.name is not None else {})


class ChatRequest(GenerationRequest):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    logprobs: bool = False
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_tokens: Count | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    # These matter only together with something that is not implemented.
    parallel_tool_calls: bool = True
    store: Annotated[Any, _only(False)] = False
    tool_choice: Annotated[Any, _only("none", "auto")] = "none"

    # Not implemented.
    audio: Annotated[Any, _only()] = None
    function_call: Annotated[Any, _only("none", "auto")] = "none"
    functions: Annotated[Any, _only([])] = []
    modalities: Annotated[Any, _only(["text"])] = ["text"]
    moderation: Annotated[Any, _only()] = None
    prediction: Annotated[Any, _only()] = None
    reasoning_effort: Annotated[Any, _only("none")] = "none"
    response_format: Annotated[Any, _only({"type": "text"})] = {"type": "text"}
    tools: Annotated[Any, _only([])] = []
    verbosity: Annotated[Any, _only("medium")] = "medium"
    web_search_options: Annotated[Any, _only()] = None

    def sampling_params(self) -> SamplingParams:
        """Raises `InvalidRequestError` for what the fields, each right by itself, do not make together."""
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs: true", "top_logprobs")
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        if self.max_tokens not in (None, max_tokens):
            raise InvalidRequestError(
                "max_tokens is the older name of max_completion_tokens: give one of them", "max_tokens"
            )
        return self._sampling_params(
            max_tokens=max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )
