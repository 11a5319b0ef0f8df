"""Two libraries that hold answers to a JSON schema, behind one interface, and what one schema tells of one of
them.

    python -m benchmarks.grammar_engines llguidance MODEL_FOLDER < paths

Reads paths of schemas in MaskBench's form (`schema`, and `tests` of `data` and whether they are `valid`), one a
line, and writes a `Trial` a line as JSON. Runs in the environment of the library.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np

ROLLBACK = 8
"""Tokens, as of a draft."""

LONGEST = 4000
"""Characters of an instance; longer ones are left out, since their forced text is looked for one token at a
time."""


class Session(Protocol):
    """One answer's place in a schema."""

    def mask(self) -> np.ndarray[Any, Any]: ...
    def accept(self, token_id: int) -> bool: ...
    def rollback(self, count: int) -> None: ...
    def may_end(self) -> bool: ...
    def forced(self) -> str: ...


class Trial(msgspec.Struct):
    """What came of one schema. Times are in seconds."""

    path: str
    error: str | None = None
    """Why it was not compiled, or not followed to the end."""
    compiling: float = 0.0
    masks: list[float] = []
    rollbacks: list[float] = []
    num_wrong_rollbacks: int = 0
    """Masks that are others than before."""
    num_characters: int = 0
    num_forced: int = 0
    """Characters that were known before a token of them was chosen."""
    valid: list[bool] = []
    """For each valid instance, whether it was accepted."""
    invalid: list[bool] = []
    """For each invalid instance, whether it was accepted."""


def llguidance(tokenizer: Any, end_token_id: int) -> Callable[[str], Callable[[], Session]]:
    """As Carousel uses it."""
    from scheduler.core.sampling import GrammarKind, GrammarSpec
    from scheduler.text.grammar import GrammarCompiler, Matcher

    compiler = GrammarCompiler(tokenizer.backend_tokenizer.to_str(), [end_token_id])

    class Held(Session):
        def __init__(self, matcher: Matcher) -> None:
            self.matcher = matcher
            self.words = np.zeros(matcher.num_words, np.uint32)

        def mask(self) -> np.ndarray[Any, Any]:
            self.matcher.fill(self.words)
            return self.words

        def accept(self, token_id: int) -> bool:
            try:
                self.matcher.advance([token_id])
            except ValueError:
                return False
            return True

        def rollback(self, count: int) -> None:
            self.matcher.rollback(count)

        def may_end(self) -> bool:
            return self.accept(end_token_id)

        def forced(self) -> str:
            text: str = tokenizer.decode(self.matcher.forced())
            return text

    def compile_schema(schema: str) -> Callable[[], Session]:
        spec = GrammarSpec(GrammarKind.JSON_SCHEMA, schema)
        grammar = compiler.compile(spec)
        return lambda: Held(grammar.matcher())

    return compile_schema


def xgrammar(tokenizer: Any, end_token_id: int) -> Callable[[str], Callable[[], Session]]:
    """On one thread, like the other, and with the schema's own rule for properties that it does not name."""
    import torch
    import xgrammar as library  # type: ignore[import-not-found]

    info = library.TokenizerInfo.from_huggingface(tokenizer, stop_token_ids=[end_token_id])
    compiler = library.GrammarCompiler(info, max_threads=1)

    class Held(Session):
        def __init__(self, matcher: Any) -> None:
            self.matcher = matcher
            self.words = library.allocate_token_bitmask(1, info.vocab_size)

        def mask(self) -> np.ndarray[Any, Any]:
            if not self.matcher.fill_next_token_bitmask(self.words):
                self.words.fill_(-1)  # which says that every token may come
            words: torch.Tensor = self.words[0]
            return words.numpy()

        def accept(self, token_id: int) -> bool:
            return bool(self.matcher.accept_token(token_id))

        def rollback(self, count: int) -> None:
            self.matcher.rollback(count)

        def may_end(self) -> bool:
            return self.accept(end_token_id)

        def forced(self) -> str:
            text: str = self.matcher.find_jump_forward_string()
            return text

    def compile_schema(schema: str) -> Callable[[], Session]:
        compiled = compiler.compile_json_schema(schema, strict_mode=False)
        return lambda: Held(library.GrammarMatcher(compiled))

    return compile_schema


ENGINES = {"llguidance": llguidance, "xgrammar": xgrammar}


class Bench:
    """One library with one model's tokenizer."""

    def __init__(self, engine: str, model_path: str) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(model_path)
        self._compile = ENGINES[engine](self._tokenizer, self._tokenizer.eos_token_id)

    def trial(self, path: str) -> Trial:
        """Compile a schema, and read its instances."""
        case = json.loads(Path(path).read_text() or '{"schema": {}}')
        trial = Trial(path)
        try:
            self._try(case, trial)
        except Exception as error:  # each library has errors of its own
            trial.error = str(error) or type(error).__name__
        return trial

    def _try(self, case: dict[str, Any], trial: Trial) -> None:
        started = time.perf_counter()
        begin = self._compile(json.dumps(case["schema"]))
        trial.compiling = time.perf_counter() - started
        for test in case.get("tests", []):
            text = json.dumps(test["data"], ensure_ascii=False)
            if len(text) > LONGEST:
                continue
            accepted = self._read(begin(), text, trial)
            (trial.valid if test["valid"] else trial.invalid).append(accepted)
            if test["valid"] and accepted:
                self._look_ahead(begin(), text, trial)

    def _read(self, session: Session, text: str, trial: Trial) -> bool:
        """Whether the masks allow this text, token for token, and its end."""
        masks = []
        tokens = self._encode(text)
        for token in tokens:
            started = time.perf_counter()
            mask = session.mask()
            trial.masks.append(time.perf_counter() - started)
            masks.append(mask.copy())
            if not mask[token // 32] >> (token % 32) & 1 or not session.accept(token):
                return False
        count = random.randint(1, min(ROLLBACK, len(tokens)))
        started = time.perf_counter()
        session.rollback(count)
        trial.rollbacks.append(time.perf_counter() - started)
        trial.num_wrong_rollbacks += bool((session.mask() != masks[-count]).any())
        return all(session.accept(token) for token in tokens[-count:]) and session.may_end()

    def _look_ahead(self, session: Session, text: str, trial: Trial) -> None:
        trial.num_characters += len(text)
        while text:
            forced = session.forced()
            if forced and text.startswith(forced):
                trial.num_forced += len(forced)
                tokens = self._encode(forced)
                text = text.removeprefix(forced)
            else:
                tokens = self._encode(text)[:1]
                piece = str(self._tokenizer.decode(tokens))
                if not text.startswith(piece):  # part of a character
                    return
                text = text.removeprefix(piece)
            for token in tokens:
                session.accept(token)

    def _encode(self, text: str) -> list[int]:
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return tokens


def main() -> None:
    engine, model_path = sys.argv[1:]
    bench = Bench(engine, model_path)
    for line in sys.stdin:
        print(msgspec.json.encode(bench.trial(line.strip())).decode(), flush=True)


if __name__ == "__main__":
    main()
