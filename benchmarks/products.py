"""The default model's matrix products: milliseconds in each mode and build, beside torch's.

    python -m benchmarks.micro products
    python -m benchmarks.micro products --cpu avx2 portable --rows 1 32

Every layer has weights of its own, so memory is streamed as in a step. Each build is measured in a process of its
own, in which torch's libraries are held to the same instructions.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from benchmarks.builds import add_cpu_flag, in_each_build
from benchmarks.peak import HOW, peak
from scheduler.kernels.library import Product
from scheduler.kernels.native import kernels
from scheduler.machine.processor import instruction_set

NUM_LAYERS = 30
PLAIN = ("f32", "bf16", "int8", "int4")
STORED = ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q6_K")
TORCH = ("torch f32", "torch bf16", "torch int8")
PRINTED_ONLY = "torch int8"
"""fbgemm's sums saturate, and oneDNN's are of rows rounded as a whole: no way out."""

SLOW = 2.0
"""Seconds: what takes longer is measured once."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One product of the default model."""

    inputs: int
    outputs: int
    gated: bool = False


LAYER = (Shape(576, 960), Shape(576, 576), Shape(576, 3072, gated=True), Shape(1536, 576))
HEAD = Shape(576, 49152)
SHAPES = LAYER * NUM_LAYERS + (HEAD,)
MULTIPLY_ADDS = sum(shape.inputs * shape.outputs for shape in SHAPES)
"""For each row."""

Multiply = Callable[[Tensor], Any]


