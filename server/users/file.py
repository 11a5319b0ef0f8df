"""Edits the users file as a person would: what is not touched stays as it is, comments and all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from server.private import make_private
from server.users.directory import UsersFileError, check_users, hash_of, new_key, read_users

_NEW_FILE = """\
# The users of a Carousel server. It reads changes to this file within about a second.
# Keys are SHA-256 sums: `carousel users add` and `carousel users rotate` print the key itself, once.
users:
"""


def add_user(file: Path, name: str, settings: dict[str, Any]) -> str:
    """Add a user, and make the file if it is not there. Returns the user's key. Raises `UsersFileError`."""
    key = new_key()
    with _edited(file, create=True) as users:
        if name in users:
            raise UsersFileError(f"{file}: {name} is there already; `carousel users rotate` gives a new key")
        users[name] = {"keys": [hash_of(key)], **settings}
    return key


def rotate_key(file: Path, name: str) -> str:
    """Give a user a new key in place of all that they have. Returns it. Raises `UsersFileError`."""
    key = new_key()
    with _edited(file) as users:
        user = _user(file, users, name)
        if keys := user.get("keys"):
            while len(keys) > 1:  # the last one stays, for it holds the comment on whatever comes next
                del keys[0]
            keys[0] = hash_of(key)
        else:
            _set(user, "keys", [hash_of(key)])
    return key


def set_disabled(file: Path, name: str, disabled: bool) -> None:
    """Turn a user's keys off or on. Raises `UsersFileError`."""
    with _edited(file) as users:
        _set(_user(file, users, name), "disabled", disabled)


def _user(file: Path, users: CommentedMap, name: str) -> CommentedMap:
    if name not in users:
        raise UsersFileError(f"{file}: there is no user {name}; there are: {', '.join(map(str, users)) or 'none'}")
    if users[name] is None:
        users[name] = CommentedMap()
    user: CommentedMap = users[name]
    return user


def _set(user: CommentedMap, field: str, value: Any) -> None:
    """A new field goes first: the last one holds the comment on the user below."""
    if field in user:
        user[field] = value
    else:
        user.insert(0, field, value)


@contextmanager
def _edited(file: Path, *, create: bool = False) -> Iterator[CommentedMap]:
    """The file's users to change; what they became is written if it is valid, in one piece, comments and all."""
    target = file.resolve()  # a link stays a link
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 1000  # long lines are not broken
    try:
        make_private(lock := target.with_name(target.name + ".lock"))
        with FileLock(lock):
            exists = target.exists()
            if exists or not create:
                read_users(file)  # says what is wrong with it
            document = yaml.load(target if exists else _NEW_FILE)
            if document["users"] is None:
                document["users"] = CommentedMap()
            yield document["users"]
            check_users(file, document)
            with tempfile.NamedTemporaryFile(
                "w", dir=target.parent, prefix=f".{target.name}.", delete=False
            ) as new:
                try:
                    yaml.dump(document, new)
                    if exists:
                        _keep_access(target.stat(), new.fileno())
                    new.flush()
                    os.fsync(new.fileno())
                    Path(new.name).replace(target)
                except BaseException:
                    Path(new.name).unlink()
                    raise
    except OSError as error:
        raise UsersFileError(f"{file}: cannot be written: {error.strerror}") from error


def _keep_access(old: os.stat_result, new: int) -> None:
    """Who could read the file can still read it, also if it is root who edits it."""
    os.fchmod(new, old.st_mode & 0o777)
    if os.geteuid() == 0:
        os.fchown(new, old.st_uid, old.st_gid)
