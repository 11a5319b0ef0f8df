"""Requests that no server should suffer from; `benchmarks.pressure` sends them from a process of its own."""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import select
import socket
import time
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from urllib.parse import urlsplit

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MAX_SECONDS = 30.0
"""That one case may take."""


@dataclass(frozen=True)
class Target:
    """The server, and the key of the user who is hostile."""

    url: str
    metrics_url: str
    key: str
    other_key: str
    """Of somebody who is not."""

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        assert parts.port is not None
        return parts.hostname, parts.port

    def head(self, path: str, length: int) -> bytes:
        """The beginning of a request, for those who write the rest themselves."""
        return (
            f"POST {path} HTTP/1.1\r\nHost: {urlsplit(self.url).netloc}\r\nAuthorization: Bearer {self.key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        ).encode()


@dataclass(frozen=True)
class Result:
    """What came of a case."""

    answer: str
    seconds: float
    """Until the answer, or all of them."""


Attack = Callable[[Target], Result]


def post(path: str, body: bytes, headers: Mapping[str, str] | None = None) -> Attack:
    """One request."""

    def attack(target: Target) -> Result:
        started = time.perf_counter()
        connection = http.client.HTTPConnection(*target.address, timeout=MAX_SECONDS)
        own = {"Authorization": f"Bearer {target.key}", "Content-Type": "application/json"}
        try:
            connection.request("POST", path, body, {**own, **(headers or {})})
            response = connection.getresponse()
            answer = f"{response.status} {_message(response.read())}"
        except OSError as error:
            answer = type(error).__name__
        finally:
            connection.close()
        return Result(answer, time.perf_counter() - started)

    return attack


def _message(answer: bytes) -> str:
    """Why it was refused, if it was."""
    error: str = json.loads(answer).get("error", {}).get("message", "")
    return error[:60]


def completion(**fields: object) -> Attack:
    return post(COMPLETIONS, json.dumps({"max_tokens": 1, **fields}).encode())


def many_fields(number: int, before: str, after: str) -> bytes:
    return (before + ",".join(f'"x{place}":1' for place in range(number)) + after).encode()


def bomb(encoding: str, mebibytes: int) -> Attack:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31 if encoding == "gzip" else 15)
    body = b"".join(packer.compress(b" " * 2**20) for _ in range(mebibytes)) + packer.flush()
    return post(COMPLETIONS, body, {"Content-Encoding": encoding})


def half_sent(number: int) -> Attack:
    """So many bodies that do not end. Answered when the server has ended them all."""

    return many(number, lambda target: status_of(target, target.head(COMPLETIONS, 100) + b'{"prompt":'))


def unread(number: int) -> Attack:
    """So many streams of 2,000 tokens that nobody reads. Answered when the server has ended them all. With
    logprobs, so that what the system keeps for the client is soon full."""
    body = json.dumps(
        {"prompt": "On", "max_tokens": 2000, "ignore_eos": True, "stream": True, "logprobs": 5}
    ).encode()

    def attack(target: Target) -> Result:
        started = time.perf_counter()
        poller = select.poll()
        with ExitStack() as stack:
            for _ in range(number):
                client = stack.enter_context(socket.socket())
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # soon full
                client.connect(target.address)
                client.sendall(target.head(COMPLETIONS, len(body)) + body)
                poller.register(client, 0)  # tells only when it has ended
            left = number
            while left and (seconds := started + MAX_SECONDS - time.perf_counter()) > 0:
                for descriptor, _ in poller.poll(1000 * seconds):
                    poller.unregister(descriptor)
                    left -= 1
        answer = f"{number - left} ended, {left} still there"
        return Result(answer, time.perf_counter() - started)

    return attack


