"""Limits: what a user may ask in a minute, how much may wait, and how long an answer may take."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import openai
import pytest

from scheduler.core.request import InvalidRequestError
from server.users.directory import User, UserLimits
from server.users.limits import Allowance, LimitExceededError, Limits, duration
from tests.server.conftest import MODEL
from tests.server.serving import Json
from tests.server.users_server import LONG, UsersServer

# Allowance ---------------------------------------------------------------------------------------------


def test_an_allowance_refills_all_the_time_up_to_a_minutes_worth() -> None:
    allowance = Allowance(60, now=0)
    allowance.spend(30, now=0)
    assert allowance.level(now=0) == 30
    assert allowance.level(now=10) == 40
    assert allowance.level(now=1000) == 60


def test_an_allowance_may_be_overdrawn_and_the_debt_refills_first() -> None:
    allowance = Allowance(60, now=0)
    allowance.spend(100, now=0)
    assert allowance.level(now=0) == -40
    assert allowance.seconds_until(1, now=0) == 41
    assert allowance.seconds_until(1, now=40) == 1
    assert allowance.seconds_until(1, now=41) == 0


def test_an_allowance_that_changes_keeps_what_is_spent() -> None:
    allowance = Allowance(60, now=0)
    allowance.spend(50, now=0)
    allowance.change(600, now=0)
    assert allowance.level(now=0) == 10
    assert allowance.level(now=6) == 70
    allowance.change(6, now=6)
    assert allowance.level(now=6) == 6


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (0.2, "1s"), (59.5, "1m0s"), (60, "1m0s"), (360, "6m0s"), (3725, "62m5s")]
)
def test_durations_are_written_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# The queue ---------------------------------------------------------------------------------------------


def test_a_request_leaves_the_queue_with_its_first_token_or_its_end() -> None:
    limits = Limits(max_queued_requests=1, max_queued_tokens=100)
    user = User(name="alice", limits=UserLimits(max_queued=1))
    with limits.admit(user) as admission:
        admission.add_prompts([10])
        with pytest.raises(LimitExceededError, match="1 of your requests wait"), limits.admit(user):
            pass
        with pytest.raises(LimitExceededError, match="queue is full"), limits.admit(User(name="alice")):
            pass
        admission.computed(10)
        admission.first_token()
        with limits.admit(user) as other:
            other.add_prompts([10])
    assert (limits.num_queued_requests, limits.num_queued_tokens) == (0, 0)


def test_a_prompt_that_was_not_computed_costs_nothing() -> None:
    limits = Limits(max_queued_requests=10, max_queued_tokens=100)
    user = User(name="alice", limits=UserLimits(tokens_per_minute=50))
    with limits.admit(user) as admission:
        admission.add_prompts([40])
        assert admission.headers()["x-ratelimit-remaining-tokens"] == "10"
    assert admission.headers()["x-ratelimit-remaining-tokens"] == "50"


def test_what_was_computed_of_a_prompt_is_not_given_back() -> None:
    limits = Limits(max_queued_requests=10, max_queued_tokens=100)
    user = User(name="alice", limits=UserLimits(tokens_per_minute=50))
    with limits.admit(user) as admission:
        admission.add_prompts([40])
        admission.computed(15)
        assert (limits.num_queued_requests, limits.num_queued_tokens) == (1, 25)
    assert limits.num_queued_tokens == 0
    assert admission.headers()["x-ratelimit-remaining-tokens"] == "35"
    admission.computed(10)  # in the step that was under way
    assert admission.headers()["x-ratelimit-remaining-tokens"] == "25"


def test_a_queue_apart_takes_no_room_but_the_minute_is_one() -> None:
    limits = Limits(max_queued_requests=1, max_queued_tokens=100)
    user = User(name="alice", limits=UserLimits(tokens_per_minute=150, max_queued=1))
    with limits.apart().admit(user) as behind:
        behind.add_prompts([100])
        with limits.admit(user) as live:
            live.add_prompts([30])
            assert (limits.num_queued_requests, limits.num_queued_tokens) == (1, 30)
            assert live.headers()["x-ratelimit-remaining-tokens"] == "20"


def test_a_queue_of_tokens() -> None:
    limits = Limits(max_queued_requests=10, max_queued_tokens=100)
    user = User(name="alice")
    with limits.admit(user) as first:
        first.add_prompts([100])
        with pytest.raises(LimitExceededError, match="100 tokens of prompts wait"), limits.admit(user):
            pass
    with limits.admit(user) as first, limits.admit(user) as second:
        first.add_prompts([60])
        with pytest.raises(LimitExceededError, match="60 tokens of prompts wait"):
            second.add_prompts([41])
        second.add_prompts([40])


def admit_all(limits: Limits, name: str, lengths: list[int]) -> ExitStack:
    """A request of one prompt for each length, all of which wait until the stack is closed."""
    stack = ExitStack()
    for length in lengths:
        stack.enter_context(limits.admit(User(name=name))).add_prompts([length])
    return stack


def test_one_users_1024_requests_keep_nobody_else_out() -> None:
    limits = Limits(max_queued_requests=1024, max_queued_tokens=10**6)
    with admit_all(limits, "flood", [1] * 1024):
        with pytest.raises(LimitExceededError, match="1024 requests wait"), limits.admit(User(name="flood")):
            pass
        with admit_all(limits, "guest", [1] * 512):  # half of the queue each
            with pytest.raises(LimitExceededError, match="1536 requests wait"), limits.admit(User(name="guest")):
                pass
            with admit_all(limits, "third", [1]):
                pass
    with admit_all(limits, "guest", [1] * 1024):
        pass


def test_one_users_tokens_keep_nobody_else_out() -> None:
    limits = Limits(max_queued_requests=100, max_queued_tokens=1000)
    with admit_all(limits, "flood", [400, 400, 200]):
        more_than_a_part = admit_all(limits, "guest", [900])  # but there is nothing else of theirs
        with pytest.raises(LimitExceededError, match="1900 tokens"), limits.admit(User(name="guest")):
            pass
        more_than_a_part.close()
        with admit_all(limits, "guest", [300]), limits.admit(User(name="guest")) as second:
            with pytest.raises(LimitExceededError, match="1300 tokens"):
                second.add_prompts([201])
            second.add_prompts([200])


def test_each_prompt_of_a_request_takes_a_place_until_its_first_token() -> None:
    limits = Limits(max_queued_requests=8, max_queued_tokens=100)
    with limits.admit(User(name="alice")) as several:
        several.add_prompts([3, 2, 1])
        assert (limits.num_queued_requests, limits.num_queued_tokens) == (3, 6)
        several.computed(2)
        several.first_token()
        assert (limits.num_queued_requests, limits.num_queued_tokens) == (2, 4)
        with limits.admit(User(name="alice")) as more, pytest.raises(LimitExceededError, match="3 requests wait"):
            more.add_prompts([1] * 7)
    assert (limits.num_queued_requests, limits.num_queued_tokens) == (0, 0)


@pytest.mark.parametrize(
    ("lengths", "max_queued", "message"),
    [
        ([1] * 9, None, "9 prompts, and 8 may wait at a time"),
        ([1] * 4, 3, "4 prompts, and 3 may wait at a time"),
        ([101], None, "101 tokens, and 100 may wait at a time"),
    ],
)
def test_what_an_empty_queue_has_no_room_for_is_a_wrong_request(
    lengths: list[int], max_queued: int | None, message: str
) -> None:
    limits = Limits(max_queued_requests=8, max_queued_tokens=100)
    user = User(name="alice", limits=UserLimits(max_queued=max_queued))
    with limits.admit(user) as admission, pytest.raises(InvalidRequestError, match=message):
        admission.add_prompts(lengths)
    assert (limits.num_queued_requests, limits.num_queued_tokens) == (0, 0)


# The server --------------------------------------------------------------------------------------------


async def test_requests_a_minute(users_server: UsersServer) -> None:
    first = await users_server.ask("one-a-minute")
    assert first.status == 200
    assert first.headers["x-ratelimit-limit-requests"] == "1"
    assert first.headers["x-ratelimit-remaining-requests"] == "0"
    assert "x-ratelimit-limit-tokens" not in first.headers, "there is no such limit"
    second = await users_server.ask("one-a-minute")
    assert (second.status, second.code, second.body["error"]["type"]) == (429, "rate_limit_exceeded", "requests")
    assert 1 <= int(second.headers["Retry-After"]) <= 60
    assert second.headers["x-ratelimit-remaining-requests"] == "0"
    assert second.headers["x-ratelimit-reset-requests"].endswith("s")
    assert (await users_server.ask("alice")).status == 200, "others are not concerned"


async def test_counting_tokens_has_a_limit_of_its_own(tmp_path: Path, model_path: str) -> None:
    users = {"alice": {"limits": {"requests_per_minute": 1}}, "bob": {}}
    with UsersServer(tmp_path, users, "--kv-cache-memory", "64MB") as server:
        message = {"messages": [{"role": "user", "content": "a"}]}
        asked = (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [7]}))
        statuses = Counter[int]()
        for path, body in (*asked, ("/v1/messages/count_tokens", message)) * 6:
            answer = await server.send("POST", path, server.authorization("alice"), json=body)
            statuses[answer.status] += 1
            if answer.status == 429:
                assert int(answer.headers["Retry-After"]) >= 1
        assert statuses == {200: 10, 429: 8}
        assert (await server.ask("alice")).status == 200, "that is another one"
        assert (
            await server.send("POST", "/tokenize", server.authorization("bob"), json=asked[0][1])
        ).status == 200


async def test_tokens_a_minute_are_spent_as_they_come_and_may_be_overdrawn(users_server: UsersServer) -> None:
    async with users_server.client_of("twenty-tokens") as client:
        raw = await client.completions.with_raw_response.create(
            model=MODEL, prompt=[5, 6, 7], max_tokens=40, stream=True, extra_body={"ignore_eos": True}
        )
        assert raw.headers["x-ratelimit-limit-tokens"] == "20"
        assert int(raw.headers["x-ratelimit-remaining-tokens"]) in (16, 17), "the prompt, and maybe a first token"
        num_chunks = len([chunk async for chunk in raw.parse()])
        assert num_chunks > 20, "a request that has begun is not cut off"
        with pytest.raises(openai.RateLimitError, match="20 tokens per minute") as refused:
            await client.completions.create(model=MODEL, prompt="Once", max_tokens=1)
    assert refused.value.type == "tokens"
    assert refused.value.response.headers["x-ratelimit-remaining-tokens"] == "0"
    assert int(refused.value.response.headers["Retry-After"]) > 50


@asynccontextmanager
async def waiting(server: UsersServer, name: str, *bodies: Json) -> AsyncIterator[None]:
    """Requests of a user who may run one sequence at a time: one runs on and on, and these wait behind it."""
    await server.until_idle()
    asking = [asyncio.create_task(server.ask(name, LONG))]
    try:
        await server.until("carousel_requests_running", 1)
        asking += [asyncio.create_task(server.ask(name, body)) for body in bodies]
        await server.until("carousel_requests_waiting", len(bodies))
        yield
    finally:
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await server.until_idle()


async def test_a_users_queue_is_full(users_server: UsersServer) -> None:
    async with waiting(users_server, "one-and-one", LONG):
        refused = await users_server.ask("one-and-one")
        assert (refused.status, refused.code, refused.headers["Retry-After"]) == (429, "rate_limit_exceeded", "1")
        assert "1 of your requests wait" in refused.body["error"]["message"]
        assert (await users_server.ask("alice")).status == 200, "others are not concerned"
    assert (await users_server.ask("one-and-one")).status == 200


async def test_the_servers_queue_is_full(users_server: UsersServer) -> None:
    async with waiting(users_server, "one-at-a-time", *[LONG] * 16):
        refused = await users_server.ask("one-at-a-time")
        assert (refused.status, refused.code, refused.body["error"]["type"]) == (429, "queue_full", "server_busy")
        assert refused.headers["Retry-After"] == "1"
        assert (await users_server.ask("alice")).status == 200, "it is not full of hers"
    assert (await users_server.ask("one-at-a-time")).status == 200


async def test_the_servers_queue_is_full_of_tokens(users_server: UsersServer) -> None:
    prompt = {"prompt": [7] * 1500, "max_tokens": 1}
    async with waiting(users_server, "one-at-a-time", prompt):
        refused = await users_server.ask("one-at-a-time", prompt)
        assert (refused.status, refused.code) == (429, "queue_full")
        assert "1500 tokens" in refused.body["error"]["message"]
        assert (await users_server.ask("alice", prompt)).status == 200, "it is not full of hers"
    assert (await users_server.ask("one-at-a-time", prompt)).status == 200
    never = await users_server.ask("alice", {"prompt": [[7] * 1500] * 2})
    assert (never.status, never.body["error"]["param"]) == (400, "prompt")


# Deadlines and priorities ------------------------------------------------------------------------------

ON_AND_ON: Json = {"prompt": "One, two, three,", "max_tokens": 4000, "temperature": 0}
"""Takes long, but nobody can know: it might end with any token."""


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        ({"timeout": 0.4}, {}),
        ({}, {"X-Request-Timeout": "0.4"}),
        ({"timeout": 100}, {"X-Request-Timeout": "0.4"}),
        ({"timeout": 0.4}, {"X-Request-Timeout": "100"}),
    ],
)
async def test_past_its_deadline_a_request_ends(
    users_server: UsersServer, body: Json, headers: dict[str, str]
) -> None:
    answer = await users_server.ask("alice", {**ON_AND_ON, **body}, **headers)
    assert (answer.status, answer.code, answer.headers["x-should-retry"]) == (408, "timeout", "false")


async def test_what_cannot_be_answered_in_time_is_refused_at_once(users_server: UsersServer) -> None:
    answer = await users_server.ask("alice", {**LONG, "timeout": 0.4})
    assert (answer.status, answer.code) == (408, "deadline_unreachable")
    assert answer.headers["x-should-retry"] == "false"


async def test_past_its_deadline_a_stream_ends_with_an_error(users_server: UsersServer) -> None:
    async with users_server.client_of("alice") as client:
        stream = await client.completions.create(
            model=MODEL, **ON_AND_ON, stream=True, extra_body={"timeout": 0.6}
        )
        with pytest.raises(openai.APIError, match=r"deadline passed after [1-9]"):
            async for _ in stream:
                pass


@pytest.mark.parametrize(
    ("body", "headers", "message"),
    [
        ({"timeout": 0}, {}, "timeout should be greater than 0, got 0"),
        ({"timeout": "soon"}, {}, "timeout should be a valid number, got 'soon'"),
        ({"priority": 101}, {}, "priority should be less than or equal to 100, got 101"),
        ({}, {"X-Request-Timeout": "soon"}, "X-Request-Timeout should be a number of seconds above 0, got 'soon'"),
        ({}, {"X-Request-Timeout": "-1"}, "X-Request-Timeout should be"),
        ({}, {"X-Request-Timeout": "0.0"}, "X-Request-Timeout should be"),
    ],
)
async def test_a_timeout_or_priority_that_cannot_be(
    users_server: UsersServer, body: Json, headers: dict[str, str], message: str
) -> None:
    answer = await users_server.ask("alice", {"prompt": "Once", **body}, **headers)
    assert answer.status == 400
    assert message in answer.body["error"]["message"]


async def test_a_priority_is_accepted(users_server: UsersServer) -> None:
    assert (await users_server.ask("bob", {"prompt": "Once", "max_tokens": 1, "priority": -100})).status == 200
