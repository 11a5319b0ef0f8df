"""The live page: its frames, and the page itself in a real browser."""

from __future__ import annotations

import asyncio
import base64
import re
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import msgspec
import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, Route, async_playwright, expect

from benchmarks.screenshots import LAUNCH, chromium
from server.live.broadcaster import FRAME_SECONDS
from tests.server.serving import Json, Server
from tests.server.users_server import LONG, UsersServer

needs_chromium = pytest.mark.skipif(
    chromium() is None, reason="no Chromium is installed (apt-get install chromium)"
)


@asynccontextmanager
async def watching(server: Server, headers: dict[str, str] | None = None) -> AsyncIterator[AsyncIterator[Json]]:
    """The events of /live."""

    async def events(response: aiohttp.ClientResponse) -> AsyncIterator[Json]:
        async for line in response.content:
            if line.startswith(b"data: "):
                yield msgspec.json.decode(line[6:])

    async with aiohttp.ClientSession() as session, session.get(f"{server.url}/live", headers=headers) as response:
        assert response.status == 200
        yield events(response)


async def until_riding(frames: AsyncIterator[Json], count: int) -> Json:
    """The first frame with so many riders."""
    async with asyncio.timeout(30):
        async for frame in frames:
            if len(frame["riders"]) == count:
                return frame
    raise AssertionError("the stream ended")


@asynccontextmanager
async def riding(server: UsersServer, name: str) -> AsyncIterator[None]:
    """A request of this user runs meanwhile."""
    asking = asyncio.create_task(server.ask(name, LONG))
    yield
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


# Frames ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("authorization", [None, "Bearer sk-carousel-wrong"])
async def test_live_needs_a_key_and_the_page_does_not(
    users_server: UsersServer, authorization: str | None
) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    assert (await users_server.send("GET", "/live", headers)).status == 401
    for path in ("/", "/page/page.js", "/page/style.css", "/page/server.json"):
        answer = await users_server.send("GET", path, headers)
        assert answer.status == 200
        assert "default-src 'self'" in answer.headers["Content-Security-Policy"]


@pytest.mark.parametrize("name", ["nothing.js", "..%2Flive.py", "%2E%2E%2Fapp.py"])
async def test_the_page_has_no_other_files(users_server: UsersServer, name: str) -> None:
    assert (await users_server.send("GET", f"/page/{name}", {})).status == 404


async def test_others_are_colours_without_names(users_server: UsersServer) -> None:
    await users_server.until_idle()
    async with (
        riding(users_server, "alice"),
        riding(users_server, "bob"),
        watching(users_server, users_server.authorization("alice")) as alices,
        watching(users_server, users_server.authorization("bob")) as bobs,
    ):
        alice, bob = (await anext(alices))["viewer"], (await anext(bobs))["viewer"]
        assert (alice["name"], bob["name"]) == ("alice", "bob")
        frames = [await until_riding(alices, 2), await until_riding(bobs, 2)]
        for frame in frames:
            assert {rider["colour"] for rider in frame["riders"]} == {alice["colour"], bob["colour"]}
        assert not re.search("alice|bob", str(frames))
    await users_server.until_idle()


async def test_a_frame_tells_how_far_everybody_is(users_server: UsersServer) -> None:
    await users_server.until_idle()
    async with watching(users_server, users_server.authorization("alice")) as events:
        welcome = await anext(events)
        assert welcome["num_seats"] == 8
        async with riding(users_server, "bob"):
            frame = await until_riding(events, 1)
            (rider,) = frame["riders"]
            assert rider["computed"] >= rider["prompt"] == 2
            assert 0 < rider["answer"] < rider["limit"] == 4000
            assert frame["blocks"]["used"] > 0
            later = await until_riding(events, 1)
            assert later["riders"][0]["request"] == rider["request"]
            assert later["riders"][0]["answer"] > rider["answer"]
            assert later["tokens_per_second"] > 0
        await until_riding(events, 0)  # who leaves an idle server is seen to leave
        async with asyncio.timeout(10):
            async for frame in events:
                if frame["blocks"]["map"] is not None:
                    break
        blocks = base64.b64decode(frame["blocks"]["map"])
        assert set(blocks) <= {0, 1}
        assert frame["blocks"]["used"] == 0