def broken(number: int) -> Attack:
    """So many messages that are no HTTP."""
    messages = [b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /\r\nHost\r\n\r\n"]
    turn = iter(range(number))

    return many(number, lambda target: status_of(target, messages[next(turn) % len(messages)]), at_once=20)


async def status_of(target: Target, message: bytes) -> str:
    """What a connection is answered to these bytes: a status, or how it ended without one."""
    reader, writer = await asyncio.open_connection(*target.address)
    writer.write(message)
    try:
        return (await reader.readline()).decode()[9:12] or "closed"
    except ConnectionError:
        return "reset"
    finally:
        writer.close()


def slow_heads(number: int) -> Attack:
    """So many requests whose head comes a line a second (slowloris); after five seconds their senders give up."""

    async def one(target: Target) -> str:
        _, writer = await asyncio.open_connection(*target.address)
        writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
        for _ in range(5):
            await asyncio.sleep(1)
            writer.write(b"X: y\r\n")
        writer.close()
        return "gave up"

    return many(number, one)


def streams(number: int) -> Attack:
    """So many streams at once, each read to its end."""
    body = json.dumps({"prompt": "a b", "max_tokens": 4, "stream": True}).encode()

    async def one(target: Target) -> str:
        reader, writer = await asyncio.open_connection(*target.address)
        writer.write(target.head(COMPLETIONS, len(body)) + body)
        status = (await reader.readline()).decode()[9:12]
        try:
            await reader.readuntil(b"[DONE]" if status == "200" else b"}}")
        except asyncio.IncompleteReadError:
            return f"{status}, cut off"
        finally:
            writer.close()
        return status

    return many(number, one)


def nonsense(number: int) -> Attack:
    """So many bodies of random bytes."""
    source = random.Random(number)

    async def one(target: Target) -> str:
        body = source.randbytes(source.randrange(1, 300))
        return await status_of(target, target.head(source.choice((COMPLETIONS, CHAT)), len(body)) + body)

    return many(number, one, at_once=20)


def heads(number: int) -> Attack:
    """One request of so many header fields."""
    fields = b"".join(b"X-%d: y\r\n" % place for place in range(number))
    return many(1, lambda target: status_of(target, b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + fields))


def scrapes(number: int) -> Attack:
    """/metrics, so many times, one after another."""

    def attack(target: Target) -> Result:
        started = time.perf_counter()
        connection = http.client.HTTPConnection(urlsplit(target.metrics_url).netloc, timeout=MAX_SECONDS)
        for _ in range(number):
            connection.request("GET", "/metrics")
            response = connection.getresponse()
            response.read()
        connection.close()
        return Result(str(response.status), (time.perf_counter() - started) / number)

    return attack


def many(number: int, one: Callable[[Target], Awaitable[str]], at_once: int = 10_000) -> Attack:
    """So many clients; the answer counts what each came to."""

    async def all_of_them(target: Target) -> str:
        gate = asyncio.Semaphore(at_once)
        outcomes: Counter[str] = Counter()

        async def client() -> None:
            async with gate:
                outcomes[await one(target)] += 1

        tasks = [asyncio.create_task(client()) for _ in range(number)]
        await asyncio.wait(tasks, timeout=MAX_SECONDS)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if (waiting := number - outcomes.total()) > 0:
            outcomes["still there"] = waiting
        return ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())

    def attack(target: Target) -> Result:
        started = time.perf_counter()
        return Result(asyncio.run(all_of_them(target)), time.perf_counter() - started)

    return attack


def _message_with_fields(number: int) -> bytes:
    return many_fields(number, '{"messages":[{"role":"user","content":"a",', "}]}")


