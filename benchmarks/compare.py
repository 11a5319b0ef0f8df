"""`make compare`: the same chats to Carousel and its peers, in one run, taking turns.

What is asked is real text (`benchmarks.asked`), at a temperature of 0.7 with seeds, and answers end where the
model ends them: guesses pay on text that goes round in circles, so how much of the answers does is in the table.
Carousel is there with guesses and without, llama.cpp too.

All servers are up at once, and all but the one whose turn it is are stopped (SIGSTOP), so that they cost nothing.
Each turn is kept as it ends: what was cut off goes on where it was, and a comparison can be made in pieces, some
servers at a time. Processors with AVX-512 and those with AVX2 only have a comparison each
(docs/comparison-avx512.*, -avx2.*); CAROUSEL_CPU=avx2 makes that of AVX2 on one with AVX-512, and holds the peers
to it where they have a switch.

    python -m benchmarks.compare --prepare      # installs and converts what is missing, and ends
    python -m benchmarks.compare
    python -m benchmarks.compare --servers carousel,carousel-plain --rounds 1 --again
    python -m benchmarks.compare --table        # only puts together what is kept
    python -m benchmarks.compare --model qwen
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.asked import asked
from benchmarks.kept import Kept, Turn
from benchmarks.peers.catalogue import CAROUSEL, PEERS, Load, Peer, Service
from benchmarks.peers.installing import PeerError
from benchmarks.peers.models import MODELS, Model
from benchmarks.peers.running import Server, prepare, running
from benchmarks.processor import Processor, ProcessorError, processor
from server.bench.load import RunResult
from server.bench.report import Slo, summarise
from server.bench.workload import LoadRequest

Row = dict[str, Any]


class Comparison:
    """Which turns there are to be, and those that were."""

    def __init__(self, args: argparse.Namespace, kept: Kept) -> None:
        self._args = args
        self._kept = kept
        self._most = MODELS[args.model].most

    def missing(self, server: str) -> list[tuple[int, int]]:
        """The round and the concurrency of each turn that a server has yet to have."""
        turns = {
            concurrency: {turn.number for turn in self._kept.of(server, concurrency)}
            for concurrency in self._args.concurrency
        }
        return [
            (number, concurrency)
            for number in range(self._args.rounds)
            for concurrency in self._args.concurrency
            if number not in turns[concurrency]
        ]

    def requests(self, number: int, concurrency: int) -> list[LoadRequest]:
        """The same for all servers, others in each round."""
        count = self._args.requests or max(12, 3 * concurrency)
        return asked(count, seed=self._args.seed + number, most=self._most)

    def measure(self, servers: list[Server]) -> None:
        """Give every server its turns; their order turns around with each round."""
        wanted = {server.peer.name: set(self.missing(server.peer.name)) for server in servers}
        turns = [
            (number, concurrency, server)
            for number in range(self._args.rounds)
            for concurrency in self._args.concurrency
            for server in (servers if number % 2 == 0 else servers[::-1])
            if (number, concurrency) in wanted[server.peer.name]
        ]
        for number, concurrency, server in (bar := tqdm(turns, desc="comparing", unit="turn")):
            bar.set_postfix_str(f"{server.peer.name}, C={concurrency}")
            self._kept.add(self._turn(server, number, concurrency))

    def _turn(self, server: Server, number: int, concurrency: int) -> Turn:
        with server.turn() as plain:
            client = plain.chatting()
            warm_up = asked(concurrency, seed=self._args.seed + 999, most=WARM_UP)
            asyncio.run(client.closed_loop(warm_up, concurrency))
            result = asyncio.run(client.closed_loop(self.requests(number, concurrency), concurrency))
        return Turn(server.peer.name, concurrency, number, settings(self._args), server.bits, result)

    def rows(self) -> list[Row]:
        """Of all servers that have had turns at every concurrency."""
        whole = [name for name in PEERS if all(self._kept.of(name, each) for each in self._args.concurrency)]
        return [self._row(name, concurrency) for name in whole for concurrency in self._args.concurrency]

    def _row(self, name: str, concurrency: int) -> Row:
        model, turns = MODELS[self._args.model], self._kept.of(name, concurrency)
        load = f"C={concurrency}"
        merged = RunResult(
            [outcome for turn in turns for outcome in turn.result.outcomes],
            sum(turn.result.duration for turn in turns),
        )
        row: Row = {
            "server": name,
            "engine": PEERS[name].engine,
            "precision": PEERS[name].precision(model),
            "bits_a_weight": turns[-1].bits,
            "concurrency": concurrency,
            "measured": turns[-1].day,
            "each_round": [summarise(load, turn.result, Slo()).output_tokens_per_second for turn in turns],
        }
        return row | summarise(load, merged, Slo()).to_json()


WARM_UP = 32
"""Tokens of an answer that is not measured."""


def settings(args: argparse.Namespace) -> str:
    """What decides a turn beside its server, round and concurrency."""
    requests = args.requests or "3 a seat"
    flags = f", flags {args.flags}" if args.flags else ""
    return f"answers of up to {MODELS[args.model].most} tokens, requests {requests}, seed {args.seed}{flags}"


def _best(rows: Sequence[Row], concurrency: int) -> Row | None:
    """The best row of any peer that answered everything."""
    peers = [
        row
        for row in rows
        if row["concurrency"] == concurrency and row["engine"] != CAROUSEL and not row["num_errors"]
    ]
    return max(peers, key=lambda row: float(row["output_tokens_per_second"]), default=None)


def markdown(rows: Sequence[Row], concurrencies: Sequence[int], *, is_held: bool) -> str:
    """The table of docs/benchmarks.md: output tokens per second, the best peer's in bold, and latencies at the
    highest concurrency."""
    top = concurrencies[-1]
    head = ["server", "precision", "bits a weight", *(f"C={c}" for c in concurrencies)]
    head += ["circles", f"TTFT p50 / p99, C={top}", f"ITL p50 / p99, C={top}"]
    lines = ["| " + " | ".join(head) + " |", "| --- | --- |" + " --- |" * (len(head) - 2)]
    unheld: list[str] = []
    for name, peer in PEERS.items():
        found = {row["concurrency"]: row for row in rows if row["server"] == name}
        if not found:
            continue
        first = found[top]
        mark = ""
        if is_held and peer.not_held:
            note = f"{peer.engine}: no switch holds {peer.not_held} to AVX2"
            unheld += [note] if note not in unheld else []
            mark = "*" * (unheld.index(note) + 1)
        bits = "-" if first["bits_a_weight"] is None else f"{first['bits_a_weight']:.1f}"
        cells = [peer.engine + mark.replace("*", r"\*"), first["precision"], bits]
        for concurrency in concurrencies:
            row = found[concurrency]
            figure = f"{row['output_tokens_per_second']:.0f}"
            figure = f"**{figure}**" if row is _best(rows, concurrency) else figure
            cells.append(figure + (f" ({row['num_errors']} failed)" if row["num_errors"] else ""))
        ttft, itl = first["ttft"], first["itl"]
        cells.append(f"{max(row['circles'] for row in found.values()):.0%}")
        cells.append(f"{ttft['p50']:.2f} / {ttft['p99']:.2f} s" if peer.has_server else "-")
        cells.append(f"{1000 * itl['p50']:.0f} / {1000 * itl['p99']:.0f} ms" if peer.has_server else "-")
        lines.append("| " + " | ".join(cells) + " |")
    notes = [r"\*" * (number + 1) + " " + note + "." for number, note in enumerate(unheld)]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def ratios(rows: Sequence[Row]) -> str:
    """How each of Carousel's rows compares with the best peer at the same concurrency."""
    lines = []
    for row in rows:
        best = _best(rows, row["concurrency"])
        if row["engine"] == CAROUSEL and best is not None:
            ratio = row["output_tokens_per_second"] / best["output_tokens_per_second"]
            lines.append(f"C={row['concurrency']}: {row['server']} is {ratio:.2f} times {best['server']}")
    return "\n".join(lines)


