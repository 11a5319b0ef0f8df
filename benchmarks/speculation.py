"""Output tokens/s with guessed tokens and without, on answers that repeat their prompt and on ordinary chat.

    python -m benchmarks.speculation
    python -m benchmarks.speculation --kinds chat --rounds 9 --cpu avx2

The prompts are parts of the public-domain book in the repository and of the standard library's source code (both
to be copied), and questions. All are answered greedily, in the engine core of this process, with `--speculative
off` and `ngram` in turns. Both must give the same tokens. A small model does not always do as it is told: answers
that go round in circles would flatter the guesses, and are left out of the chat; those that are no copies are left
out where all are to be copies, and are there where some are. How many were left out is counted. `allowed` is what
the tokens that a sequence got in a step would make of it, if a step cost what the engine believes it does.
"""

from __future__ import annotations

import argparse
import calendar
import colorsys
import copy
import csv
import difflib
import fnmatch
import glob
import heapq
import inspect
import json
import shutil
import statistics
import string
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass

from tqdm import tqdm

from benchmarks.builds import add_cpu_flag, print_tables
from scheduler.config import DEFAULT_MODEL
from scheduler.llm import LLM
from scheduler.messages import StepStats
from scheduler.models.checks.quantization import TEXT
from scheduler.planning.plan import Plan
from scheduler.planning.step_cost import StepCost
from scheduler.sampling_params import SamplingParams

MODES = ("off", "ngram")
QUESTIONS = (
    "Tell me about the moon and its phases.", "Why is the sky blue?", "How does bread rise?",
    "Give me advice for a first day at a new job.", "What is a good way to learn the piano?",
    "Explain how a bicycle stays upright.", "Write a short letter to a friend about spring.",
    "What should I see in Rome?", "How do vaccines work?", "Describe a market in the morning.",
    "What is inflation?", "How can I sleep better?", "Why do cats purr?", "How is glass made?",
    "Tell me a story about a lighthouse.", "What makes a good teacher?",
)  # fmt: skip
FUNCTIONS = (
    shutil.copytree, textwrap.TextWrapper, shutil.rmtree, textwrap.dedent, shutil.which, statistics.quantiles,
    heapq.merge, fnmatch.translate, colorsys.rgb_to_hls, csv.Sniffer, copy.deepcopy, statistics.mode, glob.escape,
    string.Template, calendar.monthrange, heapq.nsmallest, shutil.move, textwrap.shorten, difflib.SequenceMatcher,
    statistics.median_grouped,
)  # fmt: skip
"""Whose source code is to be copied."""

NUM_COPIED = 2 * len(FUNCTIONS)

RUN = 9
"""So many tokens in a row that are in the prompt too are copied from it."""

COPY = 0.7
"""The share of its runs from which on an answer is a copy."""

LONG_ENOUGH = 96
"""Tokens that a copy has at least."""

CIRCLE = 48
"""Tokens at the end of an answer that a shorter period explains: it goes round in a circle."""


