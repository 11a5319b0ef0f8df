"""Beam search over an engine: the likeliest answers as wholes, rather than token by token.

Each beam's next token is a request of its own, whose prompt is what the beam has so far: what beams share is in
the prefix cache, so that they share its blocks. Scores and ends are those of transformers' generate: the sum of
the log-probabilities over the length to the power of the length penalty (after Wu et al., arXiv 1609.08144).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import NamedTuple, Unpack

import msgspec

from scheduler.client.async_engine import AsyncEngine
from scheduler.client.in_flight import Computed
from scheduler.client.stream import Delta, Ownership, make_request
from scheduler.core.request import FinishReason, InvalidRequestError
from scheduler.core.step import ChunkResult, SampledToken
from scheduler.sampling_params import SamplingParams
from scheduler.text.detokenizer import IncrementalDetokenizer, decoder_for
from scheduler.text.tokenizer import Tokenizer
from scheduler.wire.messages import SequenceOutput

NUM_CANDIDATES = 20
"""Of each beam, that are looked at."""

MAX_BEAMS = NUM_CANDIDATES // 2
"""Half of the candidates may end."""


@dataclass(frozen=True, slots=True)
class BeamOptions:
    length_penalty: float = 1.0
    """Above 0 prefers longer answers."""
    early_stopping: bool = False
    """End with as many answers as are wanted, whatever the others may still become."""


class Beam(NamedTuple):
    tokens: tuple[int, ...]
    log_total: float
    has_ended: bool = False


Candidates = Sequence[tuple[int, float]]
"""Tokens and their log-probabilities, likeliest first."""


class BeamSearch:
    """The beams of one prompt. `ends` are the tokens that end an answer."""

    def __init__(self, width: int, max_tokens: int, ends: frozenset[int], options: BeamOptions) -> None:
        self.live = [Beam((), 0.0)]
        """Likeliest first."""
        self._ended: list[Beam] = []
        self._width = width
        self._max_tokens = max_tokens
        self._ends = ends
        self._options = options

    def advance(self, candidates: Sequence[Candidates]) -> None:
        """Every live beam by a token: what may follow each."""
        extended = [
            Beam((*beam.tokens, token), beam.log_total + logprob, token in self._ends)
            for beam, following in zip(self.live, candidates, strict=True)
            for token, logprob in following
        ]
        extended.sort(key=lambda beam: -beam.log_total)
        ended = [beam for beam in extended[: self._width] if beam.has_ended]
        self._ended = self._best([*self._ended, *ended])
        self.live = [beam for beam in extended if not beam.has_ended][: self._width]

    @property
    def is_done(self) -> bool:
        if not self.live or len(self.live[0].tokens) == self._max_tokens:
            return True
        if len(self._ended) < self._width:
            return False
        return self._options.early_stopping or self._score(self._ended[-1]) >= self._score(self.live[0])

    @property
    def best(self) -> list[Beam]:
        """The answers, best first. What has not ended counts where it must not go on."""
        must_end = bool(self.live) and len(self.live[0].tokens) == self._max_tokens
        is_whole = len(self._ended) == self._width and not must_end
        return self._ended if is_whole else self._best([*self._ended, *self.live])

    def _best(self, beams: list[Beam]) -> list[Beam]:
        return sorted(beams, key=self._score, reverse=True)[: self._width]

    def _score(self, beam: Beam) -> float:
        score: float = beam.log_total / len(beam.tokens) ** self._options.length_penalty
        return score


async def search_beams(
    engine: AsyncEngine,
    prompt_token_ids: list[int],
    params: SamplingParams,
    *,
    options: BeamOptions,
    request_id: str,
    computed: Computed = lambda num_tokens: None,
    **ownership: Unpack[Ownership],
) -> AsyncGenerator[Delta, None]:
    """Yield the `params.n` best answers as one delta each, and before them an empty one for every token that all
    beams got: those count as they are computed, and at the end it is the answers' tokens that do. `computed` and
    what is raised are as in `AsyncEngine.generate`."""
    check_beams(params)
    params = msgspec.structs.replace(params, context_shift=False)  # each token is a prompt, which has to fit
    whole = make_request(request_id, prompt_token_ids, params, engine.info, engine.tokenizer).params
    assert whole.max_tokens is not None
    ends = params.stop_token_ids | frozenset(() if params.ignore_eos else engine.info.eos_token_ids)
    search = BeamSearch(params.n, whole.max_tokens, ends, options)
    one = SamplingParams(
        max_tokens=1, temperature=0, logprobs=NUM_CANDIDATES, ignore_eos=True, seed=0, context_shift=False
    )
    num_cached_tokens: int | None = None
    num_charged = 0

    async def following(place: int, beam: Beam) -> Delta:
        stream = engine.generate(
            [*prompt_token_ids, *beam.tokens],
            one,
            request_id=f"{request_id}-{place}",
            computed=computed,
            **ownership,
        )
        async with aclosing(stream):
            return await anext(stream)

    while not search.is_done:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(following(place, beam)) for place, beam in enumerate(search.live)]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        deltas = [task.result() for task in tasks]
        for delta in deltas:
            if delta.finish_reason is not FinishReason.LENGTH:
                yield delta  # an error, or the deadline
                return
        if num_cached_tokens is None:
            num_cached_tokens = deltas[0].output.num_cached_tokens
        num_charged += len(deltas)
        # Nothing of an answer yet, but so many tokens were computed for it.
        computed_for = SequenceOutput(request_id, 0, num_cached_tokens=num_cached_tokens)
        yield Delta(computed_for, num_charged=len(deltas))
        search.advance([delta.result.logprobs[0].top for delta in deltas])
    num_left = sum(len(beam.tokens) for beam in search.best) - num_charged
    for index, beam in enumerate(search.best):
        answer = SequenceOutput(
            request_id,
            index,
            ChunkResult([SampledToken(token) for token in beam.tokens]),
            finish_reason=FinishReason.STOP if beam.has_ended else FinishReason.LENGTH,
            stop_reason=beam.tokens[-1] if beam.tokens[-1] in params.stop_token_ids else None,
            num_cached_tokens=num_cached_tokens or 0,
        )
        text = _text_of(beam, engine.tokenizer, prompt_token_ids, params)
        yield Delta(answer, text, num_charged=num_left if index == 0 else 0)


def _text_of(beam: Beam, tokenizer: Tokenizer, prompt_token_ids: list[int], params: SamplingParams) -> str:
    decoder = decoder_for(
        tokenizer,
        skip_special_tokens=params.skip_special_tokens,
        spaces_between=params.spaces_between_special_tokens,
    )
    said = beam.tokens[:-1] if beam.has_ended else beam.tokens
    return IncrementalDetokenizer(decoder, prompt=prompt_token_ids).push(said, last=True)


def check_beams(params: SamplingParams) -> None:
    """Raise `InvalidRequestError` for what beams do not go with."""
    if params.n > MAX_BEAMS:
        raise InvalidRequestError(f"a beam search can have {MAX_BEAMS} beams at most, got {params.n}", "n")
    if params.max_tokens == 0:
        raise InvalidRequestError("a beam search needs a token at least", "max_tokens")
    if params.context_shift:
        raise InvalidRequestError("context_shift does not go with use_beam_search", "context_shift")
    plain = SamplingParams()
    for name in _PLAIN:
        if getattr(params, name) != getattr(plain, name):
            field = "response_format" if name == "grammar" else name
            raise InvalidRequestError(f"{field} does not go with use_beam_search", field)


_PLAIN = (
    "stop",
    "logprobs",
    "prompt_logprobs",
    "min_tokens",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "bad_words",
    "allowed_token_ids",
    "grammar",
)
