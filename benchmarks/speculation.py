"""Output tokens/s with guessed tokens and without, on answers that repeat their prompt and on ordinary chat.

    python -m benchmarks.speculation
    python -m benchmarks.speculation --kinds chat --rounds 9 --cpu avx2

The prompts are parts of the public-domain book in the repository and of the standard library's source code (both
to be copied, greedily), and real text (`benchmarks.asked`), at a temperature of 0.7, whose answers end where the
model ends them. They are answered in the engine core of this process, so many at once, with `--speculative off`
and `ngram`, by turns step by step. Both must give the same tokens. A small model does not always do as it is
told: answers that are no copies are left out where all are to be copies, and are there where some are; how many
were left out is counted. `circles` is the share of the answers that repeats itself, which is easily guessed.
`planning` is what a step's plan takes with guesses and without, in microseconds. `allowed` is what the tokens
that a sequence got in a step would make of it, if a step cost what the engine believes it does.
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
import itertools
import json
import shutil
import statistics
import string
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from tqdm import tqdm

from benchmarks.asked import MOST_TOKENS, asked, prompts
from benchmarks.builds import add_cpu_flag, print_tables
from scheduler.client.stream import make_request
from scheduler.config import DEFAULT_MODEL
from scheduler.core.plan import Plan
from scheduler.features.step_cost import StepCost
from scheduler.llm import LLM
from scheduler.models.checks.quantization import TEXT
from scheduler.sampling_params import SamplingParams
from scheduler.wire.messages import StepStats
from server.bench.report import circles as share_of_circles

MODES: tuple[Literal["off", "ngram"], ...] = ("off", "ngram")
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
        plain = self._cost.predict(sum(chunk.length for chunk in plan.chunks), attended)
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


@dataclass(frozen=True)
class Run:
    """What one mode made of its prompts."""

    speed: float
    """Output tokens/s."""
    answers: list[list[int]]
    planning: float
    """Seconds that a step's plan took, in the median."""


class Load:
    """Prompts that are answered `concurrency` at a time: who ends makes room for the next."""

    def __init__(self, llms: dict[str, LLM], asked_for: list[tuple[list[int], SamplingParams]]) -> None:
        self._llms = llms
        self._asked = asked_for
        self.num_left_out = 0

    @classmethod
    def greedy(cls, llms: dict[str, LLM], texts: list[str], max_tokens: int) -> Load:
        """The likeliest answers."""
        params = SamplingParams(temperature=0, max_tokens=max_tokens, seed=0)
        return cls(llms, [(_chat_prompt(llms["off"], text), params) for text in texts])

    @classmethod
    def chats(cls, llms: dict[str, LLM], max_tokens: int) -> Load:
        """Real text at a temperature of 0.7, and answers that end by themselves."""
        return cls(
            llms,
            [
                (
                    _chat_prompt(llms["off"], request.prompt, request.system),
                    SamplingParams(temperature=0.7, max_tokens=max_tokens, seed=request.seed),
                )
                for request in asked(len(prompts()), seed=0)
            ],
        )

    def keep(self, is_wanted: Callable[[list[int], list[int]], bool]) -> None:
        """Only the prompts that are wanted, with their answers."""
        answers = _ended(self._closed_loop(self._llms["off"], self._asked, 8)).answers
        good = [is_wanted(prompt, answer) for (prompt, _), answer in zip(self._asked, answers, strict=True)]
        self.num_left_out = good.count(False)
        self._asked = [each for each, is_good in zip(self._asked, good, strict=True) if is_good]

    def run(self, concurrency: int, turn: int) -> dict[str, Run]:
        """Both modes on the same prompts, by turns step by step: what slows the machine for a second slows both.
        Each turn has other prompts, as long as there are some."""
        count = max(8, 2 * concurrency)
        picked = list(itertools.islice(itertools.cycle(self._asked), turn * count, (turn + 1) * count))
        loops = {mode: self._closed_loop(llm, picked, concurrency) for mode, llm in self._llms.items()}
        runs: dict[str, Run] = {}
        while len(runs) < len(loops):
            for mode, loop in loops.items():
                if mode not in runs and (run := next(loop)) is not None:
                    runs[mode] = run
        return runs

    def _closed_loop(
        self, llm: LLM, picked: list[tuple[list[int], SamplingParams]], concurrency: int
    ) -> Iterator[Run | None]:
        """Yields after each step; at the end what came of all."""
        answers: list[list[int]] = [[] for _ in picked]
        planning: list[float] = []
        waiting = iter(range(len(picked)))
        num_live = 0
        seconds = 0.0
        while True:
            started = time.perf_counter()
            for number in itertools.islice(waiting, concurrency - num_live):
                prompt, params = picked[number]
                llm.engine.add(make_request(str(number), prompt, params, llm.engine.info, llm.tokenizer))
                num_live += 1
            if num_live == 0:
                break
            done = llm.engine.step()
            planning += [done.step.phases.plan] if done.step is not None else []
            for output in done.outputs:
                answers[int(output.request_id)] += output.token_ids
                num_live -= output.finish_reason is not None
            seconds += time.perf_counter() - started
            yield None
        yield Run(sum(map(len, answers)) / seconds, answers, statistics.median(planning))


