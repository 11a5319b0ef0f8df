"""GET /v1/usage: what the caller used, day by day."""

from __future__ import annotations

from datetime import date

import msgspec
from aiohttp import web

from scheduler.core.request import InvalidRequestError
from server.app_keys import LEDGER, user_of
from server.http.json import json_response
from server.users.ledger import Amounts, DayUsage, total


class UsageReport(msgspec.Struct, frozen=True):
    user: str
    days: list[DayUsage]
    total: Amounts
    object: str = "usage"


async def get_usage(request: web.Request) -> web.Response:
    since = request.query.get("since", "")
    try:
        since = date.fromisoformat(since).isoformat() if since else ""
    except ValueError:
        raise InvalidRequestError(f"since should be a day like 2026-03-01, got {since!r}", "since") from None
    user = user_of(request).name
    days = await request.app[LEDGER].usage(user, since)
    return json_response(UsageReport(user, days, total(days)))
