"""The kernels' builds that this machine can run."""

from __future__ import annotations

from scheduler.processor import available, instruction_set

TESTED = [name for name in dict.fromkeys((instruction_set(), "avx2", "portable")) if name in available()]
"""This processor's own, and the two that run anywhere else. `make prove` takes all that there are."""
