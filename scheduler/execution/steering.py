"""What requests change of the model's logits before a token is chosen: penalties, biases, masks.

A `Steering` is a pure function of one sequence's request and of its tokens so far, guessed ones too; what it keeps
only saves it from counting them again at every step. So an answer is the same whoever else is in the batch, and
after a preemption. The changes of a whole batch are applied in one pass over the rows that they concern.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from scheduler.core.sampling import Sampling
from scheduler.core.step import ChunkInput, StepInput
from scheduler.text.grammar import GrammarError

TokenArray = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float32]
Mask = npt.NDArray[np.uint32]
"""A bit for each token, [ceil(vocabulary / 32)]: set where it may be chosen."""


class Matcher(Protocol):
    """Follows one answer through a grammar; see text/grammar.py. All of it raises `GrammarError`."""

    def fill(self, mask: Mask) -> None:
        """Write which tokens may follow: every word of the mask."""

    def advance(self, token_ids: Sequence[int]) -> None:
        """Take tokens of the answer. Raises ValueError if one of them may not come where it does, and takes none
        then."""

    def rollback(self, count: int) -> None:
        """Take back the last tokens."""

    def forced(self) -> list[int]:
        """The tokens that have to follow."""

    @property
    def is_finished(self) -> bool:
        """Whether nothing but the end may follow."""


LogitsProcessor = Callable[[list[int], Tensor], Tensor]
"""From the tokens of prompt and answer so far, and the logits of the next one, [vocabulary], to new logits."""


class Change(NamedTuple):
    """What is done to one row of logits: penalties first, then biases, then the mask."""

    penalties: tuple[float, float, float]
    """Repetition, frequency and presence."""
    seen: TokenArray
    """Tokens of the text so far that are penalized, each once."""
    times: Numbers
    """How often the answer has each."""
    biased: TokenArray
    biases: Numbers
    mask: Mask | None
    tokens: list[int] | None
    """Prompt and answer so far, where functions look at them."""


class Counts:
    """How often the answer has each token. Room is doubled, so that one token more takes O(1)."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._tokens = np.zeros(64, dtype=np.int64)
        self._times = np.zeros(64, dtype=np.float32)

    def note(self, token: int) -> int:
        """The text has it, whether or not the answer does; returns its place."""
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)])
            self._times = np.concatenate([self._times, np.zeros_like(self._times)])
        self._tokens[place] = token
        return place

    def add(self, token: int) -> bool:
        """Once more; returns whether it was not there."""
        is_new = token not in self._places
        place = self.note(token)  # which may make room first
        self._times[place] += 1
        return is_new

    def take_back(self, token: int, *, was_new: bool) -> None:
        """Undo the last `add`."""
        place = self._places.pop(token) if was_new else self._places[token]
        self._times[place] -= 1

    @property
    def arrays(self) -> tuple[TokenArray, Numbers]:
        """Copies: tokens, and how often each."""
        count = len(self._places)
        return self._tokens[:count].copy(), self._times[:count].copy()


