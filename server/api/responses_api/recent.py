"""What was said lately, in memory: a client that only names an item of an answer has it found again, for minutes,
also where no responses are kept."""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from typing import Any

import msgspec
from aiohttp import web

MAX_BYTES = 64 << 20
"""Of all users; where there are more, the oldest of the user with most of them go."""

LIFETIME_SECONDS = 30 * 60

Json = dict[str, Any]

_ITEM = re.compile(r"[a-z]+_([0-9a-f]{32})[0-9a-f]{0,16}")


def response_of(item_id: str) -> str | None:
    """The id of the response that an item is part of, by the item's own."""
    found = _ITEM.fullmatch(item_id)
    return None if found is None else f"resp_{found[1]}"


class _Said(msgspec.Struct, frozen=True):
    items: bytes
    """JSON."""
    until: float
    """On the monotonic clock."""


class RecentItems:
    """The items of answers, by user and response. For the event loop."""

    def __init__(self, max_bytes: int = MAX_BYTES, lifetime: float = LIFETIME_SECONDS) -> None:
        self._max_bytes = max_bytes
        self._lifetime = lifetime
        self._said: dict[str, OrderedDict[str, _Said]] = {}
        self._held: dict[str, int] = {}
        """Bytes, by user."""

    def keep(self, user: str, response_id: str, items: list[Json]) -> None:
        said = _Said(msgspec.json.encode(items), time.monotonic() + self._lifetime)
        self._said.setdefault(user, OrderedDict())[response_id] = said
        self._held[user] = self._held.get(user, 0) + len(said.items)
        for each in list(self._said):
            while each in self._said and self._oldest(each).until < time.monotonic():
                self._forget_oldest(each)
        while self.num_bytes > self._max_bytes:
            self._forget_oldest(max(self._held, key=self._held.__getitem__))

    @property
    def num_bytes(self) -> int:
        return sum(self._held.values())

    def find(self, user: str, response_id: str) -> list[Json] | None:
        of_user = self._said.get(user)
        said = None if of_user is None else of_user.get(response_id)
        if said is None or said.until < time.monotonic():
            return None
        items: list[Json] = msgspec.json.decode(said.items)
        return items

    def _oldest(self, user: str) -> _Said:
        return next(iter(self._said[user].values()))

    def _forget_oldest(self, user: str) -> None:
        _, said = self._said[user].popitem(last=False)
        self._held[user] -= len(said.items)
        if not self._said[user]:
            del self._said[user], self._held[user]


RECENT = web.AppKey("recent", RecentItems)
