"""What choosing a token costs, by what a request wants of it: how `token_cost` prices it.

    python -m benchmarks.choosing

So many answers at once are computed in one thread by the engine core of this process, in turns; what is compared
is the processor's time of their steps, so that it matters little what else the machine does.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from typing import Any

from tqdm import tqdm

from benchmarks.processor import processor
from scheduler.client.stream import make_request
from scheduler.config import DEFAULT_MODEL
from scheduler.features.prices import token_cost
from scheduler.llm import LLM
from scheduler.sampling_params import SamplingParams

PROMPT, STEPS, WARM = 20, 16, 8
PLAIN = "temperature 0.7"
WISHES: dict[str, dict[str, Any]] = {
    "temperature 0": {"temperature": 0},
    PLAIN: {"temperature": 0.7},
    "temperature 0.7, top_p 0.95": {"temperature": 0.7, "top_p": 0.95},
    "temperature 1, top_p 0.95": {"temperature": 1, "top_p": 0.95},
    "temperature 2, top_p 0.95": {"temperature": 2, "top_p": 0.95},
    "temperature 2, top_k 40": {"temperature": 2, "top_k": 40},
    "temperature 2, min_p 0.05": {"temperature": 2, "min_p": 0.05},
    "logprobs 20": {"temperature": 0.7, "logprobs": 20},
    "repetition_penalty 1.1": {"temperature": 0.7, "repetition_penalty": 1.1},
    "explain": {"temperature": 0.7, "logprobs": 5, "explain": True},
    "explain, temperature 2, top_p 0.95": {"temperature": 2, "top_p": 0.95, "logprobs": 5, "explain": True},
}


def steps(llm: LLM, params: SamplingParams, at_once: int) -> list[float]:
    """The processor's seconds of each of some steps."""
    rng = random.Random(0)
    names = [f"{time.monotonic_ns()}-{number}" for number in range(at_once)]
    for name in names:
        prompt = [rng.randrange(1000, 40000) for _ in range(PROMPT)]
        llm.engine.add(make_request(name, prompt, params, llm.engine.info, llm.tokenizer))
    for _ in range(WARM):
        llm.engine.step()
    seconds = []
    for _ in range(STEPS):
        started = time.thread_time()
        llm.engine.step()
        seconds.append(time.thread_time() - started)
    for name in names:
        llm.engine.abort(name)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="default: %(default)s")
    parser.add_argument("--at-once", type=int, default=8, help="answers (default: 8)")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each (default: 4)")
    args = parser.parse_args()
    llm = LLM(args.model, speculative="off", prefix_caching=False, threads=1, longest_step_ms=1e9)
    wishes = {
        name: SamplingParams(max_tokens=10 * STEPS, ignore_eos=True, seed=1, **wish)
        for name, wish in WISHES.items()
    }
    found: dict[str, list[float]] = {name: [] for name in wishes}
    for _ in tqdm(range(args.rounds), unit="round"):
        for name, params in wishes.items():
            found[name] += steps(llm, params, args.at_once)
    plain = statistics.median(found[PLAIN])
    print(f"{processor()}, {args.model}, {args.at_once} at once, one thread\n")
    print("| a request wants | ms a step | times plain | priced |\n| --- | --- | --- | --- |")
    for name, params in wishes.items():
        seconds = statistics.median(found[name])
        print(f"| {name} | {1000 * seconds:.1f} | {seconds / plain:.2f} | {token_cost(params):g} |")


if __name__ == "__main__":
    main()