class Steering:
    """What one sequence's request changes. `end_tokens` are those that would end it."""

    def __init__(
        self,
        params: Sampling,
        num_prompt_tokens: int,
        *,
        vocab_size: int,
        end_tokens: Iterable[int],
        matcher: Matcher | None,
    ) -> None:
        self._params = params
        self._num_prompt_tokens = num_prompt_tokens
        self._num_known = 0
        self._vocab_size = vocab_size
        self._matcher = matcher
        self._prompt: list[int] | None = [] if params.has_processors else None
        self._answer: list[int] = []
        self._counts = Counts() if params.is_penalized else None
        self._penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        phrases = [word for word in params.bad_words if not isinstance(word, str)]
        self._phrases = [phrase for phrase in phrases if len(phrase) > 1]
        self._biases = params.logit_bias | {phrase[0]: -np.inf for phrase in phrases if len(phrase) == 1}
        self._biased = _arrays(self._biases)
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else end_tokens)}
        self._ends = [token for token in ends if token < vocab_size]
        self._allowed = mask_of(params.allowed_token_ids, vocab_size) if params.allowed_token_ids else None
        self.trouble: str | None = None
        """What the grammar's matcher last failed of."""

    def extend(self, start: int, tokens: Sequence[int]) -> None:
        """The sequence has these tokens from the place `start` on; those that are known already are skipped."""
        new = tokens[max(0, self._num_known - start) :]
        num_of_prompt = max(0, min(len(new), self._num_prompt_tokens - self._num_known))
        self._num_known += len(new)
        if self._prompt is not None:
            self._prompt += new[:num_of_prompt]
        if self._counts is not None and self._params.repetition_penalty != 1:
            for token in set(new[:num_of_prompt]):
                self._counts.note(token)
        for token in new[num_of_prompt:]:
            _, is_matched = self._append(token)
            if self._matcher is not None and not is_matched and self.trouble is None:
                raise RuntimeError(f"the grammar does not allow token {token}, which was the only one left")

    def changes(self, guessed: Sequence[int]) -> list[Change]:
        """Of the row that follows the sequence's tokens, and of those that follow each guessed one."""
        changes = [self._change()]
        added = []
        for token in guessed:
            added.append((token, *self._append(token)))
            changes.append(self._change())
        for token, is_new, is_matched in reversed(added):
            self._answer.pop()
            if self._counts is not None:
                self._counts.take_back(token, was_new=is_new)
            if self._matcher is not None and is_matched:
                self._matcher.rollback(1)
        return changes

    def forced(self, gained: Sequence[int]) -> list[int]:
        """The tokens that the grammar forces behind the sequence's tokens and those that it just gained."""
        if self._matcher is None:
            return []
        try:
            self._matcher.advance(gained)
            forced = self._matcher.forced()
            self._matcher.rollback(len(gained))
        except GrammarError:  # the next mask tells
            return []
        return forced

    def _append(self, token: int) -> tuple[bool, bool]:
        """Whether it is new to the counts, and whether the grammar took it."""
        self._answer.append(token)
        is_new = self._counts is not None and self._counts.add(token)
        if self._matcher is None:
            return is_new, False
        try:
            self._matcher.advance([token])
        except ValueError:  # a guess that is wrong: what is said of the rows after it does not matter
            return is_new, False
        except GrammarError as error:
            self.trouble = str(error)
            return is_new, False
        return is_new, True

    def _change(self) -> Change:
        seen, times = self._counts.arrays if self._counts is not None else NOTHING
        forbidden = [
            phrase[-1] for phrase in self._phrases if self._answer[1 - len(phrase) :] == list(phrase[:-1])
        ]
        mask = self._allowed
        must_end = False
        if self._matcher is not None:
            mask = np.empty(num_words(self._vocab_size), dtype=np.uint32)
            try:
                self._matcher.fill(mask)
            except GrammarError as error:  # a row from which no token can be taken, if it comes to that
                self.trouble = str(error)
                mask[:] = 0
            must_end = self._matcher.is_finished
        if len(self._answer) < self._params.min_tokens and not must_end:
            forbidden += self._ends
        biased, values = self._biased
        if forbidden:
            biased, values = _arrays(self._biases | dict.fromkeys(forbidden, -np.inf))
        tokens = None if self._prompt is None else [*self._prompt, *self._answer]
        return Change(self._penalties, seen, times, biased, values, mask, tokens)


def _arrays(biases: Mapping[int, float]) -> tuple[TokenArray, Numbers]:
    """Tokens, and what is added to their logits."""
    tokens = np.fromiter(biases.keys(), dtype=np.int64, count=len(biases))
    return tokens, np.fromiter(biases.values(), dtype=np.float32, count=len(biases))


NOTHING = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)


