"""What every request for text has: how to choose its tokens, when to stop, and how to word it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from scheduler.client.beam_search import BeamOptions, check_beams
from scheduler.core.request import InvalidRequestError
from scheduler.sampling_params import MODEL_DEFAULTS, SamplingParams
from server.api.explanation import NUM_LIKELIEST
from server.api.fields import (
    MAX_BAD_WORDS,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    Body,
    CheckedBody,
    Count,
    Hint,
    Length,
    ShortText,
    TokenIds,
    described,
    only,
)
from server.api.structured import StructuredFields
from server.api.synonyms import sampling_in_our_words, sampling_synonyms


def _token_keys(biases: Any) -> Any:
    """JSON has no numbers for keys."""
    if not isinstance(biases, dict):
        return biases
    return {int(key) if isinstance(key, str) and key.isdecimal() else key: biases[key] for key in biases}


def _count(count: int | None, field: str, most: int) -> int | None:
    """How many logprobs a request gets. Raises `InvalidRequestError`."""
    if count == -1:
        return most
    if count is not None and count > most:
        raise InvalidRequestError(
            f"{field} must be between 0 and {most}, or -1 for as many, got {count} (--max-logprobs)", field
        )
    return count


class StreamOptions(CheckedBody):
    include_usage: bool = False
    """One more event at the end, with the usage."""
    continuous_usage_stats: bool = False
    """The usage so far with each event."""
    include_obfuscation: Annotated[bool, only(False)] = False


class ServedRequest(CheckedBody):
    """What every request has that the engine serves."""

    model: str | None = None
    """By default, and where the name is none at /v1/models, the model that is served (`--unknown-models`)."""

    # Beyond OpenAI's API, named as in other servers.
    add_special_tokens: bool | None = None
    """Put the tokenizer's own tokens around the prompt; by default everywhere but around a chat's, whose template
    has put them in."""
    cache_salt: str = ""
    """Prompts share what is cached only with those that have the same."""
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    """Among the user's own class: lower goes earlier."""
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Seconds from the request's arrival to the end of its answer."""
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    """Keep so many of the prompt's tokens; -1: as many as fit."""
    truncation_side: Literal["left", "right"] = "left"
    """From which end the others are taken."""

    # These change nothing in the answer.
    request_id: Hint[str] = ""
    user: Hint[str] = ""

    # Not implemented.
    mm_processor_kwargs: Annotated[Any, only({})] = {}

    @property
    def streaming(self) -> StreamOptions | None:
        """How the answer is to be streamed; None: it comes in one piece."""
        return None


