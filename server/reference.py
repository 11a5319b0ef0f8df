"""The page of endpoints and fields, docs/api.md, made from the models that validate them:

python -m server.reference > docs/api.md
"""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterator
from functools import cache
from typing import Any

from pydantic.fields import FieldInfo

from scheduler.core import sampling
from server.api.fields import Body, CheckedBody, NoEffect, Only
from server.api.requests import GenerationRequest, SampledRequest, ServedRequest
from server.api.structured import StructuredFields
from server.openapi import BODIES, WITHOUT_BODIES

Json = dict[str, Any]

INTRODUCTION = """\
# The API, field by field

<!-- Made by `python -m server.reference > docs/api.md`; a test holds it to the models that validate requests. -->

A field that is null counts as not given. A field that is not known here is left out, and named in the answer's
header `X-Carousel-Ignored` (at most 1 KiB) and once in the log. One that is up to two letters away from a known
one is a misspelt one, and the request is refused with status 400. `--unknown-fields refuse` refuses all. In
messages, parts, items and tools, where programs put keys of their own, nothing is taken for misspelt, nor refused.

Headers of a request: `Authorization: Bearer KEY` (or `x-api-key`), `X-Request-Id` (it is the answer's too),
`X-Request-Timeout` (seconds, as the field `timeout`).
"""
GROUPS = (ServedRequest, StructuredFields, SampledRequest, GenerationRequest)
"""What several endpoints share."""

APIS = {"messages_api": "Messages", "responses_api": "Responses", "ollama": "Ollama"}


def page() -> str:
    """In Markdown."""
    told: list[type[Body]] = []
    parts = [INTRODUCTION, _endpoints()]
    models: list[type[Body]] = [*GROUPS, *(model for model, _ in BODIES.values())]
    for model in dict.fromkeys(models):
        parts.append(_section(model, told))
    parts.append("## Objects\n")
    parts += [_object(model) for model in sorted(_nested(), key=lambda model: (model.__name__, model.__module__))]
    return "\n".join(parts)


def _endpoints() -> str:
    rows = ["## Endpoints\n", "| | |", "| --- | --- |"]
    for path, (model, summary) in BODIES.items():
        rows.append(f"| `POST {path}` | {summary}: {_link(model)} |")
    rows.append("| `POST /v1/files` | Send a file of requests: a form with `purpose` and `file` (--batches) |")
    rows += [f"| `{method.upper()} {path}` | {summary} |" for (method, path), summary in WITHOUT_BODIES.items()]
    return "\n".join(rows) + "\n"


def _link(model: type[Body]) -> str:
    title = _title(model)
    return f"[{title}](#{title.lower().replace(' ', '-')})"


def _title(model: type[Body]) -> str:
    """Its name; with that of its API, where two have objects of one name."""
    is_one_of_several = sum(model.__name__ == other.__name__ for other in _nested()) > 1
    return f"{model.__name__} of {_api(model)}" if is_one_of_several and _api(model) else model.__name__


def _api(model: type[Body]) -> str:
    """What has a folder of its own."""
    return next((name for folder, name in APIS.items() if f".{folder}." in model.__module__), "")


def _named(name: str, near: type[Body]) -> type[Body]:
    """The object of this name that a model has."""
    found = [model for model in _nested() if model.__name__ == name]
    return next((model for model in found if _api(model) == _api(near)), found[0])


def _section(model: type[Body], told: list[type[Body]]) -> str:
    """A model's own fields, and the names of the models that have the others."""
    others = [other for other in told if issubclass(model, other)]
    known = {name for other in others for name in other.model_fields}
    own = {name: info for name, info in model.model_fields.items() if name not in known}
    told.append(model)
    said = [f"The body of `POST {path}`." for path, (body, _) in BODIES.items() if body is model]
    said = said or [_said_of(model)]
    if others:
        said.append(f"It has the fields of {', '.join(_link(other) for other in others)} too.")
    lines = [f"## {model.__name__}\n", " ".join(filter(None, said)), "", *_table(model, own)]
    synonyms = {name: ours for name, ours in model.synonyms.items() if name not in (ours, *model.model_fields)}
    for other in others:
        synonyms = {name: ours for name, ours in synonyms.items() if other.synonyms.get(name) != ours}
    if synonyms:
        lines += ["", "What other servers call them is understood too:", "", "| theirs | here |", "| --- | --- |"]
        lines += [f"| `{name}` | {ours} |" for name, ours in synonyms.items()]
    return "\n".join(lines) + "\n"


