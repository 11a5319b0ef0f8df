"""`truncation: auto`: of a conversation that is longer than the model's window the oldest turns are left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from aiohttp import web

from scheduler.fitting import PromptTooLongError
from server.api.ask import Ask, Json
from server.api.conversation import Conversation, understand
from server.api.models import longest_sequence
from server.app_keys import ENGINE


def understand_what_fits(app: web.Application, ask: Ask) -> Conversation:
    """Without as many turns as it takes, the oldest first; never without what the system says, and the last turn.
    Raises what `understand` raises."""
    longest = longest_sequence(app[ENGINE].info)
    beginning, starts = _turns(ask.messages)

    def attempt(start: int) -> Conversation | None:
        kept = [*ask.messages[:beginning], *ask.messages[start:]]
        try:
            conversation = understand(app, replace(ask, messages=kept))
        except PromptTooLongError:
            return None
        return conversation if len(conversation.prompt) < longest else None

    if not starts:
        return understand(app, ask)
    if (whole := attempt(starts[0])) is not None:
        return whole
    found: Conversation | None = None
    too_long, fits = 0, len(starts)
    """Places in `starts`."""
    while fits - too_long > 1:
        middle = (too_long + fits) // 2
        if (shorter := attempt(starts[middle])) is None:
            too_long = middle
        else:
            fits, found = middle, shorter
    return found if found is not None else understand(app, ask)


def _turns(messages: Sequence[Json]) -> tuple[int, list[int]]:
    """How many messages of the system come first, and where the others may begin: with what a user says, so that
    no result of a tool is without its call."""
    beginning = 0
    while beginning < len(messages) and messages[beginning]["role"] == "system":
        beginning += 1
    starts = [beginning] if beginning < len(messages) else []
    starts += [place for place in range(beginning + 1, len(messages)) if messages[place]["role"] == "user"]
    return beginning, starts
