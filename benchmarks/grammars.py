"""Which library holds answers to JSON schemas best: llguidance or xgrammar.

    git clone https://github.com/guidance-ai/jsonschemabench
    python -m benchmarks.grammars jsonschemabench/maskbench/data

For a sample of real schemas with valid and invalid instances: how long one takes to compile, and a mask to
compute; how many are refused; whether instances are told apart; what rolling back costs; how much of a text is
forced. A library that ends its process, or takes longer than is bearable, has crashed.
"""

from __future__ import annotations

import argparse
import os
import random
import select
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
from tqdm import tqdm

from benchmarks.grammar_engines import ENGINES, Trial
from benchmarks.peers.installing import xgrammar
from scheduler.config import DEFAULT_MODEL
from scheduler.models.files.model_source import resolve_model

BEARABLE = 20.0
"""Seconds for one schema and all of its instances."""

CRASHED = "crashed"
SLOW = "took too long"


class Worker:
    """A library in a process of its own, which is started again when it has died."""

    def __init__(self, python: Path, engine: str, model_path: str) -> None:
        self._command = [str(python), "-m", "benchmarks.grammar_engines", engine, model_path]
        self._process: subprocess.Popen[str] | None = None

    def trials(self, paths: Sequence[Path]) -> Iterator[Trial]:
        for path in paths:
            yield self._trial(path)
        self._end()

    def _trial(self, path: Path) -> Trial:
        if self._process is None:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"},
            )
            self._ask(Path(os.devnull), 300)  # until it has started
        if (answer := self._ask(path, BEARABLE)) in (CRASHED, SLOW):
            self._end()
            return Trial(str(path), error=answer)
        return msgspec.json.decode(answer, type=Trial)

    def _ask(self, path: Path, seconds: float) -> str:
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        try:
            print(path, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            return CRASHED
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            return SLOW
        return self._process.stdout.readline() or CRASHED

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def row(engine: str, trials: Sequence[Trial]) -> list[str]:
    """What the table says of a library."""
    compiled = [trial for trial in trials if trial.error is None]
    num_died = sum(trial.error in (CRASHED, SLOW) for trial in trials)
    compiling = np.array([trial.compiling for trial in compiled]) * 1e3
    masks = np.concatenate([np.array(trial.masks) for trial in compiled]) * 1e6
    rollbacks = np.concatenate([np.array(trial.rollbacks) for trial in compiled]) * 1e6
    valid = [accepted for trial in compiled for accepted in trial.valid]
    invalid = [accepted for trial in compiled for accepted in trial.invalid]
    right = sum(all(trial.valid) and not any(trial.invalid) for trial in compiled)
    return [
        engine,
        f"{len(compiled)} / {len(trials) - len(compiled) - num_died} / {num_died}",
        f"{right / len(trials):.1%}",
        f"{1 - np.mean(valid):.1%}",
        f"{np.mean(invalid):.1%}",
        _percentiles(compiling, "ms"),
        _percentiles(masks, "µs"),
        f"{np.max(masks) / 1e3:.1f} ms",
        f"{np.median(rollbacks):.0f} µs, {sum(trial.num_wrong_rollbacks for trial in compiled)}",
        f"{sum(trial.num_forced for trial in compiled) / sum(trial.num_characters for trial in compiled):.0%}",
    ]


HEADINGS = [
    "library",
    "compiled / refused / crashed",
    "told all instances apart",
    "valid ones refused",
    "invalid ones accepted",
    "compiling, p50 / p99",
    "mask, p50 / p99",
    "slowest mask",
    "rollback, wrong ones",
    "forced text",
]


def _percentiles(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]], unit: str) -> str:
    return f"{np.percentile(values, 50):.3g} / {np.percentile(values, 99):.3g} {unit}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="a folder of schemas in MaskBench's form")
    parser.add_argument("--schemas", type=int, default=1000, metavar="N", help="so many of them (default: 1000)")
    parser.add_argument("--model", default=DEFAULT_MODEL, help=f"whose tokenizer (default: {DEFAULT_MODEL})")
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES), metavar="ENGINE")
    parser.add_argument("--xgrammar-python", type=Path, help="of an environment that has it (default: make one)")
    args = parser.parse_args()
    paths = sorted(args.corpus.rglob("*.json"))
    sample = random.Random(0).sample(paths, min(args.schemas, len(paths)))
    print(f"| {' | '.join(HEADINGS)} |\n|{' --- |' * len(HEADINGS)}")
    for engine in args.engines:
        python = Path(sys.executable) if engine == "llguidance" else args.xgrammar_python or xgrammar()
        worker = Worker(python, engine, resolve_model(args.model))
        trials = list(tqdm(worker.trials(sample), total=len(sample), desc=engine, unit="schema", leave=False))
        print(f"| {' | '.join(row(engine, trials))} |", flush=True)


if __name__ == "__main__":
    main()
