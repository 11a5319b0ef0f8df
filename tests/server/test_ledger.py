"""The ledger agrees with what the answers say, also after a crash."""

from __future__ import annotations

import asyncio
import json
import signal
import stat
import time
from collections import Counter
from pathlib import Path

import pytest
from openai import AsyncOpenAI
from openai.types import CompletionUsage

from server.users.ledger import Ledger, LedgerError, read_ledger
from tests.server.conftest import MODEL
from tests.server.serving import Json, carousel
from tests.server.users_server import UsersServer

COUNTS = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens")


async def ask_for_usage(client: AsyncOpenAI, number: int) -> CompletionUsage:
    """One of many small requests: streamed or not, one prompt or several, some with a prefix in common."""
    prompt = [[number % 7, place, 5] * (1 + 8 * (number % 4)) for place in range(1 + number % 2)]
    options: Json = {"model": MODEL, "prompt": prompt, "max_tokens": 1 + number % 3, "n": 1 + number % 2}
    if number % 2:
        answer = await client.completions.create(**options)
        assert answer.usage is not None
        return answer.usage
    stream = await client.completions.create(**options, stream=True, stream_options={"include_usage": True})
    last = [chunk async for chunk in stream][-1]
    assert last.usage is not None
    return last.usage


def counts_of(total: Json) -> Counter[str]:
    return Counter({name: total[name] for name in COUNTS})


async def test_it_is_the_sum_of_what_the_answers_say(users_server: UsersServer) -> None:
    names = ("alice", "bob", "carol")
    before = {name: counts_of((await users_server.usage(name))["total"]) for name in names}
    spent = {name: Counter[str]() for name in names}
    places = asyncio.Semaphore(5)

    async def spend(name: str, client: AsyncOpenAI, number: int) -> None:
        async with places:
            usage = await ask_for_usage(client, number)
        cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details is not None else None
        assert cached is not None
        amounts = (1, usage.prompt_tokens, cached, usage.completion_tokens)
        spent[name].update(dict(zip(COUNTS, amounts, strict=True)))

    async with (
        users_server.client_of("alice") as alice,
        users_server.client_of("bob") as bob,
        users_server.client_of("carol") as carol,
    ):
        clients = zip(names, (alice, bob, carol), strict=True)
        await asyncio.gather(*(spend(name, client, number) for name, client in clients for number in range(28)))
    assert spent["alice"]["cached_tokens"] > 0
    for name in names:
        assert counts_of((await users_server.usage(name))["total"]) == before[name] + spent[name]
    file = str(users_server.users_file)
    written = json.loads(carousel("usage", "--users", file, "--user", "bob", "--json").stdout)
    assert counts_of(written[-1]) == counts_of((await users_server.usage("bob"))["total"])


async def test_everybody_reads_their_own(users_server: UsersServer) -> None:
    await users_server.ask("alice")
    report = await users_server.usage("alice")
    assert report["user"] == "alice"
    assert {day["user"] for day in report["days"]} == {"alice"}
    assert (await users_server.usage("alice", "?since=2999-01-01"))["days"] == []
    wrong = await users_server.usage("alice", "?since=yesterday")
    assert wrong["error"]["message"] == "since should be a day like 2026-03-01, got 'yesterday'"


async def until_more_than(server: UsersServer, name: str, amount: str, before: float) -> None:
    async with asyncio.timeout(30):
        while (await server.usage(name))["total"][amount] <= before:
            await asyncio.sleep(0.01)


LONG_PROMPTS: list[Json] = [
    {"prompt": [11, *range(100, 1900)], "max_tokens": 1},
    {"prompt": [12, *range(100, 1900)], "max_tokens": 1, "n": 2},
    {"prompt": [[13, *range(100, 900)], [14, *range(100, 900)]], "max_tokens": 1},
    {"prompt": [16, *range(100, 1900)], "max_tokens": 1, "n": 2, "use_beam_search": True},
]