async def test_frames_come_at_a_bounded_rate_however_much_happens(users_server: UsersServer) -> None:
    async with riding(users_server, "alice"), watching(users_server, users_server.authorization("bob")) as events:
        await anext(events)
        started = time.monotonic()
        frames = [await anext(events) for _ in range(9)]
        assert time.monotonic() - started >= 7 * FRAME_SECONDS  # the first may have been on its way
        assert sum(frame["blocks"]["map"] is not None for frame in frames) <= 3


async def test_a_page_that_takes_nothing_holds_nobody_up(users_server: UsersServer) -> None:
    headers = users_server.authorization("alice")
    host, port = users_server.url.removeprefix("http://").split(":")
    _reader, writer = await asyncio.open_connection(host, int(port), limit=1)
    writer.write(f"GET /live HTTP/1.1\r\nHost: x\r\nAuthorization: {headers['Authorization']}\r\n\r\n".encode())
    try:
        async with watching(users_server, headers) as events:
            assert [(await anext(events))["event"] for _ in range(5)] == ["welcome"] + ["frame"] * 4
    finally:
        writer.close()


# The page ----------------------------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium(), args=LAUNCH)
        yield browser
        await browser.close()


async def ask_for_a_long_answer(route: Route) -> None:
    """What the model wants to say may be over before the test has looked."""
    body = msgspec.json.decode(route.request.post_data or "{}")
    await route.continue_(post_data=msgspec.json.encode(body | {"ignore_eos": True, "max_tokens": 4000}))


async def ask_for_two_animals(route: Route) -> None:
    body = msgspec.json.decode(route.request.post_data or "{}")
    wanted = {"structured_outputs": {"regex": "🦊🐢"}}
    await route.continue_(post_data=msgspec.json.encode(body | wanted))


@asynccontextmanager
async def quiet_page(browser: Browser, server: Server) -> AsyncIterator[Page]:
    """A page that has nothing to complain of, and asks nobody but its server."""
    page = await browser.new_page()
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    await page.route("**/v1/chat/completions", ask_for_a_long_answer)
    await page.goto(server.url)
    yield page
    await page.close()
    assert complaints == []
    assert requests
    assert [url for url in requests if not url.startswith(server.url + "/")] == []


@needs_chromium
async def test_a_ride(browser: Browser, server: Server) -> None:
    """Without users: ask, see the answer and one's own seat, stop, see the seat free again."""
    await server.until_idle()
    async with quiet_page(browser, server) as page:
        await expect(page.locator("#connection")).to_have_text("Live")
        await expect(page.locator("#hub-unit")).to_have_text("Ask something, and take the first seat")
        await page.fill("#prompt", "Count from one to a thousand.")
        await page.press("#prompt", "Enter")
        await expect(page.locator("#answer .streaming")).to_contain_text(re.compile(r"\S+\s+\S+"))
        await expect(page.locator(".seat.own")).to_have_count(1)
        await expect(page.locator("#riders")).to_contain_text("your request")
        await expect(page.locator("#ride")).to_contain_text("in seat")
        await page.click("#stop")
        await expect(page.locator("#ride")).to_have_text("stopped")
        await expect(page.locator(".seat.own")).to_have_count(0)
        await expect(page.locator("#send")).to_be_visible()
    await server.until_idle()


def together(tokens: list[str]) -> str:
    """The text of tokens as the page shows them: `⟨f0 9f⟩` where one is only a part of a character."""
    parts = [re.fullmatch(r"⟨((?:[0-9a-f]{2} ?)+)⟩", token) for token in tokens]
    return b"".join(
        bytes.fromhex(part[1]) if part else token.encode() for token, part in zip(tokens, parts, strict=True)
    ).decode(errors="replace")


@needs_chromium
async def test_parts_of_characters_are_shown_as_bytes(browser: Browser, server: Server) -> None:
    await server.until_idle()
    async with quiet_page(browser, server) as page:
        await page.unroute("**/v1/chat/completions")
        await page.route("**/v1/chat/completions", ask_for_two_animals)
        await page.fill("#prompt", "Two animals?")
        await page.press("#prompt", "Enter")
        await page.click("#answer .happened summary")
        tokens = await page.locator("#answer .token").all_text_contents()
        assert "⟨f0 9f⟩" in tokens
        assert together(tokens).removesuffix("<|im_end|>") == "🦊🐢"
    await server.until_idle()


