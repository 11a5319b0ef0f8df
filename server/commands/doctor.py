"""`carousel doctor`: what this machine gives, and what would make it faster. It measures, and looks nothing up."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import platformdirs
import psutil

from scheduler.machine import container
from scheduler.machine.processor import available, instruction_set
from server.commands.ending import FAILED
from server.commands.strangers import strangers, told_of

if TYPE_CHECKING:
    from scheduler.kernels.library import Kernels

ROWS, SIZE = 64, 4096
"""Of the matrix that is measured, and of the weights [SIZE, SIZE]."""

SECONDS = 0.7
"""That each measurement takes."""

BUSY = 0.3
"""Of the cores: a load from which it is told that others use them."""


class Speed(msgspec.Struct, frozen=True):
    """In the best of its runs."""

    weights_per_second: float
    """Bytes, of a product with one row in 8 bits: what a single stream waits for."""
    multiply_adds_per_second: float
    """Of a product with 64 rows: what prompts wait for."""
    copied_per_second: float
    """Bytes of memory, read and written again."""


class Report(msgspec.Struct, frozen=True):
    processor: str
    instruction_sets: list[str]
    """That it has, the best first."""
    instruction_set: str
    """That is used."""
    cores: int
    usable_cores: float
    """With the container's quota."""
    load: float
    """Of the last minute: processes that ran or wanted to."""
    memory: int
    free_memory: int
    kernels: str
    """Where they are from; or why there are none."""
    has_kernels: bool
    compiler: str
    python: str
    torch: str
    transformers: str
    carousel: str
    speed: Speed
    files: str
    """Where models and what was built are kept."""
    files_bytes: int
    advice: list[str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `carousel doctor`, and the function that runs it."""
    parser.add_argument("--json", action="store_true", help="For programs.")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    report = examine()
    if args.json:
        print(msgspec.json.format(msgspec.json.encode(report)).decode())
    else:
        print(worded(report))
    return 0 if report.has_kernels and not strangers() else FAILED


def examine() -> Report:
    """Takes some three seconds of measuring. Where no kernels have been built yet, they are first."""
    import torch

    from scheduler.kernels.native import PREBUILT, NativeBuildError, kernels

    native: Kernels | None = None
    try:
        native = kernels()
        told = f"{'of the wheel' if native.file.is_relative_to(PREBUILT) else 'built here'}: {native.file}"
    except NativeBuildError as error:
        told = str(error).splitlines()[0]
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = len(allowed)
    free = container.free_memory()
    memory = psutil.virtual_memory()
    files = platformdirs.user_cache_path("carousel")
    report = Report(
        processor=_processor(),
        instruction_sets=available(),
        instruction_set=instruction_set(),
        cores=os.cpu_count() or cores,
        usable_cores=min(cores, container.cpu_quota() or cores),
        load=os.getloadavg()[0],
        memory=memory.total,
        free_memory=memory.available if free is None else min(memory.available, free),
        kernels=told,
        has_kernels=native is not None,
        compiler=_compiler(),
        python=platform.python_version(),
        torch=str(torch.__version__),
        transformers=version("transformers"),
        carousel=version("carousel-llm"),
        speed=_measure(native, cores),
        files=str(files),
        files_bytes=sum(file.stat().st_size for file in files.rglob("*") if file.is_file()),
        advice=[],
    )
    return msgspec.structs.replace(report, advice=list(_advice(report, has_cuda=torch.version.cuda is not None)))


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _compiler() -> str:
    name = os.environ.get("CXX", "c++")
    if shutil.which(name) is None:
        return ""
    said = subprocess.run([name, "--version"], capture_output=True, text=True, check=False).stdout
    return said.partition("\n")[0]


def _measure(native: Kernels | None, threads: int) -> Speed:
    import torch

    weights, one, many = torch.randn(SIZE, SIZE), torch.randn(1, SIZE), torch.randn(ROWS, SIZE)
    multiply: Callable[[torch.Tensor], object]
    if native is None:
        num_bytes = weights.nbytes

        def multiply(x: torch.Tensor) -> object:
            return x @ weights.T
    else:
        from scheduler.kernels.library import Product

        packed = native.pack([weights], None, "int8")
        num_bytes, product = packed.nbytes, Product(packed)

        def multiply(x: torch.Tensor) -> object:
            return product(x, num_threads=threads)

    source, target = torch.zeros(64 << 20, dtype=torch.uint8), torch.zeros(64 << 20, dtype=torch.uint8)
    return Speed(
        num_bytes / _best(lambda: multiply(one)),
        ROWS * SIZE * SIZE / _best(lambda: multiply(many)),
        2 * source.nbytes / _best(lambda: target.copy_(source)),
    )


def _best(run: Callable[[], object]) -> float:
    """The shortest of its runs, in seconds."""
    run()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while (started := time.perf_counter()) < end:
        run()
        best = min(best, time.perf_counter() - started)
    return best


def _advice(report: Report, *, has_cuda: bool) -> list[str]:
    advice = []
    if found := strangers():
        advice.append(told_of(found))
    if not report.has_kernels:
        advice.append(
            "install a C++ compiler (gcc 12 or newer), or a wheel of Carousel, which has the kernels inside"
        )
    if report.instruction_set != report.instruction_sets[0] and os.environ.get("CAROUSEL_CPU"):
        advice.append(f"CAROUSEL_CPU holds everything to {report.instruction_set}: unset it")
    if report.usable_cores < report.cores:
        advice.append(f"this process may use {report.usable_cores:g} of the machine's {report.cores} cores")
    if report.load > BUSY * report.cores:
        advice.append(f"other programs keep {report.load:.1f} cores busy, so that what was measured is less")
    if has_cuda and report.speed and not _has_gpu():
        advice.append("torch is a CUDA build, and there is no GPU: the CPU build is gigabytes smaller")
    return advice


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def worded(report: Report) -> str:
    """For people: a line for each thing."""
    speed, gib = report.speed, 1 << 30
    lines = {
        "processor": f"{report.processor}; {report.instruction_set}",
        "cores": f"{report.usable_cores:g} of {report.cores}, load {report.load:.1f}",
        "memory": f"{report.free_memory / gib:.1f} of {report.memory / gib:.1f} GiB are free",
        "kernels": report.kernels,
        "compiler": report.compiler or "none",
        "versions": f"carousel {report.carousel}, Python {report.python}, torch {report.torch}, "
        f"transformers {report.transformers}",
        "products": f"one row reads {speed.weights_per_second / 1e9:.1f} GB/s of weights, {ROWS} rows make "
        f"{speed.multiply_adds_per_second / 1e9:.0f} G multiply-adds/s "
        f"({'int8' if report.has_kernels else 'float32, torch'})",
        "bandwidth": f"{speed.copied_per_second / 1e9:.1f} GB/s copied",
        "files": f"{report.files}, {report.files_bytes / gib:.1f} GiB",
    }
    width = max(map(len, lines))
    told = [f"{name.rjust(width)}  {said}" for name, said in lines.items()]
    faster = [f"{'faster'.rjust(width)}  {each}" for each in report.advice]
    return "\n".join([*told, *faster])
