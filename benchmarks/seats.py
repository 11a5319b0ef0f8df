"""Draws the carousel turning: who sits in which seat at each step of a real run (docs/seats.png).

python -m benchmarks.seats
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle
from tqdm import tqdm

from scheduler.config import EngineConfig
from scheduler.core.request import Request
from scheduler.models.files.model_source import resolve_model
from scheduler.process.engine_core import EngineCore
from scheduler.sampling_params import SamplingParams

WAITING, CHUNK, DECODE = "#d9d9d9", "#2f6db5", "#f2a33a"


@dataclass
class Turn:
    """What one step computed in one seat."""

    step: int
    seat: int
    request: int
    is_prompt: bool


def record(num_requests: int, num_seats: int) -> tuple[list[Turn], list[int]]:
    """Run requests of mixed lengths that arrive over time; returns every seat's turns, and the queue's length
    at each step."""
    config = EngineConfig(max_num_seqs=num_seats, max_batched_tokens=64, dtype="float32", max_model_len=512)
    core = EngineCore(config, resolve_model(config.model))
    rng = random.Random(3)
    turns: list[Turn] = []
    queue: list[int] = []
    arrivals = list(accumulate(rng.choice([0, 0, 2, 5, 12]) for _ in range(num_requests)))
    schedule = core.scheduler.schedule
    with tqdm(total=num_requests, desc="riding", unit="request") as bar:
        number = step = 0
        while number < num_requests or core.has_work:
            while number < num_requests and arrivals[number] <= step:
                prompt = [rng.randrange(100, 40_000) for _ in range(rng.choice([8, 20, 60, 180]))]
                params = SamplingParams(
                    max_tokens=rng.choice([10, 20, 40, 70]), temperature=0, ignore_eos=True, seed=0
                )
                core.add(Request(request_id=str(number), prompt_token_ids=prompt, params=params))
                number += 1
            if core.has_work:
                plan = schedule()
                for chunk in plan.chunks:
                    is_prompt = chunk.start < chunk.sequence.num_prompt_tokens
                    request = int(chunk.sequence.request.request_id)
                    turns.append(Turn(step, chunk.seat, request, is_prompt))
                result = core.executor.collect(core.executor.launch(plan.step_input()))
                gains = core.scheduler.commit(plan, result)
                bar.update(sum(gain.sequence.finish_reason is not None for gain in gains))
            queue.append(core.scheduler.num_waiting)
            step += 1
    return turns, queue


def draw(turns: list[Turn], queue: list[int], num_seats: int, file: Path) -> None:
    figure, (seats, waiting) = plt.subplots(
        2, 1, figsize=(11, 4.6), sharex=True, height_ratios=(4, 1), constrained_layout=True
    )
    for turn in turns:
        color = CHUNK if turn.is_prompt else DECODE
        seats.barh(turn.seat, 1.0, left=turn.step, height=0.86, color=color, linewidth=0)
    first = {turn.request: turn for turn in reversed(turns)}
    for turn in first.values():
        seats.vlines(turn.step, turn.seat - 0.43, turn.seat + 0.43, color="white", linewidth=2)
        seats.text(turn.step + 1.2, turn.seat, str(turn.request), va="center", fontsize=7, color="black")
    seats.set_ylim(-0.5, num_seats + 0.6)
    seats.set_yticks(range(num_seats))
    seats.set_ylabel("seat")
    seats.set_title("Each column is one step, one forward pass for all seats; one gets off, the next gets on")
    seats.legend(
        handles=[
            Rectangle((0, 0), 1, 1, color=CHUNK, label="a chunk of the prompt"),
            Rectangle((0, 0), 1, 1, color=DECODE, label="one token of the answer"),
        ],
        loc="upper right",
        ncols=2,
        frameon=False,
        fontsize=8,
    )
    waiting.fill_between(range(len(queue)), queue, step="post", color=WAITING)
    waiting.set_ylabel("waiting")
    waiting.set_xlabel("step")
    waiting.set_xlim(0, len(queue))
    for axes in (seats, waiting):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=26, help="how many requests ride (default: 26)")
    parser.add_argument("--seats", type=int, default=8, help="how many seats there are (default: 8)")
    parser.add_argument("--output", type=Path, default=Path("docs/seats.png"), help="the picture to write")
    args = parser.parse_args()
    turns, queue = record(args.requests, args.seats)
    draw(turns, queue, args.seats, args.output)
    print(f"{args.output}: {len(queue)} steps, {len(turns)} turns")


if __name__ == "__main__":
    main()
