"""`make compare`: the same requests against Carousel and its peers, in one run, taking turns.

All servers are up at once, and all but the one whose turn it is are stopped (SIGSTOP), so that they cost nothing.
Processors with AVX-512 and those with AVX2 only have a comparison each (docs/comparison-avx512.*, -avx2.*);
CAROUSEL_CPU=avx2 makes that of AVX2 on one with AVX-512, and holds the peers to it where they have a switch.

    python -m benchmarks.compare --prepare      # installs and converts what is missing, and ends
    python -m benchmarks.compare
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

from benchmarks.peers.catalogue import CAROUSEL, PEERS, Load
from benchmarks.peers.installing import PeerError
from benchmarks.peers.models import MODELS
from benchmarks.peers.running import Server, prepare, running
from benchmarks.processor import ProcessorError, processor
from server.bench.load import RunResult
from server.bench.report import Slo, Summary, summarise
from server.bench.workload import make_requests

Row = dict[str, Any]


def measure(
    servers: list[Server], load: Load, concurrencies: Sequence[int], rounds: int, requests: int | None, seed: int
) -> list[Row]:
    """Give every server its turn at every concurrency, `rounds` times; the order turns around each time."""
    workload = load.model.workload
    results: dict[tuple[str, int], list[tuple[Summary, RunResult]]] = {}
    turns = [
        (server, concurrency, number)
        for number in range(rounds)
        for concurrency in concurrencies
        for server in (servers if number % 2 == 0 else servers[::-1])
    ]
    for server, concurrency, number in (bar := tqdm(turns, desc="comparing", unit="turn")):
        bar.set_postfix_str(f"{server.peer.name}, C={concurrency}")
        with server.turn() as client:
            warm_up = make_requests(workload, concurrency, seed=seed + 999)
            asyncio.run(client.closed_loop(warm_up, concurrency))
            sent = make_requests(workload, requests or max(8, 3 * concurrency), seed=seed + number)
            result = asyncio.run(client.closed_loop(sent, concurrency))
        summary = summarise(f"C={concurrency}", result, Slo())
        results.setdefault((server.peer.name, concurrency), []).append((summary, result))
    bits = {server.peer.name: server.bits for server in servers}
    rows: list[Row] = []
    for (name, concurrency), runs in results.items():
        merged = RunResult(
            [outcome for _, result in runs for outcome in result.outcomes],
            sum(result.duration for _, result in runs),
        )
        row: Row = {
            "server": name,
            "engine": PEERS[name].engine,
            "precision": PEERS[name].precision(load.model),
            "bits_a_weight": bits[name],
            "concurrency": concurrency,
            "each_round": [summary.output_tokens_per_second for summary, _ in runs],
        }
        rows.append(row | summarise(f"C={concurrency}", merged, Slo()).to_json())
    return rows


def _best(rows: Sequence[Row], concurrency: int) -> Row | None:
    """The best row of any peer that answered everything."""
    peers = [
        row
        for row in rows
        if row["concurrency"] == concurrency and row["engine"] != CAROUSEL and not row["num_errors"]
    ]
    return max(peers, key=lambda row: float(row["output_tokens_per_second"]), default=None)


def markdown(rows: Sequence[Row], concurrencies: Sequence[int], *, is_held: bool) -> str:
    """The README's table: output tokens per second, the best peer's in bold, and latencies at the highest
    concurrency."""
    top = concurrencies[-1]
    head = ["server", "precision", "bits a weight", *(f"C={c}" for c in concurrencies)]
    head += [f"TTFT p50 / p99, C={top}", f"ITL p50 / p99, C={top}"]
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
    parser.add_argument("--requests", type=int, help="of each turn (default: 3 a seat, at least 8)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed sends the same requests (default: 0)")
    parser.add_argument("--flags", default="", help='more flags of `carousel serve`, as "--max-num-seqs 32"')
    parser.add_argument("--prepare", action="store_true", help="install and convert what is missing, and end")
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
    ready = prepare(args.servers, load)
    if args.prepare:
        return 0 if len(ready) == len(args.servers) else 1

    with ExitStack() as stack:
        servers = []
        for peer, service in tqdm(ready, desc="starting", unit="server"):
            try:
                server = stack.enter_context(running(peer, service, load))
            except PeerError as error:
                tqdm.write(f"{peer.name} is left out: {error}", file=sys.stderr)
                continue
            with server.turn() as client:
                asyncio.run(client.closed_loop(make_requests(model.workload, 4, seed=1), 2))
            servers.append(server)
        if not servers:
            print("compare: no server could be started", file=sys.stderr)
            return 1
        rows = measure(servers, load, args.concurrency, args.rounds, args.requests, args.seed)

    text, verdict = markdown(rows, args.concurrency, is_held=here.is_held), ratios(rows)
    print(f"{text}\n\n{verdict}")
    name = f"comparison-{here.kind}" if model.key == "default" else f"comparison-{here.kind}-{model.key}"
    args.output.mkdir(parents=True, exist_ok=True)
    about = f"{model.title}, workload {model.workload}, {args.rounds} rounds, {date.today()}, {here}"
    about += f", flags {args.flags}" if args.flags else ""
    facts = {
        "model": model.title,
        "workload": model.workload,
        "rounds": args.rounds,
        "date": str(date.today()),
        "flags": args.flags,
        "processor": here.to_json(),
        "rows": rows,
    }
    bold = "In bold: the best peer's."
    (args.output / f"{name}.md").write_text(f"{text}\n\n{bold} {about}. Made by `make compare`.\n")
    (args.output / f"{name}.json").write_text(json.dumps(facts, indent=2) + "\n")
    draw(rows, args.concurrency, args.output / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