def num_words(vocab_size: int) -> int:
    """Of a mask."""
    return -(-vocab_size // 32)


def mask_of(tokens: Iterable[int], vocab_size: int) -> Mask:
    """The mask that allows these tokens and no others."""
    chosen = np.fromiter(tokens, dtype=np.int64)
    mask = np.zeros(num_words(vocab_size), dtype=np.uint32)
    np.bitwise_or.at(mask, chosen // 32, np.left_shift(np.uint32(1), (chosen % 32).astype(np.uint32)))
    return mask


class Steered(NamedTuple):
    """The changes of some rows, put together for one pass. Entries of row i are those from starts[i] to
    starts[i + 1]."""

    rows: TokenArray
    """[count]: which rows of the logits."""
    penalties: Numbers
    """[count, 3]."""
    seen_starts: TokenArray
    seen: TokenArray
    times: Numbers
    bias_starts: TokenArray
    biased: TokenArray
    biases: Numbers
    masks: TokenArray
    """[count]: which of `allowed`, or -1."""
    allowed: Mask
    """[masks, words]."""

    @classmethod
    def of(cls, rows: Sequence[int], changes: Sequence[Change]) -> Steered:
        allowed = [change.mask for change in changes if change.mask is not None]
        has_mask = np.array([change.mask is not None for change in changes])
        return cls(
            np.array(rows, dtype=np.int64),
            np.array([change.penalties for change in changes], dtype=np.float32),
            _starts(change.seen for change in changes),
            np.concatenate([change.seen for change in changes]),
            np.concatenate([change.times for change in changes]),
            _starts(change.biased for change in changes),
            np.concatenate([change.biased for change in changes]),
            np.concatenate([change.biases for change in changes]),
            np.where(has_mask, np.cumsum(has_mask) - 1, -1),
            np.stack(allowed) if allowed else np.zeros((0, 0), dtype=np.uint32),
        )


def _starts(entries: Iterable[TokenArray]) -> TokenArray:
    return np.cumsum([0, *(len(each) for each in entries)], dtype=np.int64)


class Processed(NamedTuple):
    """A row that a function changes, after everything else."""

    row: int
    processor: LogitsProcessor
    tokens: list[int]


class SteeredStep(NamedTuple):
    """What is done to the logits of one step."""

    rows: Steered
    processed: list[Processed]


class Grammar(Protocol):
    """See text/grammar.py."""

    def matcher(self) -> Matcher:
        """The beginning of an answer."""


class Steerings:
    """Those of all seats. A seat's is made anew when its chunk brings what came before."""

    def __init__(self, vocab_size: int, end_tokens: Iterable[int]) -> None:
        self._vocab_size = vocab_size
        self._end_tokens = frozenset(end_tokens)
        self._of_seats: dict[int, Steering] = {}
        self._grammars: dict[str, Grammar] = {}  # by request, as all that follows
        self._processors: dict[str, Sequence[LogitsProcessor]] = {}
        self._troubles: dict[str, str] = {}
        self._mask_seconds: dict[str, float] = {}
        self._forced_seconds: dict[str, float] = {}

    @staticmethod
    def has_work(step: StepInput) -> bool:
        """Whether any of its chunks is steered."""
        return any(chunk.params.is_steered for chunk in step.chunks)

    def hold(self, request_id: str, grammar: Grammar) -> None:
        """Its answer follows a grammar."""
        self._grammars[request_id] = grammar

    def process(self, request_id: str, processors: Sequence[LogitsProcessor]) -> None:
        """Functions change its logits, one after the other."""
        self._processors[request_id] = processors

    def trouble(self, request_id: str) -> str | None:
        """Why there is no mask for one of its rows, if there is none."""
        return self._troubles.get(request_id)

    @property
    def seconds(self) -> dict[str, float]:
        """By request, what one of its masks took at most in the last step, with what the grammar then forces, of
        the threads' own time. At most, because where a grammar begins to be ambiguous for the first of its
        sequences it does so for the others soon."""
        return {name: mask + self._forced_seconds.get(name, 0.0) for name, mask in self._mask_seconds.items()}

    @property
    def num_held(self) -> int:
        """Requests of which it keeps something."""
        return len({*self._grammars, *self._processors, *self._troubles})

    def steer(self, chunks: Sequence[ChunkInput]) -> SteeredStep | None:
        """Take in the chunks' tokens, and say what is to be done to the rows of which tokens are sampled, counted
        through all chunks."""
        rows: list[int] = []
        changes: list[Change] = []
        processed: list[Processed] = []
        first = 0
        self._mask_seconds, self._forced_seconds = {}, {}
        for chunk in chunks:
            if chunk.params.is_steered:
                started = time.thread_time()
                steering = self._steering(chunk)
                known = len(chunk.token_ids) - chunk.num_drafted
                steering.extend(chunk.start, chunk.token_ids[:known])
                if chunk.samples:
                    rows += range(first, first + chunk.num_sampled)
                    changes += steering.changes(chunk.token_ids[known:])
                    _note_most(self._mask_seconds, chunk, (time.thread_time() - started) / chunk.num_sampled)
                    if steering.trouble is not None:
                        self._troubles[chunk.request_id] = steering.trouble
                    for processor in self._processors.get(chunk.request_id, ()):
                        processed += [
                            Processed(row, processor, change.tokens or [])
                            for row, change in zip(
                                rows[-chunk.num_sampled :], changes[-chunk.num_sampled :], strict=True
                            )
                        ]
            first += chunk.num_sampled
        return SteeredStep(Steered.of(rows, changes), processed) if rows else None

    def forced(self, chunk: ChunkInput, gained: Sequence[int]) -> list[int]:
        """The tokens that its grammar forces behind those that a chunk gained."""
        started = time.thread_time()
        forced = self._of_seats[chunk.seat].forced(gained)
        _note_most(self._forced_seconds, chunk, (time.thread_time() - started) / len(gained))
        return forced

    def accept(self, chunk: ChunkInput, guessed: Sequence[int]) -> None:
        """So many of a chunk's guessed tokens were right: the sequence's next chunk begins behind them."""
        steering = self._of_seats[chunk.seat]
        steering.extend(chunk.start + len(chunk.token_ids) - chunk.num_drafted, guessed)

    def forget(self, request_id: str) -> None:
        """It has ended."""
        self._grammars.pop(request_id, None)
        self._troubles.pop(request_id, None)
        self._processors.pop(request_id, None)

    def _steering(self, chunk: ChunkInput) -> Steering:
        if chunk.before is not None:
            steering = Steering(
                chunk.params,
                chunk.num_prompt_tokens,
                vocab_size=self._vocab_size,
                end_tokens=self._end_tokens,
                matcher=None if chunk.params.grammar is None else self._grammars[chunk.request_id].matcher(),
            )
            steering.extend(0, chunk.before)
            self._of_seats[chunk.seat] = steering
        return self._of_seats[chunk.seat]


def _note_most(of_requests: dict[str, float], chunk: ChunkInput, seconds: float) -> None:
    of_requests[chunk.request_id] = max(seconds, of_requests.get(chunk.request_id, 0.0))