CASES: dict[str, Callable[[], Attack]] = {
    "a chat of 500,000 messages": lambda: post(
        CHAT, b'{"messages":[' + b",".join([b'{"role":"user","content":""}'] * 500_000) + b"]}"
    ),
    "a chat of 200,000 messages": lambda: post(
        CHAT, b'{"messages":[' + b",".join([b'{"role":"user","content":""}'] * 200_000) + b"]}"
    ),
    "a chat of 8,000 messages": lambda: post(
        CHAT, b'{"messages":[' + b",".join([b'{"role":"user","content":"a"}'] * 8_000) + b"]}"
    ),
    "1M unknown fields": lambda: post(COMPLETIONS, many_fields(1_000_000, '{"prompt":"a",', "}")),
    "500,000 unknown fields": lambda: post(COMPLETIONS, many_fields(500_000, '{"prompt":"a",', "}")),
    "500,000 in a message": lambda: post(CHAT, _message_with_fields(500_000)),
    "echo, n 128, 100,000 token ids": lambda: completion(prompt=[7] * 100_000, echo=True, n=128),
    "1M stop_token_ids, n 16": lambda: completion(prompt="a", n=16, stop_token_ids=list(range(1_000_000))),
    "1M token ids": lambda: completion(prompt=[7] * 1_000_000),
    "60 prompts of 8,000 token ids": lambda: completion(prompt=[[7] * 8_000] * 60),
    "a prompt of 10 MB, with spaces": lambda: completion(prompt="word " * 2_000_000),
    "a prompt of 10 MB, without": lambda: completion(prompt="wordless" * 1_250_000),
    "a prompt of 600 kB, with spaces": lambda: completion(prompt="word " * 120_000),
    "a prompt of 600 kB, without": lambda: completion(prompt="wordless" * 75_000),
    "a gzip bomb of 1 GiB": lambda: bomb("gzip", 1024),
    "a deflate bomb of 1 GiB": lambda: bomb("deflate", 1024),
    "2,048 prompts of one token": lambda: completion(prompt=[[7]] * 2048),
    "1,000 prompts of one token": lambda: completion(prompt=[[7]] * 1000),
    "20 logprobs, n 64, 60 tokens": lambda: completion(
        prompt="On and on", n=64, max_tokens=60, logprobs=20, ignore_eos=True
    ),
    "a schema that takes minutes": lambda: completion(
        prompt="a",
        guided_json={"allOf": [{"type": "string", "pattern": f"^(.*a.{{{n}}}b.*)+$"} for n in range(9, 20)]},
    ),
    "a regex of 10^9 states": lambda: completion(prompt="a", guided_regex="((a|b)*a(a|b){30}){1000}"),
    "a grammar of many parses": lambda: completion(
        prompt="a",
        max_tokens=60,
        temperature=1,
        guided_grammar='start: start start | "a" | "b" | start start start',
    ),
    "an enum of 9,000 names": lambda: completion(
        prompt="a", max_tokens=8, guided_json={"enum": [f"name {n * n}" for n in range(9000)]}
    ),
    "a response of 300,000 items": lambda: post(
        "/v1/responses", b'{"input":[' + b",".join([b'{"role":"user","content":""}'] * 300_000) + b"]}"
    ),
    "500,000 unknown fields of a message": lambda: post(
        "/v1/messages", many_fields(500_000, '{"max_tokens":1,"messages":[{"role":"user"}],', "}")
    ),
    "a message of 300,000 turns": lambda: post(
        "/v1/messages", b'{"max_tokens":1,"messages":[' + b",".join([b'{"role":"user"}'] * 300_000) + b"]}"
    ),
    "JSON 100,000 deep": lambda: post(COMPLETIONS, b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a prompt of 16 MB": lambda: completion(prompt="word " * 3_200_000),
    "a template that loops": lambda: post(
        CHAT,
        json.dumps(
            {
                "messages": [{"role": "user", "content": "a"}],
                "chat_template": "{% for i in range(10 ** 9) %}{% endfor %}",
            }
        ).encode(),
    ),
    "10,000 header fields": lambda: heads(10_000),
    "10,000 bodies of random bytes": lambda: nonsense(10_000),
    "500 slow heads": lambda: slow_heads(500),
    "900 streams at once": lambda: streams(900),
    "2,000 streams at once": lambda: streams(2000),
    "100 half-sent bodies": lambda: half_sent(100),
    "100 streams that nobody reads": lambda: unread(100),
    "1,000 broken HTTP messages": lambda: broken(1000),
    "/metrics with 100 users": lambda: scrapes(20),
}