def copied(number: int) -> str:
    """A prompt whose answer is its own text, of `NUM_COPIED`: prose and code in turns."""
    if number % 2:
        code = inspect.getsource(FUNCTIONS[number // 2])[:1400]
        return f"Repeat this code exactly as it is:\n\n```python\n{code}\n```"
    text = TEXT.read_text()
    start = text.index("\n\n", (len(text) - 1100) * number // NUM_COPIED)
    return f"Repeat this text exactly as it is:\n\n{text[start : start + 1000].strip()}"


def is_copy(prompt: list[int], answer: list[int]) -> bool:
    """Whether most of the answer is in the prompt too, and it does not go round in circles then."""
    known = {tuple(prompt[start : start + RUN]) for start in range(len(prompt))}
    runs = [tuple(answer[start : start + RUN]) for start in range(len(answer) - RUN + 1)]
    return (
        len(answer) >= LONG_ENOUGH
        and not circles(answer)
        and sum(run in known for run in runs) >= COPY * len(runs)
    )


def circles(tokens: list[int]) -> bool:
    """Whether the answer's end repeats itself."""
    end = tokens[-CIRCLE:]
    return len(end) == CIRCLE and any(end[period:] == end[:-period] for period in range(1, CIRCLE // 2 + 1))


class Steps:
    """What the steps with guesses gave, and what they cost by the engine's own model of a step's cost."""

    def __init__(self, cost: StepCost) -> None:
        self._cost = cost
        self.forget()

    def forget(self) -> None:
        self._prompts = self._plain = self._guessed = 0.0  # seconds
        self._num_tokens = self._num_sequences = 0

    def step(self, plan: Plan, started: float, stats: StepStats, ended: object) -> None:
        """An observer of the engine."""
        decoding = [chunk._replace(drafted=()) for chunk in plan.chunks if chunk.samples and chunk.length == 1]
        num_first = sum(chunk.samples and chunk.length > 1 for chunk in plan.chunks)
        attended = sum(chunk._replace(drafted=()).attended for chunk in plan.chunks)
        plain = self._cost.predict(plan.num_tokens - plan.num_drafted, attended)
        prompts = plain
        if decoding:
            prompts -= self._cost.predict(len(decoding), sum(chunk.attended for chunk in decoding))
        self._prompts += prompts
        self._plain += plain - prompts
        self._guessed += self._cost.predict(plan.num_tokens, plan.attended) - prompts
        self._num_tokens += stats.num_sampled_tokens - num_first
        self._num_sequences += len(decoding)

    @property
    def allowed(self) -> float:
        """How many times as fast they could be: without guesses there would be as many times more steps that
        decode as a sequence got tokens in one, and each would cost less. Prompts cost the same."""
        gain = self._num_tokens / self._num_sequences
        return (self._prompts + gain * self._plain) / (self._prompts + self._guessed)


class Load:
    """Prompts that are answered `concurrency` at a time."""

    def __init__(self, llms: dict[str, LLM], texts: list[str], max_tokens: int) -> None:
        tokenizer = llms["off"].tokenizer
        self._llms = llms
        self._prompts = [tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in texts]
        self._params = SamplingParams(temperature=0, max_tokens=max_tokens, seed=0)
        self.num_left_out = 0

    def keep(self, is_wanted: Callable[[list[int], list[int]], bool]) -> None:
        """Only the prompts that are wanted, with their answers."""
        answers = self._llms["off"].generate(self._prompts, self._params, progress=False)
        good = [
            is_wanted(prompt, answer.completions[0].token_ids)
            for prompt, answer in zip(self._prompts, answers, strict=True)
        ]
        self.num_left_out = good.count(False)
        self._prompts = [prompt for prompt, is_good in zip(self._prompts, good, strict=True) if is_good]

    def run(self, mode: str, concurrency: int) -> tuple[float, list[list[int]]]:
        """Output tokens/s, and the answers."""
        prompts = (self._prompts * concurrency)[: max(concurrency, min(len(self._prompts), 8))]
        answers: list[list[int]] = []
        started = time.perf_counter()
        for first in range(0, len(prompts), concurrency):
            results = self._llms[mode].generate(prompts[first : first + concurrency], self._params, progress=False)
            answers += [result.completions[0].token_ids for result in results]
        return sum(map(len, answers)) / (time.perf_counter() - started), answers


@dataclass(frozen=True)
class Kind:
    """Answers that are measured, and how many at once."""

    name: str
    sizes: tuple[int, ...]
    load: Callable[[dict[str, LLM], int, int], Load]
    """From the modes, the most tokens of an answer, and of one that is a copy."""


def _copies(llms: dict[str, LLM], max_tokens: int, longest_copy: int) -> Load:
    load = Load(llms, [copied(number) for number in range(NUM_COPIED)], longest_copy)
    load.keep(is_copy)
    return load


def _mixed(llms: dict[str, LLM], max_tokens: int, longest_copy: int) -> Load:
    return Load(llms, [copied(number) for number in range(8)], longest_copy)


def _chat(llms: dict[str, LLM], max_tokens: int, longest_copy: int) -> Load:
    load = Load(llms, list(QUESTIONS), max_tokens)
    load.keep(lambda _, answer: not circles(answer))
    return load


KINDS = {
    "copies": Kind("repeats its prompt", (1, 8), _copies),
    "mixed": Kind("is asked to repeat its prompt", (8,), _mixed),
    "chat": Kind("chat", (1, 8, 32), _chat),
}


def measure(
    model: str, kinds: list[str], rounds: int, max_tokens: int, longest_copy: int
) -> list[dict[str, object]]:
    llms = {mode: LLM(model, speculative=mode, prefix_caching=False) for mode in MODES}
    loads = {kind: KINDS[kind].load(llms, max_tokens, longest_copy) for kind in kinds}
    observers = {mode: Steps(llm.engine.cost) for mode, llm in llms.items()}  # both: to look takes time
    for mode, llm in llms.items():
        llm.engine.observers.append(observers[mode])
    steps = observers["ngram"]
    rows: list[dict[str, object]] = []
    num_runs = sum(len(KINDS[kind].sizes) for kind in kinds) * rounds
    with tqdm(total=num_runs, desc="runs of both modes", file=sys.stderr) as bar:
        for kind, load in loads.items():
            for size in KINDS[kind].sizes:
                speeds: dict[str, list[float]] = {mode: [] for mode in MODES}
                steps.forget()
                for turn in range(rounds):
                    order = MODES if turn % 2 == 0 else MODES[::-1]
                    found = {mode: load.run(mode, size) for mode in order}
                    assert found["off"][1] == found["ngram"][1], "guesses changed an answer"
                    for mode in MODES:
                        speeds[mode].append(found[mode][0])
                    bar.update()
                allowed = steps.allowed
                ratios = [guessed / plain for plain, guessed in zip(speeds["off"], speeds["ngram"], strict=True)]
                rows.append(
                    {
                        "answers": KINDS[kind].name,
                        "at once": size,
                        "off": round(statistics.median(speeds["off"]), 1),
                        "ngram": round(statistics.median(speeds["ngram"]), 1),
                        "ratio": round(statistics.median(ratios), 2),
                        "allowed": round(allowed, 2),
                        "left out": load.num_left_out,
                    }
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help=f"(default: {DEFAULT_MODEL})")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="answers to measure (default: all kinds)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each mode, in turns (default: 3)")
    parser.add_argument("--max-tokens", type=int, default=192, help="longest answer (default: 192)")
    parser.add_argument("--longest-copy", type=int, default=400, help="where it is a copy (default: 400)")
    parser.add_argument("--json", action="store_true", help="measure this build only, and print JSON")
    add_cpu_flag(parser)
    args = parser.parse_args()
    if args.json:
        print(json.dumps(measure(args.model, args.kinds, args.rounds, args.max_tokens, args.longest_copy)))
        return
    flags = ["--json", "--model", args.model, "--rounds", str(args.rounds), "--kinds", *args.kinds]
    flags += ["--max-tokens", str(args.max_tokens), "--longest-copy", str(args.longest_copy)]
    print_tables("benchmarks.speculation", args.cpu, flags, model=args.model, what="output tokens/s")


if __name__ == "__main__":
    main()