@pytest.mark.parametrize("body", LONG_PROMPTS)
async def test_what_was_computed_of_a_prompt_is_paid_for_though_nobody_waits_for_the_answer(
    users_server: UsersServer, body: Json
) -> None:
    await users_server.until_idle()
    before = (await users_server.usage("carol"))["total"]
    computed = await users_server.metric("carousel_prompt_tokens_total")
    asking = asyncio.create_task(users_server.ask("carol", body))
    await until_more_than(users_server, "carol", "engine_seconds", before["engine_seconds"])
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await users_server.until_idle()
    after = (await users_server.usage("carol"))["total"]
    computed = await users_server.metric("carousel_prompt_tokens_total") - computed
    assert after["prompt_tokens"] - before["prompt_tokens"] == computed > 0
    assert after["completion_tokens"] == before["completion_tokens"]


async def test_a_beam_search_is_paid_for_as_it_goes(users_server: UsersServer) -> None:
    before = (await users_server.usage("carol"))["total"]
    body = {"prompt": "Once upon", "max_tokens": 1500, "n": 3, "use_beam_search": True, "ignore_eos": True}
    asking = asyncio.create_task(users_server.ask("carol", body))
    await until_more_than(users_server, "carol", "completion_tokens", before["completion_tokens"] + 10)
    assert (await users_server.usage("carol"))["total"]["requests"] == before["requests"] + 1
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await users_server.until_idle()


async def test_a_request_that_is_refused_costs_nothing(users_server: UsersServer) -> None:
    before = counts_of((await users_server.usage("alice"))["total"])
    assert (await users_server.ask("alice", {"prompt": "a", "temperature": -1})).status == 400
    assert (await users_server.ask("alice", {"prompt": ""})).status == 400
    assert counts_of((await users_server.usage("alice"))["total"]) == before


@pytest.mark.prove
async def test_a_crash_loses_a_second_at_most(tmp_path: Path) -> None:
    users: dict[str, Json] = {"alice": {}}
    with UsersServer(tmp_path, users) as server:
        client = server.client_of("alice")
        arrivals: list[float] = []

        async def read() -> None:
            stream = await client.completions.create(
                model=MODEL,
                prompt=[5, 6, 7],
                max_tokens=4000,
                stream=True,
                logprobs=0,
                extra_body={"ignore_eos": True},
            )
            async for chunk in stream:
                if (logprobs := chunk.choices[0].logprobs) is not None:
                    arrivals.extend(time.monotonic() for _ in logprobs.tokens or ())

        reading = [asyncio.create_task(read()) for _ in range(3)]
        while len(arrivals) < 200:
            await asyncio.sleep(0.05)
        server.process.kill()
        killed = time.monotonic()
        server.process.wait()
        await asyncio.gather(*reading, return_exceptions=True)
        await client.close()
        keys = server.keys
    kept = read_ledger(tmp_path / "users.ledger.sqlite3")[0]
    assert (kept.requests, kept.prompt_tokens) == (3, 9)
    assert kept.completion_tokens >= sum(arrival < killed - 1 for arrival in arrivals) > 0

    with UsersServer(tmp_path, {}) as server:
        server.keys = keys
        answer = await server.ask("alice", {"prompt": [5, 6, 7], "max_tokens": 5, "ignore_eos": True})
        assert answer.status == 200
        assert server.stop(signal.SIGTERM) == 0
    after = read_ledger(tmp_path / "users.ledger.sqlite3")
    assert sum(day.completion_tokens for day in after) == kept.completion_tokens + 5


async def test_days_and_users_are_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "ledger.sqlite3"
    for now in (0.0, 86399.9, 86400.0):
        monkeypatch.setattr("server.users.ledger.time.time", lambda now=now: now)
        async with Ledger(file) as ledger:
            ledger.add("alice", requests=1, completion_tokens=2, engine_seconds=0.25)
            ledger.add("bob", prompt_tokens=3)
    assert [(day.user, day.day, day.requests, day.prompt_tokens) for day in read_ledger(file)] == [
        ("alice", "1970-01-01", 2, 0),
        ("bob", "1970-01-01", 0, 6),
        ("alice", "1970-01-02", 1, 0),
        ("bob", "1970-01-02", 0, 3),
    ]
    (last,) = read_ledger(file, "alice", "1970-01-02")
    assert (last.completion_tokens, last.engine_seconds) == (2, 0.25)