class SampledRequest(ServedRequest, StructuredFields):
    """How the tokens of an answer are chosen, and when it ends: by the same names at every endpoint that
    generates."""

    synonyms: ClassVar[dict[str, str]] = sampling_synonyms("max_tokens")

    stream: bool = False
    """Send the answer as it comes, as server-sent events."""
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Annotated[
        ShortText | Annotated[list[ShortText], Field(max_length=MAX_STOPS)],
        described(
            f"a string or a list of at most {MAX_STOPS} strings, of at most {MAX_STOP_CHARACTERS} characters each"
        ),
    ] = []
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Annotated[
        dict[Count, float], BeforeValidator(_token_keys), described("an object of token ids and numbers")
    ] = {}

    # Beyond OpenAI's API, named as in other servers.
    allowed_token_ids: TokenIds = []
    bad_words: Annotated[list[ShortText], Field(max_length=MAX_BAD_WORDS)] = []
    context_shift: bool | None = None
    """When the model's window is full, go on without the oldest tokens but the first."""
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    min_p: float = 0.0
    min_tokens: Count = 0
    repetition_penalty: float = 1.0
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    stop_token_ids: TokenIds = []
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = 0

    # Not implemented.
    dry_multiplier: Annotated[Any, only(0)] = 0
    dynatemp_range: Annotated[Any, only(0)] = 0
    mirostat: Annotated[Any, only(0)] = 0
    mirostat_mode: Annotated[Any, only(0)] = 0
    tfs: Annotated[Any, only(1)] = 1
    tfs_z: Annotated[Any, only(1)] = 1
    top_a: Annotated[Any, only(0)] = 0
    top_n_sigma: Annotated[Any, only(-1, 0)] = 0
    typical_p: Annotated[Any, only(1)] = 1
    xtc_probability: Annotated[Any, only(0)] = 0

    @classmethod
    def _translated(cls, values: dict[str, Any]) -> dict[str, Any]:
        return sampling_in_our_words(values, cls.model_fields, "max_tokens")

    @property
    def streaming(self) -> StreamOptions | None:
        return StreamOptions() if self.stream else None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def can_be_held(self) -> bool:
        """Whether its tokens may be held to a grammar that nobody asked for."""
        return not self.allowed_token_ids

    def sampling_params(self, defaults: Mapping[str, float], max_logprobs: int) -> SamplingParams:
        """`defaults` are the model's own. Raises `InvalidRequestError` for what the fields, each right by itself,
        do not make together."""
        return self._sampling_params(defaults, max_logprobs, max_tokens=None)

    def _sampling_params(
        self,
        defaults: Mapping[str, float],
        max_logprobs: int,
        *,
        max_tokens: int | None,
        logprobs: int | None = None,
        field: str = "logprobs",
        **more: Any,
    ) -> SamplingParams:
        """`field`: what says how many `logprobs`; `more`: what only some requests have."""
        chosen = {
            name: getattr(self, name) if name in self.model_fields_set else defaults.get(name, getattr(self, name))
            for name in MODEL_DEFAULTS
        }
        form = self.form()
        chosen["top_k"] = max(0, int(chosen["top_k"]))  # -1 turns it off in other servers
        return SamplingParams(
            max_tokens=None if max_tokens == -1 else max_tokens,
            min_tokens=self.min_tokens,
            seed=self.seed,
            stop=self.stops,
            stop_token_ids=frozenset(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=_count(logprobs, field, max_logprobs),
            context_shift=self.context_shift,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            bad_words=tuple(self.bad_words),
            allowed_token_ids=frozenset(self.allowed_token_ids),
            grammar=form and form.grammar,
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            spaces_between_special_tokens=self.spaces_between_special_tokens,
            **chosen,
            **more,
        )


class GenerationRequest(SampledRequest):
    """What the endpoints share whose answers are text."""

    n: Count = 1
    """How many answers there are to each prompt."""
    stream_options: StreamOptions | None = None
    """What a stream says besides."""

    # Beyond OpenAI's API, named as in other servers.
    explain: bool = False
    """With each choice, what happened at each step (`ExplainedStep`)."""
    prompt_logprobs: Length | None = None
    """With the log-probabilities of the prompt's tokens, and of so many likeliest ones in their places; -1 is as
    many as the server allows (`--max-logprobs`)."""
    return_token_ids: bool = False
    """With the numbers of the tokens of prompt and answer."""
    return_tokens_as_token_ids: bool = False
    """Logprobs name tokens by their numbers, as token_id:5."""
    use_beam_search: bool = False
    """Search for the likeliest answers as wholes, with `n` beams; temperature and truncation do not count."""
    early_stopping: bool = False
    """Of a beam search: end with `n` answers, whatever the others may still become."""
    length_penalty: Annotated[float, Field(allow_inf_nan=False, ge=-10, le=10)] = 1.0
    """Of a beam search: above 0 prefers longer answers."""

    # These change nothing in the answer.
    metadata: Hint[dict[str, Any]] = {}
    prompt_cache_key: Hint[str] = ""
    prompt_cache_options: Hint[dict[str, Any]] = {}
    prompt_cache_retention: Hint[str] = ""
    safety_identifier: Hint[str] = ""
    service_tier: Hint[str] = ""

    # Not implemented.
    kv_transfer_params: Annotated[Any, only({})] = {}
    logits_processors: Annotated[Any, only([])] = []
    vllm_xargs: Annotated[Any, only({})] = {}

    @property
    def streaming(self) -> StreamOptions | None:
        return (self.stream_options or StreamOptions()) if self.stream else None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def beams(self, params: SamplingParams) -> BeamOptions | None:
        """If a beam search is asked for. Raises `InvalidRequestError` for what it does not go with."""
        if not self.use_beam_search:
            for field in ("early_stopping", "length_penalty"):
                if getattr(self, field) != type(self).model_fields[field].default:
                    raise InvalidRequestError(f"{field} is for use_beam_search: true only", field)
            return None
        if self.stream:
            raise InvalidRequestError("a beam search cannot be streamed: the best are known at the end", "stream")
        if self.explain:
            raise InvalidRequestError("the steps of a beam search are not explained", "explain")
        check_beams(params)
        return BeamOptions(self.length_penalty, self.early_stopping)

    def _sampling_params(
        self,
        defaults: Mapping[str, float],
        max_logprobs: int,
        *,
        max_tokens: int | None,
        logprobs: int | None = None,
        field: str = "logprobs",
        prompt_logprobs: int | None = None,
        **more: Any,
    ) -> SamplingParams:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options are for stream: true only", "stream_options")
        prompt_field = "prompt_logprobs" if prompt_logprobs is None else field
        scored = self.prompt_logprobs if prompt_logprobs is None else prompt_logprobs
        return super()._sampling_params(
            defaults,
            max_logprobs,
            max_tokens=max_tokens,
            logprobs=NUM_LIKELIEST if self.explain and logprobs is None else logprobs,
            field=field,
            prompt_logprobs=_count(scored, prompt_field, max_logprobs),
            explain=self.explain,
            **{"n": self.n} | more,
        )


class NotWorded(Body):
    """What OpenAI's wordings say besides the answer, for dialects that have no words for it. It comes before the
    request that it is part of, whose fields these are."""

    echo: Annotated[bool, only(False)] = False
    explain: Annotated[bool, only(False)] = False
    prompt_logprobs: Annotated[Length | None, only()] = None
    return_token_ids: Annotated[bool, only(False)] = False
    return_tokens_as_token_ids: Annotated[bool, only(False)] = False
    stream_options: Annotated[StreamOptions | None, only()] = None
