"""What sequential generation costs, in three pictures for docs/generation.md.

    python -m benchmarks.sequential

Time against the answer's length for 1 to 64 answers at once; one more token with the KV cache, against computing
the whole context again; and the steps that an answer takes with guessed tokens and without. The engine core runs
in this process with the default model. A figure holds for the processor that it was measured on, which is printed.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from tqdm import tqdm

from benchmarks.processor import processor
from benchmarks.speculation import copied
from scheduler.config import DEFAULT_MODEL
from scheduler.core.request import Request
from scheduler.llm import LLM
from scheduler.models.checks.quantization import TEXT
from scheduler.sampling_params import SamplingParams

BATCHES = (1, 2, 4, 8, 16, 32, 64)
PROMPT = 16
CONTEXTS = (16, 32, 64, 128, 256, 512, 1024)
MAX_LEN = 2048
REPEATS = 5


@dataclass
class Length:
    """So many answers at once: seconds until each has 1, 2, ... tokens."""

    batch: int
    seconds: list[float]

    @property
    def step(self) -> float:
        """Milliseconds of one step, of the second half."""
        half = len(self.seconds) // 2
        return (self.seconds[-1] - self.seconds[half]) / (len(self.seconds) - 1 - half) * 1000


@dataclass
class Cached:
    """One more token behind a context, with its keys and values in the cache and without: milliseconds."""

    context: int
    cached: float
    recomputed: float


@dataclass
class Drafted:
    """One answer with guesses or without: tokens that are there after each step, and seconds."""

    mode: str
    tokens: list[int]
    seconds: float


@dataclass
class Measured:
    """All of it, and where."""

    model: str
    processor: str
    lengths: list[Length]
    cached: list[Cached]
    drafted: list[Drafted]


class Bench:
    """Requests of this module, step by step."""

    def __init__(self, model: str, speculative: Literal["off", "ngram"]) -> None:
        self.llm = LLM(
            model, speculative=speculative, prefix_caching=False, max_model_len=MAX_LEN, longest_step_ms=1e9,
            max_batched_tokens=MAX_LEN,
        )  # fmt: skip
        self._words = self.llm.tokenizer.encode(TEXT.read_text())
        self._number = 0

    def add(self, prompt: list[int], max_tokens: int, *, ignore_eos: bool = True) -> None:
        self._number += 1
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=ignore_eos, seed=0)
        self.llm.engine.add(Request(request_id=str(self._number), prompt_token_ids=prompt, params=params))

    def text(self, length: int) -> list[int]:
        """So many tokens from somewhere in the book."""
        start = random.Random(self._number).randrange(len(self._words) - length)
        return self._words[start : start + length]

    def run(self) -> tuple[list[int], list[float]]:
        """All requests to their end: tokens that each step gave, and when it was over."""
        started = time.perf_counter()
        tokens, seconds = [], []
        while self.llm.engine.has_work:
            tokens.append(sum(len(output.token_ids) for output in self.llm.engine.step().outputs))
            seconds.append(time.perf_counter() - started)
        return tokens, seconds


def measure_lengths(bench: Bench, num_tokens: int) -> list[Length]:
    found = []
    for batch in tqdm(BATCHES, desc="answers at once"):
        for _ in range(batch):
            bench.add(bench.text(PROMPT), num_tokens)
        found.append(Length(batch, bench.run()[1]))
    return found


def measure_cache(bench: Bench) -> list[Cached]:
    """The second step of an answer against a first step whose prompt is as long."""
    found = []
    for context in tqdm(CONTEXTS, desc="with the cache and without"):
        cached, recomputed = [], []
        for _ in range(REPEATS):
            bench.add(bench.text(context - 1), 2)
            _, (first, second) = bench.run()
            cached.append((second - first) * 1000)
            bench.add(bench.text(context), 1)
            recomputed.append(bench.run()[1][0] * 1000)
        found.append(Cached(context, statistics.median(cached), statistics.median(recomputed)))
    return found


def measure_drafts(plain: Bench, guessing: Bench, num_tokens: int) -> list[Drafted]:
    """A text to be repeated, without guesses and with them."""
    found = []
    prompt = plain.llm.tokenizer.apply_chat_template([{"role": "user", "content": copied(18)}])
    for mode, bench in (("off", plain), ("ngram", guessing)):
        bench.add(prompt, num_tokens, ignore_eos=False)
        tokens, seconds = bench.run()
        grown = list(accumulate(count for count in tokens if count))
        found.append(Drafted(mode, grown, seconds[-1] - seconds[0]))
    return found


def measure(model: str, num_tokens: int) -> Measured:
    plain, guessing = Bench(model, "off"), Bench(model, "ngram")
    for bench in (plain, guessing):  # the first steps of a process are slow
        bench.add(bench.text(PROMPT), 32)
        bench.run()
    lengths = measure_lengths(plain, num_tokens)
    cached = measure_cache(plain)
    return Measured(model, str(processor()), lengths, cached, measure_drafts(plain, guessing, num_tokens))


def draw(file: Path, title: str, fill: Callable[[Axes], None]) -> None:
    figure, axes = plt.subplots(figsize=(7.2, 3.8), constrained_layout=True)
    fill(axes)
    axes.set_title(title, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=120)
    plt.close(figure)
    print(file)


def draw_lengths(axes: Axes, lengths: list[Length]) -> None:
    colors = plt.get_cmap("viridis")
    for place, each in enumerate(lengths):
        label = f"{each.batch} at once" if each.batch > 1 else "one answer"
        color = colors(place / len(lengths))
        axes.plot(range(1, len(each.seconds) + 1), each.seconds, label=label, color=color)
    axes.set_xlabel("tokens of each answer")
    axes.set_ylabel("seconds")


def draw_cache(axes: Axes, cached: list[Cached]) -> None:
    contexts = [each.context for each in cached]
    axes.plot(contexts, [each.recomputed for each in cached], "o-", color="#9db4cc", label="whole context again")
    axes.plot(contexts, [each.cached for each in cached], "o-", color="#f2a33a", label="with the KV cache")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(contexts, [str(context) for context in contexts])
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("milliseconds for one more token")


def draw_drafts(axes: Axes, drafted: list[Drafted]) -> None:
    colors, labels = {"off": "#9db4cc", "ngram": "#f2a33a"}, {"off": "one token a step", "ngram": "with guesses"}
    for each in drafted:
        label = f"{labels[each.mode]}: {len(each.tokens)} steps, {each.seconds:.2f} s"
        axes.step(range(1, len(each.tokens) + 1), each.tokens, where="post", color=colors[each.mode], label=label)
    axes.set_xlabel("steps")
    axes.set_ylabel("tokens of the answer")


def show(found: Measured) -> None:
    print(f"\n{found.model}, {found.processor}\n")
    print("| answers at once | ms a step | tokens/s of each | tokens/s of all |\n| --- | --- | --- | --- |")
    for length in found.lengths:
        each = 1000 / length.step
        print(f"| {length.batch} | {length.step:.1f} | {each:.0f} | {each * length.batch:.0f} |")
    print("\n| context | with the KV cache, ms | whole context again, ms |\n| --- | --- | --- |")
    for one in found.cached:
        print(f"| {one.context} | {one.cached:.1f} | {one.recomputed:.1f} |")
    print("\n| guesses | steps | tokens | seconds |\n| --- | --- | --- | --- |")
    for drafted in found.drafted:
        print(f"| {drafted.mode} | {len(drafted.tokens)} | {drafted.tokens[-1]} | {drafted.seconds:.2f} |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help=f"(default: {DEFAULT_MODEL})")
    parser.add_argument("--max-tokens", type=int, default=256, help="the answers' length (default: 256)")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="where the pictures go (default: docs)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, and draw nothing")
    args = parser.parse_args()
    found = measure(args.model, args.max_tokens)
    if args.json:
        print(json.dumps(asdict(found)))
        return
    show(found)
    lengths, cached, drafted = found.lengths, found.cached, found.drafted
    draw(args.output / "generation-length.png", "Twice the answer, twice the time, however many share the steps",
         lambda axes: draw_lengths(axes, lengths))  # fmt: skip
    draw(args.output / "generation-cache.png", "What is remembered need not be computed again",
         lambda axes: draw_cache(axes, cached))  # fmt: skip
    draw(args.output / "generation-drafts.png", "Right guesses are tokens without a step of their own",
         lambda axes: draw_drafts(axes, drafted))  # fmt: skip


if __name__ == "__main__":
    main()
