"""Which request makes the engine crash."""

from __future__ import annotations

from collections.abc import Iterable

STRIKES = 2
"""Crashes in a row with a request in hand, and without a token of its own between them, that make it a suspect."""


class Suspects:
    """Counts, for each request, the crashes since its last token. A suspect is run alone: one that crashes even
    then is at fault, and no other ever is."""

    def __init__(self) -> None:
        self._strikes: dict[str, int] = {}
        self.alone: str | None = None
        """The suspect that is run alone now."""

    def crashed(self, in_hand: Iterable[str]) -> str | None:
        """The engine is lost, and these were in its hands. Returns the one at fault, if that is clear."""
        held = set(in_hand)
        alone, self.alone = self.alone, None
        for request_id in held:
            self._strikes[request_id] = self._strikes.get(request_id, 0) + 1
        return alone if held == {alone} else None

    def cleared(self, request_id: str) -> bool:
        """A request got a token, or has ended. True if it was the one that runs alone."""
        self._strikes.pop(request_id, None)
        was_alone = request_id == self.alone
        if was_alone:
            self.alone = None
        return was_alone

    def next(self, request_ids: Iterable[str]) -> str | None:
        """Of these, the one to be run alone next, if there is a suspect among them."""
        self.alone = next((each for each in request_ids if self._strikes.get(each, 0) >= STRIKES), None)
        return self.alone
