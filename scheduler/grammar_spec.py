"""What an answer's text has to look like: a grammar as a request carries it, not yet compiled."""

from __future__ import annotations

import enum

import msgspec


class GrammarKind(enum.StrEnum):
    """How a grammar is written."""

    JSON_SCHEMA = "json_schema"
    """The text is a JSON schema, and so a JSON object or a boolean; the answer is JSON that it accepts."""
    JSON_OBJECT = "json_object"
    """Any JSON object. There is no text."""
    REGEX = "regex"
    """The whole answer matches this regular expression."""
    CHOICE = "choice"
    """The text is a JSON array of strings; the answer is one of them."""
    LARK = "lark"
    """A context-free grammar, in Lark's notation as llguidance reads it, or in GBNF (`root ::= ...`)."""


class GrammarSpec(msgspec.Struct, frozen=True, array_like=True):
    """A grammar and how it is written. Equal ones are compiled once."""

    kind: GrammarKind
    text: str = ""
    strict: bool = True
    """Of a JSON schema: refuse keywords that cannot be enforced, where otherwise they are ignored."""
    after: str | int | None = None
    """What ends the reasoning that comes first, where the prompt has begun it: a text, or a control token's id."""
    whitespace: str | None = None
    """Of JSON: what may stand between its parts, as a regular expression; "" for nothing, None for enough to
    indent."""
    closed: bool = False
    """Of a JSON schema: an object that names properties, and says nothing of others, has no others."""

    @property
    def is_json(self) -> bool:
        return self.kind in (GrammarKind.JSON_SCHEMA, GrammarKind.JSON_OBJECT)
