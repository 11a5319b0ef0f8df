"""What going on beyond the window costs, and what it does to quality.

    python -m benchmarks.context_shift

A text (Python's documentation of its data model, which comes with Python) is read token by token, as an answer
that is held to it: with the whole text as context, and with a window from which the oldest tokens are dropped
(`context_shift`). Perplexity is that of the tokens behind the window; time is that of the steps there; blocks are
the most that were held. Beside them the perplexity when the context is thrown away whenever the window is full,
which is what one does without it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pydoc_data.topics import topics

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.builds import add_cpu_flag, print_tables
from scheduler.config import DEFAULT_MODEL
from scheduler.llm import LLM
from scheduler.sampling_params import SamplingParams

FIRST = 16
"""Tokens of prompt."""


class Reader:
    """Has a model read a text."""

    def __init__(self, model: str, max_model_len: int) -> None:
        self.llm = LLM(model, max_model_len=max_model_len, speculative="off", longest_step_ms=1e9)
        self._num_blocks = 0
        self._ends: list[float] = []
        self.llm.engine.observers.append(self)

    def step(self, *_: object) -> None:
        self._num_blocks = max(self._num_blocks, self.llm.engine.pool.num_used)
        self._ends.append(time.perf_counter())

    def read(self, text: list[int], *, context_shift: bool = False) -> tuple[list[float], list[float], int]:
        """The log-probability of each token behind the first, the seconds until each step's end, and the most
        blocks held."""
        self._num_blocks = 0
        self._ends = []

        def follow(tokens: list[int], logits: Tensor) -> Tensor:
            wanted = text[len(tokens)]
            return torch.full_like(logits, -torch.inf).index_fill_(0, torch.tensor([wanted]), 0.0)

        params = SamplingParams(
            temperature=0, max_tokens=len(text) - FIRST, ignore_eos=True, seed=0, logprobs=0,
            context_shift=context_shift,
        )  # fmt: skip
        (result,) = self.llm.generate([text[:FIRST]], params, logits_processors=[follow], progress=False)
        answer = result.completions[0]
        assert answer.token_ids == text[FIRST:]
        return [entry.logprob for entry in answer.logprobs or ()], self._ends, self._num_blocks


def measure(model: str, window: int, length: int) -> list[dict[str, object]]:
    """One row for each way to read the text."""
    whole, shifting = Reader(model, length), Reader(model, window)
    text = whole.llm.tokenizer.encode(topics["specialnames"])[:length]
    assert len(text) == length

    def reading(context: str, logprobs: list[float], ends: list[float], blocks: int) -> dict[str, object]:
        behind = window - FIRST
        tail = logprobs[behind:]
        seconds = (ends[-1] - ends[behind]) / max(1, len(ends) - 1 - behind)
        return {
            "context": context,
            "perplexity": round(math.exp(-sum(tail) / len(tail)), 2),
            "ms a step": round(1000 * seconds, 1),
            "blocks held": blocks,
        }

    found = []
    with tqdm(total=3, desc="readings") as bar:
        found.append(reading(f"all {length} tokens", *whole.read(text)))
        bar.update()
        found.append(reading(f"{window} tokens, the oldest dropped", *shifting.read(text, context_shift=True)))
        bar.update()
        logprobs: list[float] = []
        ends: list[float] = []
        blocks = 0
        for start in range(0, length, window):
            part = text[max(0, start - FIRST) : start + window] if start else text[:window]
            for at in range(0, len(part) - FIRST, window - FIRST):
                some, when, held = shifting.read(part[at : at + window])
                logprobs, ends, blocks = logprobs + some, ends + when, max(blocks, held)
        found.append(reading(f"{window} tokens, begun anew when full", logprobs, ends, blocks))
        bar.update()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help=f"(default: {DEFAULT_MODEL})")
    parser.add_argument("--window", type=int, default=1024, help="tokens (default: 1024)")
    parser.add_argument("--length", type=int, default=3000, help="tokens of text (default: 3000)")
    parser.add_argument("--json", action="store_true", help="measure this build only, and print JSON")
    add_cpu_flag(parser)
    args = parser.parse_args()
    if args.json:
        print(json.dumps(measure(args.model, args.window, args.length)))
        return
    flags = ["--json", "--model", args.model, "--window", str(args.window), "--length", str(args.length)]
    what = f"tokens {args.window} to {args.length} of a text"
    print_tables("benchmarks.context_shift", args.cpu, flags, model=args.model, what=what)


if __name__ == "__main__":
    main()
