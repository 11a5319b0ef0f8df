"""From a body's JSON to its model, without what is not known here: that is named to who sent it, not refused."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import quote

from aiohttp import web
from pydantic import BaseModel

from scheduler.core.request import InvalidRequestError
from server.api.fields import Body, CheckedBody
from server.app_keys import CONFIG
from server.http.record import RequestRecord
from server.once import Once

B = TypeVar("B", bound=Body)

MAX_NAMED = 32
"""Unknown fields of one request that are looked at and named; the others are left out too."""

MAX_NAME = 64
"""Characters of a name that are told."""

OTHERS = frozenset({"ec_transfer_params", "mode", "models", "speed", "state", "style"})
"""Fields of other servers' APIs that are near to some here, and mean something else."""

logger = logging.getLogger(__name__)


UNKNOWN = web.AppKey("unknown", Once)
"""The names of fields that were left out."""


def read(app: web.Application, record: RequestRecord, content: bytes, model: type[B]) -> B:
    """A body that is right by itself; the record is told what was left out of it. Raises `InvalidRequestError` and
    `pydantic.ValidationError`. May be called in a thread."""
    body = model.model_validate_json(content)
    found: dict[str, None] = {}
    _leave_out(body, "", found, refuse=app[CONFIG].unknown_fields == "refuse")
    record.ignored = list(found)
    for name in record.ignored:
        if app[UNKNOWN].is_new(name):
            logger.warning("requests have the field %s, which is not known here and left out", name)
    return body


def _leave_out(body: Body, path: str, found: dict[str, None], *, refuse: bool) -> None:
    """Take the fields that are not known out of a body and of what is in it, and note their paths: those in the
    items of a list are one. Raises `InvalidRequestError`."""
    kind, extra = type(body), body.model_extra
    if extra:
        for name in extra:
            if len(found) >= MAX_NAMED:
                break
            place = joined(path, name)
            if issubclass(kind, CheckedBody):
                check_name(kind, name, place, refuse=refuse)
            found.setdefault(quote(place, safe="[]", errors="replace"))
        extra.clear()
    for name, value in body.__dict__.items():
        if isinstance(value, Body):
            _leave_out(value, joined(path, _known_as(kind, name)), found, refuse=refuse)
        elif isinstance(value, list) and value and not isinstance(value[0], int):
            for item in value:
                if isinstance(item, Body):
                    _leave_out(item, f"{joined(path, _known_as(kind, name))}[]", found, refuse=refuse)


def check_name(model: type[Body], name: str, place: str, *, refuse: bool = False) -> None:
    """Raise `InvalidRequestError` for a field that the model does not have, if it is a misspelt one or is to be
    refused anyway."""
    near = nearest(model, name)
    if near is not None:
        meant = place.removesuffix(name[:MAX_NAME]) + near
        raise InvalidRequestError(f"{place} is not known here; did you mean {meant}?", place)
    if refuse:
        raise InvalidRequestError(f"{place} is not known here", place)


def joined(path: str, name: str) -> str:
    return f"{path}.{name[:MAX_NAME]}" if path else name[:MAX_NAME]


def _known_as(model: type[BaseModel], name: str) -> str:
    return model.model_fields[name].alias or name


@lru_cache(1024)
def names_of(model: type[Body]) -> frozenset[str]:
    """What a request may call the model's fields."""
    return frozenset({*model.synonyms} | {_known_as(model, name) for name in model.model_fields})


@lru_cache(4096)
def nearest(model: type[Body], name: str) -> str | None:
    """The field that is misspelt so: with up to two letters more, fewer, changed or swapped, and with most of its
    letters in place."""
    if name in OTHERS or name in names_of(model) or len(name) > MAX_NAME:
        return None
    for distance in (1, 2):
        for known in sorted(names_of(model)):
            if 2 * distance < max(len(name), len(known)) and _is_within(name, known, distance):
                return known
    return None


def _is_within(one: str, other: str, distance: int) -> bool:
    """Whether so many steps lead from the one to the other."""
    if abs(len(one) - len(other)) > distance:
        return False
    same = 0
    while same < min(len(one), len(other)) and one[same] == other[same]:
        same += 1
    one, other = one[same:], other[same:]
    if not (one and other):
        return True
    if distance == 0:
        return False
    steps: list[tuple[Any, Any]] = [(one[1:], other), (one, other[1:]), (one[1:], other[1:])]
    if one[:2] == other[1::-1]:
        steps.append((one[2:], other[2:]))
    return any(_is_within(rest, of_other, distance - 1) for rest, of_other in steps)
