"""What the scripts share: where the servers are, and how they say what they saw."""

from __future__ import annotations

import os
from typing import Any

URL = os.environ["CAROUSEL_URL"]
"""Of the default model."""
MODEL = os.environ["CAROUSEL_MODEL"]
TOOLS_URL = os.environ["CAROUSEL_TOOLS_URL"]
"""Of a model that was taught to call tools."""
TOOLS_MODEL = os.environ["CAROUSEL_TOOLS_MODEL"]

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
ASK = "What is the weather in Paris?"
SAY = [{"role": "user", "content": "Name three rivers."}]


def check(what: str, holds: Any, seen: Any = None) -> None:
    """Print what was checked. Raises `SystemExit` if it does not hold."""
    if not holds:
        raise SystemExit(f"failed: {what}; saw {seen!r}")
    print(f"ok: {what}", flush=True)
