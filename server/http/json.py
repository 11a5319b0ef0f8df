"""JSON answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import msgspec
from aiohttp import web

Answer: TypeAlias = msgspec.Struct | Sequence[msgspec.Struct]

_encoder = msgspec.json.Encoder()


def encode(body: Answer | Mapping[str, Any]) -> bytes:
    return _encoder.encode(body)


def json_response(
    body: msgspec.Struct, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    return web.Response(body=encode(body), status=status, headers=headers, content_type="application/json")
