"""The grammars of answers that call tools, in the words of the model's own format: of one that has to, and of one
that may, and is held to what it began."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from scheduler.core.sampling import GrammarKind, GrammarSpec
from scheduler.text.grammar_source import with_options
from server.parsing.formats import CALL_FORMATS

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
    before_call: str = ""
    after_call: str = ""
    between_calls: str = ""
    before_calls: str = ""
    after_calls: str = ""


_LIST = _Wording('{"name": "NAME", "arguments": ', "}", between_calls=", ", before_calls="[", after_calls="]")
_WORDINGS = {
    "hermes": _Wording(
        '{"name": "NAME", "arguments": ',
        "}",
        before_call="<tool_call>\n",
        after_call="\n</tool_call>",
        between_calls="\n",
    ),
    "llama3_json": _Wording('{"name": "NAME", "parameters": ', "}", between_calls="; "),
    "mistral": msgspec.structs.replace(_LIST, before_calls="[TOOL_CALLS]["),
    "mistral_args": _Wording("NAME[ARGS]", before_call="[TOOL_CALLS]"),
    "json": _LIST,
}

_NAME = re.compile('("NAME"|NAME)')

_SPACE = r"[ \t\r\n]*"


def can_hold(call_format: str | None) -> bool:
    """Whether there is a grammar of this format. That of arguments is JSON's, so Python's has none."""
    return call_format in _WORDINGS


def written_format(call_format: str | None) -> str:
    """The name of the format in which an answer that has to call a tool is written, and read."""
    return call_format if call_format is not None and can_hold(call_format) else "json"


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
    rules = _Rules(_WORDINGS[call_format], control_tokens, several=several)
    rules.add("start: calls")
    rules.add_calls("calls")
    rules.add_tools(tools)
    return rules.spec()


def held_grammar(
    call_format: str,
    tools: Sequence[Tool],
    *,
    several: bool,
    control_tokens: Mapping[str, int],
    reasoning: tuple[str, str] | None,
) -> GrammarSpec:
    """For an answer that may say anything, and at its end call one of these tools, or `several`. Whatever a parser
    that `parser_of` makes for `held` calls takes for the beginning of one goes on as one.

    `reasoning`: the marks around what the model may think before, in which nothing is a call. The others are as
    for `call_grammar`, for a format that `can_hold`.
    """
    form = CALL_FORMATS[call_format]
    rules = _Rules(_WORDINGS[call_format], control_tokens, several=several)
    rules.add(f"start: answer{'' if reasoning is None else ' | reasoning answer'}")
    answers = ["TEXT"]
    rules.add("TEXT: /(?s:.*)/")
    if form.opening:
        answers += [f"{begun} marked" for begun in rules.add_text_up_to("opened", form.opening)]
        rules.add_calls("marked", behind=form.opening)
    if form.starts_answer:
        answers += rules.add_bare_calls(tools, may_be_listed=form.may_be_listed)
    if reasoning is not None:
        opening, closing = reasoning
        begun = " | ".join(rules.add_text_up_to("thinking", opening, text=f"/{_SPACE}/"))
        ended = " | ".join(rules.add_text_up_to("thought", closing))
        rules.add(f"reasoning: ({begun}) ({ended})")
    rules.add(f"answer: {' | '.join(answers)}")
    rules.add_tools(tools)
    return rules.spec()


class _Rules:
    """Rules in Lark's notation, for one format."""

    def __init__(self, wording: _Wording, control_tokens: Mapping[str, int], *, several: bool) -> None:
        self._wording = wording
        self._control_tokens = control_tokens
        self._several = several
        self._rules: list[str] = []

    def spec(self) -> GrammarSpec:
        return GrammarSpec(GrammarKind.LARK, "\n".join(self._rules))

    def add(self, rule: str) -> None:
        self._rules.append(rule)

    def add_text_up_to(self, name: str, mark: str, *, text: str = "TEXT") -> list[str]:
        """What ends with a mark, which may be written as text or, if there is one, as a control token."""
        self.add(f"{name}[lazy]: {text} {_string(mark)}")
        token = self._control_tokens.get(mark)
        return [name] if token is None else [name, f"{text} <[{token}]>"]

    def add_calls(self, name: str, *, behind: str = "") -> None:
        """Calls with their marks, but for the first mark, if it is there already."""
        words = self._wording
        begun = self._literal((words.before_calls + words.before_call).removeprefix(behind))
        closed = self._literal(words.after_call)
        more = self._more(f"{self._literal(words.between_calls + words.before_call)} call {closed}")
        self.add(f"{name}: {begun} call {closed} {more} {self._literal(words.after_calls)}")

    def add_bare_calls(self, tools: Sequence[Tool], *, may_be_listed: bool) -> list[str]:
        """Calls that begin the answer, with no mark before them: the ways. Only a tool's name tells them from
        other JSON, so up to there it is text that may go on otherwise."""
        more = self._more(f"{_string(self._wording.between_calls)} call")
        ways = [("bare", r"\{", more)]
        if may_be_listed:
            ways.append(("listed", rf"\[{_SPACE}\{{", f'{more} "]"'))
        for name, opening, rest in ways:
            for place, tool in enumerate(tools):
                head = rf'/{_SPACE}{opening}{_SPACE}"name"{_SPACE}:{_SPACE}/'
                self.add(f"{name}_{place}[lazy]: {head} {_string(json.dumps(tool.name))}")
            begun = " | ".join(f"{name}_{place} rest_{place}" for place in range(len(tools)))
            self.add(f"{name}: ({begun}) {rest}")
        return [name for name, _, _ in ways]

    def add_tools(self, tools: Sequence[Tool]) -> None:
        """Each with what its call begins with, and the rest of it. Raises `InvalidRequestError`."""
        words = self._wording
        before, named, after = _NAME.split(words.before_arguments)
        self.add(f"call: {' | '.join(f'call_{place}' for place in range(len(tools)))}")
        for place, tool in enumerate(tools):
            name = json.dumps(tool.name) if named.startswith('"') else tool.name
            schema = with_options({"type": "object", **tool.parameters}, strict=tool.strict)
            arguments = f"%json {json.dumps(schema, ensure_ascii=False)}"
            self.add(f"call_{place}: {self._literal(before + name)} rest_{place}")
            self.add(f"rest_{place}: {self._literal(after)} {arguments} {self._literal(words.after_arguments)}")

    def _more(self, call: str) -> str:
        return f"({call}){{0,{MOST_CALLS - 1}}}" if self._several else ""

    def _literal(self, text: str) -> str:
        """Text as a string, control tokens by their ids."""
        parts = re.split(f"({'|'.join(map(re.escape, self._control_tokens)) or '(?!)'})", text)
        return " ".join(
            f"<[{self._control_tokens[part]}]>" if part in self._control_tokens else _string(part)
            for part in parts
            if part
        )


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
