"""Sequences that another engine has lost."""

from __future__ import annotations

from scheduler.core.request import Request
from scheduler.core.sequence import Sequence
from scheduler.wire.messages import Progress


def resumed(request: Request, progress: Progress) -> Sequence:
    """A sequence that goes on where it was lost: its known tokens are computed again, and charged to nobody."""
    sequence = Sequence(request, progress.index)
    for token_id in progress.token_ids:
        sequence.append(token_id)
    if progress.num_computed > 0:
        sequence.num_preemptions = 1
        sequence.num_ever_computed = progress.num_computed
        sequence.num_cached_tokens = progress.num_cached_tokens
        sequence.num_charged_tokens = min(progress.num_computed, sequence.num_prompt_tokens)
    return sequence
