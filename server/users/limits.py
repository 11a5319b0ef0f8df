"""What may be asked of the server: each user's requests and tokens a minute, and how much may wait.

A request over a limit is refused at once: its client learns when to come back, and nobody waits for nothing.

The queue has room for so many prompts, and for so many tokens of theirs. While there is room everybody gets in.
When it is full, each of the N users who have something in it has a part, an Nth of it, and refused is who would
hold more than that. Who holds nothing gets in: so one user's flood keeps nobody else out, and a prompt longer than
one's part comes through. N users thus fill a queue of L to L (1 + 1/2 + ... + 1/N) at most, and one request each.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from scheduler.core.request import InvalidRequestError
from server.users.directory import User

COUNTS_A_REQUEST = 10
"""Requests that only count tokens, for each that generates some: agents count often."""


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
    """The queue that is everybody's, and how much of their own limits the users have used. `rates_of`: where they
    have used what they may in a minute, if not here."""

    def __init__(
        self, *, max_queued_requests: int, max_queued_tokens: int, rates_of: Limits | None = None
    ) -> None:
        self._rates_of = rates_of
        self.max_queued_requests = max_queued_requests
        self.max_queued_tokens = max_queued_tokens
        self.num_queued_requests = 0
        """Prompts that wait for their first token. A request whose body has not been read counts as one."""
        self.num_queued_tokens = 0
        self._accounts: defaultdict[str, Account] = defaultdict(Account)

    def apart(self) -> Limits:
        """A queue of its own, as large, for the same users: what waits in one takes no room in the other, and what
        is used of a minute's limits is used in both."""
        return Limits(
            max_queued_requests=self.max_queued_requests, max_queued_tokens=self.max_queued_tokens, rates_of=self
        )

    def check_rates(self, user: User) -> None:
        """Before anything of a request is read: raises `LimitExceededError` for what a minute's limits forbid."""
        self.account_of(user).check_rates()

    def count(self, user: User) -> None:
        """Let a request in that generates nothing: so many times as many of them a minute as of others. Raises
        `LimitExceededError`."""
        self.account_of(user).count()

    @contextmanager
    def admit(self, user: User) -> Iterator[Admission]:
        """Let a request in, for as long as it takes. Raises `LimitExceededError`."""
        admission = Admission(self, self.account_of(user))
        admission.enter()
        try:
            yield admission
        finally:
            admission.leave()

    def check_queue(self, account: Account, num_prompts: int, num_tokens: int, *, of_request: int = 0) -> None:
        """May so much more of this user's wait, for a request that has `of_request` places already? Raises
        `LimitExceededError`."""
        others = sum(other.num_queued_requests > 0 for other in self._accounts.values() if other is not account)

        def is_over(limit: int, queued: int, held_before: int, holds: int) -> bool:
            return queued > limit and held_before > 0 and holds > limit / (others + 1)

        queued, held = self.num_queued_requests, account.num_queued_requests
        if is_over(self.max_queued_requests, queued + num_prompts, held - of_request, held + num_prompts):
            raise account.queue_full("queue", f"{queued} requests wait for their first token")
        queued, held = self.num_queued_tokens, account.num_queued_tokens
        if is_over(self.max_queued_tokens, queued + num_tokens, held, held + num_tokens):
            raise account.queue_full("queued_tokens", f"{queued} tokens of prompts wait to be computed")

    def move(self, account: Account, num_prompts: int, num_tokens: int) -> None:
        """So much more (less, if negative) waits."""
        for queue in (self, account):
            queue.num_queued_requests += num_prompts
            queue.num_queued_tokens += num_tokens

    def account_of(self, user: User) -> Account:
        """As the user's limits are now."""
        account = self._accounts[user.name]
        if self._rates_of is None:
            account.follow(user)
        else:
            account.share(self._rates_of.account_of(user))
        return account


