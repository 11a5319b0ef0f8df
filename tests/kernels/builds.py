"""The kernels' builds that this machine can run."""

from __future__ import annotations

from scheduler.machine.processor import available, instruction_set

EVERY = [name for name in dict.fromkeys((instruction_set(), "avx2", "portable")) if name in available()]
"""This processor's own, and the two that run anywhere else: `make sanitize` takes them."""

TESTED = EVERY[:2]
"""Building one takes longer than its tests: this processor's own, and the next lesser one. `make prove` takes all
that there are."""
