"""A batch of many lines that is killed twice and resumed, and a guest beside it.

python -m benchmarks.batch                # 2,000 lines
python -m benchmarks.batch --lines 200

The batch belongs to a user of class low. Prints whether every line was answered once, and the guest's TTFT on an
idle server and beside the batch.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import aiohttp
from tqdm import tqdm

from benchmarks.own_server import CAROUSEL, OwnServer, own_server
from benchmarks.processor import processor

ASKS = 20
"""Of the guest, in each state."""


async def ttft(server: OwnServer, number: int) -> float:
    """Seconds to the guest's first token."""
    headers = {"Authorization": f"Bearer {server.keys['guest']}"}
    body = {"prompt": f"The guest asks for the {number}th time:", "max_tokens": 4, "stream": True}
    started = time.perf_counter()
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(server.url + "/v1/completions", json=body) as response,
    ):
        await response.content.readuntil(b"\n\n")
        return time.perf_counter() - started


def ask(server: OwnServer, first: int) -> list[float]:
    times = []
    for number in range(ASKS):
        times.append(asyncio.run(ttft(server, first + number)))
        time.sleep(0.2)
    return times


def count(target: Path) -> int:
    return target.read_bytes().count(b"\n") if target.exists() else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=2000, help="default: 2000")
    args = parser.parse_args()
    users = {"guest": 1.0, "batch": 1.0}
    print(processor())
    with tempfile.TemporaryDirectory() as folder, own_server(users=users, low=["batch"]) as server:
        source, target = Path(folder) / "in.jsonl", Path(folder) / "out.jsonl"
        with source.open("w") as file:
            for number in range(args.lines):
                body = {"prompt": f"Tell of number {number}:", "max_tokens": 24, "ignore_eos": True}
                line = {"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body}
                file.write(json.dumps(line) + "\n")
        ask(server, 1000)  # warm
        idle = ask(server, 0)
        beside: list[float] = []
        command = [str(CAROUSEL), "batch", str(source), str(target), "--url", server.url]
        for until in tqdm((args.lines // 3, 2 * args.lines // 3, args.lines), unit="run"):
            process = subprocess.Popen(
                command,
                env=os.environ | {"CAROUSEL_KEY": server.keys["batch"]},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            while count(target) < max(1, until - args.lines // 4) and process.poll() is None:
                time.sleep(0.05)
            beside += ask(server, 100 + until)
            while count(target) < until and process.poll() is None:
                time.sleep(0.05)
            if until < args.lines:
                process.kill()
            process.wait()
        times = Counter(json.loads(line)["custom_id"] for line in target.read_text().splitlines())
    once = sum(1 for number in range(args.lines) if times[str(number)] == 1)
    print(f"{once} of {args.lines} lines were answered once, after two kills")
    for name, found in (("idle", idle), ("beside the batch", beside)):
        median, worst = 1000 * statistics.median(found), 1000 * max(found)
        print(f"guest, {name}: TTFT {median:.0f} ms in the median, {worst:.0f} at worst")
    print(f"{statistics.median(beside) / statistics.median(idle):.2f} times in the median")
    return 0 if once == args.lines else 1


if __name__ == "__main__":
    sys.exit(main())
