"""`make compare`: the same requests against Carousel and its peers, in one run, taking turns.

All servers are up at once, and all but the one whose turn it is are stopped (SIGSTOP), so that they cost nothing.

    python -m benchmarks.compare --help
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import aiohttp
from tqdm import tqdm

from benchmarks.load import LoadClient, RunResult
from benchmarks.peers.catalogue import PEERS, PEERS_FOLDER, Peer, PeerError
from benchmarks.report import Slo, Summary, summarise
from benchmarks.workload import make_requests
from scheduler.config import DEFAULT_MODEL
from scheduler.model_source import resolve_model

START_SECONDS = 300


class Server:
    """A peer that runs, and can be paused between its turns."""

    def __init__(self, peer: Peer, process: subprocess.Popen[bytes], url: str, model: str) -> None:
        self.peer = peer
        self.client = LoadClient(url, model, no_eos=peer.no_eos, keep_alive=peer.keep_alive)
        self._process = process

    def pause(self) -> None:
        os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self._process.pid, signal.SIGCONT)


@contextmanager
def running(peer: Peer, model: Path) -> Iterator[Server]:
    """Start a peer and wait until it answers. Raises `PeerError`."""
    folder = PEERS_FOLDER / peer.name
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "installed").exists():
        peer.install(folder, model)
        (folder / "installed").touch()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            peer.command(folder, model, port),
            env={**os.environ, **peer.environment},
            stdout=output,
            stderr=output,
            start_new_session=True,  # a process group of its own, to pause as one
        )
    try:
        url = f"http://127.0.0.1:{port}"
        names = asyncio.run(_wait_until_ready(url, process, "/v1/models" if peer.lists_models else "/health"))
        if names is None:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-8:])
            raise PeerError(f"it does not answer at {url} ({log}):\n{tail}")
        yield Server(peer, process, url, names["data"][0]["id"] if peer.lists_models else str(model))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGCONT)
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


async def _wait_until_ready(url: str, process: subprocess.Popen[bytes], path: str) -> Any:
    """Returns what the server answers there, or None if it ended or took too long."""
    deadline = time.monotonic() + START_SECONDS
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(aiohttp.ClientError, ValueError):
                async with session.get(url + path) as response:
                    if response.status == 200:
                        return await response.json()
            await asyncio.sleep(0.5)
    return None


def measure(servers: list[Server], concurrencies: list[int], rounds: int, seed: int) -> list[dict[str, object]]:
    """Give every server its turn at every concurrency, `rounds` times; the order turns around each time."""
    results: dict[tuple[str, int], list[tuple[Summary, RunResult]]] = {}
    turns = [
        (server, concurrency, number)
        for number in range(rounds)
        for concurrency in concurrencies
        for server in (servers if number % 2 == 0 else servers[::-1])
    ]
    for server, concurrency, number in tqdm(turns, desc="comparing", unit="turn"):
        server.resume()
        warm_up = make_requests("chat", concurrency, seed=seed + 999)
        asyncio.run(server.client.closed_loop(warm_up, concurrency))
        requests = make_requests("chat", max(8, 3 * concurrency), seed=seed + number)
        result = asyncio.run(server.client.closed_loop(requests, concurrency))
        server.pause()
        summary = summarise(f"C={concurrency}", result, Slo())
        results.setdefault((server.peer.name, concurrency), []).append((summary, result))
    rows: list[dict[str, object]] = []
    for (name, concurrency), runs in results.items():
        merged = RunResult(
            [outcome for _, result in runs for outcome in result.outcomes],
            sum(result.duration for _, result in runs),
        )
        summary = summarise(f"C={concurrency}", merged, Slo())
        rows.append({"server": name, "concurrency": concurrency, **summary.to_json()})
    return rows


def markdown(rows: list[dict[str, object]], concurrencies: list[int]) -> str:
    """The README's table: output tokens per second, and latencies at the highest concurrency."""
    top = concurrencies[-1]
    head = ["server", "precision", *(f"C={c}" for c in concurrencies)]
    head += [f"TTFT p50 / p99, C={top}", f"ITL p50 / p99, C={top}"]
    lines = ["| " + " | ".join(head) + " |", "| --- | --- |" + " --- |" * (len(head) - 2)]
    for peer in PEERS:
        found = {row["concurrency"]: row for row in rows if row["server"] == peer.name}
        if not found:
            continue
        cells = [peer.name, peer.precision]
        for concurrency in concurrencies:
            row = found[concurrency]
            failed = f" ({row['num_errors']} failed)" if row["num_errors"] else ""
            cells.append(f"{row['output_tokens_per_second']:.0f}{failed}")
        ttft, itl = found[top]["ttft"], found[top]["itl"]
        assert isinstance(ttft, dict)
        assert isinstance(itl, dict)
        cells.append(f"{ttft['p50']:.2f} / {ttft['p99']:.2f} s" if peer.has_server else "-")
        cells.append(f"{1000 * itl['p50']:.0f} / {1000 * itl['p99']:.0f} ms" if peer.has_server else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: list[dict[str, object]], concurrencies: list[int], file: Path) -> None:
    """Bars of throughput, a group for each concurrency."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    names = [peer.name for peer in PEERS if any(row["server"] == peer.name for row in rows)]
    figure, panels = plt.subplots(1, len(concurrencies), figsize=(11, 3.2), constrained_layout=True, squeeze=False)
    for axes, concurrency in zip(panels[0], concurrencies, strict=True):
        values = {
            str(row["server"]): float(str(row["output_tokens_per_second"]))
            for row in rows
            if row["concurrency"] == concurrency
        }
        colors = ["#f2a33a" if name.startswith("carousel") else "#9db4cc" for name in names]
        bars = axes.barh(names[::-1], [values[name] for name in names[::-1]], color=colors[::-1])
        axes.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
        axes.set_title(f"{concurrency} at once" if concurrency > 1 else "one at a time", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(0, 1.15 * max(values.values()))
        if axes is not panels[0][0]:
            axes.set_yticklabels([])
    figure.supxlabel("output tokens per second", fontsize=9)
    figure.savefig(file, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [peer.name for peer in PEERS]
    parser.add_argument("--servers", default=",".join(names), help=f"of {', '.join(names)} (default: all)")
    parser.add_argument("--concurrency", default="1,8,32", help="requests in flight (default: 1,8,32)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each server (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed sends the same requests (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder for comparison.{md,json,png}")
    args = parser.parse_args()
    concurrencies = [int(part) for part in args.concurrency.split(",")]
    wanted = args.servers.split(",")
    if unknown := set(wanted) - set(names):
        parser.error(f"unknown servers: {', '.join(sorted(unknown))}")
    model = Path(resolve_model(DEFAULT_MODEL))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers, paused or not, are ended too

    with ExitStack() as stack:
        servers = []
        for peer in tqdm([peer for peer in PEERS if peer.name in wanted], desc="starting", unit="server"):
            try:
                server = stack.enter_context(running(peer, model))
            except PeerError as error:
                print(f"{peer.name} is left out: {error}", file=sys.stderr)
                continue
            asyncio.run(server.client.closed_loop(make_requests("chat", 4, seed=1), 2))
            server.pause()
            servers.append(server)
        rows = measure(servers, concurrencies, args.rounds, args.seed)

    machine = f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    text = markdown(rows, concurrencies)
    print(text)
    args.output.mkdir(exist_ok=True)
    about = f"{DEFAULT_MODEL}, workload chat, {args.rounds} rounds, {date.today()}, {machine}"
    (args.output / "comparison.md").write_text(f"{text}\n\n{about}. Made by `make compare`.\n")
    (args.output / "comparison.json").write_text(json.dumps(rows, indent=2) + "\n")
    draw(rows, concurrencies, args.output / "comparison.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
