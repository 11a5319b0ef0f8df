"""From a client's grammar to llguidance's form of it, within bounds that hold before anything is compiled."""

from __future__ import annotations

import json
from typing import Any

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import gbnf_to_lark

from scheduler.core.request import InvalidRequestError
from scheduler.core.sampling import GrammarKind, GrammarSpec

MAX_SOURCE = 256 * 1024
"""Characters of a grammar. Of the schemas of JSONSchemaBench 0.2 % are longer."""

MAX_REGEX = 16 * 1024
"""Characters of a regular expression."""

MAX_DEPTH = 64
"""Levels of a JSON schema within each other."""

WHITESPACE = r"[ \t]{1,2}|\r?\n[ \t]{0,40}"
"""What may stand between the parts of a JSON text, once: enough to indent, too little to go on forever."""


FORMATS = frozenset({"date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid"})
"""Of strings, that are enforced."""

_DATA = frozenset({"const", "default", "enum", "example", "examples"})
"""Keywords whose values are no schemas."""

_MAPS = frozenset({"$defs", "definitions", "dependencies", "dependentSchemas", "patternProperties", "properties"})
"""Keywords whose values have schemas by names."""


def compilable(spec: GrammarSpec) -> str:
    """What llguidance compiles. Raises `InvalidRequestError` for a text that is too large, or no such grammar."""
    check_size(spec)
    source = _source(spec)
    return source if spec.after is None else _after_reasoning(spec.after, source)


def _source(spec: GrammarSpec) -> str:
    match spec.kind:
        case GrammarKind.JSON_SCHEMA:
            schema = _loaded(spec.text, "the JSON schema")
            return _json_grammar(with_options(schema, spec.whitespace, strict=spec.strict, closed=spec.closed))
        case GrammarKind.JSON_OBJECT:
            return _json_grammar(with_options({"type": "object"}, spec.whitespace))
        case GrammarKind.REGEX:
            return LLMatcher.grammar_from_regex(spec.text)
        case GrammarKind.CHOICE:
            return LLMatcher.grammar_from_regex("|".join(map(_literal, _choices(spec.text))))
        case GrammarKind.LARK:
            return _lark(spec.text)


def check_size(spec: GrammarSpec) -> None:
    """Raise `InvalidRequestError` for a text that is too large to look at, or has halves of characters."""
    longest = MAX_REGEX if spec.kind is GrammarKind.REGEX else MAX_SOURCE
    if len(spec.text) > longest:
        raise InvalidRequestError(f"the grammar has {len(spec.text)} characters, more than {longest}")
    try:
        spec.text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"the grammar is not UTF-8: {error.reason}") from error


def _json_grammar(schema: dict[str, Any]) -> str:
    """For the JSON texts that a schema accepts. Raises `InvalidRequestError` for what is no schema."""
    try:
        return LLMatcher.grammar_from_json_schema(json.dumps(schema))
    except ValueError as error:
        raise InvalidRequestError(f"the JSON schema cannot be read: {error}") from error


def unforced(source: str) -> str:
    """The same, for llguidance not to choose how a forced text is divided into tokens."""
    option = '%llguidance {"no_forcing": true}\n'
    first, *others = _grammars(source)
    if first.get("lark_grammar") is None:
        first, others = {"lark_grammar": "start: @first"}, [{**first, "name": "first"}, *others]
    return json.dumps({"grammars": [{**first, "lark_grammar": option + first["lark_grammar"]}, *others]})


def _after_reasoning(end: str | int, source: str) -> str:
    """Anything up to a mark, and then what the grammar says."""
    if isinstance(end, int):
        thought = f"thought: /(?s:.*)/ <[{end}]>"
    else:
        thought = f"thought[lazy]: /(?s:.*)/ {json.dumps(end)}"
    (answer,) = _grammars(source)
    whole = f"start: thought /\\n{{0,2}}/ @answer\n{thought}"
    return json.dumps({"grammars": [{"lark_grammar": whole}, {**answer, "name": "answer"}]})


def _grammars(source: str) -> list[dict[str, Any]]:
    """What llguidance compiles is one grammar in Lark's notation, or a list of several in JSON."""
    grammars: list[dict[str, Any]] = [{"lark_grammar": source}]
    return json.loads(source)["grammars"] if source.startswith("{") else grammars


def with_options(
    schema: Any, whitespace: str | None = None, *, strict: bool = True, closed: bool = False
) -> dict[str, Any]:
    """A schema that says how its JSON is written, for llguidance, as it stands after `%json` in a Lark grammar
    too. Raises `InvalidRequestError` for what is no schema, or one of too many levels."""
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise InvalidRequestError("a JSON schema is an object")
    if _depth(schema) > MAX_DEPTH:
        raise InvalidRequestError(f"the JSON schema has more than {MAX_DEPTH} levels")
    options: dict[str, Any] = {"lenient": not strict}
    if whitespace == "":
        options["whitespace_flexible"] = False
    else:
        options["whitespace_pattern"] = WHITESPACE if whitespace is None else whitespace
    schema = _with_known_formats(_closed(schema) if closed else schema)
    return {**schema, "x-guidance": options}


def _loaded(text: str, what: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{what} cannot be read: {error}") from error


def _depth(value: Any) -> int:
    """Levels of objects and arrays within each other, counted no further than one too many."""
    depth, level = 0, [value]
    while depth <= MAX_DEPTH:
        level = [
            item
            for parent in level
            if isinstance(parent, dict | list)
            for item in (parent.values() if isinstance(parent, dict) else parent)
        ]
        if not level:
            break
        depth += 1
    return depth


def _with_known_formats(schema: Any) -> Any:
    """A format that nobody knows says nothing, by the standard; llguidance would refuse it."""
    if isinstance(schema, list):
        return [_with_known_formats(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: value if key in _DATA else _with_known_formats(value)
        for key, value in schema.items()
        if key != "format" or not isinstance(value, str) or value in FORMATS
    }


def _closed(schema: Any) -> Any:
    """Without properties that no object in it names."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {
        key: {name: _closed(part) for name, part in value.items()}
        if key in _MAPS and isinstance(value, dict)
        else value
        if key in _DATA
        else _closed(value)
        for key, value in schema.items()
    }
    names = any(isinstance(schema.get(key), dict) for key in ("properties", "patternProperties"))
    return {"additionalProperties": False} | closed if names else closed


def _choices(text: str) -> list[str]:
    choices = _loaded(text, "the list of choices")
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
        raise InvalidRequestError("the choices are a list of non-empty strings")
    return choices


def _literal(text: str) -> str:
    """A regular expression for this text."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _lark(text: str) -> str:
    if text.lstrip().startswith("{"):  # which llguidance would read as a grammar of its own in JSON
        raise InvalidRequestError("the grammar is neither in Lark's notation nor in GBNF")
    if "::=" not in text:
        return text
    try:
        return gbnf_to_lark(text)
    except Exception as error:  # a converter that knows no error of its own
        raise InvalidRequestError(f"the GBNF grammar cannot be read: {error}") from error
