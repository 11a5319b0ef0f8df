"""Files that are nobody's business but their owner's."""

from __future__ import annotations

import errno
import logging
import os
import stat
from pathlib import Path
from typing import BinaryIO

_OWNER_ONLY = 0o600
_OTHERS = stat.S_IRWXG | stat.S_IRWXO

logger = logging.getLogger(__name__)


def create_private(file: Path) -> None:
    """Make an empty file, if there is none, that nobody but its owner may read or write. Raises OSError."""
    os.close(os.open(file, os.O_RDWR | os.O_CREAT, _OWNER_ONLY))


def make_private(file: Path) -> None:
    """The same, and one that is there is from now on as if it had been made so. Raises OSError."""
    create_private(file)
    keep_private(file)


def make_private_folder(folder: Path) -> None:
    """Make a folder for its owner alone, if there is none. One that is there stays as it is: others may have a
    reason to look into it. Raises OSError."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if (mode := folder.stat().st_mode) & _OTHERS:
        logger.warning(
            "%s is open to others (mode %o): the files in it are not, but `chmod 700` would hide their names too",
            folder,
            mode & 0o777,
        )


def new_private_file(file: Path) -> BinaryIO:
    """A file, empty now, that its owner alone may read or write. Raises OSError."""
    make_private(file)
    return file.open("wb")


def check_regular(file: Path) -> None:
    """Raise OSError for what is no file, or none that can be read to its end: a pipe would be waited for."""
    if not stat.S_ISREG(file.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(file))


def keep_private(file: Path) -> None:
    """Let nobody but its owner read or write a file, if it is there."""
    try:
        file.chmod(_OWNER_ONLY)
    except FileNotFoundError:
        pass
    except PermissionError:
        logger.warning("%s belongs to somebody else: who may read it is up to them", file)