async def test_what_could_not_be_written_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "ledger.sqlite3"
    async with Ledger(file) as ledger:
        with monkeypatch.context() as broken:
            broken.setattr("server.users.ledger._ADD", "INSERT INTO nowhere VALUES (?, ?, ?, ?, ?, ?, ?)")
            ledger.add("alice", requests=1)
            assert await ledger.usage("alice") == []
        assert "cannot be written, and is tried again and again" in caplog.text
        ledger.add("alice", requests=1)
        assert [day.requests for day in await ledger.usage("alice")] == [2]


async def test_however_long_it_cannot_be_written_it_holds_a_row_a_user_and_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ledger.sqlite3"
    async with Ledger(file) as ledger:
        with monkeypatch.context() as broken:
            broken.setattr("server.users.ledger._ADD", "INSERT INTO nowhere VALUES (?, ?, ?, ?, ?, ?, ?)")
            for _ in range(50):
                ledger.add("alice", requests=1, engine_seconds=0.5)
                ledger.add("bob", completion_tokens=2)
                await ledger.usage("alice")
            assert len(ledger.unwritten) <= 4, "two users, and midnight may have passed"
    alice, bob = read_ledger(file, "alice"), read_ledger(file, "bob")
    assert sum(day.requests for day in alice) == 50
    assert sum(day.engine_seconds for day in alice) == 25.0
    assert sum(day.completion_tokens for day in bob) == 100


async def test_the_writer_goes_on_whatever_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server.users.ledger.WRITE_SECONDS", 0.01)
    monkeypatch.setattr("scheduler.client.background.FIRST_PAUSE", 0.0)
    file = tmp_path / "ledger.sqlite3"
    async with Ledger(file) as ledger:
        with monkeypatch.context() as broken:
            broken.setattr("server.users.ledger._date", lambda _: 1 // 0)
            ledger.add("alice", requests=1)
            async with asyncio.timeout(30):
                while "ZeroDivisionError" not in caplog.text:
                    await asyncio.sleep(0.01)
        async with asyncio.timeout(30):
            while not read_ledger(file):
                await asyncio.sleep(0.01)
    assert [day.requests for day in read_ledger(file)] == [1]


async def test_only_its_owner_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "ledger.sqlite3"
    beside = [tmp_path / f"ledger.sqlite3{suffix}" for suffix in ("", "-wal", "-shm")]
    async with Ledger(file) as ledger:
        ledger.add("alice", requests=1)
        assert len(await ledger.usage("alice")) == 1
        assert [stat.S_IMODE(each.stat().st_mode) for each in beside] == [0o600] * 3
    file.chmod(0o644)
    beside[1].touch(0o644)
    async with Ledger(file) as ledger:
        assert len(await ledger.usage("alice")) == 1
        assert [stat.S_IMODE(each.stat().st_mode) for each in beside] == [0o600] * 3


async def test_a_file_that_is_no_ledger(tmp_path: Path) -> None:
    file = tmp_path / "users.yaml"
    file.write_text("users:\n" * 100)
    with pytest.raises(LedgerError, match="not a database"):
        await Ledger(file).__aenter__()
    with pytest.raises(LedgerError, match="not a database"):
        read_ledger(file)
    assert "there is no such file" in carousel("usage", "--ledger", str(tmp_path / "none")).stderr


async def test_the_table_for_people(tmp_path: Path) -> None:
    file = tmp_path / "ledger.sqlite3"
    async with Ledger(file) as ledger:
        ledger.add("alice", requests=1, prompt_tokens=10, completion_tokens=20, engine_seconds=0.5)
        ledger.add("bob", requests=2, completion_tokens=3000)
    rows = [line.split() for line in carousel("usage", "--ledger", str(file)).stdout.splitlines()]
    assert rows[1][0] == "alice"
    assert rows[1][2:] == ["1", "10", "0", "20", "0.5"]
    assert rows[-1] == ["all", "3", "10", "0", "3020", "0.5"]
    assert carousel("usage", "--ledger", str(file), "--since", "soon").returncode == 2
