"""The files that a GGUF file was split into, as llama.cpp's gguf-split names them."""

from __future__ import annotations

import re
from pathlib import Path


class GgufError(ValueError):
    """This is no GGUF file, or a damaged one; the message says which and why."""


def split_files(path: Path) -> list[Path]:
    """All files of one that was split (`name-00001-of-00003.gguf`), or this one. Raises `GgufError` where one of
    them is missing, or `path` is not the first."""
    found = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.gguf", path.name, re.IGNORECASE)
    if found is None:
        return [path]
    if int(found[2]) != 1:
        raise GgufError(
            f"{path.name} is a part of a split file: give the first one, {found[1]}-00001-of-{found[3]}.gguf"
        )
    parts = [
        path.with_name(f"{found[1]}-{number:05}-of-{found[3]}{path.suffix}")
        for number in range(1, int(found[3]) + 1)
    ]
    for part in parts:
        if not part.exists():
            raise GgufError(f"{path.name} was split into {len(parts)} files, and {part.name} is not beside it")
    return parts
