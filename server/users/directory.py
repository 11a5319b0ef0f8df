"""Who may use the server: the users file, and the directory of those who are in it.

The file is YAML and may be edited while the server runs. Of a key it holds only the SHA-256.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from scheduler.client.background import keep_running
from scheduler.core.request import ANONYMOUS as ANONYMOUS_NAME
from server.private import check_regular
from server.validation import place, sentence

CHECK_SECONDS = 1.0
"""How often the file is looked at for changes."""

KEY_PREFIX = "sk-carousel-"
RESERVED_NAMES = frozenset({ANONYMOUS_NAME, "other"})
"""The user of a server without users, and metrics' word for the users that have no series of their own."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HASH = re.compile(r"[0-9a-f]{64}")

logger = logging.getLogger(__name__)


class UsersFileError(ValueError):
    """The users file cannot be used; the message, in one line, says what is wrong with it."""


def _check_name(name: str) -> str:
    if name in RESERVED_NAMES:
        raise PydanticCustomError("reserved", "is a reserved name")
    if not _NAME.fullmatch(name):
        raise PydanticCustomError("name", "should be 1 to 64 letters, digits, dots, underscores and hyphens")
    return name


def _check_hash(value: str) -> str:
    if not _HASH.fullmatch(value):
        raise PydanticCustomError("hash", "should be the SHA-256 of a key, as 64 small hex digits")
    return value


UserName = Annotated[str, AfterValidator(_check_name)]
KeyHash = Annotated[str, AfterValidator(_check_hash)]
Limit = Annotated[int, Field(ge=1)]
Priority = Literal["high", "normal", "low"]

_ENGINE_PRIORITY: dict[Priority, int] = {"high": -1000, "normal": 0, "low": 1000}
"""Lower goes earlier. A request's own priority is between -100 and 100, so it never leaves its class."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _check_mapping(cls, content: Any) -> Any:
        if content is None:  # `alice:` with nothing below
            return {}
        if not isinstance(content, dict | cls):
            raise PydanticCustomError("mapping", "should be a mapping")
        return content


class UserLimits(_Entry):
    """What one user may ask of the server; None: as much as there is."""

    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    """Prompt tokens and generated ones."""
    max_running: Limit | None = None
    """Sequences that have a seat at the same time; others wait."""
    max_queued: Limit | None = None
    """Requests that wait for their first token at the same time; others are refused."""


class UserSettings(_Entry):
    """What the file says of one user."""

    keys: list[KeyHash] = []
    weight: Annotated[float, Field(ge=1e-6, le=1e6)] = 1.0
    """Share of the engine, relative to the other users'."""
    priority: Priority = "normal"
    disabled: bool = False
    limits: UserLimits = UserLimits()


class User(UserSettings):
    """A user, by name."""

    name: str

    @property
    def engine_priority(self) -> int:
        return _ENGINE_PRIORITY[self.priority]


ANONYMOUS = User(name=ANONYMOUS_NAME)
"""Everybody, on a server without users."""


class _UsersFile(_Entry):
    users: Annotated[dict[UserName, UserSettings], BeforeValidator(lambda users: {} if users is None else users)]


def new_key() -> str:
    return KEY_PREFIX + secrets.token_urlsafe(32)


def hash_of(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


def read_users(file: Path) -> dict[str, User]:
    """The users of a file, by name. Raises `UsersFileError`."""
    try:
        check_regular(file)
        content = YAML(typ="safe", pure=True).load(file)
    except FileNotFoundError:
        raise UsersFileError(
            f"{file}: there is no such file; `carousel users add NAME --users {file}` makes one"
        ) from None
    except OSError as error:
        raise UsersFileError(f"{file}: cannot be read: {error.strerror}") from error
    except MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark is not None else ""
        raise UsersFileError(f"{file}: not valid YAML: {line}{error.problem or error.context}") from error
    except RecursionError:
        raise UsersFileError(f"{file}: not valid as a users file: it is nested too deeply") from None
    except (YAMLError, ValueError) as error:  # ValueError: it is not UTF-8, or no date is the 45th of May
        raise UsersFileError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from error
    return check_users(file, content)


def check_users(file: Path, content: Any) -> dict[str, User]:
    """The users in the parsed content of a file. Raises `UsersFileError`."""
    if not isinstance(content, dict):
        raise UsersFileError(f"{file}: expected a mapping that begins with `users:`")
    try:
        entries = _UsersFile.model_validate(content).users
    except ValidationError as error:
        problems = [
            sentence(problem, place(problem).removesuffix(".[key]")) for problem in error.errors(include_url=False)
        ]
        raise UsersFileError(f"{file}: {'; '.join(problems)}") from error
    users = {name: User(name=name, **entry.model_dump()) for name, entry in entries.items()}
    owners: dict[str, str] = {}
    for user in users.values():
        for key in user.keys:
            if owners.setdefault(key, user.name) != user.name:
                raise UsersFileError(f"{file}: {owners[key]} and {user.name} have the same key")
    return users


class UserDirectory:
    """The users of a file, who are looked up by their keys. Raises `UsersFileError` if it cannot begin."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._seen = self._fingerprint()
        self._keys: list[tuple[bytes, User]]
        self._take(read_users(file))

    def find(self, key: str) -> User | None:
        """The user whom a key belongs to. Takes as long whoever it is, so that time tells nothing of the keys."""
        presented = hash_of(key).encode()
        found = None
        for stored, user in self._keys:
            if hmac.compare_digest(stored, presented):
                found = user
        return found

    def named(self, name: str) -> User | None:
        """The user of this name, if there is one with a key."""
        return next((user for _, user in self._keys if user.name == name), None)

    async def watch(self) -> None:
        """Follow the file's changes, until cancelled."""
        await keep_running(f"following the changes of {self._file}", self._follow)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            fingerprint = self._fingerprint()
            if fingerprint != self._seen:
                self._seen = fingerprint
                await self._reload()

    async def _reload(self) -> None:
        """Read the file again. If it is wrong now, the users from before stay."""
        try:
            users = await asyncio.to_thread(read_users, self._file)  # hundreds of users take a while to parse
        except UsersFileError as error:
            logger.error("%s (the users from before stay)", error)
        else:
            self._take(users)

    def _take(self, users: dict[str, User]) -> None:
        self._keys = [(key.encode(), user) for user in users.values() for key in user.keys]
        logger.info("%s: %d users", self._file, len(users))

    def _fingerprint(self) -> tuple[int, ...] | None:
        try:
            status = self._file.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino
