"""The tokens that end an answer, of all files of a model that say something of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VERSION = 1
"""Of what is remembered."""


def tokenizers_end(folder: Path) -> int | None:
    """The token with which a tokenizer ends a text, as its own files name it. None: they do not, or there are none
    in this form."""
    settings = _read(folder / "tokenizer_config.json")
    name = settings.get("eos_token") or _read(folder / "special_tokens_map.json").get("eos_token")
    if isinstance(name, Mapping):
        name = name.get("content")
    if not isinstance(name, str):
        return None
    for number, token in settings.get("added_tokens_decoder", {}).items():
        if token.get("content") == name:
            return int(number)
    tokenizer = _read(folder / "tokenizer.json")
    for token in tokenizer.get("added_tokens", []):
        if token.get("content") == name:
            number = token["id"]
            return int(number)
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    found = vocabulary.get(name) if isinstance(vocabulary, Mapping) else None
    return found if isinstance(found, int) else None


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
