"""The client's side of a request: what is submitted, and how the engine's outputs become text."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TypedDict, Unpack

import msgspec

from scheduler.core.request import FinishReason, InvalidRequestError, Request
from scheduler.core.step import ChunkResult
from scheduler.fitting import check_fits, longest_of
from scheduler.sampling_params import SamplingParams
from scheduler.text.detokenizer import IncrementalDetokenizer, decoder_for
from scheduler.text.tokenizer import Tokenizer
from scheduler.wire.messages import EngineInfo, Progress, SequenceOutput


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to one sequence: what the engine says of it, and its text."""

    output: SequenceOutput
    """As the engine has it, or where a stop string ended the sequence, up to there and with that as the reason."""
    text: str = ""
    """May be empty: half a character, or what may become a stop string, is held back."""
    num_charged: int | None = None
    """Tokens of the answer that it counts for, where that is not those in it: what a search has computed before it
    knows its answer."""

    @property
    def index(self) -> int:
        """Which of the request's n sequences."""
        return self.output.index

    @property
    def result(self) -> ChunkResult:
        """Tokens with what was asked of them, and what the prompt's next tokens gave."""
        return self.output.result

    @property
    def token_ids(self) -> list[int]:
        return self.output.result.token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        """Set on a sequence's last delta."""
        return self.output.finish_reason

    @property
    def is_empty(self) -> bool:
        """Whether it says nothing but how far the prompt has been computed."""
        output = self.output
        has_ended = output.finish_reason is not None
        return not (has_ended or self.text or output.result.tells_client or output.part is not None)


class Ownership(TypedDict, total=False):
    """Whose a request is and how it is to be treated; `Request` explains each."""

    user: str
    weight: float
    max_running: int | None
    priority: int
    deadline: float | None
    cache_salt: str
    prediction: list[int]


def with_phrases(params: SamplingParams, tokenizer: Tokenizer) -> SamplingParams:
    """With bad words as tokens."""
    words = [word for word in params.bad_words if isinstance(word, str)]
    if not words:
        return params
    phrases = [word for word in params.bad_words if not isinstance(word, str)]
    return msgspec.structs.replace(params, bad_words=(*phrases, *tokenizer.phrases(words)))


def make_request(
    request_id: str,
    prompt_token_ids: list[int],
    params: SamplingParams,
    info: EngineInfo,
    tokenizer: Tokenizer,
    **ownership: Unpack[Ownership],
) -> Request:
    """A request that the engine described by `info` can serve. What the client left open becomes a number: the
    longest answer that fits, a random seed, the tokens of bad words. An answer that may be longer than what fits
    is cut to that. Raises `InvalidRequestError` if the prompt leaves no token to it."""
    if params.pooling is None and not info.has_head:
        raise InvalidRequestError("this model was saved without a head: it makes embeddings, and no text", "model")
    context_shift = info.context_shift if params.context_shift is None else params.context_shift
    if context_shift and info.shift_obstacle:
        raise InvalidRequestError(f"the context cannot be shifted: {info.shift_obstacle}", "context_shift")
    lengths = {
        "max_model_len": info.max_model_len,
        "pool_tokens": info.num_blocks * info.block_size,
        "shifted_len": info.shifted_len,
    }
    longest = longest_of(len(prompt_token_ids), context_shift=context_shift, **lengths)
    left = max(1, longest - len(prompt_token_ids))
    changes: dict[str, int] = {"context_shift": context_shift}
    changes["max_tokens"] = left if params.max_tokens is None else min(params.max_tokens, left)
    if params.seed is None:
        changes["seed"] = secrets.randbits(63)
    request = Request(
        request_id=request_id,
        prompt_token_ids=prompt_token_ids,
        params=msgspec.structs.replace(with_phrases(params, tokenizer), **changes),
        **ownership,
    )
    check_fits(request, vocab_size=info.vocab_size, **lengths)
    _check_readable(request)
    return request


_encoder, _decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Request)


def _check_readable(request: Request) -> None:
    """Raise `InvalidRequestError` for what the engine's process could not read, as a token that is no number: each
    engine in turn would end of it."""
    try:
        _decoder.decode(_encoder.encode(request))
    except (msgspec.MsgspecError, TypeError, OverflowError) as error:
        raise InvalidRequestError(f"the request cannot be read: {error}", "prompt") from error


class RequestStream:
    """Turns the engine's outputs for one request into deltas, until all its sequences have ended."""

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self.request = request
        params = request.params
        decoder = decoder_for(
            tokenizer,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between=params.spaces_between_special_tokens,
        )
        self._detokenizers = [
            IncrementalDetokenizer(
                decoder,
                params.stop,
                prompt=request.prompt_token_ids,
                include_stop=params.include_stop_str_in_output,
            )
            for _ in range(params.n)
        ]
        self._num_tokens = [0] * params.n
        self._open = {index: Progress(index, [], 0, 0) for index in range(params.n)}
        """The sequences that have not ended, and how far each has come."""

    @property
    def finished(self) -> bool:
        return not self._open

    @property
    def progress(self) -> list[Progress]:
        """What another engine has to know to go on with the sequences that have not ended."""
        return list(self._open.values())

    def push(self, output: SequenceOutput) -> Delta | None:
        """Take one output. None: its sequence has ended already, the engine just did not know yet.

        A delta that ends with a stop string carries its finish reason before the engine has it: the caller is to
        abort that sequence.
        """
        progress = self._open.get(output.index)
        if progress is None:
            return None
        progress.token_ids.extend(output.token_ids)
        self._open[output.index] = msgspec.structs.replace(
            progress, num_computed=output.num_computed, num_cached_tokens=output.num_cached_tokens
        )
        text, num_tokens = self._read(output)
        stop_string = self._detokenizers[output.index].stop_reason
        if stop_string is not None:
            result = output.result.first(num_tokens)
            output = msgspec.structs.replace(
                output, result=result, finish_reason=FinishReason.STOP, stop_reason=stop_string
            )
        if output.finish_reason is not None:
            del self._open[output.index]
        return Delta(output, text)

    def _read(self, output: SequenceOutput) -> tuple[str, int]:
        """The output's text, and how many of its tokens there are up to a stop string: it may come in the middle
        of what one step gave."""
        detokenizer = self._detokenizers[output.index]
        params = self.request.params
        token_ids = output.token_ids
        if output.finish_reason is FinishReason.STOP and not params.include_stop_str_in_output:
            token_ids = token_ids[:-1]  # the one that ended it is no part of the text
        text = ""
        for count, token_id in enumerate(token_ids[:-1], 1):
            self._num_tokens[output.index] += 1
            matches = self._num_tokens[output.index] >= params.min_tokens
            text += detokenizer.push([token_id], last=False, match_stop=matches)
            if detokenizer.stop_reason is not None:
                return text, count
        self._num_tokens[output.index] += len(output.token_ids) - max(0, len(token_ids) - 1)
        text += detokenizer.push(
            token_ids[-1:],
            last=output.finish_reason is not None,
            match_stop=self._num_tokens[output.index] >= params.min_tokens,
        )
        return text, len(output.token_ids)
