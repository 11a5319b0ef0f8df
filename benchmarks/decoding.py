"""Decoding with short prompts: output tokens/s, beside what the products alone would allow.

    python -m benchmarks.micro decoding

The engine core runs in this process, the default model in its default settings. The products are those of the same
packed weights, one after the other, for as many rows as there are sequences, less what as many calls take that
multiply nothing: in a step, one team of threads does them all.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.builds import add_cpu_flag, in_each_build
from scheduler.config import EngineConfig
from scheduler.core.request import Request
from scheduler.kernels.library import Product
from scheduler.kernels.native import kernels
from scheduler.models.files.checkpoint import open_checkpoint
from scheduler.models.files.model_source import resolve_model
from scheduler.models.fused.fused_weights import pack_weights
from scheduler.models.loading import choose_dtype, usable_cpus
from scheduler.models.model_config import read_config
from scheduler.models.products import PLAIN_MODES
from scheduler.process.engine_core import EngineCore
from scheduler.sampling_params import SamplingParams
from scheduler.text.tokenizer import Tokenizer
from server.bench.workload import words

ANSWER = 64
GOALS = {1: 0.5}
GOAL = 0.65
"""Of rows / products' time, where `GOALS` says nothing else."""
MOST_OF_PRODUCTS = 1.5
"""A decode step's time, against that of its products."""


class Products:
    """All products of a model's packed weights, and the time that they take."""

    def __init__(self, path: str, products: str) -> None:
        checkpoint = open_checkpoint(path)
        assert checkpoint is not None
        plain = PLAIN_MODES[choose_dtype("auto", torch.device("cpu"))]
        names = {"float32": "f32", "bfloat16": "bf16"}
        mode: Any = names.get(products, products)
        packed = pack_weights(read_config(path).whole, checkpoint, mode, plain)
        weights = [
            weight
            for layer in packed.layers
            for weight in (*layer["qkv"], layer["output"], layer["gate_up"], layer["down"])
        ]
        weights.append(packed.head)
        self._linears = [(weight.in_features, Product(weight)) for weight in weights]

        tiny = kernels().pack([torch.ones(1, 1)], None, "f32")
        self._tiny = Product(tiny)

    def seconds(self, rows: int, num_threads: int) -> float:
        inputs = {width: torch.randn(rows, width) for width, _ in self._linears}
        start = time.perf_counter()
        for width, linear in self._linears:
            linear(inputs[width], num_threads=num_threads)
        end = time.perf_counter()
        nothing = torch.ones(1, 1)
        for _ in self._linears:
            self._tiny(nothing, num_threads=num_threads)
        return end - start - (time.perf_counter() - end)


def decode(core: EngineCore, prompts: list[list[int]]) -> tuple[float, list[float]]:
    """Answer the prompts together; output tokens/s over all, and the seconds of each step that only decodes."""
    params = SamplingParams(max_tokens=ANSWER, temperature=0, seed=0, ignore_eos=True)
    start = time.perf_counter()
    for number, prompt in enumerate(prompts):
        core.add(Request(request_id=str(number), prompt_token_ids=prompt, params=params))
    steps = []
    while core.has_work:
        before = time.perf_counter()
        step = core.step().step
        if step is not None and step.num_prompt_tokens == 0 and step.num_tokens == len(prompts):
            steps.append(time.perf_counter() - before)
    return len(prompts) * ANSWER / (time.perf_counter() - start), steps


def measure(counts: Sequence[int], rounds: int) -> dict[str, Any]:
    """Medians over the rounds, for this process' build, by number of sequences."""
    config = EngineConfig(max_model_len=1024, prefix_caching=False)
    path = resolve_model(config.model)
    core = EngineCore(config, path)
    products = Products(path, core.info.products)
    tokenizer, rng, threads = Tokenizer(path), random.Random(0), usable_cpus()
    rates: dict[int, list[float]] = {count: [] for count in counts}
    steps: dict[int, list[float]] = {count: [] for count in counts}
    times: dict[int, list[float]] = {count: [] for count in counts}
    decode(core, [tokenizer.encode("warm")])
    turns = [count for _ in range(rounds) for count in counts]
    for count in tqdm(turns, desc="decoding", unit="turn", leave=False):
        prompts = [tokenizer.encode(words(rng, rng.randint(8, 16))) for _ in range(count)]
        times[count] += [products.seconds(count, threads) for _ in range(5)]
        rate, durations = decode(core, prompts)
        rates[count].append(rate)
        steps[count] += durations
        times[count] += [products.seconds(count, threads) for _ in range(5)]
    medians = {
        str(count): {
            "rate": statistics.median(rates[count]),
            "step": statistics.median(steps[count]),
            "products": statistics.median(times[count]),
        }
        for count in counts
    }
    return {"mode": core.info.products, "kv": core.info.kv_cache_dtype, "counts": medians}


def report(cpu: str, figures: dict[str, Any]) -> None:
    print(f"{cpu}: {figures['mode']} products, keys and values in {figures['kv']}")
    print("  sequences  tokens/s  rows / products  share  goal   step ms  products ms  ratio  goal")
    for name, found in figures["counts"].items():
        count = int(name)
        bound = count / found["products"]
        print(
            f"  {count:9} {found['rate']:9.1f} {bound:16.1f} {found['rate'] / bound:6.2f} "
            f"{GOALS.get(count, GOAL):5.2f} {1000 * found['step']:9.2f} {1000 * found['products']:12.2f} "
            f"{found['step'] / found['products']:6.2f} {MOST_OF_PRODUCTS:5.2f}",
            flush=True,
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_cpu_flag(parser)
    parser.add_argument(
        "--sequences", nargs="+", type=int, default=[1, 8, 32], metavar="N", help="(default: 1 8 32)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="medians of so many, interleaved (default: 5)")


def run(args: argparse.Namespace) -> None:
    arguments = ["--sequences", *map(str, args.sequences), "--rounds", str(args.rounds), "--here"]
    for cpu, figures in in_each_build("benchmarks.decoding", args.cpu, arguments):
        report(cpu, figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--here", action="store_true", help="in this process and build only, printed as JSON")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measure(args.sequences, args.rounds)))
    else:
        run(args)


if __name__ == "__main__":
    main()
