"""How log-probabilities are worded: OpenAI's two forms of an answer's, and vLLM's of a prompt's."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

import msgspec

from scheduler.core.step import TokenLogprobs
from scheduler.text.tokenizer import Tokenizer
from server.api.completion_objects import ChatLogprob, CompletionLogprobs, PromptLogprob, TopLogprob, finite
from server.http.json import encode


class LogprobWords:
    """Words one answer's. `as_ids`: tokens are called by their numbers, which are never the same for two."""

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._tokenizer.token_text(token_id)

    def of_chat(self, entries: Sequence[TokenLogprobs]) -> list[msgspec.Raw]:
        """A `ChatLogprob` for each, as JSON."""
        return [msgspec.Raw(encode(self._of_chat(entry))) for entry in entries]

    def _of_chat(self, entry: TokenLogprobs) -> ChatLogprob:
        token = self._token(entry.token_id, entry.logprob)
        top = [self._token(token_id, logprob) for token_id, logprob in entry.top]
        return ChatLogprob(token.token, token.logprob, token.bytes, top)

    def _token(self, token_id: int, logprob: float) -> TopLogprob:
        return TopLogprob(self.name(token_id), finite(logprob), list(self._tokenizer.token_bytes(token_id)))

    def of_completion(
        self, entries: Sequence[TokenLogprobs | None], token_ids: Sequence[int], offsets: TextOffsets
    ) -> CompletionLogprobs:
        """Of these tokens, of which the first of a text has no entry."""
        return CompletionLogprobs(
            tokens=[self.name(token_id) for token_id in token_ids],
            token_logprobs=[None if entry is None else finite(entry.logprob) for entry in entries],
            top_logprobs=[
                msgspec.Raw(b"null" if entry is None else self._alternatives(entry)) for entry in entries
            ],
            text_offset=[offsets.next(self._tokenizer.token_bytes(token_id)) for token_id in token_ids],
        )

    def _alternatives(self, entry: TokenLogprobs) -> bytes:
        """By name; the chosen token is always among them. Two of one name are told apart by their numbers."""
        named: dict[str, float] = {}
        for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            name = self.name(token_id)
            if name in named and token_id != entry.token_id:
                name = f"token_id:{token_id}"
            named[name] = finite(logprob)
        return encode(named)

    def of_prompt(self, entries: Sequence[TokenLogprobs]) -> list[msgspec.Raw]:
        """By number, as JSON: rank 1 is the likeliest."""
        worded = []
        for entry in entries:
            found = {
                str(token_id): PromptLogprob(finite(logprob), rank, self._tokenizer.token_text(token_id))
                for rank, (token_id, logprob) in enumerate(entry.top, 1)
            }
            chosen = PromptLogprob(finite(entry.logprob), entry.rank, self._tokenizer.token_text(entry.token_id))
            found.setdefault(str(entry.token_id), chosen)
            worded.append(msgspec.Raw(msgspec.json.encode(found)))
        return worded


class TextOffsets:
    """Where the tokens of one choice begin in its text, in characters. One that goes on with a character of the
    token before begins where that character does."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._num_characters = 0

    def next(self, token: bytes) -> int:
        offset = self._num_characters
        self._num_characters += len(self._decoder.decode(token))
        return offset