@needs_chromium
async def test_what_happened_here(browser: Browser, server: Server) -> None:
    """The steps of one's own answer: every token can be looked at, and says what else could have come."""
    await server.until_idle()
    async with quiet_page(browser, server) as page:
        await page.unroute("**/v1/chat/completions")
        await page.fill("#prompt", "Say yes.")
        await page.press("#prompt", "Enter")
        await page.click("#answer .happened summary")
        said = await page.locator("#answer p:not(.question)").first.text_content()
        tokens = page.locator("#answer .token")
        assert said is not None
        assert together(await tokens.all_text_contents()).replace("⏎", "\n").removesuffix("<|im_end|>") == said
        await expect(page.locator(".happened > p")).to_contain_text(re.compile(r"^\d+ tokens? in \d+ steps?"))
        await expect(page.locator(".happened .detail")).to_contain_text("Step 1:")
        await expect(page.locator(".likeliest .taken code")).to_have_text(
            ((await tokens.first.text_content()) or "").replace(" ", "␣")
        )
        await tokens.last.click()
        await expect(tokens.last).to_have_attribute("aria-pressed", "true")
        await expect(page.locator(".happened .detail")).to_contain_text(re.compile(r"Drawn from [\d,]+ candidate"))
        assert await page.locator(".likeliest li").count() in (5, 6)
    await server.until_idle()


@needs_chromium
async def test_a_ride_among_others(browser: Browser, users_server: UsersServer) -> None:
    """With users: the page asks for a key, shows one's own seats by name and somebody else's as a colour."""
    await users_server.until_idle()
    async with quiet_page(browser, users_server) as page, riding(users_server, "bob"):
        await page.fill("#key", users_server.keys["alice"])
        await page.press("#key", "Enter")
        others = page.locator("#riders li:not(.mine)")
        await expect(others).to_contain_text("1 riding")
        await expect(others).not_to_contain_text("bob")
        await page.fill("#prompt", "Count from one to a thousand.")
        await page.click("#send")
        await expect(page.locator("#riders li.mine")).to_have_text(re.compile(r"alice \(you\)\s*1 riding"))
        await expect(page.locator(".seat.mine")).to_have_count(1)
        colours = [
            await seat.evaluate("seat => getComputedStyle(seat).fill")
            for seat in await page.locator(".seat:not(.leaving) .answer").all()
        ]
        assert len(colours) == len(set(colours)) == 2
        await page.click("#stop")
        await expect(page.locator(".seat.mine")).to_have_count(0)
    await users_server.until_idle()


@needs_chromium
async def test_a_refusal_is_told_in_words(browser: Browser, users_server: UsersServer) -> None:
    page = await browser.new_page()
    await page.goto(users_server.url)
    await page.fill("#key", "sk-carousel-wrong")
    await page.press("#key", "Enter")
    await expect(page.locator("#key-hint")).to_contain_text("the key is not known here")
    await page.fill("#key", users_server.keys["alice"])
    await page.press("#key", "Enter")
    await expect(page.locator("#connection")).to_have_text("Live")
    await page.fill("#prompt", "many words " * 30_000)
    await page.click("#send")
    await expect(page.locator("#answer .failed")).to_contain_text("That did not work:")
    await expect(page.locator("#send")).to_be_visible()
    await page.close()


@needs_chromium
@pytest.mark.prove
async def test_an_open_page_survives_the_server(browser: Browser, tmp_path: Path) -> None:
    """The server does not wait for the page, and the page waits for the server."""
    page = await browser.new_page()
    with Server(tmp_path / "first") as server:
        await page.goto(server.url)
        await expect(page.locator("#connection")).to_have_text("Live")
        assert await asyncio.to_thread(server.stop, signal.SIGTERM) == 0
        assert "Traceback" not in server.log
        await expect(page.locator("#connection")).to_have_text("Reconnecting")
    with Server(tmp_path / "second", "--port", server.url.rpartition(":")[2]):
        await expect(page.locator("#connection")).to_have_text("Live", timeout=20_000)
    await page.close()
