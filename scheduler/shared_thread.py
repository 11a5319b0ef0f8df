"""A thread that several users share: whoever has had least of its time goes first.

One queue for all would let each wait for everything that anybody sent before. Work that takes long is done in
pieces, between which others have their turn.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")

PIECE_SECONDS = 0.01
"""After which somebody else's work may go first."""

MOST_NESTED = 8
"""Tasks in the middle of which others are done."""

Pieces = Generator[None, None, T]
"""Work that pauses now and then, and returns its result."""

_here = threading.local()


def give_way() -> None:
    """In the middle of a task of a shared thread: let others go first who have had less. Elsewhere: nothing."""
    thread: SharedThread | None = getattr(_here, "thread", None)
    if thread is not None:
        thread.let_others_go_first()


@dataclass(slots=True)
class _Job(Generic[T]):
    pieces: Pieces[T]
    future: Future[T]


@dataclass(slots=True)
class _AtWork:
    """Whose job is being done, since when but for what was done for others meanwhile."""

    user: str
    since: float


class SharedThread:
    """Does each user's work in its order. Users with something to do get equal parts of the thread's time: the
    next piece is of the one who has had least, and who comes anew begins level with that one. So a newcomer waits
    for one piece of somebody else's, however much they have sent. Its methods may be called from any thread."""

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._lock = threading.Lock()
        """Of the two below."""
        self._waiting: dict[str, deque[_Job[Any]]] = {}
        """By user, of those who have something to do."""
        self._spent: dict[str, float] = {}
        """Seconds that they have had."""
        self._at_work: list[_AtWork] = []
        """The thread's own: each but the first in the middle of the one before."""

    def submit(self, user: str, task: Callable[[], T]) -> Future[T]:
        """Work that pauses only where it calls `give_way`."""
        return self.submit_pieces(user, _whole(task))

    def submit_pieces(self, user: str, pieces: Pieces[T]) -> Future[T]:
        """Work that others' can come between."""
        job = _Job(pieces, Future[T]())
        with self._lock:
            self._spent.setdefault(user, min(self._spent.values(), default=0.0))
            self._waiting.setdefault(user, deque()).append(job)
        self._thread.submit(self._run_piece)
        return job.future

    def shutdown(self, *, wait: bool = False) -> None:
        """Drop what has not begun; or do all of it first."""
        if not wait:
            with self._lock:
                dropped = [job for jobs in self._waiting.values() for job in jobs]
            for job in dropped:
                job.future.cancel()
        self._thread.shutdown(wait=wait, cancel_futures=not wait)

    def let_others_go_first(self) -> None:
        """As `give_way`, in this thread."""
        if len(self._at_work) > MOST_NESTED:
            return
        busy = {each.user for each in self._at_work}
        mine = self._at_work[-1]

        def may_go_first(user: str) -> bool:
            had = self._spent[mine.user] + time.perf_counter() - mine.since
            return user not in busy and self._spent[user] < had

        while self._work(may_go_first):
            pass

    def _run_piece(self) -> None:
        _here.thread = self
        if self._work(lambda user: True):
            self._thread.submit(self._run_piece)

    def _work(self, may: Callable[[str], bool]) -> bool:
        """Do a piece for the one who has had least, of those who may; whether there was somebody."""
        with self._lock:
            users = [user for user, jobs in self._waiting.items() if jobs and may(user)]
            if not users:
                return False
            user = min(users, key=self._spent.__getitem__)
            job = self._waiting[user].popleft()
        started = time.perf_counter()
        self._at_work.append(_AtWork(user, started))
        is_done = _go_on(job, started + PIECE_SECONDS)
        now = time.perf_counter()
        seconds = now - self._at_work.pop().since
        if self._at_work:
            self._at_work[-1].since += now - started
        with self._lock:
            self._spent[user] += seconds
            if not is_done:
                self._waiting[user].appendleft(job)
            elif not self._waiting[user]:
                del self._waiting[user], self._spent[user]
        return True


def _whole(task: Callable[[], T]) -> Pieces[T]:
    return task()
    yield


def _go_on(job: _Job[Any], until: float) -> bool:
    """Work for so long; whether it is done."""
    if not job.future.running() and not job.future.set_running_or_notify_cancel():
        return True
    try:
        while time.perf_counter() < until:
            next(job.pieces)
    except StopIteration as done:
        job.future.set_result(done.value)
    except BaseException as error:
        job.future.set_exception(error)
    else:
        return False
    return True