def _ended(loop: Iterator[Run | None]) -> Run:
    return next(run for run in loop if run is not None)


def _chat_prompt(llm: LLM, text: str, system: str | None = None) -> list[int]:
    before = [] if system is None else [{"role": "system", "content": system}]
    return llm.tokenizer.apply_chat_template([*before, {"role": "user", "content": text}])


@dataclass(frozen=True)
class Kind:
    """Answers that are measured, and how many at once."""

    name: str
    sizes: tuple[int, ...]
    load: Callable[[dict[str, LLM], int, int], Load]
    """From the modes, the most tokens of an answer, and of one that is a copy."""


def _copies(llms: dict[str, LLM], max_tokens: int, longest_copy: int) -> Load:
    load = Load.greedy(llms, [copied(number) for number in range(NUM_COPIED)], longest_copy)
    load.keep(is_copy)
    return load


def _mixed(llms: dict[str, LLM], max_tokens: int, longest_copy: int) -> Load:
    return Load.greedy(llms, [copied(number) for number in range(8)], longest_copy)


def _chat(llms: dict[str, LLM], max_tokens: int, longest_copy: int) -> Load:
    return Load.chats(llms, max_tokens)


KINDS = {
    "copies": Kind("repeats its prompt", (1, 8), _copies),
    "mixed": Kind("is asked to repeat its prompt", (8,), _mixed),
    "chat": Kind("chat", (1, 8, 32), _chat),
}


def measure(
    model: str, kinds: list[str], rounds: int, max_tokens: int, longest_copy: int
) -> list[dict[str, object]]:
    llms: dict[str, LLM] = {mode: LLM(model, speculative=mode, prefix_caching=False) for mode in MODES}
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
                runs: dict[str, list[Run]] = {name: [] for name in llms}
                steps.forget()
                for turn in range(rounds):
                    for mode, run in load.run(size, turn).items():
                        runs[mode].append(run)
                    assert runs["off"][-1].answers == runs["ngram"][-1].answers, "guesses changed an answer"
                    bar.update()
                allowed = steps.allowed
                plain, guessed = runs["off"], runs["ngram"]
                ratios = [one.speed / other.speed for one, other in zip(guessed, plain, strict=True)]
                tokenizer = llms["off"].tokenizer
                texts = [tokenizer.decode(answer) for run in guessed for answer in run.answers]
                rows.append(
                    {
                        "answers": KINDS[kind].name,
                        "at once": size,
                        "off": round(statistics.median(run.speed for run in plain), 1),
                        "ngram": round(statistics.median(run.speed for run in guessed), 1),
                        "ratio": round(statistics.median(ratios), 3),
                        "each turn": " ".join(f"{ratio:.2f}" for ratio in ratios),
                        "allowed": round(allowed, 3),
                        "planning": "{:.0f} / {:.0f}".format(
                            *(1e6 * statistics.median(run.planning for run in each) for each in (guessed, plain))
                        ),
                        "circles": f"{share_of_circles(texts):.1%}",
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
    parser.add_argument("--max-tokens", type=int, default=MOST_TOKENS, help="longest answer (default: 256)")
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
