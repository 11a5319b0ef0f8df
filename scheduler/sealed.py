"""Files that are made once and trusted later: with a sum beside them, which is written when they are on the disk.

A disk that was full, a power cut or a copy that was cut off leave files that are there and are not whole.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def seal(file: Path) -> None:
    """Wait until a file is on the disk, and note its sum. Raises OSError."""
    _sync(file)
    note = _note_of(file)
    unfinished = note.with_suffix(".partial")
    unfinished.write_text(sum_of(file))
    _sync(unfinished)
    unfinished.replace(note)
    _sync(file.parent)


def is_sealed(file: Path) -> bool:
    """Whether a file is what it was when it was sealed. Not, where it may not be read."""
    try:
        return _note_of(file).read_text() == sum_of(file)
    except (OSError, UnicodeDecodeError):
        return False


def sum_of(file: Path) -> str:
    """Its SHA-256, in hex digits."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _note_of(file: Path) -> Path:
    return file.with_name(file.name + ".sha256")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
