"""Whether a client's grammar can be compiled, found out where it can do no harm.

There are grammars for which llguidance takes minutes, or overflows the stack and ends its process, and no look at
a grammar tells them from the others. So each is compiled in a process of its own first, which the kernel ends
when it takes too long, and walked a few tokens into. Those processes are forks of one that has the tokenizer and
waits, which is started when the first grammar comes: `python -m scheduler.text.grammar_checker`, told on its
stdin what it needs.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import resource
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection

import msgspec
import numpy as np
import psutil

from scheduler.core.request import InvalidRequestError
from scheduler.core.sampling import GrammarKind, GrammarSpec
from scheduler.text.grammar import Grammar, GrammarCompiler, GrammarError
from scheduler.text.grammar_source import check_size

MAX_SECONDS = 2.0
"""Of the processor, for one grammar. What ends most of those that are too large is a count of the library's work,
which is the same each time; this is for what it does not count."""

MAX_MEMORY = 1 << 30
"""Bytes, beyond what the waiting process has."""

STACK = 4 << 20
"""Bytes: half of what a thread has, so that what passes here does not overflow there."""

MAX_WAIT = 30.0
"""Seconds for one grammar, on a machine that has much else to do."""

TRIES = 2
"""For one grammar, each with a process of its own if the last one did not answer."""

WALKS = 4
"""Random texts that a grammar is tried on."""

LONGEST_WALK = 32
"""Tokens."""

REMEMBERED = 1024

TOO_MUCH_WORK = f"the grammar takes more than {MAX_SECONDS} s to compile, or too much memory: make it smaller"
_UNKNOWN = "?"


class _Tokenizer(msgspec.Struct):
    definition: str
    end_token_ids: list[int]


class _Verdict(msgspec.Struct):
    complaint: str | None
    is_known: bool = True


class NotCheckedError(RuntimeError):
    """It could not be told whether a grammar can be served, which says nothing of the grammar."""


class GrammarChecker:
    """Tells which grammars can be served. Its methods may be called from any thread, and most take time: not from
    an event loop. `definition` gives the tokenizer as `GrammarCompiler` wants it, when it is needed."""

    def __init__(self, definition: Callable[[], str], end_token_ids: Collection[int]) -> None:
        self._definition = definition
        self._end_token_ids = sorted(end_token_ids)
        self._complaints: dict[bytes, str | None] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def check(self, spec: GrammarSpec, param: str | None = None) -> None:
        """Raise `InvalidRequestError`, which names `param`, for a grammar that is none, that cannot be satisfied,
        or that takes too much work, and `NotCheckedError`. Grammars that are not known yet wait for each other."""
        if self.check_known(spec, param):
            return
        with self._lock:
            if not self.check_known(spec, param):  # or somebody who was before us has asked
                self._remember(_digest(spec), self._verdict(spec))
        self.check_known(spec, param)

    def check_known(self, spec: GrammarSpec, param: str | None = None) -> bool:
        """The same at once, or False for a grammar that has to be tried first. For any thread, event loops too."""
        try:
            check_size(spec)
        except InvalidRequestError as error:
            raise InvalidRequestError(str(error), param) from None
        complaint = self._complaints.get(_digest(spec), _UNKNOWN)
        if complaint == _UNKNOWN:
            return False
        if complaint is not None:
            raise InvalidRequestError(complaint, param)
        return True

    def close(self) -> None:
        """End the process. It starts again if it is needed."""
        with self._lock:
            self._stop()

    def _remember(self, digest: bytes, complaint: str | None) -> None:
        if len(self._complaints) == REMEMBERED:
            del self._complaints[next(iter(self._complaints))]
        self._complaints[digest] = complaint

    def _verdict(self, spec: GrammarSpec) -> str | None:
        for _ in range(TRIES):
            if (verdict := self._ask(spec)) is not None:
                return verdict.complaint
        raise NotCheckedError("the grammar could not be checked: try again in a moment")

    def _ask(self, spec: GrammarSpec) -> _Verdict | None:
        """None where there is no answer."""
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(msgspec.json.encode(spec) + b"\n")
            process.stdin.flush()
            if select.select([process.stdout], [], [], MAX_WAIT)[0]:
                verdict = msgspec.json.decode(process.stdout.readline(), type=_Verdict)
                return verdict if verdict.is_known else None
        except (OSError, msgspec.DecodeError):  # somebody has ended the process
            pass
        self._stop()
        return None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            launch = _Tokenizer(self._definition(), self._end_token_ids)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "scheduler.text.grammar_checker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            assert self._process.stdin is not None
            self._process.stdin.write(msgspec.json.encode(launch) + b"\n")
        return self._process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(OSError):
                self._process.communicate()
            self._process = None


def _digest(spec: GrammarSpec) -> bytes:
    return hashlib.sha256(msgspec.msgpack.encode(spec)).digest()


def main() -> None:
    """Wait for grammars, one a line, and answer each with a verdict."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent decides
    os.nice(5)  # the answers that are being computed are more urgent
    launch = msgspec.json.decode(sys.stdin.buffer.readline(), type=_Tokenizer)
    try:
        compiler = GrammarCompiler(launch.definition, launch.end_token_ids)
    except ValueError as error:
        for _ in sys.stdin.buffer:
            _answer(f"this model's tokenizer is of a kind that cannot be held to a grammar: {error}")
        return
    for line in sys.stdin.buffer:
        pid = os.fork()
        if pid == 0:
            _judge(compiler, msgspec.json.decode(line, type=GrammarSpec))
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            _answer(TOO_MUCH_WORK)
        elif status != 0:
            _answer(None, is_known=False)


def _judge(compiler: GrammarCompiler, spec: GrammarSpec) -> None:
    """Compile a grammar, answer, and leave."""
    os.nice(5)  # ten, with its parent's
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_STACK, (STACK, resource.getrlimit(resource.RLIMIT_STACK)[1]))
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MAX_MEMORY,) * 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # what a library says when it dies
    status = 1
    try:
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
        complaint = _complaint(compiler, spec)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _answer(complaint)
        status = 0
    finally:
        os._exit(status)


def _complaint(compiler: GrammarCompiler, spec: GrammarSpec) -> str | None:
    try:
        for seed in range(WALKS):
            # How much work a grammar of rules is grows with the text; how long an answer is, its author chose.
            _walk(compiler.compile(spec), random.Random(seed), goes_on=spec.kind is GrammarKind.LARK)
    except (InvalidRequestError, GrammarError) as error:
        return str(error)
    except ValueError:  # a byte that no token has: the only ones left are wrong
        return "the grammar leads to texts for which the model has no tokens"
    return None


def _walk(grammar: Grammar, rng: random.Random, *, goes_on: bool) -> None:
    """Read a random text, which perhaps goes on for as long as it can, and forget it. Raises `GrammarError` if the
    grammar leads nowhere, takes too much work, or is one that cannot forget."""
    matcher = grammar.matcher()
    mask = np.zeros(matcher.num_words, np.uint32)
    ends = list(grammar.end_token_ids)
    num_tokens = 0
    while num_tokens < LONGEST_WALK and not matcher.is_finished:
        matcher.fill(mask)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        going_on = allowed[~np.isin(allowed, ends)] if goes_on else allowed
        options = going_on if len(going_on) else allowed  # of free text, all of a vocabulary
        matcher.advance([int(options[rng.randrange(len(options))])])
        num_tokens += 1
    matcher.rollback(num_tokens)


def _answer(complaint: str | None, *, is_known: bool = True) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(_Verdict(complaint, is_known)) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
