"""GET /, the page for people, and GET /live, which keeps it up to date. Nothing on it comes from elsewhere."""

from __future__ import annotations

import asyncio
import html
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import msgspec
from aiohttp import web

from server.app_keys import CONFIG, ENGINE, user_of
from server.http.json import json_response
from server.http.sse import EventStream
from server.live.broadcaster import Live, Viewer, Welcome

LIVE = web.AppKey("live", Live)

FOLDER = Path(__file__).with_name("page")

PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'self'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # another version of the server has another version of the page
}


class Settings(msgspec.Struct, frozen=True):
    model: str
    needs_key: bool


async def get_page(request: web.Request) -> web.Response:
    """The page's own paths are relative to where a proxy has the server, whether its path ends with a slash or
    not."""
    page = (FOLDER / "index.html").read_text()
    if root := request.app[CONFIG].root_path:
        page = page.replace("<head>", f'<head>\n  <base href="{html.escape(root)}/">', 1)
    return web.Response(text=page, content_type="text/html", headers=PAGE_HEADERS)


async def get_page_file(request: web.Request) -> web.FileResponse:
    """What the page consists of. Only names that are in the folder are found there."""
    file = FOLDER / request.match_info["name"]
    if file not in FOLDER.iterdir():
        raise web.HTTPNotFound
    return web.FileResponse(file, headers=PAGE_HEADERS)


async def get_settings(request: web.Request) -> web.Response:
    """What the page has to know before anybody gave a key."""
    config = request.app[CONFIG]
    return json_response(Settings(config.model_name, config.users is not None), headers=PAGE_HEADERS)


async def get_live(request: web.Request) -> web.StreamResponse:
    live, info = request.app[LIVE], request.app[ENGINE].info
    has_users = request.app[CONFIG].users is not None
    name = user_of(request).name
    events = await EventStream.open(request)
    await events.send(
        Welcome(
            model=request.app[CONFIG].model_name,
            num_seats=info.num_seats,
            num_blocks=info.num_blocks,
            block_size=info.block_size,
            products=info.products,
            device=info.device,
            viewer=Viewer(name, live.colour(name)) if has_users else None,
        )
    )
    async with aclosing(live.frames()) as frames:
        async for frame in frames:
            await events.send_json(frame)
    return await events.close()


async def live_lifetime(app: web.Application) -> AsyncIterator[None]:
    running = asyncio.create_task(app[LIVE].run())
    yield
    running.cancel()


async def end_pages(app: web.Application) -> None:
    """Signal handler: the server does not wait for pages, which would stay for ever."""
    await app[LIVE].close()
