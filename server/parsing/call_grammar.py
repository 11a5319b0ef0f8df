"""The grammar of an answer that has to call a tool, in the words of the model's own format."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import msgspec

from scheduler.grammar_spec import GrammarKind, GrammarSpec
from scheduler.text.grammar_source import with_options

MOST_CALLS = 16
"""In one answer."""


class Tool(msgspec.Struct, frozen=True):
    """A function that the model may call."""

    name: str
    parameters: dict[str, Any] = {}
    """A JSON schema; any object, if it is empty."""
    strict: bool = False
    """Whether all of the schema has to be enforced; otherwise as much of it as can be."""


class _Wording(msgspec.Struct, frozen=True):
    """What stands around the arguments. NAME is the tool's."""

    before_arguments: str
    after_arguments: str = ""
    between_calls: str = ""
    before_calls: str = ""
    after_calls: str = ""


_LIST = _Wording('{"name": "NAME", "arguments": ', "}", ", ", "[", "]")
_WORDINGS = {
    "hermes": _Wording('<tool_call>\n{"name": "NAME", "arguments": ', "}\n</tool_call>", "\n"),
    "llama3_json": _Wording('{"name": "NAME", "parameters": ', "}", "; "),
    "mistral": msgspec.structs.replace(_LIST, before_calls="[TOOL_CALLS]["),
    "mistral_args": _Wording("[TOOL_CALLS]NAME[ARGS]"),
    "json": _LIST,
}


_NAME = re.compile('"NAME"|NAME')


def _called(name: str, place: re.Match[str]) -> str:
    """What stands in the place of NAME: as a string of JSON, or as it is."""
    return json.dumps(name) if place[0].startswith('"') else name


def written_format(call_format: str | None) -> str:
    """The name of the format in which an answer that has to call a tool is written, and read. The grammar of
    arguments is that of JSON, so Python's has none."""
    return call_format if call_format in _WORDINGS else "json"


def call_grammar(
    call_format: str,
    tools: Sequence[Tool],
    *,
    several: bool,
    control_tokens: Mapping[str, int],
) -> GrammarSpec:
    """For an answer that calls one of these tools, or `several`, and says nothing else.

    `call_format` as `written_format` has it. `control_tokens`: as `Tokenizer.control_tokens` gives them.
    Raises `InvalidRequestError` for parameters that are no schema.
    """
    wording = _WORDINGS[call_format]

    def literal(text: str) -> str:
        """In Lark: text as a string, control tokens by their ids."""
        parts = re.split(f"({'|'.join(map(re.escape, control_tokens)) or '(?!)'})", text)
        return " ".join(
            f"<[{control_tokens[part]}]>" if part in control_tokens else json.dumps(part, ensure_ascii=False)
            for part in parts
            if part
        )

    repeated = f"({literal(wording.between_calls)} call){{0,{MOST_CALLS - 1}}}" if several else ""
    calls = [f"call_{index}" for index in range(len(tools))]
    rules = [
        f"start: {literal(wording.before_calls)} call {repeated} {literal(wording.after_calls)}",
        f"call: {' | '.join(calls)}",
    ]
    for rule, tool in zip(calls, tools, strict=True):
        schema = with_options({"type": "object", **tool.parameters}, strict=tool.strict)
        before = _NAME.sub(partial(_called, tool.name), wording.before_arguments)
        after = literal(wording.after_arguments)
        rules.append(f"{rule}: {literal(before)} %json {json.dumps(schema, ensure_ascii=False)} {after}")
    return GrammarSpec(GrammarKind.LARK, "\n".join(rules))