class Account:
    """How much of their limits one user has used."""

    def __init__(self) -> None:
        self.requests: Allowance | None = None
        self.tokens: Allowance | None = None
        self.counts: Allowance | None = None
        """Requests that generate nothing."""
        self.num_queued_requests = 0
        self.num_queued_tokens = 0
        self.max_queued: int | None = None

    def follow(self, user: User) -> None:
        """The user's limits may have changed since the last request."""
        self.requests = _followed(self.requests, user.limits.requests_per_minute)
        self.tokens = _followed(self.tokens, user.limits.tokens_per_minute)
        self.max_queued = user.limits.max_queued
        per_minute = user.limits.requests_per_minute
        self.counts = _followed(self.counts, None if per_minute is None else COUNTS_A_REQUEST * per_minute)

    def share(self, other: Account) -> None:
        """The user's limits are those of another account of theirs."""
        self.requests, self.tokens, self.max_queued = other.requests, other.tokens, other.max_queued

    def check_rates(self) -> None:
        self._check_rate("requests", self.requests)
        self.check_token_rate()

    def count(self) -> None:
        self._check_rate("requests", self.counts)
        if self.counts is not None:
            self.counts.spend(1, time.monotonic())

    def check_token_rate(self) -> None:
        self._check_rate("tokens", self.tokens)

    def check_own_queue(self, num_prompts: int) -> None:
        """May so many more of the user's prompts wait, by the user's own limit?"""
        if self.max_queued is not None and self.num_queued_requests + num_prompts > self.max_queued:
            raise LimitExceededError(
                f"{self.num_queued_requests} of your requests wait for their first token; no more than "
                f"{self.max_queued} may",
                reason="user_queue",
                type="requests",
                headers=self.headers(),
            )

    def queue_full(self, reason: str, message: str) -> LimitExceededError:
        return LimitExceededError(
            f"the server's queue is full: {message}, and your part of them is as large as it may be",
            reason=reason,
            type="server_busy",
            code="queue_full",
            headers=self.headers(),
        )

    def headers(self) -> dict[str, str]:
        """What OpenAI's servers say of the limits that the user has."""
        now = time.monotonic()
        headers: dict[str, str] = {}
        for kind, allowance in (("requests", self.requests), ("tokens", self.tokens)):
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
    """One request: the places of its prompts in the queue until their first tokens, and what it costs its user."""

    def __init__(self, limits: Limits, account: Account) -> None:
        self._limits = limits
        self._account = account
        self._num_queued = 0
        self._num_queued_tokens = 0
        self._has_left = False

    def enter(self) -> None:
        """When the body is there, and before it is looked at: it takes one place. Raises `LimitExceededError`."""
        account = self._account
        account.check_rates()
        account.check_own_queue(1)
        self._limits.check_queue(account, 1, 1)
        if account.requests is not None:
            account.requests.spend(1, time.monotonic())
        self._wait(1, 0)

    def add_prompts(self, lengths: Sequence[int]) -> None:
        """When their lengths in tokens are known, and before they go to the engine: each takes a place. Raises
        `LimitExceededError`, and `InvalidRequestError` if they could never wait together."""
        self._check_ever(len(lengths), sum(lengths))
        more = len(lengths) - self._num_queued  # it has one place since it entered
        self._account.check_token_rate()
        self._account.check_own_queue(more)
        self._limits.check_queue(self._account, more, sum(lengths), of_request=self._num_queued)
        self.spend_tokens(sum(lengths))
        self._wait(more, sum(lengths))

    def computed(self, num_prompt_tokens: int) -> None:
        """So many more tokens of its prompts have been computed: they wait no longer, and are not given back. That
        may become known after the request has left."""
        if self._has_left:
            self.spend_tokens(num_prompt_tokens)
        else:
            self._wait(0, -num_prompt_tokens)

    def first_token(self) -> None:
        """A prompt has been computed as a whole: it waits no longer."""
        self._wait(-1, 0)

    def spend_tokens(self, num_tokens: int) -> None:
        if self._account.tokens is not None:
            self._account.tokens.spend(num_tokens, time.monotonic())

    def leave(self) -> None:
        """The request has ended. What was not computed of its prompts is not paid for."""
        self._has_left = True
        self.spend_tokens(-self._num_queued_tokens)
        self._wait(-self._num_queued, -self._num_queued_tokens)

    def headers(self) -> dict[str, str]:
        """What is left of the user's limits, in OpenAI's headers."""
        return self._account.headers()

    def _wait(self, num_prompts: int, num_tokens: int) -> None:
        self._num_queued += num_prompts
        self._num_queued_tokens += num_tokens
        self._limits.move(self._account, num_prompts, num_tokens)

    def _check_ever(self, num_prompts: int, num_tokens: int) -> None:
        """What would not fit into an empty queue is wrong, rather than to be tried again."""
        most = min(self._limits.max_queued_requests, self._account.max_queued or num_prompts)
        if num_prompts > most:
            raise InvalidRequestError(
                f"the request has {num_prompts} prompts, and {most} may wait at a time: send fewer at once",
                "prompt",
            )
        if num_tokens > self._limits.max_queued_tokens:
            raise InvalidRequestError(
                f"the request's prompts have {num_tokens} tokens, and {self._limits.max_queued_tokens} may wait "
                "at a time: send fewer at once",
                "prompt",
            )


def duration(seconds: float) -> str:
    """Whole seconds, rounded up, as OpenAI writes them in headers: 1s, 6m0s."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