def padded(inputs: int, kind: str) -> int:
    """Inputs in whole blocks: Q6_K's have 256 weights, and 576 become 768."""
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0] if kind in STORED else 1
    return int(-(-inputs // block) * block)


def stored_bytes(kind: str, rows: int, columns: int) -> Tensor:
    """Random codes under small scales: the time does not depend on them."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    data = torch.randint(0, 256, (rows, columns // block, size), dtype=torch.uint8)
    scale = torch.tensor([0.01], dtype=torch.float16).view(torch.uint8)
    places = {"Q4_1": (0, 2), "Q6_K": (208,)}.get(kind, (0,))
    for place in places:
        data[..., place : place + 2] = scale
    return data.view(rows, -1)


def native_products(kind: str, num_threads: int) -> list[Multiply]:
    """All of `SHAPES`, packed one by one out of a few matrices."""
    matrices: dict[Shape, list[Any]] = {}
    for shape in dict.fromkeys(SHAPES):
        halves = 2 if shape.gated else 1
        rows, columns = shape.outputs // halves, padded(shape.inputs, kind)
        if kind in STORED:
            matrices[shape] = [kernels().stored(stored_bytes(kind, rows, columns), kind) for _ in range(halves)]
        else:
            matrices[shape] = [0.05 * torch.randn(rows, columns) for _ in range(halves)]
    mode = "stored" if kind in STORED else kind

    def product(shape: Shape) -> Multiply:
        linear = Product(kernels().pack(matrices[shape], None, mode, gated=shape.gated))
        return lambda x: linear(x, num_threads=num_threads)

    return [product(shape) for shape in SHAPES]


def torch_products(kind: str) -> list[Multiply]:
    """The same by torch; of a gated one the product alone."""

    def product(shape: Shape) -> Multiply:
        weight = 0.05 * torch.randn(shape.outputs, shape.inputs)
        if kind == "torch int8":
            codes = torch.quantize_per_tensor(weight, 0.002, 0, torch.qint8)
            packed = torch.ops.quantized.linear_prepack(codes, None)
            return lambda x: torch.ops.quantized.linear_dynamic(x, packed)
        if kind == "torch bf16":
            weight = weight.bfloat16()
        return lambda x: functional.linear(x, weight)

    return [product(shape) for shape in SHAPES]


def make(kind: str, num_threads: int) -> list[Multiply]:
    return torch_products(kind) if kind in TORCH else native_products(kind, num_threads)


def seconds(kind: str, products: list[Multiply], num_rows: int) -> float:
    """The time of all products once."""
    inputs: dict[int, Tensor] = {}
    for shape in SHAPES:
        x = torch.randn(num_rows, padded(shape.inputs, kind))
        inputs[shape.inputs] = x.bfloat16() if kind == "torch bf16" else x
    start = time.perf_counter()
    for shape, product in zip(SHAPES, products, strict=True):
        product(inputs[shape.inputs])
    return time.perf_counter() - start


def starting(num_threads: int) -> float:
    """Seconds that as many products take which have next to nothing to multiply. In the model, one team of threads
    does all products of a step."""
    tiny = Product(kernels().pack([torch.ones(1, 1)], None, "f32"))
    x = torch.ones(1, 1)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        for _ in SHAPES:
            tiny(x, num_threads=num_threads)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.inference_mode()
def measure(kinds: Sequence[str], rows: Sequence[int], rounds: int, num_threads: int) -> dict[str, Any]:
    """Medians for this process' build, in milliseconds by kind and number of rows, and the peak."""
    torch.set_num_threads(num_threads)
    made: dict[str, list[Multiply]] = {}
    for kind in tqdm(kinds, desc="packing", unit="mode", leave=False):
        try:
            made[kind] = make(kind, num_threads)
        except RuntimeError as error:
            if kind != PRINTED_ONLY:
                raise
            tqdm.write(f"{kind}: {error}", file=sys.stderr)  # not every build of torch has it
            continue
        seconds(kind, made[kind], 1)  # warm
    times: dict[tuple[str, int], list[float]] = {}
    turns = [(kind, count) for _ in range(rounds) for count in rows for kind in made]
    for kind, count in (bar := tqdm(turns, desc="products", unit="turn", leave=False)):
        bar.set_postfix_str(f"{kind}, {count} rows")
        before = times.setdefault((kind, count), [])
        if not before or before[0] < SLOW:
            before.append(seconds(kind, made[kind], count))
    milliseconds = {
        kind: {str(count): 1000 * statistics.median(times[kind, count]) for count in rows} for kind in made
    }
    best = peak(instruction_set(), num_threads)
    return {"peak": best, "starting": 1000 * starting(num_threads), "milliseconds": milliseconds}


def report(cpu: str, figures: dict[str, Any], rows: Sequence[int], num_threads: int) -> None:
    best, milliseconds = figures["peak"], figures["milliseconds"]
    print(f"{cpu}, {num_threads} threads: at most {best / 1e9:.1f} G multiply-adds of float32 a second ({HOW})")
    print("  ms (share of that peak)" + "".join(f"{f'{count} rows':>18}" for count in rows))
    for kind, times in milliseconds.items():
        cells = []
        for count in rows:
            share = MULTIPLY_ADDS * count / (times[str(count)] / 1000) / best
            cells.append(f"{times[str(count)]:10.1f} ({share:4.0%})")
        print(f"  {kind:<23}" + "".join(f"{cell:>18}" for cell in cells))
    print(f"  calling {len(SHAPES)} products takes {figures['starting']:.2f} ms of ours, whatever they multiply")
    if "Q6_K" in milliseconds:
        print("  Q6_K: rows of 576 are padded to 768, which is 1.25 times the work")
    if PRINTED_ONLY in milliseconds:
        print(f"  {PRINTED_ONLY}: no peer, its sums saturate or its rows are rounded more coarsely")
    theirs = [milliseconds[kind] for kind in milliseconds if kind in TORCH and kind != PRINTED_ONLY]
    slower = [
        f"{kind} at {count} rows"
        for kind, times in milliseconds.items()
        for count in rows
        if kind not in TORCH and theirs and times[str(count)] > min(other[str(count)] for other in theirs)
    ]
    print(f"  slower than torch's float32 or bfloat16: {', '.join(slower) or 'nothing'}", flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cpus = len(os.sched_getaffinity(0))
    add_cpu_flag(parser)
    kinds = (*PLAIN, *STORED, *TORCH)
    parser.add_argument(
        "--modes", nargs="+", choices=kinds, default=kinds, metavar="MODE",
        help=f"of {', '.join(kinds)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--rows", nargs="+", type=int, default=[1, 8, 32, 128], metavar="N", help="(default: 1 8 32 128)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="medians of so many, interleaved (default: 5)")
    parser.add_argument("--threads", type=int, default=cpus, help=f"(default: {cpus}, the usable processors)")


def run(args: argparse.Namespace) -> None:
    arguments = ["--modes", *args.modes, "--rows", *map(str, args.rows)]
    arguments += ["--rounds", str(args.rounds), "--threads", str(args.threads), "--here"]
    for cpu, figures in in_each_build("benchmarks.products", args.cpu, arguments):
        report(cpu, figures, args.rows, args.threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--here", action="store_true", help="in this process and build only, printed as JSON")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measure(args.modes, args.rows, args.rounds, args.threads)))
    else:
        run(args)


if __name__ == "__main__":
    main()
