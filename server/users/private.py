"""Files that are nobody's business but their owner's."""

from __future__ import annotations

import logging
import os
from pathlib import Path

_OWNER_ONLY = 0o600

logger = logging.getLogger(__name__)


def make_private(file: Path) -> None:
    """Make an empty file, if there is none, and let nobody but its owner read or write it from now on. Raises
    OSError."""
    os.close(os.open(file, os.O_RDWR | os.O_CREAT, _OWNER_ONLY))
    keep_private(file)


def keep_private(file: Path) -> None:
    """Let nobody but its owner read or write a file, if it is there."""
    try:
        file.chmod(_OWNER_ONLY)
    except FileNotFoundError:
        pass
    except PermissionError:
        logger.warning("%s belongs to somebody else: who may read it is up to them", file)
