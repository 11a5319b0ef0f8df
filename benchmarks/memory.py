"""The most memory that loading takes, and how soon a second start is ready.

    python -m benchmarks.memory
    python -m benchmarks.memory --models default

Each model is loaded in a process of its own, twice: the first time may have files to write and perplexities to
measure. What counts is the most that was resident, less what the imports alone take, against the packed weights
and the pool; of the pool nothing is resident before it is used. Then `carousel serve` is started, and timed until
it takes requests.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.builds import in_build
from benchmarks.own_server import own_server
from benchmarks.peers.models import MODELS
from scheduler.machine.processor import VARIABLE, instruction_set

POOL = "256MiB"
MOST = 1.2
"""Times the weights and the pool."""
READY_SECONDS = 10
MIB = 2**20


def models() -> dict[str, str]:
    """What can be measured, by a short name: names that Carousel fetches, and files that were made here."""
    found = {key: model.name for key, model in MODELS.items() if model.name is not None}
    folder = MODELS["llama-1b"].folder
    for form in ("safetensors", "published.gguf", "q4_0.gguf"):
        if (folder / form).exists():
            found[f"llama-1b-{form.removesuffix('.gguf').replace('published', 'gguf')}"] = str(folder / form)
    return found


def status(field: str) -> int:
    """Bytes, of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"this kernel's /proc/self/status has no {field}")


def load_here(model: str) -> dict[str, Any]:
    """Load it in this process, which did nothing else."""
    from scheduler.config import EngineConfig
    from scheduler.kernels.native import kernels
    from scheduler.models.files.model_source import resolve_model
    from scheduler.process.engine_core import EngineCore

    config = EngineConfig(model=model, kv_cache_memory=POOL)
    path = resolve_model(model)
    kernels()
    importlib.import_module("scheduler.models.checks.fused_probe")  # with transformers' modules: a first load's
    imports = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the most that was resident is counted from here
    start = time.perf_counter()
    core = EngineCore(config, path)
    seconds = time.perf_counter() - start
    info = core.info
    return {
        "imports": imports,
        "peak": status("VmHWM") - imports,
        "from_file": status("RssFile"),
        "weights": info.weights_bytes,
        "pool": core.executor.cache.nbytes,
        "products": info.products,
        "seconds": seconds,
    }


def ready_seconds(model: str) -> float:
    start = time.perf_counter()
    with own_server("--model", model, "--kv-cache-memory", POOL):
        return time.perf_counter() - start


def main() -> int:
    known = models()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", choices=list(known), default=list(known), metavar="NAME",
        help=f"of {', '.join(known)} (default: all); `python -m benchmarks.shapes` makes llama-1b's",
    )  # fmt: skip
    parser.add_argument("--here", metavar="MODEL", help="load this in this process only, printed as JSON")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(load_here(args.here)))
        return 0
    print(f"on {instruction_set()}, a pool of {POOL}; MiB, without what the imports take")
    print(
        "  model                  products  start    weights    pool    peak  of weights  of both  goal  loading s"
    )
    is_well = True
    for name in tqdm(args.models, desc="memory", unit="model", leave=False):
        for start in ("first", "second"):
            found = in_build("benchmarks.memory", os.environ.get(VARIABLE), ["--here", known[name]])
            both = found["weights"] + found["pool"]
            is_well = is_well and found["peak"] <= MOST * both
            shares = [found["peak"] / found["weights"], found["peak"] / both]
            sizes = [found[part] / MIB for part in ("weights", "pool", "peak")]
            tqdm.write(
                f"  {name:<22} {found['products']:<9} {start:<7}{sizes[0]:9.0f} {sizes[1]:7.0f} {sizes[2]:7.0f} "
                f"{shares[0]:11.2f} {shares[1]:8.2f} {MOST:5.1f} {found['seconds']:10.1f}"
            )
        seconds = ready_seconds(known[name])
        is_well = is_well and seconds <= READY_SECONDS
        tqdm.write(f"  {name:<22} ready to serve after {seconds:.1f} s (goal: {READY_SECONDS})")
    return 0 if is_well else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(f"memory: {' '.join(error.cmd)} failed")
