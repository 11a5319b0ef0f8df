"""What is said once, however often there is reason to: clients repeat themselves with each request."""

from __future__ import annotations


class Once:
    """Remembers what was said, and no more than `most` things: names come from outside."""

    def __init__(self, most: int = 1000) -> None:
        self._most = most
        self._said: set[str] = set()

    def is_new(self, name: str) -> bool:
        """Whether it is to be said now."""
        if name in self._said or len(self._said) >= self._most:
            return False
        self._said.add(name)
        return True
