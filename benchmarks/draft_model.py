"""What a draft model brings: its guesses, how many are right, and the tokens/s with it and without.

    python -m benchmarks.draft_model

There is no smaller model of the default model's vocabulary, so drafts are made of its own first layers; and the
model guesses for itself, which is always right and never pays. Real text (`benchmarks.asked`) is answered in the
engine core of this process, without guesses and with them in turns; both must give the same tokens. Guesses from
the text are off. The engine decides how much it asks: where a draft model is seldom right, next to nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from benchmarks.builds import add_cpu_flag, print_tables
from benchmarks.speculation import Load
from scheduler.config import DEFAULT_MODEL
from scheduler.llm import LLM
from scheduler.messages import StepStats
from scheduler.models.files.model_source import resolve_model
from scheduler.models.model_config import read_config
from scheduler.models.modules.paged_model import load_model

KNOBS: dict[str, Any] = {"speculative": "off", "prefix_caching": False, "kv_cache_memory": "256MiB"}


class Counter:
    """Counts guesses, and those that were right."""

    def __init__(self) -> None:
        self.num_drafted = self.num_accepted = 0

    def step(self, plan: object, started: float, stats: StepStats, ended: object) -> None:
        self.num_drafted += stats.num_drafted
        self.num_accepted += stats.num_accepted


def first_layers(path: Path, count: int, folder: Path) -> None:
    """Write a model of another's first layers."""
    folder.mkdir()
    module = load_model(str(path), read_config(str(path)), torch.device("cpu")).module
    weights = {
        name: weight.contiguous()
        for name, weight in module.state_dict().items()
        if name != "lm_head.weight" and not any(f".layers.{layer}." in name for layer in range(count, 1000))
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": count}))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(path / name, folder)


def measure(layers: list[int], sizes: list[int], rounds: int, max_tokens: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    path = Path(resolve_model(DEFAULT_MODEL))
    with (
        tempfile.TemporaryDirectory(prefix="carousel-draft-") as scratch,
        tqdm(total=(len(layers) + 1) * len(sizes) * rounds, desc="runs of both", file=sys.stderr) as bar,
    ):
        plain = LLM(**KNOBS)
        for count in (*layers, None):
            folder = path if count is None else Path(scratch) / str(count)
            if count is not None:
                first_layers(path, count, folder)
            drafting = LLM(speculative_model=str(folder), **KNOBS)
            counter = Counter()
            drafting.engine.observers.append(counter)
            load = Load.chats({"off": plain, "model": drafting}, max_tokens)
            for size in sizes:
                counter.num_drafted = counter.num_accepted = 0
                speeds: dict[str, list[float]] = {"off": [], "model": []}
                for turn in range(rounds):
                    found = load.run(size, turn)
                    assert found["off"].answers == found["model"].answers, "guesses changed an answer"
                    for mode, run in found.items():
                        speeds[mode].append(run.speed)
                    bar.update()
                ratios = [with_draft / off for off, with_draft in zip(*speeds.values(), strict=True)]
                rows.append(
                    {
                        "draft": "the model itself" if count is None else f"its first {count} layers",
                        "at once": size,
                        "without": round(statistics.median(speeds["off"]), 1),
                        "with": round(statistics.median(speeds["model"]), 1),
                        "ratio": round(statistics.median(ratios), 2),
                        "guessed": counter.num_drafted,
                        "right": counter.num_accepted,
                    }
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[4, 10, 20], help="lengths of the drafts (default: 4 10 20)"
    )
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 8], help="answers at once (default: 1 8)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, in turns (default: 3)")
    parser.add_argument("--max-tokens", type=int, default=96, help="longest answer (default: 96)")
    parser.add_argument("--json", action="store_true", help="measure this build only, and print JSON")
    add_cpu_flag(parser)
    args = parser.parse_args()
    if args.json:
        print(json.dumps(measure(args.layers, args.at_once, args.rounds, args.max_tokens)))
        return
    flags = ["--json", "--layers", *map(str, args.layers), "--at-once", *map(str, args.at_once)]
    flags += ["--rounds", str(args.rounds), "--max-tokens", str(args.max_tokens)]
    print_tables("benchmarks.draft_model", args.cpu, flags, model=DEFAULT_MODEL, what="output tokens/s")


if __name__ == "__main__":
    main()
