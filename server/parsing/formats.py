"""The formats that models write calls and reasoning in, by name, and which of them a chat template asks for."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from server.parsing.call_parser import CallFormat, CallParser, Notation
from server.parsing.events import Parser, PlainParser
from server.parsing.reasoning import ReasoningParser

PLAIN_JSON = "json"
"""The format for models that were taught none."""

CALL_FORMATS = {
    "hermes": CallFormat("<tool_call>", "</tool_call>", starts_answer=True, separators=""),
    "llama3_json": CallFormat("<|python_tag|>", starts_answer=True, separators=";,"),
    "mistral": CallFormat("[TOOL_CALLS]", notation=Notation.NAME_AND_OBJECT, may_be_listed=True),
    "mistral_args": CallFormat("[TOOL_CALLS]", notation=Notation.NAME_AND_OBJECT, may_be_listed=True),
    "pythonic": CallFormat(
        "<|python_start|>",
        "<|python_end|>",
        notation=Notation.EXPRESSION,
        starts_answer=True,
        may_be_listed=True,
    ),
    PLAIN_JSON: CallFormat("", starts_answer=True, may_be_listed=True),
}
"""Qwen and Hermes; Llama 3; Mistral, older and newer, which are read alike and written differently; Llama 3.2 and
4 and others that write Python."""

REASONING_MARKS = {
    "think": ("<think>", "</think>"),
    "deepseek_r1": ("<think>", "</think>"),
    "qwen3": ("<think>", "</think>"),
    "mistral": ("[THINK]", "[/THINK]"),
    "seed_oss": ("<seed:think>", "</seed:think>"),
}
"""What stands before reasoning, and after it. Some have the names that other servers give them."""


def call_format_of(template: str) -> str | None:
    """The name of the format in which this chat template wants calls, where that is plain."""
    if "[TOOL_CALLS]" in template:
        return "mistral_args" if "[ARGS]" in template else "mistral"
    if "<tool_call>" in template:
        # Qwen3-Coder and GLM have other things than JSON between these marks.
        return None if "<function=" in template or "<arg_key>" in template else "hermes"
    if "[func_name1(" in template:
        return "pythonic"
    if '"parameters": ' in template and ("<|python_tag|>" in template or "Environment: ipython" in template):
        return "llama3_json"
    return None


def reasoning_of(template: str) -> str | None:
    """The name of the marks that this chat template knows reasoning by, where that is plain."""
    for name, (_, closing) in REASONING_MARKS.items():
        if closing in template:
            return name
    return None


def has_begun(prompt: str, reasoning: str) -> bool:
    """Whether the end of a prompt has opened the reasoning already."""
    return prompt.rstrip().endswith(REASONING_MARKS[reasoning][0])


def reasoning_end(reasoning: str, control_tokens: Mapping[str, int]) -> str | int:
    """The closing mark as a grammar has it (`GrammarSpec.after`)."""
    closing = REASONING_MARKS[reasoning][1]
    return control_tokens.get(closing, closing)


def marks(call_format: str | None, reasoning: str | None) -> frozenset[str]:
    """What has to be in an answer's text for its parser. Where one of them is a special token of the tokenizer,
    special tokens must not be left out of the text."""
    found: set[str] = set()
    if call_format is not None:
        form = CALL_FORMATS[call_format]
        found |= {form.opening, form.closing}
        if form.notation is Notation.NAME_AND_OBJECT:
            found |= {"[ARGS]", "[CALL_ID]"}
    if reasoning is not None:
        found |= set(REASONING_MARKS[reasoning])
    return frozenset(found - {""})


def parser_of(
    call_format: str | None,
    tools: Collection[str] = (),
    *,
    reasoning: str | None = None,
    is_thinking: bool = False,
    held: bool = False,
) -> Parser:
    """For one answer. `call_format`, `reasoning`: names of formats, None where there is nothing to find; `tools`:
    the names of the tools; `is_thinking`: the prompt has opened the reasoning; `held`: as `CallParser` has it."""
    parser: Parser = PlainParser()
    if call_format is not None:
        parser = CallParser(CALL_FORMATS[call_format], tools, held=held)
    if reasoning is None:
        return parser
    return ReasoningParser(*REASONING_MARKS[reasoning], parser, has_begun=is_thinking)