def draw(rows: Sequence[Row], concurrencies: Sequence[int], file: Path) -> None:
    """Bars of throughput, a group for each concurrency."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    names = [name for name in PEERS if any(row["server"] == name for row in rows)]
    labels = {row["server"]: f"{row['engine']}, {row['precision'].partition(',')[0]}" for row in rows}
    figure, panels = plt.subplots(
        1,
        len(concurrencies),
        figsize=(11, 1 + 0.34 * len(names)),
        constrained_layout=True,
        squeeze=False,
    )
    for axes, concurrency in zip(panels[0], concurrencies, strict=True):
        values = {
            row["server"]: row["output_tokens_per_second"] for row in rows if row["concurrency"] == concurrency
        }
        colors = ["#f2a33a" if PEERS[name].engine == CAROUSEL else "#9db4cc" for name in names]
        bars = axes.barh(names[::-1], [values[name] for name in names[::-1]], color=colors[::-1])
        axes.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
        axes.set_title(f"{concurrency} at once" if concurrency > 1 else "one at a time", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(0, 1.15 * max(values.values()))
        axes.set_yticks(range(len(names)), [labels[name] for name in names[::-1]], fontsize=8)
        if axes is not panels[0][0]:
            axes.set_yticklabels([])
    figure.supxlabel("output tokens per second", fontsize=9)
    figure.savefig(file, dpi=120)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="default", help="(default: the default model)")
    parser.add_argument("--servers", help=f"of {', '.join(PEERS)} (default: those that suit the model)")
    parser.add_argument("--concurrency", help="requests in flight, as 1,8,32 (default: what suits the model)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each server (default: 2)")
    parser.add_argument("--requests", type=int, help="of each turn (default: 3 a seat, at least 12)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed sends the same requests (default: 0)")
    parser.add_argument("--flags", default="", help='more flags of `carousel serve`, as "--max-num-seqs 32"')
    parser.add_argument("--prepare", action="store_true", help="install and convert what is missing, and end")
    parser.add_argument("--table", action="store_true", help="only put together what is kept")
    parser.add_argument("--again", action="store_true", help="measure the servers anew, whatever is kept of them")
    parser.add_argument(
        "--kept", type=Path, default=Path("build/compare"), help="folder for single turns (default: build/compare)"
    )
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder for the results (default: docs)")
    args = parser.parse_args()
    model = MODELS[args.model]
    args.servers = args.servers.split(",") if args.servers else [name for name in model.servers if name in PEERS]
    if unknown := set(args.servers) - set(PEERS):
        parser.error(f"unknown servers: {', '.join(sorted(unknown))}")
    try:
        text = args.concurrency.split(",") if args.concurrency else model.concurrency
        args.concurrency = [int(part) for part in text]
    except ValueError:
        parser.error(f"--concurrency: expected numbers with commas between them, not {args.concurrency!r}")
    return args


def main() -> int:
    args = _arguments()
    try:
        here = processor()
    except ProcessorError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 1
    model = MODELS[args.model]
    load = Load(model, here, seats=max(args.concurrency), flags=tuple(shlex.split(args.flags)))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers, paused or not, are ended too
    kept = Kept(args.kept / f"{_key(model, here)}.jsonl", settings(args))
    if args.again:
        kept.forget(args.servers)
    comparison = Comparison(args, kept)
    wanted = [] if args.table else [name for name in args.servers if args.prepare or comparison.missing(name)]
    ready = prepare(wanted, load)
    if args.prepare:
        return 0 if len(ready) == len(args.servers) else 1

    with ExitStack() as stack:
        comparison.measure(start(stack, ready, load))
    write(args, comparison.rows(), here)
    return 0


def start(stack: ExitStack, ready: Sequence[tuple[Peer, Service]], load: Load) -> list[Server]:
    """Those that can be started, each paused after it has answered some requests."""
    servers = []
    for peer, service in tqdm(ready, desc="starting", unit="server"):
        try:
            server = stack.enter_context(running(peer, service, load))
        except PeerError as error:
            tqdm.write(f"{peer.name} is left out: {error}", file=sys.stderr)
            continue
        with server.turn() as client:
            asyncio.run(client.chatting().closed_loop(asked(4, seed=1, most=WARM_UP), 2))
        servers.append(server)
    return servers


def write(args: argparse.Namespace, rows: list[Row], here: Processor) -> None:
    """The table, the picture and the figures of what has been measured."""
    if not rows:
        print("compare: no server has had all its turns", file=sys.stderr)
        return
    model = MODELS[args.model]
    text, verdict = markdown(rows, args.concurrency, is_held=here.is_held), ratios(rows)
    print(f"{text}\n\n{verdict}")
    args.output.mkdir(parents=True, exist_ok=True)
    name = f"comparison-{_key(model, here)}"
    facts = {
        "model": model.title,
        "load": settings(args),
        "date": str(date.today()),
        "processor": here.to_json(),
        "rows": rows,
    }
    about = f"In bold: the best peer's. {model.title}, {settings(args)}, {date.today()}, {here}."
    (args.output / f"{name}.md").write_text(f"{text}\n\n{about} Made by `make compare`.\n")
    (args.output / f"{name}.json").write_text(json.dumps(facts, indent=2) + "\n")
    draw(rows, args.concurrency, args.output / f"{name}.png")


def _key(model: Model, here: Processor) -> str:
    return here.kind if model.key == "default" else f"{here.kind}-{model.key}"


if __name__ == "__main__":
    sys.exit(main())
