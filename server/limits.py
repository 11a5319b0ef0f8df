"""What may be asked of the server: each user's requests and tokens a minute, and how much may wait.

A request over a limit is refused at once: its client learns when to come back, and nobody waits for nothing.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from server.users import User


class LimitExceededError(Exception):
    """A request over a limit. Message, type and code are for the client, in OpenAI's words."""

    def __init__(
        self,
        message: str,
        *,
        reason: str,
        type: str,
        code: str = "rate_limit_exceeded",
        retry_after: float = 1.0,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(message)
        self.reason = reason
        """In a word, for the metrics."""
        self.type = type
        self.code = code
        self.headers = {"Retry-After": str(max(1, math.ceil(retry_after))), **headers}


class Allowance:
    """So much a minute. It refills all the time, up to one minute's worth.

    It may be overdrawn, for what an answer costs is known only when it has been given; the debt refills first.
    """

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def level(self, now: float) -> float:
        """What is left; negative if overdrawn."""
        self._level = min(self.per_minute, self._level + (now - self._at) * self.per_minute / 60)
        self._at = now
        return self._level

    def spend(self, amount: int, now: float) -> None:
        self._level = self.level(now) - amount

    def change(self, per_minute: int, now: float) -> None:
        """From now on it is so much a minute. What is spent stays spent."""
        self._level = min(per_minute, self.level(now))
        self.per_minute = per_minute

    def seconds_until(self, level: float, now: float) -> float:
        return max(0.0, (level - self.level(now)) * 60 / self.per_minute)


class Limits:
    """The queue that is everybody's, and how much of their own limits the users have used."""

    def __init__(self, *, max_queued_requests: int, max_queued_tokens: int) -> None:
        self.max_queued_requests = max_queued_requests
        self.max_queued_tokens = max_queued_tokens
        self.num_queued_requests = 0
        self.num_queued_tokens = 0
        self._accounts: defaultdict[str, _Account] = defaultdict(_Account)

    @contextmanager
    def admit(self, user: User) -> Iterator[Admission]:
        """Let a request in, for as long as it takes. Raises `LimitExceededError`."""
        account = self._accounts[user.name]
        account.follow(user)
        admission = Admission(self, account)
        admission.enter()
        try:
            yield admission
        finally:
            admission.leave()


class _Account:
    """How much of their limits one user has used."""

    def __init__(self) -> None:
        self.requests: Allowance | None = None
        self.tokens: Allowance | None = None
        self.num_queued = 0
        self.max_queued: int | None = None

    def follow(self, user: User) -> None:
        """The user's limits may have changed since the last request."""
        self.requests = _followed(self.requests, user.limits.requests_per_minute)
        self.tokens = _followed(self.tokens, user.limits.tokens_per_minute)
        self.max_queued = user.limits.max_queued


def _followed(allowance: Allowance | None, per_minute: int | None) -> Allowance | None:
    now = time.monotonic()
    if per_minute is None:
        return None
    if allowance is None:
        return Allowance(per_minute, now)
    if allowance.per_minute != per_minute:
        allowance.change(per_minute, now)
    return allowance


class Admission:
    """One request: its place in the queue until its first token, and what it costs its user."""

    def __init__(self, limits: Limits, account: _Account) -> None:
        self._limits = limits
        self._account = account
        self._is_queued = False
        self._num_queued_tokens = 0

    def enter(self) -> None:
        """Before anything of the request is read. Raises `LimitExceededError`."""
        limits, account = self._limits, self._account
        self._check_rate("requests", account.requests)
        self._check_rate("tokens", account.tokens)
        if account.max_queued is not None and account.num_queued >= account.max_queued:
            raise LimitExceededError(
                f"{account.num_queued} of your requests wait for their first token; no more than "
                f"{account.max_queued} may",
                reason="user_queue",
                type="requests",
                headers=self.headers(),
            )
        if limits.num_queued_requests >= limits.max_queued_requests:
            raise self._queue_full("queue", f"{limits.num_queued_requests} requests wait for their first token")
        self._check_queued_tokens(1)
        if account.requests is not None:
            account.requests.spend(1, time.monotonic())
        self._is_queued = True
        account.num_queued += 1
        limits.num_queued_requests += 1

    def add_prompt(self, num_tokens: int) -> None:
        """When its length is known, and before it goes to the engine. Raises `LimitExceededError`."""
        self._check_rate("tokens", self._account.tokens)
        self._check_queued_tokens(num_tokens)
        self.spend_tokens(num_tokens)
        self._num_queued_tokens += num_tokens
        self._limits.num_queued_tokens += num_tokens

    def first_token(self, num_prompt_tokens: int) -> None:
        """A prompt of this length has been computed: it waits no longer, and nor does the request."""
        self._num_queued_tokens -= num_prompt_tokens
        self._limits.num_queued_tokens -= num_prompt_tokens
        if self._is_queued:
            self._is_queued = False
            self._account.num_queued -= 1
            self._limits.num_queued_requests -= 1

    def spend_tokens(self, num_tokens: int) -> None:
        if self._account.tokens is not None:
            self._account.tokens.spend(num_tokens, time.monotonic())

    def leave(self) -> None:
        """The request has ended. Prompts that were not computed are not paid for."""
        self.spend_tokens(-self._num_queued_tokens)
        self.first_token(self._num_queued_tokens)

    def headers(self) -> dict[str, str]:
        """What OpenAI's servers say of the limits that the user has."""
        now = time.monotonic()
        headers: dict[str, str] = {}
        for kind, allowance in (("requests", self._account.requests), ("tokens", self._account.tokens)):
            if allowance is not None:
                full = allowance.seconds_until(allowance.per_minute, now)
                headers[f"x-ratelimit-limit-{kind}"] = str(allowance.per_minute)
                headers[f"x-ratelimit-remaining-{kind}"] = str(max(0, math.floor(allowance.level(now))))
                headers[f"x-ratelimit-reset-{kind}"] = duration(full)
        return headers

    def _check_rate(self, kind: str, allowance: Allowance | None) -> None:
        if allowance is not None and (wait := allowance.seconds_until(1, time.monotonic())) > 0:
            raise LimitExceededError(
                f"rate limit reached: {allowance.per_minute} {kind} per minute; try again in {duration(wait)}",
                reason=f"{kind}_per_minute",
                type=kind,
                retry_after=wait,
                headers=self.headers(),
            )

    def _check_queued_tokens(self, num_tokens: int) -> None:
        """An empty queue takes any prompt: one longer than the whole queue would otherwise never get in."""
        queued = self._limits.num_queued_tokens
        if queued and queued + num_tokens > self._limits.max_queued_tokens:
            raise self._queue_full("queued_tokens", f"{queued} tokens of prompts wait to be computed")

    def _queue_full(self, reason: str, message: str) -> LimitExceededError:
        return LimitExceededError(
            f"the server's queue is full: {message}",
            reason=reason,
            type="server_busy",
            code="queue_full",
            headers=self.headers(),
        )


def duration(seconds: float) -> str:
    """Whole seconds, rounded up, as OpenAI writes them in headers: 1s, 6m0s."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
