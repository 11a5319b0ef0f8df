"""Takes docs/live-light.png and docs/live-dark.png: the live page of a server with several users under load.

python -m benchmarks.screenshots      # needs Chromium
"""

from __future__ import annotations

import argparse
import asyncio
import re
import shutil
import sys
from pathlib import Path

from playwright.async_api import Page, async_playwright, expect

from benchmarks.own_server import OwnServer, own_server
from server.bench.workload import LoadRequest, make_requests

QUESTION = "Tell me a long story about a wooden horse that wants to see the world."
USERS = ("alice", "bob", "carol", "dan", "erin", "frank")
IN_FLIGHT = (2, 6, 4, 30, 5, 9)
"""Of each user: dan sends more than his share."""

FLAGS = ("--max-num-seqs", "32", "--kv-cache-memory", "220MiB")
WARM_SECONDS = 45
"""Most of the minute that the sparklines show."""

LAUNCH = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")


def chromium() -> str | None:
    """Where the browser is, if there is one."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


async def load(server: OwnServer) -> None:
    """Keep every user's requests in flight, until cancelled. One in three begins as others do."""
    client = server.client()

    async def one_user(user: int, concurrency: int) -> None:
        chats = make_requests("chat", 2000, seed=user)
        shared = make_requests("shared-prefix", 2000, seed=user)
        mixed = [shared[place] if place % 3 == 0 else chats[place] for place in range(2000)]
        requests = [LoadRequest(each.prompt, each.max_tokens, user) for each in mixed]
        await client.closed_loop(requests, concurrency)

    await asyncio.gather(*(one_user(user, count) for user, count in enumerate(IN_FLIGHT)))


async def take(server: OwnServer, folder: Path, size: tuple[int, int], seconds: float) -> None:
    loading = asyncio.create_task(load(server))
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium(), args=LAUNCH)
        page = await browser.new_page(
            viewport={"width": size[0], "height": size[1]}, color_scheme="light", device_scale_factor=1.5
        )
        await page.goto(server.url)
        await page.fill("#key", server.keys[USERS[0]])
        await page.press("#key", "Enter")
        await asyncio.sleep(seconds)
        await picture(page, folder / "live-light.png")
        await page.emulate_media(color_scheme="dark")
        await picture(page, folder / "live-dark.png")
        await browser.close()
    loading.cancel()
    await asyncio.gather(loading, return_exceptions=True)


async def picture(page: Page, file: Path) -> None:
    """In the middle of an answer."""
    await page.fill("#prompt", QUESTION)
    await page.press("#prompt", "Enter")
    answer = page.locator("#answer .streaming")
    await expect(answer).to_have_text(re.compile(".{220,}", re.DOTALL), timeout=60_000)
    await page.screenshot(path=file)
    await page.click("#stop")
    print(file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("docs"), help="where to put them (default: docs)")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--seconds", type=float, default=WARM_SECONDS, help="of load before the first picture")
    args = parser.parse_args()
    if chromium() is None:
        print("no Chromium is installed (Debian and Ubuntu: apt-get install chromium)", file=sys.stderr)
        return 1
    with own_server(*FLAGS, users=dict.fromkeys(USERS, 1.0)) as server:
        asyncio.run(take(server, args.folder, (args.width, args.height), args.seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
