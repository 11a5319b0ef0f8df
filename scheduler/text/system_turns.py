"""System turns wherever a conversation has them, as its chat template can carry them.

Some templates take a system turn anywhere, some take one at the start and refuse others or leave them out without
a word, and some know none. Clients send them anywhere: several at the start, and more of them between later turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

Turn = Mapping[str, Any]
"""`role` and `content`, and whatever else a template may look at."""

SYSTEM = "system"
_BETWEEN = "\n\n"
"""What stands between texts that become one turn."""


class SystemTurns(NamedTuple):
    """Where a chat template has system turns."""

    anywhere: bool
    """And as many as there are."""
    at_start: bool
    """One of them."""


def probe(render: Callable[[list[Turn]], str]) -> SystemTurns:
    """See what a template does with system turns. `render` may raise anything: that is a refusal."""
    several = [(SYSTEM, "s0"), (SYSTEM, "s1"), ("user", "u0"), (SYSTEM, "s2"), ("assistant", "a0"), ("user", "u1")]
    return SystemTurns(
        anywhere=_carries(render, [*several, (SYSTEM, "s3")]), at_start=_carries(render, [several[0], several[2]])
    )


def _carries(render: Callable[[list[Turn]], str], turns: Sequence[tuple[str, str]]) -> bool:
    """Whether all of these turns are in what the template makes of them."""
    try:
        text = render([{"role": role, "content": _mark(name)} for role, name in turns])
    except Exception:  # a template is a program, and may fail in any way
        return False
    return all(_mark(name) in text for _, name in turns)


def _mark(name: str) -> str:
    """A text that no template has by itself, and that none divides."""
    return f"probe-{name}-turn"


def arranged(turns: Sequence[Turn], allowed: SystemTurns) -> list[Turn]:
    """The turns as a template can carry them. Of the system turns that it cannot, those at the start become one;
    the others go into the turn that they follow, so that the prompt up to there stays what it was before they
    came, or into the user's turn that follows them, or become one."""
    if allowed.anywhere or all(turn["role"] != SYSTEM for turn in turns):
        return list(turns)
    num_leading = next((place for place, turn in enumerate(turns) if turn["role"] != SYSTEM), len(turns))
    leading = _joined(turn["content"] for turn in turns[:num_leading])
    carried: list[Turn] = []
    waiting = ""
    if allowed.at_start and leading:
        carried.append({"role": SYSTEM, "content": leading})
    else:
        waiting = leading
    for turn in turns[num_leading:]:
        if turn["role"] != SYSTEM:
            if waiting and turn["role"] != "user":
                carried.append({"role": "user", "content": waiting})
                waiting = ""
            carried.append({**turn, "content": _joined((waiting, turn["content"]))} if waiting else turn)
            waiting = ""
        elif carried and carried[-1]["role"] in ("user", "tool"):
            carried[-1] = {**carried[-1], "content": _joined((carried[-1]["content"], turn["content"]))}
        else:
            waiting = _joined((waiting, turn["content"]))
    return [*carried, {"role": "user", "content": waiting}] if waiting else carried


def _joined(texts: Iterable[str]) -> str:
    return _BETWEEN.join(text for text in texts if text)
