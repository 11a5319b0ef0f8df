"""What a crash costs: the engine is killed and stopped under load, and every answer is compared.

    python -m benchmarks.crashes

A real server with the default model, 32 streams at once. The engine's process is killed (SIGKILL) 20 times and
stopped (SIGSTOP) three times while they run, each time once it serves again. Every stream has to end complete,
with the text of an undisturbed run; a probe asks /health/live all the time, and is never refused a connection.
At the end the server gets a SIGTERM under load: all streams end complete, and its exit status is 0.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import sys
import time
from typing import NoReturn

import aiohttp
from tqdm import tqdm

from benchmarks.own_server import OwnServer, own_server
from benchmarks.processor import processor

SECONDS = 600.0
"""At most for one answer, with all the crashes in it."""


class Crashed:
    """A server under load, and what is done to it."""

    def __init__(self, server: OwnServer) -> None:
        self.server = server
        self.num_refused = 0
        self.num_probes = 0

    async def probe(self) -> None:
        """Ask all the time whether anybody is there, each time on a new connection."""
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
            while True:
                self.num_probes += 1
                try:
                    async with session.get(f"{self.server.url}/health/live") as response:
                        response.raise_for_status()
                except aiohttp.ClientError:
                    self.num_refused += 1
                await asyncio.sleep(0.02)

    async def outage(self, number: signal.Signals) -> float:
        """Send a signal to the engine, and return how many seconds it takes until another one is ready."""
        engine = self.server.engine()
        assert engine is not None
        started = time.perf_counter()
        engine.send_signal(number)
        async with aiohttp.ClientSession() as session:
            is_lost = False
            while True:
                async with session.get(f"{self.server.url}/health/ready") as response:
                    if response.status == 200 and is_lost:
                        return time.perf_counter() - started
                    is_lost = is_lost or response.status != 200
                await asyncio.sleep(0.02)


async def answer(
    session: aiohttp.ClientSession, url: str, number: int, max_tokens: int, bar: tqdm[NoReturn]
) -> str:
    """One stream's text; "" in place of one that does not end as it should."""
    body = {
        "prompt": f"Chapter {number}. In which we hear of",
        "max_tokens": max_tokens,
        "seed": number,
        "temperature": 0.8,
        "stream": True,
        "ignore_eos": True,
    }
    text, is_whole = "", False
    async with session.post(f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    print(event["error"], file=sys.stderr)
                    return ""
                text += event["choices"][0]["text"]
                bar.update()
            is_whole = is_whole or line.startswith(b"data: [DONE]")
    return text if is_whole else ""


async def answers(url: str, num_streams: int, max_tokens: int, title: str) -> list[str]:
    timeout = aiohttp.ClientTimeout(total=SECONDS)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        with tqdm(total=num_streams * max_tokens, desc=title, unit="token", file=sys.stderr) as bar:
            tasks = [answer(session, url, number, max_tokens, bar) for number in range(num_streams)]
            found = await asyncio.gather(*tasks, return_exceptions=True)
    return [each if isinstance(each, str) else repr(each) for each in found]


async def measure(server: OwnServer, num_kills: int, num_stops: int, num_streams: int, max_tokens: int) -> bool:
    crashed = Crashed(server)
    expected = await answers(server.url, num_streams, max_tokens, "undisturbed")
    probing = asyncio.create_task(crashed.probe())
    outages: dict[signal.Signals, list[float]] = {signal.SIGKILL: [], signal.SIGSTOP: []}
    plan = [signal.SIGKILL] * num_kills + [signal.SIGSTOP] * num_stops
    rounds: list[list[str]] = []
    while plan:
        running = asyncio.create_task(answers(server.url, num_streams, max_tokens, "disturbed"))
        await asyncio.sleep(1)
        while plan and not running.done():
            outages[plan[0]].append(await crashed.outage(plan[0]))
            del plan[0]
            await asyncio.sleep(2.5)
        rounds.append(await running)
    probing.cancel()
    same = [text == wanted for found in rounds for text, wanted in zip(found, expected, strict=True)]
    print(f"{processor().name}: {num_streams} streams of {max_tokens} tokens each, {len(rounds)} times")
    for number, seconds in outages.items():
        if seconds:
            median, listed = statistics.median(seconds), ", ".join(f"{each:.1f}" for each in seconds)
            print(f"{len(seconds)} times {number.name}: ready again after {median:.1f} s in the median ({listed})")
    print(f"{sum(same)} of {len(same)} streams ended complete with the text of an undisturbed run")
    print(f"{crashed.num_refused} of {crashed.num_probes} connections refused")
    running = asyncio.create_task(answers(server.url, num_streams, max_tokens, "at the end"))
    await asyncio.sleep(1)
    server.process.send_signal(signal.SIGTERM)
    whole = [text == wanted for text, wanted in zip(await running, expected, strict=True)]
    status = await asyncio.to_thread(server.process.wait, 60)
    print(f"SIGTERM under load: {sum(whole)} of {len(whole)} streams ended complete; exit status {status}")
    left = await asyncio.to_thread(lambda: [file.name for file in server.temporary.iterdir()])
    print(f"left in the temporary folder: {', '.join(left) or 'nothing'}")
    return all(same) and all(whole) and crashed.num_refused == 0 and status == 0 and not left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="times that the engine is killed (default: 20)")
    parser.add_argument("--stops", type=int, default=3, help="times that it is stopped (default: 3)")
    parser.add_argument("--streams", type=int, default=32, help="streams at once (default: 32)")
    parser.add_argument("--max-tokens", type=int, default=600, help="length of an answer (default: 600)")
    args = parser.parse_args()
    with own_server("--drain-timeout", "300") as server:
        is_well = asyncio.run(measure(server, args.kills, args.stops, args.streams, args.max_tokens))
    sys.exit(not is_well)


if __name__ == "__main__":
    main()
