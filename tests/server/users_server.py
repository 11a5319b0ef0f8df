"""A real server with users, and requests in their names."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from openai import AsyncOpenAI

from server.users.file import add_user
from tests.server.serving import Json, Server

COMPLETIONS = "/v1/completions"
LONG = {"prompt": "On and", "max_tokens": 4000, "ignore_eos": True}
"""Takes a seat until it is cancelled."""


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: Json

    @property
    def code(self) -> str:
        code: str = self.body["error"]["code"]
        return code


class UsersServer(Server):
    """Has a users file in its folder, and in `keys` what the file does not hold."""

    def __init__(self, folder: Path, users: Mapping[str, Json], *flags: str) -> None:
        self.users_file = folder / "users.yaml"
        self.keys = {name: add_user(self.users_file, name, settings) for name, settings in users.items()}
        super().__init__(folder / "log", "--users", str(self.users_file), "--dtype", "float32", *flags)

    def client_of(self, name: str) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key=self.keys[name], max_retries=0)

    async def ask(self, name: str, body: Json | None = None, **headers: str) -> Answer:
        """Send a completion request in a user's name; by default one for a token."""
        body = {"prompt": "Once", "max_tokens": 1} if body is None else body
        return await self.send("POST", COMPLETIONS, {**self.authorization(name), **headers}, json=body)

    async def usage(self, name: str, query: str = "") -> Json:
        return (await self.send("GET", f"/v1/usage{query}", self.authorization(name))).body

    def authorization(self, name: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[name]}"}

    async def send(self, method: str, path: str, headers: Mapping[str, str], **content: Any) -> Answer:
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, self.url + path, headers=headers, **content) as response,
        ):
            is_json = response.content_type == "application/json"
            return Answer(response.status, response.headers, await response.json() if is_json else {})

    async def until_status(self, name: str, status: int) -> None:
        """Wait until the server answers a user's requests so: it looks at its file once a second."""
        async with asyncio.timeout(30):
            while (await self.ask(name)).status != status:
                await asyncio.sleep(0.1)

    async def until_logged(self, text: str) -> None:
        async with asyncio.timeout(30):
            while text not in self.log:
                await asyncio.sleep(0.1)
