"""What was found out about a model once: a small file in the user's cache for each thing, named after all that it
depends on."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

Facts = dict[str, Any]
"""As JSON has them."""


def remembered(kind: str, depends_on: tuple[object, ...], find: Callable[[], Facts]) -> Facts:
    """What `find` gave, now or when it was last called with the same `depends_on`."""
    digest = hashlib.sha256(repr(depends_on).encode()).hexdigest()[:16]
    file = platformdirs.user_cache_path("carousel") / kind / f"{digest}.json"
    try:
        known: Facts = json.loads(file.read_text())
        if isinstance(known, dict):
            return known
    except (OSError, ValueError):
        pass
    found = find()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found) + "\n")
    except OSError as error:
        _warn(file.parents[1], error.strerror)
    return found


def remembered_of_type(
    what: str, version: int, config: PretrainedConfig, find: Callable[[PretrainedConfig], Facts]
) -> Facts:
    """Of all models with this config, whatever their weights. `version` is that of what is remembered."""
    facts = (version, what, torch.__version__, transformers.__version__, config.to_json_string(use_diff=False))
    return remembered("probes", facts, lambda: find(config))


@functools.cache
def _warn(folder: Path, reason: str) -> None:
    """Once, however many things there are."""
    logger.warning("what was found out about the model cannot be remembered in %s (%s)", folder, reason)


def model_version(model_path: str) -> str:
    """What changes when the model does: of a folder its files' sizes and times, of a Hugging Face id the commit in
    the cache, from which the model has just been read."""
    if (folder := Path(model_path)).is_dir():
        stats = [(file.name, file.stat()) for file in sorted(folder.glob("*"))]
        return " ".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)
    config = try_to_load_from_cache(model_path, "config.json")
    return Path(config).parent.name if isinstance(config, str) else ""
