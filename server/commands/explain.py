"""`carousel generate --explain`: the steps of an answer, in words or as JSON."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import msgspec
from msgspec import UNSET
from rich.console import Console
from rich.text import Text

from scheduler.client.stream import Delta
from scheduler.text.tokenizer import Tokenizer
from server.api.explanation import ChosenToken, ExplainedStep, Explainer, NamedToken

MAX_SHOWN = 12
"""Tokens of a step's input that are shown: the first and the last of them."""

INDENT = 9
"""Columns under the number of a step."""


class JsonSteps:
    """A line of JSON for each step, then one with the answer."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int]) -> None:
        self._explainer = Explainer(tokenizer, prompt_token_ids)
        self._text = ""

    def show(self, delta: Delta) -> None:
        self._explainer.take(delta)
        steps = self._explainer.pop()
        for step in () if steps is UNSET else steps:
            self._print(msgspec.json.encode(step))
        self._text += delta.text
        if delta.finish_reason is not None:
            self._print(msgspec.json.encode({"answer": self._text, "finish_reason": delta.finish_reason}))

    def _print(self, line: bytes) -> None:
        sys.stdout.write(line.decode() + "\n")
        sys.stdout.flush()


class ReadableSteps:
    """Three lines for each step: what goes in, what may come next, what was taken; and the answer at the end."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int]) -> None:
        self._explainer = Explainer(tokenizer, prompt_token_ids)
        self._console = Console(soft_wrap=True, highlight=False)
        self._text = ""

    def show(self, delta: Delta) -> None:
        self._explainer.take(delta)
        steps = self._explainer.pop()
        for step in () if steps is UNSET else steps:
            self._console.print(_heading(step))
            for place, token in enumerate(step.tokens):
                if step.drafted:
                    self._console.print(_guess(step, place, token))
                self._console.print(_likeliest(token))
                self._console.print(_taken(token))
        self._text += delta.text
        if delta.finish_reason is not None:
            ending = f"It ended with {delta.finish_reason}: " if delta.finish_reason != "stop" else "Answer: "
            self._console.print(Text(ending, style="dim").append(self._text, style="not dim bold"))


def quoted(token: NamedToken) -> str:
    """A token's text so that blanks and line breaks are seen."""
    return '"' + token.text.replace("\n", "⏎").replace("\t", "⇥") + '"'


def _heading(step: ExplainedStep) -> Text:
    """What the model reads, and what it remembers."""
    line = Text(f"step {step.step}".ljust(INDENT), style="bold cyan")
    count = len(step.input)
    cached = f"{step.cached} tokens in the cache, " if step.cached else "nothing in the cache, "
    if step.dropped:
        cached = f"{step.dropped} tokens have made room, {cached}"
    line.append(f"{cached}{count} {'goes' if count == 1 else 'go'} in: ", style="not bold default")
    names = [quoted(token) for token in step.input]
    if count > MAX_SHOWN:
        names = [*names[: MAX_SHOWN // 2], "…", *names[-MAX_SHOWN // 2 :]]
    line.append(" ".join(names), style="not bold magenta")
    if step.drafted:
        line.append(f", with {len(step.drafted)} guessed: ", style="not bold default")
        for place, token in enumerate(step.drafted):
            right = place < step.kept
            line.append(quoted(token) + " ", style="not bold green" if right else "not bold red strike")
    line.append(f"  {step.milliseconds:.1f} ms", style="not bold dim default")
    if step.sequences > 1:
        line.append(f" for {step.sequences} answers", style="not bold dim default")
    return line


def _guess(step: ExplainedStep, place: int, token: ChosenToken) -> Text:
    """What became of the guess at this place."""
    line = Text(" " * INDENT)
    if place < step.kept:
        return line.append(f"{quoted(token)} was guessed, and it is right:", style="green")
    if place < len(step.drafted):
        return line.append(f"{quoted(step.drafted[place])} was guessed, and it is wrong:", style="red")
    return line.append("and the token after them:", style="dim")


def _likeliest(token: ChosenToken) -> Text:
    """What could come next."""
    line = Text(" " * INDENT)
    for other in token.likeliest:
        is_taken = other.id == token.id
        line.append(quoted(other), style="bold green" if is_taken else "")
        line.append(f" {other.probability:.1%}   ", style="green" if is_taken else "dim")
    return line


def _taken(token: ChosenToken) -> Text:
    """Which one came, and how."""
    line = Text(" " * INDENT + "→ ").append(quoted(token), style="bold green")
    if isinstance(token.number, float) and isinstance(token.part, tuple):
        low, high = token.part
        line.append(
            f", drawn from {token.candidates:,}: the number {token.number:.4f} fell on its part, {low:.4f} to "
            f"{high:.4f}",
            style="dim",
        )
    else:
        line.append(", the likeliest (greedy)", style="dim")
    return line
