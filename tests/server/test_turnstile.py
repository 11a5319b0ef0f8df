"""Work on the event loop for those who arrive: none of it holds up the streams for long, nor a user another."""

from __future__ import annotations

import asyncio

from server.http.turnstile import Turnstile


async def test_a_piece_passes_in_each_round_and_the_users_by_turns() -> None:
    turnstile, passed, num_rounds = Turnstile(), [], 0

    async def piece(user: str) -> None:
        await turnstile.enter(user)
        passed.append((num_rounds, user))

    async def count() -> None:
        nonlocal num_rounds
        while len(passed) < 8:
            num_rounds += 1
            await asyncio.sleep(0)

    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        group.create_task(count())
        for user in ("many", "many", "many", "many", "many", "many", "one", "other"):
            group.create_task(piece(user))
    rounds, users = zip(*passed, strict=True)
    assert len(set(rounds)) == 8, "two pieces in one round hold up the streams"
    assert set(users[:4]) == {"many", "one", "other"}, "who comes after a crowd waits for one of it"


async def test_who_has_gone_holds_up_nobody() -> None:
    turnstile = Turnstile()
    tasks = [asyncio.create_task(turnstile.enter(user)) for user in "abc"]
    await asyncio.sleep(0)
    tasks[1].cancel()
    async with asyncio.timeout(10):
        await asyncio.gather(*tasks, return_exceptions=True)
        await turnstile.enter("d")
    assert [task.cancelled() for task in tasks] == [False, True, False]
