"""More of what no server should suffer from: what waits for a disk, for a thread that all share or a mask; and
where `benchmarks.pressure` finds all of it."""

from __future__ import annotations

import asyncio
import http.client
import json
import resource
import time
from collections import Counter
from collections.abc import Callable

from benchmarks.hostile import CASES, CHAT, COMPLETIONS, MAX_SECONDS, Attack, Result, Target, many, status_of

RESPONSES, FILES, BATCHES, TOKENIZE = "/v1/responses", "/v1/files", "/v1/batches", "/tokenize"
AMBIGUOUS = "start: a\na: " + " | ".join(["a a", '"x"', *(" ".join("a" * length) for length in range(3, 10))])
PART = b'--b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n'


def ask(target: Target, method: str, path: str, body: bytes, kind: str = "application/json") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(*target.address, timeout=4 * MAX_SECONDS)
    headers = {"Authorization": f"Bearer {target.key}", "Content-Type": kind}
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def form(content: bytes) -> bytes:
    return PART % b"purpose" + b"batch\r\n" + PART % b"file" + content + b"\r\n--b--\r\n"


def batch(content: bytes) -> Attack:
    """A file of these lines, and a batch of it. Answered when that is done."""
    body = form(content)

    def attack(target: Target) -> Result:
        started = time.perf_counter()
        status, answer = ask(target, "POST", FILES, body, "multipart/form-data; boundary=b")
        said = f"file {status}"
        if status == 200:
            wish = {"input_file_id": json.loads(answer)["id"], "endpoint": COMPLETIONS, "completion_window": "24h"}
            status, answer = ask(target, "POST", BATCHES, json.dumps(wish).encode())
            found = json.loads(answer)
            while found.get("status") == "in_progress" and time.perf_counter() - started < 2 * MAX_SECONDS:
                time.sleep(0.25)
                found = json.loads(ask(target, "GET", f"{BATCHES}/{found['id']}", b"")[1])
            said += f", batch {status} " + (found.get("status") or found["error"]["message"][:40])
        return Result(said, time.perf_counter() - started)

    return attack


def several(number: int, path: str, body: Callable[[int], object], at_once: int = 10_000) -> Attack:
    """So many requests, each with a body of its own."""
    bodies = iter([json.dumps(body(place)).encode() for place in range(number)])

    async def one(target: Target) -> str:
        content = next(bodies)
        return await status_of(target, target.head(path, len(content)) + content)

    return many(number, one, at_once)


def stopped(number: int, path: str, num_bytes: int, kind: str = "application/json") -> Attack:
    """So many bodies of which so much comes, and no more. Answered when the server has ended them all."""
    content = b'{"prompt":"' + b"a" * num_bytes

    async def one(target: Target) -> str:
        head = target.head(path, num_bytes + 1000).replace(b"application/json", kind.encode())
        return await status_of(target, head + content)

    return many(number, one)


def uploads(number: int) -> Attack:
    """So many files at once."""
    content = form(b"{}")

    async def one(target: Target) -> str:
        head = target.head(FILES, len(content)).replace(b"application/json", b"multipart/form-data; boundary=b")
        return await status_of(target, head + content)

    return many(number, one)


def unread_pages(number: int) -> Attack:
    """So many connections that ask for the specification again and again, and read nothing for a while."""
    page = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"

    async def one(target: Target) -> str:
        _, writer = await asyncio.open_connection(*target.address, limit=1)
        writer.write(page * 50)
        await asyncio.sleep(3)
        writer.close()
        return "gave up"

    return many(number, one)


def schema(number: int, num_properties: int) -> dict[str, object]:
    fields = {f"field {number} {place}": {"type": "integer"} for place in range(num_properties)}
    return {"prompt": "a", "max_tokens": 1, "guided_json": {"type": "object", "properties": fields}}


def first_schema_behind_others(number: int, num_properties: int) -> Attack:
    """So many schemas of somebody's, and then a small one of the same user's neighbour. Answered with its time."""
    bodies = [json.dumps(schema(place, num_properties)).encode() for place in range(number)]
    small = json.dumps(schema(number, 2)).encode()

    async def all_of_them(target: Target) -> tuple[str, float]:
        def message(key: str, body: bytes) -> bytes:
            return target.head(COMPLETIONS, len(body)).replace(target.key.encode(), key.encode()) + body

        flood = [asyncio.create_task(status_of(target, message(target.key, body))) for body in bodies]
        await asyncio.sleep(0.5)
        started = time.perf_counter()
        status = await status_of(target, message(target.other_key, small))
        seconds = time.perf_counter() - started
        outcomes = Counter(await asyncio.gather(*flood))
        said = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
        return f"the neighbour's: {status}; others: {said}", seconds

    def attack(target: Target) -> Result:
        return Result(*asyncio.run(all_of_them(target)))

    return attack


FAULTS: dict[str, Callable[[], Attack]] = {
    "a batch of 200,000 bad lines": lambda: batch(b"x\n" * 200_000),
    "a batch of 50,000 bad lines": lambda: batch(b"x\n" * 50_000),
    "a batch of 30 MB of blank lines": lambda: batch(b"\n" * 30_000_000),
    "an ambiguous grammar, n 64": lambda: several(
        1,
        COMPLETIONS,
        lambda _: {"prompt": "a", "n": 64, "max_tokens": 60, "temperature": 1, "guided_grammar": AMBIGUOUS},
    ),
    "an ambiguous grammar that begins late, n 64": lambda: several(
        1,
        COMPLETIONS,
        lambda _: {
            "prompt": "a",
            "n": 64,
            "max_tokens": 400,
            "temperature": 1,
            "ignore_eos": True,
            "guided_grammar": 'start: /[a-z ]{300}/ a\na: a a | "x" | a a a | a a a a',
        },
    ),
    "60 uploads that do not come": lambda: stopped(60, FILES, 0, "multipart/form-data; boundary=b"),
    "200 bodies of 7.9 MB that stop": lambda: stopped(200, COMPLETIONS, 7_900_000 - 1100),
    "6 of 7 MB, truncated to a token": lambda: several(
        6, COMPLETIONS, lambda _: {"prompt": "the sun " * 875_000, "max_tokens": 1, "truncate_prompt_tokens": 1}
    ),
    "6 of 600 kB, truncated to a token": lambda: several(
        6, COMPLETIONS, lambda _: {"prompt": "the sun " * 75_000, "max_tokens": 1, "truncate_prompt_tokens": 1}
    ),
    "a first schema behind 40 of 1,900 properties": lambda: first_schema_behind_others(40, 1900),
    "300 uploads at once": lambda: uploads(300),
    "500 responses that are kept, 32 at once": lambda: several(
        500, RESPONSES, lambda place: {"input": f"Say {place}.", "max_output_tokens": 1}, 32
    ),
    "2,000 texts to tokenize": lambda: several(
        2000, TOKENIZE, lambda place: {"prompt": f"word {place} " * 900}, 50
    ),
    "200 connections that read nothing": lambda: unread_pages(200),
    "20 chats of 4,000 digits of tokens": lambda: several(
        20, CHAT, lambda place: {"messages": [{"role": "user", "content": "a"}], "max_tokens": 10**4000 + place}
    ),
}
ALL = {**CASES, **FAULTS}

_prepared: dict[str, Attack] = {}


def prepare(case: str) -> None:
    """Build what a case sends: it takes long, and must not be counted."""
    _prepared.clear()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    _prepared[case] = ALL[case]()


def attack(case: str, target: Target) -> Result:
    """Send it."""
    return _prepared[case](target)