def _object(model: type[Body]) -> str:
    return "\n".join([f"### {_title(model)}\n", _said_of(model), "", *_table(model, model.model_fields)]) + "\n"


def _said_of(model: type[Body]) -> str:
    said = model.__dict__.get("__doc__") or ""
    return " ".join(said.split())


def _table(model: type[Body], fields: dict[str, FieldInfo]) -> list[str]:
    schema = model.model_json_schema(ref_template="{model}")["properties"]
    rows = ["| field | type | |", "| --- | --- | --- |"]
    for name, info in fields.items():
        known_as = info.alias or name
        kind = "" if _mark(info, Only) else _kind(schema[known_as], model)
        rows.append(f"| `{known_as}` | {kind} | {meaning(name, info)} |")
    return rows


def _mark(info: FieldInfo, kind: type) -> Any:
    return next((mark for mark in info.metadata if isinstance(mark, kind)), None)


def meaning(name: str, info: FieldInfo) -> str:
    said = " ".join((info.description or OF_SAMPLING.get(name, "")).split())
    if (only := _mark(info, Only)) is not None:
        words = " or ".join(f"`{json.dumps(value)}`" for value in only.neutral)
        said = f"Not implemented: refused, unless it asks for nothing ({words or 'null'})."
    elif _mark(info, NoEffect) is not None:
        said = f"{said} Changes nothing in the answer.".strip()
    elif info.is_required():
        said = f"**Required.** {said}"
    elif (default := info.get_default(call_default_factory=True)) not in (None, "", [], {}, False):
        worded = default.model_dump(exclude_unset=True) if isinstance(default, Body) else default
        said = f"{said} By default `{json.dumps(worded)}`."
    return said.replace("|", "\\|").strip()


def _kind(schema: Json, model: type[Body]) -> str:
    """A JSON schema in a few words, of a field of a model."""
    match schema:
        case {"$ref": name}:
            return _link(_named(name.rpartition("__")[2], model))
        case {"anyOf": members}:
            return " or ".join(
                dict.fromkeys(_kind(member, model) for member in members if member.get("type") != "null")
            )
        case {"const": value}:
            return f"`{json.dumps(value)}`"
        case {"enum": values}:
            return ", ".join(f"`{json.dumps(value)}`" for value in values)
        case {"type": "array"}:
            inner = _kind(schema.get("items", {}), model)
            return f"list of {inner}" + (f", at most {schema['maxItems']}" if "maxItems" in schema else "")
        case {"type": "integer" | "number" as kind}:
            least = schema.get("minimum", schema.get("exclusiveMinimum"))
            most = schema.get("maximum")
            bounds = f" from {least}" if least is not None else ""
            return f"{kind}{bounds}" + (f" to {most}" if most is not None else "")
        case {"type": kind}:
            return str(kind)
    return "anything"


@cache
def _nested() -> list[type[Body]]:
    """The objects in bodies."""
    bodies = {model for model, _ in BODIES.values()}
    found = dict.fromkeys(_below(Body))
    return [
        model
        for model in found
        if model is not CheckedBody
        and model not in bodies
        and not issubclass(model, GROUPS)
        and model.__module__.startswith("server.")
    ]


def _below(model: type[Body]) -> Iterator[type[Body]]:
    for each in model.__subclasses__():
        yield each
        yield from _below(each)


def _attribute_docstrings(source: str, name: str) -> dict[str, str]:
    (found,) = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name]
    told = {}
    for field, after in zip(found.body, found.body[1:], strict=False):
        match field, after:
            case ast.AnnAssign(target=ast.Name(id=field_name)), ast.Expr(value=ast.Constant(value=str(said))):
                told[field_name] = said
    return told


OF_SAMPLING = _attribute_docstrings(inspect.getsource(sampling), "Sampling")
"""What its fields mean, which requests have by the same names."""


if __name__ == "__main__":
    print(page(), end="")
