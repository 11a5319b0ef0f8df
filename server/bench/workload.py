"""What a load test sends: prompts, answer lengths, users and arrival times, all drawn from one seed."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Common words of English: about one token each, so that a length in words is nearly one in tokens.
_WORDS = """
the of and to in a is that for it as was with be by on not he his but at are this have from or had an
they which one you were all her she there would their we him been has when who will no more if out so up
said what its about than into them can only other time new some could these two may first then do any
like my now over such our man me even most made after also well many must before back through years much
where your way down
""".split()  # noqa: SIM905 (a list of 100 strings is no easier to read)


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """One request of a load test."""

    prompt: str
    max_tokens: int
    user: int = 0
    """Index among the users whose keys are given."""
    arrival: float | None = None
    """Seconds after the start, for a trace; None: the arrival process decides."""
    seed: int | None = None
    """Of the answer's random choices; None: none is sent."""
    system: str | None = None
    """The message before the prompt, in a chat; None: the model's own."""


class WorkloadError(ValueError):
    """A workload file that cannot be read; the message names the line."""


def _log_uniform(rng: random.Random, low: int, high: int) -> int:
    return round(math.exp(rng.uniform(math.log(low), math.log(high))))


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(_WORDS, k=count))


def _chat(rng: random.Random, index: int) -> LoadRequest:
    return LoadRequest(words(rng, _log_uniform(rng, 16, 384)), _log_uniform(rng, 16, 192))


def _short(rng: random.Random, index: int) -> LoadRequest:
    return LoadRequest(words(rng, _log_uniform(rng, 16, 128)), _log_uniform(rng, 16, 64))


def _summarise(rng: random.Random, index: int) -> LoadRequest:
    return LoadRequest(words(rng, rng.randint(400, 1200)), rng.randint(32, 128))


def _long_context(rng: random.Random, index: int) -> LoadRequest:
    return LoadRequest(words(rng, rng.randint(1500, 3000)), rng.randint(16, 64))


def _shared_prefix(rng: random.Random, index: int) -> LoadRequest:
    system = words(random.Random(0), 400)
    return LoadRequest(f"{system} {words(rng, rng.randint(16, 64))}", _log_uniform(rng, 16, 128))


def _multi_turn(rng: random.Random, index: int) -> LoadRequest:
    """Conversations of four turns: each turn's prompt is the one before it, and more."""
    conversation, turn = divmod(index, 4)
    history = random.Random(f"conversation {conversation}")
    return LoadRequest(
        " ".join(words(history, _log_uniform(history, 16, 128)) for _ in range(turn + 1)),
        _log_uniform(rng, 16, 96),
    )


WORKLOADS: dict[str, Callable[[random.Random, int], LoadRequest]] = {
    "chat": _chat,
    "short": _short,
    "summarise": _summarise,
    "long-context": _long_context,
    "shared-prefix": _shared_prefix,
    "multi-turn": _multi_turn,
}
"""chat: prompts of 16 to 384 words, answers of 16 to 192 tokens, both log-uniform. short:
16 to 128 words, 16 to 64 tokens, for models that take their time. summarise: 400 to 1,200 words,
32 to 128 tokens. long-context: 1,500 to 3,000 words, 16 to 64 tokens. shared-prefix: the same 400 words, then 16
to 64 of one's own. multi-turn: four turns, each with all that came before it."""


def make_requests(workload: str, count: int, *, seed: int, num_users: int = 1) -> list[LoadRequest]:
    """`count` requests of a named workload, dealt to the users in turn."""
    rng = random.Random(f"{workload} {seed}")
    made = (WORKLOADS[workload](rng, index) for index in range(count))
    return [
        LoadRequest(request.prompt, request.max_tokens, user=index % num_users)
        for index, request in enumerate(made)
    ]


def read_requests(file: Path, *, num_users: int = 1) -> list[LoadRequest]:
    """Requests from a JSONL file: one object a line with `prompt`, `max_tokens`, and if wanted `user` (an index),
    `timestamp` (seconds; a trace's arrival times) and `seed`. Raises `WorkloadError`."""
    requests = []
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        try:
            entry = json.loads(line)
            request = LoadRequest(
                str(entry["prompt"]),
                int(entry["max_tokens"]),
                int(entry.get("user", (number - 1) % num_users)),
                float(entry["timestamp"]) if "timestamp" in entry else None,
                int(entry["seed"]) if "seed" in entry else None,
            )
        except (ValueError, KeyError, TypeError) as error:
            raise WorkloadError(f"{file}, line {number}: expected prompt and max_tokens ({error!r})") from error
        if not 0 <= request.user < num_users:
            raise WorkloadError(f"{file}, line {number}: user {request.user}, but {num_users} users are given")
        requests.append(request)
    if not requests:
        raise WorkloadError(f"{file} has no requests")
    return requests


def arrival_times(process: str, requests: Sequence[LoadRequest], *, rate: float, seed: int) -> Iterator[float]:
    """When each request is sent, in seconds after the start, at `rate` requests a second on average.

    `poisson`: exponential gaps. `bursty`: gamma gaps of shape 1/4, so four times the variance. `constant`: equal
    gaps. `trace`: the requests' own timestamps.
    """
    rng = random.Random(f"arrivals {seed}")
    now = 0.0
    for request in requests:
        match process:
            case "poisson":
                now += rng.expovariate(rate)
            case "bursty":
                now += rng.gammavariate(0.25, 4 / rate)
            case "constant":
                now += 1 / rate
            case "trace":
                if request.arrival is None:
                    raise WorkloadError("--arrivals trace: every request needs a timestamp")
                now = request.arrival
            case _:
                raise ValueError(f"unknown arrival process {process!r}")
        yield now
